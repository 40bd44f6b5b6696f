"""Augmentation on the device, inside the training step: operations on bytes, mirror images, crops, normalisation, gaps, mixtures."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped, UInt8

from vffjax.config import Config
from vffjax.rules.streams import Mixture, Task
from vffjax.training.batch import Batch
from vffjax.training.photo_augment import color_jitter, random_resized_crop
from vffjax.training.trivial_augment import trivial_augment

# Of the red, green and blue channel, where 255 is 1. torchvision's weights and most of timm's were trained with these.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# A step's key for augmentation is folded with one of these, so that no two draws share a key.
FLIP, CROP, CUTOUT, ERASING, TRIVIAL, MIXUP, RESIZED, COLOURS = range(8)
ERASED_SHARES, ERASED_ASPECTS = (0.02, 0.33), (0.3, 3.3)  # of an image's area; height divided by width


def normalise(images: UInt8[Array, "batch h w c"], mean: Float[Array, " c"], std: Float[Array, " c"]) -> Float[Array, "batch h w c"]:
    """Bytes as float32 numbers, of which the mean of each channel is subtracted, and which are divided by its standard deviation.

    `mean` and `std` are on the scale where 255 is 1.
    """
    scale, shift = (1 / (255 * std)).reshape(1, 1, 1, -1), (mean / std).reshape(1, 1, 1, -1)
    return images.astype(jnp.float32) * scale - shift


def augment(
    key: PRNGKeyArray, images: Shaped[Array, "batch h w c"], ids: Int[Array, " batch"], epoch: Int[Array, ""], config: Config
) -> Shaped[Array, "batch h w c"]:
    """Changes parts, colours and more of images, mirrors them and shifts them, each by its own random draws.

    It works on bytes, which are a quarter of the data, and in which black padding is 0.

    Args:
        key: for the draws.
        images: of a batch.
        ids: their numbers in the training set.
        epoch: its number; with config.alternating_flip, it and `ids` decide which images are mirrored.
        config: random_resized_crop, color_jitter, trivial_augment, flip, alternating_flip and crop_padding.
    """
    flip_key, crop_key, trivial_key, resized_key, colours_key = (
        jax.random.fold_in(key, i) for i in (FLIP, CROP, TRIVIAL, RESIZED, COLOURS)
    )
    if config.random_resized_crop:
        images = random_resized_crop(resized_key, images, config.random_resized_crop)
    if config.color_jitter:
        images = color_jitter(colours_key, images, config.color_jitter)
    if config.trivial_augment:  # before the crop, whose black border would change what a stretch of contrast does
        images = trivial_augment(trivial_key, images)
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
    centre = jax.random.uniform(jax.random.fold_in(key, CUTOUT), (2, n, 1, 1, 1), jnp.float32) * sides
    rows = jnp.arange(h, dtype=jnp.float32).reshape(1, h, 1, 1) + 0.5
    columns = jnp.arange(w, dtype=jnp.float32).reshape(1, 1, w, 1) + 0.5
    inside = (jnp.abs(rows - centre[0]) < side / 2) & (jnp.abs(columns - centre[1]) < side / 2)
    return jnp.where(inside, 0.0, images)


def erase(key: PRNGKeyArray, images: Float[Array, "batch h w c"], probability: float) -> Float[Array, "batch h w c"]:
    """Sets one random rectangle in some of the normalised images to 0, which is the mean.

    The method is random erasing (Z. Zhong et al., 2020, arXiv:1708.04896). The rectangle has a random share of the image's area between
    2 % and 33 %, and a random aspect between 0.3 and 3.3, uniform in its logarithm, and lies whole inside the image. Where it would be
    longer than the image it is cut to it; the paper draws again.

    Args:
        key: for the draws.
        images: of a batch.
        probability: that an image gets a rectangle. With 0 no bit changes.
    """
    if probability == 0:
        return images
    n, h, w, _ = images.shape
    u = jax.random.uniform(jax.random.fold_in(key, ERASING), (5, n, 1, 1, 1), jnp.float32)
    low, high = (math.log(aspect) for aspect in ERASED_ASPECTS)
    area = h * w * (ERASED_SHARES[0] + (ERASED_SHARES[1] - ERASED_SHARES[0]) * u[0])
    aspect = jnp.exp(low + (high - low) * u[1])
    height, width = (jnp.clip(jnp.round(jnp.sqrt(a)), 1, most) for a, most in ((area * aspect, h), (area / aspect, w)))
    top, left = (jnp.floor(u[i] * (side - own + 1)) for i, side, own in ((2, h, height), (3, w, width)))
    rows, columns = (jnp.arange(side, dtype=jnp.float32) for side in (h, w))
    rows, columns = rows.reshape(1, h, 1, 1), columns.reshape(1, 1, w, 1)
    inside = (rows >= top) & (rows < top + height) & (columns >= left) & (columns < left + width)
    return jnp.where(inside & (u[4] < probability), 0.0, images)


def mix_up(
    key: PRNGKeyArray, images: Float[Array, "batch h w c"], labels: Int[Array, " batch"], alpha: float
) -> tuple[Float[Array, "batch h w c"], Mixture | None]:
    """Mixes each image with the one before it in the batch: `share` of itself and `1 - share` of the other.

    The method is mixup (H. Zhang et al., 2018, arXiv:1710.09412). One share is drawn for the batch, `max(l, 1 - l)` with `l` from
    Beta(alpha, alpha), so that an image always keeps its label as that of its larger part. Batches are in random order, so that its
    neighbour is a random image.

    Args:
        key: for the draw.
        images: normalised.
        labels: of these images.
        alpha: of the distribution. With 0 no bit changes, and there is no mixture.
    """
    if alpha == 0:
        return images, None
    drawn = jax.random.beta(jax.random.fold_in(key, MIXUP), alpha, alpha, dtype=jnp.float32)
    share = jnp.maximum(drawn, 1 - drawn)
    mixed = share * images + (1 - share) * jnp.roll(images, 1, axis=0)
    return mixed, Mixture(jnp.roll(labels, 1), share)


def _crop(key: PRNGKeyArray, images: Array, padding: int) -> Array:
    n, h, w, c = images.shape
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    starts = jax.random.randint(key, (n, 2), 0, 2 * padding + 1)
    return jax.vmap(lambda image, start: jax.lax.dynamic_slice(image, (start[0], start[1], 0), (h, w, c)))(padded, starts)


def augmented(config: Config, task: Task, batch: Batch) -> tuple[Float[Array, "batch h w c"], Mixture | None]:
    """The images of a batch as the first group gets them in training: augmented and normalised; and what was mixed into them."""
    key = jax.random.fold_in(batch.key, 0)
    images = normalised(task, augment(key, batch.images, batch.ids, batch.epoch, config))
    images = erase(key, cut_out(key, images, config.cutout), config.random_erasing)
    return mix_up(key, images, batch.labels, config.mixup)


def normalised(task: Task, images: UInt8[Array, "batch h w c"]) -> Float[Array, "batch h w c"]:
    """Images normalised by the pixel statistics of the run, as the first group gets them."""
    return normalise(images, task.mean, task.std)
