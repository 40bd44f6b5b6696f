"""3x3 convolutions on CPU by the minimal filtering algorithms F(2x2, 3x3) and F(4x4, 3x3), with 2.25 to 4 times fewer multiplications.

The algorithm is Winograd's (Arithmetic Complexity of Computations, 1980). Lavin and Gray (CVPR 2016, arXiv:1509.09308) use it for
convolutional networks. An output tile of 2x2 positions needs an input tile of 4x4. For one pair of channels the output tile is
`y = A' [(G k G') * (B' x B)] A`, which takes 16 multiplications where the definition takes 36. Summed over input channels, each of the 16
entries is a matrix product `(tiles x in) x (in x out)`. All constants are 0, 1, -1, 1/2 and -1/2, so rounding errors are like those of the
plain sum. The kernel gradient is the adjoint, `G' [V' (A g A')] G` with `V = B' x B`, on the same tiles.

If both sides are multiples of 4, the kernel gradient takes output tiles of 4x4. They need 36 multiplications where the definition takes
144, and 36 entries are written and read for 16 positions rather than 64. Rounding errors grow, because most constants are no longer powers
of 2, so such tiles are for float32 only. The convolution itself keeps tiles of 2x2, because larger ones made it hardly faster when
measured.

XLA:CPU computes a convolution by its definition, and the kernel gradient slowly inside a loop. Here the convolution and both gradients are
matrix products over a few images at a time, so that the 16 entries of their tiles stay in cache.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float

# Elements of the input and output maps in one step. The 16 entries of tiles of 2x2 are four times as many floats, 16 MiB.
_ELEMENTS_PER_STEP = 2**20
# With fewer input or output channels, the transforms cost more than the multiplications that they save.
_LEAST_CHANNELS = 16


class _Tiles(NamedTuple):
    """The matrices of `y = A' [(G k) * (B' x)]`, which computes one row or column of an output tile."""

    input: np.ndarray  # B'
    kernel: np.ndarray  # G
    output: np.ndarray  # A'


_TWO = _Tiles(
    input=np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]], np.float32),
    kernel=np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], np.float32),
    output=np.array([[1, 1, 1, 0], [0, 1, -1, -1]], np.float32),
)
# The algorithm multiplies two polynomials by way of their values at some points. Lavin and Gray take 0, 1, -1, 2, -2 and infinity. These
# are 0, c, -c, 1/c, -1/c and infinity with c = sqrt(2), a form that Alam, Anderson, Barabasz and Gregg propose (ACM TECS 2022,
# doi:10.1145/3524069). The root mean square error of the gradient is half as large.
_R = np.sqrt(2)
_FOUR = _Tiles(
    input=np.array(
        [
            [1, 0, -5 / 2, 0, 1, 0],
            [0, -_R, -2, _R / 2, 1, 0],
            [0, _R, -2, -_R / 2, 1, 0],
            [0, -_R / 2, -1 / 2, _R, 1, 0],
            [0, _R / 2, -1 / 2, -_R, 1, 0],
            [0, 1, 0, -5 / 2, 0, 1],
        ],
        np.float32,
    ),
    kernel=np.array(
        [
            [1, 0, 0],
            [-2 / 3, -_R / 3, -1 / 3],
            [-2 / 3, _R / 3, -1 / 3],
            [1 / 6, _R / 6, 1 / 3],
            [1 / 6, -_R / 6, 1 / 3],
            [0, 0, 1],
        ],
        np.float32,
    ),
    output=np.array(
        [
            [1, 1, 1, 1, 1, 0],
            [0, _R / 2, -_R / 2, _R, -_R, 0],
            [0, 1 / 2, 1 / 2, 2, 2, 0],
            [0, _R / 4, -_R / 4, 2 * _R, -2 * _R, 1],
        ],
        np.float32,
    ),
)


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
    return _convolved(x, kernel, 0)


def input_gradient(kernel: Float[Array, "3 3 c d"], g: Float[Array, "n h w d"]) -> Float[Array, "n h w c"]:
    """The gradient of `convolve` in `x`: the convolution of `g` with the kernel rotated by 180 degrees."""
    return _convolved(g, jnp.flip(kernel, (0, 1)), 1)


def _convolved(x: Array, kernel: Array, axis: int) -> Array:
    """Cross-correlation that sums over the first channels of the kernel (axis 0) or over its last channels (axis 1).

    So no kernel has to be transposed, which for a large one would take longer than its transform.
    """
    n, h, w, c = x.shape
    d = kernel.shape[3 - axis]
    entries = _both_sides(_TWO.kernel, [[*row] for row in kernel.astype(jnp.float32)])
    kernels = jnp.stack([entry for row in entries for entry in row]).astype(x.dtype)

    def few(x: Array) -> Array:
        pairs = zip(_input_tiles(x, _TWO), kernels, strict=True)
        tiles = [_product(v.reshape(-1, c), u, (1, axis)).reshape(-1, h // 2, w // 2, d) for v, u in pairs]
        rows = _both_sides(_TWO.output, [tiles[i : i + 4] for i in range(0, 16, 4)])
        return jnp.stack([jnp.stack(row, 3) for row in rows], 2).reshape(-1, h, w, d).astype(x.dtype)

    size, count = _split(n, h * w * (c + d))
    if size * count == n:
        return lax.map(few, x.reshape(count, size, h, w, c)).reshape(n, h, w, d)

    def some(i: Array, out: Array) -> Array:
        first = _first(i, size, n)
        return lax.dynamic_update_slice_in_dim(out, few(lax.dynamic_slice_in_dim(x, first, size)), first, 0)

    return lax.fori_loop(0, count, some, jnp.zeros((n, h, w, d), x.dtype))


def kernel_gradient(x: Float[Array, "n h w c"], g: Float[Array, "n h w d"]) -> Float[Array, "3 3 c d"]:
    """The gradient of `convolve` in the kernel, summed over the images, in float32."""
    n, h, w, c = x.shape
    d = g.shape[3]
    form = _FOUR if h % 4 == 0 and w % 4 == 0 and x.dtype == jnp.float32 else _TWO
    entries = form.output.shape[1]

    def add(total: list[Array], x: Array, g: Array) -> list[Array]:
        parts = zip(total, _input_tiles(x, form), _gradient_tiles(g, form), strict=True)
        return [t + _product(v.reshape(-1, c), m.reshape(-1, d), (0, 0)) for t, v, m in parts]

    size, count = _split(n, h * w * (c + d))
    nothing = [jnp.zeros((c, d), jnp.float32)] * entries**2
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
    rows = _both_sides(form.kernel.T, [total[i : i + entries] for i in range(0, entries**2, entries)])
    return jnp.stack([jnp.stack(row) for row in rows])


def _product(a: Array, b: Array, axes: tuple[int, int]) -> Array:
    """The product of `a` and `b`, contracted over an axis of each and summed in float32."""
    return lax.dot_general(a, b, (((axes[0],), (axes[1],)), ((), ())), preferred_element_type=jnp.float32)


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


def _combine(matrix: np.ndarray, parts: Sequence[Array]) -> list[Array]:
    """The product of a small matrix and a vector of maps. Zeros cost nothing, and ones and minus ones no multiplication."""
    sums = []
    for row in matrix:
        terms = [(factor, part) for factor, part in zip(row.tolist(), parts, strict=True) if factor]
        total = _times(*terms[0])
        for factor, part in terms[1:]:
            total = total + _times(factor, part) if factor > 0 else total - _times(-factor, part)
        sums.append(total)
    return sums


def _both_sides(matrix: np.ndarray, grid: Sequence[Sequence[Array]]) -> list[list[Array]]:
    """`M X M'` for a small matrix `M` and a grid `X` of maps, which it holds row by row."""
    columns = [_combine(matrix, column) for column in zip(*grid, strict=True)]
    return [_combine(matrix, row) for row in zip(*columns, strict=True)]


def _times(factor: float, part: Array) -> Array:
    return part if factor == 1 else -part if factor == -1 else factor * part


def _input_tiles(x: Array, form: _Tiles) -> list[Array]:
    """`B' x B` of every overlapping input tile: for each entry a map `[n, h / m, w / m, c]`, if an output tile has `m` x `m` positions."""
    h, w = x.shape[1:3]
    m, entries = form.output.shape
    # In float32, so that the result is rounded once. In bfloat16 each of the two transforms would round.
    z = jnp.pad(x.astype(jnp.float32), ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows = _combine(form.input, [z[:, i : i + h - m + 1 : m] for i in range(entries)])
    columns = ([row[:, :, j : j + w - m + 1 : m] for j in range(entries)] for row in rows)
    return [tile.astype(x.dtype) for parts in columns for tile in _combine(form.input, parts)]


def _gradient_tiles(g: Array, form: _Tiles) -> list[Array]:
    """`A g A'` of every output tile, the adjoint of the output transform: for each entry a map `[n, h / m, w / m, d]`."""
    m = len(form.output)
    z = g.astype(jnp.float32)
    rows = _combine(form.output.T, [z[:, i::m] for i in range(m)])
    columns = ([row[:, :, j::m] for j in range(m)] for row in rows)
    return [tile.astype(g.dtype) for parts in columns for tile in _combine(form.output.T, parts)]
