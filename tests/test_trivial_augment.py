"""TrivialAugment: each operation against a float64 oracle pixel by pixel, and against the Python Imaging Library; and what is drawn."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from oracles import quick_jit, slow_but
from vffjax.training.trivial_augment import OPERATIONS, STRENGTHS, operate, trivial_augment

GEOMETRY, BLENDS, TABLES = OPERATIONS[1:6], OPERATIONS[6:10], OPERATIONS[10:]
SHAPES = ((8, 8, 3), (7, 10, 1), (9, 6, 2), (33, 40, 3))
CASES = list(itertools.product(SHAPES, OPERATIONS))


@quick_jit
def all_strengths(image, operation, strengths, signs):
    n = len(strengths)
    return operate(jnp.broadcast_to(image, (n, *image.shape)), jnp.broadcast_to(operation, n), strengths, signs)


def image_of(shape):
    """Smooth in one part and noise in another, without the darkest and the brightest bytes, so that contrasts can be stretched."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(20, 200, shape[0] * shape[1]).reshape(shape[:2])[:, :, None] + 10 * np.arange(shape[2])
    return np.where(rng.random(shape) < 0.5, ramp, rng.integers(10, 240, shape)).astype(np.uint8)


def results(name, image):
    """Pairs of (strength, sign) and what the operation makes of the image."""
    given = list(itertools.product(range(STRENGTHS), (1, -1)))
    strengths, signs = (jnp.asarray(part, jnp.int32) for part in zip(*given, strict=True))
    return zip(given, np.asarray(all_strengths(jnp.asarray(image), jnp.int32(OPERATIONS.index(name)), strengths, signs)), strict=True)


def sources(name, share, sign, h, w, x, y):
    """The position of the pixel that a result shows at (x, y), counted from the centre of the image."""
    angle = sign * np.deg2rad(135 * share)
    return {
        "shear_x": (x + sign * 0.99 * share * y, y),
        "shear_y": (x, y + sign * 0.99 * share * x),
        "translate_x": (x + sign * min(32, w) * share, y),
        "translate_y": (x, y + sign * min(32, h) * share),
        "rotate": (np.cos(angle) * x + np.sin(angle) * y, -np.sin(angle) * x + np.cos(angle) * y),
    }[name]


def check_motion(name, image, strength, sign, found):
    """A position that is half-way between two pixels may show either of them, and at the border black."""
    h, w, c = image.shape
    ties = 0
    for i, j in np.ndindex(h, w):
        x, y = sources(name, strength / 30, sign, h, w, j - (w - 1) / 2, i - (h - 1) / 2)
        near = [np.unique(np.floor(p + (side - 1) / 2 + 0.5 + np.array([-4e-3, 4e-3]))) for p, side in ((y, h), (x, w))]
        ties += len(near[0]) * len(near[1]) > 1
        allowed = [image[int(a), int(b)] if 0 <= a < h and 0 <= b < w else np.zeros(c, np.uint8) for a in near[0] for b in near[1]]
        assert any((found[i, j] == pixel).all() for pixel in allowed), (strength, sign, i, j)
    return ties / (h * w)


def down(values):
    """Rounded down, where float64 may be off by its last digits."""
    return np.clip(np.floor(np.round(values, 6)), 0, 255)


def grey(image):
    image = image.astype(np.float64)
    if image.shape[2] == 3:
        return np.floor((image @ np.array([19595, 38470, 7471]) + 32768) / 65536)[:, :, None]
    return np.floor(image.mean(axis=2, keepdims=True) + 0.5)


def smooth(image):
    out, weights = image.astype(np.float64), np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]])[:, :, None]
    for i, j in np.ndindex(image.shape[0] - 2, image.shape[1] - 2):
        out[i + 1, j + 1] = np.floor((weights * image[i : i + 3, j : j + 3].astype(np.float64)).sum((0, 1)) / 13 + 0.5)
    return out


def blend(name, image, strength, sign):
    factor, other = 1 + sign * 0.99 * strength / 30, {"brightness": 0.0, "sharpness": smooth(image)}.get(name)
    if other is None:
        other = grey(image) if name == "color" else np.floor(grey(image).mean() + 0.5)
    return down(other + factor * (image.astype(np.float64) - other))


def channel(name, values, strength):
    """Of one channel, value by value."""
    levels, v = np.arange(256), values.astype(np.float64)
    if name == "posterize":
        width = 2.0 ** int(np.floor(strength / 5 + 0.5))
        return np.floor(v / width) * width
    if name == "solarize":
        return np.where(v < 255 - 8.5 * strength, v, 255 - v)
    if name == "autocontrast":
        return down((v - v.min()) * 255 / (v.max() - v.min())) if v.max() > v.min() else v
    counts = np.array([(values == level).sum() for level in levels])
    step = (counts.sum() - counts[np.flatnonzero(counts)[-1]]) // 255
    return v if step == 0 else np.clip((step // 2 + np.array([counts[:level].sum() for level in levels])) // step, 0, 255)[values]


@pytest.mark.parametrize(
    ("shape", "name"),
    slow_but(CASES, *itertools.product(SHAPES[:2], OPERATIONS), ((33, 40, 3), "equalize"), several=True),
)
def test_an_operation_equals_its_float64_definition(shape, name):
    image, ties = image_of(shape), []
    for (strength, sign), found in results(name, image):
        if name in GEOMETRY:
            ties.append(check_motion(name, image, strength, sign, found))
            continue
        expected = image
        if name in BLENDS:
            expected = blend(name, image, strength, sign)
        elif name in TABLES:
            expected = np.stack([channel(name, image[:, :, c], strength) for c in range(shape[2])], axis=2)
        np.testing.assert_array_equal(found, expected, err_msg=f"{strength} {sign}")
    assert np.mean(ties or 0) < 0.15  # few pixels are let off


@pytest.mark.parametrize("channels", [1, 3])
def test_colours_are_those_of_the_python_imaging_library(channels):
    image = image_of((40, 33, channels))
    pillow = Image.fromarray(image.squeeze())
    enhancers = dict(zip(BLENDS, (ImageEnhance.Brightness, ImageEnhance.Color, ImageEnhance.Contrast, ImageEnhance.Sharpness), strict=True))
    others = {
        "posterize": lambda strength: ImageOps.posterize(pillow, 8 - int(np.floor(strength / 5 + 0.5))),
        "solarize": lambda strength: ImageOps.solarize(pillow, 255 - 8.5 * strength),
        "autocontrast": lambda strength: ImageOps.autocontrast(pillow),
        "equalize": lambda strength: ImageOps.equalize(pillow),
    }
    for name in BLENDS + TABLES:
        for (strength, sign), found in results(name, image):
            if name in enhancers:
                expected, most = enhancers[name](pillow).enhance(1 + sign * 0.99 * strength / 30), 1  # it rounds in float32
            else:
                expected, most = others[name](strength), 0
            difference = np.abs(np.asarray(expected, int).reshape(image.shape) - found.astype(int))
            assert difference.max() <= most and (difference > 0).mean() < 0.05, (name, strength, sign)


def test_the_centre_stays_and_a_shift_by_the_side_leaves_black():
    image = image_of((9, 9, 1))
    for name in ("shear_x", "shear_y", "rotate"):
        assert all(found[4, 4] == image[4, 4] for _, found in results(name, image))
    for name in ("translate_x", "translate_y"):
        last = [found for (strength, _), found in results(name, image) if strength == 30]
        assert not np.any(last)


@pytest.mark.parametrize("value", [0, 7, 255])
def test_a_plain_image_keeps_its_colour_under_operations_that_compare_pixels(value):
    image = np.full((6, 5, 3), value, np.uint8)
    for name in ("identity", "color", "contrast", "sharpness", "autocontrast", "equalize"):
        assert all((found == value).all() for _, found in results(name, image)), name


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 3)], ids=str)
def test_tiny_images_pass(shape, key):
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (50, *shape), dtype=np.uint8))
    found = quick_jit(trivial_augment)(key, images)
    assert (found.dtype, found.shape) == (jnp.uint8, images.shape)


def test_each_image_gets_one_operation_and_all_occur_alike(key):
    n, image = 2_800, image_of((12, 12, 3))
    made = {}  # the operations that can make these pixels
    for name in OPERATIONS:
        for _, found in results(name, image):
            made.setdefault(found.tobytes(), set()).add(name)
    out = np.asarray(quick_jit(trivial_augment)(key, jnp.asarray(np.tile(image, (n, 1, 1, 1)))))
    by = [made[view.tobytes()] for view in out]  # KeyError if no operation makes them
    counts = {name: sum(names == {name} for names in by) for name in OPERATIONS}
    for name in OPERATIONS:
        alone = np.mean([made[found.tobytes()] == {name} for _, found in results(name, image)])
        expected = n / len(OPERATIONS) * alone
        assert abs(counts[name] - expected) <= 5 * np.sqrt(expected), name
    assert sum(count > 0 for count in counts.values()) >= 12


def test_the_key_decides():
    images = jnp.asarray(np.tile(image_of((8, 8, 3)), (40, 1, 1, 1)))
    one, again, other = (np.asarray(quick_jit(trivial_augment)(jax.random.key(seed), images)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()
