"""What sets that people bring have in common: a test part by the seed where there is none, and what is told of such a set."""

import hashlib
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from vffjax.config import Config
from vffjax.data.on_disk import OnDisk
from vffjax.data.sets import Sizes, Source, Split, in_pieces, take
from vffjax.errors import UserError, bad_key, notice, printable

TEST_STREAM = 0x7E57  # keeps the drawing of test images apart from the other uses of the seed
_told: set[str] = set()


class Own(NamedTuple):
    """A set as it was brought."""

    all: Split
    classes: tuple[str, ...]
    train: int | None  # the first images, so many, are those of training, and the rest is the test set; None: there are no parts
    names: Sequence[str] = ()  # of the images, for messages, where they have any


def tell(text: str) -> None:
    """Prints a line on stderr, once in a process."""
    if text not in _told:
        _told.add(text)
        notice(text)


def no_such(kind: str, path: pathlib.Path) -> str:
    """Says that there is no such file or folder. A run keeps a relative path as it was given, so of such a path it says where it leads."""
    if path.is_absolute():
        return f"no such {kind}"
    return f"no such {kind} ({os.path.abspath(path)}; for a run that was trained elsewhere, --data_dir says where it is)"


def source(
    own: Callable[[Config], Own],
    prepare: Callable[[str], pathlib.Path] | None = None,
    resizes: bool = True,
    by_data_dir: bool = True,
) -> Source:
    """The record of a source that finds its sets by `own`; the other arguments are those of `Source`."""
    sizes, parts = (lambda config: _sizes(config, own(config))), (lambda config: _parts(config, own(config)))
    return Source(sizes, parts, prepare, resizes, by_data_dir, True, has_test=lambda config: own(config).train is not None)


def _sizes(config: Config, own: Own) -> Sizes:
    """The sizes of a set."""
    train, _ = _numbers(config, own)
    _, height, width, channels = own.all.images.shape
    return Sizes(len(train), (height, width, channels), len(own.classes))


def _parts(config: Config, own: Own) -> tuple[Split, Split, tuple[str, ...]]:
    """Training and test images, and the names of the classes.

    Without a test part, config.test_fraction of each class, at least one image, is drawn by the seed. A line on stderr says if an image is
    in both parts.
    """
    train, test = _numbers(config, own)
    _tell_common(config, own, train, test)
    images = own.all.images
    if config.data_on == "disk" and isinstance(images, np.memmap):
        split = Split(OnDisk(images, np.arange(len(images))), own.all.labels)
        return take(split, train), take(split, test), own.classes
    return _taken(own.all, train), _taken(own.all, test), own.classes


def _numbers(config: Config, own: Own) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of the images of training and of the test set. Raises `UserError` if one is empty or lacks a class."""
    labels, count = own.all.labels, len(own.all)
    if own.train is not None:
        train, test = np.arange(own.train), np.arange(own.train, count)
    else:
        rng, test = np.random.default_rng([config.seed, TEST_STREAM]), np.array([], np.int64)
        for label in range(len(own.classes)):
            of_class = rng.permutation(np.flatnonzero(labels == label))
            share = max(1, round(config.test_fraction * len(of_class)))
            test = np.append(test, of_class[: min(share, max(1, len(of_class) - 1))])  # one image of each class at least is to train on
        test = np.sort(test)
        train = np.setdiff1d(np.arange(count), test)
    for label, name in enumerate(own.classes):
        if label not in labels[train]:
            problem = f"no image of class {printable(name)} to train on that can be read"
            if own.train is None and label in labels:
                problem = f"class {printable(name)} has one image that can be read, which is a test image, and so none to train on"
            fix = "give each class more images" if own.train is None else "give it some"
            raise _bad(config, problem, fix)
    if not len(test):
        raise _bad(config, "the test part has no image that can be read", "put some there, or remove it")
    return train, test


def _bad(config: Config, problem: str, fix: str) -> UserError:
    """The error for a set, by what the user gave: arrays, config.data_dir, or else config.dataset."""
    if config.dataset == "in_memory":
        return UserError(f"data: {problem}; {fix}")
    key = "data_dir" if config.data_dir else "dataset"
    return bad_key(key, getattr(config, key), problem, fix)


def _taken(split: Split, numbers: np.ndarray) -> Split:
    """These images of a split; a part of it in one piece is not copied, because it may be mapped from a file."""
    if len(numbers) and numbers[-1] - numbers[0] == len(numbers) - 1:
        piece = slice(numbers[0], numbers[-1] + 1)
        return Split(split.images[piece], split.labels[piece])
    return take(split, numbers)


def _tell_common(config: Config, own: Own, train: np.ndarray, test: np.ndarray) -> None:
    every = (image for piece in in_pieces(own.all.images) for image in piece)
    digest = [hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16).digest() for image in every]
    first = {digest[i]: i for i in reversed(train.tolist())}
    common = [(first[digest[i]], i) for i in test.tolist() if digest[i] in first]
    if common:
        shown = [printable(own.names[i], 200) if own.names else f"image {i}" for i in common[0]]
        where = config.data_dir or config.dataset
        tell(f"{where}: {len(common)} test images are also among the training images, such as {shown[1]}, which is {shown[0]}")
