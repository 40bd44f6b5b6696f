"""3x3 convolutions on CPU by the minimal filtering algorithm F(2x2, 3x3): 2.25 times fewer multiplications than by definition.

Winograd (Arithmetic Complexity of Computations, 1980); for convolutional networks Lavin and Gray (CVPR 2016). An output tile of 2x2
positions needs an input tile of 4x4, and `y = A' [(G k G') * (B' x B)] A` per pair of channels: sixteen products where the definition
takes thirty-six. Summed over channels, each of the sixteen is one matrix product (tiles x channels) x (channels x width). All constants
are 0, 1 and 1/2, so the rounding errors are those of the plain sum. The kernel gradient is the adjoint, `G' [V' (A g A')] G` with
`V = B' x B`, by the same tiles.

XLA:CPU computes a convolution by its definition, and the gradient of its kernel slowly inside a loop; here all three are matrix
products over a few images at a time, whose sixteen tiles stay in cache.
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float

# Elements of both sides' feature maps in one step; their sixteen tiles, four times as many floats, are 16 MiB.
_ELEMENTS_PER_STEP = 2**20
# Below this many channels, on either side, the transforms cost more than the products that they save.
_LEAST_CHANNELS = 16

_KERNEL = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], np.float32)  # G


def applies(x: Sequence[int], kernel: Sequence[int]) -> bool:
    """Whether a convolution of shapes [n, h, w, c] and [k, k, c, d] can be done by 2x2 tiles, and gains by it."""
    _, h, w, _ = x
    return tuple(kernel[:2]) == (3, 3) and h % 2 == 0 and w % 2 == 0 and min(kernel[2:]) >= _LEAST_CHANNELS


def convolve(x: Float[Array, "n h w c"], kernel: Float[Array, "3 3 c d"]) -> Float[Array, "n h w d"]:
    """Cross-correlation with zero padding to the same size; `h` and `w` even."""
    n, h, w, c = x.shape
    d = kernel.shape[3]
    # Contracted on the last axis of both sides: the order that XLA's matrix product likes best.
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
    """The gradient of `convolve` in `x`: the convolution of `g` with the kernel turned by half a circle."""
    return convolve(g, jnp.flip(kernel, (0, 1)).swapaxes(2, 3))


def kernel_gradient(x: Float[Array, "n h w c"], g: Float[Array, "n h w d"]) -> Float[Array, "3 3 c d"]:
    """The gradient of `convolve` in the kernel, float32, summed over images."""
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
    """Contracted over `axis` of both, summed in float32."""
    return lax.dot_general(a, b, (((axis,), (axis,)), ((), ())), preferred_element_type=jnp.float32)


def _split(n: int, elements: int) -> tuple[int, int]:
    """Images in a step, and steps. The size is a divisor of `n` if one is near that which suits the cache; else the last two steps share
    some images. A shorter last step would cost far more than those: a program of its own, and copies to cut and to join the maps."""
    most = min(n, max(1, _ELEMENTS_PER_STEP // elements))
    size = next(k for k in range(most, 0, -1) if n % k == 0)
    count = n // size if 4 * size >= 3 * most else -(-n // most)
    return -(-n // count), count


def _first(i: Array, size: int, n: int) -> Array:
    """The first image of step `i`: the last step ends with the last image."""
    return jnp.minimum(i * size, n - size)


def _columns(tiles: list[Array], transform: Callable[[list[Array]], list[Array]]) -> list[list[Array]]:
    """`transform` down each of the four columns of tiles given row by row; row `i` of the result holds the columns' `i`-th parts."""
    columns = [transform(tiles[j::4]) for j in range(4)]
    return [list(row) for row in zip(*columns, strict=True)]


def _input_tiles(x: Array) -> list[Array]:
    """`B' x B` of every overlapping 4x4 tile: sixteen maps [n, h / 2, w / 2, c]."""
    h, w = x.shape[1:3]
    # Sums in float32, rounded once: in bfloat16 each of the two steps would round.
    z = jnp.pad(x.astype(jnp.float32), ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows = _input_four([z[:, i : i + h - 1 : 2] for i in range(4)])
    return [tile.astype(x.dtype) for row in rows for tile in _input_four([row[:, :, j : j + w - 1 : 2] for j in range(4)])]


def _input_four(d: list[Array]) -> list[Array]:
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _output_pair(m: list[Array]) -> list[Array]:
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]


def _gradient_tiles(g: Array) -> list[Array]:
    """`A g A'` of every 2x2 tile: sixteen maps [n, h / 2, w / 2, d]; the adjoint of the output transform."""
    z = g.astype(jnp.float32)
    rows = _gradient_four([z[:, i::2] for i in range(2)])
    return [tile.astype(g.dtype) for row in rows for tile in _gradient_four([row[:, :, j::2] for j in range(2)])]


def _gradient_four(g: list[Array]) -> list[Array]:
    return [g[0], g[0] + g[1], g[0] - g[1], -g[1]]
