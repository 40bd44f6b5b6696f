"""What a set of images is: its sizes, its splits, and a set as one run uses it."""

import dataclasses
import hashlib
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from vffjax.config import Config
from vffjax.data.on_disk import OnDisk, Pixels

_PIECE_BYTES = 2**23


class Sizes(NamedTuple):
    """The sizes of a set, from which networks are built and checked. Of a set that somebody brings they are known once it is read."""

    train_images: int  # validation images included
    image_shape: tuple[int, int, int]  # height, width, channels
    classes: int


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """Images uint8 [n, h, w, c], where c is 1 or 3, and labels int32 [n]."""

    images: Pixels
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A set as one run uses it. `validation` has no images if config.val_fraction is 0.

    `mean` and `std` are per channel, of the pixels of `train`, on the scale where 255 is 1; `std` is at least 1e-3.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width, channels."""
        _, height, width, channels = self.train.images.shape
        return height, width, channels

    def sha256(self) -> str:
        """Of all images, labels and class names: runs of one configuration with the same digest have seen the same."""
        digest = hashlib.sha256(repr((self.class_names, self.image_shape)).encode())
        for split in (self.train, self.validation, self.test):
            digest.update(len(split).to_bytes(8, "little"))
            for piece in in_pieces(split.images):
                digest.update(np.ascontiguousarray(piece).data)
            digest.update(np.ascontiguousarray(split.labels).astype("<i4").data)
        return digest.hexdigest()


def take(split: Split, index: np.ndarray) -> Split:
    """The images with these numbers. Those on disk are not read."""
    images = split.images
    return Split(images.only(index) if isinstance(images, OnDisk) else images[index], split.labels[index])


def joined(parts: Sequence[Split]) -> Split:
    """The images of several splits of one set, one after the other. Those on disk are not read."""
    images, labels = [part.images for part in parts], np.concatenate([part.labels for part in parts])
    on_disk = [some for some in images if isinstance(some, OnDisk)]
    return Split(OnDisk.joined(on_disk) if on_disk else np.concatenate([np.asarray(some) for some in images]), labels)


def in_pieces(images: Pixels) -> Iterator[UInt8[np.ndarray, "n h w c"]]:
    """The images one after the other, a few megabytes at a time."""
    length = max(1, _PIECE_BYTES // max(1, math.prod(images.shape[1:])))
    for start in range(0, len(images), length):
        yield images[start : start + length]


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the images of a set come from.

    Attributes:
        sizes: what there is to know of the set without reading it; or, where the sizes follow from the data, a function that finds them.
        read: the training images (validation images among them), the test images, and the names of the classes. Raises `UserError` if the
            data cannot be had or are damaged.
        prepare: brings the set to this machine, under a data directory ('' for the usual one), and returns its folder; None: there is
            nothing to bring.
        resizes: whether config.image_size, where it is set, is the size to which the source itself brings its images. Otherwise the
            network's first layer resizes them.
        by_data_dir: whether config.data_dir says which images these are, and not only where they lie.
        validation_by_class: whether each class gives its share of the validation images, which matters where classes are small or of
            unequal size. Otherwise these images are drawn from all classes together.
        has_test: whether a set has a test part of its own. If not, `read` draws test images by the seed.
        reads_data_dir: whether config.data_dir says anything to the source.
    """

    sizes: Sizes | Callable[[Config], Sizes]
    read: Callable[[Config], tuple[Split, Split, tuple[str, ...]]]
    prepare: Callable[[str], pathlib.Path] | None = None
    resizes: bool = False
    by_data_dir: bool = False
    validation_by_class: bool = False
    has_test: Callable[[Config], bool] = lambda config: True
    reads_data_dir: bool = True
