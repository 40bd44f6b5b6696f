"""TrivialAugment: one randomly chosen operation of random strength on each image (S. Müller and F. Hutter, 2021, arXiv:2103.10158).

The operations and the range of each are those of the paper's wide space, with 31 strengths. The paper defines operations by the Python
Imaging Library, whose formulas these are, in whole numbers, so that every backend finds the same bytes. An image takes its nearest
pixels, and black where it has none.

We differ in that a shear keeps the centre of the image in its place and not the first corner, and that a small image is shifted by at most
its own side. Where an image has not three channels, its grey is the mean of its channels.

An operation is of one of three kinds: it resamples the image, blends it with another one, or exchanges its bytes by a table. All three are
computed for every image, once, and one is taken. So a batch costs the same whatever was drawn.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray, UInt8

from vffjax.ops.fence import as_branch

OPERATIONS = (
    *("identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color", "contrast", "sharpness"),
    *("posterize", "solarize", "autocontrast", "equalize"),
)
STRENGTHS = 31  # 0 to 30
SHEAR, SHIFT, ANGLE = 0.99, 32, 135.0  # at the largest strength: a ratio, pixels, degrees
_NUMBER = {name: number for number, name in enumerate(OPERATIONS)}
_LAST_MOTION, _LAST_BLEND = _NUMBER["rotate"], _NUMBER["sharpness"]  # operations of one kind follow each other
_THOUSANDTHS = 33  # by which one step of strength changes the weight of a blend
_ONE = 14  # bits behind the point of the numbers of a resampling; 4,096 pixels then fit 32 bits


def trivial_augment(key: PRNGKeyArray, images: UInt8[Array, "batch h w c"]) -> UInt8[Array, "batch h w c"]:
    """Changes each image by an operation, a strength and a sign of its own, drawn uniformly by `key`."""
    highs = (len(OPERATIONS), STRENGTHS, 2)
    keys = (jax.random.fold_in(key, i) for i in range(3))
    operation, strength, sign = (
        jax.random.randint(key, images.shape[:1], 0, high, jnp.int32) for key, high in zip(keys, highs, strict=True)
    )
    return operate(images, operation, strength, 2 * sign - 1)


def operate(
    images: UInt8[Array, "batch h w c"], operation: Int[Array, " batch"], strength: Int[Array, " batch"], sign: Int[Array, " batch"]
) -> UInt8[Array, "batch h w c"]:
    """Images after one operation each.

    Args:
        images: as bytes.
        operation: its number in `OPERATIONS`.
        strength: from 0 to 30.
        sign: 1 or -1: the direction of a shear, a shift or a rotation, and whether a blend strengthens or weakens.
    """
    tables = jax.vmap(_table)
    # XLA:CPU would otherwise compute an entry of a table anew for each pixel that it is looked up for, which took twice as long in all.
    of_all = jax.lax.platform_dependent(images, operation, strength, cpu=functools.partial(as_branch, tables, operation[0]), default=tables)
    return jax.vmap(_one)(images, operation, strength, sign, of_all)


def _one(image: Array, operation: Array, strength: Array, sign: Array, table: Array) -> Array:
    moved = _resampled(image, operation, strength, sign)
    blended = _blended(image, operation, strength, sign)
    exchanged = _looked_up(image, table)
    return jnp.where(operation <= _LAST_MOTION, moved, jnp.where(operation <= _LAST_BLEND, blended, exchanged))


def _motions(h: int, w: int) -> Int[np.ndarray, "operations strengths 6"]:
    """For each operation and strength the numbers `(xx, xy, x, yx, yy, y)`, in units of `2**-_ONE`, of the affine map from a pixel of the
    result to its source. Positions are counted in half pixels from the centre of the image."""
    found = np.tile([1.0, 0.0, 0.0, 0.0, 1.0, 0.0], (len(OPERATIONS), STRENGTHS, 1))
    share = np.linspace(0, 1, STRENGTHS)
    angle = np.deg2rad(ANGLE * share)
    changes = {"shear_x": {1: SHEAR * share}, "shear_y": {3: SHEAR * share}}
    changes |= {"translate_x": {2: 2 * min(SHIFT, w) * share}, "translate_y": {5: 2 * min(SHIFT, h) * share}}
    changes |= {"rotate": {0: np.cos(angle), 1: np.sin(angle), 3: -np.sin(angle), 4: np.cos(angle)}}
    for name, columns in changes.items():
        for column, values in columns.items():
            found[_NUMBER[name], :, column] = values
    return np.rint(found * 2**_ONE).astype(np.int32)


def _resampled(image: Array, operation: Array, strength: Array, sign: Array) -> Array:
    h, w, c = image.shape
    motion = jnp.asarray(_motions(h, w))[operation, strength] * jnp.where(jnp.array([True, False, False, False, True, False]), 1, sign)
    x, y = (2 * jnp.arange(side, dtype=jnp.int32) - (side - 1) for side in (w, h))
    x, y = x[None, :], y[:, None]
    # The nearest pixel of a position p in half pixels is floor((p + side) / 2); a shift of bits is a floor.
    columns = (motion[0] * x + motion[1] * y + motion[2] + (w << _ONE)) >> (_ONE + 1)
    rows = (motion[3] * x + motion[4] * y + motion[5] + (h << _ONE)) >> (_ONE + 1)
    inside = (columns >= 0) & (columns < w) & (rows >= 0) & (rows < h)
    pixels = image.reshape(h * w, c)[jnp.where(inside, rows * w + columns, 0)]
    return jnp.where(inside[:, :, None], pixels, jnp.uint8(0))


def _blended(image: Array, operation: Array, strength: Array, sign: Array) -> Array:
    """`other + weight (image - other)`, rounded down, where the weight is between 0.01 and 1.99."""
    weight = 1000 + _THOUSANDTHS * sign * strength
    wide = image.astype(jnp.int32)
    grey = _grey(wide)
    other = jnp.where(operation == _NUMBER["sharpness"], _smooth(wide), 0)
    other = jnp.where(operation == _NUMBER["color"], jnp.broadcast_to(grey, wide.shape), other)
    other = jnp.where(operation == _NUMBER["contrast"], _rounded_mean(grey), other)
    found = 1000 * other + weight * (wide - other)
    return jax.lax.div(jnp.clip(found, 0, 255_999), jnp.int32(1000)).astype(jnp.uint8)


def _grey(image: Int[Array, "h w c"]) -> Int[Array, "h w 1"]:
    """Luma by ITU-R BT.601 in 16 bits, or the mean of the channels if there are not three."""
    channels = image.shape[2]
    if channels != 3:
        return (2 * image.sum(axis=2, keepdims=True, dtype=jnp.int32) + channels) // (2 * channels)
    red, green, blue = (image[:, :, i : i + 1] for i in range(3))
    return (19_595 * red + 38_470 * green + 7_471 * blue + 2**15) >> 16


def _rounded_mean(grey: Int[Array, "h w 1"]) -> Int[Array, ""]:
    # Without a sign, 32 bits hold the sum of 4,096 x 4,096 bytes.
    total = grey.astype(jnp.uint32).sum(dtype=jnp.uint32)
    return ((total + jnp.uint32(grey.size // 2)) // jnp.uint32(grey.size)).astype(jnp.int32)


def _smooth(image: Int[Array, "h w c"]) -> Int[Array, "h w c"]:
    """The mean of 3x3 pixels in which the middle one counts five times, rounded. Pixels at the border stay."""
    h, w, _ = image.shape
    if min(h, w) < 3:
        return image
    lines = image[:-2] + image[1:-1] + image[2:]
    total = lines[:, :-2] + lines[:, 1:-1] + lines[:, 2:] + 4 * image[1:-1, 1:-1]
    # Padded and chosen, which XLA computes in one loop with what follows; writing the inner pixels took three times as long on CPU.
    means = jnp.pad(jax.lax.div(2 * total + 13, jnp.int32(26)), ((1, 1), (1, 1), (0, 0)))
    y, x = (jnp.arange(side, dtype=jnp.int32) for side in (h, w))
    border = ((y == 0) | (y == h - 1))[:, None, None] | ((x == 0) | (x == w - 1))[None, :, None]
    return jnp.where(border, image, means)


def _table(image: UInt8[Array, "h w c"], operation: Array, strength: Array) -> UInt8[Array, "256 c"]:
    """What becomes of each byte in each channel."""
    c = image.shape[2]
    levels = jnp.broadcast_to(jnp.arange(256, dtype=jnp.int32)[:, None], (256, c))
    counts = jnp.zeros((256, c), jnp.int32).at[image.reshape(-1, c), jnp.arange(c, dtype=jnp.int32)[None]].add(1)
    posterized = levels & -(1 << ((2 * strength + 5) // 10))  # keeps 8 to 2 bits
    solarized = jnp.where(2 * levels < 510 - 17 * strength, levels, 255 - levels)
    found = jnp.where(operation == _NUMBER["posterize"], posterized, levels)
    found = jnp.where(operation == _NUMBER["solarize"], solarized, found)
    found = jnp.where(operation == _NUMBER["autocontrast"], _stretched(counts, levels), found)
    found = jnp.where(operation == _NUMBER["equalize"], _equalized(counts, levels), found)
    return jnp.clip(found, 0, 255).astype(jnp.uint8)


def _stretched(counts: Int[Array, "256 c"], levels: Int[Array, "256 c"]) -> Int[Array, "256 c"]:
    """The least byte of a channel becomes 0 and the greatest 255. A channel of one byte stays. `counts` is how often each byte occurs."""
    low = jnp.where(counts > 0, levels, 255).min(axis=0, keepdims=True)
    high = jnp.where(counts > 0, levels, 0).max(axis=0, keepdims=True)
    return jnp.where(high > low, 255 * (levels - low) // jnp.maximum(high - low, 1), levels)


def _equalized(counts: Int[Array, "256 c"], levels: Int[Array, "256 c"]) -> Int[Array, "256 c"]:
    """A byte becomes the share of pixels below it. A channel stays whose pixels, without the brightest, are fewer than 255."""
    below = jnp.cumsum(counts, axis=0, dtype=jnp.int32) - counts
    step = below.max(axis=0, where=counts > 0, initial=0)[None] // 255
    return jnp.where(step > 0, (step // 2 + below) // jnp.maximum(step, 1), levels)


def _looked_up(image: UInt8[Array, "h w c"], table: UInt8[Array, "256 c"]) -> UInt8[Array, "h w c"]:
    return table[image, jnp.arange(image.shape[2], dtype=jnp.int32)[None, None]]
