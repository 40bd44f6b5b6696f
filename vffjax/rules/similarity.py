"""How alike two feature maps are: vectors whose dot product is a cosine. In float32."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vffjax.errors import chosen
from vffjax.ops.pooling import mean_pool_to_grid, on_gpus
from vffjax.ops.rows import divided

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
    vectors, scaled = comparable(features, similarity)
    return vectors if scaled else unit(vectors)


def comparable(features: Float[Array, "batch *feature"], similarity: str) -> tuple[Float[Array, "batch d"], bool]:
    """The vectors of `embed` before they are scaled to length 1, and whether they are scaled already, as those of positions are."""
    z = features.astype(jnp.float32)
    cells = cells_of(similarity)
    if z.ndim == 4:
        if cells:
            z = mean_pool_to_grid(z, cells)
        if similarity == "position":
            positions = z.shape[1] * z.shape[2]
            return (unit(z) / jnp.sqrt(positions)).reshape(z.shape[0], -1), True
    return z.reshape(z.shape[0], -1), False


def unit(z: Float[Array, "*rows d"]) -> Float[Array, "*rows d"]:
    """Each row scaled to length 1; a row of zeros stays."""
    squared = jnp.sum(z * z, axis=-1, keepdims=True)
    # max, not +: exact cosines for ordinary features, and for zero features value 0 with a gradient bounded by EPSILON ** -0.5.
    return z * jax.lax.rsqrt(jnp.maximum(squared, EPSILON))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def between(
    vectors: Float[Array, "rows d"], clean: int, scaled: bool = False, to_clean: bool = True, to_others: bool = True
) -> Float[Array, "clean others"]:
    """The cosines of the first `clean` vectors with all others.

    Where the others are few, GPUs multiply all vectors by all vectors. That is more arithmetic and still takes less time to start: no part
    has to be cut out of the vectors first, and the gradient of both parts is one product.

    Args:
        vectors: rows, the first `clean` of them clean.
        clean: how many.
        scaled: whether the vectors are scaled already, so that their products are what is asked for.
        to_clean: whether the clean vectors get a gradient.
        to_others: whether the other ones get one.
    """
    parts = functools.partial(_of_parts, clean=clean, scaled=scaled)
    whole = functools.partial(_cut_of_all, clean=clean, scaled=scaled)
    return jax.lax.platform_dependent(vectors, **_on_gpus(whole, vectors, clean), default=parts)


def _on_gpus(whole: Callable[..., Array], vectors: Array, clean: int) -> dict[str, Callable[..., Array]]:
    # Divided over several devices, the rows of each part are what the devices have to tell each other.
    return {} if divided() or vectors.shape[0] > 2 * clean else on_gpus(whole)


def _of_parts(vectors: Array, clean: int, scaled: bool, to_clean: bool = True, to_others: bool = True) -> Array:
    vectors = vectors if scaled else unit(vectors)
    first = vectors[:clean] if to_clean else jax.lax.stop_gradient(vectors[:clean])
    others = vectors[clean:] if to_others else jax.lax.stop_gradient(vectors[clean:])
    return jax.vmap(lambda vector: dot(others, vector))(first)


def _cut_of_all(vectors: Array, clean: int, scaled: bool) -> Array:
    units = _padded_units(vectors, scaled)
    return dot(units, units.T)[:clean, clean : vectors.shape[0]]


def _padded_units(vectors: Array, scaled: bool) -> Array:
    """Vectors of length 1, and zeros up to a multiple of 16 rows, which a GPU's matrix products can divide among its processors."""
    units = vectors if scaled else unit(vectors)
    return jnp.pad(units, ((0, -vectors.shape[0] % 16), (0, 0)))


def _forward(vectors: Array, clean: int, *how: bool) -> tuple[Array, Array]:
    return between(vectors, clean, *how), vectors


def _backward(clean: int, scaled: bool, to_clean: bool, to_others: bool, vectors: Array, g: Array) -> tuple[Array]:
    def parts(vectors: Array, g: Array) -> Array:
        of_parts = functools.partial(_of_parts, clean=clean, scaled=scaled, to_clean=to_clean, to_others=to_others)
        (found,) = jax.vjp(of_parts, vectors)[1](g)
        return found

    def whole(vectors: Array, g: Array) -> Array:
        rows = vectors.shape[0]
        units, back = jax.vjp(functools.partial(_padded_units, scaled=scaled), vectors)
        placed = jnp.pad(g, ((0, len(units) - clean), (clean, len(units) - rows)))
        (found,) = back(dot(placed + placed.T, units))
        is_clean = jnp.arange(rows) < clean
        return found if to_clean and to_others else jnp.where(is_clean[:, None] == to_clean, found, 0.0)

    return (jax.lax.platform_dependent(vectors, g, **_on_gpus(whole, vectors, clean), default=parts),)


between.defvjp(_forward, _backward)


def dot(a: Array, b: Array) -> Array:
    """A matrix product in full float32."""
    # The default precision of a matrix product is bf16 on TPU; at a temperature of 0.05 that is an error of 4 % in a logit.
    return jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST)
