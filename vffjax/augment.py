"""Augmentation inside the step, on device: normalisation, mirror images, padded crops, cutout."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from vffjax.config import Config


def normalise(images: UInt8[Array, "batch h w c"], mean: Float[Array, " c"], std: Float[Array, " c"]) -> Float[Array, "batch h w c"]:
    """Bytes to float32 with mean 0 and standard deviation 1 per channel over the training images."""
    scale, shift = (1 / (255 * std)).reshape(1, 1, 1, -1), (mean / std).reshape(1, 1, 1, -1)
    return images.astype(jnp.float32) * scale - shift


def augment(key: PRNGKeyArray, images: Float[Array, "batch h w c"], config: Config) -> Float[Array, "batch h w c"]:
    """Random views of normalised images, each image by its own draw; padding and cut squares hold 0, the mean."""
    flip_key, crop_key, cut_key = (jax.random.fold_in(key, i) for i in range(3))
    n, h, w, _ = images.shape
    if config.flip:
        mirrored = jax.random.bernoulli(flip_key, 0.5, (n, 1, 1, 1))
        images = jnp.where(mirrored, images[:, :, ::-1], images)
    if config.crop_padding:
        images = _crop(crop_key, images, config.crop_padding)
    if config.cutout:
        centre = jax.random.uniform(cut_key, (2, n, 1, 1, 1)) * jnp.array([h, w]).reshape(2, 1, 1, 1, 1)
        rows, columns = jnp.arange(h).reshape(1, h, 1, 1) + 0.5, jnp.arange(w).reshape(1, 1, w, 1) + 0.5
        inside = (jnp.abs(rows - centre[0]) < config.cutout / 2) & (jnp.abs(columns - centre[1]) < config.cutout / 2)
        images = jnp.where(inside, 0.0, images)
    return images


def _crop(key: PRNGKeyArray, images: Array, padding: int) -> Array:
    n, h, w, c = images.shape
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    starts = jax.random.randint(key, (n, 2), 0, 2 * padding + 1)
    return jax.vmap(lambda image, start: jax.lax.dynamic_slice(image, (start[0], start[1], 0), (h, w, c)))(padded, starts)
