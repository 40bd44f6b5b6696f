"""Max pooling over overlapping windows: value and gradient against NumPy loops and PyTorch, and the form of the programs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import oracles
from vffjax.ops import pooling
from vffjax.ops.pooling import max_pool, max_pool_gradient, max_pool_overlapping

SIZES = [(3, 2, 1), (2, 2, 0), (3, 1, 1), (5, 3, 2), (2, 3, 1)]  # window, stride, padding
MAPS = [(8, 8), (7, 10), (5, 2)]


def distinct(h, w, n=2, c=3):
    """A map whose entries bfloat16 holds too: all different within an image and channel, some negative throughout."""
    rng = np.random.default_rng(0)
    return np.stack([np.stack([rng.permutation(h * w).reshape(h, w) - 100.0 for _ in range(c)], -1) for _ in range(n)])


def value_and_gradient(x, g, sizes):
    out, backward = jax.vjp(lambda x: max_pool_overlapping(x, *sizes), x)
    return out, backward(g)[0]


@functools.partial(jax.jit, static_argnums=2)
def compiled(x, g, sizes):
    return value_and_gradient(x, g, sizes)


def whole_numbers(like):
    """A gradient whose sums are exact in bfloat16."""
    return np.random.default_rng(1).integers(-8, 9, like.shape).astype(np.float64)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", oracles.slow_but(MAPS, (7, 10)), ids=str)
@pytest.mark.parametrize("sizes", [*SIZES, pytest.param(SIZES[0], id="as a run compiles", marks=pytest.mark.full_optimisation)], ids=str)
def test_value_and_gradient_equal_the_definition(sizes, shape, dtype):
    x = distinct(*shape)
    g = whole_numbers(jax.eval_shape(lambda x: max_pool_overlapping(x, *sizes), x))
    for found, expected in zip(compiled(jnp.asarray(x, dtype), jnp.asarray(g, dtype), sizes), oracles.max_pool(x, g, *sizes), strict=True):
        assert found.dtype == dtype
        np.testing.assert_array_equal(np.asarray(found, np.float64), expected)


@pytest.mark.parametrize("shape", MAPS, ids=str)
@pytest.mark.parametrize("sizes", [sizes for sizes in SIZES if 2 * sizes[2] <= sizes[0]], ids=str)
def test_it_is_pytorch_s(sizes, shape):
    torch = pytest.importorskip("torch")
    x = distinct(*shape).astype(np.float32)
    theirs = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    out = torch.nn.functional.max_pool2d(theirs, *sizes)
    g = whole_numbers(out.permute(0, 2, 3, 1))
    out.backward(torch.tensor(g.astype(np.float32).transpose(0, 3, 1, 2)))
    value, gradient = compiled(x, jnp.asarray(g, jnp.float32), sizes)
    np.testing.assert_array_equal(value, out.detach().numpy().transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(gradient, theirs.grad.numpy().transpose(0, 2, 3, 1))


def test_the_default_is_the_stem_of_a_resnet():
    x = jnp.asarray(distinct(6, 6))
    np.testing.assert_array_equal(max_pool_overlapping(x), max_pool_overlapping(x, 3, 2, 1))


def test_the_gradient_of_equal_entries_is_shared_out_whole():
    x, g = jnp.zeros((1, 6, 6, 2)), jnp.arange(1.0, 19.0).reshape(1, 3, 3, 2)
    np.testing.assert_allclose(compiled(x, g, (3, 2, 1))[1].sum((1, 2)), g.sum((1, 2)))


def lowered(function, platform, *arguments):
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(("platform", "value", "gradient"), [("cpu", 0, 0), ("cuda", 1, 0), ("rocm", 1, 0), ("tpu", 1, 1)])
def test_window_operations_are_for_platforms_where_they_are_fast(platform, value, gradient):
    x, g = jnp.zeros((2, 6, 6, 3)), jnp.zeros((2, 3, 3, 3))
    texts = [
        lowered(lambda x, g: value_and_gradient(x, g, (3, 2, 1)), platform, x, g),
        lowered(lambda x, g: jax.vjp(lambda x: max_pool(x, 2), x)[1](g)[0], platform, x, g),
        lowered(lambda x, g: max_pool_gradient(x, g, 2), platform, x, g),
    ]
    assert ["reduce_window" in text for text in texts] == [value, False, False]
    assert ["select_and_scatter" in text for text in texts] == [gradient] * 3
    # On a GPU nothing but a barrier keeps XLA from computing the map twice, with two roundings, where it is compared with its maxima.
    assert ["optimization_barrier" in text for text in texts] == [platform in ("cuda", "rocm")] * 3


def shared_out(x, g, window):
    """The gradient of non-overlapping max-pooling, in float64 NumPy loops: the entries that equal the maximum of a window share it."""
    out = np.zeros(x.shape)
    for n, i, j, c in np.ndindex(g.shape):
        here = np.index_exp[n, i * window : (i + 1) * window, j * window : (j + 1) * window, c]
        equal = x[here] == x[here].max()
        out[here] = equal * g[n, i, j, c] / equal.sum()
    return out


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("window", [2, 3])
def test_the_form_for_a_gpu_shares_the_gradient_out_as_the_cpu_s_does(window, dtype):
    rng = np.random.default_rng(2)
    x = rng.integers(-1, 2, (3, 7, 8, 5)).astype(np.float64)  # three values, so that most windows have equal maxima
    g = 2520.0 * rng.integers(-8, 9, (3, 7 // window, 8 // window, 5))  # every share of up to 9 entries is a whole number
    given = jnp.asarray(x, dtype), jnp.asarray(g, dtype)
    comparison = pooling._in_memory(functools.partial(pooling._gradient_by_comparison, window=window))
    on_gpu, on_cpu = jax.jit(comparison)(*given), jax.jit(functools.partial(max_pool_gradient, window=window))(*given)
    np.testing.assert_array_equal(on_gpu, on_cpu)
    # bfloat16 rounds the gradient that it is given and each share once.
    expected = shared_out(x, np.asarray(given[1], np.float64), window).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(on_gpu, np.float32), np.asarray(jnp.asarray(expected, dtype), np.float32))


def test_an_exported_program_takes_any_batch_size():
    (n,) = export.symbolic_shape("n")
    program = export.export(jax.jit(max_pool_overlapping), platforms=("cpu", "cuda", "tpu"))(
        jax.ShapeDtypeStruct((n, 7, 6, 3), jnp.float32)
    )
    program = export.deserialize(program.serialize())
    for batch in (1, 3):
        x = jnp.asarray(distinct(7, 6, batch), jnp.float32)
        np.testing.assert_array_equal(program.call(x), max_pool_overlapping(x))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_the_gradient_of_means_has_the_dtype_of_the_map_and_is_rounded_once(dtype):
    x, g = (np.random.default_rng(seed).normal(size=(2, side, 6, 5)) for seed, side in ((0, 8), (1, 4)))
    g = g[:, :, :3].astype(np.float32)
    means, backward = jax.vjp(lambda x: pooling._means_of_whole_cells(x, 4, 3), jnp.asarray(x, dtype))
    exact = np.asarray(jnp.asarray(x, dtype), np.float64).reshape(2, 4, 2, 3, 2, 5).mean((2, 4))
    assert means.dtype == jnp.float32
    np.testing.assert_allclose(means, exact, rtol=1e-5, atol=1e-6)
    found = backward(jnp.asarray(g))[0]
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, jnp.asarray(np.repeat(np.repeat(g / 4, 2, 1), 2, 2), dtype))
