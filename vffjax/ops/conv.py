"""The convolution of every layer, with gradients that are fast inside a loop on CPU too.

XLA:CPU has a fast convolution for one layout. It rewrites the other layouts, which gradients need, into that one only outside of loops. In
a loop body, such as that of `lax.scan`, they run about 150 times slower (jax issue 12868). On CPU this module therefore writes the
convolution and its gradients in forms that are fast everywhere:

- If `winograd.applies`, all three are computed by `winograd`.
- Otherwise the convolution is XLA's own. The input gradient consists of plain NHWC/HWIO convolutions with parts of the flipped kernel.
  The kernel gradient is a matrix product over a few images at a time, so that the shifted copies that it needs stay in cache.

GPU and TPU use XLA's convolution and gradients. The choice is made when a program is lowered for a platform, not when it is traced. A 1x1
convolution is a matrix product on every backend.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

from vffjax.ops import winograd
from vffjax.ops.pooling import on_gpus
from vffjax.ops.rows import by_device, divided

# Rows (positions of images) in a matrix product of the kernel gradient: 4,096 rows of 3 x 48 floats take 2 MiB, the size of an L2 cache.
_ROWS_PER_PRODUCT = 4096
# Elements of the copied patches in a matrix product if the stride is above 1: 2 MiB of floats.
_ELEMENTS_PER_PRODUCT = 2**19
_LAYOUT = ("NHWC", "HWIO", "NHWC")


def conv(x: Float[Array, "batch h w c"], kernel: Float[Array, "k k c d"], stride: int = 1) -> Float[Array, "batch h2 w2 d"]:
    """Cross-correlation with zero padding, as in `torch.nn.Conv2d` with `padding = k // 2`.

    The map is padded by `k // 2` zeros on every side, and the result is computed at every `stride`-th position from the first. (The
    padding "SAME" of XLA would add less at the start of an even map with a stride.) It can be differentiated once, in reverse mode.

    Args:
        x: feature maps, float32 or bfloat16.
        kernel: `[k, k, in, out]` with an odd `k`. It is cast to the dtype of `x`, and its gradient has its own dtype.
        stride: positions from one result to the next.

    Returns:
        Feature maps in the dtype of `x`, with `h2 = ceil(h / stride)` and `w2 = ceil(w / stride)`.

    >>> conv(jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 1)), stride=2)[0, :, :, 0]
    Array([[4., 6.],
           [6., 9.]], dtype=float32)
    """
    if kernel.shape[0] == 1:
        return _pointwise(x[:, ::stride, ::stride], kernel)
    return _conv(x, kernel, stride)


def _plain(x: Array, kernel: Array, stride: int = 1) -> Array:
    p = kernel.shape[0] // 2
    return lax.conv_general_dilated(x, kernel, (stride, stride), ((p, p), (p, p)), dimension_numbers=_LAYOUT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv(x: Array, kernel: Array, stride: int) -> Array:
    kernel = _as_stored(kernel).astype(x.dtype)
    # In an exported program the batch size may be a symbol. Winograd's loop over a few images at a time needs a number.
    if stride > 1 or not isinstance(x.shape[0], int) or not winograd.applies(x.shape, kernel.shape):
        return _plain(x, kernel, stride)
    return lax.platform_dependent(x, kernel, cpu=_winograd, default=_plain)


def _winograd(x: Array, kernel: Array) -> Array:
    # A function of the module and no lambda, so that layers of the same shapes share one trace.
    return by_device(winograd.convolve, (x,), (kernel,))


def _forward(x: Array, kernel: Array, stride: int) -> tuple[Array, tuple[Array, Array]]:
    return _conv(x, kernel, stride), (x, kernel)


def _backward(stride: int, residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    of_input, of_kernel = _gradients(kernel.shape[0], stride, kernel.dtype)
    rounded = _as_stored(kernel).astype(x.dtype)
    # The two gradients are chosen separately, so that the compiler can remove one that nobody uses. The first layer of a group needs no
    # gradient of its input.
    return lax.platform_dependent(x, rounded, g, **of_input), _as_stored(lax.platform_dependent(x, rounded, g, **of_kernel))


def _as_stored(kernel: Array) -> Array:
    """`kernel`; on several GPUs with the hint to the compiler that its axes lie in memory in their own order.

    A GPU's convolution wants the output channels first. Without the hint XLA puts kernels, their gradients and the optimizer's averages of
    them into that order before a segment, and all of them are in memory twice until its end. This part of the memory does not shrink with
    the number of devices. With the hint each step reorders the kernels anew. On one GPU that is not worth the launches
    (docs/performance.md).
    """
    return lax.platform_dependent(kernel, **on_gpus(_in_order), default=_as_it_is) if divided() else kernel


def _in_order(kernel: Array) -> Array:
    return with_layout_constraint(kernel, Layout(tuple(range(kernel.ndim))))


def _as_it_is(kernel: Array) -> Array:
    return kernel


@functools.cache  # so that layers of the same shapes are given the same functions, and share one trace
def _gradients(size: int, stride: int, dtype: np.dtype) -> tuple[dict[str, Callable[..., Array]], dict[str, Callable[..., Array]]]:
    """The gradients in the input and in the kernel by platform, as functions of input, kernel and result gradient."""
    plain = functools.partial(_plain, stride=stride)

    def input_gradient(x: Array, g: Array, kernel: Array) -> Array:
        return _input_gradient(x, g, kernel, stride)

    def kernel_gradient(x: Array, g: Array) -> Array:
        return _kernel_gradient(x, g, size, stride)

    of_input = {
        "cpu": lambda x, w, g: by_device(input_gradient, (x, g), (w,)),
        "default": lambda x, w, g: jax.vjp(plain, x, w)[1](g)[0],
    }

    def rounded_kernel_gradient(x: Array, g: Array, w: Array) -> Array:
        return jax.vjp(plain, x, w)[1](g)[1].astype(np.promote_types(w.dtype, np.float32))

    # On CPU and GPU the sum is rounded to the dtype of the map, as the gradient that XLA derives itself is. Of several GPUs each rounds its
    # own part, and the parts are added in float32; by itself XLA would add them in bfloat16.
    of_kernel = {
        "cpu": lambda x, w, g: by_device(kernel_gradient, (x, g), total=True).astype(x.dtype).astype(dtype),
        "tpu": lambda x, w, g: _kernel_gradient_by_one_convolution(x, g, size, stride).astype(dtype),
        "default": lambda x, w, g: by_device(rounded_kernel_gradient, (x, g), (w,), total=True).astype(dtype),
    }
    return of_input, of_kernel


_conv.defvjp(_forward, _backward)


@jax.custom_vjp
def _pointwise(x: Array, kernel: Array) -> Array:
    return _product(x, kernel[0, 0].astype(x.dtype), (3,), (0,)).astype(x.dtype)


def _pointwise_backward(residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    # Automatic differentiation would multiply a bfloat16 operand by the gradient of the float32 sum before that gradient is rounded.
    x, kernel = residuals
    dx = _product(g, kernel[0, 0].astype(x.dtype), (3,), (1,)).astype(x.dtype)
    dw = _product(x, g, (0, 1, 2), (0, 1, 2))[None, None]
    return dx, lax.platform_dependent(
        dw, cpu=lambda dw: dw.astype(x.dtype).astype(kernel.dtype), default=lambda dw: dw.astype(kernel.dtype)
    )


_pointwise.defvjp(lambda x, kernel: (_pointwise(x, kernel), (x, kernel)), _pointwise_backward)


def _product(a: Array, b: Array, axes_of_a: tuple[int, ...], axes_of_b: tuple[int, ...]) -> Array:
    """The product of `a` and `b`, contracted over the given axes and summed in float32."""
    return lax.dot_general(a, b, ((axes_of_a, axes_of_b), ((), ())), preferred_element_type=jnp.float32)


def _input_gradient(x: Array, g: Array, kernel: Array, stride: int) -> Array:
    """The gradient of the convolution in `x`.

    With a stride it is interleaved from `stride` x `stride` plain convolutions, each with the taps of the kernel that meet one phase of
    the positions.
    """
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
    if 0 in part.shape:  # the stride is larger than the kernel and skips these positions
        return jnp.zeros((*g.shape[:3], flipped.shape[3]), g.dtype)
    after = [(p + a) // stride for a in phase]
    padding = [(taps - 1 - end, end) for taps, end in zip(part.shape[:2], after, strict=True)]
    return lax.conv_general_dilated(g, part, (1, 1), padding, dimension_numbers=_LAYOUT)


def _kernel_gradient_by_one_convolution(x: Array, g: Array, size: int, stride: int) -> Array:
    """The gradient of the convolution in its kernel as one convolution of `x` by `g`, in float32 whatever the dtype of these.

    XLA adds the gradients of several devices in the dtype of this convolution's result. In bfloat16 each of them would be rounded first.
    """
    p = size // 2
    ends = [stride * (out - 1) + size - side - p for side, out in zip(x.shape[1:3], g.shape[1:3], strict=True)]
    return lax.conv_general_dilated(
        x,
        g,
        (1, 1),
        [(p, end) for end in ends],
        rhs_dilation=(stride, stride),
        dimension_numbers=("CHWN", "IHWO", "HWNC"),
        preferred_element_type=np.promote_types(x.dtype, np.float32),
    )


def _kernel_gradient(x: Array, g: Array, size: int, stride: int) -> Array:
    """The gradient of the convolution in its kernel, summed in float32 over a few images at a time."""
    n, h, w, c = x.shape
    d = g.shape[3]
    if stride == 1 and winograd.applies(x.shape, (size, size, c, d)):
        return winograd.kernel_gradient(x, g)
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
    return total


def _kernel_gradient_of_chunk(x: Array, g: Array, size: int) -> Array:
    """The kernel gradient of a few images as one product `(k c) x (k d)`.

    It shifts the columns of `x` and the rows of `g`, so that each is copied `k` times and neither `k * k` times.
    """
    h, w, c = x.shape[1:]
    d, p = g.shape[3], size // 2
    x = jnp.pad(x, ((0, 0), (p, p), (p, p), (0, 0)))
    columns = jnp.concatenate([x[:, :, j : j + w] for j in range(size)], -1)
    g = jnp.pad(g, ((0, 0), (2 * p, 2 * p), (0, 0), (0, 0)))
    rows = jnp.concatenate([g[:, 2 * p - i : 2 * p - i + h + 2 * p] for i in range(size)], -1)
    product = _product(columns.reshape(-1, size * c), rows.reshape(-1, size * d), (0,), (0,))
    return product.reshape(size, c, size, d).transpose(2, 0, 1, 3)


def _strided_kernel_gradient_of_chunk(x: Array, g: Array, size: int, stride: int) -> Array:
    """The strided kernel gradient of a few images as one product `(k k c) x d`.

    Shifting `g` as well, as without a stride, would take one product for each phase of the rows.
    """
    c, p = x.shape[3], size // 2
    h2, w2, d = g.shape[1:]
    x = jnp.pad(x, ((0, 0), (p, p), (p, p), (0, 0)))
    ends = stride * (h2 - 1) + 1, stride * (w2 - 1) + 1
    patches = [x[:, i : i + ends[0] : stride, j : j + ends[1] : stride] for i in range(size) for j in range(size)]
    product = _product(jnp.concatenate(patches, -1).reshape(-1, size * size * c), g.reshape(-1, d), (0,), (0,))
    return product.reshape(size, size, c, d)
