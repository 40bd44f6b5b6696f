"""Pooling over positions.

XLA's window operations are slow on CPU, so there the values and gradients are made of elementwise operations and plain reductions.

On a GPU the values come from windows, which XLA fuses with what follows. The gradient of a window there is an index map of four integers
per window and a scatter, which deterministic operations turn into a sort. The gradient therefore has the form that it has on CPU, and equal
entries share it in the same way. On a TPU windows are the fastest form of both.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

GPUS = ("cuda", "rocm")  # as `lax.platform_dependent` names them


def on_gpus(function: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """The argument of `lax.platform_dependent` that chooses `function` on every kind of GPU."""
    return dict.fromkeys(GPUS, function)


def mean_pool_to_grid(x: Float[Array, "batch h w c"], cells: int) -> Float[Array, "batch rows columns c"]:
    """Means over the cells of a `cells` x `cells` grid. A side that is shorter than the grid keeps its positions.

    If the grid does not divide the map, cell `i` of `g` spans the positions from `floor(i h / g)` up to `ceil((i + 1) h / g)`. Cells
    then overlap, and no position is left out. These are the cells of PyTorch's `AdaptiveAvgPool2d`.

    Args:
        x: feature maps.
        cells: cells along each side of the grid.

    Returns:
        The means, with `min(cells, h)` rows and `min(cells, w)` columns.

    >>> mean_pool_to_grid(jnp.arange(4.0).reshape(1, 1, 4, 1), cells=2).ravel()
    Array([0.5, 2.5], dtype=float32)
    """
    h, w = x.shape[1:3]
    rows, columns = min(cells, h), min(cells, w)
    if h % rows == 0 and w % columns == 0:
        return _means_of_whole_cells(x, rows, columns)
    # The means of whole cells are those of float32 too. At its default precision a TPU would round the map to bfloat16.
    return jnp.einsum("ih,nhwc,jw->nijc", _cell_means(h, rows), x, _cell_means(w, columns), precision=jax.lax.Precision.HIGHEST)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _means_of_whole_cells(x: Array, rows: int, columns: int) -> Array:
    n, h, w, c = x.shape
    return x.astype(np.promote_types(x.dtype, np.float32)).reshape(n, rows, h // rows, columns, w // columns, c).mean(axis=(2, 4))


def _gradient_of_means(rows: int, columns: int, like: Array, g: Array) -> tuple[Array]:
    # The gradient is rounded to the dtype of the map before it is spread over the cells. Spread in float32, it would be in memory at twice
    # the size of a bfloat16 map.
    n, h, w, c = like.shape
    share = (g / (h // rows * (w // columns))).astype(like.dtype)
    spread = jnp.broadcast_to(share[:, :, None, :, None], (n, rows, h // rows, columns, w // columns, c))
    return (spread.reshape(like.shape),)


_means_of_whole_cells.defvjp(lambda x, rows, columns: (_means_of_whole_cells(x, rows, columns), x), _gradient_of_means)


def _cell_means(size: int, cells: int) -> Array:
    """A matrix `[cells, size]` whose row `i` averages the positions of cell `i`."""
    weights = np.zeros((cells, size), np.float32)
    for i in range(cells):
        start, end = i * size // cells, -(-(i + 1) * size // cells)
        weights[i, start:end] = 1 / (end - start)
    return jnp.asarray(weights)


def max_pool(x: Float[Array, "batch *feature"], window: int) -> Float[Array, "batch *out"]:
    """The maximum of each `window` x `window` window. Windows do not overlap; positions that fill no whole window are dropped.

    If several entries of a window are the maximum, they share the gradient on CPU and GPU. On TPU the first one gets all of it.

    Args:
        x: feature maps `[batch, h, w, c]`. With a window of 1, an array of any shape, which is returned unchanged.
        window: side of a window in positions.

    Returns:
        The maxima, `[batch, h // window, w // window, c]`.

    >>> max_pool(jnp.arange(16.0).reshape(1, 4, 4, 1), 2)[0, :, :, 0]
    Array([[ 5.,  7.],
           [13., 15.]], dtype=float32)
    """
    return x if window == 1 else _max_pool(x, (window,))


def max_pool_overlapping(
    x: Float[Array, "batch h w c"], window: int = 3, stride: int = 2, padding: int = 1
) -> Float[Array, "batch h2 w2 c"]:
    """The maximum of overlapping windows, as in `torch.nn.MaxPool2d`.

    Equal entries share the gradient, or the first one gets it, as in `max_pool`.

    Args:
        x: feature maps.
        window: side of a window in positions.
        stride: positions from one window to the next.
        padding: positions added on every side, fewer than `window`. They are never the maximum.

    Returns:
        The maxima, with `h2 = (h + 2 padding - window) // stride + 1` rows, and `w2` columns likewise.
    """
    return _max_pool_overlapping(x, (window, stride, padding))


def _overlapping_reduced_max(x: Array, window: int, stride: int, padding: int) -> Array:
    around = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, window, window, 1), (1, stride, stride, 1), around)


def _overlapping_pairwise_max(x: Array, window: int, stride: int, padding: int) -> Array:
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)), constant_values=-jnp.inf)
    h, w = (size - window + 1 for size in x.shape[1:3])
    rows = functools.reduce(jnp.maximum, (x[:, i : i + h : stride] for i in range(window)))
    return functools.reduce(jnp.maximum, (rows[:, :, j : j + w : stride] for j in range(window)))


def max_pool_gradient(x: Float[Array, "batch h w c"], g: Float[Array, "batch h2 w2 c"], window: int) -> Float[Array, "batch h w c"]:
    """The gradient of `max_pool` in `x`, given the gradient `g` of its result.

    On CPU and GPU it compares `x` with its maxima, in one pass over the map. On CPU that is right only if `x` lies in memory, as a
    convolution's output does: an `x` that the compiler computes twice may be rounded differently and then differ from its own maximum. On
    GPU a barrier sees to that.
    """
    comparison = functools.partial(_gradient_by_comparison, window=window)
    reduced = functools.partial(_gradient_of, functools.partial(_reduced_max, window=window))
    return lax.platform_dependent(x, g, cpu=comparison, **on_gpus(_in_memory(comparison)), default=reduced)


def _reduced_max(x: Array, window: int) -> Array:
    size = (1, window, window, 1)
    return lax.reduce_window(x, -jnp.inf, lax.max, size, size, "VALID")


def _windows(x: Array, window: int) -> Array:
    n, h, w, c = x.shape
    return x[:, : h // window * window, : w // window * window].reshape(n, h // window, window, w // window, window, c)


def _pairwise_max(x: Array, window: int) -> Array:
    x = _windows(x, window)
    rows = functools.reduce(jnp.maximum, (x[:, :, i] for i in range(window)))
    return functools.reduce(jnp.maximum, (rows[:, :, :, j] for j in range(window)))


def _gradient_by_comparison(x: Array, g: Array, window: int) -> Array:
    n, h, w, c = x.shape
    largest, x = _pairwise_max(x, window), _windows(x, window)
    equal = [(x[:, :, i, :, j] == largest).astype(g.dtype) for i in range(window) for j in range(window)]
    share = g / functools.reduce(jnp.add, equal)
    spread = jnp.where(x == largest[:, :, None, :, None], share[:, :, None, :, None], 0)
    spread = spread.reshape(n, h // window * window, w // window * window, c)
    return jnp.pad(spread, ((0, 0), (0, h % window), (0, w % window), (0, 0)))


def _in_memory(gradient: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    """`gradient`, for which `x` is computed once and lies in memory, so that no two roundings of it are compared."""
    return lambda x, g: gradient(lax.optimization_barrier(x), g)


def _gradient_of(pool: Callable[[Array], Array], x: Array, g: Array) -> Array:
    return jax.vjp(pool, x)[1](g)[0]


def _by_platform(pairwise: Callable[..., Array], reduced: Callable[..., Array]) -> Callable[[Array, tuple[int, ...]], Array]:
    """A function of maps and sizes that pools, and computes its gradient, by pairwise maxima on CPU and by windows elsewhere."""

    def forms(sizes: tuple[int, ...]) -> tuple[Callable[[Array], Array], ...]:
        return (lambda x: pairwise(x, *sizes)), (lambda x: reduced(x, *sizes))

    @functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
    def pool(x: Array, sizes: tuple[int, ...]) -> Array:
        on_cpu, elsewhere = forms(sizes)
        return lax.platform_dependent(x, cpu=on_cpu, default=elsewhere)

    def backward(sizes: tuple[int, ...], x: Array, g: Array) -> tuple[Array]:
        # The gradient does not compare `x` with its maximum: XLA may compute `x` twice with different rounding, and then no entry equals
        # the maximum.
        by_comparison, elsewhere = (functools.partial(_gradient_of, form) for form in forms(sizes))
        return (lax.platform_dependent(x, g, cpu=by_comparison, **on_gpus(_in_memory(by_comparison)), default=elsewhere),)

    pool.defvjp(lambda x, sizes: (pool(x, sizes), x), backward)
    return pool


_max_pool = _by_platform(_pairwise_max, _reduced_max)
_max_pool_overlapping = _by_platform(_overlapping_pairwise_max, _overlapping_reduced_max)
