"""Image sets of tensorflow-datasets (TFDS), read without TensorFlow.

TFDS reads array_record files itself; it needs TensorFlow for tfrecord files, which `tfrecord` reads instead. Examples are parsed with the
protocol-buffer classes of TFDS, and Pillow decodes the images, so the feature decoding of TFDS is not needed.
"""

import contextlib
import io
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
from jaxtyping import Int32, UInt8

from vffjax.data import tfrecord
from vffjax.errors import UserError, bad_key, printable
from vffjax.paths import local
from vffjax.registry import SOURCES

CHUNK = 5_000  # records of an array_record file that are held in memory at once

ArraysOfSplit = tuple[UInt8[np.ndarray, "n h w c"], Int32[np.ndarray, " n"]]  # images and labels


def one_line(error: BaseException) -> str:
    """The message of another library's error, on one line of at most 300 characters."""
    text = printable(str(error)) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def dataset(name: str) -> str:
    """What config.dataset calls the set that tensorflow-datasets calls `name`."""
    return name if name in SOURCES.names else f"tfds:{name}"


def data_root(data_dir: str) -> pathlib.Path:
    """The folder that holds the prepared sets. It need not exist.

    Args:
        data_dir: the folder; if empty, the environment variable TFDS_DATA_DIR, and if that is not set, ~/tensorflow_datasets.

    Raises:
        UserError: it exists and is not a folder.
    """
    given = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    root = local(given, "config.data_dir" if data_dir else "TFDS_DATA_DIR")
    # os.path, here and below, because the methods of a Path raise an error if a folder may not be read.
    if os.path.exists(root) and not os.path.isdir(root):
        if data_dir:
            raise bad_key("data_dir", data_dir, "a file, not a folder", "give the folder that holds the prepared sets")
        raise UserError(f"TFDS_DATA_DIR={given!r}: a file, not a folder; set it, or config.data_dir, to the folder of the prepared sets")
    return root


def find(name: str, root: pathlib.Path) -> pathlib.Path | None:
    """Finds the newest prepared version of a set, in any file format.

    Returns:
        The folder ROOT/NAME/VERSION, or None if there is none.

    Raises:
        UserError: there are folders of versions, but none has its JSON files.
    """
    folders = [p for p in (root / name).glob("*") if os.path.isdir(p) and re.fullmatch(r"\d+\.\d+\.\d+", p.name)]
    folders.sort(key=lambda p: [int(part) for part in p.name.split(".")], reverse=True)
    for folder in folders:
        if os.path.isfile(folder / "dataset_info.json") and os.path.isfile(folder / "features.json"):
            return folder
    if folders:
        raise _damaged(folders[0], "dataset_info.json or features.json is missing", name)
    return None


def read(name: str, folder: pathlib.Path) -> tuple[dict[str, ArraysOfSplit], tuple[str, ...]]:
    """Reads the splits "train" and "test" of a prepared folder.

    Args:
        name: the set's name in TFDS.
        folder: a folder that `find` or `tfds_preparation.prepare` has returned.

    Returns:
        The images and labels of each split, in the order of the files; and the names of the classes.

    Raises:
        UserError: the folder is damaged or holds another set, or a library is missing. The message names the file.
    """
    with _opened(name, folder) as builder:
        shape, names = _features(builder.info.features)
        return {split: _read_split(builder, split, shape, len(names), folder, name) for split in ("train", "test")}, names


class Records(NamedTuple):
    """The pictures of a split of any set, as they are stored: the content of a file each."""

    contents: list[bytes]
    labels: Int32[np.ndarray, " n"]


def read_encoded(name: str, folder: pathlib.Path) -> tuple[dict[str, Records], tuple[str, ...]]:
    """Reads the split "train" of a prepared folder of any set with one image and one class in each example, and its test part.

    The test part is the split "test" or, where there is none, "validation".

    Args:
        name, folder: as for `read`.

    Returns:
        The pictures of "train" and, if there is a test part, of "test"; and the names of the classes.

    Raises:
        UserError: as `read`; also if the set has no split "train", or if its features are others.
    """
    with _opened(name, folder) as builder:
        image, label = _picture_and_class(builder, name)
        there = [split for split in ("test", "validation") if split in builder.info.splits][:1]
        if "train" not in builder.info.splits:
            problem = f"has the splits {', '.join(builder.info.splits)}, and train is not among them"
            raise bad_key("dataset", dataset(name), problem, "use another set")
        names = tuple(builder.info.features[label].names or map(str, range(builder.info.features[label].num_classes)))
        found = {}
        for part, split in zip(("train", "test"), ("train", *there), strict=False):
            pairs = [_fields(record, image, label) for chunk in _chunks(builder, split, folder, name) for record in chunk]
            labels = np.array([one for _, one in pairs], np.int64)
            _check_labels(labels, len(names), split, folder, name)
            found[part] = Records([content for content, _ in pairs], labels.astype(np.int32))
        return found, names


def _picture_and_class(builder: Any, name: str) -> tuple[str, str]:
    """The names of the features of a set that are its picture and its class."""
    tfds = imported(name)
    features = builder.info.features
    pictures, classes = (
        [key for key in features if isinstance(features[key], kind)] for kind in (tfds.features.Image, tfds.features.ClassLabel)
    )
    supervised = [key for key in builder.info.supervised_keys or () if isinstance(key, str)]
    for found in (pictures, classes):
        if len(found) > 1:
            found[:] = [key for key in found if key in supervised] or found
    if len(pictures) != 1 or len(classes) != 1:
        problem = f"its examples have the features {', '.join(features)}, and not one image and one class"
        raise bad_key("dataset", dataset(name), problem, "use a set for image classification")
    return pictures[0], classes[0]


@contextlib.contextmanager
def _opened(name: str, folder: pathlib.Path) -> Iterator[Any]:
    """TFDS's builder of a prepared folder. Errors within become a `UserError` that names the file."""
    tfds = imported(name)
    with quiet():
        try:
            # TFDS would import any module that features.json names. A folder may come from anywhere and must not run code, so only the
            # features that TFDS has registered itself are found.
            known = tfds.features.FeatureConnector._registered_features
            with mock.patch.object(tfds.features.FeatureConnector, "cls_from_name", known.__getitem__):
                builder = tfds.builder_from_directory(folder)
            if builder.info.name != name.partition("/")[0]:
                raise _damaged(folder, f"dataset_info.json is of {builder.info.name!r}", name)
            yield builder
        except UserError:
            raise
        except ImportError as error:
            raise not_installed(name, error) from None
        except KeyError as error:
            problem = f"lacks an entry or names a class that tensorflow-datasets lacks ({one_line(error)})"
            raise _damaged(folder / "features.json", problem, name) from None
        except Exception as error:  # json, protobuf and array_record raise many types of errors, RuntimeError among them
            raise _damaged(folder, one_line(error), name) from error


def imported(name: str) -> Any:
    try:
        import PIL  # noqa: F401  # pyright: ignore[reportUnusedImport]
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise not_installed(name, error) from None
    return tfds


def not_installed(name: str, error: ImportError) -> UserError:
    fix = "pip install tensorflow-datasets array_record importlib_resources pillow"
    return bad_key("dataset", dataset(name), f"a library it needs is not installed ({one_line(error)})", fix)


def _damaged(path: pathlib.Path, problem: str, name: str) -> UserError:
    folder = path if path.is_dir() else path.parent
    return UserError(f'{path}: {problem}; delete {folder} and run "vffjax prepare {dataset(name)}", or set config.data_dir to a sound copy')


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides log lines of TFDS below the level of an error."""
    from absl import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _features(features: Any) -> tuple[tuple[int, int, int], tuple[str, ...]]:
    """Height, width and channels of the images, and the names of the classes, from the features of a TFDS set."""
    shape = tuple(features["image"].shape)
    if len(shape) != 3 or None in shape or shape[2] not in (1, 3) or features["image"].np_dtype != np.uint8:
        raise ValueError(f"features.json has images {shape} of {features['image'].np_dtype}, not uint8 of one size with 1 or 3 channels")
    return (shape[0], shape[1], shape[2]), tuple(features["label"].names)


def _chunks(builder: Any, split: str, folder: pathlib.Path, name: str) -> Iterator[Sequence[bytes | memoryview]]:
    """The records of one split, some at a time; raises `UserError` if a file is missing or damaged."""
    from array_record.python.array_record_module import ArrayRecordReader

    if split not in builder.info.splits or not builder.info.splits[split].num_examples:
        raise _damaged(folder / "dataset_info.json", f"no images in split {split!r}", name)
    info = builder.info.splits[split]
    kind = builder.info.file_format.value if builder.info.file_format else "tfrecord"
    if kind not in ("array_record", "tfrecord"):
        raise UserError(f"{folder}: holds {kind} files, not array_record or tfrecord; set config.data_dir to another folder")
    shards = list(zip(map(pathlib.Path, info.filepaths), info.shard_lengths, strict=True))
    for path, expected in shards:
        if path.parent != folder or not path.is_file():
            problem = "missing" if path.parent == folder else "named by dataset_info.json, and outside its folder"
            raise _damaged(folder / path.name, problem, name)
        if kind == "array_record":  # TFDS would silently read fewer records
            with contextlib.closing(ArrayRecordReader(os.fspath(path))) as reader:
                _check_count(reader.num_records(), expected, path, name)
    return _array_records(builder, split) if kind == "array_record" else (_tfrecords(path, expected, name) for path, expected in shards)


def _read_split(builder: Any, split: str, shape: tuple[int, int, int], classes: int, folder: pathlib.Path, name: str) -> ArraysOfSplit:
    """The images and labels of one split; raises `UserError` if a file is missing or damaged, or a label is no class."""
    chunks, count = _chunks(builder, split, folder, name), builder.info.splits[split].num_examples
    images, labels, n = np.empty((count, *shape), np.uint8), np.empty(count, np.int64), 0
    for chunk in chunks:
        for record in chunk:
            try:
                labels[n] = _decode(record, images[n])
            except Exception as error:  # Pillow and protobuf raise many types of errors, SyntaxError among them
                raise _damaged(folder, f"record {n} of split {split!r} cannot be used ({one_line(error)})", name) from error
            n += 1
    _check_labels(labels, classes, split, folder, name)
    return images, labels.astype(np.int32)


def _check_labels(labels: np.ndarray, classes: int, split: str, folder: pathlib.Path, name: str) -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if wrong.size and (labels == -1).all():
        fix = "use another set: this one keeps the classes of these images secret"
        raise bad_key("dataset", dataset(name), f"the images of its split {split!r} have no labels", fix)
    if wrong.size:
        raise _damaged(folder, f"record {wrong[0]} of split {split!r} has label {labels[wrong[0]]}, outside 0..{classes - 1}", name)


def _check_count(found: int, expected: int, path: pathlib.Path, name: str) -> None:
    if found != expected:
        raise _damaged(path, f"holds {found} records, not the {expected} of dataset_info.json", name)


def _tfrecords(path: pathlib.Path, expected: int, name: str) -> list[memoryview]:
    try:
        records = tfrecord.records(path)
    except ValueError as error:
        raise _damaged(path, str(error), name) from None
    _check_count(len(records), expected, path, name)
    return records


def _array_records(builder: Any, split: str) -> Iterator[list[bytes]]:
    from tensorflow_datasets.core.decode import DeserializeMethod

    source = builder.as_data_source(split, deserialize_method=DeserializeMethod.RAW_BYTES)
    for start in range(0, len(source), CHUNK):
        yield source.__getitems__(list(range(start, min(start + CHUNK, len(source)))))


def _fields(record: bytes | memoryview, image: str, label: str) -> tuple[bytes, int]:
    """The encoded picture and the label of one `tf.train.Example`, by the names of these features."""
    from tensorflow_datasets.proto import tf_example_pb2

    fields = tf_example_pb2.Example.FromString(bytes(record)).features.feature  # pyright: ignore[reportAttributeAccessIssue]
    encoded, number = fields[image].bytes_list.value, fields[label].int64_list.value
    if len(encoded) != 1 or len(number) != 1:
        raise ValueError("it does not hold one image and one label")
    return encoded[0], number[0]


def _decode(record: bytes | memoryview, out: UInt8[np.ndarray, "h w c"]) -> int:
    """Decodes one `tf.train.Example`: writes its image to `out` and returns its label."""
    from PIL import Image

    encoded, label = _fields(record, "image", "label")
    height, width, channels = out.shape
    with Image.open(io.BytesIO(encoded), formats=("PNG",)) as image:
        if image.size != (width, height) or image.mode != ("L" if channels == 1 else "RGB"):
            raise ValueError(f"the image is {image.size[1]}x{image.size[0]} {image.mode}, not {height}x{width}x{channels}")
        out[...] = np.asarray(image).reshape(out.shape)
    return label
