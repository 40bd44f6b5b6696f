"""Image sets of the Hugging Face Hub: hf:OWNER/NAME[/CONFIG][@REVISION], whose files are Parquet. No code of theirs is run.

With config.data_dir they are read from a local copy of the repository instead. The library `datasets` downloads, caches and signs in.
"""

import contextlib
import logging
import os
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from vffjax import paths
from vffjax.config import Config
from vffjax.data import own_sets
from vffjax.data.decoding import Encoded, decode
from vffjax.data.sets import Source, Split
from vffjax.errors import SafeStream, UserError, bad_key, printable, said

_NAME = r"[A-Za-z0-9_][\w.-]*"
_ADDRESS = re.compile(rf"({_NAME}/{_NAME})(?:/({_NAME}))?(?:@({_NAME}(?:/{_NAME})*))?", re.ASCII)
_USUAL = ("label", "labels", "fine_label")  # the column of classes, where there are several


def FAMILY(name: str) -> Source:
    """A set of the Hub by its address without `hf:`.

    Without a split "test" the split "validation" is the test part, and without both config.test_fraction of each class.
    """
    address = _ADDRESS.fullmatch(name)
    if not address:
        raise bad_key("dataset", f"hf:{name}", "no address", "give hf:OWNER/NAME[/CONFIG][@REVISION], such as hf:ylecun/mnist")

    def own(config: Config) -> own_sets.Own:
        splits = _splits(name, config.data_dir)
        with _explained(name):
            return _own(name, splits, config.image_size)

    def prepare(data_dir: str) -> pathlib.Path:
        files = next(iter(_splits(name, data_dir).values())).cache_files
        return pathlib.Path(files[0]["filename"]).parent if files else pathlib.Path(data_dir)

    return own_sets.source(own, prepare)


def _splits(name: str, data_dir: str) -> dict[str, Any]:
    """The splits "train" and, if there is a test part, "test", as `datasets.Dataset`. Raises `UserError` if they cannot be had."""
    try:
        import datasets
    except ImportError as error:
        problem = f"the library datasets is not installed ({printable(str(error), 200)})"
        raise bad_key("dataset", f"hf:{name}", problem, 'pip install -e ".[datasets]"') from None
    match = _ADDRESS.fullmatch(name)
    assert match is not None  # see `FAMILY`
    repository, subset, revision = match.groups()
    given: dict[str, Any] = {"path": repository, "name": subset, "revision": revision}
    if data_dir:
        folder = paths.local(data_dir, "config.data_dir")
        if not os.path.isdir(folder):
            raise bad_key("data_dir", data_dir, "no such folder", f"give a copy of {repository}, or leave it out to download it")
        given = {"path": str(folder), "name": subset}
    with _explained(name), _quiet(datasets):
        builder = datasets.load_dataset_builder(**given)
        if ".parquet." not in type(builder).__module__:
            kind = type(builder).__module__.rpartition(".")[2]
            fix = "use its revision refs/convert/parquet, which the Hub makes: add @refs/convert/parquet"
            raise bad_key("dataset", f"hf:{name}", f"its files are of kind {kind}, and only Parquet is read", fix)
        found = datasets.load_dataset(**given)
    there = {part: found[split] for split, part in (("train", "train"), ("validation", "test"), ("test", "test")) if split in found}
    if "train" not in there:
        raise bad_key("dataset", f"hf:{name}", f"has the splits {', '.join(found)}, and train is not among them", "use another set")
    return there


def _own(name: str, splits: dict[str, Any], image_size: int) -> own_sets.Own:
    import datasets

    features = splits["train"].features
    picture = _column(name, "pictures", [key for key, kind in features.items() if isinstance(kind, datasets.Image)])
    classes = [key for key, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    classes = classes or [key for key, kind in features.items() if re.fullmatch("u?int[0-9]+|string", str(getattr(kind, "dtype", "")))]
    label = _column(name, "classes", [key for key in _USUAL if key in classes][:1] or classes)
    parts = [split.cast_column(picture, datasets.Image(decode=False)) for split in splits.values()]
    places = [(part, row) for part in parts for row in range(len(part))]
    names = [f"row {row} of {part} in hf:{name}" for part in splits for row in range(len(splits[part]))]

    def content(number: int) -> bytes:
        part, row = places[number]
        stored = part[row][picture] or {}
        if stored.get("bytes") is None:
            raise UserError(f"{names[number]} holds no picture")
        return stored["bytes"]

    labels, known = _labels(name, [split[label] for split in splits.values()], getattr(features[label], "names", None))
    key = repr((name, [split._fingerprint for split in splits.values()]))
    images, kept = decode(Encoded(f"hf:{name}", names, content, key), image_size)
    train = int((kept < len(parts[0])).sum()) if len(parts) > 1 else None
    return own_sets.Own(Split(images, labels[kept]), known, train, [names[i] for i in kept])


def _column(name: str, what: str, found: list[str]) -> str:
    if len(found) != 1:
        problem = f"has {len(found)} columns that may hold {what}{': ' * bool(found)}{printable(', '.join(found), 200)}"
        raise bad_key("dataset", f"hf:{name}", problem, "use a set for image classification, with one such column")
    return found[0]


def _labels(name: str, given: list[Any], names: list[str] | None) -> tuple[np.ndarray, tuple[str, ...]]:
    """The labels of all rows as numbers from 0, int32, and the names of the classes, which are the labels themselves if none are given."""
    listed = [list(part) for part in given]
    if any(label is None for part in listed for label in part):
        raise bad_key("dataset", f"hf:{name}", "has rows without a class", "use a set whose rows all have one")
    labels = [np.asarray(part) for part in listed]
    known = np.arange(len(names)) if names else np.unique(labels[0])
    every = np.concatenate(labels)
    if strange := [printable(str(one)) for one in np.setdiff1d(every, known)]:
        raise bad_key("dataset", f"hf:{name}", f"{strange[0]!r} is no class of the images to train on", "use a set whose rows all have one")
    return np.searchsorted(known, every).astype(np.int32), tuple(names or map(str, known.tolist()))


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turns what the library, the network and the disk refuse into a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # datasets, huggingface_hub, pyarrow and the network raise many types of errors
        fix = "check the name, the connection and, for a private set, `hf auth login`; or give a local copy by config.data_dir"
        raise bad_key("dataset", f"hf:{name}", f"cannot be read ({said(error)})", fix) from None


@contextlib.contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """No progress bars where nobody sees them, and no line for each attempt to reach the Hub."""
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)
    shown = SafeStream(sys.stderr).isatty() or not datasets.is_progress_bar_enabled()
    if not shown:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        hub.setLevel(level)
        if not shown:
            datasets.enable_progress_bars()
