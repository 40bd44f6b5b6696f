"""Losses: values against NumPy float64 loops, gradients against central differences, and what they do at the edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracles
from oracles import config_of, numeric_gradient, quick_jit, small_run
from vffjax.hyperparameters import at_peak
from vffjax.rules import ff, local, vff
from vffjax.rules import similarity as losses
from vffjax.rules.streams import Mixture, Streams, wrong_labels
from vffjax.training.trainer import step_streams, with_draws

SIMILARITIES = ("position", "flat", "grid", "pooled")
MARGIN, TAU = 0.2, 0.1


def maps(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def in_batch(anchor, label, copies, copy_labels, margin, temperature):
    """CSCL of one anchor and its copies, all of unit length."""
    return vff.cscl_in_batch(losses.dot(copies, anchor), label, copy_labels, margin, temperature)


def embedded_triplet(z, kind):
    """The loss as a function of the three maps, stacked."""
    return vff.cscl_triplet(*losses.embed(z, kind), MARGIN, TAU)


def embedded_in_batch(z, kind, label, copy_labels):
    """The first map is the anchor, the others its copies."""
    e = losses.embed(z, kind)
    return in_batch(e[0], label, e[1:], copy_labels, MARGIN, TAU)


@pytest.mark.parametrize("shape", [(4, 5, 3), (1, 1, 3), (6,)], ids=str)
@pytest.mark.parametrize("kind", SIMILARITIES)
def test_dot_products_of_embeddings_are_the_similarity(kind, shape):
    z = maps(0, 5, *shape)
    e = np.asarray(losses.embed(jnp.asarray(z), kind))
    expected = [[oracles.similarity(a, b, kind) for a in z] for b in z]
    np.testing.assert_allclose(e @ e.T, expected, atol=2e-6)


def test_similarities_of_maps_differ_by_kind():
    z = jnp.asarray(maps(0, 2, 4, 4, 3))
    values = [float(np.prod(losses.embed(z, kind), axis=0).sum()) for kind in SIMILARITIES]
    assert len({round(v, 4) for v in values}) == 4


@pytest.mark.parametrize("kind", SIMILARITIES)
def test_triplet_loss_and_gradient_equal_the_definition(kind):
    z = maps(1, 3, 4, 4, 2)
    value, gradient = quick_jit(jax.value_and_grad(lambda z: embedded_triplet(z, kind)))(jnp.asarray(z))
    oracle = lambda z: oracles.triplet(*z, kind, MARGIN, TAU)  # noqa: E731
    np.testing.assert_allclose(value, oracle(z), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, numeric_gradient(oracle, z), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", SIMILARITIES)
def test_in_batch_loss_and_gradient_equal_the_definition(kind):
    z, label, copy_labels = maps(2, 5, 4, 4, 2), 2, np.array([0, 2, 1, 2])
    f = quick_jit(jax.value_and_grad(lambda z: embedded_in_batch(z, kind, label, jnp.asarray(copy_labels))))
    value, gradient = f(jnp.asarray(z))
    oracle = lambda z: oracles.in_batch(z[0], label, z[1:], copy_labels, kind, MARGIN, TAU)  # noqa: E731
    np.testing.assert_allclose(value, oracle(z), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, numeric_gradient(oracle, z), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", ["triplet", "in_batch"])
def test_vmapped_losses_equal_looped_ones(loss):
    labels = jnp.arange(6) % 3
    anchors, copies = (losses.embed(jnp.asarray(maps(seed, 6, 8)), "flat") for seed in (3, 4))
    if loss == "triplet":
        together = jax.vmap(vff.cscl_triplet, (0, 0, 0, None, None))(anchors, copies, copies[::-1], MARGIN, TAU)
        apart = [vff.cscl_triplet(a, p, n, MARGIN, TAU) for a, p, n in zip(anchors, copies, copies[::-1], strict=True)]
    else:
        together = jax.vmap(in_batch, (0, 0, None, None, None, None))(anchors, labels, copies, labels, MARGIN, TAU)
        apart = [in_batch(a, y, copies, labels, MARGIN, TAU) for a, y in zip(anchors, labels, strict=True)]
    np.testing.assert_allclose(together, apart, rtol=1e-5)
    assert together.shape == (6,)


@pytest.mark.parametrize("kind", SIMILARITIES)
def test_degenerate_features_give_finite_losses_and_gradients(kind):
    a = maps(5, 4, 4, 2)
    cases = {
        "all zero": 0 * np.stack([a, a, a]),
        "one zero": np.stack([a, 0 * a, -a]),
        "equal": np.stack([a, a, a]),
        "opposite": np.stack([a, -a, a]),
        "tiny": 1e-15 * np.stack([a, -a, a]),
        "huge": 1e15 * np.stack([a, -a, a]),
    }
    for f in (lambda z: embedded_triplet(z, kind), lambda z: embedded_in_batch(z, kind, 1, jnp.array([1, 0]))):
        value_and_grad = quick_jit(jax.value_and_grad(f))
        for case, z in cases.items():
            value, gradient = value_and_grad(jnp.asarray(z))
            assert np.isfinite(value), case
            assert np.isfinite(gradient).all(), case


@pytest.mark.parametrize("kind", SIMILARITIES)
def test_triplet_loss_does_not_see_the_scale_of_features(kind):
    z = jnp.asarray(maps(6, 3, 4, 4, 2))
    scaled = z * jnp.array([1e-3, 7.0, 1e4]).reshape(3, 1, 1, 1)
    np.testing.assert_allclose(embedded_triplet(scaled, kind), embedded_triplet(z, kind), rtol=1e-5)


@pytest.mark.parametrize("kind", SIMILARITIES)
def test_bf16_features_give_float32_cosines_within_one(kind):
    z = jnp.asarray(maps(7, 40, 4, 4, 33), jnp.bfloat16)
    e = losses.embed(z, kind)
    assert e.dtype == jnp.float32
    cosines = np.asarray(e, np.float64) @ np.asarray(e, np.float64).T
    assert np.abs(cosines).max() <= 1 + 1e-6
    np.testing.assert_allclose(np.diag(cosines), 1, atol=1e-6)


def test_margin_and_temperature_act_as_documented():
    a, p, n = (jnp.array(v) for v in ([1.0, 0.0], [0.6, 0.8], [0.0, 1.0]))
    # s(a, p) = 0.6, s(a, n) = 0: at the margin that equals their difference the loss is tau log 2.
    np.testing.assert_allclose(vff.cscl_triplet(a, p, n, 0.6, 0.5), 0.5 * np.log(2), rtol=1e-5)
    copies, copy_labels = jnp.stack([p, n]), jnp.array([0, 1])
    np.testing.assert_allclose(in_batch(a, 0, copies, copy_labels, 0.6, 0.5), np.log(2), rtol=1e-5)


def seen_of(config, made, key, logits):
    """What a rule's loss may look at, of one group whose features are `made`."""
    return local.Seen(config, None, at_peak(config, 1).of(0), 0, made, made, logits, {}, key)


@pytest.mark.parametrize(
    "changes",
    [{}, {"labelling": "triplet"}, {"labelling": "triplet", "contrast": "in_batch"}, {"contrast": "triplet", "copies_per_class": 3}],
    ids=["shared", "triplet", "triplet, in batch", "shared, triplet contrast"],
)
def test_the_vff_objective_pairs_anchors_and_copies_by_label(changes, key):
    kind = "grid"
    config = config_of(similarity=kind, margin=MARGIN, temperature=TAU, **changes)
    classes, labels = 3, np.array([2, 0, 1, 0])
    wrong = np.array([0, 1, 2, 2])
    copy_labels = np.concatenate([labels, wrong]) if config.labelling == "triplet" else np.tile(np.arange(classes), config.copies_per_class)
    clean, copies = maps(9, 4, 4, 4, 2), maps(10, len(copy_labels), 4, 4, 2)
    made = Streams(*(jnp.asarray(a) for a in (np.concatenate([clean, copies]), labels, copy_labels)))
    value = quick_jit(lambda made: vff.loss(seen_of(config, made, key, jnp.zeros((4, classes))))[0])(made)
    if vff.in_batch(config):
        rows = [oracles.in_batch(a, y, copies, copy_labels, kind, MARGIN, TAU) for a, y in zip(clean, labels, strict=True)]
    elif config.labelling == "triplet":
        rows = [oracles.triplet(a, copies[i], copies[4 + i], kind, MARGIN, TAU) for i, a in enumerate(clean)]
    else:
        drawn = np.asarray(wrong_labels(key, jnp.asarray(labels), classes))
        mean = lambda a, y: np.mean([oracles.similarity(a, c, kind) for c, d in zip(copies, copy_labels, strict=True) if d == y])  # noqa: E731
        pairs = zip(clean, labels, drawn, strict=True)
        rows = [TAU * oracles.softplus((mean(a, w) - mean(a, y) + MARGIN) / TAU) for a, y, w in pairs]
    np.testing.assert_allclose(value, np.mean(rows), rtol=1e-5)


@pytest.mark.parametrize("shape", [(4, 3, 3, 5), (4, 6)], ids=str)
def test_goodness_is_the_mean_square(shape):
    z = maps(11, *shape)
    np.testing.assert_allclose(ff.goodness(jnp.asarray(z)), [np.mean(row**2) for row in z], rtol=1e-6)


@pytest.mark.parametrize("peer", [0.0, 0.7])
@pytest.mark.parametrize("shape", [(4, 3, 3, 5), (4, 6)], ids=str)
def test_forward_forward_loss_and_gradient_equal_the_definition(shape, peer):
    z, threshold = maps(12, 2, *shape), 0.8
    f = quick_jit(jax.value_and_grad(lambda z: ff.forward_forward(z[0], z[1], threshold, peer or None)))
    value, gradient = f(jnp.asarray(z))
    oracle = lambda z: oracles.forward_forward(z[0], z[1], threshold, peer)  # noqa: E731
    np.testing.assert_allclose(value, oracle(z), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, numeric_gradient(oracle, z), rtol=1e-4, atol=1e-6)


def test_the_forward_forward_rule_takes_right_labels_as_positive():
    config = config_of(rule="ff", goodness_threshold=0.5)
    copies = maps(13, 8, 3, 3, 2) * np.array([2.0] * 4 + [0.1] * 4).reshape(-1, 1, 1, 1)
    labels = np.zeros(4, np.int32)
    made = Streams(*(jnp.asarray(a) for a in (np.concatenate([copies[:4], copies]), labels, np.tile(labels, 2))))
    value, _ = ff.loss(seen_of(config, made, None, None))
    np.testing.assert_allclose(value, oracles.forward_forward(copies[:4], copies[4:], 0.5, 0.0), rtol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_head_cross_entropy_and_gradient_equal_the_definition(smoothing):
    logits, labels = 3 * maps(14, 5, 4), np.array([3, 0, 1, 1, 2])
    f = quick_jit(jax.value_and_grad(lambda z: local.head_cross_entropy(z, jnp.asarray(labels), smoothing)))
    value, gradient = f(jnp.asarray(logits))
    oracle = lambda z: oracles.cross_entropy(z, labels, smoothing)  # noqa: E731
    np.testing.assert_allclose(value, oracle(logits), rtol=1e-5)
    np.testing.assert_allclose(gradient, numeric_gradient(oracle, logits), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_cross_entropy_of_mixed_images_weights_both_labels(smoothing):
    logits, labels, others, share = 3 * maps(15, 5, 4), np.array([3, 0, 1, 1, 2]), np.array([3, 1, 2, 0, 0]), 0.7
    mixture = Mixture(jnp.asarray(others), jnp.float32(share))
    f = quick_jit(jax.value_and_grad(lambda z: local.head_cross_entropy(z, jnp.asarray(labels), smoothing, mixture)))
    value, gradient = f(jnp.asarray(logits))

    def oracle(z):
        return share * oracles.cross_entropy(z, labels, smoothing) + (1 - share) * oracles.cross_entropy(z, others, smoothing)

    np.testing.assert_allclose(value, oracle(logits), rtol=1e-5)
    np.testing.assert_allclose(gradient, numeric_gradient(oracle, logits), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rule", ["vff", "head", "cwc", "deeper_forward", "mono_forward", "supcon"])
def test_cross_entropies_take_both_labels_and_other_losses_that_of_the_larger_part(rule, key):
    """The smaller part's labels move the head's loss; they move the rule's own loss where that is a cross-entropy."""
    run = small_run(config_of(rule=rule, network="mlp", widths=(7,), mixup=1.0))
    group, state = run.plan.groups[0], run.states[0]
    made = quick_jit(lambda batch: step_streams(run.plan, None, run.task, run.states, batch))(run.batch(key=key))
    f = quick_jit(lambda made: local.local_loss(state.params, oracles.setting_of(run, 0, key), group, state.batch_stats, made)[1][2])
    found, moved = f(made), f(made._replace(mixture=made.mixture._replace(labels=(made.mixture.labels + 1) % 3)))
    assert found["head_loss"] != moved["head_loss"]
    assert (found["local_loss"] != moved["local_loss"]) == (rule in ("cwc", "deeper_forward", "mono_forward"))
    logits = found["log_p"]  # the cross-entropy of log-probabilities is that of the logits
    parts = [oracles.cross_entropy(logits, labels, 0.0) for labels in (made.labels, made.mixture.labels)]
    share = float(made.mixture.share)
    np.testing.assert_allclose(found["head_loss"], share * parts[0] + (1 - share) * parts[1], rtol=1e-5)


@pytest.mark.parametrize(("to_clean", "to_others"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_product_of_all_vectors_that_gpus_compute_is_that_of_the_parts(scaled, to_clean, to_others, monkeypatch):
    z, weights = maps(1, 9, 5), maps(2, 6, 3)
    z[4] = 0.0  # of length zero

    def value(z):
        return jnp.sum(losses.between(z, 6, scaled, to_clean, to_others) * weights)

    def oracle(moved, fixed):
        units = [v if scaled else v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-6) for v in (moved, fixed)]
        return np.sum(units[0 if to_clean else 1][:6] @ units[0 if to_others else 1][6:].T * weights)

    apart = jax.value_and_grad(value)(jnp.asarray(z))
    monkeypatch.setattr(losses, "on_gpus", lambda function: {"cpu": function})
    whole = jax.value_and_grad(value)(jnp.asarray(z))
    expected = numeric_gradient(lambda moved: oracle(moved, z), z)
    some = np.arange(9) != 4  # at zero the length has no derivative
    for found, gradient in (apart, whole):
        np.testing.assert_allclose(found, oracle(z, z), rtol=1e-5)
        np.testing.assert_allclose(gradient[some], expected[some], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(whole[1], apart[1], rtol=1e-4, atol=1e-3 if not scaled else 1e-6)
    assert np.any(whole[1][:6]) == to_clean
    assert np.any(whole[1][6:]) == to_others


@pytest.mark.parametrize("generator", ["threefry2x32", "rbg"])
def test_what_a_segment_draws_at_once_is_what_each_step_draws(generator):
    run = small_run(config_of(rule="vff", network="mlp", widths=(7,), labelling="shared", copies_per_class=2))
    keys = jax.random.split(jax.random.key(3, impl=generator), 4)
    one = run.batch(key=keys[0])
    batches = jax.tree.map(lambda x: jnp.stack([x] * 4), one._replace(key=None))._replace(key=keys)
    made = quick_jit(lambda batch: step_streams(run.plan, None, run.task, run.states, batch))
    drawn = with_draws(run.plan, run.task, batches).drawn
    assert drawn.shape == (4, 2 * run.task.classes)
    assert len({row.tobytes() for row in np.asarray(drawn)}) == 4
    for key, row in zip(keys, drawn, strict=True):
        np.testing.assert_array_equal(with_draws(run.plan, run.task, one._replace(key=key)).drawn, row)
        alone, given = (made(one._replace(key=key, drawn=x)) for x in (None, row))
        np.testing.assert_array_equal(alone.rows, given.rows)


def test_the_objective_of_a_group_is_the_sum_of_its_parts(key):
    """Loss, and the head's loss on the clean rows only, under label smoothing."""
    run = small_run(config_of(network="mlp", widths=(7,), label_smoothing=0.2))
    made, group, state = oracles.streams_of(run, key), run.plan.groups[0], run.states[0]
    f = quick_jit(lambda params: local.local_loss(params, oracles.setting_of(run, 0, key), group, state.batch_stats, made))
    loss, (_, out, metrics) = f(state.params)
    np.testing.assert_allclose(loss, metrics["local_loss"] + metrics["head_loss"], rtol=1e-6)
    expected = oracles.cross_entropy(group.logits(state.params, out.clean), made.labels, 0.2)
    np.testing.assert_allclose(metrics["head_loss"], expected, rtol=1e-5)
    assert out.clean.shape == (12, 7)
    assert out.copies.shape == (6, 7)


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0])
def test_scale_gradient_keeps_the_value_and_scales_the_gradient(scale):
    x = jnp.array([1.0, -2.0])
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(local.scale_gradient(x, scale) ** 2))(x)
    assert value == 5
    np.testing.assert_allclose(gradient, scale * 2 * x, rtol=1e-6)


@pytest.mark.parametrize("frozen", [0, 1])
@pytest.mark.parametrize("rule", ["vff", "ff", "head"])
def test_a_head_that_only_reads_cuts_even_what_is_not_finite(rule, frozen):
    """A gradient that must not pass is no product with 0, which would be NaN. Under rule head a head trains its layers."""
    run = small_run(config_of(rule=rule, network="mlp", widths=(7,), head_weight=0.0, frozen_groups=frozen))
    group, config = run.plan.groups[0], run.plan.program.config
    share = 0 if group.frozen else run.plan.rule.head_share(config, run.hyper.of(0))
    _, pull = jax.vjp(lambda seen: local._with_share(seen, share), jnp.ones(2))
    (gradient,) = pull(jnp.array([jnp.inf, jnp.nan]))
    assert (gradient == 0).all() == (rule != "head" or frozen == 1)
