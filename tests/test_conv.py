"""The convolution: value and gradients against NumPy loops, and that its gradient stays fast in a loop on CPU."""

import functools
import re
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from vffjax import conv as conv_module
from vffjax.conv import _plain, conv

CANONICAL = "dim_labels=b01f_01io->b01f"
on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="about the program for CPU")


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def gradients(x, kernel, g, f=conv):
    return jax.vjp(f, x, kernel)[1](g)


@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize(("batch", "rows"), [(5, 4096), (5, 30), (4, 30), (5, 1)], ids=["one product", "ragged", "whole", "by image"])
def test_value_and_gradients_equal_the_definition(batch, rows, size, monkeypatch):
    """Images of 5 x 3 positions, so that 30 rows are two images."""
    monkeypatch.setattr(conv_module, "_ROWS_PER_PRODUCT", rows)
    x, kernel, g = random(0, batch, 5, 3, 2), random(1, size, size, 2, 3), random(2, batch, 5, 3, 3)
    dx, dkernel = jax.jit(lambda *args: gradients(*args))(x, kernel, g)  # a new function, or jit remembers other `rows`
    expected_dx, expected_dkernel = oracles.conv_gradients(x, kernel, g)
    np.testing.assert_allclose(jax.jit(conv)(x, kernel), oracles.conv(x, kernel), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dx, expected_dx, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dkernel, expected_dkernel, rtol=1e-4, atol=1e-5)


def test_a_kernel_larger_than_the_image():
    x, kernel, g = random(0, 3, 2, 2, 2), random(1, 5, 5, 2, 3), random(2, 3, 2, 2, 3)
    for found, expected in zip(jax.jit(gradients)(x, kernel, g), oracles.conv_gradients(x, kernel, g), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_bf16_gradients_are_rounded_once(monkeypatch):
    """To 8 bits, half a unit of which is 2 ** -8; sums over the products of single images are float32."""
    monkeypatch.setattr(conv_module, "_ROWS_PER_PRODUCT", 1)
    arrays = random(0, 9, 4, 4, 4), random(1, 3, 3, 4, 5), random(2, 9, 4, 4, 5)
    x, kernel, g = (jnp.asarray(a, jnp.bfloat16) for a in arrays)
    found = jax.jit(lambda *args: gradients(*args))(x, kernel, g)
    for part, expected in zip(found, oracles.conv_gradients(*(np.asarray(a, np.float64) for a in (x, kernel, g))), strict=True):
        assert part.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(part, np.float64), expected, rtol=1.001 * 2**-8, atol=1e-4)


def scan_of_gradients(f, xs, kernel):
    """A toy training loop: both gradients of `f` at every step."""

    def step(kernel, x):
        dx, dkernel = jax.grad(lambda x, k: jnp.sum(f(x, k) ** 2), (0, 1))(x, kernel)
        return kernel - 1e-6 * dkernel, dx.sum()

    return jax.lax.scan(step, kernel, xs)


def noncanonical(text):
    convolutions = [line for line in text.splitlines() if " convolution(" in line]
    return len(convolutions), [line for line in convolutions if CANONICAL not in line]


@on_cpu
def test_a_loop_on_cpu_holds_canonical_convolutions_only():
    args = random(0, 3, 5, 6, 6, 4), random(1, 3, 3, 4, 5)
    text = jax.jit(functools.partial(scan_of_gradients, conv)).lower(*args).as_text("hlo")
    count, bad = noncanonical(text)
    assert count >= 2  # value and input gradient
    assert not bad
    # That XLA's own gradient would be found:
    assert noncanonical(jax.jit(functools.partial(scan_of_gradients, _plain)).lower(*args).as_text("hlo"))[1]


@on_cpu
def test_the_choice_of_platform_leaves_no_branch_in_the_program():
    args = random(0, 3, 5, 6, 6, 4), random(1, 3, 3, 4, 5)
    compiled = jax.jit(functools.partial(scan_of_gradients, conv)).lower(*args).compile().as_text()
    assert "while" in compiled
    assert not re.search(r"\bconditional\(", compiled)


@pytest.mark.parametrize(("platform", "products"), [("cpu", True), ("cuda", False), ("tpu", False)])
def test_only_cpu_gets_the_matrix_products(platform, products):
    arrays = random(0, 5, 6, 6, 4), random(1, 3, 3, 4, 5), random(2, 5, 6, 6, 5)
    text = jax.jit(gradients).trace(*arrays).lower(lowering_platforms=(platform,)).as_text()
    assert ("dot_general" in text) == products
    assert "convolution" in text


def test_an_input_gradient_that_nobody_asks_for_is_not_computed():
    x, kernel = random(0, 5, 6, 6, 4), random(1, 3, 3, 4, 5)
    f = jax.jit(jax.grad(lambda k: jnp.sum(conv(x, k) ** 2)))
    g = jax.jit(jax.grad(lambda x, k: jnp.sum(conv(x, k) ** 2), (0, 1)))
    flops = [program.compile().cost_analysis()["flops"] for program in (f.lower(kernel), g.lower(x, kernel))]
    assert flops[0] < 0.75 * flops[1]


@on_cpu
def test_the_gradient_is_as_fast_in_a_scan_as_outside():
    """XLA's own is about a hundred times slower there; 3 leaves room for a busy machine."""
    steps, xs, kernel = 4, random(0, 4, 32, 16, 16, 16), random(1, 3, 3, 16, 16)
    inside = jax.jit(functools.partial(scan_of_gradients, conv)).lower(xs, kernel).compile()
    single = jax.jit(jax.grad(lambda x, k: jnp.sum(conv(x, k) ** 2), (0, 1))).lower(xs[0], kernel).compile()
    times = {"inside": [], "outside": []}
    for repetition in range(6):
        start = time.perf_counter()
        jax.block_until_ready(inside(xs, kernel))
        middle = time.perf_counter()
        for x in xs:
            jax.block_until_ready(single(x, kernel))
        if repetition:
            times["inside"].append((middle - start) / steps)
            times["outside"].append((time.perf_counter() - middle) / steps)
    assert statistics.median(times["inside"]) < 3 * statistics.median(times["outside"]), times
