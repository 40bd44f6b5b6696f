"""What frozen groups make of the training images, computed once: for the sequential schedule, where nothing augments the images.

A group that trains behind frozen ones sees the same clean features in every epoch. They are kept on the device, or in the host's memory,
from where a few steps' worth at a time goes to the device. Labelled copies carry other noise in every step, and pass the frozen groups
again.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from vffjax.batching import map_batches
from vffjax.groups import GroupState
from vffjax.plan import Images, Plan
from vffjax.rules import Task, prepare_clean
from vffjax.trainer import before, epoch_order, normalised, over_steps, run_steps

# Steps whose features are on the device at a time; the next are on their way meanwhile.
STEPS_PER_TRANSFER = 16
# Batches of evaluation whose features the device computes before the host takes them.
BATCHES_PER_FETCH = 16

Epoch = Callable[..., tuple[tuple[GroupState, ...], dict[str, Array]]]


def clean_features(
    plan: Plan, active: int, task: Task, states: tuple[GroupState, ...], images: UInt8[Array, "n h w c"]
) -> Float[Array, "n *feature"]:
    """The input of group `active` for clean images: running statistics, in batches of `config.eval_batch_size`."""

    def features(batch: Array) -> Array:
        z = prepare_clean(plan.config, task, normalised(task, batch))
        return before(plan, active, states, z, z.shape[0])

    return map_batches(features, images, plan.config.eval_batch_size)


def with_features(plan: Plan, active: int, task: Task, states: tuple[GroupState, ...], data: Images) -> Images:
    """`data` with the input of group `active` beside each image: a device's array, or NumPy's if `config.feature_cache` is host."""
    features = jax.jit(functools.partial(clean_features, plan, active))
    if plan.config.feature_cache != "host":
        return data._replace(features=features(task, states, data.images))
    # Some batches at a time: all features together may be more than the device holds.
    size = BATCHES_PER_FETCH * plan.config.eval_batch_size
    pieces = [np.asarray(features(task, states, data.images[i : i + size])) for i in range(0, len(data.images), size)]
    return data._replace(features=np.concatenate(pieces))


def make_host_epoch(plan: Plan, active: int, task: Task, states: tuple[GroupState, ...], data: Images) -> tuple[Epoch, Any]:
    """`epoch(task, states, data, number)` as `trainer.make_epoch` makes it, for `data.features` on the host; and its largest executable.

    Everything is compiled here. `states` are donated at each call. The device holds the features of two transfers at most, not of the data
    set: before a transfer begins, the steps that took the one before the last are done.
    """

    def steps(task: Task, states: tuple[GroupState, ...], data: Images, key: Array, order: Array, numbers: Array, features: Array) -> Any:
        return run_steps(plan, active, task, states, data, key, order, numbers, features)

    def joined(parts: list[dict[str, Array]]) -> dict[str, Array]:
        return over_steps(jax.tree.map(lambda *some: jnp.concatenate(some), *parts))

    on_device, example, number = data._replace(features=None), np.asarray(data.features), jnp.int32(0)
    start = jax.jit(functools.partial(epoch_order, plan)).lower(data.labels, number).compile()
    pieces = np.array_split(np.arange(plan.steps_per_epoch, dtype=np.int32), -(-plan.steps_per_epoch // STEPS_PER_TRANSFER))
    key, order = start(data.labels, number)

    def abstract(length: int) -> tuple[Any, ...]:
        shape, batch = jax.ShapeDtypeStruct, plan.config.batch_size
        features = shape((length, batch, *example.shape[1:]), example.dtype)
        return task, states, on_device, key, shape((length, batch), order.dtype), shape((length,), jnp.int32), features

    jitted = jax.jit(steps, donate_argnums=1)
    lowered = {length: jitted.lower(*abstract(length)) for length in {len(piece) for piece in pieces}}
    by_length = {length: program.compile() for length, program in lowered.items()}
    join = jax.jit(joined).lower([lowered[len(piece)].out_info[1] for piece in pieces]).compile()

    def epoch(task: Task, states: tuple[GroupState, ...], data: Images, number: Array) -> tuple[tuple[GroupState, ...], dict[str, Array]]:
        key, order = start(data.labels, number)
        on_device, cached = data._replace(features=None), np.asarray(data.features)
        rows = np.asarray(order)
        metrics: list[dict[str, Array]] = []
        for i, piece in enumerate(pieces):
            if i > 1:
                jax.block_until_ready(metrics[i - 2])
            given = jax.device_put((rows[piece], piece + 1, cached[rows[piece]]))
            states, some = by_length[len(piece)](task, states, on_device, key, *given)
            metrics.append(some)
        return states, join(metrics)

    return epoch, by_length[max(by_length)]
