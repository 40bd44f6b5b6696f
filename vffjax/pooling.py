"""Pooling over positions, written so that forward and gradient are elementwise or plain reductions on every backend."""

from jaxtyping import Array, Float


def mean_pool_to_grid(x: Float[Array, "batch h w c"], cells: int) -> Float[Array, "batch g g c"]:
    """Mean over the cells of a `cells` x `cells` grid, or of every position where the map is smaller; ragged edges are cut."""
    h, w = x.shape[1:3]
    rows, columns = min(cells, h), min(cells, w)
    a, b = h // rows, w // columns
    x = x[:, : rows * a, : columns * b]
    return x.reshape(x.shape[0], rows, a, columns, b, x.shape[3]).mean(axis=(2, 4))


def max_pool(x: Float[Array, "batch h w c"], window: int) -> Float[Array, "batch h2 w2 c"]:
    """Max over disjoint windows; ragged edges are cut. Ties share the gradient.

    A maximum over reshaped axes: its gradient is elementwise, where that of `reduce_window` is slow on CPU.
    """
    if window == 1:
        return x
    n, h, w, c = x.shape
    x = x[:, : h // window * window, : w // window * window]
    return x.reshape(n, h // window, window, w // window, window, c).max(axis=(2, 4))
