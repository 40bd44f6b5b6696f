"""Gradients that compute a function's forward pass again, instead of keeping what it computed the first time.

`jax.checkpoint` tells the compiler so by a barrier. XLA:CPU drops barriers before it merges equal operations, finds the second forward
pass equal to the first, and keeps everything after all. So on CPU the backward pass is a branch (`fence.as_branch`).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from vffjax.ops.fence import as_branch


def recomputed(f: Callable[[Any, Any, Array], tuple[Array, Any]]) -> Callable[[Any, Any, Array], tuple[Array, Any]]:
    """`f(params, constants, x) -> (y, aux)` with the same gradients in `params` and `x`, of which only the arguments are kept.

    Gradients in `constants` and of `aux` count as zero. Differentiable once, in reverse mode.
    """

    def forward(params: Any, constants: Any, x: Array) -> tuple[tuple[Array, Any], tuple[Any, Any, Array]]:
        return f(params, constants, x), (params, constants, x)

    def backward(arguments: tuple[Any, Any, Array], cotangents: tuple[Array, Any]) -> tuple[Any, None, Array]:
        to_params, to_x = lax.platform_dependent(*arguments, cotangents[0], cpu=branch, default=barrier)
        return to_params, None, to_x

    def again(params: Any, constants: Any, x: Array, g: Array) -> tuple[Any, Array]:
        return jax.vjp(lambda params, x: f(params, constants, x), params, x, has_aux=True)[1](g)

    def branch(*arguments: Any) -> Any:
        # Of the incoming gradient, so that no forward pass is computed before it is needed.
        bits = lax.bitcast_convert_type(arguments[-1].ravel()[0].astype(jnp.float32), jnp.int32)
        return as_branch(again, bits, *arguments)

    def barrier(*arguments: Any) -> Any:
        return again(*lax.optimization_barrier(arguments))

    function = jax.custom_vjp(f)
    function.defvjp(forward, backward)
    return function
