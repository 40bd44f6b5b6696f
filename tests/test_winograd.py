"""Convolution by tiles: value and gradients against NumPy loops, and rounding errors against those of the plain sum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracles
from vffjax.ops import conv as conv_module
from vffjax.ops import winograd

# In images of 4 x 6 positions with 2 and 3 channels.
ELEMENTS_OF_AN_IMAGE = 4 * 6 * (2 + 3)


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    ("batch", "images"),
    [
        pytest.param(5, 100, id="one step"),
        pytest.param(6, 2, id="whole steps"),
        pytest.param(7, 4, id="ragged"),
        pytest.param(5, 0, id="by image"),
        pytest.param(7, 4, id="ragged, as a run compiles", marks=pytest.mark.full_optimisation),
    ],
)
def test_value_and_gradients_equal_the_definition(batch, images, monkeypatch):
    monkeypatch.setattr(winograd, "_ELEMENTS_PER_STEP", images * ELEMENTS_OF_AN_IMAGE)
    x, kernel, g = random(0, batch, 4, 6, 2), random(1, 3, 3, 2, 3), random(2, batch, 4, 6, 3)

    @oracles.quick_jit
    def found(x, kernel, g):
        return winograd.convolve(x, kernel), winograd.input_gradient(kernel, g), winograd.kernel_gradient(x, g)

    expected = oracles.conv(x, kernel), *oracles.conv_gradients(x, kernel, g)
    for part, whole in zip(found(x, kernel, g), expected, strict=True):
        np.testing.assert_allclose(part, whole, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("sides", [(4, 8), (8, 4), (12, 4), (6, 4), (4, 6)])
@pytest.mark.parametrize(("batch", "images"), [pytest.param(6, 2, id="whole steps"), pytest.param(7, 4, id="ragged")])
def test_kernel_gradient_equals_the_definition_for_every_tile(sides, batch, images, monkeypatch):
    h, w = sides
    monkeypatch.setattr(winograd, "_ELEMENTS_PER_STEP", images * h * w * (2 + 3))
    x, g = random(0, batch, h, w, 2), random(2, batch, h, w, 3)
    expected = oracles.conv_gradients(x, random(1, 3, 3, 2, 3), g)[1]
    np.testing.assert_allclose(oracles.quick_jit(winograd.kernel_gradient)(x, g), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("sides", "dtype", "entries"),
    [((8, 4), jnp.float32, 36), ((8, 6), jnp.float32, 16), ((6, 8), jnp.float32, 16), ((8, 8), jnp.bfloat16, 16)],
)
def test_kernel_gradient_takes_large_tiles_for_float32_and_sides_that_are_multiples_of_4(sides, dtype, entries, monkeypatch):
    shapes, product = [], winograd._product
    monkeypatch.setattr(winograd, "_product", lambda a, b, axis: shapes.append((a.shape, b.shape)) or product(a, b, axis))
    jax.eval_shape(winograd.kernel_gradient, jnp.zeros((2, *sides, 2), dtype), jnp.zeros((2, *sides, 3), dtype))
    tiles = 2 * sides[0] * sides[1] // (16 if entries == 36 else 4)
    assert shapes == [((tiles, 2), (tiles, 3))] * entries


@pytest.mark.parametrize(
    ("n", "images", "expected"),
    [(128, 8, (8, 16)), (148, 4, (4, 37)), (148, 8, (8, 19)), (138, 4, (3, 46)), (138, 10, (10, 14)), (3, 8, (3, 1)), (7, 3, (3, 3))],
)
def test_steps_are_of_one_size_near_the_cache_and_share_as_few_images_as_can_be(n, images, expected, monkeypatch):
    monkeypatch.setattr(winograd, "_ELEMENTS_PER_STEP", images * 100)
    size, count = winograd._split(n, 100)
    assert (size, count) == expected
    firsts = [int(winograd._first(jnp.int32(i), size, n)) for i in range(count)]
    assert {image for first in firsts for image in range(first, first + size)} == set(range(n))
    assert size * (count - 1) < n <= size * count


@pytest.mark.parametrize(
    ("x", "kernel", "expected"),
    [
        ((1, 8, 6, 16), (3, 3, 16, 16), True),
        ((1, 7, 6, 16), (3, 3, 16, 16), False),
        ((1, 8, 5, 16), (3, 3, 16, 16), False),
        ((1, 8, 6, 16), (5, 5, 16, 16), False),
        ((1, 8, 6, 3), (3, 3, 3, 16), False),
        ((1, 8, 6, 16), (3, 3, 16, 10), False),
    ],
)
def test_it_applies_to_even_maps_and_enough_channels(x, kernel, expected):
    assert winograd.applies(x, kernel) is expected


@pytest.mark.full_optimisation
@pytest.mark.parametrize(
    ("part", "width", "most"),
    [
        ("value", 8, 2),
        ("input gradient", 8, 2),
        ("kernel gradient", 10, 2),
        # Tiles of 4x4. Measured on six sizes of maps: 0.7 to 4.5 times the plain sum's error; 3.4 times on this one.
        ("kernel gradient", 8, 6),
    ],
)
def test_rounding_errors_are_near_those_of_the_plain_sum(part, width, most):
    """Root mean square error against float64, as a multiple of the plain convolution's."""
    x, kernel, g = random(0, 2, 8, width, 48), random(1, 3, 3, 48, 32), random(2, 2, 8, width, 32)
    on_device = tuple(map(jnp.asarray, (x, kernel, g)))
    value, backward = jax.vjp(conv_module._plain, *on_device[:2])
    dx, dkernel = backward(on_device[2])
    ours, theirs, exact = {
        "value": (winograd.convolve(*on_device[:2]), value, oracles.conv(x, kernel)),
        "input gradient": (winograd.input_gradient(*on_device[1:]), dx, oracles.conv_gradients(x, kernel, g)[0]),
        "kernel gradient": (winograd.kernel_gradient(*on_device[::2]), dkernel, oracles.conv_gradients(x, kernel, g)[1]),
    }[part]
    error, base = (np.sqrt(np.mean((np.asarray(a, np.float64) - exact) ** 2)) for a in (ours, theirs))
    assert error <= most * base
    assert error > 0  # float32, not the oracle itself


def test_bf16_keeps_its_type_and_an_error_near_the_plain_one():
    arrays = random(0, 2, 8, 8, 32), random(1, 3, 3, 32, 32), random(2, 2, 8, 8, 32)
    x, kernel, g = (jnp.asarray(a, jnp.bfloat16) for a in arrays)
    exact = oracles.conv_gradients(*(np.asarray(a, np.float64) for a in (x, kernel, g)))
    value = winograd.convolve(x, kernel)
    assert value.dtype == jnp.bfloat16
    pairs = [
        (value, oracles.conv(np.asarray(x, np.float64), np.asarray(kernel, np.float64))),
        (winograd.input_gradient(kernel, g), exact[0]),
        (winograd.kernel_gradient(x, g), exact[1]),
    ]
    for found, expected in pairs:
        # Half a unit of 8 bits is 0.2 % of a number; tiles are rounded before their products, and each mixes four numbers.
        assert np.sqrt(np.mean((np.asarray(found, np.float64) - expected) ** 2)) < 0.006 * expected.std()


def test_the_transforms_of_kernels_take_no_products_and_no_transpositions():
    """Either takes longer than the rest of a large kernel's transform. Products with the maps stand inside of the loop over images."""

    def step(x, kernel, g):
        return winograd.convolve(x, kernel), winograd.input_gradient(kernel, g), winograd.kernel_gradient(x, g)

    x, kernel, g = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((4, 8, 8, 16), (3, 3, 16, 32), (4, 8, 8, 32)))

    def operations(program):  # of loops the names alone, of calls what they contain too
        for equation in program.eqns:
            yield equation.primitive.name
            if equation.primitive.name != "scan" and "jaxpr" in equation.params:
                yield from operations(equation.params["jaxpr"])

    outside = [*operations(jax.make_jaxpr(step)(x, kernel, g))]
    assert outside.count("scan") == 3
    assert not {"dot_general", "transpose"} & {*outside}


def test_the_layer_s_convolution_goes_this_way_on_cpu_only():
    x, kernel = jnp.zeros((2, 8, 8, 16)), jnp.zeros((3, 3, 16, 16))
    gradient = jax.grad(lambda x, k: jnp.sum(conv_module.conv(x, k) ** 2), (0, 1))
    lowered = jax.jit(gradient).trace(x, kernel)
    assert lowered.lower(lowering_platforms=("cpu",)).as_text().count("stablehlo.convolution") == 0
    assert lowered.lower(lowering_platforms=("tpu",)).as_text().count("stablehlo.convolution") == 3
