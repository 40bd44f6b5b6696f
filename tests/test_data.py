"""The image sets: splits, files of tensorflow-datasets in both formats, preparation, and what is said when the data is unfit."""

import contextlib
import gzip
import io
import json
import os
import pathlib
import shutil
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time

import numpy as np
import pytest
from PIL import Image

from vffjax import data, tfds_files
from vffjax.config import Config
from vffjax.errors import UserError

CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR_NAMES = tuple(f"class{k}" for k in range(10))
PER_BATCH, BATCHES = 7, [f"data_batch_{k}.bin" for k in range(1, 6)] + ["test_batch.bin"]


def as_set(split):
    """The labelled images as a multiset, whatever their order."""
    return sorted(image.tobytes() + bytes([label]) for image, label in zip(split.images, split.labels, strict=True))


def fails(call, *parts):
    """`call` must raise a UserError on one line with all `parts` in it; returns the message."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message
    return message


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def tar_gz(files):
    """A cifar archive with the given files, as bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def put_manual(patch, kind, data_dir, archives):
    """Puts archives {url: bytes} where TFDS takes them instead of a download, and makes their checksums the expected ones."""
    from tensorflow_datasets.core.download import checksums

    manual = data_dir / "downloads" / "manual"
    manual.mkdir(parents=True)
    for url, content in archives.items():
        path = manual / url.rsplit("/", 1)[1]
        path.write_bytes(content)
        patch.setitem(kind.url_infos, url, checksums.compute_url_info(path))


@contextlib.contextmanager
def fake_cifar(data_dir):
    """Makes `prepare("cifar10", data_dir)` work offline; gives the true {"train" and "test": Split}."""
    from tensorflow_datasets.image_classification import cifar

    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(len(BATCHES) * PER_BATCH) % 10).astype(np.int32)
    images = rng.integers(0, 256, (len(labels), 32, 32, 3)).astype(np.uint8)
    planes = [bytes([label]) + image.transpose(2, 0, 1).tobytes() for image, label in zip(images, labels, strict=True)]
    files = {name: b"".join(planes[k * PER_BATCH : (k + 1) * PER_BATCH]) for k, name in enumerate(BATCHES)}
    files["batches.meta.txt"] = "\n".join(CIFAR_NAMES).encode()
    train = 5 * PER_BATCH
    with pytest.MonkeyPatch.context() as patch:
        put_manual(patch, cifar.Cifar10, data_dir, {CIFAR_URL: tar_gz(files)})
        yield {"train": data.Split(images[:train], labels[:train]), "test": data.Split(images[train:], labels[train:])}


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    """A small cifar10 prepared offline: (data_dir, true splits)."""
    data_dir = tmp_path_factory.mktemp("tfds")
    with fake_cifar(data_dir) as truth:
        folder = data.prepare("cifar10", str(data_dir))
    assert folder.parent == data_dir / "cifar10"
    return data_dir, truth


@pytest.fixture
def copy(cifar, tmp_path):
    """A copy of that cifar10 to damage: (data_dir, folder)."""
    shutil.copytree(cifar[0] / "cifar10", tmp_path / "copy" / "cifar10")
    return tmp_path / "copy", next((tmp_path / "copy" / "cifar10").iterdir())


def load(data_dir, **keys):
    return data.load(Config(dataset="cifar10", data_dir=str(data_dir), **keys))


# TFRecord files, written here independently of the reader


def slow_crc32c(string):
    crc = 0xFFFFFFFF
    for byte in string:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def framed(record):
    def checksum(string):
        crc = slow_crc32c(string)
        return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)

    length = struct.pack("<Q", len(record))
    return length + checksum(length) + record + checksum(record)


def stored_records(folder, split):
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.decode import DeserializeMethod

    source = tfds.builder_from_directory(folder).as_data_source(split, deserialize_method=DeserializeMethod.RAW_BYTES)
    return source.__getitems__(list(range(len(source))))


def to_tfrecord(folder, replace=None, shards=1):
    """Turns an array_record folder into a tfrecord one, with the records of `replace` {split: records} if given."""
    info_file = folder / "dataset_info.json"
    info = json.loads(info_file.read_text())
    info["fileFormat"] = "tfrecord"
    for split in info["splits"]:
        name = split["name"]
        records = (replace or {}).get(name) or stored_records(folder, name)
        for path in folder.glob(f"*-{name}.array_record-*"):
            path.unlink()
        parts = np.array_split(np.arange(len(records)), shards)
        split["shardLengths"] = [str(len(part)) for part in parts]
        for k, part in enumerate(parts):
            path = folder / f"cifar10-{name}.tfrecord-{k:05d}-of-{shards:05d}"
            path.write_bytes(b"".join(framed(records[i]) for i in part))
    info_file.write_text(json.dumps(info))


def example(image=None, label=0, mode="RGB", size=(32, 32)):
    """One serialized example; `image` are the encoded bytes, else a black PNG."""
    from tensorflow_datasets.proto import tf_example_pb2

    if image is None:
        buffer = io.BytesIO()
        Image.new(mode, size).save(buffer, "PNG")
        image = buffer.getvalue()
    record = tf_example_pb2.Example()
    record.features.feature["image"].bytes_list.value.append(image)
    record.features.feature["id"].bytes_list.value.append(b"train_00000")
    if label is not None:
        record.features.feature["label"].int64_list.value.append(label)
    return record.SerializeToString()


# Sets that need no files


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
    made = data._synthetic()[0]
    np.testing.assert_array_equal(few.validation.images, made.images[order[:25]])
    np.testing.assert_array_equal(few.train.labels, made.labels[order[25:100]])
    assert len(whole.train) == 2000


def test_std_has_a_floor():
    mean, std = data._moments(np.full((3, 2, 2, 3), 51, np.uint8))
    assert mean == pytest.approx((0.2,) * 3) and std == (1e-3,) * 3


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ({"train_examples": 2001}, "config.train_examples=2001"),
        ({"train_examples": 10, "val_fraction": 0.01}, "config.val_fraction=0.01"),
        ({"train_examples": 1, "val_fraction": 0.9}, "config.val_fraction=0.9"),
        ({"dataset": "imagenet"}, "config.dataset='imagenet'"),
    ],
)
def test_keys_that_do_not_fit_the_data(keys, key):
    fails(lambda: data.load(Config(**({"dataset": "synthetic"} | keys))), key)


def test_import_is_light():
    code = "import sys, vffjax.data; print(sorted({'tensorflow_datasets', 'sklearn', 'tensorflow', 'PIL'} & set(sys.modules)))"
    root = pathlib.Path(data.__file__).parent.parent
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(("dataset", "module"), [("digits", "sklearn.datasets"), ("cifar10", "tensorflow_datasets")])
def test_a_missing_library_is_named(monkeypatch, cifar, dataset, module):
    monkeypatch.setitem(sys.modules, module, None)  # makes the import raise ImportError
    fails(lambda: data.load(Config(dataset=dataset, data_dir=str(cifar[0]))), f"config.dataset='{dataset}'", "not installed", "pip install")


# Sets of tensorflow-datasets


def test_prepared_offline_and_read_back(cifar):
    data_dir, truth = cifar
    made = load(data_dir, val_fraction=0.0)
    assert (made.image_shape, made.class_names) == ((32, 32, 3), CIFAR_NAMES)
    assert as_set(made.train) == as_set(truth["train"])
    assert as_set(made.test) == as_set(truth["test"])
    # The archive that the user put there, and the set; no download, extraction or half-made folder.
    assert sorted(os.listdir(data_dir)) == ["cifar10", "downloads"]
    assert tree(data_dir / "downloads") == ["manual", "manual/cifar-10-binary.tar.gz"]
    assert len(os.listdir(data_dir / "cifar10")) == 1


def test_mnist_prepared_offline_and_tensorflow_put_back(tmp_path, monkeypatch):
    from tensorflow_datasets.core.features import image_feature
    from tensorflow_datasets.image_classification import mnist

    rng, before = np.random.default_rng(0), (mnist.tf, image_feature._ImageEncoder._encode_image)
    truth, archives = {}, {}
    for split, prefix, count in (("train", "train", 30), ("test", "t10k", 20)):
        monkeypatch.setattr(mnist, f"_{split.upper()}_EXAMPLES", count)
        truth[split] = data.Split(rng.integers(0, 256, (count, 28, 28, 1)).astype(np.uint8), np.arange(count, dtype=np.int32) % 10)
        archives[f"{prefix}-images-idx3-ubyte.gz"] = gzip.compress(bytes(16) + truth[split].images.tobytes())
        archives[f"{prefix}-labels-idx1-ubyte.gz"] = gzip.compress(bytes(8) + truth[split].labels.astype(np.uint8).tobytes())
    put_manual(monkeypatch, mnist.MNIST, tmp_path, {mnist._MNIST_URL + name: content for name, content in archives.items()})
    made = data.load(Config(dataset="mnist", data_dir=str(tmp_path), val_fraction=0.0))  # prepares, then reads
    assert made.image_shape == (28, 28, 1) and made.class_names == tuple("0123456789")
    assert as_set(made.train) == as_set(truth["train"]) and as_set(made.test) == as_set(truth["test"])
    assert (mnist.tf, image_feature._ImageEncoder._encode_image) == before


@pytest.mark.parametrize("shards", [1, 3])
def test_tfrecord_gives_the_same_as_array_record(cifar, copy, shards):
    data_dir, folder = copy
    to_tfrecord(folder, shards=shards)
    assert not list(folder.glob("*array_record*"))
    expected, made = load(cifar[0]), load(data_dir)
    for part in ("train", "validation", "test"):
        np.testing.assert_array_equal(getattr(made, part).images, getattr(expected, part).images)
        np.testing.assert_array_equal(getattr(made, part).labels, getattr(expected, part).labels)
    assert (made.class_names, made.mean, made.std) == (expected.class_names, expected.mean, expected.std)


def test_crc32c():
    rng = np.random.default_rng(0)
    strings = [b"123456789", *(rng.bytes(n) for n in (4, 5, 100, 33))]
    assert tfds_files.crc32c(strings).tolist() == [0xE3069283, *map(slow_crc32c, strings[1:])]


def test_data_dir_defaults_to_the_environment_then_home(cifar, monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(cifar[0]))
    assert len(data.load(Config(dataset="cifar10")).test) == PER_BATCH
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tfds_files.data_root("") == tmp_path / "tensorflow_datasets"


def test_a_prepared_set_of_another_version_is_used_as_it_is(copy):
    data_dir, folder = copy
    other = folder.with_name("3.0.0")
    folder.rename(other)
    info = json.loads((other / "dataset_info.json").read_text())
    (other / "dataset_info.json").write_text(json.dumps(info | {"version": "3.0.0"}))
    before = tree(data_dir)
    assert data.prepare("cifar10", str(data_dir)) == other
    assert len(load(data_dir).test) == PER_BATCH
    assert tree(data_dir) == before


def test_the_newest_whole_version_is_used(copy):
    data_dir, folder = copy
    (folder.parent / "10.0.0").mkdir()  # left by an interrupted run
    shutil.copytree(folder, folder.parent / "2.9.9")
    assert tfds_files.find("cifar10", data_dir) == folder


def test_reading_writes_nothing_to_the_terminal(cifar):
    code = """
import sys
from absl import logging
from vffjax import data
from vffjax.config import Config
logging.use_absl_handler()  # as absl.app does
logging.set_verbosity(logging.INFO)
logging.info("before")
data.load(Config(dataset="cifar10", data_dir=sys.argv[1]))
logging.info("after")
"""
    root = pathlib.Path(data.__file__).parent.parent
    result = subprocess.run([sys.executable, "-c", code, str(cifar[0])], capture_output=True, text=True, cwd=root, check=True)
    assert result.stdout == ""
    assert [line.split()[-1] for line in result.stderr.splitlines()[-2:]] == ["before", "after"]


def real_mnist():
    root = os.environ.get("TFDS_DATA_DIR", "")
    return bool(root) and os.path.isdir(os.path.join(root, "mnist"))


@pytest.mark.skipif(not real_mnist(), reason="needs a prepared mnist in $TFDS_DATA_DIR")
def test_real_mnist():
    made = data.load(Config(dataset="mnist"))
    assert (len(made.train), len(made.validation), len(made.test)) == (54_000, 6_000, 10_000)
    assert np.bincount(made.test.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert made.mean[0] == pytest.approx(0.1307, abs=1e-3) and made.std[0] == pytest.approx(0.3081, abs=1e-3)


# Unfit folders


def truncate_shard(folder):
    path = next(folder.glob("*-train.*"))
    os.truncate(path, path.stat().st_size // 2)


def flip_byte(folder):
    path = next(folder.glob("*-train.*"))
    content = bytearray(path.read_bytes())
    content[5_000] ^= 0x40
    path.write_bytes(content)


def flip_length(folder):
    path = next(folder.glob("*-train.*"))
    content = bytearray(path.read_bytes())
    content[0] ^= 0x01
    path.write_bytes(content)


def drop_record(folder):
    path = next(folder.glob("*-train.*"))
    content = path.read_bytes()
    path.write_bytes(content[16 + struct.unpack_from("<Q", content)[0] :])


def edit_info(**keys):
    def edit(folder):
        info = json.loads((folder / "dataset_info.json").read_text())
        (folder / "dataset_info.json").write_text(json.dumps(info | keys))

    return edit


DAMAGE = {
    "truncated": (truncate_shard, ()),
    "flipped byte": (flip_byte, ()),
    "missing shard": (lambda folder: next(folder.glob("*-test.*")).unlink(), ("cifar10-test.", "missing")),
    "broken json": (lambda folder: (folder / "dataset_info.json").write_text('{"name": "cif'), ()),
    "broken features": (lambda folder: (folder / "features.json").write_text("[]"), ()),
    "no features": (lambda folder: (folder / "features.json").unlink(), ("features.json is missing",)),
    "no splits": (edit_info(splits=[]), ("dataset_info.json", "no images in split 'train'")),
    "another set": (edit_info(name="cifar100"), ("is of 'cifar100'",)),
}
TFRECORD_DAMAGE = {
    "truncated": (truncate_shard, (".tfrecord-", "truncated")),
    "flipped byte": (flip_byte, (".tfrecord-", "checksum of record")),
    "flipped length": (flip_length, (".tfrecord-",)),
    "dropped record": (drop_record, ("holds 34 records, not the 35",)),
    "missing shard": DAMAGE["missing shard"],
}


@pytest.mark.parametrize(("kind", "damage"), [("array_record", d) for d in DAMAGE] + [("tfrecord", d) for d in TFRECORD_DAMAGE])
def test_damaged_folder(copy, kind, damage):
    data_dir, folder = copy
    if kind == "tfrecord":
        to_tfrecord(folder)
    hurt, parts = (DAMAGE if kind == "array_record" else TFRECORD_DAMAGE)[damage]
    load(data_dir)  # sound before
    hurt(folder)
    fails(lambda: load(data_dir), str(folder), f'delete {folder} and run "vffjax prepare cifar10"', *parts)


def test_other_formats_are_not_read(copy):
    edit_info(fileFormat="riegeli")(copy[1])
    (copy[1] / "cifar10-train.riegeli-00000-of-00001").touch()
    fails(lambda: load(copy[0]), str(copy[1]), "riegeli", "config.data_dir")


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"label": 10}, "record 1 of split 'train' has label 10, outside 0..9"),
        ({"label": -1}, "record 1 of split 'train' has label -1, outside 0..9"),
        ({"label": None}, "not one image and one label"),
        ({"size": (32, 31)}, "31x32 RGB, not 32x32x3"),
        ({"mode": "L"}, "32x32 L, not 32x32x3"),
        ({"image": b"not a picture"}, "record 1 of split 'train' cannot be used"),
    ],
    ids=["label too large", "label negative", "no label", "size", "channels", "no picture"],
)
def test_unfit_record(copy, fields, problem):
    data_dir, folder = copy
    to_tfrecord(folder, {"train": [example(), example(**fields), example()]})
    fails(lambda: load(data_dir), str(folder), problem)


def test_record_that_is_no_example(copy):
    to_tfrecord(copy[1], {"train": [example(), b"\xff" * 100]})
    fails(lambda: load(copy[0]), str(copy[1]), "record 1")


def test_record_too_short_for_a_checksum(copy):
    to_tfrecord(copy[1], {"train": [example(), b"ab"]})
    fails(lambda: load(copy[0]), str(copy[1]), "record 1")


def test_data_dir_is_a_file_or_does_not_exist(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    fails(lambda: load(file), f"config.data_dir={str(file)!r}", "a file, not a folder")
    fails(lambda: data.prepare("cifar10", str(file)), f"config.data_dir={str(file)!r}", "a file, not a folder")
    fails(lambda: load(tmp_path / "none"), f"config.data_dir={str(tmp_path / 'none')!r}", "no such folder")
    monkeypatch.setenv("TFDS_DATA_DIR", str(file))
    fails(lambda: data.load(Config(dataset="cifar10")), f"TFDS_DATA_DIR={str(file)!r}", "a file, not a folder")
    assert tree(tmp_path) == ["file"]


@pytest.mark.parametrize("name", ["digits", "imagenet"])
def test_prepare_only_what_needs_it(name, tmp_path):
    fails(lambda: data.prepare(name, str(tmp_path)), f"config.dataset={name!r}", "prepare one of mnist, fashion_mnist, cifar10, cifar100")


# No network


def use_proxy(monkeypatch, port):
    """Every download goes to this port of this machine, so that a real network changes nothing."""
    for key in ("no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(key, raising=False)
    for key in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(key, f"http://127.0.0.1:{port}")


@pytest.mark.parametrize("answer", ["refused", "silent"])
@pytest.mark.parametrize("name", ["cifar10", "fashion_mnist"])
def test_no_network(name, answer, tmp_path, monkeypatch):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if answer == "silent":
            server.listen(8)  # connects, and never says a word
        use_proxy(monkeypatch, server.getsockname()[1])
        start = time.monotonic()
        message = fails(lambda: data.load(Config(dataset=name, data_dir=str(tmp_path))), f'run "vffjax prepare {name}"', "TFDS_DATA_DIR")
        assert time.monotonic() - start < 5
    assert message.startswith(f"config.dataset='{name}': not prepared in {tmp_path} and the download failed (")
    assert ("no answer from" in message) == (answer == "silent")
    assert tree(tmp_path) == []


def test_a_resolver_that_hangs_is_not_waited_for(tmp_path, monkeypatch):
    import requests

    released = threading.Event()

    def hang(*args, **kwargs):
        released.wait(20)
        raise requests.ConnectionError

    monkeypatch.setattr(requests, "get", hang)
    monkeypatch.setattr(tfds_files, "REACH_SECONDS", 0.2)
    start = time.monotonic()
    try:
        fails(lambda: load(tmp_path), "the download failed (no answer from www.cs.toronto.edu within 0.2 s)")
        assert time.monotonic() - start < 5
    finally:
        released.set()


def test_prepare_without_network_leaves_no_new_folder(tmp_path, monkeypatch):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        use_proxy(monkeypatch, server.getsockname()[1])
        fails(lambda: data.prepare("mnist", str(tmp_path / "new" / "folder")), "config.dataset='mnist'", "the download failed")
    assert tree(tmp_path) == []


def test_failed_preparation_leaves_nothing(tmp_path, monkeypatch):
    from tensorflow_datasets.image_classification import cifar

    archive = tar_gz({"batches.meta.txt": "\n".join(CIFAR_NAMES).encode(), BATCHES[0]: b"\x01" * 3072})  # a byte short
    put_manual(monkeypatch, cifar.Cifar10, tmp_path, {CIFAR_URL: archive})
    before = tree(tmp_path)
    fails(lambda: data.prepare("cifar10", str(tmp_path)), f"not prepared in {tmp_path} and preparing it failed (")
    assert tree(tmp_path) == before


def test_archive_with_a_wrong_checksum_is_refused(tmp_path):
    manual = tmp_path / "downloads" / "manual"
    manual.mkdir(parents=True)
    (manual / "cifar-10-binary.tar.gz").write_bytes(tar_gz({}))
    before = tree(tmp_path)
    fails(lambda: data.prepare("cifar10", str(tmp_path)), "preparing it failed", "wrong checksum")
    assert tree(tmp_path) == before
