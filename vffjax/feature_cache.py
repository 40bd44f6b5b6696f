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
from vffjax.rules import Task, prepare_clean
from vffjax.trainer import Images, Plan, before, epoch_order, normalised, over_steps, run_steps

# Steps whose features are on the device at a time; the next are on their way meanwhile.
STEPS_PER_TRANSFER = 16

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
    found = jax.jit(functools.partial(clean_features, plan, active))(task, states, data.images)
    return data._replace(features=np.asarray(found) if plan.config.feature_cache == "host" else found)


def make_host_epoch(plan: Plan, active: int, task: Task, states: tuple[GroupState, ...], data: Images) -> tuple[Epoch, Any]:
    """`epoch(task, states, data, number)` as `trainer.make_epoch` makes it, for `data.features` on the host; and its largest executable.

    Everything is compiled here. `states` are donated at each call. The device holds the features of two transfers, not of the data set.
    """

    def steps(task: Task, states: tuple[GroupState, ...], data: Images, key: Array, order: Array, numbers: Array, features: Array) -> Any:
        return run_steps(plan, active, task, states, data, key, order, numbers, features)

    jitted, start = jax.jit(steps, donate_argnums=1), jax.jit(functools.partial(epoch_order, plan))
    on_device, example = data._replace(features=None), np.asarray(data.features)
    pieces = np.array_split(np.arange(plan.steps_per_epoch), -(-plan.steps_per_epoch // STEPS_PER_TRANSFER))
    key, order = start(data.labels, jnp.int32(0))

    def compiled(length: int) -> Any:
        features = jax.ShapeDtypeStruct((length, plan.config.batch_size, *example.shape[1:]), example.dtype)
        return jitted.lower(task, states, on_device, key, order[:length], jnp.arange(length, dtype=jnp.int32), features).compile()

    by_length = {length: compiled(length) for length in {len(piece) for piece in pieces}}

    def epoch(task: Task, states: tuple[GroupState, ...], data: Images, number: Array) -> tuple[tuple[GroupState, ...], dict[str, Array]]:
        key, order = start(data.labels, number)
        rows, cached, metrics = np.asarray(order), np.asarray(data.features), []
        for piece in pieces:
            features = jax.device_put(cached[rows[piece]])
            numbers = jnp.asarray(piece + 1, jnp.int32)
            states, some = by_length[len(piece)](task, states, data._replace(features=None), key, order[piece], numbers, features)
            metrics.append(some)
        return states, over_steps(jax.tree.map(lambda *parts: jnp.concatenate(parts), *metrics))

    return epoch, by_length[max(by_length)]
