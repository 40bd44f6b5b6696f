"""Sets of tensorflow-datasets, downloaded and prepared if they are not there.

`tfds:NAME` is any of its sets for image classification. A set that is prepared already is read without TensorFlow. To prepare one, it may
be needed; MNIST, Fashion-MNIST, CIFAR-10 and CIFAR-100 are prepared without it.
"""

import functools
import os
import pathlib
import re
from collections.abc import Iterator

import numpy as np

from vffjax.config import Config
from vffjax.data import own_sets, tfds_files, tfds_preparation
from vffjax.data.decoding import Encoded, decode
from vffjax.data.sets import Sizes, Source, Split
from vffjax.errors import bad_key


def tfds(name: str, sizes: Sizes) -> Source:
    """The set that tensorflow-datasets calls `name`, of which the sizes are known."""

    def read(config: Config) -> tuple[Split, Split, tuple[str, ...]]:
        folder = _folder(name, config)
        return _read(name, folder, *_files(folder))

    return Source(sizes, read, lambda data_dir: tfds_preparation.prepare(name, tfds_files.data_root(data_dir)))


def FAMILY(name: str) -> Source:
    """Any set for image classification of tensorflow-datasets, by its name there, such as `svhn_cropped` or `cifar10_corrupted/fog_1`.

    Without a split "test" the split "validation" is the test part, and without both config.test_fraction of each class.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*(/[\w.]+)?", name, re.ASCII):
        raise bad_key("dataset", f"tfds:{name}", "no name of a set of tensorflow-datasets", "give for example tfds:svhn_cropped")

    def own(config: Config) -> own_sets.Own:
        folder = _folder(name, config)
        parts, classes = tfds_files.read_encoded(name, folder)
        contents = [content for records in parts.values() for content in records.contents]
        names = [f"record {i} of {part} in {folder}" for part, records in parts.items() for i in range(len(records.contents))]
        key = repr(list(_files(folder)))
        images, kept = decode(Encoded(f"tfds:{name}", names, contents.__getitem__, f"{folder} {key}"), config.image_size)
        labels = np.concatenate([records.labels for records in parts.values()])
        train = int((kept < len(parts["train"].labels)).sum()) if "test" in parts else None
        return own_sets.Own(Split(images, labels[kept]), classes, train, [names[i] for i in kept])

    return own_sets.source(own, lambda data_dir: tfds_preparation.prepare(name, tfds_files.data_root(data_dir)), by_data_dir=False)


@functools.lru_cache(maxsize=1)
def _read(name: str, folder: pathlib.Path, *_: tuple[str, int, int]) -> tuple[Split, Split, tuple[str, ...]]:
    """The splits of a prepared folder. They are kept until another set is read, and cannot be written to.

    Decoding takes seconds, and the runs of a sweep read the same set. The largest set that comes here, CIFAR, takes 184 MB.
    """
    splits, names = tfds_files.read(name, folder)
    for part in ("train", "test"):
        for array in splits[part]:
            array.flags.writeable = False
    return Split(*splits["train"]), Split(*splits["test"]), names


def _files(folder: pathlib.Path) -> Iterator[tuple[str, int, int]]:
    """The name, size and time of each file of a folder, by which a change is noticed."""
    for path in sorted(folder.iterdir()):
        about = path.stat() if path.exists() else path.lstat()  # the reader says of a broken link which file is missing
        yield path.name, about.st_size, about.st_mtime_ns


def _folder(name: str, config: Config) -> pathlib.Path:
    """The folder of a prepared set; if there is none, it is prepared."""
    root = tfds_files.data_root(config.data_dir)
    if config.data_dir and not os.path.isdir(root):
        # Not made on the fly: the download of a whole set into a misspelt folder is not what anyone wants.
        raise bad_key("data_dir", config.data_dir, "no such folder", "create it, or give the folder that holds the prepared sets")
    return tfds_files.find(name, root) or tfds_preparation.prepare(name, root)
