"""Normalisation, pooling and activation in one operation: value and hand-written gradient against NumPy float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracles
from vffjax.ops import normalisation, pooling
from vffjax.ops.normalisation import EPSILON, normalise

CLEAN, COPIES, CHANNELS = 3, 2, 4
SCALE = np.array([1.5, -0.7, 0.0, 0.4])  # a negative slope turns maxima into minima
BIAS = np.array([0.3, -0.2, 0.5, -0.1])


def maps(shape, seed=0):
    rng = np.random.default_rng(seed)
    streams = [rng.normal(1, 2, (CLEAN, *shape, CHANNELS)), rng.normal(-1, 3, (COPIES, *shape, CHANNELS))]
    return np.concatenate(streams)


def gelu(z):
    """In its tanh form (Hendrycks and Gimpel, 2016, arXiv:1606.08415)."""
    return z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))) / 2


def oracle(x, scale, bias, clean, shared, pool, activation):
    """From the definition, in its order: normalise, activate, pool."""
    out = np.empty_like(x)
    axes = tuple(range(x.ndim - 1))
    for part in (slice(0, clean), slice(clean, len(x))):
        source = x[:clean] if shared else x[part]
        if len(source):
            out[part] = (x[part] - source.mean(axes)) / np.sqrt(source.var(axes) + EPSILON) * scale + bias
    out = {"": out, "relu": np.maximum(out, 0), "gelu": gelu(out)}[activation]
    if pool == 1:
        return out
    n, h, w, c = out.shape
    out = out[:, : h // pool * pool, : w // pool * pool].reshape(n, h // pool, pool, w // pool, pool, c)
    return out.max((2, 4))


CASES = {
    "two streams": {"clean": CLEAN, "shared": False, "pool": 1, "activation": "relu"},
    "pooled, ragged": {"clean": CLEAN, "shared": False, "pool": 2, "activation": "relu"},
    "pooled by three, not rectified": {"clean": CLEAN, "shared": False, "pool": 3, "activation": ""},
    "shared statistics": {"clean": CLEAN, "shared": True, "pool": 1, "activation": "relu"},
    "shared statistics, pooled": {"clean": CLEAN, "shared": True, "pool": 2, "activation": "relu"},
    "clean rows alone": {"clean": CLEAN + COPIES, "shared": False, "pool": 2, "activation": "relu"},
    "shared, clean rows alone": {"clean": CLEAN + COPIES, "shared": True, "pool": 1, "activation": "relu"},
    "GELU": {"clean": CLEAN, "shared": False, "pool": 1, "activation": "gelu"},
    "GELU, pooled": {"clean": CLEAN, "shared": False, "pool": 2, "activation": "gelu"},
    "GELU, shared statistics, pooled by three": {"clean": CLEAN, "shared": True, "pool": 3, "activation": "gelu"},
    "copies alone": {"clean": 0, "shared": False, "pool": 1, "activation": "relu"},
}


OPTIMISED = pytest.param("pooled, ragged", id="as a run compiles", marks=pytest.mark.full_optimisation)


@pytest.mark.parametrize("case", [*CASES, OPTIMISED])
@pytest.mark.parametrize("shape", [(4, 5), ()], ids=["maps", "vectors"])
def test_value_and_gradients_equal_the_definition(case, shape):
    arguments = CASES[case] | ({} if shape else {"pool": 1})
    x = maps(shape)
    weights = np.random.default_rng(1).normal(size=oracle(x, SCALE, BIAS, **arguments).shape)

    @oracles.quick_jit
    def found(x, scale, bias):
        f = functools.partial(normalise, **arguments)
        (out, mean, var), pull = jax.vjp(lambda *a: f(*a), x, scale, bias)
        return out, pull((jnp.asarray(weights, jnp.float32), jnp.zeros_like(mean), jnp.zeros_like(var)))

    out, gradients = found(*(jnp.asarray(a, jnp.float32) for a in (x, SCALE, BIAS)))
    np.testing.assert_allclose(out, oracle(x, SCALE, BIAS, **arguments), rtol=1e-4, atol=1e-5)
    loss = lambda x=x, scale=SCALE, bias=BIAS: np.sum(weights * oracle(x, scale, bias, **arguments))  # noqa: E731
    expected = (
        oracles.numeric_gradient(lambda x: loss(x=x), x),
        oracles.numeric_gradient(lambda s: loss(scale=s), SCALE),
        oracles.numeric_gradient(lambda b: loss(bias=b), BIAS),
    )
    for name, part, whole in zip(("x", "scale", "bias"), gradients, expected, strict=True):
        # At scale 0 nothing is larger than anything else in a window: the definition's slope in `scale` has no single value there.
        keep = SCALE != 0 if arguments["pool"] > 1 and name == "scale" else slice(None)
        np.testing.assert_allclose(np.asarray(part)[..., keep], whole[..., keep], rtol=2e-3, atol=2e-4, err_msg=name)


@pytest.mark.parametrize("case", ["GELU", "GELU, pooled", "GELU, shared statistics, pooled by three"])
def test_the_order_that_a_tpu_takes_equals_the_definition_too(case, monkeypatch):
    windows = []
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arrays, default=None, tpu=None, **others: (tpu or default)(*arrays))
    monkeypatch.setattr(normalisation, "max_pool", lambda x, window: windows.append(window) or pooling.max_pool(x, window))
    test_value_and_gradients_equal_the_definition(case, (4, 5))
    pool = CASES[case]["pool"]
    # Windows are pooled once, and not for the largest and the smallest entries.
    assert [window for window in windows if window > 1] == ([pool] if pool > 1 else [])


def test_statistics_are_those_of_each_stream():
    x = maps((4, 5))
    for shared, parts in ((False, (x[:CLEAN], x[CLEAN:])), (True, (x[:CLEAN],))):
        _, mean, var = normalise(jnp.asarray(x, jnp.float32), jnp.ones(CHANNELS), jnp.zeros(CHANNELS), CLEAN, shared)
        np.testing.assert_allclose(mean, [part.mean((0, 1, 2)) for part in parts], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(var, [part.var((0, 1, 2)) for part in parts], rtol=1e-4)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("pool", [1, 2])
def test_padding_behind_the_copies_changes_nothing_and_gets_no_gradient(shared, pool, activation):
    x = jnp.asarray(maps((4, 4)), jnp.float32)
    padded = jnp.concatenate([x, jnp.full((3, 4, 4, CHANNELS), 9.0)])  # not zeros, as behind a layer with biases
    scale, bias = jnp.asarray(SCALE, jnp.float32), jnp.asarray(BIAS, jnp.float32)

    def found(x, parts):
        (out, mean, var), pull = jax.vjp(lambda *a: normalise(*a, parts, shared, pool, activation), x, scale, bias)
        g = jnp.where(jnp.arange(len(x))[:, None, None, None] < CLEAN + COPIES, jnp.cos(jnp.arange(out[0].size).reshape(out[0].shape)), 0.0)
        return out, mean, var, *pull((g, mean, var))

    plain, behind = found(x, CLEAN), found(padded, normalisation.Parts(CLEAN, COPIES))
    for a, b in zip(plain, behind, strict=True):
        np.testing.assert_allclose(a, b[: CLEAN + COPIES] if len(b) == len(padded) else b, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(behind[3][CLEAN + COPIES :], 0.0)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_the_only_residual_of_the_size_of_the_map_is_the_map(activation):
    x = jnp.asarray(maps((4, 4)), jnp.float32)
    _, pull = jax.vjp(lambda x: normalise(x, jnp.ones(CHANNELS), jnp.zeros(CHANNELS), CLEAN, False, 2, activation)[0], x)
    large = [leaf for leaf in jax.tree.leaves(pull) if getattr(leaf, "size", 0) >= x.size // 4]
    assert len(large) == 1
    np.testing.assert_array_equal(large[0], x)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_bf16_maps_keep_their_type(activation):
    x = jnp.asarray(maps((4, 4)), jnp.bfloat16)
    out, pull = jax.vjp(lambda x: normalise(x, jnp.ones(CHANNELS), jnp.zeros(CHANNELS), CLEAN, False, 2, activation)[0], x)
    assert out.dtype == pull(out)[0].dtype == jnp.bfloat16
    expected = oracle(np.asarray(x, np.float64), np.ones(CHANNELS), np.zeros(CHANNELS), CLEAN, False, 2, activation)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("window", [2, 3])
def test_pooling_is_the_same_in_both_forms(window):
    """What CPU computes, and what GPU and TPU do; no two entries are equal here."""
    x = jnp.asarray(np.random.default_rng(0).permutation(2 * 7 * 5 * 3).reshape(2, 7, 5, 3), jnp.float32)
    largest = pooling._pairwise_max(x, window)
    np.testing.assert_array_equal(largest, pooling._reduced_max(x, window))
    g = jnp.arange(1.0, largest.size + 1).reshape(largest.shape)
    scattered = jax.vjp(lambda x: pooling._reduced_max(x, window), x)[1](g)[0]
    np.testing.assert_array_equal(pooling._gradient_by_comparison(x, g, window), scattered)


def test_the_sums_of_both_streams_in_one_reduction_equal_the_sums_of_each():
    rng = np.random.default_rng(0)
    rows = tuple(rng.integers(-99, 100, (CLEAN + COPIES, CHANNELS)).astype(np.float32) for _ in range(2))
    found = normalisation._together(*map(jnp.asarray, rows), clean=CLEAN, labelled=COPIES)
    for sums, part in zip(found, rows, strict=True):
        np.testing.assert_array_equal(sums, np.stack([part[:CLEAN].sum(0), part[CLEAN:].sum(0)]))
    padded = normalisation._together(*(jnp.pad(part, ((0, 2), (0, 0)), constant_values=7.0) for part in rows), clean=CLEAN, labelled=COPIES)
    np.testing.assert_array_equal(padded, found)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_a_gpu_sums_both_streams_in_one_reduction(platform):
    def reductions(x):
        text = (
            jax.jit(lambda x: normalisation._sums((x, x * x), CLEAN, COPIES, False))
            .trace(x)
            .lower(lowering_platforms=(platform,))
            .as_text()
        )
        return text.count("stablehlo.reduce(")

    # One over the positions of each of the two maps, and then one of both, or one for each stream of each.
    assert reductions(jnp.asarray(maps((2, 2)), jnp.float32)) == 2 + (1 if platform == "cuda" else 4)
