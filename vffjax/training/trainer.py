"""Greedy training as pure functions: a step of one group, a step of all groups, and the scan over the steps of a segment."""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray

from vffjax.errors import chosen
from vffjax.hyperparameters import HyperParameters
from vffjax.networks.groups import GroupState, LayerGroup, States
from vffjax.ops.fence import as_branch
from vffjax.ops.normalisation import Rows
from vffjax.ops.rows import in_equal_parts, over_devices
from vffjax.rules import local
from vffjax.rules.streams import Step, Streams, Task
from vffjax.training.augment import augmented
from vffjax.training.batch import Batch
from vffjax.training.optimizers import make_optimizer
from vffjax.training.plan import Plan

T = TypeVar("T")


def group_step(
    setting: local.Setting, group: LayerGroup, state: GroupState, streams: Streams, fence: bool = False
) -> tuple[GroupState, Streams, dict[str, Array]]:
    """Updates one group on its own loss. Its detached features are the streams of the next group.

    Args:
        setting: the rule, and the group's configuration, hyperparameters and key.
        group: the group's functions.
        state: its parameters, statistics and optimizer state.
        streams: its input.
        fence: whether the kernels are updated before anything that uses the output streams starts; on CPU the whole gradient is finished.
            Then little more than one group's intermediate maps is in memory at a time.

    Returns:
        The new state, the output streams, and the metrics. The metric `finite` says whether the loss is finite, and with
        config.on_nonfinite=skip also whether the new state is; if it is not, the old state is returned.
    """

    streams = streams._replace(rows=over_devices(streams.rows))

    def differentiate(params: Any, batch_stats: Any, streams: Streams, key: PRNGKeyArray) -> Any:
        gradient = jax.value_and_grad(local.local_loss, has_aux=True)
        return gradient(params, setting._replace(key=key), group, batch_stats, streams)

    differentiate = _as_branch_on_cpu(differentiate, streams.rows) if fence else differentiate
    (loss, (stats, streams, metrics)), grads = differentiate(state.params, state.batch_stats, streams, setting.key)
    updates, opt_state = make_optimizer(setting.config, setting.hyper, group.frozen).update(grads, state.opt_state, state.params)
    new, finite = GroupState(optax.apply_updates(state.params, updates), stats, opt_state), jnp.isfinite(loss)
    if chosen("on_nonfinite", setting.config.on_nonfinite, {"stop": False, "skip": True}):
        finite &= all_finite(new)
        new = jax.tree.map(functools.partial(jnp.where, finite), new, state)
    if fence:
        new, streams = _done(new, streams)
    return new, streams, metrics | {"finite": finite}


def _done(new: GroupState, streams: Streams) -> tuple[GroupState, Streams]:
    """A group's new state and output, of which the output is there only when all of its kernels are updated.

    The compiler may still compute what is small with that of other groups. If gradients had to be there in place of the kernels, each would
    first be written in the dtype of its parameter, only to be read by the update.
    """
    leaves, tree = jax.tree.flatten(new.params)
    kernels, rows = _finished(([leaf for leaf in leaves if leaf.ndim > 1], streams.rows))
    found = iter(kernels)
    params = jax.tree.unflatten(tree, [next(found) if leaf.ndim > 1 else leaf for leaf in leaves])
    return new._replace(params=params), streams._replace(rows=rows)


def all_finite(tree: Any) -> Bool[Array, ""]:
    """Whether no leaf has an infinity or a NaN."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def _fenced(function: Callable[..., Any], rows: Float[Array, "rows *feature"]) -> Callable[..., Any]:
    """`function`, which finishes before anything that uses its result starts.

    An optimization barrier tells the compiler so. XLA drops barriers on CPU; there `fence.as_branch` does it, by a condition on `rows`.
    """
    function = _as_branch_on_cpu(function, rows)
    return lambda *arguments: _finished(function(*arguments))


def _as_branch_on_cpu(function: Callable[..., Any], rows: Float[Array, "rows *feature"]) -> Callable[..., Any]:
    function = jax.jit(function, inline=True)  # traced once for both, which is most of what starting a deep network takes

    def branch(*arguments: Any) -> Any:
        # A number of its own input as witness: the results depend on nothing more than they do by themselves, which a certificate can see.
        return as_branch(function, rows[(0,) * rows.ndim].astype(jnp.int32), *arguments)

    return functools.partial(jax.lax.platform_dependent, cpu=branch, default=function)


def _finished(results: T) -> T:
    """The results, all of which are there before anything that uses one of them starts. On CPU nothing is done here."""
    done: T = jax.lax.platform_dependent(results, cpu=_as_it_is, default=jax.lax.optimization_barrier)
    return done


def _as_it_is(results: Any) -> Any:
    return results


def before(
    plan: Plan,
    active: int,
    states: States,
    rows: Float[Array, "rows *feature"],
    clean: int,
    fence: bool = False,
) -> Float[Array, "rows *out"]:
    """The input of group `active`: the output of the groups before it, which are frozen and use their running statistics.

    Args:
        plan: of the run.
        active: the index of the group.
        states: of all groups.
        rows: images, the first `clean` of them clean and the others labelled.
        clean: how many are clean.
        fence: whether only one group's maps are kept in memory.
    """
    for group, state in list(zip(plan.groups, states, strict=True))[:active]:

        def features(params: Any, batch_stats: Any, rows: Array, group: LayerGroup = group) -> Array:
            return group.features(params, batch_stats, rows, clean, False)[0]

        rows = (_fenced(features, rows) if fence else features)(state.params, state.batch_stats, rows)
    return jax.lax.stop_gradient(rows)


def behind_frozen(plan: Plan, active: int, states: States, streams: Streams, cached: Array | None = None) -> Streams:
    """The streams at the input of group `active`. If the clean rows were `cached`, only the labelled copies pass the frozen groups."""
    if cached is None:
        return streams._replace(rows=before(plan, active, states, streams.rows, streams.labels.shape[0], fence=True))
    if streams.copies.shape[0] == 0:
        return streams._replace(rows=cached)
    copies = before(plan, active, states, streams.copies, 0, fence=True)
    return streams._replace(rows=jnp.concatenate([cached.astype(copies.dtype), copies]))


def step_streams(plan: Plan, active: int | None, task: Task, states: States, batch: Batch) -> Streams:
    """The input of the first group in a step: the augmented images of the batch and their labelled copies.

    The locality probes call this function too, so that they examine the program that trains.
    """
    x, mixture = augmented(plan.config, task, batch)
    # Only groups that have been trained predict: the heads of the others are still zero and would flatten the prediction.
    trained = len(plan.groups) if active is None else active + 1
    logits = clean_log_p(plan, task, states, x, trained).mean(axis=0) if plan.rule.predicts(plan.config) else None
    options, key = plan.rule.options_of(plan.config), _key_of_draws(batch.key)
    made = plan.rule.streams(Step(plan.config, options, task, key, x, batch.labels, logits, _drawn(plan, task, batch)))
    return made if mixture is None else made._replace(mixture=mixture)


def _drawn(plan: Plan, task: Task, batch: Batch) -> Any:
    """What was drawn for a step before the loop of its segment, if anything was.

    On CPU it is drawn once more in the step, which costs little. XLA merges a loop of one round into what is around it, and then rounds
    in another way; with what was drawn before the loop, the bits of a step would depend on the length of its segment.
    """
    if batch.drawn is None:
        return None
    here = functools.partial(_draw, plan, task.classes, batch.labels.shape[0])
    return jax.lax.platform_dependent(batch.key, batch.drawn, cpu=lambda key, _: here(key), default=lambda _, drawn: drawn)


def _draw(plan: Plan, classes: int, images: int, key: Key[Array, ""]) -> Any:
    assert plan.rule.draws is not None
    return plan.rule.draws(plan.config, classes, images, _key_of_draws(key))


def with_draws(plan: Plan, task: Task, batch: Batch) -> Batch:
    """The batch, or a segment's, with what the rule draws in its steps, if the rule has `Rule.draws`."""
    if plan.rule.draws is None:
        return batch
    one = functools.partial(_draw, plan, task.classes, batch.labels.shape[-1])
    if not batch.key.ndim:
        return batch._replace(drawn=one(batch.key))
    # Of JAX's generators this one alone draws the same for a key by itself and for a key among others. A segment may begin at any step.
    together = str(jax.random.key_impl(batch.key)) == "threefry2x32"
    return batch._replace(drawn=jax.vmap(one)(batch.key) if together else jax.lax.map(one, batch.key))


def _key_of_draws(key: Key[Array, ""]) -> PRNGKeyArray:
    return jax.random.fold_in(key, 1)


def train_step(plan: Plan, active: int | None, task: Task, states: States, batch: Batch) -> tuple[States, dict[str, Array]]:
    """Trains the groups on one batch, from input to output.

    Args:
        plan: of the run; in a jitted function `Plan.program`.
        active: None if all groups train. Else the index of the only group that trains; its predecessors are frozen, and their output for
            the clean images may be given as `batch.features`.
        task, states, batch: codebook and pixel statistics; the groups' states; images, labels, key and hyperparameters.

    Returns:
        The new states. And metrics for each group that trained: `loss`, `local_loss`, `head_loss`, `accuracy` of its head, `finite`, and
        the rule's own; and `ensemble_accuracy` of all heads. Where images are mixed, the right class is that of the larger part.
    """
    streams = step_streams(plan, active, task, states, batch)
    streams = streams if active is None else behind_frozen(plan, active, states, streams, batch.features)
    if active is None:
        new_states, _, metrics = train_groups(plan, 0, states, streams, batch.hyper, batch.key)
    else:
        new, _, metrics = train_groups(plan, active, states[active : active + 1], streams, batch.hyper, batch.key, fence=False)
        new_states = (*states[:active], *new, *states[active + 1 :])
    return new_states, of_all_groups(batch.labels, metrics)


def train_groups(
    plan: Plan, first: int, states: States, streams: Streams, hyper: HyperParameters, key: PRNGKeyArray, fence: bool | None = None
) -> tuple[States, Streams, list[dict[str, Array]]]:
    """Trains consecutive groups on the streams of one step, from input to output.

    Args:
        plan: of the run.
        first: the index of the first of these groups.
        states: of these groups alone.
        streams: the input of the first one.
        hyper: the hyperparameters of the step, `[groups]`, of all groups of the network.
        key: of the step.
        fence: see `group_step`; by default, whether the network has several groups.

    Returns:
        Their new states, the output streams of the last one, and the metrics of each, `log_p` of its head among them.
    """
    streams = streams._replace(rows=in_equal_parts(streams.rows))
    new_states, metrics = [], []
    fence = len(plan.groups) > 1 if fence is None else fence
    for i, state in enumerate(states, first):
        new, streams, m = group_step(plan.setting(i, hyper, key), plan.groups[i], state, streams, fence=fence)
        new_states.append(new)
        metrics.append(m)
    return tuple(new_states), streams, metrics


def of_all_groups(labels: Int[Array, " batch"], metrics: list[dict[str, Array]]) -> dict[str, Array]:
    """The metrics of a step from those of each group; `train_step` names them."""
    metrics = [dict(m) for m in metrics]
    log_p = jnp.stack([m.pop("log_p") for m in metrics])
    out = {name: jnp.stack([m[name] for m in metrics]) for name in metrics[0]}
    every = jnp.concatenate([log_p, log_p.mean(axis=0, keepdims=True)])  # the groups', and the ensemble's: counted in one go
    # argmax returns 64-bit integers under JAX_ENABLE_X64, so it is cast to the labels' type.
    accuracy = jnp.mean(every.argmax(-1).astype(labels.dtype) == labels[None], axis=1)
    return out | {"accuracy": accuracy[:-1], "ensemble_accuracy": accuracy[-1]}


# `train_step` for segments of every length and for the certificate, which share one trace. The calling program holds the operations
# themselves. `train_step` is looked up when it is traced, so that a leak which a test plants there is in all of these programs.
traced_step = jax.jit(lambda *given: train_step(*given), static_argnums=(0, 1), inline=True)


def step_of_segment(plan: Plan, active: int | None, task: Task, states: States, batch: Batch) -> tuple[States, dict[str, Array]]:
    """`train_step` by the trace that it has in a segment."""
    return traced_step(plan, active, task, states, with_draws(plan, task, batch))


def clean_log_p(
    plan: Plan, task: Task, states: States, x: Float[Array, "batch h w c"], first: int | None = None
) -> Float[Array, "groups batch classes"]:
    """Log-probabilities by the heads of the `first` groups (None: all), for normalised images, with running statistics."""
    maps = itertools.islice(evaluated(plan, states, plan.rule.shown(task, x), x.shape[0]), first)
    return jnp.stack([jax.nn.log_softmax(group.logits(state.params, z)) for group, state, z in maps])


def evaluated(
    plan: Plan, states: States, rows: Float[Array, "rows *feature"], clean: Rows
) -> Iterator[tuple[LayerGroup, GroupState, Array]]:
    """Yields each group with its state and its features of the rows, of which the first `clean` are clean. Uses running statistics."""
    for group, state in zip(plan.groups, states, strict=True):
        rows, _ = group.features(state.params, state.batch_stats, rows, clean, False)
        yield group, state, rows


@functools.partial(jax.jit, static_argnums=(0, 1))
def feature_maps(plan: Plan, clean: int, states: States, rows: Float[Array, "rows *feature"]) -> list[Array]:
    """The features of the rows in each group, as `evaluated` gives them. Takes a `Plan.program`, so that runs share what is compiled."""
    return [z for _, _, z in evaluated(plan, states, rows, clean)]


def run_segment(plan: Plan, active: int | None, task: Task, states: States, batches: Batch) -> tuple[States, dict[str, Array]]:
    """Trains some steps of an epoch, one after the other. Returns the new states and the metrics of each step.

    This is the program that training runs: an epoch is a few calls of it (see `epochs`), wherever the batches come from.
    """

    def step(states: States, batch: Batch) -> Any:
        return traced_step(plan, active, task, states, batch.shaped(task.codebook.shape[1:]))

    return jax.lax.scan(step, states, with_draws(plan, task, batches))
