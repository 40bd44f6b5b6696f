"""3x3 convolutions on CPU by the minimal filtering algorithm F(2x2, 3x3), with 2.25 times fewer multiplications than the definition.

The algorithm is Winograd's (Arithmetic Complexity of Computations, 1980). Lavin and Gray (CVPR 2016, arXiv:1509.09308) use it for
convolutional networks. An output tile of 2x2 positions needs an input tile of 4x4. For one pair of channels the output tile is
`y = A' [(G k G') * (B' x B)] A`, which takes 16 multiplications where the definition takes 36. Summed over input channels, each of the 16
entries is a matrix product `(tiles x in) x (in x out)`. All constants are 0, 1, -1, 1/2 and -1/2, so rounding errors are like those of the
plain sum. The kernel gradient is the adjoint, `G' [V' (A g A')] G` with `V = B' x B`, on the same tiles.

XLA:CPU computes a convolution by its definition, and the kernel gradient slowly inside a loop. Here the convolution and both gradients are
matrix products over a few images at a time, so that the 16 entries of their tiles stay in cache.
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float

# Elements of the input and output maps in one step. The 16 entries of their tiles are four times as many floats, 16 MiB.
_ELEMENTS_PER_STEP = 2**20
# With fewer input or output channels, the transforms cost more than the multiplications that they save.
_LEAST_CHANNELS = 16

_KERNEL = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], np.float32)  # G


def applies(x: Sequence[int], kernel: Sequence[int]) -> bool:
    """Whether the algorithm can compute a convolution without stride, and is faster than the definition.

    Args:
        x: shape of the feature maps, `[n, h, w, c]`.
        kernel: shape of the kernel, `[k, k, c, d]`.

    >>> applies((8, 32, 32, 16), (3, 3, 16, 64)), applies((8, 32, 32, 3), (3, 3, 3, 64))
    (True, False)
    """
    _, h, w, _ = x
    return tuple(kernel[:2]) == (3, 3) and h % 2 == 0 and w % 2 == 0 and min(kernel[2:]) >= _LEAST_CHANNELS


def convolve(x: Float[Array, "n h w c"], kernel: Float[Array, "3 3 c d"]) -> Float[Array, "n h w d"]:
    """Cross-correlation with zero padding to the same size, for even `h` and `w`. The result has the dtype of `x`."""
    n, h, w, c = x.shape
    d = kernel.shape[3]
    # Input channels come last, because XLA's matrix product is fastest if both operands are contracted over their last axes.
    products = jnp.einsum("ai,bj,ijcd->abdc", _KERNEL, _KERNEL, kernel.astype(jnp.float32), precision="highest")
    products = products.reshape(16, d, c).astype(x.dtype)

    def few(x: Array) -> Array:
        pairs = zip(_input_tiles(x), products, strict=True)
        tiles = [_product(v.reshape(-1, c), u, 1).reshape(-1, h // 2, w // 2, d) for v, u in pairs]
        rows = _columns(tiles, _output_pair)
        return jnp.stack([jnp.stack(_output_pair(row), 3) for row in rows], 2).reshape(-1, h, w, d).astype(x.dtype)

    size, count = _split(n, h * w * (c + d))
    if size * count == n:
        return lax.map(few, x.reshape(count, size, h, w, c)).reshape(n, h, w, d)

    def some(i: Array, out: Array) -> Array:
        first = _first(i, size, n)
        return lax.dynamic_update_slice_in_dim(out, few(lax.dynamic_slice_in_dim(x, first, size)), first, 0)

    return lax.fori_loop(0, count, some, jnp.zeros((n, h, w, d), x.dtype))


def input_gradient(kernel: Float[Array, "3 3 c d"], g: Float[Array, "n h w d"]) -> Float[Array, "n h w c"]:
    """The gradient of `convolve` in `x`: the convolution of `g` with the kernel rotated by 180 degrees."""
    return convolve(g, jnp.flip(kernel, (0, 1)).swapaxes(2, 3))


def kernel_gradient(x: Float[Array, "n h w c"], g: Float[Array, "n h w d"]) -> Float[Array, "3 3 c d"]:
    """The gradient of `convolve` in the kernel, summed over the images, in float32."""
    n, h, w, c = x.shape
    d = g.shape[3]

    def add(total: list[Array], x: Array, g: Array) -> list[Array]:
        parts = zip(total, _input_tiles(x), _gradient_tiles(g), strict=True)
        return [t + _product(v.reshape(-1, c), m.reshape(-1, d), 0) for t, v, m in parts]

    size, count = _split(n, h * w * (c + d))
    nothing = [jnp.zeros((c, d), jnp.float32)] * 16
    if size * count == n:
        few = x.reshape(count, size, h, w, c), g.reshape(count, size, h, w, d)
        total, _ = lax.scan(lambda total, pair: (add(total, *pair), None), nothing, few)
    else:

        def some(i: Array, total: list[Array]) -> list[Array]:
            first = _first(i, size, n)
            own = (first + jnp.arange(size, dtype=first.dtype) >= i * size).reshape(size, 1, 1, 1)
            some_x, some_g = (lax.dynamic_slice_in_dim(a, first, size) for a in (x, g))
            return add(total, some_x, jnp.where(own, some_g, jnp.zeros((), g.dtype)))

        total = lax.fori_loop(0, count, some, nothing)
    return jnp.einsum("ai,bj,abcd->ijcd", _KERNEL, _KERNEL, jnp.stack(total).reshape(4, 4, c, d), precision="highest")


def _product(a: Array, b: Array, axis: int) -> Array:
    """The product of `a` and `b`, contracted over `axis` of both and summed in float32."""
    return lax.dot_general(a, b, (((axis,), (axis,)), ((), ())), preferred_element_type=jnp.float32)


def _split(n: int, elements: int) -> tuple[int, int]:
    """How many images one step takes, and how many steps there are.

    If a divisor of `n` is near the size that suits the cache, that divisor is the size. Otherwise the last two steps share some images. A
    shorter last step would cost far more than computing these twice, because it would need a program of its own and copies that cut and
    join the maps.

    Args:
        n: images in the batch.
        elements: elements of the input and output maps of one image.
    """
    most = min(n, max(1, _ELEMENTS_PER_STEP // elements))
    size = next(k for k in range(most, 0, -1) if n % k == 0)
    count = n // size if 4 * size >= 3 * most else -(-n // most)
    return -(-n // count), count


def _first(i: Array, size: int, n: int) -> Array:
    """The first image of step `i`. The last step ends with the last image."""
    return jnp.minimum(i * size, n - size)


def _columns(tiles: list[Array], transform: Callable[[list[Array]], list[Array]]) -> list[list[Array]]:
    """Applies `transform` to each column of a 4x4 tile, whose 16 entries are given row by row; returns the rows of the result."""
    columns = [transform(tiles[j::4]) for j in range(4)]
    return [list(row) for row in zip(*columns, strict=True)]


def _input_tiles(x: Array) -> list[Array]:
    """`B' x B` of every overlapping 4x4 tile: 16 maps `[n, h / 2, w / 2, c]`, one for each entry."""
    h, w = x.shape[1:3]
    # In float32, so that the result is rounded once. In bfloat16 each of the two transforms would round.
    z = jnp.pad(x.astype(jnp.float32), ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows = _input_four([z[:, i : i + h - 1 : 2] for i in range(4)])
    return [tile.astype(x.dtype) for row in rows for tile in _input_four([row[:, :, j : j + w - 1 : 2] for j in range(4)])]


def _input_four(d: list[Array]) -> list[Array]:
    """`B' d`, for one row or column of a tile."""
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _output_pair(m: list[Array]) -> list[Array]:
    """`A' m`, for one row or column of a tile."""
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]


def _gradient_tiles(g: Array) -> list[Array]:
    """`A g A'` of every 2x2 tile, the adjoint of the output transform: 16 maps `[n, h / 2, w / 2, d]`, one for each entry."""
    z = g.astype(jnp.float32)
    rows = _gradient_four([z[:, i::2] for i in range(2)])
    return [tile.astype(g.dtype) for row in rows for tile in _gradient_four([row[:, :, j::2] for j in range(2)])]


def _gradient_four(g: list[Array]) -> list[Array]:
    """`A g`, for one row or column of a tile."""
    return [g[0], g[0] + g[1], g[0] - g[1], -g[1]]
