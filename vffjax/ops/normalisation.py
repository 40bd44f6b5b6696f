"""Batch normalisation, max-pooling and ReLU or GELU of two streams as one operation, whose gradient stores only its input.

Normalisation is an affine map of each channel. If its slope is positive, it maps the largest entry of a window to the largest; if its slope
is negative, it maps the smallest entry to the largest. The operation therefore pools first and normalises afterwards. Everything but the
statistics works on the pooled map, which for 2x2 windows has a quarter of the positions. The gradient stores only `x`. It is derived by
hand from `y = f(scale (x - mean) / sqrt(var + EPSILON) + bias)` (Ioffe and Szegedy, 2015, arXiv:1502.03167) with an activation `f`.

ReLU never falls. GELU falls up to about -0.75 and rises from there, so its largest value in a window is that of the largest or of the
smallest entry. Both are pooled, and the larger result is taken. A TPU's compiler would keep both pooled maps, so on a TPU this operation
leaves GELU out: GELU follows it, in the dtype of the map, and pooling comes last.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vffjax.ops.pooling import max_pool, max_pool_gradient, on_gpus
from vffjax.ops.rows import divided

EPSILON = 1e-5
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"": lambda z: z, "relu": jax.nn.relu, "gelu": jax.nn.gelu}


class Parts(NamedTuple):
    """How many rows are clean, and how many behind them are labelled copies.

    What follows is padding: rows to which no loss gives a gradient, and on which nothing else may depend.
    """

    clean: int
    labelled: int


# How many of the first rows are clean; the rest are labelled copies, unless `Parts` says more. A number is an int, or a symbol in an
# exported program that takes any number of images.
Rows = int | Parts | Any


def streams_of(clean: Rows, rows: Rows) -> tuple[bool, bool]:
    """Whether there are clean rows, and whether there are labelled copies, among so many rows."""
    if isinstance(clean, Parts):
        return clean.clean > 0, clean.labelled > 0
    return clean != 0, clean != rows


def normalise(
    x: Float[Array, "batch *feature"],
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    clean: int | Parts,
    shared: bool,
    pool: int = 1,
    activation: str = "",
) -> tuple[Float[Array, "batch *out"], Float[Array, "sources c"], Float[Array, "sources c"]]:
    """Normalises `x` by its batch statistics, applies the activation and pools it.

    The statistics are means and variances over the rows and positions of each channel. Each stream is normalised by its own statistics,
    or both by those of the clean rows. All arithmetic is in float32, but GELU on a TPU is in the dtype of `x`. Padding is no part of a
    stream, and nobody uses its output.

    Args:
        x: feature maps `[batch, h, w, c]` or features `[batch, c]`. The first `clean` rows are clean images, the rest labelled copies.
        scale: slope of each channel after normalisation.
        bias: offset of each channel after normalisation.
        clean: the number of clean rows; or `Parts`, if there is padding behind the labelled copies.
        shared: whether both streams are normalised by the statistics of the clean rows.
        pool: side of the pooling windows in positions; 1 for no pooling.
        activation: a key of `ACTIVATIONS`.

    Returns:
        The result in the dtype of `x`, and the means and variances in float32, one row for each source of statistics. There is one source
        if `shared` or if only one stream is present, and two otherwise. Gradients of the means and variances are ignored.
    """
    if activation != "gelu":
        return _normalise(x, scale, bias, clean, shared, pool, activation)
    pooled_first, activated_first = _orders(clean, shared, pool, activation)
    return jax.lax.platform_dependent(x, scale, bias, tpu=activated_first, default=pooled_first)


@functools.cache  # so that layers of the same shapes are given the same functions, and share one trace
def _orders(clean: int | Parts, shared: bool, pool: int, activation: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The operation in two orders, as functions of `x`, `scale` and `bias`: pooling first, and the activation before pooling."""

    def activated_first(x: Array, scale: Array, bias: Array) -> tuple[Array, Array, Array]:
        out, mean, var = _normalise(x, scale, bias, clean, shared, 1, "")
        return max_pool(ACTIVATIONS[activation](out), pool), mean, var

    return functools.partial(_normalise, clean=clean, shared=shared, pool=pool, activation=activation), activated_first


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def _normalise(
    x: Array, scale: Array, bias: Array, clean: int | Parts, shared: bool, pool: int, activation: str
) -> tuple[Array, Array, Array]:
    return _forward(x, scale, bias, clean, shared, pool, activation)[0]


def _forward(x: Array, scale: Array, bias: Array, clean: int | Parts, shared: bool, pool: int, activation: str) -> tuple[tuple, tuple]:
    z, (clean, labelled) = x.astype(jnp.float32), _parts(clean, x)
    count = _counts(z, clean, labelled, shared)
    mean, square = (total / count for total in _sums((z, z * z), clean, labelled, shared))
    var = jnp.maximum(square - mean * mean, 0.0)
    gain, offset = affine(mean, var, scale, bias)
    found = _candidates(x, scale, pool, activation)
    y = functools.reduce(jnp.maximum, _activated(found, by_row(gain, z, clean), by_row(offset, z, clean), activation))
    return (y.astype(x.dtype), mean, var), (x, scale, bias, mean, var)


def _backward(
    clean: int | Parts, shared: bool, pool: int, activation: str, residuals: tuple, cotangents: tuple
) -> tuple[Array, Array, Array]:
    x, scale, bias, mean, var = residuals
    clean, labelled = _parts(clean, x)
    z, g = x.astype(jnp.float32), cotangents[0].astype(jnp.float32)
    gain, offset = affine(mean, var, scale, bias)
    found = _candidates(x, scale, pool, activation)
    extreme = found[0]
    if len(found) == 2:
        values = _activated(found, by_row(gain, z, clean), by_row(offset, z, clean), activation)
        by_largest = values[0] >= values[1]
        extreme = jnp.where(by_largest, *found)
    if activation:
        g = jax.vjp(ACTIVATIONS[activation], extreme * by_row(gain, z, clean) + by_row(offset, z, clean))[1](g)[0]
    rstd = jax.lax.rsqrt(var + EPSILON)
    centred = (extreme - by_row(mean, z, clean)) * by_row(rstd, z, clean)
    # With shared statistics all rows, clean and labelled, are normalised by the one source.
    rows = clean + labelled if shared else clean
    to_bias, to_scale = _sums((g, g * centred), rows, labelled, shared)
    # The gradient through mean and variance is affine in z. It reaches the rows from which the statistics were computed.
    count = _counts(z, clean, labelled, shared)
    slope = -gain * rstd * to_scale / count
    level = -gain * to_bias / count - slope * mean
    if shared and clean < z.shape[0]:
        slope, level = (jnp.concatenate([a, jnp.zeros_like(a)]) for a in (slope, level))
    through = by_row(slope, z, clean) * z + by_row(level, z, clean)
    if clean + labelled < z.shape[0]:
        through = jnp.where(_row_of(z) < clean + labelled, through, 0.0)
    g = g * by_row(gain, z, clean)
    if len(found) == 2:
        ends = ((x, jnp.where(by_largest, g, 0.0)), (-x, jnp.where(by_largest, 0.0, g)))
        dz = sum((max_pool_gradient(end, part.astype(x.dtype), pool).astype(jnp.float32) for end, part in ends), through)
    else:
        dz = _to_extremes(x, scale, g, pool) + through
    return dz.astype(x.dtype), functools.reduce(jnp.add, to_scale), functools.reduce(jnp.add, to_bias)


_normalise.defvjp(_forward, _backward)


def affine(
    mean: Float[Array, "sources c"], var: Float[Array, "sources c"], scale: Float[Array, " c"], bias: Float[Array, " c"]
) -> tuple[Float[Array, "sources c"], Float[Array, "sources c"]]:
    """Slope and offset of each channel in a normalisation by the given statistics."""
    gain = scale[None] * jax.lax.rsqrt(var + EPSILON)
    return gain, bias[None] - mean * gain


def by_row(values: Float[Array, "sources c"], like: Float[Array, "batch *feature"], clean: Rows) -> Float[Array, "#batch *#feature"]:
    """The values that apply to each row of `like`, in a shape that broadcasts over its positions.

    With two sources, the first applies to the `clean` first rows and the second to the rest. With one source, it applies to all rows.
    """
    shape = (1,) * (like.ndim - 1) + (values.shape[1],)
    if values.shape[0] == 1:
        return values.reshape(shape)
    first = clean.clean if isinstance(clean, Parts) else clean
    return jnp.where(_row_of(like) < first, values[0].reshape(shape), values[1].reshape(shape))


def _row_of(like: Array) -> Array:
    """The number of each row, in a shape that broadcasts over its positions."""
    return jnp.arange(like.shape[0]).reshape(-1, *(1,) * (like.ndim - 1))


def _parts(clean: int | Parts, x: Array) -> Parts:
    return clean if isinstance(clean, Parts) else Parts(clean, x.shape[0] - clean)


def _sums(maps: tuple[Array, ...], clean: int, labelled: int, shared: bool) -> tuple[Array, ...]:
    """Sums of each map over positions and over the rows of each source, `[sources, c]`.

    It sums over positions first, so that the streams are cut out of the small sums and not out of the feature map.
    """
    rows = tuple(z.sum(tuple(range(1, z.ndim - 1))) for z in maps)
    if shared or not clean or not labelled:
        return tuple(_of_parts(z, clean, labelled, shared) for z in rows)

    def one_by_one(*rows: Array) -> tuple[Array, ...]:
        return tuple(_of_parts(z, clean, labelled, shared) for z in rows)

    together = functools.partial(_together, clean=clean, labelled=labelled)
    # The first stream ends in the middle of a device's rows. To cut the streams out, TPUs would send each other many rows.
    return jax.lax.platform_dependent(*rows, **on_gpus(together), cpu=one_by_one, tpu=together if divided() else one_by_one)


def _of_parts(rows: Array, clean: int, labelled: int, shared: bool) -> Array:
    parts = (rows[:clean],) if shared else (rows[:clean], rows[clean : clean + labelled])
    return jnp.stack([part.sum(0) for part in parts if part.shape[0]])


def _together(*rows: Array, clean: int, labelled: int) -> tuple[Array, ...]:
    """The sums over the rows of both sources, of all arrays in one reduction, because a GPU takes long to start one."""
    stacked = jnp.stack(rows, 1)[:, :, None]
    row = _row_of(stacked)
    sources = (row < clean) == (jnp.arange(2) == 0).reshape(1, 1, 2, 1)
    if clean + labelled < stacked.shape[0]:
        sources &= row < clean + labelled
    sums = jnp.where(sources, stacked, 0.0).sum(0)
    return tuple(sums[i] for i in range(len(rows)))


def _counts(z: Array, clean: int, labelled: int, shared: bool) -> Array:
    """How many entries each source has in a channel, `[sources, 1]`."""
    rows = (clean,) if shared else (clean, labelled)
    return jnp.array([[n * math.prod(z.shape[1:-1])] for n in rows if n], jnp.float32)


def _candidates(x: Array, scale: Array, pool: int, activation: str) -> tuple[Array, ...]:
    """The entries of each window of which one has the largest result. If `scale` is 0, all entries of a window have the same result."""
    if activation == "gelu" and pool > 1:
        return max_pool(x, pool).astype(jnp.float32), -max_pool(-x, pool).astype(jnp.float32)
    return (_extreme(x, scale, pool),)


def _activated(found: tuple[Array, ...], gain: Array, offset: Array, activation: str) -> list[Array]:
    return [ACTIVATIONS[activation](entries * gain + offset) for entries in found]


def _extreme(x: Array, scale: Array, pool: int) -> Array:
    """The entry of each window that the normalisation maps to the largest: by the sign of `scale`, the largest or the smallest.

    This is exact, because it only changes signs and rounds nothing.
    """
    if pool == 1:
        return x.astype(jnp.float32)
    sign = _sign(scale, x)
    return (sign * max_pool(sign * x, pool)).astype(jnp.float32)


def _sign(scale: Array, x: Array) -> Array:
    return jnp.where(scale < 0, -1, 1).astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


def _to_extremes(x: Array, scale: Array, g: Array, pool: int) -> Array:
    """The gradient `g` of the extremes, given to the entries of each window that equal its extreme. The others get 0."""
    if pool == 1:
        return g
    return max_pool_gradient(_sign(scale, x) * x, g.astype(x.dtype), pool).astype(jnp.float32)
