"""Forward-forward (Hinton, 2022, arXiv:2212.13345): labels in the first pixels, goodness of activity."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vffjax.hyperparameters import Scalar
from vffjax.rules.streams import Streams


def goodness(features: Float[Array, "batch *feature"]) -> Float[Array, " batch"]:
    """Forward-forward goodness (Hinton, 2022): the mean squared activity. The sum of squares is this times the number of units."""
    z = features.astype(jnp.float32)
    return jnp.mean(z * z, axis=tuple(range(1, z.ndim)))


def forward_forward(
    positive: Float[Array, "batch *feature"], negative: Float[Array, "batch *feature"], threshold: Scalar, peer_weight: Scalar | None = None
) -> Float[Array, ""]:
    """Hinton's objective: each image is positive with log-odds `sum of squares - threshold * units`; plus peer normalisation.

    The log-odds are those of the sum over channels, averaged over positions, so that a large map does not saturate them. Peer
    normalisation is `peer_weight` times the mean squared distance of each unit's mean activity from the mean of all units; None: without.
    """
    channels = positive.shape[-1]
    odds_positive = channels * (goodness(positive) - threshold)
    odds_negative = channels * (goodness(negative) - threshold)
    loss = jnp.mean(jax.nn.softplus(-odds_positive)) + jnp.mean(jax.nn.softplus(odds_negative))
    if peer_weight is not None:
        units = jnp.mean(positive.astype(jnp.float32), axis=tuple(range(positive.ndim - 1)))
        loss += peer_weight * jnp.mean((units - units.mean()) ** 2)
    return loss


def overlay(
    images: Float[Array, "batch h w c"],
    weights: Float[Array, "batch classes"],
    low: Float[Array, " c"],
    high: Float[Array, " c"],
) -> Float[Array, "batch h w c"]:
    """Forward-forward labels (Hinton, 2022): the first pixels, row by row, one per class, become `low + weight (high - low)`.

    `low` and `high` are black and white in normalised units. One-hot weights say a label, equal weights say nothing.
    """
    n, h, w, c = images.shape
    pixels = images.reshape(n, h * w, c)
    low, high = low.reshape(1, 1, c), high.reshape(1, 1, c)
    label = low + weights[:, :, None] * (high - low)
    return pixels.at[:, : weights.shape[1]].set(label.astype(images.dtype)).reshape(n, h, w, c)


def overlay_streams(
    images: Float[Array, "batch h w c"],
    labels: Int[Array, " batch"],
    wrong: Int[Array, " batch"],
    classes: int,
    low: Float[Array, " c"],
    high: Float[Array, " c"],
) -> Streams:
    """Clean: neutral label. Copies: all images with the right label, then all with a wrong one."""
    copy_labels = jnp.concatenate([labels, wrong])
    copies = overlay(jnp.concatenate([images, images]), jax.nn.one_hot(copy_labels, classes, dtype=jnp.float32), low, high)
    return Streams(jnp.concatenate([neutral(images, classes, low, high), copies]), labels, copy_labels)


def neutral(
    images: Float[Array, "batch h w c"], classes: int, low: Float[Array, " c"], high: Float[Array, " c"]
) -> Float[Array, "batch h w c"]:
    """The overlay that says nothing: every class with weight 1 / classes."""
    return overlay(images, jnp.full((images.shape[0], classes), 1 / classes, jnp.float32), low, high)
