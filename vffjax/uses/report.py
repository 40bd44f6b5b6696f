"""What a trained run has learnt, measured: functions from a run and images to arrays. Each is measured on a bounded number of images."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from vffjax.data.sets import Split, take
from vffjax.networks.groups import States, fitting_grid
from vffjax.ops.batching import map_batches
from vffjax.ops.pooling import mean_pool_to_grid
from vffjax.rules.streams import Task
from vffjax.runs.plots import spread
from vffjax.runs.trained import Trained
from vffjax.training import augment
from vffjax.training.scores import error_percent, make_scores, validate
from vffjax.uses.early_exit import GRID, EarlyExit, simulate, votes_of

# The most images that each measurement takes, and the most bytes of images, or of scores, at a time.
SCORED, PROBED, TOLD = 10_000, 4_000, 500
SWEPT = 100_000  # pairs of an image and a label, where classes are scored by a sweep
TOLD_PAIRS = 10_000
MOST_BYTES = 2**28
PROBE_INPUTS = 1024  # the most numbers that a linear probe sees of an image
ZERO = 1e-6  # an activity up to this is none; GELU's tail does not reach 0
_ALPHAS = tuple(10.0**power for power in range(-2, 5))  # of ridge regression


def sample(split: Split, most: int, seed: int, bytes_of_one: int = 0) -> Split:
    """At most `most` images of a split, drawn by the seed, in the order of the split.

    No more are drawn than `MOST_BYTES` hold, counting the bytes of an image, or `bytes_of_one` if that is more.
    """
    count = min(most, max(1, MOST_BYTES // max(bytes_of_one, split.images[:1].nbytes, 1)))
    if len(split) > count:
        split = take(split, np.sort(np.random.default_rng(seed).permutation(len(split))[:count]))
    # Those that are still on disk are read here.
    return Split(np.asarray(split.images), split.labels)


def class_scores(trained: Trained, inference: str, *splits: Split) -> list[np.ndarray]:
    """Scores [groups, n, classes] of each split by the groups that have trained, by heads, sweep or rule. One program scores them all."""
    images = np.concatenate([split.images for split in splits])
    scores = np.asarray(make_scores(trained.plan, inference)(trained.task, trained.states, jnp.asarray(images)))
    return np.split(scores[: trained.groups], np.cumsum([len(split) for split in splits])[:-1], axis=1)


def can_tell(trained: Trained) -> bool:
    """Whether the rule tells labels by the noise of a codebook, so that the fit of an image and its labelled copies can be measured."""
    rule = trained.plan.rule
    return rule.codebook and not rule.cannot_score_by("sweep")


def confusion(predicted: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """How many images of each class [row] are taken for each class [column].

    >>> confusion(np.array([0, 1, 1]), np.array([0, 0, 1]), 2).tolist()
    [[1, 1], [0, 1]]
    """
    return np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)


def most_confused(counts: np.ndarray, most: int) -> list[tuple[int, int, int]]:
    """The most frequent mistakes of a confusion matrix: right class, class that was said, and count."""
    wrong = np.where(np.eye(len(counts), dtype=bool), 0, counts)
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    pairs = (divmod(int(place), len(counts)) for place in order)
    return [(right, said, int(wrong[right, said])) for right, said in pairs if wrong[right, said]]


def worst(scores: np.ndarray, labels: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """The misclassified images whose class was said with the greatest probability, by the softmax of scores [n, classes].

    Returns:
        Their indices, the greatest first, and the probabilities.
    """
    shifted = np.exp(np.asarray(scores, np.float64) - scores.max(axis=1, keepdims=True))
    sure = 1 / shifted.sum(axis=1)
    wrong = np.flatnonzero(scores.argmax(axis=1) != labels)
    order = wrong[np.argsort(-sure[wrong], kind="stable")][:most]
    return order, sure[order]


class Agreement(NamedTuple):
    """How often two groups agree: shares of images [groups, groups]."""

    same: np.ndarray  # both heads say the same class
    both_wrong: np.ndarray  # neither says the right one


def agreement(scores: np.ndarray, labels: np.ndarray) -> Agreement:
    """The agreement of groups, from scores [groups, n, classes]."""
    said = scores.argmax(axis=2)
    wrong = (said != labels).astype(np.float64)
    same = np.array([[np.mean(one == other) for other in said] for one in said])
    return Agreement(same, wrong @ wrong.T / len(labels))


class Inside(NamedTuple):
    """What images do to a network."""

    inputs: list[Any]  # [n, numbers]: what linear probes see, of the images themselves and then of each group that was asked for
    active: list[Any]  # [n, channels]: whether each channel of each layer that learns is not 0 at some position


def inside(trained: Trained, images: np.ndarray, groups: Sequence[int]) -> Inside:
    """Passes images [n, h, w, c] through the groups that have trained.

    A probe sees at most `PROBE_INPUTS` numbers of an image. A map is pooled by means to the finest grid, of 1, 2, 4, ... cells a side, that
    keeps to that. Of more channels or units, evenly spaced ones are taken.
    """
    plan = trained.plan

    @jax.jit
    def program(task: Task, states: States, images: Array) -> Any:
        def of_batch(batch: Array) -> Inside:
            x: Any = plan.rule.shown(task, augment.normalised(task, batch))
            found = Inside([_bounded(x)], [])
            for group, state in zip(plan.groups[: trained.groups], states, strict=False):
                variables = {"params": state.params} | ({"batch_stats": state.batch_stats} if state.batch_stats else {})
                for i, layer in enumerate(group.module.layers):
                    x = group.module.apply(variables, x, x.shape[0], False, slice(i, i + 1), method="features")
                    if layer.learns:
                        found.active.append(jnp.abs(x).max(axis=tuple(range(1, x.ndim - 1))) > ZERO)
                if group.index in groups:
                    found.inputs.append(_bounded(x))
            return found

        return map_batches(of_batch, images, plan.config.eval_batch_size)

    return jax.tree.map(np.asarray, program(trained.task, trained.states, jnp.asarray(images)))


def learning_layers(trained: Trained) -> list[str]:
    """The names of the layers that learn in the groups that have trained."""
    groups = trained.plan.groups[: trained.groups]
    return [f"{group.name} layer {i}" for group in groups for i, layer in enumerate(group.module.layers) if layer.learns]


def _bounded(z: Array) -> Array:
    if z.ndim == 4:
        z = mean_pool_to_grid(z.astype(jnp.float32), fitting_grid(z.shape[3], PROBE_INPUTS))
    z = z.reshape(z.shape[0], -1).astype(jnp.float32)
    return z[:, jnp.array(spread(z.shape[1], PROBE_INPUTS))]


def probe_accuracy(train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray) -> float:
    """The share of test rows that a linear classifier gets right, which was fitted to the training rows.

    It is scikit-learn's ridge classifier on standardised numbers. Its penalty is the one of `_ALPHAS` with the least squared error on
    training rows that were left out one at a time, so the test rows choose nothing.
    """
    from sklearn.linear_model import RidgeClassifierCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = make_pipeline(StandardScaler(), RidgeClassifierCV(alphas=_ALPHAS))
    classifier.fit(train.astype(np.float64), train_labels)
    return float(np.mean(classifier.predict(test.astype(np.float64)) == test_labels))


class Fits(NamedTuple):
    """How well labels fit images, by each group."""

    right: np.ndarray  # [groups, n]: the label of the image's own class
    wrong: np.ndarray  # [groups, n, classes - 1]: all others
    best: np.ndarray  # [groups]: share of images that the right label fits best
    means: np.ndarray  # [groups, classes, classes]: mean for images of a class [row] that were told a label [column]; NaN without images


def label_fits(trained: Trained, split: Split) -> Fits:
    """How well every label fits every image, as the rule measures it in a sweep (see `Rule.fits`), by the groups that have trained."""
    (scores,) = class_scores(trained, "sweep", split)
    groups, n, classes = scores.shape
    own = np.arange(classes) == split.labels[:, None]
    counts = own.sum(axis=0)[:, None]
    with np.errstate(invalid="ignore"):
        means = np.einsum("nr,gnc->grc", own, scores) / np.where(counts, counts, np.nan)
    best = (scores.argmax(axis=2) == split.labels).mean(axis=1)
    return Fits(scores[:, own], scores[:, ~own].reshape(groups, n, classes - 1), best, means)


class Exits(NamedTuple):
    """Early exit at a range of thresholds. The costs are shares of the operations of the full ensemble's pass."""

    costs: np.ndarray  # [thresholds of `GRID`]: mean over test images
    errors: np.ndarray  # [thresholds]: of test images, in percent
    full_error: float  # of the full ensemble
    chosen: dict[str, Any] | None  # the threshold chosen on validation images, its cost and error; None without such images


def exits(trained: Trained, seen: np.ndarray | None, seen_labels: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> Exits | None:
    """Accuracy against work if images may leave at every group; None if only the first group is needed.

    Args:
        trained: the run.
        seen: scores [groups, n, classes] of validation images by the heads; None if there are none.
        seen_labels: the labels of these images.
        scores: the same scores of test images.
        labels: the labels of these images.
    """
    voting = tuple(validate(seen, seen_labels, trained.groups)["voting"])
    votes = votes_of(voting, "all", seen, seen_labels)
    if len(votes) < 2:
        return None
    leaving, simulated = EarlyExit(trained, votes, seen, seen_labels), simulate(scores, votes)

    def at(threshold: float) -> tuple[float, float]:
        log_p, left = simulated.leave(threshold)
        return float(leaving.costs[left].mean()), error_percent(log_p, labels)

    costs, errors = np.array([at(threshold) for threshold in GRID]).T
    chosen = None
    if seen is not None:
        threshold = leaving.choose(None)["threshold"]
        chosen = dict(zip(("threshold", "cost", "error"), (threshold, *at(threshold)), strict=True))
    return Exits(costs, errors, at(1.0)[1], chosen)
