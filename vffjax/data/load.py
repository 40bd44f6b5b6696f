"""Image sets as arrays in host memory, split into training, validation and test images."""

import math
import pathlib

import numpy as np

from vffjax.config import Config
from vffjax.data import find, find_source
from vffjax.data.on_disk import OnDisk, Pixels
from vffjax.data.sets import Dataset, Sizes, Split, in_pieces, take
from vffjax.errors import bad_key
from vffjax.registry import SOURCES

SPLIT_STREAM, WRONG_STREAM = 0x5EED, 0xBAD  # keep the split and the wrong labels apart from the other uses of the seed


def load(config: Config) -> Dataset:
    """Loads config.dataset and cuts the validation images from its training images, by config.seed; the test images are fixed.

    A set of tensorflow-datasets that is not prepared is downloaded and prepared first. Raises `UserError` if the data cannot be
    had or is damaged, or if config.train_examples or config.val_fraction does not fit it.
    """
    source = find(config)
    if config.data_dir and not source.reads_data_dir:
        unread = f"means nothing to dataset={config.dataset}, which reads no folder"
        raise bad_key("data_dir", config.data_dir, unread, "leave it out, or name another dataset")
    train, test, names = source.read(config)
    sizes = Sizes(len(train), train.images.shape[1:], len(names)) if callable(source.sizes) else source.sizes
    for split, about in ((train, "training"), (test, "test")):
        if problem := _problem(split, sizes) or (len(names) != sizes.classes and f"{len(names)} names of classes"):
            expected = f"uint8 images of {sizes.image_shape}, int32 labels and names of {sizes.classes} classes"
            raise bad_key("dataset", config.dataset, f"its {about} data have {problem}", f"return {expected}")
    if config.data_on == "disk" and not isinstance(train.images, OnDisk):
        raise bad_key("data_on", "disk", f"the images of {config.dataset} are in no file that can be read in pieces", "use host")
    train, validation = _cut(train, config, source.validation_by_class)
    train = _with_wrong_labels(train, config, len(names))
    mean, std = _moments(train.images)
    return Dataset(config.dataset, train, validation, test, tuple(names), mean, std)


def _problem(split: Split, sizes: Sizes) -> str:
    """In what a split is not as its source has announced it; empty if it is."""
    images, labels = split.images, split.labels
    if images.dtype != np.uint8 or images.shape != (len(images), *sizes.image_shape):
        return f"{images.dtype} images {images.shape}"
    if labels.dtype != np.int32 or labels.shape != images.shape[:1]:
        return f"{labels.dtype} labels {labels.shape} of {len(images)} images"
    outside = labels.size and (labels.min() < 0 or labels.max() >= sizes.classes)
    return f"labels from {labels.min()} to {labels.max()}" if outside else "" if len(labels) else "no images"


def prepare(name: str, data_dir: str) -> pathlib.Path:
    """Brings a set to this machine, if its source can, and returns its folder.

    A set of tensorflow-datasets is downloaded and prepared as array_record, in DATA_DIR/NAME/VERSION, unless it is there already in any
    version or format. An empty `data_dir` means $TFDS_DATA_DIR, else ~/tensorflow_datasets. Archives in DATA_DIR/downloads/manual are used
    instead of a download. MNIST, Fashion-MNIST and CIFAR are prepared without TensorFlow; others may need it.

    Raises `UserError`, and leaves no half-made folder, if the set needs no preparation or cannot be downloaded or written.
    """
    source = find_source(name) if ":" in name or name in SOURCES.names else None
    if source is None or source.prepare is None:
        problem = "not known" if source is None else "needs no preparation"
        can = [known for known in SOURCES.names if find_source(known).prepare] + [f"{family}:NAME" for family in SOURCES.families]
        raise bad_key("dataset", name, problem, f"prepare one of {', '.join(can)}")
    return source.prepare(data_dir)


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
    if config.wrong_labels > 0 and round(config.wrong_labels * (kept - held_out)) == 0:
        raise bad_key("wrong_labels", config.wrong_labels, f"no image out of {kept - held_out}", "raise it, or use 0 for none")
    return kept - held_out, held_out


def _cut(split: Split, config: Config, by_class: bool) -> tuple[Split, Split]:
    """Training and validation images: the seed's permutation, cut to config.train_examples, of which the first images are for validation.

    With `by_class` these are the first of each class.
    """
    kept, held_out = split_sizes(config, len(split))
    order = np.random.default_rng([config.seed, SPLIT_STREAM]).permutation(len(split))[: kept + held_out]
    if by_class and held_out:
        labels = split.labels[order]
        for_validation = np.zeros(len(order), bool)
        for label, share in enumerate(_shares(np.bincount(labels), held_out, config)):
            for_validation[np.flatnonzero(labels == label)[:share]] = True
        order = np.concatenate([order[for_validation], order[~for_validation]])
    return take(split, order[held_out:]), take(split, order[:held_out])


def _shares(images: np.ndarray, held_out: int, config: Config) -> np.ndarray:
    """How many of the `images` of each class are for validation: as near to its share of `held_out` as whole numbers allow (the method of
    largest remainders), and never all of a class. Raises `UserError` if the classes are too small for that.
    """
    exact = held_out * images / images.sum()
    shares = np.floor(exact).astype(int)
    while shares.sum() < held_out:
        behind = np.where(shares < images - 1, exact - shares, -np.inf)
        if not np.isfinite(behind).any():
            raise bad_key("val_fraction", config.val_fraction, "the classes are too small for so many validation images", "lower it")
        shares[behind.argmax()] += 1
    return shares


def _with_wrong_labels(split: Split, config: Config, classes: int) -> Split:
    """The split, of which a share of the images has a label of another class. Images and labels are drawn uniformly, by the seed."""
    count = round(config.wrong_labels * len(split))
    if not count:
        return split
    if classes < 2:
        raise bad_key("wrong_labels", config.wrong_labels, f"{config.dataset} has one class", "use 0")
    rng = np.random.default_rng([config.seed, WRONG_STREAM])
    chosen = rng.permutation(len(split))[:count]
    labels = split.labels.copy()
    labels[chosen] = (labels[chosen] + rng.integers(1, classes, count)) % classes
    return Split(split.images, labels)


def _moments(images: Pixels) -> tuple[tuple[float, ...], tuple[float, ...]]:
    # In whole numbers and so exact; in pieces, to hold no copy of a large set; over rows of pixels, because NumPy adds long rows fast.
    _, _, width, channels = images.shape
    total, squares = np.zeros(channels, np.int64), np.zeros(channels, np.int64)
    for piece in in_pieces(images):
        rows = piece.reshape(-1, width * channels)
        total += rows.sum(axis=0, dtype=np.int64).reshape(width, channels).sum(axis=0)
        squares += np.square(rows, dtype=np.uint16).sum(axis=0, dtype=np.int64).reshape(width, channels).sum(axis=0)
    count = math.prod(images.shape[:3])
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0.0))
    return tuple((mean / 255).tolist()), tuple(np.maximum(std / 255, 1e-3).tolist())
