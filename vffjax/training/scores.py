"""Scores classes by heads, by a sweep over labels, or by the rule's own way; and chooses the groups that vote, or weights for them."""

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, ArrayLike, Float, Int, UInt8

from vffjax.data.on_disk import Pixels
from vffjax.errors import chosen
from vffjax.networks.groups import States
from vffjax.ops.batching import map_batches
from vffjax.rules.streams import Task
from vffjax.training import augment, trainer
from vffjax.training.compiled import compiled
from vffjax.training.mesh import fetched, put
from vffjax.training.plan import Plan

PIECE_BYTES = 2**26  # of images on the host that are brought to the device at once
# With more groups than this, only sets of consecutive last groups are tried as voters, because there are too many sets.
_EXHAUSTIVE_GROUPS = 6
# Of the fit of weights: the multiple of their squares, the gradient at which it ends, and the most steps, which it never needs.
_RIDGE, _SMALL_GRADIENT, _MOST_STEPS = 1e-4, 1e-10, 60


def sweep_scores(plan: Plan, task: Task, states: States, x: Float[Array, "batch h w c"]) -> Float[Array, "groups batch classes"]:
    """How well each label fits each image, by each group, without heads.

    The rule measures it on the features of the clean image and of the image that was told the label. Higher is likelier.
    """
    rule, told, fits = plan.rule, plan.rule.told, plan.rule.fits
    assert told is not None and fits is not None  # see `Rule.cannot_score_by`

    def features(x: Array, clean: int) -> list[Array]:
        return [z for _, _, z in trainer.evaluated(plan, states, x, clean)]

    clean = features(rule.shown(task, x), x.shape[0])

    def score(label: Array) -> Array:
        labelled = features(told(task, x, label), 0)
        own = (state.params.get("rule", {}) for state in states)
        return jnp.stack([fits(plan.config, *seen) for seen in zip(clean, labelled, own, strict=True)])

    return jnp.moveaxis(jax.lax.map(score, jnp.arange(task.classes)), 0, 2)


def own_scores(plan: Plan, task: Task, states: States, x: Float[Array, "batch h w c"]) -> Float[Array, "groups batch classes"]:
    """The rule's own class scores by each group, from the features of the clean images. Higher is likelier."""
    rule, scores = plan.rule, plan.rule.scores
    assert scores is not None  # see `Rule.cannot_score_by`
    options, maps = rule.options_of(plan.config), trainer.evaluated(plan, states, rule.shown(task, x), x.shape[0])
    return jnp.stack([scores(options, z, state.params.get("rule", {}), plan.classes) for _, state, z in maps])


# The scores of a batch of normalised images, by kind of inference.
SCORES = {"heads": trainer.clean_log_p, "sweep": sweep_scores, "rule": own_scores}


def views(images: UInt8[Array, "n h w c"], which: str) -> list[UInt8[Array, "n h w c"]]:
    """The views of images whose scores are averaged.

    Args:
        images: as they are.
        which: `one`: the images themselves. `mirror`: their mirror images too. `six`: also both, shifted by one pixel along the diagonal
            towards either corner; the border is repeated (K. Jordan, 2024, arXiv:2404.00498, shifts likewise and weights the views).
    """
    h, w = images.shape[1:3]
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    shifts = chosen("views", which, {"one": (1,), "mirror": (1,), "six": (1, 0, 2)})
    seen = [padded[:, first : first + h, first : first + w] if first != 1 else images for first in shifts]
    return seen if which == "one" else [*seen, *(view[:, :, ::-1] for view in seen)]


def of_views(plan: Plan, inference: str, task: Task, states: States, images: UInt8[Array, "n h w c"]) -> Float[Array, "groups n classes"]:
    """The mean scores of the views of images that config.views names."""
    per_batch = chosen("inference", inference, SCORES)
    each = [per_batch(plan, task, states, augment.normalised(task, view)) for view in views(images, plan.config.views)]
    return functools.reduce(jnp.add, each) / len(each)


@functools.partial(jax.jit, static_argnums=(0, 1))
def program_scores(
    plan: Plan, inference: str, task: Task, states: States, images: UInt8[Array, "n h w c"]
) -> Float[Array, "groups n classes"]:
    """The compiled function behind `make_scores`. It takes a `Plan.program`, so that runs with other seeds or rates share the program."""

    def by_image(batch: Array) -> Array:
        return jnp.moveaxis(of_views(plan, inference, task, states, batch), 0, 1)

    return jnp.moveaxis(map_batches(by_image, images, plan.config.eval_batch_size), 1, 0)


def make_scores(plan: Plan, inference: str) -> Callable[..., Float[Array | np.ndarray, "groups n classes"]]:
    """A function of `(task, states, images)` that returns scores `[groups, n, classes]`. Higher is likelier.

    Args:
        plan: of the run.
        inference: heads, sweep or rule; see config.inference.

    The images are bytes `[n, h, w, c]`, on the device, on the host (a NumPy array), or on disk. They are scored in batches of
    `config.eval_batch_size`, and images that are not on the device are brought there in pieces of several batches.
    """
    return functools.partial(_scored, functools.partial(program_scores, plan.program, inference), plan.config.eval_batch_size)


def compile_scores(
    plan: Plan, inference: str, task: Task, states: States, images: Any
) -> Callable[..., Float[Array | np.ndarray, "groups n classes"]]:
    """`make_scores`, compiled for images of this shape."""
    size = plan.config.eval_batch_size
    shape = images.shape if isinstance(images, jax.Array) else (_piece(images, size), *images.shape[1:])
    given = jax.ShapeDtypeStruct(shape, images.dtype, sharding=_place(states))
    program = compiled(program_scores, plan.program, inference, task, states, given)
    return functools.partial(_scored, program, size)


def _place(states: States) -> Any:
    """Where images have to lie: on every device of the mesh on which the states are; None, JAX's first device, if they are on one."""
    place = jax.tree.leaves(states)[0].sharding
    return place if isinstance(place, NamedSharding) else None


def _piece(images: Pixels, batch_size: int) -> int:
    """How many images on the host are brought to the device at once: all, or as many batches as `PIECE_BYTES` hold."""
    batches = PIECE_BYTES // max(1, batch_size * images[:1].nbytes)
    return min(len(images), max(2, batches) * batch_size)


def _scored(program: Callable[..., Array], batch_size: int, task: Task, states: States, images: Any) -> Array | np.ndarray:
    if isinstance(images, jax.Array) or (piece := _piece(images, batch_size)) == len(images):
        return program(task, states, images if isinstance(images, jax.Array) else put(images[:], _place(states)))
    found, before = [], None
    for start in range(0, len(images), piece):
        part = images[start : start + piece]
        padded = np.concatenate([part, np.zeros((piece - len(part), *part.shape[1:]), part.dtype)]) if len(part) < piece else part
        found.append(program(task, states, put(padded, _place(states))))
        jax.block_until_ready(before)  # so that two pieces are on the device at most
        before = found[-1]
    return np.concatenate(fetched(found), axis=1)[:, : len(images)]


def ensemble(scores: Float[ArrayLike, "groups n classes"], voting: tuple[int, ...], weights: tuple[float, ...] = ()) -> np.ndarray:
    """The mean score over the voting groups, or with `weights`, one for each of them, the weighted sum.

    For heads the mean log-probability is a geometric mean of their probabilities.
    """
    chosen_scores = np.asarray(scores)[list(voting)]
    if not weights:
        return chosen_scores.mean(axis=0)
    return np.sum(np.asarray(weights)[:, None, None] * chosen_scores, axis=0)


def error_percent(scores: Float[ArrayLike, "n classes"], labels: Int[ArrayLike, " n"]) -> float:
    """The share of images whose highest score belongs to a wrong class, in percent."""
    return 100 * float(np.mean(np.asarray(scores).argmax(-1) != np.asarray(labels)))


def choose_voting(scores: Float[np.ndarray, "groups n classes"], labels: Int[ArrayLike, " n"]) -> tuple[int, ...]:
    """The set of groups whose ensemble has the least error on these (validation) images.

    Among sets of equal error the largest is taken, and among those the one with later groups.
    """
    groups = len(scores)
    if groups <= _EXHAUSTIVE_GROUPS:
        sets = [s for size in range(1, groups + 1) for s in itertools.combinations(range(groups), size)]
    else:
        sets = [tuple(range(first, groups)) for first in range(groups)]
    return min(sets, key=lambda s: (error_percent(ensemble(scores, s), labels), -len(s), [-i for i in s]))


def fit_weights(scores: Float[np.ndarray, "groups n classes"], labels: Int[ArrayLike, " n"]) -> Float[np.ndarray, " groups"]:
    """The non-negative weights of groups by which the sum of their scores has the least cross-entropy on these (validation) images.

    To the mean cross-entropy a small multiple of the squared weights is added. So there is one minimum, and no weight grows without end
    where all images are right. It is found in float64 by Newton's method on the weights that are not held at 0 (projected Newton: D.
    Bertsekas, 1982, SIAM J. Control Optim. 20, 221-246).
    """
    wide, rows = np.asarray(scores, np.float64), np.arange(scores.shape[1])
    above = wide - wide[:, rows, np.asarray(labels)][:, :, None]  # the score of each class above that of the right one

    def at(weights: np.ndarray) -> tuple[float, np.ndarray]:
        """The objective, and the probability of each class for each image."""
        z = np.sum(weights[:, None, None] * above, axis=0)
        log_sum = np.logaddexp.reduce(z, axis=1)
        return float(log_sum.mean() + _RIDGE / 2 * weights @ weights), np.exp(z - log_sum[:, None])

    weights = np.full(len(wide), 1 / len(wide))
    value, p = at(weights)
    for _ in range(_MOST_STEPS):
        weighted = above * p
        means = weighted.sum(axis=2)
        gradient = means.mean(axis=1) + _RIDGE * weights
        if np.abs(weights - np.maximum(weights - gradient, 0)).max() < _SMALL_GRADIENT:
            break
        curvature = (np.einsum("gnc,hnc->gh", weighted, above) - np.einsum("gn,hn->gh", means, means)) / len(rows) + _RIDGE * np.eye(
            len(wide)
        )
        free = (weights > 0) | (gradient < 0)
        step = np.zeros_like(weights)
        step[free] = np.linalg.solve(curvature[np.ix_(free, free)], gradient[free])
        for halvings in range(_MOST_STEPS):
            new = np.maximum(weights - step / 2**halvings, 0)
            found, new_p = at(new)
            if found <= value - 1e-4 * gradient @ (weights - new):
                break
        else:  # float64 knows no smaller value
            break
        weights, value, p = new, found, new_p
    return weights


def validate(scores: np.ndarray | None, labels: Int[ArrayLike, " n"], trained: int, votes: str = "subset") -> dict[str, Any]:
    """Validation errors in percent, and the groups that vote.

    Args:
        scores: of the validation images; None if there are none, and then all trained groups vote.
        labels: of these images.
        trained: how many groups have been trained.
        votes: as config.votes: a subset of groups with equal weights, or weights for all; a group whose weight is 0 does not vote.

    Returns:
        `val_error`, `val_error_per_group`, and `voting`, the indices of the voting groups; with weights also `vote_weights`, theirs.
    """
    if scores is None:
        return {"val_error": None, "val_error_per_group": None, "voting": list(range(trained))}
    if chosen("votes", votes, {"subset": False, "weighted": True}):
        fitted = fit_weights(scores[:trained], labels)
        voting = tuple(np.flatnonzero(fitted).tolist())
        weights = tuple(fitted[list(voting)].tolist())
        if voting:  # else no group knows more than chance, and a subset is as good
            votes_of = {"voting": list(voting), "vote_weights": list(weights)}
            return measure(scores[:trained], labels, votes_of, "val") | votes_of
    votes_of = {"voting": list(choose_voting(scores[:trained], labels))}
    return measure(scores[:trained], labels, votes_of, "val") | votes_of


def measure(scores: np.ndarray, labels: Any, votes: Mapping[str, Any], split: str) -> dict[str, Any]:
    """`SPLIT_error` of the voting ensemble and `SPLIT_error_per_group`, in percent.

    Args:
        scores: `[groups, n, classes]`.
        labels: of the n images.
        votes: the groups that vote, as `validate` returns them, among whatever else it holds.
        split: SPLIT.
    """
    together = ensemble(scores, tuple(votes["voting"]), tuple(votes.get("vote_weights", ())))
    return {
        f"{split}_error": error_percent(together, labels),
        f"{split}_error_per_group": [error_percent(group, labels) for group in scores],
    }
