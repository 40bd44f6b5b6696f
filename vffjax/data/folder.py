"""Your own pictures in folders: DATA_DIR/train/CLASS/* and DATA_DIR/test/CLASS/*, or DATA_DIR/CLASS/* alone."""

import hashlib
import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vffjax import paths
from vffjax.config import Config
from vffjax.data import own_sets
from vffjax.data.decoding import Encoded, decode
from vffjax.data.pictures import KINDS, MAX_BYTES, SUFFIXES
from vffjax.data.sets import Split
from vffjax.errors import bad_key, printable
from vffjax.files import read_bytes

TRAIN = "train"
TESTS = ("test", "val", "valid", "validation")  # the folder of test images; the first that is there


_LIKE_PARTS = ("train", "training", "test", "testing", *TESTS)


class Listing(NamedTuple):
    """The files of a folder, those of training first."""

    root: pathlib.Path
    files: list[str]  # relative to the root
    labels: np.ndarray  # int32 [files]
    classes: tuple[str, ...]
    train: int | None  # how many are training images; None: the folder has no parts


def listed(config: Config) -> Listing:
    """Lists the pictures below config.data_dir, without opening them.

    Classes are folders; their names in alphabetical order are the classes. Pictures may lie deeper in the folder of their class. Names
    that begin with a dot are passed over, and so, with a line on stderr, are files that are no pictures by their names.

    Raises:
        UserError: there is no such folder, or it has not at least two classes with pictures in each.
    """
    if not config.data_dir:
        raise bad_key("data_dir", "", "dataset=folder needs the folder of your images", "give it: --config.data_dir=DIR")
    root = paths.local(config.data_dir, "config.data_dir")
    if not os.path.isdir(root):
        problem = "a file, not a folder" if os.path.exists(root) else own_sets.no_such("folder", root)
        raise bad_key("data_dir", config.data_dir, problem, "give the folder that holds a folder for each class, or train and test")
    inner = _folders(root)
    split = TRAIN in inner
    tests = [name for name in TESTS if split and name in inner]
    if split and not tests and (meant := [name for name in inner if name.lower() in _LIKE_PARTS and name != TRAIN]):
        problem = f"{printable(meant[0])}/ beside {TRAIN}/ is a part of a set by its name"
        raise bad_key("data_dir", config.data_dir, problem, f"rename it to {TESTS[0]}, or move it elsewhere")
    parts = [TRAIN, *tests[:1]] if split else [""]
    classes = _folders(root / parts[0])
    if tests and not _folders(root / tests[0]):
        what = "holds pictures that are in no folder of a class" if os.listdir(root / tests[0]) else "is empty"
        then = f"{tests[1]}/ holds the test images" if tests[1:] else f"test images are cut from {TRAIN}/"
        fix = f"move it elsewhere, and {then}; vffjax predict classifies pictures without classes"
        raise bad_key("data_dir", config.data_dir, f"{tests[0]}/ {what}", fix)
    if not split and inner and all(name.lower() in _LIKE_PARTS and _folders(root / name) for name in inner):
        problem = f"{printable(inner[0])} is a part of a set by its name, not a class"
        raise bad_key("data_dir", config.data_dir, problem, f"rename the folders of the parts to {TRAIN} and {TESTS[0]}")
    if len(classes) < 2:
        raise bad_key("data_dir", config.data_dir, *_too_few(root / parts[0], classes))
    files, labels, others, counts = list[str](), list[int](), list[str](), list[int]()
    for part in parts:
        if strange := [name for name in _folders(root / part) if name not in classes]:
            problem = f"{part}/{printable(strange[0])} is no class of {TRAIN}/"
            raise bad_key("data_dir", config.data_dir, problem, "give every class images to train on, or remove the folder")
        before = len(files)
        for label, name in enumerate(classes):
            found = _files(root, os.path.join(part, name), others)
            if not found and part == parts[0]:
                here = [other for other in others if other.startswith(os.path.join(part, name) + os.sep)]
                also = f" ({len(here)} others, such as {printable(here[0], 200)})" if here else ""
                problem = f"{os.path.join(part, printable(name))}/ holds no {KINDS} file{also}"
                raise bad_key("data_dir", config.data_dir, problem, f"{'convert them' if here else 'put some there'}, or remove the folder")
            files += found
            labels += [label] * len(found)
        counts.append(len(files) - before)
    _tell(root, tests, [name for name in inner if split and name not in (TRAIN, *TESTS)], others)
    return Listing(root, files, np.array(labels, np.int32), tuple(classes), counts[0] if len(counts) > 1 else None)


def _tell(root: pathlib.Path, tests: Sequence[str], beside: Sequence[str], others: Sequence[str]) -> None:
    """Says on stderr, once in a process, what of a folder is used in a way that may surprise, and what is passed over.

    Args:
        root: the folder.
        tests: the folders of test images in it, of which the first is used; none if the folder has no parts.
        beside: its other folders that stand beside its parts.
        others: the files that are no pictures by their names.
    """
    if tests and tests[0] != TESTS[0]:
        own_sets.tell(f"{root}: there is no folder {TESTS[0]}, so {tests[0]} holds the test images")
    for name in tests[1:]:
        fix = f"validation images are cut from {TRAIN}; to use these, move them there"
        own_sets.tell(f"{root}: {name} is passed over, because {tests[0]} holds the test images; {fix}")
    if beside:
        shown = f"{len(beside)} folders beside {TRAIN}/ are passed over, such as {printable(beside[0], 200)}"
        own_sets.tell(f"{root}: {shown}; to use their pictures, move them into a class of {TRAIN}/")
    if others:
        known = ", ".join(sorted(SUFFIXES))
        own_sets.tell(f"{root}: {len(others)} files are passed over whose names do not end in {known}, such as {others[0]}")


def _too_few(folder: pathlib.Path, classes: Sequence[str]) -> tuple[str, str]:
    """The problem and the fix for a folder that has not two folders in it."""
    if not classes:
        return f"{folder} holds no folders", "make a folder for each class and put its pictures there"
    inner = _folders(folder / classes[0])
    if len(inner) > 1:
        return f"{folder} holds one folder, {printable(classes[0])}", f"did you mean {folder / classes[0]}?"
    return f"one class, {printable(classes[0])}, so that there is nothing to learn", "make a folder for each class, of two or more"


def _folders(folder: pathlib.Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _files(root: pathlib.Path, below: str, others: list[str]) -> list[str]:
    """The pictures below a folder, relative to the root and in alphabetical order. Other files are added to `others`."""
    found: list[str] = []

    def tell(error: OSError) -> None:
        own_sets.tell(f"{error.filename}: {error.strerror}; its pictures are left out")

    for folder, inner, names in os.walk(root / below, onerror=tell):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        for name in sorted(name for name in names if not name.startswith(".")):
            path = os.path.relpath(os.path.join(folder, name), root)
            (found if name.lower().endswith(SUFFIXES) else others).append(path)
    return found


def _key(listing: Listing) -> str:
    """A digest of names, sizes and times of change of all files."""
    digest = hashlib.sha256()
    for file in listing.files:
        try:
            about = os.stat(listing.root / file)
        except OSError:  # such as a link to nowhere: `decode` leaves it out, and says so
            digest.update(repr((file, None)).encode())
            continue
        digest.update(repr((file, about.st_size, about.st_mtime_ns)).encode())
    return digest.hexdigest()


def _own(config: Config) -> own_sets.Own:
    """All images, decoded, with their labels and files' names."""
    listing = listed(config)
    key = f"{os.path.abspath(listing.root)} {_key(listing)}"
    content = lambda number: read_bytes(listing.root / listing.files[number], MAX_BYTES)  # noqa: E731
    names = [str(listing.root / file) for file in listing.files]
    images, kept = decode(Encoded(str(listing.root), names, content, key), config.image_size)
    train = None if listing.train is None else int(np.searchsorted(kept, listing.train))
    return own_sets.Own(Split(images, listing.labels[kept]), listing.classes, train, [listing.files[i] for i in kept])


SOURCE = own_sets.source(_own)
