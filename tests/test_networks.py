"""Layers: linear maps, normalisation of two streams, pooling, declared widths, all against NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracles
from oracles import config_of, quick_jit, variables_of
from vffjax.networks import find
from vffjax.networks.layers import EPSILON, ConvLayer, DenseLayer, Norm, divide_by_rms
from vffjax.ops.pooling import max_pool, mean_pool_to_grid

CLEAN, COPIES, SHAPE = 6, 5, (3, 4, 2)


@pytest.fixture
def streams():
    """Two streams of different mean and spread."""
    rng = np.random.default_rng(0)
    return np.concatenate([rng.normal(1, 2, (CLEAN, *SHAPE)), rng.normal(-3, 5, (COPIES, *SHAPE))])


@pytest.fixture
def norm():
    """`norm(kind)`: apply(x, clean, train) -> (output, new statistics), with non-trivial variables, and these."""

    def make(kind):
        module = Norm(kind)
        variables = variables_of(module, np.zeros((1, *SHAPE)))

        def apply(x, clean, train):
            out, new = module.apply(variables, jnp.asarray(x, jnp.float32), clean, train, mutable=["batch_stats"])
            return np.asarray(out), jax.tree.map(np.asarray, dict(new.get("batch_stats", {})))

        return apply, jax.tree.map(np.asarray, variables)

    return make


def normalised(x, mean, var, params):
    return (x - mean) / np.sqrt(var + EPSILON) * params["scale"] + params["bias"]


def moments(x):
    return x.mean((0, 1, 2)), x.var((0, 1, 2))


def test_batch_normalises_each_stream_by_its_own_statistics(norm, streams):
    apply, variables = norm("batch")
    out, _ = apply(streams, CLEAN, True)
    for part in (slice(None, CLEAN), slice(CLEAN, None)):
        np.testing.assert_allclose(out[part], normalised(streams[part], *moments(streams[part]), variables["params"]), rtol=1e-4, atol=1e-4)


def test_anchor_normalises_both_streams_by_the_clean_one(norm, streams):
    apply, variables = norm("anchor")
    out, new = apply(streams, CLEAN, True)
    mean, var = moments(streams[:CLEAN])
    np.testing.assert_allclose(out, normalised(streams, mean, var, variables["params"]), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(new["mean"], 0.9 * variables["batch_stats"]["mean"] + 0.1 * mean[None], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(new["var"], 0.9 * variables["batch_stats"]["var"] + 0.1 * var[None], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("present", ["both", "clean", "copies"])
def test_running_statistics_move_for_the_streams_present_only(present, norm, streams):
    apply, variables = norm("batch")
    x, clean = {"both": (streams, CLEAN), "clean": (streams[:CLEAN], CLEAN), "copies": (streams[CLEAN:], 0)}[present]
    _, new = apply(x, clean, True)
    old = variables["batch_stats"]
    for row, (name, part) in enumerate((("clean", streams[:CLEAN]), ("copies", streams[CLEAN:]))):
        for statistic, value in zip(("mean", "var"), moments(part), strict=True):
            if present in ("both", name):
                np.testing.assert_allclose(new[statistic][row], 0.9 * old[statistic][row] + 0.1 * value, rtol=1e-4, atol=1e-6)
            else:
                np.testing.assert_array_equal(new[statistic][row], old[statistic][row])


@pytest.mark.parametrize("kind", ["batch", "anchor"])
def test_evaluation_uses_running_statistics_of_the_stream_and_moves_none(kind, norm, streams):
    apply, variables = norm(kind)
    old = variables["batch_stats"]
    out, new = apply(streams, CLEAN, False)
    for row, part in enumerate((slice(None, CLEAN), slice(CLEAN, None))):
        source = row if kind == "batch" else 0
        expected = normalised(streams[part], old["mean"][source], old["var"][source], variables["params"])
        np.testing.assert_allclose(out[part], expected, rtol=1e-4, atol=1e-4)
    oracles.assert_same(new, old)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("kind", ["batch", "anchor", "layer"])
def test_clean_rows_never_depend_on_the_copies(kind, train, norm, streams):
    apply, _ = norm(kind)
    other = np.concatenate([streams[:CLEAN], 100 * streams[CLEAN:] + 7])
    np.testing.assert_array_equal(apply(streams, CLEAN, train)[0][:CLEAN], apply(other, CLEAN, train)[0][:CLEAN])
    assert (apply(streams, CLEAN, train)[0][CLEAN:] != apply(other, CLEAN, train)[0][CLEAN:]).any()


def test_layer_normalises_each_row_by_itself(norm, streams):
    apply, variables = norm("layer")
    out, _ = apply(streams, CLEAN, True)
    axes = (1, 2, 3)
    expected = normalised(streams, streams.mean(axes, keepdims=True), streams.var(axes, keepdims=True), variables["params"])
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)
    assert "batch_stats" not in variables


@pytest.mark.parametrize("kind", ["layer", "input", "class", "none"])
@pytest.mark.parametrize("cls", [DenseLayer, ConvLayer])
def test_rows_are_independent_without_batch_statistics(cls, kind, streams):
    layer, x = cls(5, norm=kind, sets=2), jnp.asarray(streams, jnp.float32)
    variables = variables_of(layer, x)
    assert set(variables) == {"params"}
    apply = quick_jit(lambda x: layer.apply(variables, x, CLEAN, True))
    changed = apply(jnp.asarray(np.where(np.arange(len(x)).reshape(-1, 1, 1, 1) == 3, 1e3 * np.asarray(x) ** 2 + 1, x)))
    keep = np.arange(len(x)) != 3
    np.testing.assert_array_equal(changed[keep], apply(x)[keep])
    assert np.abs(changed[3] - apply(x)[3]).max() > 0.1


def test_divide_by_rms_gives_root_mean_square_one(streams):
    out = np.asarray(divide_by_rms(jnp.asarray(streams, jnp.float32)))
    np.testing.assert_allclose(np.sqrt((out**2).mean((1, 2, 3))), 1, rtol=1e-4)
    rms = np.sqrt((streams**2).mean((1, 2, 3), keepdims=True))
    np.testing.assert_allclose(out, streams / rms, rtol=1e-4)
    assert (np.asarray(divide_by_rms(jnp.zeros((2, 3)))) == 0).all()


@pytest.mark.parametrize("kind", ["none", "input"])
def test_layers_without_statistics_are_a_linear_map_bias_and_relu(kind, streams):
    x = streams / np.sqrt((streams**2).mean((1, 2, 3), keepdims=True) + EPSILON) if kind == "input" else streams
    for layer in (DenseLayer(5, norm=kind), ConvLayer(5, norm=kind, pool=2)):
        variables = variables_of(layer, streams)
        bias = np.linspace(-0.5, 0.5, 5)
        variables["params"]["bias"] = jnp.asarray(bias, jnp.float32)
        kernel = np.asarray(variables["params"]["kernel"], np.float64)
        linear = x.reshape(len(x), -1) @ kernel if kernel.ndim == 2 else oracles.conv(x, kernel)
        expected = np.maximum(linear + bias, 0)
        if kernel.ndim == 4:
            expected = expected[:, :2].reshape(len(x), 1, 2, 2, 2, 5).max((2, 4))
        np.testing.assert_allclose(layer.apply(variables, jnp.asarray(streams, jnp.float32), CLEAN, True), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_kernels_start_with_he_variance():
    for layer, x, inputs in ((DenseLayer(64), jnp.zeros((1, 200)), 200), (ConvLayer(64), jnp.zeros((1, 4, 4, 30)), 270)):
        kernel = layer.init(jax.random.key(0), x, 1, True)["params"]["kernel"]
        np.testing.assert_allclose(np.var(kernel), 2 / inputs, rtol=0.1)


@pytest.mark.parametrize("kind", ["batch", "layer", "input"])
@pytest.mark.parametrize("cls", [DenseLayer, ConvLayer])
def test_bf16_layers_keep_float32_variables(cls, kind, streams):
    layer, x = cls(5, norm=kind, dtype=jnp.bfloat16), jnp.asarray(streams, jnp.float32)
    variables = variables_of(layer, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(np.float32)}
    out, new = layer.apply(variables, x, CLEAN, True, mutable=["batch_stats"])
    assert out.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(new)} <= {np.dtype(np.float32)}
    full = cls(5, norm=kind).apply(variables, x, CLEAN, True, mutable=["batch_stats"])[0]
    np.testing.assert_allclose(np.asarray(out, np.float32), full, atol=0.05 * np.abs(full).max())


@pytest.mark.parametrize(
    ("network", "image"),
    [
        ({"network": "mlp", "widths": (7, 3, 5)}, (5, 5, 1)),
        ({"network": "conv4", "widths": (3, 5, 5, 2), "pools": (1, 2, 1, 2)}, (9, 10, 3)),
        ({"network": "conv4", "widths": (4, 4, 4, 4), "pools": (3, 1, 2, 1)}, (13, 7, 1)),
        ({"network": "conv", "widths": (3,), "pools": (2,)}, (9, 10, 3)),
        ({"network": "conv", "widths": (3, 4, 5, 4, 3, 2), "pools": (1, 2, 1, 1, 3, 1)}, (13, 7, 1)),
    ],
    ids=["mlp", "conv4", "conv4, other pools", "conv of one layer", "conv of six layers"],
)
def test_layers_have_the_widths_and_sizes_they_declare(network, image):
    config = config_of(**network)
    layers, shape = find(config).layers(config, "batch"), (2, *image)
    assert tuple(layer.width for layer in layers) == config.widths
    for i, layer in enumerate(layers):
        variables = jax.eval_shape(lambda la=layer, s=shape: la.init(jax.random.key(0), jnp.zeros(s), 1, False))
        out = jax.eval_shape(lambda v, la=layer, s=shape: la.apply(v, jnp.zeros(s), 1, False), variables)
        if config.network == "mlp":
            shape = (2, config.widths[i])
        else:
            shape = (2, shape[1] // config.pools[i], shape[2] // config.pools[i], config.widths[i])
        assert out.shape == shape


def test_conv_of_four_layers_is_conv4():
    sizes = {"widths": (3, 5, 5, 2), "pools": (1, 2, 1, 2)}
    one, other = (config_of(network=network, **sizes) for network in ("conv", "conv4"))
    assert find(one).layers(one, "batch") == find(other).layers(other, "batch")


@pytest.mark.parametrize("window", [1, 2, 3])
def test_max_pool_is_the_maximum_of_whole_windows(window):
    x = np.random.default_rng(0).normal(size=(2, 7, 5, 3))
    out = np.asarray(max_pool(jnp.asarray(x), window))
    assert out.shape == (2, 7 // window, 5 // window, 3)
    for i, j in np.ndindex(out.shape[1:3]):
        block = x[:, i * window : (i + 1) * window, j * window : (j + 1) * window]
        np.testing.assert_allclose(out[:, i, j], block.max((1, 2)), rtol=1e-6)


@pytest.mark.slow
def test_the_gradient_of_max_pool_goes_to_maxima_in_equal_shares():
    x = jnp.asarray([[1.0, 4.0, 2.0, 2.0, 9.0], [3.0, 0.0, 2.0, 2.0, 9.0], [9.0, 9.0, 9.0, 9.0, 9.0]]).reshape(1, 3, 5, 1)
    gradient = jax.grad(lambda x: jnp.sum(max_pool(x, 2) * jnp.array([1.0, 8.0]).reshape(1, 1, 2, 1)))(x)
    np.testing.assert_allclose(gradient[0, :, :, 0], [[0, 1, 2, 2, 0], [0, 0, 2, 2, 0], [0, 0, 0, 0, 0]])


def test_a_window_of_one_changes_nothing_and_takes_any_shape():
    x = jnp.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(max_pool(x, 1), x)
    np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(max_pool(x, 1) ** 2))(x), 2 * x)


@pytest.mark.parametrize("cells", [1, 2, 3, 4, 9])
def test_mean_pool_to_grid_is_the_mean_of_whole_cells(cells):
    x = np.random.default_rng(0).normal(size=(2, 7, 4, 3))
    out = np.asarray(mean_pool_to_grid(jnp.asarray(x), cells))
    assert out.shape == (2, min(cells, 7), min(cells, 4), 3)
    for row, image in zip(out, x, strict=True):
        np.testing.assert_allclose(row, oracles.pool_to_grid(image, cells), rtol=1e-5, atol=1e-6)
    products = [e for e in jax.make_jaxpr(lambda x: mean_pool_to_grid(x, cells))(x).eqns if e.primitive.name == "dot_general"]
    assert all(set(product.params["precision"]) == {jax.lax.Precision.HIGHEST} for product in products)  # not bfloat16's on a TPU
    assert bool(products) == bool(7 % min(cells, 7) or 4 % min(cells, 4))


@pytest.mark.parametrize("kind", ["batch", "layer", "none"])
def test_gelu_follows_the_normalisation_and_pooling_follows_gelu(kind, streams):
    x = jnp.asarray(streams, jnp.float32)
    parts = {name: ConvLayer(5, pool=pool, norm=kind, activation=name) for name, pool in (("gelu", 2), ("relu", 1))}
    variables = variables_of(parts["gelu"], x[:1], 1)
    shift = jax.tree_util.tree_map_with_path(lambda path, leaf: leaf + 100 * (path[-1].key == "bias"), variables)
    z = np.asarray(parts["relu"].apply(shift, x, CLEAN, False), np.float64) - 100  # ReLU passes everything
    gelu = 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))
    wanted = gelu[:, :2].reshape(CLEAN + COPIES, 1, 2, 2, 2, 5).max(axis=(2, 4))
    np.testing.assert_allclose(parts["gelu"].apply(variables, x, CLEAN, False), wanted, rtol=1e-3, atol=1e-3)


def test_a_norm_without_scales_is_one_with_scales_of_one(streams):
    x = jnp.asarray(streams, jnp.float32)
    bare, full = Norm("batch", activation="relu", scaled=False), Norm("batch", activation="relu")
    variables = variables_of(bare, x[:1])
    assert list(variables["params"]) == ["bias"]
    ones = variables | {"params": variables["params"] | {"scale": jnp.ones(SHAPE[-1])}}
    for train in (True, False):
        results = [module.apply(given, x, CLEAN, train, mutable=["batch_stats"]) for module, given in ((bare, variables), (full, ones))]
        jax.tree.map(np.testing.assert_array_equal, *results)


@pytest.mark.parametrize("width", [2, 5])
def test_a_kernel_that_starts_like_the_identity_passes_the_first_channels_on(width, streams):
    x = jnp.asarray(np.abs(streams), jnp.float32)
    layer = ConvLayer(width, norm="none", initialisation="identity")
    out = layer.apply(layer.init(jax.random.key(0), x[:1], 1, False), x, CLEAN, False)
    np.testing.assert_array_equal(out[..., :2], x[..., :width])
    others = layer.init(jax.random.key(0), x[:1], 1, False)["params"]["kernel"][..., 2:]
    he = ConvLayer(width, norm="none").init(jax.random.key(0), x[:1], 1, False)["params"]["kernel"][..., 2:]
    np.testing.assert_array_equal(others, he)
