"""Keeps XLA:CPU from moving or merging operations across a border.

On other backends `jax.lax.optimization_barrier` does that. XLA:CPU removes barriers before it orders its operations.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


def as_branch(function: Callable[..., Any], witness: Int[Array, ""], *arguments: Any) -> Any:
    """Computes `function(*arguments)` as one branch of a condition.

    The condition is always true, but the compiler cannot know that. It therefore finishes the branch before it starts anything that
    needs the result, and it does not merge operations of the branch with operations outside.

    Args:
        function: what to compute.
        witness: any integer that is known only when the program runs.
        *arguments: what `function` takes.

    Returns:
        The result of `function`, a tree of arrays.

    >>> as_branch(lambda x: x + 1, jnp.int32(7), jnp.float32(2))
    Array(3., dtype=float32)
    """

    def never(*arguments: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(function, *arguments))

    return jax.lax.cond(witness & 1 < 2, function, never, *arguments)
