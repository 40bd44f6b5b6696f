"""Applies a function of one batch to any number of images."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from vffjax.ops.rows import over_devices


def map_batches(function: Callable[[Array], Any], images: Array, batch_size: int, padded: bool = False) -> Any:
    """Applies `function` to batches of images, one batch after the other, inside a compiled program.

    The last batch is padded with zeros.

    Args:
        function: maps `[batch, ...]` to `[batch, ...]`, row by row, or to a tree of such arrays.
        images: `[n, ...]`, with `n` at least 1.
        batch_size: images in a batch. Fewer are taken if there are fewer images.
        padded: whether the results for the padding are kept at the end. To drop them takes a copy of all results.

    Returns:
        The results in the order of the images, `[n, ...]`, or the tree of them.

    >>> map_batches(lambda x: 10 * x, jnp.arange(5), batch_size=2)
    Array([ 0, 10, 20, 30, 40], dtype=int32)
    """
    n = images.shape[0]
    batch = min(batch_size, n)
    whole = jnp.pad(images, ((0, -n % batch), *((0, 0),) * (images.ndim - 1)))
    out = jax.lax.map(lambda rows: function(over_devices(rows)), whole.reshape(-1, batch, *images.shape[1:]))
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[: None if padded else n], out)
