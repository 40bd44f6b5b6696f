"""Files of tensorflow-datasets: both formats read alike, and what is said of folders and records that are unfit."""

import io
import json
import os
import shutil
import struct
import sys

import numpy as np
import pytest
from PIL import Image

from command_lines import in_a_process
from image_sets import CIFAR_NAMES, PER_BATCH, as_set, fails, fake_cifar, load, tree
from vffjax.config import Config
from vffjax.data import load as data
from vffjax.data import tfds_files, tfrecord


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


def test_a_set_is_decoded_once_while_its_files_are_the_same(copy, monkeypatch):
    data_dir, folder = copy
    read, times = tfds_files.read, []
    monkeypatch.setattr(tfds_files, "read", lambda *given: times.append(given) or read(*given))
    assert as_set(load(data_dir).test) == as_set(load(data_dir).test)
    assert len(times) == 1
    config = Config(dataset="cifar10", data_dir=str(data_dir))
    train, test, _ = data.find(config).read(config)
    for array in (train.images, train.labels, test.images, test.labels):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    os.utime(folder / "dataset_info.json", ns=(0, 0))
    load(data_dir)
    assert len(times) == 2


def test_a_broken_link_in_the_place_of_a_file_is_a_missing_file(copy):
    data_dir, folder = copy
    shard = next(path for path in folder.iterdir() if "-test." in path.name)
    shard.unlink()
    shard.symlink_to("nowhere")
    fails(lambda: load(data_dir), f"{shard.name}: missing")


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


@pytest.mark.slow
def test_reading_writes_nothing_to_the_terminal(cifar):
    code = """
import sys
from absl import logging
from vffjax.data import load as data
from vffjax.config import Config
logging.use_absl_handler()  # as absl.app does
logging.set_verbosity(logging.INFO)
logging.info("before")
data.load(Config(dataset="cifar10", data_dir=sys.argv[1]))
logging.info("after")
"""
    done = in_a_process("-c", code, str(cifar[0]))
    assert (done.returncode, done.stdout) == (0, "")
    assert [line.split()[-1] for line in done.stderr.splitlines()[-2:]] == ["before", "after"]


@pytest.mark.parametrize(("dataset", "module"), [("digits", "sklearn.datasets"), ("cifar10", "tensorflow_datasets")])
def test_a_missing_library_is_named(monkeypatch, cifar, dataset, module):
    monkeypatch.setitem(sys.modules, module, None)  # makes the import raise ImportError
    where = "" if dataset == "digits" else str(cifar[0])
    fails(lambda: data.load(Config(dataset=dataset, data_dir=where)), f"config.dataset='{dataset}'", "not installed", "pip install")


def real_mnist():
    root = os.environ.get("TFDS_DATA_DIR", "")
    return bool(root) and os.path.isdir(os.path.join(root, "mnist"))


@pytest.mark.slow
@pytest.mark.skipif(not real_mnist(), reason="needs a prepared mnist in $TFDS_DATA_DIR")
def test_real_mnist():
    made = data.load(Config(dataset="mnist"))
    assert (len(made.train), len(made.validation), len(made.test)) == (54_000, 6_000, 10_000)
    assert np.bincount(made.test.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert made.mean[0] == pytest.approx(0.1307, abs=1e-3) and made.std[0] == pytest.approx(0.3081, abs=1e-3)


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
    assert tfrecord.crc32c(strings).tolist() == [0xE3069283, *map(slow_crc32c, strings[1:])]


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
        ({"label": None}, "does not hold one image and one label"),
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
