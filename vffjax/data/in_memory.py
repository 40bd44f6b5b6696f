"""Images in memory, as vffjax.train(config, data=...) takes them in Python.

A set is known by the digest of its content, which stands in config.data_dir, as long as the process lives.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vffjax.config import Config
from vffjax.data import own_sets
from vffjax.data.sets import Split
from vffjax.errors import UserError, bad_key, printable, said

# The names that images and labels of the parts have, in files of common kinds: Keras's MNIST, MedMNIST, and a set without parts.
_PARTS = (
    (("x_train", "y_train"), ("x_test", "y_test")),
    (("train_images", "train_labels"), ("test_images", "test_labels")),
    (("images", "labels"),),
    (("x", "y"),),
)
NAMES = "x_train, y_train, x_test and y_test, or images and labels"
_held: dict[str, own_sets.Own] = {}


def from_mapping(given: Mapping[str, Any], where: str) -> own_sets.Own:
    """A set from arrays by their names.

    Args:
        given: images `[n, h, w]` or `[n, h, w, c]`, where c is 1 or 3, as bytes, as numbers from 0 to 255, or as floats from 0 to 1; labels
            `[n]`, `[n, 1]`, or `[n, classes]` one-hot, as whole numbers or texts; and perhaps `class_names`. See `NAMES` for their names.
        where: what messages call it.

    Raises:
        UserError: an array is missing or does not fit; the message names it and the fix.
    """
    kinds = [parts for parts in _PARTS if all(name in given for part in parts for name in part)]
    if not kinds:
        raise UserError(f"{where}: holds {printable(', '.join(map(str, given)), 200) or 'nothing'}; give it {NAMES}")
    known = {name for part in kinds[0] for name in part} | {"class_names"}
    if unused := sorted(str(name) for name in given if name not in known):
        own_sets.tell(f"{where}: {printable(', '.join(unused), 200)} not used; validation images are cut from those of training")
    parts = [(as_bytes(given[x], f"{where}: {x}"), _labels(given[y], f"{where}: {y}")) for x, y in kinds[0]]
    for (images, labels), (x, y) in zip(parts, kinds[0], strict=True):
        if len(images) != len(labels) or not len(images):
            raise UserError(f"{where}: {len(images)} {x} and {len(labels)} {y}; give each image one label")
        if images.shape[1:] != parts[0][0].shape[1:]:
            sizes = ("x".join(map(str, found.shape[1:])) for found in (images, parts[0][0]))
            raise UserError(f"{where}: {x} are {' and those of training '.join(sizes)}; give all images one size")
    names = given.get("class_names")
    places = names is not None and all(_says_places(given[y], np.size(names)) for _, y in kinds[0])
    numbers, names = _numbered([labels for _, labels in parts], names, where, places)
    images = parts[0][0] if len(parts) == 1 else np.concatenate([images for images, _ in parts])
    return own_sets.Own(Split(images, np.concatenate(numbers)), names, len(numbers[0]) if len(parts) > 1 else None)


def as_bytes(given: Any, where: str) -> np.ndarray:
    """Images as bytes, [n, h, w, c]; `from_mapping` says what is taken. Raises `UserError` that calls them `where`."""
    images = _array(given, where)
    images = images[..., None] if images.ndim == 3 else images
    if images.ndim != 4 or images.shape[3] not in (1, 3):
        fix = "give [n, h, w] or [n, h, w, c] with c = 1 or 3"
        if images.ndim == 4 and images.shape[1] in (1, 3):
            fix = "its channels stand first; give array.transpose(0, 2, 3, 1)"
        elif images.ndim == 4 and images.shape[3] == 4:
            fix = "leave out the fourth channel: array[..., :3]"
        raise UserError(f"{where} has the shape {'x'.join(map(str, np.shape(given)))}; {fix}")
    if 0 in images.shape[1:]:
        raise UserError(f"{where} has the shape {'x'.join(map(str, images.shape))}; give images of at least one pixel")
    if images.dtype == np.uint8:
        return images
    if images.dtype.kind not in "biuf":
        raise UserError(f"{where} holds {images.dtype}; give numbers from 0 to 255, or floats from 0 to 1")
    low, high = (float(f(images)) if images.size else 0.0 for f in (np.min, np.max))
    if not (low >= 0 and high <= 255):  # also if one of them is NaN
        raise UserError(f"{where} holds numbers from {low:g} to {high:g}; give numbers from 0 to 255, or floats from 0 to 1")
    if images.dtype.kind == "f" and 1 < high < 2:  # bytes as floats are whole numbers, and resizing may overshoot 1 by a little
        raise UserError(f"{where} holds numbers from {low:g} to {high:.6g}; clip them to at most 1, or give numbers from 0 to 255")
    scale = 255.0 if images.dtype.kind in "bf" and high <= 1 else 1.0
    if scale == 1 and 1 < high < 32:
        dark = f"the largest number is {high:g} where 255 is white, so that all images are nearly black"
        own_sets.tell(f"{where}: {dark}; scale them if they are not")
    out = np.empty(images.shape, np.uint8)
    for start in range(0, len(images), 4096):  # in pieces, because float64 takes eight times the memory
        out[start : start + 4096] = np.rint(images[start : start + 4096] * scale)
    return out


def _array(given: Any, where: str) -> np.ndarray:
    try:
        return np.asarray(given)
    except ValueError as error:  # parts of a list that have different shapes
        raise UserError(f"{where} is no array ({said(error)}); give all parts one shape") from None


def _labels(given: Any, where: str) -> np.ndarray:
    """Labels as they are, [n]; of a one-hot array the number of the class."""
    labels = _array(given, where)
    if labels.dtype.kind == "O" and labels.size:  # such as texts from pandas
        for kind, meant in ((str, str), ((int, np.integer), np.int64)):
            if all(isinstance(label, kind) for label in labels.flat):
                labels = labels.astype(meant)
    if labels.dtype.kind == "b" and labels.shape[1:] in ((), (1,)):
        labels = labels.astype(np.int64)
    if labels.dtype.kind == "S":
        labels = np.char.decode(labels, "utf-8", "replace")
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    elif labels.ndim == 2 and labels.dtype.kind in "biuf" and ((labels == 0) | (labels == 1)).all() and (labels.sum(axis=1) == 1).all():
        labels = labels.argmax(axis=1)
    if labels.dtype.kind == "f" and labels.ndim == 1 and np.isfinite(labels).all() and (labels == np.rint(labels)).all():
        labels = labels.astype(np.int64)
    if labels.ndim != 1 or labels.dtype.kind not in "iuU":
        shown = "x".join(map(str, labels.shape))
        raise UserError(f"{where} is {labels.dtype} of shape {shown}; give one whole number or text for each image")
    return labels


def _numbered(labels: list[np.ndarray], names: Any, where: str, places: bool) -> tuple[list[np.ndarray], tuple[str, ...]]:
    """The labels of each part as numbers from 0, int32, and the names of the classes.

    Without names, the classes are the labels of the first part in order. With names, labels are their numbers.
    """
    if names is not None:
        texts = np.atleast_1d(_array(names, f"{where}: class_names"))
        shown = tuple(map(str, (np.char.decode(texts, "utf-8", "replace") if texts.dtype.kind == "S" else texts).tolist()))
        if twice := sorted({name for name in shown if shown.count(name) > 1}):
            raise UserError(f"{where}: class_names has {printable(twice[0], 100)} more than once; give each class a name of its own")
        if any(part.dtype.kind == "U" for part in labels):
            fix = "leave out class_names, or number the classes from 0"
            raise UserError(f"{where}: the labels are texts, which name the classes already; {fix}")
        numbers = all(part.dtype.kind in "iu" for part in labels)
        found = np.unique(np.concatenate(labels)) if numbers else np.array([-1])
        if len(shown) < 2 or found[0] < 0 or found[-1] >= len(shown):
            raise UserError(f"{where}: the labels are no numbers of the {len(shown)} class_names; number the classes from 0")
        if not places and _are_other_numbers(shown):
            fix = "give these numbers as labels, without class_names, or name the classes by texts"
            raise UserError(f"{where}: class_names are numbers, so that a label could be meant as a name or as its place; {fix}")
        return [part.astype(np.int32) for part in labels], shown
    classes = np.unique(labels[0])
    if len({part.dtype.kind == "U" for part in labels}) > 1:
        raise UserError(f"{where}: the labels of one part are numbers, and those of the other are texts; give both the same")
    for part in labels[1:]:
        if (strange := np.setdiff1d(part, classes)).size:
            raise UserError(f"{where}: class {printable(str(strange[0]))} of the test images has no image to train on; give it some")
    if len(classes) < 2:
        raise UserError(f"{where}: has one class, so that there is nothing to learn; give two classes or more")
    numbered = [np.searchsorted(classes, part).astype(np.int32) for part in labels]
    return numbered, tuple(map(str, classes.tolist()))


def numbers_of(given: Any, names: tuple[str, ...], where: str) -> np.ndarray:
    """Labels as numbers from 0, int32 [n]. Raises `UserError` if they are none of the classes.

    Texts are names of classes. Numbers are the classes' numbers from 0, unless the classes themselves are named by other numbers.
    """
    labels = _labels(given, where)
    if labels.dtype.kind in "iu" and not _says_places(given, len(names)) and _are_other_numbers(names):
        labels = labels.astype(str)
    if labels.dtype.kind == "U":
        if strange := sorted(set(labels.tolist()) - set(names)):
            raise UserError(f"{where}: {printable(strange[0])!r} is no class; the classes are {printable(', '.join(names), 200)}")
        return np.array([names.index(label) for label in labels.tolist()], np.int32)
    if labels.size and (labels.min() < 0 or labels.max() >= len(names)):
        raise UserError(f"{where}: from {labels.min()} to {labels.max()}; give numbers from 0 to {len(names) - 1}, or names of classes")
    return labels.astype(np.int32)


def _says_places(labels: Any, classes: int) -> bool:
    """Whether labels are one-hot with a column for each class, so that they are places and no names."""
    return np.ndim(labels) == 2 and np.shape(labels)[1] == classes


def _are_other_numbers(names: Sequence[str]) -> bool:
    """Whether all names are whole numbers, and not those from 0 in order."""
    return all(re.fullmatch("-?[0-9]+", name) for name in names) and list(names) != [str(i) for i in range(len(names))]


def by_name(given: Mapping[str, Any] | Sequence[Any]) -> Mapping[str, Any]:
    """Arrays by their names; those of a sequence by their number. Raises `UserError` if there are neither two nor four."""
    if isinstance(given, Mapping):
        return given
    kinds: dict[int, tuple[str, ...]] = {2: ("images", "labels"), 4: ("x_train", "y_train", "x_test", "y_test")}
    if not isinstance(given, (tuple, list)):
        raise UserError(f"data: of type {type(given).__name__}; give {NAMES}, as a dictionary or a tuple")
    if len(given) not in kinds:
        raise UserError(f"data: a sequence of {len(given)}; give images and labels, or those of training and then those of test")
    return dict(zip(kinds[len(given)], given, strict=True))


def hold(given: Mapping[str, Any] | Sequence[Any]) -> dict[str, str]:
    """Keeps a copy of a set as long as this process lives. Returns the configuration keys that name it.

    Args:
        given: as `from_mapping` takes it; or a sequence of two arrays, images and labels, or of four: those of training and of test.

    Raises:
        UserError: as `from_mapping`.
    """
    own = from_mapping(by_name(given), "data")
    own = own._replace(all=Split(np.array(own.all.images), own.all.labels))  # the caller may change the own array later
    digest = hashlib.sha256(repr((own.classes, own.train, own.all.images.shape)).encode())
    for array in (own.all.images, own.all.labels):
        digest.update(np.ascontiguousarray(array).data)
    name = f"memory-{digest.hexdigest()[:16]}"
    _held[name] = own
    return {"dataset": "in_memory", "data_dir": name}


def _own(config: Config) -> own_sets.Own:
    if config.data_dir not in _held:
        fix = "use the run from Python and give them as data=..., to vffjax.train or vffjax.evaluate"
        raise bad_key("data_dir", config.data_dir, "these images were in the memory of another Python process", fix)
    return _held[config.data_dir]


SOURCE = own_sets.source(_own, resizes=False)
