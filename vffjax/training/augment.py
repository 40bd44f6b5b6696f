"""Augmentation on the device, inside the training step: mirror images, padded crops, normalisation, cutout."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped, UInt8

from vffjax.config import Config
from vffjax.rules.streams import Task
from vffjax.training.batch import Batch

# Of the red, green and blue channel, where 255 is 1. torchvision's weights and most of timm's were trained with these.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalise(images: UInt8[Array, "batch h w c"], mean: Float[Array, " c"], std: Float[Array, " c"]) -> Float[Array, "batch h w c"]:
    """Bytes as float32 numbers, of which the mean of each channel is subtracted, and which are divided by its standard deviation.

    `mean` and `std` are on the scale where 255 is 1.
    """
    scale, shift = (1 / (255 * std)).reshape(1, 1, 1, -1), (mean / std).reshape(1, 1, 1, -1)
    return images.astype(jnp.float32) * scale - shift


def augment(
    key: PRNGKeyArray, images: Shaped[Array, "batch h w c"], ids: Int[Array, " batch"], epoch: Int[Array, ""], config: Config
) -> Shaped[Array, "batch h w c"]:
    """Mirrors and shifts images, each by its own random draw.

    It works on bytes, which are a quarter of the data, and in which black padding is 0.

    Args:
        key: for the draws.
        images: of a batch.
        ids: their numbers in the training set.
        epoch: its number; with config.alternating_flip, it and `ids` decide which images are mirrored.
        config: flip, alternating_flip and crop_padding.
    """
    flip_key, crop_key = (jax.random.fold_in(key, i) for i in range(2))
    if config.flip:
        mirrored = mirrored_in(ids, epoch) if config.alternating_flip else jax.random.bernoulli(flip_key, 0.5, ids.shape)
        images = jnp.where(mirrored.reshape(-1, 1, 1, 1), images[:, :, ::-1], images)
    return _crop(crop_key, images, config.crop_padding) if config.crop_padding else images


def mirrored_in(ids: Int[Array, " batch"], epoch: Int[Array, ""]) -> Bool[Array, " batch"]:
    """Whether each image is mirrored in an epoch: every other epoch, one half of the images in even and the other in odd epochs.

    The method is alternating flip (K. Jordan, 2024, arXiv:2404.00498). A bit of the image's number, mixed by the 32-bit finaliser of
    MurmurHash3 (A. Appleby, 2011), decides in which half an image is.
    """
    bits = ids.astype(jnp.uint32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> jnp.uint32(shift))) * jnp.uint32(factor)
    return ((bits >> jnp.uint32(16)) + epoch.astype(jnp.uint32)) % jnp.uint32(2) == 1


def cut_out(key: PRNGKeyArray, images: Shaped[Array, "batch h w c"], side: int) -> Shaped[Array, "batch h w c"]:
    """Sets one random square of `side` pixels in each normalised image to 0, which is the mean (cutout: DeVries and Taylor, 2017).

    The square may lie partly outside of the image.
    """
    if side == 0:
        return images
    n, h, w, _ = images.shape
    sides = jnp.array([h, w], jnp.float32).reshape(2, 1, 1, 1, 1)
    centre = jax.random.uniform(jax.random.fold_in(key, 2), (2, n, 1, 1, 1), jnp.float32) * sides
    rows = jnp.arange(h, dtype=jnp.float32).reshape(1, h, 1, 1) + 0.5
    columns = jnp.arange(w, dtype=jnp.float32).reshape(1, 1, w, 1) + 0.5
    inside = (jnp.abs(rows - centre[0]) < side / 2) & (jnp.abs(columns - centre[1]) < side / 2)
    return jnp.where(inside, 0.0, images)


def _crop(key: PRNGKeyArray, images: Array, padding: int) -> Array:
    n, h, w, c = images.shape
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    starts = jax.random.randint(key, (n, 2), 0, 2 * padding + 1)
    return jax.vmap(lambda image, start: jax.lax.dynamic_slice(image, (start[0], start[1], 0), (h, w, c)))(padded, starts)


def augmented(config: Config, task: Task, batch: Batch) -> Float[Array, "batch h w c"]:
    """The images of a batch as the first group gets them in training: flipped, cropped, normalised and cut out."""
    key = jax.random.fold_in(batch.key, 0)
    return cut_out(key, normalised(task, augment(key, batch.images, batch.ids, batch.epoch, config)), config.cutout)


def normalised(task: Task, images: UInt8[Array, "batch h w c"]) -> Float[Array, "batch h w c"]:
    """Images normalised by the pixel statistics of the run, as the first group gets them."""
    return normalise(images, task.mean, task.std)
