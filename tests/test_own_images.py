"""Images that people bring: folders of pictures, npz files, arrays in memory, any set of tensorflow-datasets or of the Hub."""

import errno
import io
import os

import numpy as np
import pytest
from PIL import Image

from image_sets import fails
from vffjax import registry
from vffjax.data import decoding, in_memory, own_sets, sizes_of
from vffjax.data import folder as folder_module
from vffjax.data import load as data
from vffjax.data.pictures import read_image
from vffjax.errors import UserError
from vffjax.training.checks import make_config

CLASSES = ("ant", "bee", "cat")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own, and a process that has told and decoded nothing yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(own_sets, "_told", set())
    monkeypatch.setattr(decoding, "_known", {})
    return tmp_path / "cache" / "vffjax" / "images"


def picture(seed, width=12, height=9, mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def put(folder, names, count=4, first=0, suffix="png", **keys):
    """A folder of `count` pictures for each name; returns the files."""
    files = []
    for k, name in enumerate(names):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            files.append(folder / name / f"{first + i}.{suffix}")
            picture(first + 100 * k + i, **keys).save(files[-1])
    return files


def load(dataset, data_dir, **keys):
    return data.load(make_config({"dataset": dataset, "data_dir": str(data_dir), "val_fraction": 0.0, "batch_size": 4} | keys))


def as_pairs(split):
    return sorted((image.tobytes(), int(label)) for image, label in zip(split.images, split.labels, strict=True))


def encoded(image, kind="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


# --- folders


def test_a_folder_with_parts_is_read_as_its_pictures_are(tmp_path):
    train, test = put(tmp_path / "set" / "train", CLASSES), put(tmp_path / "set" / "test", CLASSES, 2, first=50)
    found = load("folder", tmp_path / "set", image_size=8)
    assert (found.class_names, found.image_shape) == (CLASSES, (8, 8, 3))
    for split, files in ((found.train, train), (found.test, test)):
        wanted = [(read_image(file, (8, 8, 3)).tobytes(), CLASSES.index(file.parent.name)) for file in files]
        assert as_pairs(split) == sorted(wanted)
    sizes = sizes_of(make_config({"dataset": "folder", "data_dir": str(tmp_path / "set"), "image_size": 8}))
    assert sizes == (12, (8, 8, 3), 3)


def test_a_folder_of_classes_is_split_by_the_seed_class_by_class(tmp_path):
    put(tmp_path / "set", CLASSES, 10)
    first, again, other = (load("folder", tmp_path / "set", seed=seed, test_fraction=0.3) for seed in (0, 0, 1))
    assert (len(first.train), len(first.test), first.image_shape) == (21, 9, (9, 12, 3))
    assert np.bincount(first.test.labels).tolist() == [3, 3, 3]
    assert as_pairs(first.test) == as_pairs(again.test) != as_pairs(other.test)
    every = sorted(as_pairs(first.train) + as_pairs(first.test))
    assert every == sorted(as_pairs(other.train) + as_pairs(other.test)) and len(set(every)) == 30


def test_the_folder_val_holds_the_test_images_where_there_is_no_test(tmp_path, capsys):
    put(tmp_path / "set" / "train", CLASSES), put(tmp_path / "set" / "val", CLASSES, 1, first=70)
    assert len(load("folder", tmp_path / "set").test) == 3
    assert "no folder test, so val holds the test images" in capsys.readouterr().err
    put(tmp_path / "set" / "test", CLASSES, 2, first=80)
    assert len(load("folder", tmp_path / "set").test) == 6
    assert "val is passed over" in capsys.readouterr().err


@pytest.mark.parametrize("mode, channels", [("L", 1), ("1", 1), ("LA", 1), ("RGB", 3), ("RGBA", 3), ("P", 3), ("CMYK", 3)])
def test_colours_are_those_of_the_pictures(tmp_path, mode, channels):
    suffix = "jpg" if mode == "CMYK" else "png"
    files = put(tmp_path / "set", CLASSES, suffix=suffix, mode=mode)
    found = load("folder", tmp_path / "set", test_fraction=0.25)
    assert found.image_shape == (9, 12, channels)
    wanted = sorted(read_image(file, (9, 12, channels)).tobytes() for file in files)
    assert sorted(image for image, _ in as_pairs(found.train) + as_pairs(found.test)) == wanted


def test_one_coloured_picture_makes_all_of_them_coloured(tmp_path):
    put(tmp_path / "set", CLASSES, mode="L")
    picture(7).save(tmp_path / "set" / "ant" / "0.png")
    assert load("folder", tmp_path / "set").image_shape == (9, 12, 3)


def test_pictures_stand_upright_and_formats_may_differ(tmp_path):
    put(tmp_path / "set", CLASSES)
    for kind in ("webp", "bmp", "jpg"):
        picture(3).save(tmp_path / "set" / "bee" / f"other.{kind.upper()}", "jpeg" if kind == "jpg" else kind)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(4, 9, 12).save(tmp_path / "set" / "cat" / "turned.jpg", exif=exif)  # 9x12 as stored, 12x9 as it is seen
    found = load("folder", tmp_path / "set")
    assert (found.image_shape, len(found.train) + len(found.test)) == ((9, 12, 3), 16)


def test_damaged_and_empty_files_are_left_out_and_others_passed_over_and_each_is_told_once(tmp_path, capsys):
    files = put(tmp_path / "set", CLASSES)
    files[0].write_bytes(b"")
    files[5].write_bytes(files[5].read_bytes()[:60])
    (tmp_path / "set" / "cat" / "notes.txt").write_text("no picture")
    (tmp_path / "set" / "cat" / ".hidden.png").write_bytes(b"")
    for _ in range(2):
        found = load("folder", tmp_path / "set")
    assert len(found.train) + len(found.test) == 10
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "2 of 12 pictures cannot be read and are left out; the first: " in lines[1] and "0.png is empty" in lines[1]
    assert "1 files are passed over" in lines[0] and "cat/notes.txt" in lines[0]


def test_a_picture_in_both_parts_is_told(tmp_path, capsys):
    train, test = put(tmp_path / "set" / "train", CLASSES), put(tmp_path / "set" / "test", CLASSES, 2, first=50)
    test[3].write_bytes(train[1].read_bytes())
    load("folder", tmp_path / "set")
    assert "1 test images are also among the training images, such as test/bee/51.png, which is train/ant/1.png" in capsys.readouterr().err


def test_folders_beside_the_parts_are_told(tmp_path, capsys):
    put(tmp_path / "set" / "train", CLASSES), put(tmp_path / "set" / "test", CLASSES, 2, first=50), put(tmp_path / "set", ["more"])
    found = load("folder", tmp_path / "set")
    assert (len(found.train), len(found.test)) == (12, 6)
    assert "1 folders beside train/ are passed over, such as more" in capsys.readouterr().err


def bad_folders(tmp_path):
    """Folders that cannot be used, by what the message says."""
    root = tmp_path / "set"
    put(root / "case" / "train", CLASSES), put(root / "case" / "Test", CLASSES)
    yield "case", ("Test/ beside train/ is a part of a set by its name", "rename it to test")
    put(root / "flat" / "train", CLASSES), put(root / "flat", ["test"])
    yield "flat", ("test/ holds pictures that are in no folder of a class", "vffjax predict")
    put(root / "hollow" / "train", CLASSES), (root / "hollow" / "test").mkdir()
    yield "hollow", ("test/ is empty", "move it elsewhere, and test images are cut from train/")
    put(root / "other" / "train", CLASSES), put(root / "other" / "val", CLASSES), (root / "other" / "test").mkdir()
    yield "other", ("test/ is empty", "move it elsewhere, and val/ holds the test images")
    put(root / "single", CLASSES), put(root / "single", ["dog"], 1)
    yield "single", ("class dog has one image that can be read, which is a test image",)
    put(root / "sizes", CLASSES[:1]), put(root / "sizes", CLASSES[1:], width=20)
    yield "sizes", ("config.image_size=0", "different sizes", "0.png has 12x9 pixels", "0.png has 20x9 pixels", "set it to the side")
    put(root / "one", CLASSES[:1])
    yield "one", ("one class, ant", "two or more")
    put(root / "inner" / "photos", CLASSES)
    yield "inner", (f"did you mean {root / 'inner' / 'photos'}?",)
    put(root / "empty", CLASSES), (root / "empty" / "dog").mkdir()
    yield "empty", ("dog/ holds no PNG, JPEG, WebP or BMP file; put some there",)
    put(root / "strange" / "train", CLASSES), put(root / "strange" / "test", (*CLASSES, "dog"))
    yield "strange", ("test/dog is no class of train/",)
    for file in put(root / "damaged", CLASSES, 2):
        if file.parent.name == "bee":
            file.write_bytes(b"x")
    yield "damaged", ("no image of class bee",)
    (root / "bare").mkdir()
    yield "bare", ("holds no folders", "a folder for each class")
    (root / "file").write_bytes(b"")
    yield "file", ("a file, not a folder",)
    yield "missing", ("no such folder",)


def test_a_folder_that_cannot_be_used_is_refused_in_one_line(tmp_path):
    for name, parts in bad_folders(tmp_path):
        fails(lambda name=name: load("folder", tmp_path / "set" / name), *parts)
    fails(lambda: load("folder", ""), "config.data_dir=''", "give it")


# --- what has been decoded


def decoded_names(monkeypatch):
    seen = []
    before = decoding.decoded
    monkeypatch.setattr(decoding, "decoded", lambda content, sides, mode, name: seen.append(name) or before(content, sides, mode, name))
    return seen


def test_pictures_are_decoded_once_and_again_when_one_changes_or_the_size_does(tmp_path, monkeypatch, cache):
    files = put(tmp_path / "set", CLASSES)
    seen, forget = decoded_names(monkeypatch), decoding._known.clear
    first = load("folder", tmp_path / "set", image_size=8)
    assert sorted(seen) == sorted(map(str, files))
    seen.clear(), forget()
    assert as_pairs(load("folder", tmp_path / "set", image_size=8).test) == as_pairs(first.test) and not seen
    load("folder", tmp_path / "set", image_size=6)
    assert len(seen) == 12
    seen.clear()
    picture(999).save(files[2])
    os.utime(files[2], ns=(1, 1))  # a file system may have coarse times
    load("folder", tmp_path / "set", image_size=8)
    assert len(seen) == 12
    assert not list(cache.glob(".new-*"))


def test_a_picture_that_the_disk_refused_once_is_read_again(tmp_path, monkeypatch, capsys):
    files = put(tmp_path / "set", CLASSES)
    files[5].write_bytes(b"x")  # whose content stays bad
    read = folder_module.read_bytes

    def refuse(path, most):
        if path == files[0]:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return read(path, most)

    monkeypatch.setattr(folder_module, "read_bytes", refuse)
    seen, forget = decoded_names(monkeypatch), decoding._known.clear

    def count():
        found = load("folder", tmp_path / "set")
        return len(found.train) + len(found.test)

    assert count() == 10
    assert "0.png: Input/output error" in capsys.readouterr().err
    monkeypatch.setattr(folder_module, "read_bytes", read)
    forget()
    assert count() == 11
    seen.clear(), forget()
    assert count() == 11 and not seen


@pytest.mark.parametrize("name", ["images.bin", "about.json"])
def test_a_damaged_cache_is_made_anew(tmp_path, capsys, cache, name):
    put(tmp_path / "set", CLASSES)
    first = load("folder", tmp_path / "set")
    (file,) = cache.glob(f"*/{name}")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content if name == "images.bin" else b"{")
    decoding._known.clear()
    assert as_pairs(load("folder", tmp_path / "set").train) == as_pairs(first.train)
    assert "decoded anew" in capsys.readouterr().err


def test_without_a_place_for_the_cache_the_images_are_there_all_the_same(tmp_path, capsys, monkeypatch):
    put(tmp_path / "set", CLASSES, mode="L")
    wanted = load("folder", tmp_path / "set")
    decoding._known.clear()
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert as_pairs(load("folder", tmp_path / "set").train) == as_pairs(wanted.train)
    assert "cannot be kept there" in capsys.readouterr().err


# --- npz files and arrays in memory


def arrays(n=12, classes=3, shape=(8, 8), seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, *shape)).astype(np.uint8), np.arange(n) % classes


X, Y = arrays()
X2, Y2 = arrays(6, seed=1)


@pytest.mark.parametrize(
    "given",
    [
        {"x_train": X, "y_train": Y, "x_test": X2, "y_test": Y2},
        {"train_images": X, "train_labels": Y[:, None], "test_images": X2, "test_labels": Y2[:, None], "val_images": X, "val_labels": Y},
        {"x_train": X / 255, "y_train": np.eye(3)[Y], "x_test": X2 / 255, "y_test": np.eye(3)[Y2]},
        {"x_train": X.astype(np.int64)[..., None], "y_train": Y.astype(float), "x_test": X2.astype(np.float32), "y_test": Y2},
        {"x_train": X, "y_train": np.array(CLASSES)[Y], "x_test": X2, "y_test": np.array(CLASSES)[Y2]},
        {"x_train": X, "y_train": Y, "x_test": X2, "y_test": Y2, "class_names": np.array(CLASSES)},
        {"x_train": X, "y_train": Y, "x_test": X2, "y_test": Y2, "class_names": np.array(CLASSES, "S")},
    ],
    ids=["keras", "medmnist", "floats and one-hot", "whole floats", "texts", "named", "named in bytes"],
)
def test_an_npz_file_and_the_same_arrays_in_memory_are_one_set(tmp_path, capsys, given):
    np.savez_compressed(tmp_path / "mine.npz", **given)
    held = in_memory.hold(given)
    for arguments in (("npz", tmp_path / "mine.npz"), (held["dataset"], held["data_dir"])):
        found = load(*arguments)
        assert as_pairs(found.train) == as_pairs(data.Split(X[..., None], Y))
        assert as_pairs(found.test) == as_pairs(data.Split(X2[..., None], Y2))
        named = "class_names" in given or given.get("y_train", Y).dtype.kind == "U"
        assert found.class_names == (CLASSES if named else ("0", "1", "2"))
    assert capsys.readouterr().err.count("val_images, val_labels not used") == 2 * ("val_images" in given)


def test_images_and_labels_alone_are_split_by_the_seed(tmp_path):
    np.savez(tmp_path / "mine.npz", images=X, labels=Y + 5)
    found = load("npz", tmp_path / "mine.npz", test_fraction=0.25)
    assert (len(found.train), np.bincount(found.test.labels).tolist(), found.class_names) == (9, [1, 1, 1], ("5", "6", "7"))
    most = load("npz", tmp_path / "mine.npz", test_fraction=0.9)  # of four images in each class one is left to train on
    assert (np.bincount(most.train.labels).tolist(), np.bincount(most.test.labels).tolist()) == ([1, 1, 1], [3, 3, 3])
    held = in_memory.hold((X, Y + 5))
    assert load(held["dataset"], held["data_dir"], test_fraction=0.25).sha256() == found.sha256()


BAD_ARRAYS = [
    ({"a": X}, "holds a; give it x_train"),
    ({"images": X, "labels": Y[:5]}, "12 images and 5 labels"),
    ({"images": X[:0], "labels": Y[:0]}, "0 images and 0 labels"),
    ({"images": X.reshape(12, 64), "labels": Y}, "shape 12x64"),
    ({"images": np.zeros((12, 3, 8, 8), np.uint8), "labels": Y}, "transpose(0, 2, 3, 1)"),
    ({"images": np.zeros((12, 8, 8, 4), np.uint8), "labels": Y}, "[..., :3]"),
    ({"images": X * 2.0, "labels": Y}, "numbers from 0 to 5"),
    ({"images": X - 1.0, "labels": Y}, "numbers from -1 to"),
    ({"images": np.full((12, 8, 8), np.nan), "labels": Y}, "numbers from nan to nan"),
    ({"images": X.astype("U3"), "labels": Y}, "holds <U3"),
    ({"images": X, "labels": Y + 0.5}, "one whole number or text"),
    ({"images": X, "labels": np.zeros((12, 2))}, "one whole number or text"),
    ({"images": X, "labels": Y * 0}, "has one class"),
    ({"images": X, "labels": Y, "class_names": np.array(["a", "b"])}, "no numbers of the 2 class_names"),
    ({"images": X, "labels": Y, "class_names": np.array(["a", "b", "a"])}, "class_names has a more than once"),
    ({"images": X, "labels": np.array(CLASSES)[Y], "class_names": CLASSES}, "the labels are texts, which name the classes already"),
    ({"images": X[:, :0], "labels": Y}, "shape 12x0x8x1; give images of at least one pixel"),
    ({"x_train": X, "y_train": Y, "x_test": X2, "y_test": Y2 + 1}, "class 3 of the test images"),
    ({"x_train": X, "y_train": Y, "x_test": X2[:, :5], "y_test": Y2}, "x_test are 5x8x1 and those of training 8x8x1"),
]


@pytest.mark.parametrize("given, part", BAD_ARRAYS, ids=[part for _, part in BAD_ARRAYS])
def test_arrays_that_do_not_fit_are_refused_in_one_line(given, part):
    fails(lambda: in_memory.hold(given), "data: ", part)


def test_labels_of_other_types_are_numbers_and_texts_too():
    for labels, wanted in (
        (Y == 1, (Y == 1).astype(int)),
        (np.array(list(np.array(CLASSES)[Y]), object), Y),
        (np.array(list(Y.astype(np.int16)), object), Y),
    ):
        found = in_memory.from_mapping({"images": X, "labels": labels}, "data").all.labels
        assert found.dtype == np.int32 and found.tolist() == wanted.tolist()


@pytest.mark.parametrize(
    ("images", "val_fraction", "expected"),
    [
        ([4, 8, 36], 0.25, [1, 2, 9]),
        ([2, 5, 33], 0.1, [0, 1, 3]),  # 0.2, 0.5 and 3.3 of 4: the one that is missing goes to the greatest remainder
        ([1, 1, 10], 0.75, [0, 0, 9]),  # 0.75, 0.75 and 7.5 of 9: no class gives its only image
    ],
)
def test_each_class_gives_its_share_of_the_validation_images(tmp_path, images, val_fraction, expected):
    labels = np.repeat(np.arange(3), images)
    pixels = np.random.default_rng(0).integers(0, 256, (len(labels), 4, 4, 1)).astype(np.uint8)
    test = {"test_images": pixels[:3], "test_labels": np.arange(3)}
    np.savez(tmp_path / "mine.npz", train_images=pixels, train_labels=labels, **test)
    first, again, other = (load("npz", tmp_path / "mine.npz", val_fraction=val_fraction, seed=seed) for seed in (0, 0, 1))
    for found in (first, other):
        assert np.bincount(found.validation.labels, minlength=3).tolist() == expected
        assert np.bincount(found.train.labels).tolist() == [a - b for a, b in zip(images, expected, strict=True)]
        assert sorted(as_pairs(found.train) + as_pairs(found.validation)) == as_pairs(data.Split(pixels, labels))
    assert (first.validation.images == again.validation.images).all()
    assert as_pairs(first.validation) != as_pairs(other.validation)


def test_classes_too_small_for_so_many_validation_images_are_refused(tmp_path):
    np.savez(tmp_path / "mine.npz", images=np.zeros((12, 4, 4, 1), np.uint8), labels=np.repeat([0, 1, 2], 4))
    fails(lambda: load("npz", tmp_path / "mine.npz", val_fraction=0.9), "config.val_fraction=0.9", "the classes are too small", "lower it")


def test_files_that_are_no_npz_are_refused_in_one_line(tmp_path):
    np.save(tmp_path / "one.npy", X)
    np.savez(tmp_path / "objects.npz", images=X, labels=np.array([object()] * 12, dtype=object))
    (tmp_path / "text.npz").write_text("text")
    said = {
        "one.npy": "not an .npz file",
        "objects.npz": "np.array(names, dtype=str)",
        "text.npz": "not an .npz file",
        "none.npz": "no such file",
    }
    for name, part in said.items():
        fails(lambda name=name: load("npz", tmp_path / name), f"config.data_dir='{tmp_path / name}'", part)
    fails(lambda: load("npz", tmp_path), "a folder, not a file")
    fails(lambda: load("npz", ""), "config.data_dir=''")
    fails(lambda: load("in_memory", "memory-0"), "another Python process")
    fails(lambda: in_memory.hold(3), "of type int")
    fails(lambda: in_memory.hold((X, Y, X2)), "a sequence of 3")


# --- tensorflow-datasets and the Hub


def prepared(root, splits):
    """Lets tensorflow-datasets itself prepare a set in a folder: JPEG pictures of several sizes, with two features that are classes."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import registered

    with registered.skip_registration():  # it may be defined again

        class MyPhotos(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")
            pkg_dir_path = root

            def _info(self):
                kinds = {"image": tfds.features.Image(encoding_format="jpeg"), "coarse": tfds.features.ClassLabel(num_classes=2)}
                kinds["species"] = tfds.features.ClassLabel(names=list(CLASSES))
                return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(kinds), supervised_keys=("image", "species"))

            def _split_generators(self, manager):
                return {split: self._generate_examples(seeds) for split, seeds in splits.items()}

            def _generate_examples(self, seeds):
                for seed in seeds:
                    file = io.BytesIO(encoded(picture(seed, 10 + seed % 3, 10), "JPEG"))
                    yield seed, {"image": file, "coarse": 1, "species": seed % 3}

    MyPhotos(data_dir=root, file_format="array_record").download_and_prepare()


@pytest.mark.filterwarnings("ignore")  # of tensorflow-datasets, while it prepares
def test_any_set_of_tensorflow_datasets_is_read_from_its_prepared_folder(tmp_path):
    prepared(tmp_path, {"train": range(6), "validation": range(6, 9)})
    found = load("tfds:my_photos", tmp_path, image_size=8)
    assert (found.class_names, found.image_shape, len(found.train), len(found.test)) == (CLASSES, (8, 8, 3), 6, 3)
    files = {seed: tmp_path / f"{seed}.jpg" for seed in range(9)}
    for seed, file in files.items():
        file.write_bytes(encoded(picture(seed, 10 + seed % 3, 10), "JPEG"))
    for split, seeds in ((found.train, range(6)), (found.test, range(6, 9))):
        assert as_pairs(split) == sorted((read_image(files[seed], (8, 8, 3)).tobytes(), seed % 3) for seed in seeds)
    fails(lambda: load("tfds:my_photos", tmp_path), "config.image_size=0", "different sizes")
    fails(lambda: load("tfds:My Photos", tmp_path), "no name of a set")


@pytest.fixture(scope="module")
def hub_copy(tmp_path_factory):
    datasets = pytest.importorskip("datasets", reason="the library datasets is not installed")
    folder = tmp_path_factory.mktemp("copy")
    kinds = datasets.Features({"picture": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    for split, count in (("train", 9), ("test", 3)):
        rows = {"picture": [picture(count * 10 + i) for i in range(count)], "label": [i % 3 for i in range(count)]}
        datasets.disable_progress_bars()
        datasets.Dataset.from_dict(rows, features=kinds).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.mark.filterwarnings("ignore")  # of the library datasets
def test_a_set_of_the_hub_is_read_from_a_local_copy(hub_copy, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    found = load("hf:somebody/insects", hub_copy)
    assert (found.class_names, found.image_shape, len(found.train), len(found.test)) == (CLASSES, (9, 12, 3), 9, 3)
    wanted = [(np.asarray(picture(30 + i)).tobytes(), i % 3) for i in range(3)]
    assert as_pairs(found.test) == sorted(wanted)
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "train.csv").write_text("a,b\n1,2\n")
    fails(lambda: load("hf:somebody/insects", tmp_path / "csv"), "of kind csv, and only Parquet is read")
    fails(lambda: load("hf:insects", hub_copy), "no address")
    fails(lambda: load("hf:somebody/insects", tmp_path / "none"), "no such folder")


def test_a_prefix_is_no_code_from_outside():
    assert registry.SOURCES.families == ("hf", "tfds") and registry.RULES.families == ()
    assert not registry.SOURCES.is_outside("tfds:SOURCE") and registry.RULES.is_outside("tfds:RULE")
    assert registry.outside_names({"rule": "a:RULE", "network": "mlp", "dataset": "hf:a/b"}) == {"rule": "a:RULE"}
    with pytest.raises(UserError, match=r"config\.dataset='tfds:': no name behind the colon; give one: tfds:NAME"):
        make_config({"dataset": "tfds:"})
    with pytest.raises(UserError, match=r"config\.dataset='fodler': not known; did you mean 'folder'\?"):
        make_config({"dataset": "fodler"})
