"""The convolution of every layer, fast on CPU too, where its gradients must stay so inside `lax.scan`.

XLA:CPU rewrites the odd layouts of a convolution's gradients into its fast form only in the entry computation, not in a loop body
(jax issue 12868), where they run about 150 times slower. Here, on CPU, a convolution and its gradients are written in forms that are
fast anywhere: by `winograd` where that applies; else the input gradient is a plain NHWC/HWIO convolution with the flipped kernel, the
kernel gradient matrix products over a few images at a time, so that their shifted copies stay in cache. GPU and TPU get XLA's own
convolution and gradients: the choice is made where the program is lowered, not where it is traced.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from vffjax import winograd

# Rows (image positions) per matrix product of the kernel gradient; 4,096 rows of 3 x 48 floats are 2 MiB, one L2 cache.
_ROWS_PER_PRODUCT = 4096


def _plain(x: Array, kernel: Array) -> Array:
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@jax.custom_vjp
def conv(x: Float[Array, "batch h w c"], kernel: Float[Array, "k k c d"]) -> Float[Array, "batch h w d"]:
    """Cross-correlation with stride 1, zero padding to the same size; `k` is odd. Differentiable once, in reverse mode."""
    if not winograd.applies(x.shape, kernel.shape):
        return _plain(x, kernel)
    return lax.platform_dependent(x, kernel, cpu=winograd.convolve, default=_plain)


def _forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return conv(x, kernel), (x, kernel)


def _backward(residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    # Two separate choices: where nobody asks for the input's gradient (the first layer of a group) it is dead code.
    dx = lax.platform_dependent(x, kernel, g, cpu=_input_gradient, default=lambda x, w, g: jax.vjp(_plain, x, w)[1](g)[0])
    size = kernel.shape[0]
    dw = lax.platform_dependent(
        x, kernel, g, cpu=lambda x, w, g: _kernel_gradient(x, g, size), default=lambda x, w, g: jax.vjp(_plain, x, w)[1](g)[1]
    )
    return dx, dw


conv.defvjp(_forward, _backward)


def _input_gradient(x: Array, kernel: Array, g: Array) -> Array:
    if winograd.applies(x.shape, kernel.shape):
        return winograd.input_gradient(kernel, g)
    return _plain(g, jnp.flip(kernel, (0, 1)).swapaxes(2, 3))


def _kernel_gradient(x: Array, g: Array, size: int) -> Array:
    n, h, w, _ = x.shape
    if winograd.applies(x.shape, (size, size, x.shape[3], g.shape[3])):
        return winograd.kernel_gradient(x, g).astype(x.dtype)
    chunk = max(1, min(n, _ROWS_PER_PRODUCT // (h * w)))
    whole = n // chunk * chunk
    product = functools.partial(_kernel_gradient_of_chunk, size=size)

    def body(total: Array, pair: tuple[Array, Array]) -> tuple[Array, None]:
        return total + product(*pair), None

    xs, gs = (a[:whole].reshape(whole // chunk, chunk, *a.shape[1:]) for a in (x, g))
    total, _ = lax.scan(body, jnp.zeros((size, size, x.shape[3], g.shape[3]), jnp.float32), (xs, gs))
    if whole < n:
        total += product(x[whole:], g[whole:])
    return total.astype(x.dtype)


def _kernel_gradient_of_chunk(x: Array, g: Array, size: int) -> Array:
    """One product (k c) x (k d): columns shifted in `x`, rows shifted in `g`, so neither is copied k * k times."""
    h, w, c = x.shape[1:]
    d, p = g.shape[3], size // 2
    x = jnp.pad(x, ((0, 0), (p, p), (p, p), (0, 0)))
    columns = jnp.concatenate([x[:, :, j : j + w] for j in range(size)], -1)
    g = jnp.pad(g, ((0, 0), (2 * p, 2 * p), (0, 0), (0, 0)))
    rows = jnp.concatenate([g[:, 2 * p - i : 2 * p - i + h + 2 * p] for i in range(size)], -1)
    contract = (((0,), (0,)), ((), ()))
    product = lax.dot_general(columns.reshape(-1, size * c), rows.reshape(-1, size * d), contract, preferred_element_type=jnp.float32)
    return product.reshape(size, c, size, d).transpose(2, 0, 1, 3)
