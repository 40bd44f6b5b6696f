"""Classifying with trained groups: an ensemble of heads on one clean pass, or a sweep over all labels that needs no head."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, UInt8

from vffjax.errors import UserError, chosen
from vffjax.networks.groups import GroupState
from vffjax.ops.batching import map_batches
from vffjax.rules.streams import Task
from vffjax.training.augment import normalised
from vffjax.training.plan import Plan
from vffjax.training.trainer import clean_log_p, evaluated

# With more groups than this, only runs of last groups are tried as voters, not every set.
_EXHAUSTIVE_GROUPS = 6


def sweep_scores(
    plan: Plan, task: Task, states: tuple[GroupState, ...], x: Float[Array, "batch h w c"]
) -> Float[Array, "groups batch classes"]:
    """How well each label fits, by each group, with no head, as the rule measures it on clean images and on images told the label."""
    rule, told, fits = plan.rule, plan.rule.told, plan.rule.fits
    if told is None or fits is None:
        raise UserError(f"inference=sweep: rule {plan.config.rule} never sees a labelled image; use inference=heads")

    def features(x: Array, clean: int) -> list[Array]:
        return [z for _, _, z in evaluated(plan, states, x, clean)]

    clean = features(rule.shown(task, x), len(x))

    def score(label: Array) -> Array:
        labelled = features(told(task, x, label), 0)
        return jnp.stack([fits(plan.config, one, other) for one, other in zip(clean, labelled, strict=True)])

    return jnp.moveaxis(jax.lax.map(score, jnp.arange(task.classes)), 0, 2)


def own_scores(
    plan: Plan, task: Task, states: tuple[GroupState, ...], x: Float[Array, "batch h w c"]
) -> Float[Array, "groups batch classes"]:
    """The rule's own class scores of every group, on one clean pass."""
    rule = plan.rule
    if rule.scores is None:
        raise UserError(f"inference=rule: rule {plan.config.rule} has no scores of its own; use inference=heads")
    options, maps = rule.options_of(plan.config), evaluated(plan, states, rule.shown(task, x), len(x))
    return jnp.stack([rule.scores(options, z, state.params.get("rule", {}), plan.classes) for _, state, z in maps])


@functools.partial(jax.jit, static_argnums=(0, 1))
def program_scores(
    plan: Plan, inference: str, task: Task, states: tuple[GroupState, ...], images: UInt8[Array, "n h w c"]
) -> Float[Array, "groups n classes"]:
    """The program of `make_scores`. Its plan is a `Plan.program`, so that runs of other seeds and rates share it."""
    per_batch = chosen("inference", inference, {"heads": clean_log_p, "sweep": sweep_scores, "rule": own_scores})

    def by_image(batch: Array) -> Array:
        return jnp.moveaxis(per_batch(plan, task, states, normalised(task, batch)), 0, 1)

    return jnp.moveaxis(map_batches(by_image, images, plan.config.eval_batch_size), 1, 0)


def make_scores(plan: Plan, inference: str) -> Callable[..., Float[Array, "groups n classes"]]:
    """Jitted `(task, states, byte images [n, h, w, c])` to scores [groups, n, classes]; higher is likelier.

    Images are taken in batches of `config.eval_batch_size`.
    """
    return functools.partial(program_scores, plan.program, inference)


def compile_scores(plan: Plan, inference: str, task: Task, states: tuple[GroupState, ...], images: Any) -> jax.stages.Compiled:
    """`make_scores`, compiled for such images; takes `(task, states, images)`."""
    return program_scores.lower(plan.program, inference, task, states, images).compile()


def ensemble(scores: Float[ArrayLike, "groups n classes"], voting: tuple[int, ...]) -> np.ndarray:
    """Mean score over the voting groups; for heads the mean log-probability, that is their normalised geometric mean."""
    return np.asarray(scores)[list(voting)].mean(axis=0)


def error_percent(scores: Float[ArrayLike, "n classes"], labels: Int[ArrayLike, " n"]) -> float:
    """Share of images whose highest score is not their label, in percent."""
    return 100 * float(np.mean(np.asarray(scores).argmax(-1) != np.asarray(labels)))


def choose_voting(scores: Float[np.ndarray, "groups n classes"], labels: Int[ArrayLike, " n"]) -> tuple[int, ...]:
    """The set of groups whose ensemble errs least on these (validation) images; among equals the larger, then the later set."""
    groups = len(scores)
    if groups <= _EXHAUSTIVE_GROUPS:
        sets = [s for size in range(1, groups + 1) for s in itertools.combinations(range(groups), size)]
    else:
        sets = [tuple(range(first, groups)) for first in range(groups)]
    return min(sets, key=lambda s: (error_percent(ensemble(scores, s), labels), -len(s), [-i for i in s]))


def validate(scores: np.ndarray | None, labels: Int[ArrayLike, " n"], trained: int) -> dict[str, Any]:
    """Errors in percent from scores [groups, n, classes] on validation data, and the groups that vote; without data all trained do."""
    if scores is None:
        return {"val_error": None, "val_error_per_group": None, "voting": list(range(trained))}
    voting = choose_voting(scores[:trained], labels)
    return measure(scores[:trained], labels, voting, "val") | {"voting": list(voting)}


def measure(scores: np.ndarray, labels: Any, voting: tuple[int, ...], split: str) -> dict[str, Any]:
    """`SPLIT_error` of the voting ensemble and `SPLIT_error_per_group`, in percent."""
    return {
        f"{split}_error": error_percent(ensemble(scores, voting), labels),
        f"{split}_error_per_group": [error_percent(group, labels) for group in scores],
    }
