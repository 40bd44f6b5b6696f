"""Batch normalisation of two streams, max-pooling and ReLU as one operation, whose gradient needs nothing but its input.

Pooling comes first: an affine map takes the largest of a window to the largest, or, where its slope is negative, the smallest. So
everything but the statistics works on the pooled map, a quarter of the positions for 2x2 windows, and the backward pass keeps `x` alone and
makes one pass over it. It is derived by hand from `y = relu(scale (x - mean) / sqrt(var + EPSILON) + bias)` (Ioffe and Szegedy, 2015).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vffjax.ops.pooling import max_pool, max_pool_gradient

EPSILON = 1e-5


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def normalise(
    x: Float[Array, "batch *feature"],
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    clean: int,
    shared: bool,
    pool: int = 1,
    relu: bool = False,
) -> tuple[Float[Array, "batch *out"], Float[Array, "sources c"], Float[Array, "sources c"]]:
    """`x` by batch statistics, pooled and rectified; and the means and variances, which are not to be differentiated.

    The first `clean` rows are one stream, the rest another. Each is normalised by its own statistics, or, if `shared`, both by those
    of the clean rows: there are as many sources as streams that are present, or one. Moments and arithmetic are float32; the output
    has the type of `x`.
    """
    return _forward(x, scale, bias, clean, shared, pool, relu)[0]


def _forward(x: Array, scale: Array, bias: Array, clean: int, shared: bool, pool: int, relu: bool) -> tuple[tuple, tuple]:
    z = x.astype(jnp.float32)
    count = _counts(z, clean, shared)
    mean = _sums(z, clean, shared) / count
    square = _sums(z * z, clean, shared) / count
    var = jnp.maximum(square - mean * mean, 0.0)
    gain, offset = affine(mean, var, scale, bias)
    y = _extreme(x, scale, pool) * by_row(gain, z, clean) + by_row(offset, z, clean)
    y = jax.nn.relu(y) if relu else y
    return (y.astype(x.dtype), mean, var), (x, scale, bias, mean, var)


def _backward(clean: int, shared: bool, pool: int, relu: bool, residuals: tuple, cotangents: tuple) -> tuple[Array, Array, Array]:
    x, scale, bias, mean, var = residuals
    z, g = x.astype(jnp.float32), cotangents[0].astype(jnp.float32)
    gain, offset = affine(mean, var, scale, bias)
    extreme = _extreme(x, scale, pool)
    if relu:
        g = jnp.where(extreme * by_row(gain, z, clean) + by_row(offset, z, clean) > 0, g, 0.0)
    rstd = jax.lax.rsqrt(var + EPSILON)
    centred = (extreme - by_row(mean, z, clean)) * by_row(rstd, z, clean)
    # With shared statistics every row, not only the clean, acts through the one source.
    rows = g.shape[0] if shared else clean
    to_bias, to_scale = _sums(g, rows, shared), _sums(g * centred, rows, shared)
    # What comes back through mean and variance is affine in z, in the rows that the statistics were taken of.
    count = _counts(z, clean, shared)
    slope = -gain * rstd * to_scale / count
    level = -gain * to_bias / count - slope * mean
    if shared and clean < z.shape[0]:
        slope, level = (jnp.concatenate([a, jnp.zeros_like(a)]) for a in (slope, level))
    dz = _to_extremes(x, scale, g * by_row(gain, z, clean), pool) + by_row(slope, z, clean) * z + by_row(level, z, clean)
    return dz.astype(x.dtype), to_scale.sum(0), to_bias.sum(0)


normalise.defvjp(_forward, _backward)


def affine(
    mean: Float[Array, "sources c"], var: Float[Array, "sources c"], scale: Float[Array, " c"], bias: Float[Array, " c"]
) -> tuple[Float[Array, "sources c"], Float[Array, "sources c"]]:
    """Slope and offset of the normalisation by given statistics."""
    gain = scale[None] * jax.lax.rsqrt(var + EPSILON)
    return gain, bias[None] - mean * gain


def by_row(values: Float[Array, "sources c"], like: Float[Array, "batch *feature"], clean: int) -> Float[Array, "rows *feature"]:
    """Each row's value, to be broadcast over the positions of `like`: of two sources, the first is that of the `clean` rows."""
    shape = (1,) * (like.ndim - 1) + (values.shape[1],)
    if values.shape[0] == 1:
        return values.reshape(shape)
    row = jnp.arange(like.shape[0]).reshape(-1, *(1,) * (like.ndim - 1))
    return jnp.where(row < clean, values[0].reshape(shape), values[1].reshape(shape))


def _sums(z: Array, clean: int, shared: bool) -> Array:
    """Sums over positions and over the rows of each source, [sources, c]. Positions first: no stream is cut out of the feature map."""
    rows = z.sum(tuple(range(1, z.ndim - 1)))
    parts = (rows[:clean],) if shared else (rows[:clean], rows[clean:])
    return jnp.stack([part.sum(0) for part in parts if part.shape[0]])


def _counts(z: Array, clean: int, shared: bool) -> Array:
    rows = (clean,) if shared else (clean, z.shape[0] - clean)
    return jnp.array([[n * math.prod(z.shape[1:-1])] for n in rows if n], jnp.float32)


def _extreme(x: Array, scale: Array, pool: int) -> Array:
    """Of each window the entry that a slope of this sign takes to the largest. Exact: signs change, nothing is rounded."""
    if pool == 1:
        return x.astype(jnp.float32)
    sign = _sign(scale, x)
    return (sign * max_pool(sign * x, pool)).astype(jnp.float32)


def _sign(scale: Array, x: Array) -> Array:
    return jnp.where(scale < 0, -1, 1).astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


def _to_extremes(x: Array, scale: Array, g: Array, pool: int) -> Array:
    """`g` at the entries of each window that equal its extreme; 0 at the others."""
    if pool == 1:
        return g
    return max_pool_gradient(_sign(scale, x) * x, g.astype(x.dtype), pool).astype(jnp.float32)
