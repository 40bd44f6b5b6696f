"""The convolution of every layer, fast on CPU too, where its gradients must stay so inside `lax.scan`.

XLA:CPU rewrites the odd layouts of a convolution's gradients into its fast form only in the entry computation, not in a loop body
(jax issue 12868), where they run about 150 times slower. Here, on CPU, a convolution and its gradients are written in forms that are
fast anywhere: by `winograd` where that applies; else the input gradient is plain NHWC/HWIO convolutions with parts of the flipped
kernel, the kernel gradient matrix products over a few images at a time, so that their shifted copies stay in cache. GPU and TPU get
XLA's own convolution and gradients: the choice is made where the program is lowered, not where it is traced. A kernel of one position
is a matrix product everywhere.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from vffjax.ops import winograd

# Rows (image positions) per matrix product of the kernel gradient; 4,096 rows of 3 x 48 floats are 2 MiB, one L2 cache.
_ROWS_PER_PRODUCT = 4096
# Elements of the copied patches per matrix product where the stride is above 1; 2 MiB of floats.
_ELEMENTS_PER_PRODUCT = 2**19
_LAYOUT = ("NHWC", "HWIO", "NHWC")


def conv(x: Float[Array, "batch h w c"], kernel: Float[Array, "k k c d"], stride: int = 1) -> Float[Array, "batch h2 w2 d"]:
    """Cross-correlation with `k // 2` zeros on every side, at each `stride`-th position from the first; `k` is odd.

    So `h2 = ceil(h / stride)`, as in `torch.nn.Conv2d`; "SAME" would pad an even map less at its start. Differentiable once, in reverse
    mode.
    """
    if kernel.shape[0] == 1:
        return _pointwise(x[:, ::stride, ::stride], kernel)
    return _conv(x, kernel, stride)


def _plain(x: Array, kernel: Array, stride: int = 1) -> Array:
    p = kernel.shape[0] // 2
    return lax.conv_general_dilated(x, kernel, (stride, stride), ((p, p), (p, p)), dimension_numbers=_LAYOUT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv(x: Array, kernel: Array, stride: int) -> Array:
    # In an exported program the batch size may be a symbol, of which no steps can be made.
    if stride > 1 or not isinstance(x.shape[0], int) or not winograd.applies(x.shape, kernel.shape):
        return _plain(x, kernel, stride)
    return lax.platform_dependent(x, kernel, cpu=winograd.convolve, default=_plain)


def _forward(x: Array, kernel: Array, stride: int) -> tuple[Array, tuple[Array, Array]]:
    return _conv(x, kernel, stride), (x, kernel)


def _backward(stride: int, residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    size = kernel.shape[0]
    plain = functools.partial(_plain, stride=stride)
    # Two separate choices: where nobody asks for the input's gradient (the first layer of a group) it is dead code.
    dx = lax.platform_dependent(
        x, kernel, g, cpu=functools.partial(_input_gradient, stride=stride), default=lambda x, w, g: jax.vjp(plain, x, w)[1](g)[0]
    )
    dw = lax.platform_dependent(
        x, kernel, g, cpu=lambda x, w, g: _kernel_gradient(x, g, size, stride), default=lambda x, w, g: jax.vjp(plain, x, w)[1](g)[1]
    )
    return dx, dw


_conv.defvjp(_forward, _backward)


@jax.custom_vjp
def _pointwise(x: Array, kernel: Array) -> Array:
    return _product(x, kernel[0, 0], (3,), (0,)).astype(x.dtype)


def _pointwise_backward(residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    # Not left to autodiff, which would multiply a bfloat16 operand by the float32 gradient of the sum before it is rounded.
    x, kernel = residuals
    dx = _product(g, kernel[0, 0], (3,), (1,)).astype(x.dtype)
    return dx, _product(x, g, (0, 1, 2), (0, 1, 2))[None, None].astype(kernel.dtype)


_pointwise.defvjp(lambda x, kernel: (_pointwise(x, kernel), (x, kernel)), _pointwise_backward)


def _product(a: Array, b: Array, axes_of_a: tuple[int, ...], axes_of_b: tuple[int, ...]) -> Array:
    """Contracted over the given axes, summed in float32."""
    return lax.dot_general(a, b, ((axes_of_a, axes_of_b), ((), ())), preferred_element_type=jnp.float32)


def _input_gradient(x: Array, kernel: Array, g: Array, stride: int) -> Array:
    """Interleaved from `stride` x `stride` plain convolutions, each with the part of the kernel that meets every `stride`-th position."""
    if stride == 1 and winograd.applies(x.shape, kernel.shape):
        return winograd.input_gradient(kernel, g)
    flipped = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    if stride == 1:
        return _plain(g, flipped)
    n, h, w, c = x.shape
    columns = [[_phase(g, flipped, (a, b), stride) for b in range(stride)] for a in range(stride)]
    rows = jnp.stack([jnp.stack(row, 3) for row in columns], 2)
    return rows.reshape(n, stride * g.shape[1], stride * g.shape[2], c)[:, :h, :w]


def _phase(g: Array, flipped: Array, phase: tuple[int, int], stride: int) -> Array:
    """The input gradient at positions `stride * (q, r) + phase` for every position `(q, r)` of `g`."""
    p = len(flipped) // 2
    part = flipped[(p - phase[0]) % stride :: stride, (p - phase[1]) % stride :: stride]
    if 0 in part.shape:  # a stride above the kernel's size steps over these positions
        return jnp.zeros((*g.shape[:3], flipped.shape[3]), g.dtype)
    after = [(p + a) // stride for a in phase]
    padding = [(taps - 1 - end, end) for taps, end in zip(part.shape[:2], after, strict=True)]
    return lax.conv_general_dilated(g, part, (1, 1), padding, dimension_numbers=_LAYOUT)


def _kernel_gradient(x: Array, g: Array, size: int, stride: int) -> Array:
    n, h, w, c = x.shape
    d = g.shape[3]
    if stride == 1 and winograd.applies(x.shape, (size, size, c, d)):
        return winograd.kernel_gradient(x, g).astype(x.dtype)
    if stride == 1:
        most, product = _ROWS_PER_PRODUCT // (h * w), functools.partial(_kernel_gradient_of_chunk, size=size)
    else:
        most = _ELEMENTS_PER_PRODUCT // (g.shape[1] * g.shape[2] * size * size * c)
        product = functools.partial(_strided_kernel_gradient_of_chunk, size=size, stride=stride)
    chunk = max(1, min(n, most))
    whole = n // chunk * chunk

    def body(total: Array, pair: tuple[Array, Array]) -> tuple[Array, None]:
        return total + product(*pair), None

    xs, gs = (a[:whole].reshape(whole // chunk, chunk, *a.shape[1:]) for a in (x, g))
    total, _ = lax.scan(body, jnp.zeros((size, size, c, d), jnp.float32), (xs, gs))
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
    product = _product(columns.reshape(-1, size * c), rows.reshape(-1, size * d), (0,), (0,))
    return product.reshape(size, c, size, d).transpose(2, 0, 1, 3)


def _strided_kernel_gradient_of_chunk(x: Array, g: Array, size: int, stride: int) -> Array:
    """One product (k k c) x d: shifts of `g` too, as above, would need a product for every offset of the rows within the stride."""
    c, p = x.shape[3], size // 2
    h2, w2, d = g.shape[1:]
    x = jnp.pad(x, ((0, 0), (p, p), (p, p), (0, 0)))
    ends = stride * (h2 - 1) + 1, stride * (w2 - 1) + 1
    patches = [x[:, i : i + ends[0] : stride, j : j + ends[1] : stride] for i in range(size) for j in range(size)]
    product = _product(jnp.concatenate(patches, -1).reshape(-1, size * size * c), g.reshape(-1, d), (0,), (0,))
    return product.reshape(size, size, c, d)
