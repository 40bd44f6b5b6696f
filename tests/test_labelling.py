"""How images are told labels: class noise in its two forms, wrong labels, and the overlay of forward-forward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oracles import config_of, small_run, streams_from
from runs import assert_same_bits
from vffjax.rules import ff, vff
from vffjax.rules import streams as labelling
from vffjax.training.plan import CODEBOOK, make_task, run_key, task_of_epoch

CLASSES, SHAPE = 5, (4, 6, 2)


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(13, *SHAPE)), jnp.float32), jnp.asarray(rng.permutation(np.arange(13) % CLASSES), jnp.int32)


@pytest.fixture
def codebook(key):
    return labelling.make_codebook(key, CLASSES, SHAPE, 2.0)


def test_the_codebook_is_fixed_by_its_key_and_has_the_scale_asked(key):
    shape = (8, 8, 3)
    codebook = np.asarray(labelling.make_codebook(key, 50, shape, 3.0))
    np.testing.assert_array_equal(codebook, labelling.make_codebook(key, 50, shape, 3.0))
    assert (codebook != np.asarray(labelling.make_codebook(jax.random.key(8), 50, shape, 3.0))).mean() > 0.99
    # 9,600 normal draws: mean within five standard errors, deviation within 4 percent (five of its standard errors).
    assert abs(codebook.mean()) < 5 * 3 / np.sqrt(codebook.size)
    assert abs(codebook.std() / 3 - 1) < 0.04
    correlations = np.corrcoef(codebook.reshape(50, -1)) - np.eye(50)
    assert np.abs(correlations).max() < 0.4


def test_uniform_wrong_labels_are_never_right_and_of_every_other_class(key):
    labels = jnp.asarray(np.repeat(np.arange(CLASSES), 400), jnp.int32)
    wrong = np.asarray(labelling.wrong_labels(key, labels, CLASSES))
    assert wrong.dtype == labels.dtype
    counts = np.array([[np.sum((labels == y) & (wrong == w)) for w in range(CLASSES)] for y in range(CLASSES)])
    assert (np.diag(counts) == 0).all()
    others = counts[~np.eye(CLASSES, dtype=bool)]
    # Expected 100 each, standard deviation 8.7.
    assert others.min() > 55
    assert others.max() < 145


def test_hard_wrong_labels_follow_the_prediction_and_are_never_right(key):
    labels = jnp.zeros(3000, jnp.int32)
    # The right class is by far the likeliest; of the others, odds 6 : 3 : 1 and one next to impossible.
    p = np.array([0.9, 0.06, 0.03, 0.01, 1e-12])
    logits = jnp.asarray(np.tile(np.log(p) + 3.0, (3000, 1)), jnp.float32)
    counts = np.bincount(labelling.wrong_labels(key, labels, CLASSES, logits), minlength=CLASSES)
    assert counts[0] == counts[4] == 0
    expected = 300 * np.array([6, 3, 1])
    assert ((counts[1:4] - expected) ** 2 / expected).sum() < 13.8  # chi-square, 2 degrees of freedom, p = 0.001


def test_hard_wrong_labels_are_drawn_from_each_rows_own_prediction(key):
    labels = jnp.asarray(np.arange(40) % CLASSES, jnp.int32)
    favourite = (np.arange(40) * 3 + 1) % CLASSES
    logits = jnp.asarray(50.0 * np.eye(CLASSES)[favourite], jnp.float32)
    wrong = np.asarray(labelling.wrong_labels(key, labels, CLASSES, logits))
    assert (wrong != labels).all()
    decided = favourite != np.asarray(labels)
    np.testing.assert_array_equal(wrong[decided], favourite[decided])


@pytest.mark.parametrize("rule", [{}, {"labelling": "triplet"}, {"labelling": "triplet", "negatives": "hard"}, {"rule": "head"}], ids=str)
def test_lwnl_leaves_the_clean_stream_bitwise_untouched(rule, batch, key):
    images, labels = batch
    run = small_run(config_of(network="mlp", widths=(4,), **rule), classes=CLASSES, shape=SHAPE)
    streams = streams_from(run, key, images, labels, jnp.zeros((13, CLASSES)))
    np.testing.assert_array_equal(streams.clean, images)
    np.testing.assert_array_equal(streams.labels, labels)
    assert len(streams.copies) == len(streams.copy_labels) == (0 if "rule" in rule else 2 * CLASSES if not rule else 26)


def test_triplet_copies_are_the_images_with_right_then_wrong_noise(batch, codebook):
    images, labels = batch
    wrong = (labels + 2) % CLASSES
    streams = vff.lwnl_triplet(images, labels, wrong, codebook)
    np.testing.assert_array_equal(streams.copy_labels, np.concatenate([labels, wrong]))
    noise = np.asarray(streams.copies) - np.tile(images, (2, 1, 1, 1))
    np.testing.assert_allclose(noise, np.asarray(codebook)[np.asarray(streams.copy_labels)], atol=1e-5)


@pytest.mark.parametrize("copies_per_class", [1, 2, 4])
def test_shared_copies_carry_every_class_equally_often_on_images_of_the_batch(copies_per_class, batch, codebook, key):
    images, labels = batch
    streams = vff.lwnl_shared(vff.drawn_images(key, len(labels), copies_per_class * CLASSES), images, labels, codebook)
    carried = np.asarray(streams.copy_labels)
    np.testing.assert_array_equal(np.bincount(carried, minlength=CLASSES), copies_per_class)
    bare = np.asarray(streams.copies) - np.asarray(codebook)[carried]
    distances = np.abs(bare[:, None] - np.asarray(images)[None]).max((2, 3, 4))
    assert (distances.min(1) < 1e-5).all()
    # Without replacement as long as the images last: use differs by one at most.
    uses = np.bincount(distances.argmin(1), minlength=13)
    assert uses.max() - uses.min() <= 1


def test_shared_copies_are_of_images_drawn_by_the_key(batch, codebook):
    def copies(seed):
        drawn = vff.drawn_images(jax.random.key(seed), len(batch[1]), CLASSES)
        return np.asarray(vff.lwnl_shared(drawn, *batch, codebook).copies).tobytes()

    draws = {copies(seed) for seed in range(5)}
    assert len(draws) == 5
    assert copies(0) in draws


LOW, HIGH = jnp.array([-1.5, -2.0]), jnp.array([2.5, 3.0])


@pytest.mark.parametrize("classes", [5, 8], ids=["one row", "more than one row"])
def test_the_overlay_writes_the_first_pixels_and_no_others(classes, batch):
    images, labels = batch
    out = np.asarray(ff.overlay(images, jax.nn.one_hot(labels, classes), LOW, HIGH)).reshape(13, 24, 2)
    np.testing.assert_array_equal(out[:, classes:], np.asarray(images).reshape(13, 24, 2)[:, classes:])
    for row, label in zip(out, np.asarray(labels), strict=True):
        for pixel in range(classes):
            np.testing.assert_allclose(row[pixel], HIGH if pixel == label else LOW, rtol=1e-6)


def test_forward_forward_streams_are_neutral_right_and_wrong(batch):
    images, labels = batch
    wrong = (labels + 1) % CLASSES
    streams = ff.overlay_streams(images, labels, wrong, CLASSES, LOW, HIGH)
    clean = np.asarray(streams.clean).reshape(13, 24, 2)
    # The neutral label says nothing: the same pixels for all classes and all images, a fifth of the way from black to white.
    np.testing.assert_allclose(clean[:, :CLASSES], np.broadcast_to([-0.7, -1.0], (13, CLASSES, 2)), rtol=1e-5)
    np.testing.assert_array_equal(clean[:, CLASSES:], np.asarray(images).reshape(13, 24, 2)[:, CLASSES:])
    np.testing.assert_array_equal(streams.copy_labels, np.concatenate([labels, wrong]))
    for half, told in ((0, labels), (1, wrong)):
        expected = ff.overlay(images, jax.nn.one_hot(told, CLASSES), LOW, HIGH)
        np.testing.assert_array_equal(streams.copies[13 * half : 13 * (half + 1)], expected)


def test_overlay_pixels_are_black_and_white_of_the_data_set(batch, key):
    """In bytes, the written pixels are 0 and 255."""
    run = small_run(config_of(network="mlp", widths=(4,), rule="ff"), classes=CLASSES, shape=SHAPE)
    streams = streams_from(run, key, *batch)
    written = np.asarray(streams.copies).reshape(26, 24, 2)[:, :CLASSES]
    byte = 255 * (written * np.asarray(run.task.std) + np.asarray(run.task.mean))
    assert set(np.round(byte, 2).ravel() + 0.0) == {0.0, 255.0}


@pytest.mark.parametrize("rule", ["vff", "ff"])
def test_a_sweep_tells_labels_as_training_does(rule, batch):
    images, labels = batch
    run = small_run(config_of(network="mlp", widths=(4,), rule=rule, labelling="triplet"), classes=CLASSES, shape=SHAPE)
    streams = streams_from(run, jax.random.key(0), images, labels)
    for row in range(3):
        told = run.plan.rule.told(run.task, images[row : row + 1], labels[row])
        np.testing.assert_allclose(told[0], streams.copies[row], rtol=1e-6)
    np.testing.assert_array_equal(run.plan.rule.shown(run.task, images), streams.clean)


@pytest.mark.parametrize("cell", [2, 3, 4])
def test_noise_on_a_grid_has_the_scale_asked_and_is_smooth(key, cell):
    codebook = np.asarray(labelling.make_codebook(key, 20, (12, 12, 3), 3.0, cell))
    assert codebook.shape == (20, 12, 12, 3)
    np.testing.assert_allclose(codebook.std(axis=(1, 2, 3)), 3, rtol=1e-5)
    white = np.asarray(labelling.make_codebook(key, 20, (12, 12, 3), 3.0))

    def correlation(noise):
        return np.corrcoef(noise[:, 1:].ravel(), noise[:, :-1].ravel())[0, 1]

    assert abs(correlation(white)) < 0.1
    assert correlation(codebook) > 0.5
    labels = np.corrcoef(codebook.reshape(20, -1)) - np.eye(20)
    assert np.abs(labels).max() < 0.9


@pytest.mark.parametrize("cell", [1, 3])
def test_noise_of_signs_has_two_values_and_the_signs_of_normal_noise(key, cell):
    normal = np.asarray(labelling.make_codebook(key, 20, (12, 12, 3), 3.0, cell))
    signs = np.asarray(labelling.make_codebook(key, 20, (12, 12, 3), 3.0, cell, "signs"))
    np.testing.assert_array_equal(signs, 3 * np.sign(normal))
    assert (signs.dtype, np.unique(signs).tolist()) == (np.float32, [-3.0, 3.0])
    # 960 points of the coarsest grid, each a fair coin: the mean is within five standard errors.
    assert abs(signs.mean()) < 5 * 3 / np.sqrt(20 * (12 // cell) ** 2 * 3)


def task_in(epoch, **changes):
    config = config_of(network="mlp", widths=(4,), noise_scale=2.0, **changes)
    first = make_task(config, CLASSES, SHAPE, (0.5, 0.5), (0.25, 0.25))
    return task_of_epoch(config, first, epoch, None)


@pytest.mark.parametrize("kind", ["normal", "signs"])
def test_noise_that_is_redrawn_is_a_function_of_the_seed_and_the_epoch(kind):
    drawn = functools.partial(task_in, noise_kind=kind, noise_redrawn="epoch")
    books = [drawn(epoch).codebook for epoch in range(4)] + [drawn(0, seed=1).codebook, task_in(0, noise_kind=kind).codebook]
    assert len({np.asarray(book).tobytes() for book in books}) == 6
    for epoch in (2, 0):
        assert_same_bits(drawn(epoch).codebook, books[epoch])
    assert_same_bits(drawn(0).mean, task_in(0).mean)


def test_noise_that_is_never_redrawn_is_that_of_the_key():
    config = config_of()
    for epoch in (0, 3):
        expected = 2 * jax.random.normal(run_key(config, CODEBOOK), (CLASSES, *SHAPE))
        assert_same_bits(task_in(epoch).codebook, expected)
