"""A function of one batch, over more images than one batch holds."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array


def map_batches(function: Callable[[Array], Array], images: Array, batch_size: int) -> Array:
    """`function` of every `batch_size` images, its first axis the images again. Zeros fill up the last batch; their results are dropped."""
    n = images.shape[0]
    batch = min(batch_size, n)
    padded = jnp.pad(images, ((0, -n % batch), *((0, 0),) * (images.ndim - 1)))
    out = jax.lax.map(function, padded.reshape(-1, batch, *images.shape[1:]))
    return out.reshape(-1, *out.shape[2:])[:n]
