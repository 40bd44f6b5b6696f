"""Image sets as arrays in host memory, split into training, validation and test images."""

import dataclasses
import hashlib
import os
import pathlib
from typing import NamedTuple

import numpy as np

from vffjax.config import DATASETS, Config
from vffjax.data import tfds_files
from vffjax.errors import bad_key

TFDS_NAMES = ("mnist", "fashion_mnist", "cifar10", "cifar100")
SPLIT_STREAM = 0x5EED  # keeps the split apart from the other uses of the seed


class Sizes(NamedTuple):
    """What there is to know of a set without reading it."""

    train_images: int  # validation images included
    image_shape: tuple[int, int, int]  # height, width, channels
    classes: int


SIZES = {
    "digits": Sizes(1_437, (8, 8, 1), 10),
    "synthetic": Sizes(2_000, (16, 16, 3), 10),
    "mnist": Sizes(60_000, (28, 28, 1), 10),
    "fashion_mnist": Sizes(60_000, (28, 28, 1), 10),
    "cifar10": Sizes(50_000, (32, 32, 3), 10),
    "cifar100": Sizes(50_000, (32, 32, 3), 100),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """Images uint8 [n, h, w, c], where c is 1 or 3, and labels int32 [n]."""

    images: np.ndarray
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
            digest.update(np.ascontiguousarray(split.images).data)
            digest.update(np.ascontiguousarray(split.labels).astype("<i4").data)
        return digest.hexdigest()


def load(config: Config) -> Dataset:
    """Loads config.dataset and cuts the validation images from its training images, by config.seed; the test images are fixed.

    A set of tensorflow-datasets that is not prepared is downloaded and prepared first. Raises `UserError` if the data cannot be
    had or is damaged, or if config.train_examples or config.val_fraction does not fit it.
    """
    if config.dataset == "digits":
        train, test, names = _digits()
    elif config.dataset == "synthetic":
        train, test, names = _synthetic()
    elif config.dataset in TFDS_NAMES:
        train, test, names = _tfds(config)
    else:
        raise bad_key("dataset", config.dataset, "not known", f"choose one of {', '.join(DATASETS)}")
    train, validation = _cut(train, config)
    mean, std = _moments(train.images)
    return Dataset(config.dataset, train, validation, test, names, mean, std)


def prepare(name: str, data_dir: str) -> pathlib.Path:
    """Downloads a set and prepares it as array_record; returns its folder DATA_DIR/NAME/VERSION.

    An empty `data_dir` means $TFDS_DATA_DIR, else ~/tensorflow_datasets. A set that is there already, in any version or format, is
    left as it is. TensorFlow is not needed. Archives in DATA_DIR/downloads/manual are used instead of a download. Raises
    `UserError`, and leaves no half-made folder, if the set is not one of `TFDS_NAMES` or cannot be downloaded or written.
    """
    if name not in TFDS_NAMES:
        known = name in DATASETS
        raise bad_key("dataset", name, "needs no preparation" if known else "not known", f"prepare one of {', '.join(TFDS_NAMES)}")
    return tfds_files.prepare(name, tfds_files.data_root(data_dir))


def _digits() -> tuple[Split, Split, tuple[str, ...]]:
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        problem = f"scikit-learn is not installed ({tfds_files.one_line(error)})"
        raise bad_key("dataset", "digits", problem, "pip install scikit-learn") from None
    pixels, labels = load_digits(return_X_y=True)
    images = np.rint(pixels.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    train, test = train_test_split(np.arange(len(labels)), test_size=360, stratify=labels, random_state=0)
    both = Split(images, labels.astype(np.int32))
    return _take(both, np.asarray(train)), _take(both, np.asarray(test)), tuple(map(str, range(10)))


def _synthetic() -> tuple[Split, Split, tuple[str, ...]]:
    """Ten smooth colour patterns; each image has its own shift, contrast, smooth disturbance and pixel noise.

    A linear classifier makes 9 % errors on the test images.
    """
    rng = np.random.default_rng(1616)
    classes, side, cells, sizes = 10, 16, 4, (2_000, 500)
    distance = np.abs((np.arange(side) + 0.5)[:, None] * cells / side - 0.5 - np.arange(cells))
    weight = np.maximum(0, 1 - np.minimum(distance, cells - distance))  # bilinear, and periodic so that a shift has no edge

    def smooth(n: int) -> np.ndarray:
        return np.einsum("ia,jb,nabc->nijc", weight, weight, rng.normal(size=(n, cells, cells, 3)))

    patterns, n = smooth(classes), sum(sizes)
    labels = np.concatenate([rng.permutation(np.arange(size) % classes) for size in sizes]).astype(np.int32)
    rows, columns = ((np.arange(side) + rng.integers(-2, 3, (n, 1))) % side for _ in range(2))
    pixels = patterns[labels[:, None, None], rows[:, :, None], columns[:, None, :]] * rng.uniform(0.5, 1.5, (n, 1, 1, 1))
    pixels += smooth(n) + rng.normal(size=pixels.shape)
    images = np.clip(np.rint(128 + 40 * pixels), 0, 255).astype(np.uint8)
    parts = np.split(np.arange(n), [sizes[0]])
    return _take(Split(images, labels), parts[0]), _take(Split(images, labels), parts[1]), tuple(f"pattern{k}" for k in range(classes))


def _tfds(config: Config) -> tuple[Split, Split, tuple[str, ...]]:
    root = tfds_files.data_root(config.data_dir)
    if config.data_dir and not os.path.isdir(root):
        # Not made on the fly: the download of a whole set into a misspelt folder is not what anyone wants.
        raise bad_key("data_dir", config.data_dir, "no such folder", "create it, or give the folder that holds the prepared sets")
    folder = tfds_files.find(config.dataset, root) or tfds_files.prepare(config.dataset, root)
    splits, names = tfds_files.read(config.dataset, folder)
    return Split(*splits["train"]), Split(*splits["test"]), names


def _take(split: Split, index: np.ndarray) -> Split:
    return Split(split.images[index], split.labels[index])


def split_sizes(config: Config, images: int) -> tuple[int, int]:
    """Training and validation images that are made of a set's training `images`. Raises `UserError` if they are too few."""
    if config.train_examples > images:
        fix = f"use at most {images}, or 0 for all"
        raise bad_key("train_examples", config.train_examples, f"{config.dataset} has {images} training images", fix)
    kept = config.train_examples or images
    held_out = round(config.val_fraction * kept)
    if config.val_fraction > 0 and held_out == 0:
        raise bad_key("val_fraction", config.val_fraction, f"no validation image out of {kept}", "raise it, or use 0 for none")
    if held_out >= kept:
        raise bad_key("val_fraction", config.val_fraction, f"leaves no training image out of {kept}", "lower it")
    return kept - held_out, held_out


def _cut(split: Split, config: Config) -> tuple[Split, Split]:
    """Training and validation images: the seed's permutation, cut to config.train_examples, validation first."""
    kept, held_out = split_sizes(config, len(split))
    order = np.random.default_rng([config.seed, SPLIT_STREAM]).permutation(len(split))[: kept + held_out]
    return _take(split, order[held_out:]), _take(split, order[:held_out])


def _moments(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    # In whole numbers and so exact; in pieces, to hold no copy of a large set.
    channels = images.shape[3]
    total, squares = np.zeros(channels, np.int64), np.zeros(channels, np.int64)
    for start in range(0, len(images), 4096):
        pixels = images[start : start + 4096].reshape(-1, channels).astype(np.int64)
        total += pixels.sum(axis=0)
        squares += (pixels * pixels).sum(axis=0)
    count = images.size // channels
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0.0))
    return tuple((mean / 255).tolist()), tuple(np.maximum(std / 255, 1e-3).tolist())
