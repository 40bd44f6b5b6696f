"""Augmentation that photographs need, on bytes: crops of random size that fill the whole image, and changes of its colours."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

ASPECTS = (3 / 4, 4 / 3)  # the least and the greatest height of a crop, divided by its width
_HIGHEST = jax.lax.Precision.HIGHEST  # a TPU would otherwise round pixels to bfloat16


def random_resized_crop(key: PRNGKeyArray, images: UInt8[Array, "batch h w c"], smallest: float) -> UInt8[Array, "batch h w c"]:
    """Enlarges a random part of each image to the whole, bilinearly (C. Szegedy et al., 2015, arXiv:1409.4842).

    The part has a random share of the image's area, uniform from `smallest` to 1, and a random aspect, uniform in its logarithm between
    `ASPECTS`; where it would be longer than the image it is cut to it. It lies anywhere inside, also between pixels.

    Args:
        key: for the draws.
        images: of a batch.
        smallest: the least share of the area, above 0.
    """
    n, h, w, _ = images.shape
    u = jax.random.uniform(key, (4, n), jnp.float32)
    low, high = (math.log(aspect) for aspect in ASPECTS)
    area, aspect = h * w * (smallest + (1 - smallest) * u[0]), jnp.exp(low + (high - low) * u[1])
    height, width = jnp.minimum(jnp.sqrt(area * aspect), h), jnp.minimum(jnp.sqrt(area / aspect), w)
    rows, columns = _weights(h, u[2] * (h - height), height), _weights(w, u[3] * (w - width), width)
    pixels = jnp.einsum("nij,njwc->niwc", rows, images.astype(jnp.float32), precision=_HIGHEST)
    return _bytes(jnp.einsum("nvw,niwc->nivc", columns, pixels, precision=_HIGHEST))


def _weights(side: int, first: Float[Array, " n"], length: Float[Array, " n"]) -> Float[Array, "n side side"]:
    """The weight of each pixel of a line in each of `side` pixels, to which the part from `first` on of this length is enlarged."""
    steps = jnp.arange(side, dtype=jnp.float32)
    centres = first[:, None] + (steps[None, :] + 0.5) * (length / side)[:, None] - 0.5
    centres = jnp.clip(centres, 0, side - 1)
    return jnp.maximum(0, 1 - jnp.abs(centres[:, :, None] - steps[None, None, :]))


def color_jitter(key: PRNGKeyArray, images: UInt8[Array, "batch h w c"], strength: float) -> UInt8[Array, "batch h w c"]:
    """Changes brightness, then contrast, then saturation of each image by random factors, uniform from `1 - strength` to `1 + strength`.

    Brightness scales pixels, contrast their distance from the image's mean grey, and saturation their distance from their own grey. Grey
    is luma by ITU-R BT.601, or the mean of the channels if there are not three.

    Args:
        key: for the draws.
        images: of a batch.
        strength: from 0 to 1.
    """
    channels = images.shape[3]
    luma = jnp.array([0.299, 0.587, 0.114] if channels == 3 else [1 / channels] * channels, jnp.float32).reshape(1, 1, 1, -1)
    factors = 1 + strength * (2 * jax.random.uniform(key, (3, images.shape[0], 1, 1, 1), jnp.float32) - 1)
    x = jnp.clip(images.astype(jnp.float32) * factors[0], 0, 255)
    mean = (x * luma).sum(axis=3, keepdims=True).mean(axis=(1, 2), keepdims=True)
    x = jnp.clip(mean + factors[1] * (x - mean), 0, 255)
    grey = (x * luma).sum(axis=3, keepdims=True)
    return _bytes(grey + factors[2] * (x - grey))


def _bytes(pixels: Float[Array, "batch h w c"]) -> UInt8[Array, "batch h w c"]:
    return jnp.clip(jnp.round(pixels), 0, 255).astype(jnp.uint8)
