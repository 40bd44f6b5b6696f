"""Layer grouping: where a network is cut, what a group is called, what its head reads."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracles
from oracles import CONV, MLP, assert_close, assert_same, config_of, differs, quick_jit, setting_of, small_run, streams_of
from vffjax.networks import find
from vffjax.networks.groups import cut, init_variables, make_groups
from vffjax.ops.normalisation import EPSILON
from vffjax.proofs import locality
from vffjax.proofs.probes import random_variables
from vffjax.rules import local as rules
from vffjax.training.plan import groups_of
from vffjax.training.trainer import train_step


def cuts(widths, grouping):
    layers = find(config_of(network="mlp", widths=widths)).layers(config_of(network="mlp", widths=widths), "batch")
    groups = cut(layers, grouping)
    assert sum(groups, ()) == layers  # nothing lost, nothing moved
    return [tuple(layer.width for layer in group) for group in groups]


@pytest.mark.parametrize(
    ("widths", "expected"),
    [
        ((4,), [(4,)]),
        ((4, 4, 4), [(4, 4, 4)]),
        ((4, 4, 6, 6), [(4, 4), (6, 6)]),
        ((4, 6, 4), [(4,), (6,), (4,)]),
        ((4, 4, 6, 4, 4), [(4, 4), (6,), (4, 4)]),
    ],
)
def test_width_cuts_into_maximal_runs_of_equal_width(widths, expected):
    assert cuts(widths, "width") == expected


@pytest.mark.parametrize("widths", [(4,), (4, 4, 6, 4)])
def test_layer_cuts_everywhere_and_all_nowhere(widths):
    assert cuts(widths, "layer") == [(w,) for w in widths]
    assert cuts(widths, "all") == [widths]


@pytest.mark.parametrize(
    ("changes", "widths", "sizes"),
    [(CONV, [4, 6], [2, 2]), (CONV | {"grouping": "all"}, [6], [4]), (MLP, [12, 10, 12], [1, 1, 1])],
    ids=["conv4", "conv4 all", "mlp"],
)
def test_groups_are_numbered_and_know_their_width(changes, widths, sizes):
    groups = groups_of(config_of(**changes), 3)
    assert [group.name for group in groups] == [f"group{i}" for i in range(len(widths))]
    assert [group.width for group in groups] == widths
    assert [len(group.module.layers) for group in groups] == sizes


def test_every_group_is_initialised_by_its_own_key():
    groups = groups_of(config_of(network="mlp", widths=(8, 8, 8), grouping="layer"), 3)
    init = jax.jit(lambda key: init_variables(groups, key, (2, 2, 2)))
    one, again, other = init(jax.random.key(0)), init(jax.random.key(0)), init(jax.random.key(1))
    oracles.assert_same(one, again)
    kernels = [np.asarray(params["layers_0"]["kernel"]) for params, _ in one]
    assert all(kernel.shape == (8, 8) for kernel in kernels)
    assert not np.array_equal(kernels[0], kernels[1])
    assert not np.array_equal(kernels[1], kernels[2])
    assert all(differs(a[0], b[0]) for a, b in zip(one, other, strict=True))
    # Heads start at zero: no group votes before it has learnt.
    assert not any(params["head"]["kernel"].any() for params, _ in one)


@pytest.mark.parametrize("norm", ["batch", "input"])
@pytest.mark.parametrize("head_grid", [1, 2, 4])
def test_the_head_is_linear_on_the_pooled_map(head_grid, norm):
    """`input` leaves features of any scale, which the head then divides out."""
    run = small_run(config_of(**CONV | {"pools": (1, 2, 1, 1)}, norm=norm, head_grid=head_grid))
    group, state = run.plan.groups[1], run.states[1]
    features = np.random.default_rng(0).normal(size=(5, 4, 4, 6))
    z = np.stack([oracles.pool_to_grid(image, head_grid).ravel() for image in features])
    if norm == "input":
        z /= np.sqrt((z**2).mean(1, keepdims=True))
    head = {k: np.asarray(v, np.float64) for k, v in state.params["head"].items()}
    np.testing.assert_allclose(group.logits(state.params, jnp.asarray(features)), z @ head["kernel"] + head["bias"], rtol=1e-3, atol=1e-4)


def test_features_in_evaluation_leave_the_statistics_alone():
    run = small_run(config_of(**CONV))
    group, state = run.plan.groups[0], run.states[0]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 8, 8, 2)), jnp.float32)
    _, kept = group.features(state.params, state.batch_stats, x, 3, False)
    _, moved = group.features(state.params, state.batch_stats, x, 3, True)
    oracles.assert_same(kept, state.batch_stats)
    assert all(differs(moved[layer], state.batch_stats[layer]) for layer in state.batch_stats)


RECOMPUTED = {"vff": CONV, "head": CONV | {"rule": "head"}, "ff": CONV | {"rule": "ff"}, "vff on dense layers": MLP | {"head_weight": 1.0}}


@pytest.mark.slow
@pytest.mark.parametrize("changes", RECOMPUTED.values(), ids=RECOMPUTED.keys())
def test_recomputed_groups_learn_the_same(changes, key):
    """Four layers in two segments, three in two of different length."""
    results = []
    for rematerialise in (False, True):
        run = small_run(config_of(**changes | {"grouping": "all"}, rematerialise=rematerialise))
        state, of_group = run.states[0], (setting_of(run, 0, key), run.plan.groups[0])
        gradient = jax.value_and_grad(rules.local_loss, has_aux=True)
        step = quick_jit(lambda params, stats, streams, g=gradient, own=of_group: g(params, *own, stats, streams))
        results.append(step(state.params, state.batch_stats, streams_of(run, key)))
    (plain, plain_grads), (again, again_grads) = results
    assert_close(again_grads, plain_grads, rtol=1e-3, atol=1e-5)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(again_grads["layers_0"]))
    assert_close(again, plain, rtol=1e-4, atol=1e-5)  # loss, statistics, streams, metrics
    stats = again[1][0]
    assert set(stats) == set(state.batch_stats)
    assert all(differs(stats[layer], state.batch_stats[layer]) for layer in stats)


@pytest.mark.slow
def test_recomputed_features_have_the_same_gradient_in_their_input():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 8, 8, 2)), jnp.float32)
    gradients = []
    for rematerialise in (False, True):
        run = small_run(config_of(**CONV, rematerialise=rematerialise))
        group, state = run.plan.groups[0], run.states[0]
        loss = quick_jit(jax.grad(lambda x, g=group, s=state: jnp.sum(g.features(s.params, s.batch_stats, x, 3, True)[0] ** 2)))
        gradients.append(loss(x))
    assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_parameters_are_those_of_a_forward_pass_and_no_layer_is_computed(key):
    """Flax's own `init` computes the network; ours must give the same bits without it, whatever the images' size."""
    (group,) = groups_of(config_of(**CONV, grouping="all", head_grid=1), 10)
    found = group.init(key, jax.ShapeDtypeStruct((1, 2**20, 2**20, 3), jnp.float32))  # 13 TB as an array
    wanted = jax.device_get(group.module.init(key, jnp.zeros((1, 8, 8, 3))))
    assert_same(found, (wanted["params"], wanted["batch_stats"]))


def test_auxiliary_convolutions_stand_before_the_heads_of_all_groups_but_the_last():
    """Against float64: convolution, normalisation of each row, ReLU, the mean over cells, and the linear map."""
    groups = make_groups(
        config_of(network="conv", widths=(3, 5, 6), pools=(1, 1, 1), grouping="layer", auxiliary=(4,), head_grid=2), "batch", 3
    )
    assert [len(group.head.auxiliary) for group in groups] == [1, 1, 0]
    params, _ = random_variables(jax.eval_shape(lambda: groups[1].init(jax.random.key(0), jnp.zeros((1, 6, 6, 3)))))
    head, features = params["head"], np.random.default_rng(1).normal(size=(5, 6, 6, 5))
    assert sorted(head) == ["auxiliary_0", "bias", "kernel"]
    one = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), head)
    z = oracles.conv(features, one["auxiliary_0"]["kernel"])
    mean, var = z.mean(axis=(1, 2, 3), keepdims=True), z.var(axis=(1, 2, 3), keepdims=True)
    z = np.maximum((z - mean) / np.sqrt(var + EPSILON) * one["auxiliary_0"]["norm"]["scale"] + one["auxiliary_0"]["norm"]["bias"], 0)
    wanted = np.stack([oracles.pool_to_grid(image, 2).ravel() for image in z]) @ one["kernel"] + one["bias"]
    np.testing.assert_allclose(groups[1].logits(params, jnp.asarray(features, jnp.float32)), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["head", "vff"])
def test_auxiliary_layers_learn_and_the_groups_stay_local(rule):
    config = config_of(**CONV, rule=rule, auxiliary=(4,), head_weight=1.0)
    run = small_run(config)
    new, _ = quick_jit(functools.partial(train_step, run.plan.program, None))(run.task, run.states, run.batch())
    assert differs(new[0].params["head"]["auxiliary_0"], run.states[0].params["head"]["auxiliary_0"])
    found = locality.certify(config)
    assert (found["local"], found["violations"]) == (True, [])
