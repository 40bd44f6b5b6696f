"""Greedy training: one step of one group, all groups on a batch, a scanned epoch. The only place where training is jitted."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped, UInt8

from vffjax import rules
from vffjax.augment import augment, cut_out, normalise
from vffjax.config import Config, for_group
from vffjax.errors import chosen
from vffjax.fence import as_branch
from vffjax.groups import GroupState, LayerGroup
from vffjax.labelling import Streams
from vffjax.plan import EPOCH, Images, Plan, run_key
from vffjax.rules import Task


def group_step(
    config: Config,
    group: LayerGroup,
    optimizer: optax.GradientTransformation,
    state: GroupState,
    streams: Streams,
    key: PRNGKeyArray,
    fence: bool = False,
) -> tuple[GroupState, Streams, dict[str, Array]]:
    """One update of one group on its own loss; its features, detached, are the next group's streams. Pure.

    With `fence`, nothing that takes the result begins before the gradient is done: one group's intermediate maps are alive at a time.
    The metric `finite` says whether the loss is; if `config.on_nonfinite` is skip, whether the whole new state is too. If not, the
    state then stays as it was.
    """

    def differentiate(params: Any, batch_stats: Any, streams: Streams, key: PRNGKeyArray) -> Any:
        gradient = jax.value_and_grad(rules.local_loss, has_aux=True)
        return gradient(params, config, group, batch_stats, streams, key)

    differentiate = _fenced(differentiate, streams.labels) if fence else differentiate
    (loss, (stats, streams, metrics)), grads = differentiate(state.params, state.batch_stats, streams, key)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    new, finite = GroupState(optax.apply_updates(state.params, updates), stats, opt_state), jnp.isfinite(loss)
    if chosen("on_nonfinite", config.on_nonfinite, {"stop": False, "skip": True}):
        finite &= all_finite(new)
        new = jax.tree.map(functools.partial(jnp.where, finite), new, state)
    return new, streams, metrics | {"finite": finite}


def all_finite(tree: Any) -> Bool[Array, ""]:
    """Whether there is neither infinity nor NaN in any leaf."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def _fenced(function: Callable[..., Any], labels: Int[Array, " batch"]) -> Callable[..., Any]:
    """`function`, done with all that it computes before anything that takes its result begins.

    A barrier says so to the compiler; on CPU `fence.as_branch` does, on any of the `labels`.
    """
    function = jax.jit(function, inline=True)  # traced once for both, which is most of what starting a deep network takes

    def branch(*arguments: Any) -> Any:
        return as_branch(function, labels[0], *arguments)

    def barrier(*arguments: Any) -> Any:
        return jax.lax.optimization_barrier(function(*arguments))

    return functools.partial(jax.lax.platform_dependent, cpu=branch, default=barrier)


def before(
    plan: Plan,
    active: int,
    states: tuple[GroupState, ...],
    rows: Float[Array, "rows *feature"],
    clean: int,
    labels: Int[Array, " batch"] | None = None,
) -> Float[Array, "rows *out"]:
    """The input of group `active` for rows of images, the first `clean` of them clean: frozen groups, running statistics, no gradient.

    With any `labels` for the fence, one group's maps are alive at a time.
    """
    for group, state in list(zip(plan.groups, states, strict=True))[:active]:

        def features(params: Any, batch_stats: Any, rows: Array, group: LayerGroup = group) -> Array:
            return group.features(params, batch_stats, rows, clean, False)[0]

        rows = (features if labels is None else _fenced(features, labels))(state.params, state.batch_stats, rows)
    return jax.lax.stop_gradient(rows)


def augmented(config: Config, task: Task, key: PRNGKeyArray, images: UInt8[Array, "batch h w c"]) -> Float[Array, "batch h w c"]:
    """Images as the first group takes them in training: flipped, cropped, normalised, cut out."""
    return cut_out(key, normalised(task, augment(key, images, config)), config.cutout)


def normalised(task: Task, images: UInt8[Array, "batch h w c"]) -> Float[Array, "batch h w c"]:
    """Images as the first group takes them, by the run's pixel statistics."""
    return normalise(images, task.mean, task.std)


def behind_frozen(plan: Plan, active: int, states: tuple[GroupState, ...], streams: Streams, cached: Array | None = None) -> Streams:
    """The streams at the input of group `active`; `cached` clean rows are taken as they are, the copies pass the frozen groups."""
    if cached is None:
        return streams._replace(rows=before(plan, active, states, streams.rows, streams.labels.shape[0], streams.labels))
    if streams.copies.shape[0] == 0:
        return streams._replace(rows=cached)
    copies = before(plan, active, states, streams.copies, 0, streams.labels)
    return streams._replace(rows=jnp.concatenate([cached.astype(copies.dtype), copies]))


def step_streams(
    plan: Plan,
    active: int | None,
    task: Task,
    states: tuple[GroupState, ...],
    images: UInt8[Array, "batch h w c"],
    labels: Int[Array, " batch"],
    key: PRNGKeyArray,
) -> Streams:
    """What a step with this key gives to the first group: the augmented images and their labelled copies.

    The locality probes take their streams from here too, so that they examine the program that trains.
    """
    x = augmented(plan.config, task, jax.random.fold_in(key, 0), images)
    # The groups that have trained; the others' heads are still at zero and would only flatten the prediction.
    trained = len(plan.groups) if active is None else active + 1
    logits = clean_log_p(plan, task, states, x, trained).mean(axis=0) if rules.needs_predictions(plan.config) else None
    return rules.make_streams(plan.config, task, jax.random.fold_in(key, 1), x, labels, logits)


def group_setting(plan: Plan, group: int, key: PRNGKeyArray) -> tuple[Config, PRNGKeyArray]:
    """The configuration and the key by which a group trains in the step with this key."""
    return for_group(plan.config, group), jax.random.fold_in(jax.random.fold_in(key, 2), group)


def train_step(
    plan: Plan,
    active: int | None,
    task: Task,
    states: tuple[GroupState, ...],
    images: UInt8[Array, "batch h w c"],
    labels: Int[Array, " batch"],
    key: PRNGKeyArray,
    features: Float[Array, "batch *feature"] | None = None,
) -> tuple[tuple[GroupState, ...], dict[str, Array]]:
    """One batch through the groups, from input to output: all of them train, or `active` alone on its frozen predecessors, whose
    output for the clean images may be given as `features`.

    Metrics per trained group: `loss`, `local_loss`, `head_loss`, `accuracy` of its head, `finite`; and `ensemble_accuracy` of all heads.
    """
    streams = step_streams(plan, active, task, states, images, labels, key)
    streams = streams if active is None else behind_frozen(plan, active, states, streams, features)
    new_states, metrics = list(states), []
    training = range(len(plan.groups)) if active is None else [active]
    for i in training:
        own, own_key = group_setting(plan, i, key)
        fence = len(training) > 1
        new_states[i], streams, m = group_step(own, plan.groups[i], plan.optimizers[i], states[i], streams, own_key, fence)
        metrics.append(m)
    log_p = jnp.stack([m.pop("log_p") for m in metrics])
    out = {name: jnp.stack([m[name] for m in metrics]) for name in metrics[0]}
    # Cast, because with JAX_ENABLE_X64 the numbers of classes are of 64 bits.
    out["accuracy"] = jnp.mean(log_p.argmax(-1).astype(labels.dtype) == labels[None], axis=1)
    out["ensemble_accuracy"] = jnp.mean(log_p.mean(axis=0).argmax(-1).astype(labels.dtype) == labels)
    return tuple(new_states), out


def clean_log_p(
    plan: Plan, task: Task, states: tuple[GroupState, ...], x: Float[Array, "batch h w c"], first: int | None = None
) -> Float[Array, "groups batch classes"]:
    """Log-probabilities of the `first` groups' heads (None: all) on normalised images, one clean pass, running statistics."""
    z, out = rules.prepare_clean(plan.config, task, x), []
    for group, state in list(zip(plan.groups, states, strict=True))[:first]:
        z, _ = group.features(state.params, state.batch_stats, z, z.shape[0], False)
        out.append(jax.nn.log_softmax(group.logits(state.params, z)))
    return jnp.stack(out)


def epoch_order(plan: Plan, labels: Int[Array, " n"], epoch: Int[Array, ""]) -> tuple[PRNGKeyArray, Int[Array, "steps batch"]]:
    """The epoch's key, drawn from the seed and its number, and the images of each of its steps."""
    key = jax.random.fold_in(run_key(plan.config, EPOCH), epoch)
    steps, batch = plan.steps_per_epoch, plan.config.batch_size
    order = jax.random.permutation(jax.random.fold_in(key, 0), labels.shape[0])
    return key, order[: steps * batch].reshape(steps, batch)


def run_steps(
    plan: Plan,
    active: int | None,
    task: Task,
    states: tuple[GroupState, ...],
    data: Images,
    key: PRNGKeyArray,
    order: Int[Array, "steps batch"],
    numbers: Int[Array, " steps"],
    features: Float[Array, "steps batch *feature"] | None = None,
) -> tuple[tuple[GroupState, ...], dict[str, Array]]:
    """Some steps of an epoch, `numbers` counting from 1; metrics of each. Cached features come from `data`, or step by step as given."""

    def step(states: tuple[GroupState, ...], inputs: tuple[Array, Array, Array | None]) -> Any:
        rows, number, given = inputs
        cached = data.features[rows] if data.features is not None else given
        return train_step(plan, active, task, states, data.images[rows], data.labels[rows], jax.random.fold_in(key, number), cached)

    return jax.lax.scan(step, states, (order, numbers, features))


def over_steps(metrics: dict[str, Shaped[Array, "steps *rest"]]) -> dict[str, Shaped[Array, "*rest"]]:
    """Of each group, the mean of each metric over its `finite` steps; `nonfinite_steps`, how many others there were, and
    `first_nonfinite`, the first of them from 1, or 0.

    A mean over no step is NaN. `ensemble_accuracy` is taken over the steps in which every group was finite.
    """
    finite = metrics["finite"]

    def mean(values: Array) -> Array:
        counted = finite if values.ndim == 2 else finite.all(axis=1)
        return jnp.where(counted, values, 0).sum(axis=0) / counted.sum(axis=0).astype(values.dtype)

    means = {name: mean(values) for name, values in metrics.items() if name != "finite"}
    first = jnp.where(finite.all(axis=0), 0, 1 + jnp.argmin(finite, axis=0))
    return means | {"nonfinite_steps": (~finite).sum(axis=0), "first_nonfinite": first}


def run_epoch(
    plan: Plan, active: int | None, task: Task, states: tuple[GroupState, ...], data: Images, epoch: Int[Array, ""]
) -> tuple[tuple[GroupState, ...], dict[str, Array]]:
    """Every batch of one epoch, in an order drawn from the seed and the epoch's number; metrics as `over_steps`."""
    key, order = epoch_order(plan, data.labels, epoch)
    states, metrics = run_steps(plan, active, task, states, data, key, order, jnp.arange(1, plan.steps_per_epoch + 1))
    return states, over_steps(metrics)


def make_epoch(plan: Plan, active: int | None = None) -> jax.stages.Wrapped:
    """`run_epoch(task, states, data, epoch)` jitted; `states` are donated: the caller's are gone afterwards."""
    return jax.jit(functools.partial(run_epoch, plan, active), donate_argnums=1)
