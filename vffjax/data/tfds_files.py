"""Image sets of tensorflow-datasets (TFDS), read and prepared without TensorFlow.

TFDS reads array_record files itself; it needs TensorFlow for tfrecord files, which `tfrecord` reads instead. Examples are parsed with the
protocol-buffer classes of TFDS, and Pillow decodes the images, so the feature decoding of TFDS is not needed.
"""

import contextlib
import importlib.util
import io
import os
import pathlib
import re
import sys
import tempfile
import threading
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
from jaxtyping import Int32, UInt8

from vffjax.data import tfrecord
from vffjax.errors import SafeStream, UserError, bad_key, printable
from vffjax.paths import local

CHUNK = 5_000  # records of an array_record file that are held in memory at once
REACH_SECONDS = 3.0  # how long a server may take to answer before it counts as unreachable

ArraysOfSplit = tuple[UInt8[np.ndarray, "n h w c"], Int32[np.ndarray, " n"]]  # images and labels


def one_line(error: BaseException) -> str:
    """The message of another library's error, on one line of at most 300 characters."""
    text = printable(str(error)) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


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
        folder: a folder that `find` or `prepare` has returned.

    Returns:
        The images and labels of each split, in the order of the files; and the names of the classes.

    Raises:
        UserError: the folder is damaged or holds another set, or a library is missing. The message names the file.
    """
    tfds = _import_tfds(name)
    with _quiet():
        try:
            # TFDS would import any module that features.json names. A folder may come from anywhere and must not run code, so only the
            # features that TFDS has registered itself are found.
            known = tfds.features.FeatureConnector._registered_features
            with mock.patch.object(tfds.features.FeatureConnector, "cls_from_name", known.__getitem__):
                builder = tfds.builder_from_directory(folder)
            if builder.info.name != name:
                raise _damaged(folder, f"dataset_info.json is of {builder.info.name!r}", name)
            shape, names = _features(builder.info.features)
            return {split: _read_split(builder, split, shape, len(names), folder, name) for split in ("train", "test")}, names
        except UserError:
            raise
        except ImportError as error:
            raise _not_installed(name, error) from None
        except KeyError as error:
            problem = f"lacks an entry or names a class that tensorflow-datasets lacks ({one_line(error)})"
            raise _damaged(folder / "features.json", problem, name) from None
        except Exception as error:  # json, protobuf and array_record raise many types of errors, RuntimeError among them
            raise _damaged(folder, one_line(error), name) from error


def prepare(name: str, root: pathlib.Path) -> pathlib.Path:
    """Downloads a set and writes it below `root` as array_record files. A set that is prepared already is left as it is.

    Archives in ROOT/downloads/manual are used instead of a download.

    Returns:
        The folder of the prepared set.

    Raises:
        UserError: the set could not be prepared. Nothing is left behind. If there is no network, this takes at most `REACH_SECONDS`.
    """
    folder = find(name, root)
    if folder:
        return folder
    tfds = _import_tfds(name)
    fix = f'run "vffjax prepare {name}" on a machine with network, or set config.data_dir or TFDS_DATA_DIR to a prepared folder'
    missing = [p for p in (root / name, root, *root.parents) if not os.path.exists(p)]  # innermost first
    manual = root / "downloads" / "manual"
    try:
        with _quiet():
            import array_record.python.array_record_module  # noqa: F401  # if it is missing, say so before the download

            builder = tfds.builder(name, data_dir=root, file_format="array_record")
        files = builder.url_infos or {}
        if not (files and all(info.filename and (manual / info.filename).is_file() for info in files.values())):
            problem = _unreachable(next(iter(files), "https://storage.googleapis.com"))
            if problem:
                raise bad_key("dataset", name, f"not prepared in {root} and the download failed ({problem})", fix)
        root.mkdir(parents=True, exist_ok=True)
        # A download folder of our own can be removed without harm to another process that prepares another set.
        downloads_at = tempfile.TemporaryDirectory(prefix=f".{name}-", dir=root)
        # TFDS may print to a terminal, where its progress bars are wanted. Elsewhere its output is dropped, so that a failure is one line.
        shown: Any = SafeStream(sys.stderr) if SafeStream(sys.stderr).isatty() else io.StringIO()
        with downloads_at as downloads, contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown), _without_tensorflow():
            builder.download_and_prepare(download_dir=downloads, download_config=tfds.download.DownloadConfig(manual_dir=manual))
    except UserError:
        raise
    except ImportError as error:
        raise _not_installed(name, error) from None
    except Exception as error:  # requests, TFDS and the file system raise many types of errors
        folder = find(name, root)
        if folder:  # another process was faster
            return folder
        raise bad_key("dataset", name, f"not prepared in {root} and preparing it failed ({one_line(error)})", fix) from error
    finally:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()  # removes only empty folders, which a failure leaves
    folder = find(name, root)
    if folder is None:
        raise bad_key("dataset", name, f"it was prepared, but {root / name} holds no prepared version", fix)
    return folder


def _import_tfds(name: str) -> Any:
    try:
        import PIL  # noqa: F401  # pyright: ignore[reportUnusedImport]
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise _not_installed(name, error) from None
    return tfds


def _not_installed(name: str, error: ImportError) -> UserError:
    fix = "pip install tensorflow-datasets array_record importlib_resources pillow"
    return bad_key("dataset", name, f"a library it needs is not installed ({one_line(error)})", fix)


def _damaged(path: pathlib.Path, problem: str, name: str) -> UserError:
    folder = path if path.is_dir() else path.parent
    return UserError(f'{path}: {problem}; delete {folder} and run "vffjax prepare {name}", or set config.data_dir to a sound copy')


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
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


def _read_split(builder: Any, split: str, shape: tuple[int, int, int], classes: int, folder: pathlib.Path, name: str) -> ArraysOfSplit:
    """The images and labels of one split; raises `UserError` if a file is missing or damaged, or a label is no class."""
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
    chunks = _array_records(builder, split) if kind == "array_record" else (_tfrecords(path, expected, name) for path, expected in shards)
    images, labels, n = np.empty((info.num_examples, *shape), np.uint8), np.empty(info.num_examples, np.int64), 0
    for chunk in chunks:
        for record in chunk:
            try:
                labels[n] = _decode(record, images[n])
            except Exception as error:  # Pillow and protobuf raise many types of errors, SyntaxError among them
                raise _damaged(folder, f"record {n} of split {split!r} cannot be used ({one_line(error)})", name) from error
            n += 1
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if wrong.size:
        raise _damaged(folder, f"record {wrong[0]} of split {split!r} has label {labels[wrong[0]]}, outside 0..{classes - 1}", name)
    return images, labels.astype(np.int32)


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


def _decode(record: bytes | memoryview, out: UInt8[np.ndarray, "h w c"]) -> int:
    """Decodes one `tf.train.Example`: writes its image to `out` and returns its label."""
    from PIL import Image
    from tensorflow_datasets.proto import tf_example_pb2

    fields = tf_example_pb2.Example.FromString(bytes(record)).features.feature  # pyright: ignore[reportAttributeAccessIssue]
    encoded, label = fields["image"].bytes_list.value, fields["label"].int64_list.value
    if len(encoded) != 1 or len(label) != 1:
        raise ValueError("it does not hold one image and one label")
    height, width, channels = out.shape
    with Image.open(io.BytesIO(encoded[0]), formats=("PNG",)) as image:
        if image.size != (width, height) or image.mode != ("L" if channels == 1 else "RGB"):
            raise ValueError(f"the image is {image.size[1]}x{image.size[0]} {image.mode}, not {height}x{width}x{channels}")
        out[...] = np.asarray(image).reshape(out.shape)
    return label[0]


def _unreachable(url: str) -> str:
    """Says why `url` cannot be reached; an empty string if it can.

    TFDS itself would try ten times with growing pauses. The request runs in a thread that is abandoned after `REACH_SECONDS`, because
    the look-up of a host's address may hang for longer than any timeout of requests.
    """
    import requests

    outcome = [f"no answer from {url.split('/')[2]} within {REACH_SECONDS:g} s"]

    def attempt() -> None:
        try:
            with requests.get(url, stream=True, timeout=REACH_SECONDS) as response:
                outcome.append("" if response.ok else f"{url} answers {response.status_code}")
        except requests.Timeout:
            pass
        except (OSError, ValueError) as error:  # the errors of requests are OSErrors
            cause = getattr(error.args[0], "reason", error) if error.args else error
            outcome.append(f"{url.split('/')[2]}: {one_line(cause)}")

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(REACH_SECONDS)
    return outcome[-1]


@contextlib.contextmanager
def _without_tensorflow() -> Iterator[None]:
    """Replaces the parts of TensorFlow that TFDS uses to prepare these sets, if it is not installed: PNG encoding and plain files."""
    if importlib.util.find_spec("tensorflow") is not None:
        yield
        return
    from PIL import Image
    from tensorflow_datasets.core.download import extractor
    from tensorflow_datasets.core.features import image_feature
    from tensorflow_datasets.image_classification import cifar, mnist

    def encode(encoder: Any, pixels: np.ndarray) -> bytes:
        if encoder.encoding_format != "png" or pixels.dtype != np.uint8:
            raise ValueError(f"only uint8 PNG can be written without TensorFlow, not {pixels.dtype} {encoder.encoding_format}")
        buffer = io.BytesIO()
        Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, "PNG")
        return buffer.getvalue()

    files = types.SimpleNamespace(gfile=types.SimpleNamespace(GFile=open))
    stand_in = types.SimpleNamespace(io=files, compat=types.SimpleNamespace(as_text=str))
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(image_feature._ImageEncoder, "_encode_image", encode))
        for module in (cifar, mnist, extractor):
            stack.enter_context(mock.patch.object(module, "tf", stand_in))
        yield
