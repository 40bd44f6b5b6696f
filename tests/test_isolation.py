"""No gradient crosses a group's border: each loss depends on its own group's parameters and on no other's, in either direction."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oracles import CONV, MLP, config_of, leaves, quick_jit, setting_of, slow_but, small_run, streams_of
from vffjax.proofs import probes
from vffjax.rules import local as rules
from vffjax.rules import vff
from vffjax.training import trainer

RULES = {
    "shared": {},
    "shared, triplet contrast, hard, head": {"contrast": "triplet", "negatives": "hard", "head_weight": 1.0},
    "triplet": {"labelling": "triplet"},
    "triplet, hard, head": {"labelling": "triplet", "negatives": "hard", "head_weight": 1.0},
    "ff, hard": {"rule": "ff", "negatives": "hard", "peer_normalisation": 0.1},
    "head": {"rule": "head"},
}
CASES = [(MLP, rule) for rule in RULES] + [(CONV, rule) for rule in ("shared", "triplet, hard, head", "ff, hard", "head")]
MUTANTS = [(MLP, "shared"), (MLP, "ff, hard"), (MLP, "head"), (CONV, "triplet, hard, head")]


def names(cases):
    return [f"{network['network']}, {rule}" for network, rule in cases]


def losses_and_gradients(run, key):
    """[loss_i] and [i][j] -> d loss_i / d params_j, where every loss is a function of all groups' parameters."""
    gradients = functools.partial(probes.loss_gradients, run.plan.program)
    params = [state.params for state in run.states]
    return quick_jit(lambda params: gradients(params, run.states, streams_of(run, key), run.batch(key=key)))(params)


def leaking_pairs(gradients):
    """(loss, group) of every gradient between different groups that is not exactly zero."""
    pairs = [(i, j) for i in range(len(gradients)) for j in range(len(gradients)) if i != j]
    return [(i, j) for i, j in pairs if any((leaf != 0).any() for _, leaf in leaves(gradients[i][j]))]


@pytest.mark.parametrize(("network", "rule"), slow_but(CASES, (MLP, "shared"), several=True), ids=names(CASES))
def test_a_loss_has_gradients_in_its_own_group_and_nowhere_else(network, rule, key):
    run = small_run(config_of(**network, **RULES[rule]))
    losses, gradients = losses_and_gradients(run, key)
    assert len(gradients) == (2 if network is CONV else 3)
    assert leaking_pairs(gradients) == []
    for i, own in enumerate(gradients):
        kernels = [(path, leaf) for path, leaf in leaves(own[i]) if "kernel" in path]
        assert len(kernels) == len(run.plan.groups[i].module.layers) + 1
        for path, leaf in kernels:
            assert np.isfinite(leaf).all(), (i, path)
            assert (leaf != 0).any(), (i, path)

    # The chain above is the one that a step runs: same losses, from the same parameters and keys.
    if network is MLP and rule in ("triplet, hard, head", "ff, hard"):
        _, metrics = quick_jit(functools.partial(trainer.train_step, run.plan.program, None))(run.task, run.states, run.batch(key=key))
        np.testing.assert_allclose(metrics["loss"], losses, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("network", "rule"), MUTANTS, ids=names(MUTANTS))
def test_the_check_finds_a_leak_where_streams_are_not_detached(network, rule, key, monkeypatch, traces):
    class Leaky:
        lax = types.SimpleNamespace(stop_gradient=lambda x: x)

        def __getattr__(self, name):
            return getattr(jax, name)

    monkeypatch.setattr(rules, "jax", Leaky())
    _, gradients = losses_and_gradients(small_run(config_of(**network, **RULES[rule])), key)
    # The later loss reaches every earlier group; no earlier loss can see a later group.
    assert leaking_pairs(gradients) == [(i, j) for i in range(len(gradients)) for j in range(i)]


@pytest.fixture
def head_gradient(key, monkeypatch, traces):
    """Gradient of the first group's head loss alone, for a head weight."""
    monkeypatch.setattr(vff, "RULE", dataclasses.replace(vff.RULE, loss=lambda seen: (jnp.zeros(()), {})))

    def gradient(weight):
        run = small_run(config_of(**MLP, head_weight=weight))
        group, state = run.plan.groups[0], run.states[0]
        loss = lambda p: rules.local_loss(p, setting_of(run, 0, key), group, state.batch_stats, streams_of(run, key))[0]  # noqa: E731
        grads = dict(quick_jit(jax.grad(loss))(state.params))
        return grads.pop("head"), grads

    return gradient


def test_a_detached_head_learns_and_leaves_its_group_alone(head_gradient):
    head, layers = head_gradient(0.0)
    assert all((leaf != 0).any() for _, leaf in leaves(head))
    assert all((leaf == 0).all() for _, leaf in leaves(layers))


@pytest.mark.slow
def test_head_weight_scales_what_reaches_the_group_and_not_the_head(head_gradient):
    (head, layers), (head_full, layers_full) = head_gradient(0.25), head_gradient(1.0)
    assert all((leaf != 0).any() for path, leaf in leaves(layers_full) if "kernel" in path)
    for (path, part), (_, full) in zip(leaves(layers), leaves(layers_full), strict=True):
        np.testing.assert_allclose(part, 0.25 * full, rtol=1e-5, atol=1e-9, err_msg=path)
    for (path, part), (_, full) in zip(leaves(head), leaves(head_full), strict=True):
        np.testing.assert_allclose(part, full, rtol=1e-6, err_msg=path)
