"""Local losses: CSCL on cosines, forward-forward goodness, the head's cross-entropy. All in float32.

The paper (Lee, Shin, Kim, Neural Networks 190:107697, 2025) publishes the idea of CSCL but no formula; the forms here are our reading.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vffjax.errors import chosen
from vffjax.ops.pooling import mean_pool_to_grid

Scalar = float | Float[Array, ""]  # a number of the loss, which a compiled step takes as an argument

# Squared norms below this are taken as zero features: their cosine is 0 and its gradient finite.
EPSILON = 1e-12


def embed(features: Float[Array, "batch *feature"], similarity: str) -> Float[Array, "batch d"]:
    """Vectors whose dot product is the cosine similarity of two feature maps.

    `position`: the cosine over channels at each position, averaged over positions. `flat`: of the flattened map. `grid`: of
    the map mean-pooled to 2x2 cells, flattened. `pooled`: of the mean over positions. Maps without positions are all alike.
    """
    z = features.astype(jnp.float32)
    cells = chosen("similarity", similarity, {"grid": 2, "pooled": 1, "position": None, "flat": None})
    if z.ndim == 4:
        if cells:
            z = mean_pool_to_grid(z, cells)
        if similarity == "position":
            positions = z.shape[1] * z.shape[2]
            return (_unit(z) / jnp.sqrt(positions)).reshape(z.shape[0], -1)
    return _unit(z.reshape(z.shape[0], -1))


def _unit(z: Array) -> Array:
    squared = jnp.sum(z * z, axis=-1, keepdims=True)
    # max, not +: exact cosines for ordinary features, and for zero features value 0 with a gradient bounded by EPSILON ** -0.5.
    return z * jax.lax.rsqrt(jnp.maximum(squared, EPSILON))


def _dot(a: Array, b: Array) -> Array:
    # The default precision of a matrix product is bf16 on TPU; at a temperature of 0.05 that is an error of 4 % in a logit.
    return jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST)


def cscl_triplet(
    anchor: Float[Array, " d"], positive: Float[Array, " d"], negative: Float[Array, " d"], margin: Scalar, temperature: Scalar
) -> Float[Array, ""]:
    """CSCL for one anchor of unit length: `tau softplus((s(a, n) - s(a, p) + m) / tau)`."""
    difference = _dot(negative - positive, anchor)
    return temperature * jax.nn.softplus((difference + margin) / temperature)


def cscl_in_batch(
    anchor: Float[Array, " d"],
    label: Int[Array, ""],
    copies: Float[Array, "copies d"],
    copy_labels: Int[Array, " copies"],
    margin: Scalar,
    temperature: Scalar,
) -> Float[Array, ""]:
    """CSCL for one anchor against all labelled copies: cross-entropy of `(s - m [match]) / tau`, mass on any copy of its class.

    `-log(sum_{j: match} e_j / sum_j e_j)`, the form of neighbourhood components analysis (Goldberger et al., 2004) on cosines.
    """
    match = copy_labels == label
    scores = (_dot(copies, anchor) - margin * match.astype(copies.dtype)) / temperature
    right = jax.nn.logsumexp(jnp.where(match, scores, -jnp.inf))
    return jax.nn.logsumexp(scores) - right


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


def head_cross_entropy(logits: Float[Array, "batch classes"], labels: Int[Array, " batch"], smoothing: Scalar = 0.0) -> Float[Array, ""]:
    """Mean cross-entropy of one group's head, labels smoothed towards uniform by `smoothing`."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    right = jnp.take_along_axis(log_p, labels[:, None], axis=1)[:, 0]
    return -jnp.mean((1 - smoothing) * right + smoothing * jnp.mean(log_p, axis=1))


@jax.custom_vjp
def scale_gradient(x: Array, scale: Scalar) -> Array:
    """`x` itself, whose gradient is multiplied by `scale`. A gradient that must not pass at all is cut by `stop_gradient` instead."""
    return x


scale_gradient.defvjp(lambda x, scale: (x, scale), lambda scale, g: (g * jnp.asarray(scale, g.dtype), None))
