"""How alike two feature maps are: vectors whose dot product is a cosine. In float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vffjax.errors import chosen
from vffjax.ops.pooling import mean_pool_to_grid

# Squared norms below this are taken as zero features: their cosine is 0 and its gradient finite.
EPSILON = 1e-12


def cells_of(similarity: str) -> int | None:
    """The side in cells of the grid to which a similarity mean-pools a feature map; None: it reads the map."""
    return chosen("similarity", similarity, {"grid": 2, "pooled": 1, "position": None, "flat": None})


def embed(features: Float[Array, "batch *feature"], similarity: str) -> Float[Array, "batch d"]:
    """Vectors whose dot product is the cosine similarity of two feature maps.

    `position`: the cosine over channels at each position, averaged over positions. `flat`: of the flattened map. `grid`: of
    the map mean-pooled to 2x2 cells, flattened. `pooled`: of the mean over positions. Maps without positions are all alike.
    """
    z = features.astype(jnp.float32)
    cells = cells_of(similarity)
    if z.ndim == 4:
        if cells:
            z = mean_pool_to_grid(z, cells)
        if similarity == "position":
            positions = z.shape[1] * z.shape[2]
            return (unit(z) / jnp.sqrt(positions)).reshape(z.shape[0], -1)
    return unit(z.reshape(z.shape[0], -1))


def unit(z: Float[Array, "*rows d"]) -> Float[Array, "*rows d"]:
    """Each row scaled to length 1; a row of zeros stays."""
    squared = jnp.sum(z * z, axis=-1, keepdims=True)
    # max, not +: exact cosines for ordinary features, and for zero features value 0 with a gradient bounded by EPSILON ** -0.5.
    return z * jax.lax.rsqrt(jnp.maximum(squared, EPSILON))


def dot(a: Array, b: Array) -> Array:
    """A matrix product in full float32."""
    # The default precision of a matrix product is bf16 on TPU; at a temperature of 0.05 that is an error of 4 % in a logit.
    return jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST)
