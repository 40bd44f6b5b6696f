"""What can be wrong with the images that people bring, and with what they ask of a run in Python: one line, and no wrong number."""

import dataclasses
import datetime
import zipfile

import numpy as np
import pytest
from PIL import ExifTags, Image

import vffjax
from image_sets import fails
from runs import copy_of, finished
from test_own_images import CLASSES, cache, load, picture, put  # noqa: F401  # cache is a fixture
from vffjax import api
from vffjax.data import hf, in_memory, own_sets, tfds_files, tfds_preparation
from vffjax.data import load as data
from vffjax.errors import UserError
from vffjax.run import arguments
from vffjax.runs.workdir import LOCK, locked

X = np.random.default_rng(0).integers(0, 256, (12, 8, 8)).astype(np.uint8)
Y = np.arange(12) % 3


@pytest.fixture(scope="module")
def run():
    return vffjax.load(finished())


# --- runs that are begun anew


def test_a_folder_that_holds_anything_but_a_run_is_never_deleted(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    fails(lambda: vffjax.train({}, tmp_path, overwrite=True), f"workdir={tmp_path}: holds no run")
    work = copy_of(finished(), tmp_path)
    (work / "thesis.tex").write_text("three years")
    fails(lambda: vffjax.train({}, work, overwrite=True), "holds thesis.tex")
    assert (work / "thesis.tex").exists() and (work / "summary.json").exists()
    fails(lambda: vffjax.train({}, tmp_path / "config.json", overwrite=True), "is no folder")


def test_what_export_writes_by_default_is_deleted_with_the_run(tmp_path):
    work = copy_of(finished(), tmp_path)
    for name in ("weights.safetensors", "group1.safetensors", "ensemble.stablehlo", "ensemble.json"):
        (work / name).write_text("")
    api._delete(work)
    assert {path.name for path in work.glob("*")} <= {LOCK}
    (work := copy_of(finished(), tmp_path / "other")).joinpath("groups.safetensors").write_text("")
    fails(lambda: api._delete(work), "holds groups.safetensors")


def test_bad_input_and_another_process_cost_no_run(tmp_path):
    work = copy_of(finished(), tmp_path)
    fails(lambda: vffjax.train({"init_from": "missing.safetensors"}, work, overwrite=True), "missing.safetensors: cannot be read")
    fails(lambda: vffjax.train({"epochs": 0}, work, overwrite=True), "config.epochs=0")
    with locked(work):
        fails(lambda: vffjax.train({}, work, overwrite=True), "another run is writing here")
    assert (work / "summary.json").exists()


def test_a_run_behind_a_link_is_begun_anew(tmp_path):
    work = copy_of(finished(), tmp_path)
    (tmp_path / "link").symlink_to(work)
    config = {"network": "mlp", "widths": (4,), "epochs": 1, "train_examples": 100, "batch_size": 32}
    again = vffjax.train(config, tmp_path / "link", overwrite=True, quiet=True)
    assert again.config.widths == (4,)


def test_a_configuration_that_is_none_is_refused():
    fails(lambda: vffjax.train("digits"), "config=digits", "vffjax.read('digits')")
    fails(lambda: vffjax.train(3), "config: of type int")


def test_two_dashes_in_a_path_are_no_flag():
    with pytest.raises(UserError, match=r"^/home/x/runs--cifar/a--b: workdir=3 and epoch$"), arguments():
        raise UserError("/home/x/runs--cifar/a--b: --workdir=3 and --epoch")


# --- labels and images in arrays


def test_labels_that_are_numbers_keep_their_meaning(run):
    for first in (0, 1, 5):
        own = in_memory.from_mapping({"images": X, "labels": Y + first}, "data")
        np.testing.assert_array_equal(in_memory.numbers_of(Y + first, own.classes, "labels"), Y)
    fails(lambda: in_memory.numbers_of([0], ("1", "2", "3"), "labels"), "'0' is no class; the classes are 1, 2, 3")
    assert in_memory.numbers_of([0, 2], CLASSES, "labels").tolist() == [0, 2]


def test_labels_of_many_kinds_are_read():
    texts = np.array(CLASSES)[Y]
    wanted = in_memory.from_mapping({"images": X, "labels": texts}, "data").all.labels
    for given in (texts.astype(object), texts.astype(bytes), texts.tolist()):
        own = in_memory.from_mapping({"images": X, "labels": given}, "data")
        np.testing.assert_array_equal(own.all.labels, wanted)
        assert own.classes == CLASSES
        np.testing.assert_array_equal(in_memory.numbers_of(given, CLASSES, "labels"), wanted)
    np.testing.assert_array_equal(in_memory.from_mapping({"images": X, "labels": Y.astype(object)}, "data").all.labels, Y)


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"labels": [0, [1]] * 6}, ["labels is no array", "one shape"]),
        ({"images": [np.zeros((2, 2)), np.zeros((3, 3))]}, ["images is no array"]),
        ({"labels": np.array([0.0, 1.0, np.inf] * 4)}, ["labels is float64"]),
        ({"labels": np.array([0, None, "x"] * 4, object)}, ["labels is object"]),
        ({"class_names": 2}, ["1 class_names"]),
        ({"images": X / 254.0}, ["from 0 to 1.0", "clip them"]),
    ],
)
def test_arrays_that_cannot_be_meant_are_refused(given, parts):
    fails(lambda: in_memory.from_mapping({"images": X, "labels": Y} | given, "data"), *parts)


def test_numbers_on_another_scale_are_told(capsys):
    own_sets._told.clear()
    for largest, told in ((16, True), (16.0, True), (1.0, False), (200, False)):
        in_memory.as_bytes(np.arange(2 * 3 * 3).reshape(2, 3, 3).clip(0, 1) * largest, f"images up to {largest}")
        assert ("the largest number is 16 where 255 is white" in capsys.readouterr().err) == told


def test_parts_with_labels_of_two_kinds_are_refused():
    given = {"x_train": X, "y_train": Y, "x_test": X, "y_test": np.array(CLASSES)[Y]}
    fails(lambda: in_memory.from_mapping(given, "data"), "texts")
    fails(lambda: in_memory.from_mapping(given | {"class_names": CLASSES}, "data"), "class_names")


def test_a_set_that_is_held_stays_as_it_was_given():
    images = X[..., None].copy()
    keys = in_memory.hold((images, Y))
    before = load(**keys).sha256()
    images[:] = 7
    assert load(**keys).sha256() == before


def test_a_class_without_images_is_told_of_the_data_and_not_of_a_key():
    keys = in_memory.hold({"images": X, "labels": Y, "class_names": (*CLASSES, "dog")})
    fails(lambda: load(**keys), "data: no image of class dog")


def test_errors_of_ones_own_images_are_by_the_groups_that_evaluate_lets_vote(run):
    test = run.data.test
    for keys in ({}, {"inference": "sweep"}, {"views": "mirror"}, {"inference": "sweep", "views": "mirror"}):
        assert vffjax.evaluate(run, (test.images, test.labels), **keys)["error"] == vffjax.evaluate(run, **keys)["test_error"]


@pytest.mark.parametrize(
    ("data", "part"), [((1, 2, 3), "a sequence of 3"), ({"a": 1, "b": 2}, "holds a, b"), (3, "of type int"), ((X, Y, X, Y), "x_test")]
)
def test_data_to_evaluate_are_images_and_labels(run, data, part):
    fails(lambda: vffjax.evaluate(run, data), "data: ", part)


# --- pictures


def turned(orientation=6):
    image = picture(3, 12, 9)
    exif = image.getexif()
    exif[ExifTags.Base.Orientation] = orientation
    return image, exif


def test_a_picture_that_ends_early_is_told_as_its_file_is(run, tmp_path):
    picture(3, 90, 90).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:-200])
    with Image.open(tmp_path / "a.png") as image:
        fails(lambda: run.predict(image), "images: not a readable picture")
    fails(lambda: run.predict(tmp_path / "a.png"), "a.png")


def test_images_of_another_set_are_not_handed_out_as_those_of_the_run(monkeypatch):
    one = vffjax.load(finished())
    assert one.data.sha256() == one.trained.run["data_sha256"]
    other = vffjax.load(finished())
    found = dataclasses.replace(one.data, train=data.Split(one.data.train.images, one.data.train.labels[::-1].copy()))
    monkeypatch.setattr(data, "load", lambda config: found)
    fails(lambda: other.data, "other images or labels than the run was trained on")


def test_a_label_is_never_both_a_name_and_a_place():
    fails(lambda: in_memory.hold({"images": X, "labels": Y, "class_names": ["1", "2", "3"]}), "class_names are numbers", "texts")
    assert in_memory.hold({"images": X, "labels": Y, "class_names": ["0", "1", "2"]})
    assert in_memory.hold({"images": X, "labels": np.eye(3)[Y], "class_names": ["1", "2", "3"]})
    assert in_memory.numbers_of([2, 3, 2], ("1", "2", "3"), "labels").tolist() == [1, 2, 1]
    assert in_memory.numbers_of([[2], [3], [2]], ("1", "2", "3"), "labels").tolist() == [1, 2, 1]
    assert in_memory.numbers_of(np.eye(3)[[1, 2, 1]], ("1", "2", "3"), "labels").tolist() == [1, 2, 1]
    assert in_memory.numbers_of(np.eye(4)[[2, 3, 2]], ("1", "2", "3"), "labels").tolist() == [1, 2, 1]  # class 0 had no image


def test_a_picture_and_its_file_are_classified_alike(run, tmp_path):
    image, exif = turned()
    image.save(tmp_path / "a.png", exif=exif)
    given = [tmp_path / "a.png", Image.open(tmp_path / "a.png")]
    one, other = (run.predict(picture).probabilities for picture in given)
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_pictures_of_all_modes_are_taken_or_refused(run, mode):
    via = {"La": "LA", "RGBa": "RGBA", "PA": "LA", "LAB": "RGB"}
    image = picture(0)
    image = image.convert(via[mode]) if mode in via else image
    assert run.predict(image.convert(mode)).classes.shape == (1,)


def test_pictures_of_numbers_without_a_scale_are_refused(run):
    for mode in ("I", "F"):
        fails(lambda mode=mode: run.predict(picture(0).convert("L").convert(mode)), f"mode {mode}", "array")


# --- folders, files and sets


def test_parts_by_other_names_are_no_classes(tmp_path):
    for names in (("Train", "Test"), ("training", "testing"), ("test", "val")):
        folder = tmp_path / names[0]
        for name in names:
            put(folder / name, CLASSES, count=1)
        fails(lambda folder=folder: load("folder", folder), "is a part of a set by its name", "train and test")
    put(tmp_path / "vehicles", ("val", "car"), count=2)  # pictures lie in them, so they are classes
    assert load("folder", tmp_path / "vehicles").class_names == ("car", "val")


def test_a_link_to_nowhere_is_left_out_with_a_line(tmp_path, capsys):
    put(tmp_path / "set", CLASSES)
    (tmp_path / "set" / "ant" / "z.png").symlink_to(tmp_path / "nowhere.png")
    assert len(load("folder", tmp_path / "set").class_names) == 3
    assert "z.png" in capsys.readouterr().err


def test_a_class_of_other_formats_is_told_to_convert_them(tmp_path):
    put(tmp_path / "set", CLASSES[:2])
    put(tmp_path / "set", CLASSES[2:], suffix="tiff")
    fails(lambda: load("folder", tmp_path / "set"), "cat/ holds no PNG, JPEG, WebP or BMP file (4 others, such as cat/0.tiff)", "convert")


def test_an_npz_file_with_any_damaged_byte_is_refused_in_one_line(tmp_path):
    file = tmp_path / "set.npz"
    np.savez_compressed(file, images=X, labels=Y)
    sound, rng, refused = file.read_bytes(), np.random.default_rng(0), 0
    for position in rng.choice(len(sound), 150, replace=False):
        content = bytearray(sound)
        content[position] ^= 1 << int(rng.integers(8))
        file.write_bytes(content)
        try:
            load("npz", file)
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 50
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(zipfile.ZipInfo("images.npy", datetime.datetime(2020, 1, 1).timetuple()[:6]), b"\x93NUMPY")
    fails(lambda: load("npz", file), "cannot be read as an .npz file")


def test_rows_of_the_hub_without_a_class_are_refused():
    for labels, names in (([0, 1, None], ["x", "y"]), (["x", None], None)):
        fails(lambda labels=labels, names=names: hf._labels("a/b", [labels], names), "rows without a class")


def test_secret_labels_are_no_damage(tmp_path):
    with pytest.raises(UserError, match="'test' have no labels; use another set"):
        tfds_files._check_labels(np.full(3, -1), 10, "test", tmp_path, "set")
    with pytest.raises(UserError, match=r"outside 0..9"):
        tfds_files._check_labels(np.array([0, -1]), 10, "test", tmp_path, "set")


def test_a_set_with_a_configuration_can_be_prepared(tmp_path, monkeypatch):
    class Builder:
        url_infos = {}  # noqa: RUF012

        def download_and_prepare(self, download_dir, download_config):
            raise ValueError(f"reached {download_dir}")

    class Tfds:
        @staticmethod
        def builder(name, **keys):
            return Builder()

        class download:
            @staticmethod
            def DownloadConfig(**keys):
                return None

    monkeypatch.setattr(tfds_preparation, "imported", lambda name: Tfds)
    monkeypatch.setattr(tfds_preparation, "_unreachable", lambda url: "")
    with pytest.raises(UserError, match=r"reached .*cifar10_corrupted-fog_1"):
        tfds_preparation.prepare("cifar10_corrupted/fog_1", tmp_path / "root")
    assert list(tmp_path.iterdir()) == []
