"""Pooling over positions, written so that forward and gradient are elementwise or plain reductions on every backend."""

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def mean_pool_to_grid(x: Float[Array, "batch h w c"], cells: int) -> Float[Array, "batch g g c"]:
    """Mean over the cells of a `cells` x `cells` grid, or the map itself where it is smaller.

    Where the grid does not divide the map, cell `i` of `g` spans the positions `floor(i h / g)` to `ceil((i + 1) h / g)`: cells
    overlap, and no position is left out.
    """
    h, w = x.shape[1:3]
    rows, columns = min(cells, h), min(cells, w)
    if h % rows == 0 and w % columns == 0:
        return x.reshape(x.shape[0], rows, h // rows, columns, w // columns, x.shape[3]).mean(axis=(2, 4))
    return jnp.einsum("ih,nhwc,jw->nijc", _cell_means(h, rows), x, _cell_means(w, columns))


def _cell_means(size: int, cells: int) -> Array:
    """Row `i` averages the positions of cell `i`."""
    weights = np.zeros((cells, size), np.float32)
    for i in range(cells):
        start, end = i * size // cells, -(-(i + 1) * size // cells)
        weights[i, start:end] = 1 / (end - start)
    return jnp.asarray(weights)


def max_pool(x: Float[Array, "batch h w c"], window: int) -> Float[Array, "batch h2 w2 c"]:
    """Max over disjoint windows; ragged edges are cut. Two equal values share the gradient.

    Pairwise maxima of strided slices, so that the gradient is elementwise (that of `reduce_window` is slow on CPU) and always adds up
    to one. The gradient of a maximum over reshaped axes counts the values equal to it: where XLA computes the map twice with different
    roundings it counts none, and divides by zero.
    """
    if window == 1:
        return x
    n, h, w, c = x.shape
    x = x[:, : h // window * window, : w // window * window].reshape(n, h // window, window, w // window, window, c)
    rows = functools.reduce(jnp.maximum, (x[:, :, i] for i in range(window)))
    return functools.reduce(jnp.maximum, (rows[:, :, :, j] for j in range(window)))
