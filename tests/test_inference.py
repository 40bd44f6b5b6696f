"""Inference: scores by heads and by sweep against a slow loop, padding of batches, ensembles and the choice of voters."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracles
from oracles import CONV, MLP, config_of, numeric_gradient, quick_jit, slow_but, small_run
from runs import assert_same_bits, tiny, train
from vffjax.training.scores import choose_voting, ensemble, error_percent, fit_weights, make_scores, validate
from vffjax.training.trainer import train_step
from vffjax.uses.evaluation import evaluate

CASES = {
    "conv4": CONV,
    "conv4, position": CONV | {"similarity": "position", "norm": "anchor"},
    "mlp, layer norm": MLP | {"norm": "layer"},
    "ff": MLP | {"rule": "ff"},
    "vff_projected": CONV | {"rule": "vff_projected", "rule_options": {"cells": 2, "dimensions": 3}},
}


def features(run, x, clean):
    """Of every group, in evaluation."""
    out = []
    for group, state in zip(run.plan.groups, run.states, strict=True):
        x, _ = group.features(state.params, state.batch_stats, x, clean, False)
        out.append(x)
    return out


def slow_scores(run, way):
    """[groups, n, classes], image by image and label by label, from the definitions."""
    config, task = run.plan.config, jax.tree.map(lambda a: np.asarray(a, np.float64), run.task)
    classes = len(task.codebook)
    clean_pass = quick_jit(lambda x: features(run, x, 1))
    labelled_pass = quick_jit(lambda x: features(run, x, 0))
    out = []
    for image in np.asarray(run.data.images):
        x = (image / 255 - task.mean) / task.std

        def told(label, x=x):
            """The image with one label, or with the neutral one."""
            if config.rule in ("vff", "vff_projected"):
                return x if label is None else x + task.codebook[label]
            weights = np.full(classes, 1 / classes) if label is None else np.eye(classes)[label]
            pixels = x.reshape(-1, x.shape[-1]).copy()
            pixels[:classes] = (weights[:, None] - task.mean) / task.std
            return pixels.reshape(x.shape)

        one = lambda x: jnp.asarray(x[None], jnp.float32)  # noqa: E731
        clean, rows = clean_pass(one(told(None))), []
        labelled = [labelled_pass(one(told(c))) for c in range(classes)] if way == "sweep" else []
        for i, (group, state) in enumerate(zip(run.plan.groups, run.states, strict=True)):
            if way == "heads":
                logits = np.asarray(group.logits(state.params, clean[i]), np.float64)[0]
                rows.append(logits - np.log(np.exp(logits).sum()))
            elif config.rule == "ff":
                rows.append([np.mean(np.asarray(z[i], np.float64) ** 2) for z in labelled])
            elif config.rule == "vff_projected":
                kernel = np.asarray(state.params["rule"]["kernel"], np.float64)
                cells = config.rule_options["cells"]
                maps = [np.asarray(z[i][0], np.float64) for z in (clean, *labelled)]
                image, *others = [oracles.pool_to_grid(z, cells).ravel() @ kernel for z in maps]
                rows.append([oracles.cosine(image, other) for other in others])
            else:
                rows.append([oracles.similarity(clean[i][0], z[i][0], config.similarity) for z in labelled])
        out.append(rows)
    return np.swapaxes(np.array(out), 0, 1)


@pytest.mark.parametrize("way", ["heads", "sweep"])
@pytest.mark.parametrize("name", slow_but(CASES, "mlp, layer norm", "ff"))
def test_scores_equal_a_slow_loop_also_where_the_last_batch_is_short(name, way):
    """Seven images in batches of three."""
    run = small_run(config_of(**CASES[name], batch_size=7, eval_batch_size=3))
    found = np.asarray(make_scores(run.plan, way)(run.task, run.states, run.data.images))
    assert found.shape == (len(run.plan.groups), 7, 3)
    np.testing.assert_allclose(found, slow_scores(run, way), rtol=1e-3, atol=1e-4)
    assert all(np.ptp(group, axis=1).min() > 1e-4 for group in found)  # labels do make a difference


# What a group can learn by without its head, which only reads.
HEADLESS = {
    "vff": {},
    "signs on a grid, redrawn": {"noise_kind": "signs", "noise_cell": 2, "noise_redrawn": "epoch"},
    "noise like images, redrawn": {"noise_spectrum": "images", "noise_redrawn": "epoch"},
    "temperature": {"temperature_end": 0.2},
    "vff_supcon": {"rule": "vff_supcon"},
    "vff_projected": {"rule": "vff_projected"},
    "vff_projected behind a convolution": {"rule": "vff_projected", "rule_options": {"channels": 4}},
}


@pytest.mark.parametrize("name", slow_but(HEADLESS, "vff", "vff_projected behind a convolution"))
def test_without_a_weight_the_head_has_no_part_in_learning_nor_in_a_sweep(name):
    """To the bit: other heads leave what else a step makes of a group, and the sweep's scores, as they are."""
    run = small_run(config_of(**CONV, head_weight=0.0, inference="sweep", auxiliary=(3,), **HEADLESS[name]))
    others = tuple(
        state._replace(params=state.params | {"head": jax.tree.map(lambda p: 2 * p + 1, state.params["head"])}) for state in run.states
    )
    step = quick_jit(functools.partial(train_step, run.plan.program, None))
    sweep = make_scores(run.plan, "sweep")
    found = []
    for states in (run.states, others):
        after, _ = step(run.task, states, run.batch())
        learnt = [{part: p for part, p in state.params.items() if part != "head"} for state in after]
        found.append((learnt, sweep(run.task, after, run.data.images)))
    assert_same_bits(*found)
    assert all(oracles.differs(learnt["layers_0"], state.params["layers_0"]) for learnt, state in zip(found[0][0], run.states, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", HEADLESS)
def test_a_run_classifies_without_heads(name, tmp_path):
    changes = {"epochs": 6, "train_examples": 1000, "widths": (64, 48), "head_weight": 0.0, "inference": "sweep"}
    done = train(tiny(**changes, **HEADLESS[name]), tmp_path)
    assert done["test_error"] < 60  # chance is 90
    assert evaluate(tmp_path, "sweep")["test_error"] == done["test_error"]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["heads", "sweep"])
def test_batches_do_not_change_scores(way):
    whole, split = (small_run(config_of(**MLP, batch_size=7, eval_batch_size=size)) for size in (500, 4))
    a, b = (make_scores(run.plan, way)(run.task, run.states, run.data.images) for run in (whole, split))
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_the_ensemble_is_the_mean_of_the_voters():
    scores = np.random.default_rng(0).normal(size=(4, 5, 3))
    np.testing.assert_allclose(ensemble(scores, (1, 3)), (scores[1] + scores[3]) / 2)
    np.testing.assert_allclose(ensemble(scores, (2,)), scores[2])


def test_error_is_the_share_of_wrong_maxima_in_percent():
    scores = np.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    assert error_percent(scores, np.array([1, 0, 0, 0])) == 25.0
    assert error_percent(scores, np.array([1, 0, 1, 0])) == 0.0


LABEL = np.array([0])


def scores_of(*margins):
    """Two-class scores of groups that prefer the right class, 0, by these margins: a number for one image or a list for more."""
    margins = np.array(margins, float).reshape(len(margins), -1)
    return np.stack([margins, np.zeros_like(margins)], -1)


@pytest.mark.parametrize(
    ("margins", "expected"),
    [
        ((-2, 1, -2), (1,)),
        ((1, -5, 1), (0, 2)),
        ((-5, 2, 2), (1, 2)),
        ((-3, 2, 2), (0, 1, 2)),  # the third is wrong and outvoted: as good, and larger
        ((1, 1, 1), (0, 1, 2)),
        ((-1, -1, -1), (0, 1, 2)),
    ],
    ids=str,
)
def test_voters_are_the_set_that_errs_least_then_the_larger(margins, expected):
    assert choose_voting(scores_of(*margins), LABEL) == expected


def test_among_sets_of_equal_error_and_size_the_later_votes():
    # Each of the two errs on one image, both together on two.
    assert choose_voting(scores_of([-3, 1], [1, -3]), np.array([0, 0])) == (1,)


def test_of_many_groups_only_runs_of_last_ones_are_tried():
    assert choose_voting(scores_of(1, -5, -5, -5, -5, -5, 1), LABEL) == (6,)  # the best of all sets would be (0, 6)
    assert choose_voting(scores_of(-5, -5, -5, -5, 1, 1, 1), LABEL) == (4, 5, 6)


def objective(scores, labels, weights):
    """By its definition, image by image."""
    total = 0.0
    for i, label in enumerate(labels):
        z = sum(w * np.float64(group[i]) for w, group in zip(weights, scores, strict=True))
        total += np.logaddexp.reduce(z) - z[label]
    return total / len(labels) + 5e-5 * np.sum(np.square(weights))


def groups_of_skill(*skills, n=60, classes=4):
    """Scores of groups that prefer the right class by so much, beside noise of deviation 1."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, n)
    right = np.eye(classes)[labels]
    return np.stack([skill * right + rng.normal(size=(n, classes)) for skill in skills]), labels


@pytest.mark.parametrize("skills", [(1.0, 2.0, 0.5), (1.0, -1.0), (0.0, 1.5, -2.0, 1.0), (30.0, 40.0), (0.02, 0.03)], ids=str)
def test_fitted_weights_are_the_minimum_among_weights_that_are_not_negative(skills):
    """The objective is strictly convex, so the signs of its gradient tell the minimum."""
    scores, labels = groups_of_skill(*skills)
    weights = fit_weights(scores, labels)
    gradient = numeric_gradient(lambda w: objective(scores, labels, w), weights, 1e-5)
    assert (weights >= 0).all() and np.isfinite(weights).all()
    np.testing.assert_allclose(gradient[weights > 0], 0, atol=1e-7)
    assert (gradient[weights == 0] > -1e-7).all()
    for skill, weight in zip(skills, weights, strict=True):
        assert weight == 0 if skill < 0 else weight > 0 or skill < 0.1
    np.testing.assert_array_equal(fit_weights(scores, labels), weights)


def test_weighted_votes_are_the_fitted_sum_and_a_group_without_weight_does_not_vote():
    scores, labels = groups_of_skill(1.0, -2.0, 2.0, 5.0)
    found = validate(scores, labels, 3, "weighted")  # the last group has not trained
    fitted = fit_weights(scores[:3], labels)
    assert (found["voting"], found["vote_weights"]) == ([0, 2], [fitted[0], fitted[2]])
    expected = fitted[0] * scores[0] + fitted[2] * scores[2]
    np.testing.assert_allclose(ensemble(scores, (0, 2), tuple(found["vote_weights"])), expected, rtol=1e-12)
    assert found["val_error"] == error_percent(expected, labels)


def test_where_no_group_knows_anything_a_subset_votes_and_nothing_changes_without_the_key():
    scores, labels = groups_of_skill(-3.0, -2.0)
    assert (fit_weights(scores, labels) == 0).all()
    assert validate(scores, labels, 2, "weighted") == validate(scores, labels, 2)
    assert "vote_weights" not in validate(scores, labels, 2)
    assert validate(None, labels, 2, "weighted")["voting"] == [0, 1]


def test_scores_of_several_views_are_their_mean():
    run = small_run(config_of(**MLP))
    images = np.asarray(run.data.images)
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    views = [images, padded[:, :-2, :-2], padded[:, 2:, 2:]]
    views += [view[:, :, ::-1] for view in views]

    def scores(which, given):
        plan = dataclasses.replace(run.plan, config=dataclasses.replace(run.plan.config, views=which))
        return np.asarray(make_scores(plan, "heads")(run.task, run.states, jnp.asarray(given)), np.float64)

    np.testing.assert_allclose(scores("six", images), np.mean([scores("one", view) for view in views], axis=0), rtol=1e-4, atol=1e-5)
    both = np.mean([scores("one", view) for view in views[::3]], axis=0)
    np.testing.assert_allclose(scores("mirror", images), both, rtol=1e-4, atol=1e-5)
