"""Keeping XLA:CPU from moving or merging what a barrier holds apart elsewhere: it drops barriers before it orders its operations."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


def as_branch(function: Callable[..., Any], witness: Int[Array, ""], *arguments: Any) -> Any:
    """`function(*arguments)` as one branch of a condition that holds for any `witness`, which the compiler cannot know.

    All of it is done before anything that takes the result begins, and nothing in it is merged with what stands outside.
    """

    def never(*arguments: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(function, *arguments))

    return jax.lax.cond(witness & 1 < 2, function, never, *arguments)
