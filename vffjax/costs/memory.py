"""The memory ledger: the bytes that one training step takes by the compiler's own plan, for a local rule and for back-propagation.

The compiler counts a step's arguments (states, batch, codebook), its outputs, the part of the outputs that overwrites arguments, and
temporaries, which are everything in between. Nothing is run, and no data set is read.

Three things are not counted: the rest of the data set on the device; the scratch memory of the runtime and its libraries; and on a TPU what
the compiler keeps in the chip's vector memory, which is 128 MiB on a v5e, so that a small network may seem to take no memory.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from vffjax.config import Config, for_group
from vffjax.costs.ledger import ACCUMULATED, MICRO_BATCHES, Case
from vffjax.costs.targets import Target
from vffjax.data import sizes_of
from vffjax.data.sets import Sizes
from vffjax.hyperparameters import at_peak
from vffjax.networks.groups import GroupState, States, layer_sizes
from vffjax.rules import local
from vffjax.rules.streams import Task
from vffjax.training import checks, optimizers, trainer
from vffjax.training.batch import Batch, abstract_batch
from vffjax.training.compiled import program_bytes
from vffjax.training.mesh import within
from vffjax.training.plan import Plan, abstract_start
from vffjax.training.stages import is_pipeline

BYTES = ("argument_bytes", "output_bytes", "alias_bytes", "temp_bytes", "total_bytes")


def accumulated_step(plan: Plan, task: Task, states: States, batch: Batch) -> tuple[States, dict[str, Array]]:
    """`train_step` for a network of one group, with its gradient accumulated over parts of the batch.

    The batch is cut into `MICRO_BATCHES` equal parts, which are computed one after the other. There is one update, by the mean of their
    gradients. Batch statistics are those of each part.

    Args:
        plan: a plan with one group. Its batch size must be a multiple of `MICRO_BATCHES`.
        task: the codebook and the pixel statistics.
        states: the state of the group.
        batch: the batch.

    Returns:
        The new state, and the metrics `loss` and `accuracy`, means over the parts.
    """
    (group,), (state,) = plan.groups, states
    setting = plan.setting(0, batch.hyper, batch.key)
    gradient = jax.value_and_grad(local.local_loss, has_aux=True)

    def part(carry: tuple[Any, Any], rows: tuple[Array, ...]) -> tuple[tuple[Any, Any], dict[str, Array]]:
        total, stats = carry
        images, labels, ids, key = rows
        some = batch._replace(images=images, labels=labels, ids=ids, key=key)
        streams = trainer.step_streams(plan, None, task, states, some)
        (loss, (stats, _, metrics)), grads = gradient(state.params, plan.setting(0, some.hyper, key), group, stats, streams)
        accuracy = jnp.mean(metrics["log_p"].argmax(-1) == labels)
        return (jax.tree.map(jnp.add, total, grads), stats), {"loss": loss, "accuracy": accuracy}

    parts = tuple(x.reshape(MICRO_BATCHES, -1, *x.shape[1:]) for x in (batch.images, batch.labels, batch.ids))
    start = (jax.tree.map(jnp.zeros_like, state.params), state.batch_stats)
    (total, stats), metrics = jax.lax.scan(part, start, (*parts, jax.random.split(batch.key, MICRO_BATCHES)))
    mean = jax.tree.map(lambda g: g / MICRO_BATCHES, total)
    updates, opt_state = optimizers.make_optimizer(setting.config, setting.hyper).update(mean, state.opt_state, state.params)
    return (GroupState(optax.apply_updates(state.params, updates), stats, opt_state),), jax.tree.map(jnp.mean, metrics)


def least_bytes(config: Config, devices: int = 1) -> int:
    """A lower bound on the bytes that training takes on each device: parameters, optimizer states, and a step's largest feature map once.

    Of several devices each has all parameters and its part of the rows. In a pipeline one has the largest map, and one has its part of the
    parameters or more.
    """
    plan, sizes = checks.plan_before_data(config)
    layers = layer_sizes(plan.groups, sizes.image_shape)
    itemsize = jnp.dtype(plan.groups[0].module.layers[0].dtype).itemsize
    hyper, sizes_left, kept = at_peak(config, len(plan.groups)), iter(layers), 0
    for i, group in enumerate(plan.groups):
        optimizer = optimizers.make_optimizer(for_group(config, i), hyper.of(i), group.frozen)
        state = jax.eval_shape(optimizer.init, {"layers_0": {"kernel": jnp.zeros((1, 1))}})
        copies = sum(leaf.ndim > 1 for leaf in jax.tree.leaves(state))  # that the optimizer keeps of a kernel
        kept += (1 + copies) * sum(next(sizes_left).kernels for _ in group.module.layers)
    states, features = 4 * kept, plan.rows_of_a_step * max(layer.map for layer in layers) * itemsize
    return max(states // devices, features) if is_pipeline(config) else states + features // devices


def make_step(case: Case) -> tuple[Plan, Callable[..., Any]]:
    """The plan of a case and its training step, a function of `(task, states, batch)`.

    In the sequential schedule it is a step of the last stage, in which the last group trains behind all others.
    """
    plan, _ = checks.plan_before_data(case.config)
    if case.method == ACCUMULATED:
        return plan, functools.partial(accumulated_step, plan.program)
    return plan, functools.partial(trainer.train_step, plan.program, plan.active(plan.total_epochs - 1))


def step_arguments(plan: Plan, target: Target, sizes: Sizes | None = None) -> tuple[Any, ...]:
    """The abstract arguments of a plan's step, placed on the target: task, states and batch.

    Args:
        plan: of the step.
        target: the devices. Over several, images and labels are divided.
        sizes: of the images, if they are not those of the configuration's data set.
    """
    sizes, batch = sizes or sizes_of(plan.config), plan.config.batch_size
    task, states = abstract_start(plan, sizes.image_shape)
    # What the rule draws is given, as in a segment, which draws it before its loop.
    given = jax.eval_shape(functools.partial(trainer.with_draws, plan), task, abstract_batch(batch, sizes.image_shape, len(plan.groups)))
    divided = {"images": target.divide(given.images, 0), "labels": target.divide(given.labels, 0)}
    return target.place(task), target.place(states), target.place(given)._replace(**divided)


def compile_step(case: Case, target: Target) -> jax.stages.Compiled | None:
    """Compiles a case's step with donated states; None if the compiler finds that the step does not fit the device."""
    plan, step = make_step(case)
    try:
        with within(target.mesh):
            return jax.jit(step, donate_argnums=1).lower(*step_arguments(plan, target)).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None


def measure(case: Case, target: Target) -> dict[str, Any]:
    """Compiles a case for a target and returns its row of the ledger; see `row`."""
    return row(case, target, compile_step(case, target))


def row(case: Case, target: Target, compiled: jax.stages.Compiled | None) -> dict[str, Any]:
    """The row of the ledger for a compiled step.

    Args:
        case: the case.
        target: the device.
        compiled: the step, or None if it does not fit the device.

    Returns:
        `Case.about`, the kind of the `device`, the number of `devices`, the `BYTES` of the step on each of them, and a `problem`. Without a
        step, the bytes are None, and `problem` says why.
    """
    about = case.about | {"device": target.device.device_kind, "devices": target.number}
    if compiled is None:
        return about | dict.fromkeys(BYTES) | {"problem": "does not fit the device"}
    return about | program_bytes(compiled) | {"problem": ""}
