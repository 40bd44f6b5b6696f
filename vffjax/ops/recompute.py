"""Gradients that recompute the forward pass instead of storing its intermediate results.

`jax.checkpoint` separates the second forward pass from the first by an optimization barrier. XLA:CPU removes barriers before it merges
equal operations, so it merges the two passes and stores everything after all. On CPU the backward pass is therefore a branch of a
condition (`fence.as_branch`).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from vffjax.ops.fence import as_branch


def recomputed(f: Callable[[Any, Any, Array], tuple[Array, Any]]) -> Callable[[Any, Any, Array], tuple[Array, Any]]:
    """The same function as `f`, whose gradient stores only the arguments and recomputes the rest.

    Args:
        f: `f(params, constants, x) -> (y, aux)`.

    Returns:
        A function with the values of `f` and the gradients of `y` in `params` and `x`. The gradient in `constants` and the gradient of
        `aux` are zero. It can be differentiated once, in reverse mode.
    """

    def forward(params: Any, constants: Any, x: Array) -> tuple[tuple[Array, Any], tuple[Any, Any, Array]]:
        return f(params, constants, x), (params, constants, x)

    def backward(arguments: tuple[Any, Any, Array], cotangents: tuple[Array, Any]) -> tuple[Any, None, Array]:
        to_params, to_x = lax.platform_dependent(*arguments, cotangents[0], cpu=branch, default=barrier)
        return to_params, None, to_x

    def again(params: Any, constants: Any, x: Array, g: Array) -> tuple[Any, Array]:
        return jax.vjp(lambda params, x: f(params, constants, x), params, x, has_aux=True)[1](g)

    def branch(*arguments: Any) -> Any:
        # The condition depends on the incoming gradient, so the second forward pass cannot start before that gradient is there.
        bits = lax.bitcast_convert_type(arguments[-1].ravel()[0].astype(jnp.float32), jnp.int32)
        return as_branch(again, bits, *arguments)

    def barrier(*arguments: Any) -> Any:
        return again(*lax.optimization_barrier(arguments))

    function = jax.custom_vjp(f)
    function.defvjp(forward, backward)
    return function
