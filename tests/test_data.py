"""The image sets that need no files: shapes, splits and seeds, and keys that do not fit the data."""

import numpy as np
import pytest

from command_lines import in_a_process
from image_sets import as_set, fails
from vffjax.config import Config
from vffjax.data import load as data
from vffjax.data import sizes_of, synthetic


@pytest.mark.parametrize(
    ("name", "shape", "sizes"), [("digits", (8, 8, 1), (1293, 144, 360)), ("synthetic", (16, 16, 3), (1800, 200, 500))]
)
def test_shapes_types_and_determinism(name, shape, sizes):
    first, again = data.load(Config(dataset=name)), data.load(Config(dataset=name))
    assert (first.name, first.image_shape, first.num_classes, len(first.class_names)) == (name, shape, 10, 10)
    for part, size in zip(("train", "validation", "test"), sizes, strict=True):
        split = getattr(first, part)
        assert split.images.shape == (size, *shape) and split.images.dtype == np.uint8
        assert split.labels.shape == (size,) and split.labels.dtype == np.int32
        assert set(split.labels) == set(range(10))
        np.testing.assert_array_equal(split.images, getattr(again, part).images)
        np.testing.assert_array_equal(split.labels, getattr(again, part).labels)
    pixels = first.train.images.reshape(-1, shape[2]) / 255
    np.testing.assert_allclose(first.mean, pixels.mean(axis=0), rtol=1e-9)
    np.testing.assert_allclose(first.std, pixels.std(axis=0), rtol=1e-9)


@pytest.mark.parametrize("name", ["digits", "synthetic"])
def test_the_table_of_sizes_is_right(name):
    made, sizes = data.load(Config(dataset=name)), sizes_of(Config(dataset=name))
    assert (len(made.train) + len(made.validation), made.image_shape, made.num_classes) == sizes
    assert data.split_sizes(Config(dataset=name), sizes.train_images) == (len(made.train), len(made.validation))


def test_digits_use_the_whole_range_and_a_stratified_test_set():
    digits = data.load(Config(dataset="digits"))
    assert digits.train.images.min() == 0 and digits.train.images.max() == 255
    counts = np.bincount(digits.test.labels)
    assert counts.min() >= 34 and counts.max() <= 38


def test_digits_are_the_images_of_scikit_learn():
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    digits = data.load(Config(dataset="digits"))
    ours = as_set(digits.train) + as_set(digits.validation) + as_set(digits.test)
    theirs = as_set(data.Split(np.rint(pixels * 255 / 16).astype(np.uint8), labels))
    assert sorted(ours) == theirs  # so the three parts are disjoint and complete


def test_synthetic_is_learnable_but_not_trivial():
    from sklearn.neighbors import KNeighborsClassifier

    made = data.load(Config(dataset="synthetic", val_fraction=0.0))
    nearest = KNeighborsClassifier(5).fit(made.train.images.reshape(2000, -1) / 255, made.train.labels)
    error = 1 - nearest.score(made.test.images.reshape(500, -1) / 255, made.test.labels)
    assert 0.03 < error < 0.25


def test_training_validation_and_test_images_are_disjoint():
    made = data.load(Config(dataset="synthetic"))  # pixel noise makes all images different
    parts = [{image.tobytes() for image in split.images} for split in (made.train, made.validation, made.test)]
    assert [len(part) for part in parts] == [1800, 200, 500]
    assert len(set.union(*parts)) == 2500


def test_the_seed_draws_the_split_but_not_the_test_images():
    one, two = (data.load(Config(dataset="synthetic", seed=seed)) for seed in (1, 2))
    assert as_set(one.validation) != as_set(two.validation)
    both = [sorted(as_set(d.train) + as_set(d.validation)) for d in (one, two)]
    assert both[0] == both[1]
    np.testing.assert_array_equal(one.test.images, two.test.images)
    np.testing.assert_array_equal(one.test.labels, two.test.labels)


def test_train_examples_is_drawn_before_the_validation_images():
    whole = data.load(Config(dataset="synthetic", val_fraction=0.0))
    few = data.load(Config(dataset="synthetic", train_examples=100, val_fraction=0.25))
    none = data.load(Config(dataset="synthetic", train_examples=100, val_fraction=0.0))
    assert (len(few.train), len(few.validation), len(few.test), len(none.train)) == (75, 25, 500, 100)
    assert none.validation.images.shape == (0, 16, 16, 3) and none.validation.labels.shape == (0,)
    assert sorted(as_set(few.train) + as_set(few.validation)) == as_set(none.train)
    order = np.random.default_rng([0, 0x5EED]).permutation(2000)  # as documented
    made = synthetic.read(Config())[0]
    np.testing.assert_array_equal(few.validation.images, made.images[order[:25]])
    np.testing.assert_array_equal(few.train.labels, made.labels[order[25:100]])
    assert len(whole.train) == 2000


def test_wrong_labels_are_a_share_of_the_images_to_train_on():
    def loaded(share, seed=0):
        return data.load(Config(dataset="digits", wrong_labels=share, seed=seed))

    sound, wrong, other = loaded(0.0), loaded(0.3), loaded(0.3, seed=1)
    changed = wrong.train.labels != sound.train.labels
    assert changed.sum() == round(0.3 * len(sound.train)) and set(wrong.train.labels) == set(range(10))
    shift = (wrong.train.labels - sound.train.labels)[changed] % 10
    assert shift.min() == 1 and shift.max() == 9  # every other class
    assert (other.train.labels != loaded(0.0, seed=1).train.labels).tolist() != changed.tolist()
    assert wrong.train.labels.dtype == np.int32
    np.testing.assert_array_equal(wrong.train.images, sound.train.images)
    for part in ("validation", "test"):
        np.testing.assert_array_equal(getattr(wrong, part).labels, getattr(sound, part).labels)
    assert (loaded(1.0).train.labels != sound.train.labels).all()


def test_std_has_a_floor():
    mean, std = data._moments(np.full((3, 2, 2, 3), 51, np.uint8))
    assert mean == pytest.approx((0.2,) * 3) and std == (1e-3,) * 3


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ({"train_examples": 2001}, "config.train_examples=2001"),
        ({"train_examples": 10, "val_fraction": 0.01}, "config.val_fraction=0.01"),
        ({"train_examples": 1, "val_fraction": 0.9}, "config.val_fraction=0.9"),
        ({"train_examples": 100, "wrong_labels": 0.001}, "config.wrong_labels=0.001"),
        ({"dataset": "imagenet"}, "config.dataset='imagenet'"),
    ],
)
def test_keys_that_do_not_fit_the_data(keys, key):
    fails(lambda: data.load(Config(**({"dataset": "synthetic"} | keys))), key)


def test_import_is_light():
    code = "import sys, vffjax.data.load; print(sorted({'tensorflow_datasets', 'sklearn', 'tensorflow', 'PIL'} & set(sys.modules)))"
    done = in_a_process("-c", code)
    assert (done.returncode, done.stdout.strip()) == (0, "[]")
