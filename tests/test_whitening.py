"""The whitening layer: its kernel whitens the patches of the images it was made of, and nothing ever changes it. And cifarnet behind it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from oracles import config_of, quick_jit, small_run, variables_of
from runs import assert_same_bits, tiny, train
from vffjax.data import load
from vffjax.errors import UserError
from vffjax.networks import find
from vffjax.networks.groups import cut, make_groups
from vffjax.networks.layers import FIXED, ConvLayer, WhiteningLayer, whitening_kernel
from vffjax.proofs import locality
from vffjax.runs import experiment
from vffjax.runs.workdir import load_run
from vffjax.training.checks import check_against_data
from vffjax.training.plan import make_plan
from vffjax.training.trainer import train_step
from vffjax.weights.weights import write_weights

CIFARNET = {"network": "cifarnet", "widths": (4, 6), "whitening": 2, "dataset": "digits"}
SIDE, CHANNELS = 2, 3


def images(seed=0, n=40):
    """Images whose neighbouring pixels and channels are correlated."""
    rng = np.random.default_rng(seed)
    white = rng.normal(size=(n, 9, 9, CHANNELS))
    smooth = white[:, 1:, 1:] + white[:, :-1, 1:] + 0.5 * white[:, 1:, :-1]
    return smooth @ rng.normal(size=(CHANNELS, CHANNELS)) + 0.3


def patches(x, side):
    """Every patch of every image, flattened in the order of a kernel's entries."""
    n, h, w, _ = x.shape
    return np.array(
        [x[i, r : r + side, s : s + side].reshape(-1) for i in range(n) for r in range(h - side + 1) for s in range(w - side + 1)]
    )


@pytest.mark.parametrize("side", [1, 2, 3])
def test_its_outputs_on_the_images_are_uncorrelated_and_of_one_size(side):
    x = images()
    kernel = np.asarray(whitening_kernel(x, side, smallest=0.0), np.float64)
    count = side * side * CHANNELS
    assert kernel.shape == (side, side, CHANNELS, 2 * count)
    out = patches(x, side) @ kernel.reshape(count, -1)
    np.testing.assert_allclose(out[:, :count].T @ out[:, :count] / len(out), np.eye(count), atol=1e-3)
    np.testing.assert_array_equal(kernel[..., count:], -kernel[..., :count])


def test_its_filters_are_ordered_and_their_signs_fixed():
    kernel = np.asarray(whitening_kernel(images(), SIDE, smallest=0.0), np.float64)[..., : SIDE * SIDE * CHANNELS]
    filters = kernel.reshape(-1, kernel.shape[-1])
    lengths = np.linalg.norm(filters, axis=0)  # 1 over the root of the eigenvalue
    assert (np.diff(lengths) > 0).all()
    assert (np.take_along_axis(filters, np.abs(filters).argmax(axis=0)[None], axis=0) > 0).all()


def test_a_small_number_keeps_directions_without_variance_finite():
    flat = np.broadcast_to(images()[..., :1], (40, 8, 8, CHANNELS))  # all channels alike
    kernel = whitening_kernel(flat, 1, smallest=1e-2)
    np.testing.assert_allclose(np.linalg.norm(kernel[0, 0], axis=0).max(), 10, rtol=1e-3)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_the_layer_is_a_convolution_and_the_activation_and_repeats_the_last_row_and_column(activation):
    x = images()[:3]
    layer = WhiteningLayer(0, side=SIDE, activation=activation)
    variables = variables_of(layer, x[:1])
    kernel = np.asarray(variables["params"][FIXED], np.float64)
    repeated = np.pad(x, ((0, 0), (0, SIDE - 1), (0, SIDE - 1), (0, 0)), mode="edge")
    channels = layer.channels(x.shape[3])
    z = (patches(repeated, SIDE) @ kernel.reshape(-1, channels)).reshape(3, 8, 8, channels)
    cubic = np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)
    wanted = np.maximum(z, 0) if activation == "relu" else 0.5 * z * (1 + np.tanh(cubic))
    np.testing.assert_allclose(layer.apply(variables, jnp.asarray(x, jnp.float32), 3, False), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "changes", [{}, {"optimizer": "sgd"}, {"frozen_groups": 1}, {"clip_norm": 1.0, "bias_rate": 3.0}], ids=lambda c: "-".join(c) or "adamw"
)
def test_training_leaves_the_kernel_to_the_bit_and_the_layers_learn(changes):
    run = small_run(config_of(**CIFARNET, weight_decay=0.5, learning_rate=0.1, **changes))
    new, _ = quick_jit(functools.partial(train_step, run.plan.program, None))(run.task, run.states, run.batch())
    old, changed = run.states[0].params, new[0].params
    np.testing.assert_array_equal(changed["layers_0"][FIXED], old["layers_0"][FIXED])
    assert np.any(changed["layers_1"]["kernel"] != old["layers_1"]["kernel"]) == ("frozen_groups" not in changes)
    assert np.any(new[1].params["layers_0"]["kernel"] != run.states[1].params["layers_0"]["kernel"])


@pytest.mark.slow
def test_a_run_starts_with_the_kernel_of_its_training_images_keeps_and_exports_it(tmp_path, call):
    config = tiny(**CIFARNET | {"epochs": 2})
    train(config, tmp_path / "run")
    kernel = np.asarray(load_run(tmp_path / "run").states[0].params["layers_0"][FIXED])
    assert np.linalg.norm(kernel) > 1
    train(dataclasses.replace(config, seed=1), tmp_path / "other")  # other training images
    assert np.any(kernel != np.asarray(load_run(tmp_path / "other").states[0].params["layers_0"][FIXED]))
    call("export", f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'w.safetensors'}")
    (exported,) = [value for name, value in safetensors.numpy.load_file(tmp_path / "w.safetensors").items() if name.endswith(FIXED)]
    np.testing.assert_array_equal(exported, kernel)
    config = dataclasses.replace(config, seed=1, init_from=str(tmp_path / "w.safetensors"))
    train(config, tmp_path / "third")
    np.testing.assert_array_equal(load_run(tmp_path / "third").states[0].params["layers_0"][FIXED], kernel)


@pytest.mark.slow
@pytest.mark.parametrize("grouping", ["width", "block", "layer"])
def test_cifarnet_is_local(grouping):
    found = locality.certify(config_of(**CIFARNET, grouping=grouping))
    assert (found["local"], found["violations"]) == (True, [])


def test_cifarnet_pools_before_it_normalises_and_its_blocks_are_pairs():
    config = config_of(network="cifarnet", widths=(4, 6, 6), whitening=2, dataset="synthetic")
    first, *layers = find(config).layers(config, "batch")
    assert (type(first), first.channels(3), first.learns) == (WhiteningLayer, 24, False)
    assert [(layer.width, layer.pool, layer.pools_first, layer.ends_block) for layer in layers] == [
        *((4, 2, True, False), (4, 1, False, True)),
        *((6, 2, True, False), (6, 1, False, True)) * 2,
    ]
    counts = {grouping: [len(part) for part in cut((first, *layers), grouping)] for grouping in ("width", "block", "layer", "all")}
    assert counts == {"width": [3, 4], "block": [3, 2, 2], "layer": [2, 1, 1, 1, 1, 1], "all": [7]}


def test_pooling_first_is_pooling_of_the_convolution():
    x = jnp.asarray(images()[:2], jnp.float32)
    layer = ConvLayer(5, pool=2, pools_first=True, norm="none", activation="gelu")
    variables = variables_of(layer, x[:1])
    plain = ConvLayer(5, norm="none", activation="relu")
    bias = variables["params"]["bias"]
    shifted = {"params": variables["params"] | {"bias": jnp.full_like(bias, 100.0)}}  # ReLU passes everything
    z = np.asarray(plain.apply(shifted, x, 2, False), np.float64) - 100
    pooled = z.reshape(2, 4, 2, 4, 2, 5).max(axis=(2, 4)) + np.asarray(bias, np.float64)
    np.testing.assert_allclose(layer.apply(variables, x, 2, False), jax.nn.gelu(pooled), rtol=1e-3, atol=1e-3)


def test_heads_stand_behind_each_group_of_cifarnet():
    config = config_of(network="cifarnet", widths=(4, 6, 6), whitening=2, dataset="synthetic")
    assert [group.width for group in make_groups(config, "batch", 10)] == [4, 6]


@pytest.mark.slow
def test_one_layer_behind_the_whitening_is_local_trivially():
    config = config_of(network="conv", widths=(4,), pools=(2,), whitening=2, rule="head", grouping="all")
    found = locality.certify(config, numeric=False)
    assert (found["local"], found["groups"]) == (True, {"group0": 1})
    assert "trivially" in found["verdict"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"network": "mlp", "widths": (4,), "whitening": 2}, "config.whitening=2: means nothing to network=mlp; leave it at 0"),
        ({"network": "mlp", "widths": (4,), "auxiliary": (4,)}, "config.auxiliary=(4,): means nothing to network=mlp; leave it at ()"),
        ({"network": "resnet18", "activation": "gelu"}, "config.activation='gelu': means nothing to network=resnet18; leave it at 'relu'"),
        ({"network": "resnet18", "norm_scale": False}, "config.norm_scale=False: means nothing to network=resnet18; leave it at True"),
        ({"network": "cifarnet", "widths": (4,), "image_size": 4, "whitening": 8}, "config.whitening=8: is larger than 4x4 images; use 2"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_network_that_would_ignore_a_key_refuses_it(changes, said):
    with pytest.raises(UserError) as refused:
        check_against_data(make_plan(tiny(**changes), 100, 10), 100, (8, 8, 1))
    assert str(refused.value) == said


def test_slow_averages_of_a_run_that_starts_from_a_file_begin_with_its_weights(tmp_path):
    config = tiny(**CIFARNET | {"whitening": 0})
    dataset = load.load(config)
    plan = experiment.plan_for(config, dataset)
    states, _ = experiment.start(plan, dataset)
    filled = tuple(state._replace(params=jax.tree.map(lambda p: p + 7, state.params)) for state in states)
    write_weights(tmp_path / "w.safetensors", plan, filled, {})
    config = dataclasses.replace(config, look_ahead=2, init_from=str(tmp_path / "w.safetensors"))
    states, _ = experiment.start(experiment.plan_for(config, dataset), dataset)
    slow = states[1].opt_state.slow
    assert_same_bits(slow, states[1].params)
    assert np.min(slow["layers_0"]["kernel"]) > 0
    assert_same_bits(states[1].params, filled[1].params)
