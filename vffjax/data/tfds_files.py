"""Image sets of tensorflow-datasets (TFDS), read and prepared without TensorFlow.

TFDS reads array_record itself, and its feature decoding is not needed: the examples are parsed with its own protocol-buffer
classes and the images decoded with Pillow. For tfrecord, which TFDS leaves to TensorFlow, the framing is read here.
"""

import contextlib
import importlib.util
import io
import os
import pathlib
import re
import struct
import sys
import tempfile
import threading
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np

from vffjax.data.tfrecord import bad_checksums
from vffjax.errors import SafeStream, UserError, bad_key, printable
from vffjax.paths import local

CHUNK = 5_000  # records held at a time: bounds the memory, and is enough for the checksum to run over many at once
REACH_SECONDS = 3.0


def one_line(error: BaseException) -> str:
    """The message of an error of another library, shortened, on one line."""
    text = printable(str(error)) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def data_root(data_dir: str) -> pathlib.Path:
    """The folder of prepared sets: `data_dir`, else $TFDS_DATA_DIR, else ~/tensorflow_datasets. It need not exist.

    Raises `UserError` if it is not a folder.
    """
    given = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    root = local(given, "config.data_dir" if data_dir else "TFDS_DATA_DIR")
    # os.path, here and below, because a Path raises where a folder may not be read.
    if os.path.exists(root) and not os.path.isdir(root):
        if data_dir:
            raise bad_key("data_dir", data_dir, "a file, not a folder", "give the folder that holds the prepared sets")
        raise UserError(f"TFDS_DATA_DIR={given!r}: a file, not a folder; set it, or config.data_dir, to the folder of the prepared sets")
    return root


def find(name: str, root: pathlib.Path) -> pathlib.Path | None:
    """The folder ROOT/NAME/VERSION of the newest prepared version, in whatever format; None if there is none.

    Raises `UserError` if there are only folders without their json files.
    """
    folders = [p for p in (root / name).glob("*") if os.path.isdir(p) and re.fullmatch(r"\d+\.\d+\.\d+", p.name)]
    folders.sort(key=lambda p: [int(part) for part in p.name.split(".")], reverse=True)
    for folder in folders:
        if os.path.isfile(folder / "dataset_info.json") and os.path.isfile(folder / "features.json"):
            return folder
    if folders:
        raise _damaged(folders[0], "dataset_info.json or features.json is missing", name)
    return None


def read(name: str, folder: pathlib.Path) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], tuple[str, ...]]:
    """Reads the splits train and test of a prepared folder, and the class names.

    Each split is (images uint8 [n, h, w, c], labels int32 [n]), in the order of the files. Raises `UserError` naming the file.
    """
    tfds = _import_tfds(name)
    with _quiet():
        try:
            # Else TFDS imports whatever module a features.json names: a folder from elsewhere is data, not a program.
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
            raise _damaged(
                folder / "features.json", f"lacks an entry or names a class not of tensorflow-datasets ({one_line(error)})", name
            ) from None
        except Exception as error:  # json, protobuf and array_record raise all kinds, RuntimeError among them
            raise _damaged(folder, one_line(error), name) from error


def prepare(name: str, root: pathlib.Path) -> pathlib.Path:
    """Downloads a set and writes it below `root` as array_record; returns its folder. An existing one is returned as it is.

    Archives found in ROOT/downloads/manual are used instead of a download. On failure nothing is left behind, and `UserError` is
    raised; without network, after at most `REACH_SECONDS`.
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
            import array_record.python.array_record_module  # noqa: F401  # fails before the download, not after it

            builder = tfds.builder(name, data_dir=root, file_format="array_record")
        files = builder.url_infos or {}
        if not (files and all(info.filename and (manual / info.filename).is_file() for info in files.values())):
            problem = _unreachable(next(iter(files), "https://storage.googleapis.com"))
            if problem:
                raise bad_key("dataset", name, f"not prepared in {root} and the download failed ({problem})", fix)
        root.mkdir(parents=True, exist_ok=True)
        # A download folder of our own: it can be removed without harm to another process that prepares another set.
        downloads_at = tempfile.TemporaryDirectory(prefix=f".{name}-", dir=root)
        # What TFDS prints goes where its progress bars go: to a terminal, else nowhere, so that a failure is one line.
        shown: Any = SafeStream(sys.stderr) if SafeStream(sys.stderr).isatty() else io.StringIO()
        with downloads_at as downloads, contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown), _without_tensorflow():
            builder.download_and_prepare(download_dir=downloads, download_config=tfds.download.DownloadConfig(manual_dir=manual))
    except UserError:
        raise
    except ImportError as error:
        raise _not_installed(name, error) from None
    except Exception as error:  # requests, TFDS and the file system raise all kinds
        folder = find(name, root)
        if folder:  # another process was faster
            return folder
        raise bad_key("dataset", name, f"not prepared in {root} and preparing it failed ({one_line(error)})", fix) from error
    finally:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()  # only succeeds on the empty folders that a failure leaves
    folder = find(name, root)
    if folder is None:
        raise bad_key("dataset", name, f"preparing it left nothing in {root / name}", fix)
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
    """No log lines of TFDS below an error."""
    from absl import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _features(features: Any) -> tuple[tuple[int, int, int], tuple[str, ...]]:
    shape = tuple(features["image"].shape)
    if len(shape) != 3 or None in shape or shape[2] not in (1, 3) or features["image"].np_dtype != np.uint8:
        raise ValueError(f"features.json has images {shape} of {features['image'].np_dtype}, not uint8 of one size with 1 or 3 channels")
    return (shape[0], shape[1], shape[2]), tuple(features["label"].names)


def _read_split(
    builder: Any, split: str, shape: tuple[int, int, int], classes: int, folder: pathlib.Path, name: str
) -> tuple[np.ndarray, np.ndarray]:
    from array_record.python.array_record_module import ArrayRecordReader

    if split not in builder.info.splits or not builder.info.splits[split].num_examples:
        raise _damaged(folder / "dataset_info.json", f"no images in split {split!r}", name)
    info = builder.info.splits[split]
    kind = builder.info.file_format.value if builder.info.file_format else "tfrecord"
    if kind not in ("array_record", "tfrecord"):
        raise UserError(f"{folder}: holds {kind} files, not array_record or tfrecord; set config.data_dir to another folder")
    for path, expected in zip(map(pathlib.Path, info.filepaths), info.shard_lengths, strict=True):
        if path.parent != folder or not path.is_file():
            problem = "missing" if path.parent == folder else "named by dataset_info.json, and outside its folder"
            raise _damaged(folder / path.name, problem, name)
        if kind == "array_record":  # TFDS reads fewer than there are without a word
            with contextlib.closing(ArrayRecordReader(os.fspath(path))) as reader:
                if reader.num_records() != expected:
                    raise _damaged(path, f"holds {reader.num_records()} records, not the {expected} of dataset_info.json", name)
    chunks = _array_records(builder, split) if kind == "array_record" else _tfrecords(info, name)
    images, labels, n = np.empty((info.num_examples, *shape), np.uint8), np.empty(info.num_examples, np.int64), 0
    for chunk in chunks:
        for record in chunk:
            try:
                labels[n] = _decode(record, images[n])
            except Exception as error:  # Pillow and protobuf raise all kinds, SyntaxError among them
                raise _damaged(folder, f"record {n} of split {split!r} cannot be used ({one_line(error)})", name) from error
            n += 1
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if wrong.size:
        raise _damaged(folder, f"record {wrong[0]} of split {split!r} has label {labels[wrong[0]]}, outside 0..{classes - 1}", name)
    return images, labels.astype(np.int32)


def _array_records(builder: Any, split: str) -> Iterator[list[bytes]]:
    from tensorflow_datasets.core.decode import DeserializeMethod

    source = builder.as_data_source(split, deserialize_method=DeserializeMethod.RAW_BYTES)
    for start in range(0, len(source), CHUNK):
        yield source.__getitems__(list(range(start, min(start + CHUNK, len(source)))))


def _tfrecords(info: Any, name: str) -> Iterator[list[bytes]]:
    """The records of all shards; each is an 8-byte length, its 4-byte checksum, the record, and its 4-byte checksum."""
    for path, expected in zip(map(pathlib.Path, info.filepaths), info.shard_lengths, strict=True):
        data, at = path.read_bytes(), 0
        heads: list = []
        records: list = []
        while at < len(data):
            size = struct.unpack_from("<Q", data, at)[0] if at + 16 <= len(data) else len(data)
            if at + 16 + size > len(data):
                raise _damaged(path, f"truncated or damaged: record {len(records)} does not fit in the file", name)
            heads.append(data[at : at + 12])
            records.append(data[at + 12 : at + 16 + size])
            at += 16 + size
        if len(records) != expected:
            raise _damaged(path, f"holds {len(records)} records, not the {expected} of dataset_info.json", name)
        # Lengths first: with a wrong one, the records behind it are not records.
        for parts in (heads, records):
            for start in range(0, len(parts), CHUNK):
                bad = bad_checksums(parts[start : start + CHUNK])
                if bad.size:
                    raise _damaged(path, f"the checksum of record {start + bad[0]} does not match", name)
        for start in range(0, len(records), CHUNK):
            yield [record[:-4] for record in records[start : start + CHUNK]]


def _decode(record: bytes, out: np.ndarray) -> int:
    """Writes the image of one `tf.train.Example` to `out` [h, w, c] and returns its label."""
    from PIL import Image
    from tensorflow_datasets.proto import tf_example_pb2

    fields = tf_example_pb2.Example.FromString(record).features.feature  # pyright: ignore[reportAttributeAccessIssue]
    encoded, label = fields["image"].bytes_list.value, fields["label"].int64_list.value
    if len(encoded) != 1 or len(label) != 1:
        raise ValueError("not one image and one label")
    height, width, channels = out.shape
    with Image.open(io.BytesIO(encoded[0]), formats=("PNG",)) as image:
        if image.size != (width, height) or image.mode != ("L" if channels == 1 else "RGB"):
            raise ValueError(f"the image is {image.size[1]}x{image.size[0]} {image.mode}, not {height}x{width}x{channels}")
        out[...] = np.asarray(image).reshape(out.shape)
    return label[0]


def _unreachable(url: str) -> str:
    """Why `url` cannot be had, or '' if it can, found out in a thread that is abandoned.

    TFDS tries ten times with growing pauses, and a resolver may hang for longer than any timeout of requests.
    """
    import requests

    outcome = [f"no answer from {url.split('/')[2]} within {REACH_SECONDS:g} s"]

    def attempt() -> None:
        try:
            with requests.get(url, stream=True, timeout=REACH_SECONDS) as response:
                outcome.append("" if response.ok else f"{url} answers {response.status_code}")
        except requests.Timeout:
            pass
        except (OSError, ValueError) as error:  # those of requests are OSErrors
            cause = getattr(error.args[0], "reason", error) if error.args else error
            outcome.append(f"{url.split('/')[2]}: {one_line(cause)}")

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(REACH_SECONDS)
    return outcome[-1]


@contextlib.contextmanager
def _without_tensorflow() -> Iterator[None]:
    """Lends TFDS, where TensorFlow is not installed, what the preparation of these sets asks of it: PNG encoding, plain files."""
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
