"""The local rules: each loss against a slow NumPy version of its definition, and every rule that the registry knows in steps and runs."""

import contextlib
import dataclasses
import functools
import json
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracles
from oracles import CONV, MLP, assert_close, config_of, differs, leaves, numeric_gradient, quick_jit, slow_but, small_run
from runs import assert_same_bits, tiny, train
from vffjax import rules
from vffjax.config import of_program, to_json
from vffjax.errors import UserError
from vffjax.files import write_json
from vffjax.hyperparameters import at_peak
from vffjax.keys import fields_of
from vffjax.ops.channel_sets import normalise_sets
from vffjax.proofs import locality
from vffjax.registry import RULES
from vffjax.rules import cwc, local, predsim
from vffjax.rules.streams import Streams
from vffjax.runs import checkpoint, summary
from vffjax.runs.checkpoint import Checkpoints
from vffjax.runs.workdir import claim_workdir, load_run
from vffjax.training.checks import from_json
from vffjax.training.plan import groups_of, init_states
from vffjax.training.trainer import train_step
from vffjax.uses import evaluation, reproduction
from vffjax.weights.weights import read_weights, write_weights

CLASSES = 3
LABELS = np.array([2, 0, 2, 1, 0])
SHAPES = [(3, 3, 4), (7,)]  # of one row of features: a map of odd sides, and features without positions


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def loss_of(config, labels, copy_labels=(), classes=CLASSES):
    """A rule's loss of one group, compiled: `(rows, params)` to its value, its own metrics, and the gradients in both."""
    rule, hyper = rules.find(config), at_peak(config, 1).of(0)

    def loss(rows, params):
        made = Streams(rows, jnp.asarray(labels), jnp.asarray(copy_labels, dtype=jnp.asarray(labels).dtype))
        logits = jnp.zeros((len(labels), classes))
        return rule.loss(local.Seen(config, rule.options_of(config), hyper, 0, made, made, logits, params, jax.random.key(0)))

    def call(rows, params):
        (value, metrics), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(rows, params)
        return value, metrics, *gradients

    compiled = quick_jit(call)
    return lambda rows, params: compiled(jnp.asarray(rows), jax.tree.map(jnp.asarray, params))


def assert_is(found, oracle, rows, kernel=None):
    """The value and the gradients, in the rows and in the rule's kernel, are those of a float64 function of both."""
    value, _, of_rows, of_params = found(rows, {} if kernel is None else {"kernel": kernel})
    np.testing.assert_allclose(value, oracle(rows, kernel), rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(of_rows, numeric_gradient(lambda z: oracle(z, kernel), rows), rtol=2e-4, atol=2e-6)
    if kernel is not None:
        np.testing.assert_allclose(of_params["kernel"], numeric_gradient(lambda w: oracle(rows, w), kernel), rtol=2e-4, atol=2e-6)


def assert_finite(found, rows, params):
    """The value and all gradients, where all features are zero and where those of one image are."""
    for zero in (slice(None), 1):
        z = np.array(rows)
        z[zero] = 0
        for leaf in jax.tree.leaves(found(z, params)):
            assert np.isfinite(leaf).all()


def projected(rows, kernel):
    """Each flattened row by the kernel, one sum of products at a time."""
    flat = [row.ravel() for row in rows]
    return np.array([[sum(row[i] * kernel[i, c] for i in range(len(row))) for c in range(kernel.shape[1])] for row in flat])


# ----------------------------------------------------------------------------------------------------------------------------------
# predsim


def predsim_oracle(rows, kernel, labels, classes, weight):
    """Pair by pair: the squared difference of the cosine of two mapped images and of their one-hot labels, all centred."""
    vectors = []
    for mapped in oracles.conv(rows, kernel) if rows.ndim == 4 else projected(rows, kernel):
        vector = mapped.ravel()
        if mapped.ndim == 3 and mapped.shape[0] > 1 and mapped.shape[2] > 3:
            channels = [mapped[:, :, c].ravel() for c in range(mapped.shape[2])]
            vector = np.array([np.sqrt(((z - z.mean()) ** 2).mean() + predsim.EPSILON) for z in channels])
        vectors.append(vector - vector.mean())
    told = [np.array([float(c == y) for c in range(classes)]) - 1 / classes for y in labels]
    n = len(rows)
    squares = [(oracles.cosine(vectors[i], vectors[j]) - oracles.cosine(told[i], told[j])) ** 2 for i in range(n) for j in range(n)]
    return weight * sum(squares) / n**2


@pytest.mark.parametrize("weight", [0.99, 0.4])
@pytest.mark.parametrize("shape", [*SHAPES, (1, 1, 4), (3, 2, 3)], ids=str)
def test_predsim_and_its_gradients_equal_the_definition(shape, weight):
    found = loss_of(config_of(rule="predsim", rule_options={"weight": weight}), LABELS)
    size = (3, 3, shape[-1], shape[-1]) if len(shape) == 3 else (shape[-1], shape[-1])
    rows, kernel = random(1, len(LABELS), *shape), 0.5 * random(2, *size)
    assert_is(found, lambda z, w: predsim_oracle(z, w, LABELS, CLASSES, weight), rows, kernel)
    _, metrics, *_ = found(rows, {"kernel": kernel})
    np.testing.assert_allclose(metrics["similarity_loss"], predsim_oracle(rows, kernel, LABELS, CLASSES, 1.0), rtol=2e-5)
    assert_finite(found, rows, {"kernel": kernel})


# ----------------------------------------------------------------------------------------------------------------------------------
# symba


@pytest.mark.parametrize("alpha", [4.0, 0.5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_symba_and_its_gradient_equal_the_definition(shape, alpha):
    n = len(LABELS)
    found = loss_of(config_of(rule="symba", rule_options={"alpha": alpha}), LABELS, np.tile(LABELS, 2))
    rows = random(3, 3 * n, *shape)  # clean, told the right label, told a wrong one

    def goodness(z, i):
        return sum(v**2 for v in z[i].ravel()) / z[i].size

    def oracle(z, _):
        return sum(np.log(1 + np.exp(-alpha * (goodness(z, n + i) - goodness(z, 2 * n + i)))) for i in range(n)) / n

    assert_is(found, oracle, rows)
    _, metrics, of_rows, _ = found(rows, {})
    assert (np.asarray(of_rows)[:n] == 0).all()  # the clean images teach the layers nothing
    difference = np.mean([goodness(rows, n + i) - goodness(rows, 2 * n + i) for i in range(n)])
    np.testing.assert_allclose(metrics["goodness_difference"], difference, rtol=1e-4)
    assert_finite(found, rows, {})


# ----------------------------------------------------------------------------------------------------------------------------------
# mono_forward


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mono_forward_and_its_gradients_equal_the_definition(shape, smoothing):
    found = loss_of(config_of(rule="mono_forward", label_smoothing=smoothing), LABELS)
    rows, kernel = random(4, len(LABELS), *shape), 0.5 * random(5, np.prod(shape), CLASSES)
    assert_is(found, lambda z, w: oracles.cross_entropy(projected(z, w), LABELS, smoothing), rows, kernel)
    assert_finite(found, rows, {"kernel": kernel})


def assert_scores(rule, rows, params, values):
    """The scores are the log-probabilities of a softmax over these values."""
    own = rules.find(config_of(rule=rule))
    found = own.scores(own.options(), jnp.asarray(rows), params, values.shape[1])
    expected = values - np.log(np.exp(values).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mono_forward_scores_classes_by_its_projection(shape):
    rows, kernel = random(6, 4, *shape), random(7, np.prod(shape), CLASSES)
    assert_scores("mono_forward", rows, {"kernel": jnp.asarray(kernel)}, projected(rows, kernel))


# ----------------------------------------------------------------------------------------------------------------------------------
# supcon


def supcon_oracle(rows, kernel, labels, cells, tau):
    pooled = [oracles.pool_to_grid(row, cells) if row.ndim == 3 else row for row in rows]
    z = [mapped / np.sqrt((mapped**2).sum()) for mapped in projected(pooled, kernel)]
    anchors = []
    for i in range(len(rows)):
        e = {j: np.exp(z[i] @ z[j] / tau) for j in range(len(rows)) if j != i}
        positives = [j for j in e if labels[j] == labels[i]]
        if positives:
            anchors.append(np.mean([-np.log(e[p] / sum(e.values())) for p in positives]))
    return np.mean(anchors) if anchors else 0.0


# Of class 1 there is one image; three images share a class; no two images share one.
BATCHES = {"one alone": LABELS, "three alike": np.array([1, 1, 0, 1, 0]), "all alone": np.array([3, 0, 4, 1, 2])}


@pytest.mark.parametrize(("temperature", "cells"), [(0.1, 2), (0.7, 1)], ids=str)
@pytest.mark.parametrize("shape", [(5, 3, 2), (7,)], ids=str)
@pytest.mark.parametrize("labels", BATCHES.values(), ids=BATCHES)
def test_supcon_and_its_gradients_equal_the_definition(labels, shape, temperature, cells):
    config = config_of(rule="supcon", temperature=temperature, rule_options={"dimensions": 3, "cells": cells})
    found = loss_of(config, labels)
    rows = random(8, len(labels), *shape)
    inputs = shape[0] if len(shape) == 1 else cells**2 * shape[2]
    kernel = random(9, inputs, 3)
    assert_is(found, lambda z, w: supcon_oracle(z, w, labels, cells, temperature), rows, kernel)
    assert_finite(found, rows, {"kernel": kernel})


@pytest.mark.parametrize("weight", [0.0, 0.6])
@pytest.mark.parametrize("shape", [(5, 3, 2), (7,)], ids=str)
def test_vff_supcon_and_its_gradients_equal_the_definition(shape, weight):
    config = config_of(rule="vff_supcon", temperature=0.3, margin=0.1, rule_options={"dimensions": 3, "cells": 2, "weight": weight})
    copy_labels = np.arange(CLASSES)
    found, rows = loss_of(config, LABELS, copy_labels), random(8, len(LABELS) + CLASSES, *shape)
    kernel = random(9, shape[0] if len(shape) == 1 else 4 * shape[2], 3)
    n = len(LABELS)

    def oracle(z, w):
        each = [oracles.in_batch(z[i], LABELS[i], z[n:], copy_labels, "grid", 0.1, 0.3) for i in range(n)]
        return np.mean(each) + weight * supcon_oracle(z[:n], w, LABELS, 2, 0.3)

    assert_is(found, oracle, rows, kernel)
    metrics = found(rows, {"kernel": kernel})[1]
    np.testing.assert_allclose(metrics["cscl"] + weight * metrics["supcon"], oracle(rows, kernel), rtol=2e-5)


@pytest.mark.parametrize("contrast", ["in_batch", "triplet"])
def test_the_gradient_of_vff_may_pass_anchors_or_copies_alone(contrast):
    def gradient(which):
        config = config_of(contrast=contrast, copies_per_class=1, contrast_gradient=which)
        return np.asarray(loss_of(config, LABELS, np.arange(CLASSES))(rows, {})[2])

    rows, n = random(8, len(LABELS) + CLASSES, 7), len(LABELS)
    both, anchors, copies = (gradient(which) for which in ("both", "anchors", "copies"))
    assert not np.any(anchors[n:])
    assert not np.any(copies[:n])
    np.testing.assert_allclose(anchors + copies, both, rtol=1e-5, atol=1e-7)
    assert np.any(anchors) and np.any(copies)


def projected_oracle(rows, params, cells):
    """Of each row the vector of length 1 behind the convolution or dense map, if there is one, ReLU, pooling and the projection."""
    if "before" in params:
        mapped = oracles.conv(rows, params["before"]) if rows.ndim == 4 else projected(rows, params["before"])
        rows = np.maximum(mapped, 0)
    z = projected([oracles.pool_to_grid(row, cells) if row.ndim == 3 else row for row in rows], params["kernel"])
    return z / np.maximum(np.sqrt((z**2).sum(axis=1, keepdims=True)), 1e-9)


def own_params(shape, channels, cells=2, dimensions=3):
    """Random parameters of vff_projected for features of this shape."""
    width = channels or shape[-1]
    params = {"kernel": random(9, width if len(shape) == 1 else cells**2 * width, dimensions)}
    size = (shape[-1], channels) if len(shape) == 1 else (3, 3, shape[-1], channels)
    return params | ({"before": random(10, *size)} if channels else {})


PROJECTIONS = [((5, 3, 2), 0), ((5, 3, 2), 4), ((7,), 0), ((7,), 4)]  # features' shape, channels of the convolution


@pytest.mark.parametrize("changes", [{}, {"contrast": "triplet", "labelling": "triplet"}], ids=["in batch", "triplet"])
@pytest.mark.parametrize(("shape", "channels"), PROJECTIONS, ids=str)
def test_vff_projected_and_its_gradients_equal_the_definition(shape, channels, changes):
    options = {"dimensions": 3, "cells": 2, "channels": channels}
    config = config_of(rule="vff_projected", temperature=0.3, margin=0.1, rule_options=options, **changes)
    n = len(LABELS)
    copy_labels = np.concatenate([LABELS, (LABELS + 1) % CLASSES]) if changes else np.arange(CLASSES)
    rows, params = random(8, n + len(copy_labels), *shape), own_params(shape, channels)

    def oracle(z, own):
        v = projected_oracle(z, own, 2)
        if changes:
            return np.mean([oracles.triplet(v[i], v[n + i], v[2 * n + i], "flat", 0.1, 0.3) for i in range(n)])
        return np.mean([oracles.in_batch(v[i], LABELS[i], v[n:], copy_labels, "flat", 0.1, 0.3) for i in range(n)])

    found = loss_of(config, LABELS, copy_labels)
    value, metrics, of_rows, of_params = found(rows, params)
    assert metrics == {}
    np.testing.assert_allclose(value, oracle(rows, params), rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(of_rows, numeric_gradient(lambda z: oracle(z, params), rows), rtol=2e-4, atol=2e-6)
    for name, values in params.items():
        expected = numeric_gradient(lambda w, name=name: oracle(rows, params | {name: w}), values)
        np.testing.assert_allclose(of_params[name], expected, rtol=2e-4, atol=2e-6)
    assert_finite(found, rows, params)


@pytest.mark.parametrize("dimensions", [3, 8])
def test_a_projection_that_turns_features_is_no_projection(dimensions):
    """Cosines do not change by an orthogonal map, so that the loss is that of vff on the same cells."""
    rows, copy_labels = random(8, len(LABELS) + CLASSES, 4, 4, 2), np.arange(CLASSES)
    turn = np.linalg.qr(random(9, 8, 8))[0]
    own = config_of(rule="vff_projected", rule_options={"dimensions": dimensions, "cells": 2})
    found, plain = loss_of(own, LABELS, copy_labels), loss_of(config_of(similarity="grid"), LABELS, copy_labels)(rows, {})
    value, _, of_rows, _ = found(rows, {"kernel": turn[:, :dimensions]})
    same = dimensions == 8
    assert np.allclose(value, plain[0], rtol=1e-4) == same
    assert np.allclose(of_rows, plain[2], rtol=1e-3, atol=1e-5) == same


@pytest.mark.parametrize(("shape", "channels"), PROJECTIONS, ids=str)
def test_vff_projected_judges_a_label_by_the_cosine_of_projected_features(shape, channels):
    config = config_of(rule="vff_projected", inference="sweep", rule_options={"dimensions": 3, "cells": 2, "channels": channels})
    clean, told, params = random(1, 4, *shape), random(2, 4, *shape), own_params(shape, channels)
    found = rules.find(config).fits(config, jnp.asarray(clean), jnp.asarray(told), jax.tree.map(jnp.asarray, params))
    expected = (projected_oracle(clean, params, 2) * projected_oracle(told, params, 2)).sum(axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("shape", "channels"), PROJECTIONS, ids=str)
def test_what_vff_projected_owns_has_the_size_of_its_group(shape, channels):
    rule = rules.find(config_of(rule="vff_projected"))
    options = rule.options(dimensions=3, cells=2, channels=channels)
    made = rule.parameters(options, shape, CLASSES, jax.random.key(0))
    # Two of its five rows and two of its three columns make a cell of the map.
    assert jax.tree.map(np.shape, made) == jax.tree.map(np.shape, own_params(shape, channels))
    assert {leaf.dtype for leaf in jax.tree.leaves(made)} == {np.dtype(np.float32)}
    assert rule.cells(config_of(rule="vff_projected", rule_options={"channels": channels})) == (None if channels else 2)


def test_the_head_teaches_the_projection_nothing_and_the_projection_the_head_nothing(key):
    """Exactly: with another weight of the head, what the rule owns has the same gradient, and so has the head under another rule."""
    changes = {"rule": "vff_projected", "rule_options": {"channels": 3}}
    one, other, head = (gradients_of(key, **c) for c in (changes, changes | {"head_weight": 2.0}, {"rule": "head"}))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(one[1]))
    assert_close(one[1], other[1], rtol=1e-6)
    assert_close(one[0], head[0], atol=1e-8)
    assert differs(one[2], other[2])


def test_supcon_of_one_image_is_zero():
    value, _, of_rows, of_params = loss_of(config_of(rule="supcon"), LABELS[:1])(random(8, 1, 7), {"kernel": random(9, 7, 3)})
    assert value == 0
    assert (of_rows == 0).all()
    assert (of_params["kernel"] == 0).all()


NETWORKS = {"mlp": MLP, "conv4": CONV | {"widths": (10, 10, 12, 12)}}  # with enough channels for ten classes


# ----------------------------------------------------------------------------------------------------------------------------------
# cwc and deeper_forward, whose classes compete by sets of channels

SETS = {4: [[0, 1], [2], [3]], 6: [[0, 1], [2, 3], [4, 5]], 7: [[0, 1, 2], [3, 4], [5, 6]]}  # of channels, for three classes


# Of an activity, which the goodness of a class averages over its set and over positions.
ACTIVITY = {"cwc": np.square, "deeper_forward": np.asarray}


def class_goodness(rule, rows):
    return np.array([[np.mean([ACTIVITY[rule](row[..., c]) for c in own]) for own in SETS[rows.shape[-1]]] for row in rows])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("shape", [(3, 3, 4), (3, 2, 6), (7,)], ids=str)
@pytest.mark.parametrize("rule", ACTIVITY)
def test_competing_classes_and_their_gradient_equal_the_definition(rule, shape, smoothing):
    found = loss_of(config_of(rule=rule, label_smoothing=smoothing), LABELS)
    rows = 1.5 * random(10, len(LABELS), *shape)
    assert_is(found, lambda z, _: oracles.cross_entropy(class_goodness(rule, z), LABELS, smoothing), rows)
    right = np.mean([class_goodness(rule, rows)[i, y] for i, y in enumerate(LABELS)])
    np.testing.assert_allclose(found(rows, {})[1]["right_goodness"], right, rtol=1e-5)
    assert_finite(found, rows, {})


@pytest.mark.parametrize("shape", [(3, 3, 4), (7,)], ids=str)
@pytest.mark.parametrize("rule", ACTIVITY)
def test_competing_classes_are_scored_by_their_goodness(rule, shape):
    rows = random(11, 4, *shape)
    assert_scores(rule, rows, {}, class_goodness(rule, rows))


def normalised_by_sets(rows):
    out = np.array(rows, np.float64)
    for row in out:
        for own in SETS[rows.shape[-1]] if rows.shape[-1] >= 6 else [list(range(rows.shape[-1]))]:  # two channels for each of three sets
            part = row[..., own]
            row[..., own] = (part - part.mean()) / np.sqrt(part.var() + 1e-5)
    return out


@pytest.mark.parametrize("shape", [(3, 3, 4), (3, 2, 6), (7,), (4, 4, 2), (5,)], ids=str)
def test_inputs_are_normalised_by_the_sets_of_classes(shape):
    rows = 3 + 2 * random(12, 5, *shape)
    np.testing.assert_allclose(normalise_sets(jnp.asarray(rows), 3), normalised_by_sets(rows), atol=2e-5)


@pytest.mark.parametrize("network", ["mlp", "conv4"])
def test_under_deeper_forward_no_layer_sees_the_goodness_of_the_one_before(network, key):
    # A change of goodness alone, by a positive scale and an offset of each class's set, reaches no later layer.
    config = config_of(**NETWORKS[network] | {"rule": "deeper_forward", "grouping": "layer"})
    _, second, *_ = groups_of(config, 3)
    shape = (6, 4, 4, 10) if network == "conv4" else (6, 12)
    x = jax.random.normal(key, shape)
    owner = np.arange(shape[-1]) * 3 // shape[-1]
    changed = jnp.asarray(np.asarray(x) * np.array([0.5, 2.0, 3.0])[owner] + np.array([1.0, -2.0, 5.0])[owner], jnp.float32)
    params, stats = second.init(key, x)
    seen, _ = second.features(params, stats, x, 6, True)
    np.testing.assert_allclose(second.features(params, stats, changed, 6, True)[0], seen, atol=1e-3)
    assert np.abs(seen).max() > 0.5


def test_channels_of_images_and_of_whitened_images_belong_to_no_class():
    config = config_of(**NETWORKS["conv4"] | {"rule": "deeper_forward", "whitening": 2})
    layers = [layer for group in groups_of(config, 3) for layer in group.module.layers]
    assert [(layer.learns, layer.sets) for layer in layers] == [(False, 1), (True, 1), (True, 3), (True, 3), (True, 3)]


@pytest.mark.parametrize("channels", [10, 13, 64, 99])
def test_cwc_gives_every_channel_to_one_class_and_sets_differ_by_one(channels):
    alone = np.asarray(cwc.goodness(jnp.eye(channels), 10))  # each row has one active channel
    sizes = [np.count_nonzero(alone[:, c]) for c in range(10)]
    assert (np.count_nonzero(alone, axis=1) == 1).all()
    assert sum(sizes) == channels
    assert max(sizes) - min(sizes) <= 1


def test_cwc_needs_a_channel_for_each_class():
    config = config_of(rule="cwc", widths=(12, 9))
    with pytest.raises(UserError, match=r"config\.rule='cwc': a group of 9 channels .* 10 classes; use wider"):
        rules.find(config).check_data(config, (8, 8, 1), 10, (12, 9))
    rules.find(config).check_data(config, (8, 8, 1), 9, (12, 9))


# ----------------------------------------------------------------------------------------------------------------------------------
# The rules' own parameters, and the head's share

KERNELS = {
    ("predsim", (5, 4, 6)): (3, 3, 6, 6),
    ("predsim", (7,)): (7, 7),
    ("mono_forward", (5, 4, 6)): (120, CLASSES),
    ("mono_forward", (7,)): (7, CLASSES),
    ("supcon", (5, 4, 6)): (2 * 2 * 6, 128),
    ("supcon", (1, 4, 6)): (1 * 2 * 6, 128),
    ("supcon", (7,)): (7, 128),
    ("vff_supcon", (5, 4, 6)): (2 * 2 * 6, 128),
    ("vff_projected", (5, 4, 6)): (2 * 2 * 6, 128),
    ("vff_projected", (7,)): (7, 128),
}


@pytest.mark.parametrize(("rule", "shape"), KERNELS, ids=str)
def test_the_kernel_that_a_rule_owns_has_the_size_of_its_group(rule, shape):
    found = rules.find(config_of(rule=rule))
    make = functools.partial(found.parameters, found.options(), shape, CLASSES)
    kernel, other = make(jax.random.key(0))["kernel"], make(jax.random.key(1))["kernel"]
    assert kernel.shape == KERNELS[rule, shape]
    assert kernel.dtype == jnp.float32
    assert differs(kernel, other)


def gradients_of(key, **changes):
    """Gradients of a group's loss in its layers, its head and its rule's own parameters; the group is the same whatever the rule."""
    run = small_run(config_of(network="mlp", widths=(7,), **changes))
    base = small_run(config_of(network="mlp", widths=(7,), rule="head"))
    params = run.states[0].params | base.states[0].params
    streams = oracles.streams_of(run, key)
    loss = lambda p: local.local_loss(p, oracles.setting_of(run, 0, key), run.plan.groups[0], base.states[0].batch_stats, streams)[0]  # noqa: E731
    found = dict(quick_jit(jax.grad(loss))(params))
    return found.pop("head"), found.pop("rule", {}), found


@pytest.mark.slow
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_predsim_gives_the_layers_one_minus_weight_of_the_head_and_the_head_all(weight, key):
    head, own, layers = gradients_of(key, rule="predsim", rule_options={"weight": weight})
    head_alone, _, layers_by_head = gradients_of(key, rule="head")
    _, own_alone, layers_by_matching = gradients_of(key, rule="predsim", rule_options={"weight": 1.0})
    assert_close(head, head_alone, atol=1e-8)
    assert_close(layers, jax.tree.map(lambda a, b: (1 - weight) * a + weight * b, layers_by_head, layers_by_matching), rtol=1e-4)
    assert_close(own, jax.tree.map(lambda g: weight * g, own_alone), rtol=1e-4)
    assert differs(layers_by_head, layers_by_matching)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_supcon_gives_the_layers_a_share_of_the_head(share, key):
    head, _, layers = gradients_of(key, rule="supcon", head_weight=share)
    head_alone, _, layers_by_head = gradients_of(key, rule="head")
    _, _, layers_by_contrast = gradients_of(key, rule="supcon", head_weight=0.0)
    assert_close(head, head_alone, atol=1e-8)
    assert_close(layers, jax.tree.map(lambda a, b: share * a + b, layers_by_head, layers_by_contrast), rtol=1e-4)


CUT = [
    ("predsim", {"rule_options": {"weight": 1.0}}),
    ("supcon", {"head_weight": 0.0}),
    ("symba", {}),
    ("mono_forward", {}),
    ("cwc", {}),
    ("deeper_forward", {}),
]


@pytest.mark.parametrize(("rule", "changes"), CUT, ids=str)
def test_a_head_that_only_reads_sends_not_even_infinity_to_the_layers(rule, changes):
    plan_config = of_program(config_of(rule=rule, **changes))
    share = rules.find(plan_config).head_share(plan_config, at_peak(config_of(rule=rule, **changes), 1).of(0))
    _, pull = jax.vjp(lambda seen: local._with_share(seen, share), jnp.ones(2))
    (gradient,) = pull(jnp.array([jnp.inf, jnp.nan]))
    assert (gradient == 0).all()


# ----------------------------------------------------------------------------------------------------------------------------------
# Every rule that the registry knows: steps of tiny networks

EVERY = [(network, rule) for rule in RULES.names for network in NETWORKS]


def owns(rule):
    return RULES.find(rule).parameters is not None


@functools.cache
def step_of(plan, active):
    return quick_jit(functools.partial(train_step, plan, active))


def stepped(run, active=None):
    """The states after one step, and its metrics. Programs are shared by runs that have the same."""
    return step_of(run.plan.program, active)(run.task, run.states, run.batch())


def moved(before, after):
    """The kernels of a group by whether a step changed them."""
    pairs = zip(leaves(before.params), leaves(after.params), strict=True)
    return {path: bool((a != b).any()) for (path, a), (_, b) in pairs if "kernel" in path}


@pytest.mark.slow
@pytest.mark.parametrize(("network", "rule"), EVERY)
def test_a_step_is_finite_and_moves_every_kernel(network, rule):
    run = small_run(config_of(**NETWORKS[network], rule=rule, learning_rate=0.1))
    states, metrics = stepped(run)
    for name, values in metrics.items():
        assert np.isfinite(values).all(), name
    for group, before, after in zip(run.plan.groups, run.states, states, strict=True):
        found = moved(before, after)
        assert len(found) == len(group.module.layers) + 1 + owns(rule)
        assert all(found.values()), found


@pytest.mark.slow
@pytest.mark.parametrize("rule", list(RULES.names))
def test_the_sequential_schedule_moves_one_group_at_a_time(rule):
    run = small_run(config_of(**MLP, rule=rule, schedule="sequential"))
    for active in range(len(run.plan.groups)):
        states, metrics = stepped(run, active)
        assert metrics["loss"].shape == (1,)
        for i, (before, after) in enumerate(zip(run.states, states, strict=True)):
            assert set(moved(before, after).values()) == {i == active}


@pytest.mark.slow
@pytest.mark.parametrize("rule", [rule for rule in RULES.names if owns(rule)])
def test_overrides_hold_for_the_parameters_of_a_rule(rule):
    overrides = {"group0": {"learning_rate": 0.0}, "group1": {"optimizer": "sgd"}}
    run = small_run(config_of(**MLP, rule=rule, overrides=overrides))
    states, _ = stepped(run)
    still, *others = [moved(before, after) for before, after in zip(run.states, states, strict=True)]
    assert not any(still.values())
    assert all(all(found.values()) for found in others)
    kinds = [len([path for path, _ in leaves(state.opt_state) if "rule" in path]) for state in states]
    assert kinds == [2, 1, 2]  # two moments by adamw, one trace by sgd


@pytest.mark.parametrize(("network", "rule"), slow_but(EVERY, ("mlp", "mono_forward"), several=True))
def test_a_rule_is_local(network, rule):
    found = locality.certify(config_of(**NETWORKS[network], rule=rule), numeric=False)
    assert found["local"], found["violations"]
    assert {seen["own_rule"] for seen in found["sees"].values()} == {"floating point" if owns(rule) else "no"}


@pytest.mark.slow
@pytest.mark.parametrize("rule", list(RULES.names))
def test_a_frozen_group_keeps_its_layers_and_what_the_rule_owns_there(rule):
    config = config_of(**MLP, rule=rule, frozen_groups=1, weight_decay=0.1)
    run = small_run(config)
    states, metrics = stepped(run)
    before, after = run.states[0].params, states[0].params
    assert {name for name in before if differs(before[name], after[name])} == {"head"}
    assert all(all(moved(*pair).values()) for pair in list(zip(run.states, states, strict=True))[1:])
    assert metrics["local_loss"][0] == 0
    found = locality.certify(config, numeric=False)
    assert found["local"], found["violations"]


@pytest.mark.slow
@pytest.mark.parametrize("rule", [rule for rule in RULES.names if owns(rule)])
def test_a_run_keeps_what_a_rule_owns_in_a_frozen_group(rule, tmp_path):
    config = tiny(rule=rule, epochs=1, train_examples=100, frozen_groups=1)
    train(config, tmp_path)
    plan, states, _, run = load_run(tmp_path, "1")
    start = init_states(plan, tuple(run["image_shape"]))
    assert_same_bits(states[0].params["rule"], start[0].params["rule"])
    assert differs(states[1].params["rule"], start[1].params["rule"])


# ----------------------------------------------------------------------------------------------------------------------------------
# Every rule that the registry knows: runs on digits


class Killed(BaseException):
    """Stands for a signal: nothing in the library catches it."""


@contextlib.contextmanager
def killed_after_an_epoch():
    sound = checkpoint.Writer.save

    def save(self, *arguments):
        sound(self, *arguments)
        raise Killed

    with mock.patch.object(checkpoint.Writer, "save", save), pytest.raises(Killed):
        yield


def ways_of(rule):
    """How classes can be scored under a rule."""
    found = RULES.find(rule)
    return ["heads"] + ["sweep"] * (found.fits is not None) + ["rule"] * (found.scores is not None)


@pytest.mark.slow
@pytest.mark.parametrize("rule", list(RULES.names))
def test_a_run_goes_on_is_judged_exported_and_reproduced(rule, tmp_path):
    ways = ways_of(rule)
    config = tiny(rule=rule, epochs=2, train_examples=200, inference=ways[-1], overrides={"group1": {"optimizer": "sgd"}})
    with killed_after_an_epoch():
        train(config, tmp_path / "run")
    assert Checkpoints(tmp_path / "run").epochs() == [1]
    done = train(config, tmp_path / "run")
    assert done["epochs"] == 2

    plan, states, _, run = load_run(tmp_path / "run", "2")
    start = init_states(plan, tuple(run["image_shape"]))
    for before, after in zip(start, states, strict=True):
        assert all(moved(before, after).values())

    for way in [*ways, "early_exit"]:
        judged = evaluation.evaluate(tmp_path / "run", way)
        assert judged["test_error"] < 85, way  # chance is 90
        assert way != ways[-1] or judged["test_error"] == done["test_error"]

    about = {key: run[key] for key in ("class_names", "image_shape")}
    write_weights(tmp_path / "weights.safetensors", plan, states, about, names="vffjax")
    read, left_out = read_weights(tmp_path / "weights.safetensors", plan, start)
    assert left_out == []
    for one, other in zip(read, states, strict=True):
        assert_same_bits((one.params, one.batch_stats), (other.params, other.batch_stats))
        assert ("rule" in one.params) == owns(rule)

    with mock.patch.object(summary, "draw_features"), mock.patch.object(summary, "plot_curves"):
        found = reproduction.reproduce(tmp_path / "run", tmp_path / "again")
    assert found["differences"] == []
    assert found["arrays"] >= 2 * len(jax.tree.leaves(states))
    assert not differs(load_run(tmp_path / "again", "2")[1], states)


@pytest.mark.slow
@pytest.mark.parametrize("rule", list(RULES.names))
def test_a_sequential_run_trains_every_group_and_what_the_rule_owns_there(rule, tmp_path):
    config = tiny(rule=rule, epochs=1, train_examples=100, schedule="sequential")
    assert train(config, tmp_path)["epochs"] == 2
    plan, states, _, run = load_run(tmp_path, "2")
    for before, after in zip(init_states(plan, tuple(run["image_shape"])), states, strict=True):
        assert all(moved(before, after).values())


# ----------------------------------------------------------------------------------------------------------------------------------
# The rules' own keys


OPTIONS = [(rule, name) for rule in RULES.names for name in fields_of(RULES.find(rule).options)]


def outside(field):
    """Values that a key does not take, and what is said of each."""
    kind, low, high = type(field.default), field.metadata["low"], field.metadata["high"]
    found = [(0, "has type int", "give a value of type str")] if kind is str else [("many", "type str", f"of type {kind.__name__}")]
    found += [("zzz", "not known", "choose one of")] * bool(field.metadata["choices"])
    found += [] if low is None else [(low - 1, "too small", f"the least is {low}")]
    found += [] if high is None else [(high + 1, "too large", f"the most is {high}")]
    return found + [(float("nan"), "not a finite number", "give a finite number")] * (kind is float)


def another(field):
    """A value that a key takes and that is not its default."""
    numbers = [type(field.default)(value) for value in (field.metadata["low"], field.metadata["high"]) if value is not None]
    values = [*field.metadata["choices"], *numbers, *[True, False] * isinstance(field.default, bool)]
    return next(value for value in values if value != field.default)


@pytest.mark.parametrize(("rule", "name"), OPTIONS)
def test_a_value_that_a_key_of_a_rule_does_not_take_is_refused_by_name(rule, name):
    field = fields_of(RULES.find(rule).options)[name]
    for value, problem, fix in outside(field):
        with pytest.raises(UserError) as refused:
            config_of(rule=rule, rule_options={name: value})
        for part in (f"config.rule_options.{name}={value!r}: ", problem, fix):
            assert part in str(refused.value)


@pytest.mark.parametrize("rule", RULES.names)
def test_a_key_that_a_rule_does_not_have_is_refused_by_name(rule):
    known = ", ".join(fields_of(RULES.find(rule).options)) or "none"
    with pytest.raises(UserError) as refused:
        config_of(rule=rule, rule_options={"zzz": 1})
    assert str(refused.value) == f"config.rule_options.zzz=1: no such key; known here: {known}"


def test_a_key_that_is_misspelt_is_answered_by_the_nearest():
    with pytest.raises(UserError, match=r"config\.rule_options\.wieght=0\.5: no such key; did you mean config\.rule_options\.weight\?"):
        config_of(rule="predsim", rule_options={"wieght": 0.5})


@pytest.mark.parametrize("rule", RULES.names)
def test_keys_that_nobody_sets_stand_in_the_configuration_with_their_defaults(rule):
    config, options = config_of(rule=rule), RULES.find(rule).options
    plain = json.loads(json.dumps(to_json(config)))
    assert plain["rule_options"] == dataclasses.asdict(options())
    assert from_json(plain, "config.json") == config
    assert all(field.metadata["doc"] for field in fields_of(options).values())


@pytest.mark.parametrize(("rule", "name"), OPTIONS)
def test_another_value_of_a_key_of_a_rule_is_another_run_and_another_program(rule, name, tmp_path):
    field = fields_of(RULES.find(rule).options)[name]
    one, other = (tiny(rule=rule, rule_options=changed) for changed in ({}, {name: another(field)}))
    assert one.rule_options[name] != other.rule_options[name]
    assert of_program(one) != of_program(other)
    write_json(tmp_path / "config.json", to_json(one))
    claim_workdir(tmp_path, one)
    with pytest.raises(UserError, match=rf"config\.rule_options=.*'{name}'.* holds a run with .*; give another --workdir"):
        claim_workdir(tmp_path, other)
