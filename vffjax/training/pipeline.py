"""The pipeline of groups: each stage of consecutive groups trains on its own device, as soon as its input is there.

No gradient crosses a border between groups, so a stage never waits for the one behind it: there is no backward wave, and devices idle
only while the pipeline fills and drains, once in an epoch. What goes from device to device are the streams. The operations of a step are
those of the joint schedule, cut between groups, so that on CPU the results are the same to the bit.

A stage trains several steps in one call, a chunk. As in `epochs`, only this module jits its programs and donates the states of a stage to
them. Nothing else is ever donated: what `device_put` returns may share its memory with what it was given.
"""

import collections
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array, Key

from vffjax.hyperparameters import HyperParameters
from vffjax.networks.groups import States
from vffjax.rules.streams import Streams, Task
from vffjax.training import trainer
from vffjax.training.batch import Batch
from vffjax.training.compiled import compiled
from vffjax.training.epochs import LARGEST_BYTES, Epoch, Segment, pieces
from vffjax.training.mesh import mesh_of
from vffjax.training.plan import Images, Plan
from vffjax.training.stages import Span, is_pipeline, spans_of

# An epoch is cut into at least so many chunks for each stage, so that filling and draining take a small part of it.
_CHUNKS = 8

MetricsOfGroups = list[dict[str, Array]]


def run_stage(
    plan: Plan, first: int, task: Task | None, states: States, given: Batch | Streams, hyper: HyperParameters, keys: Key[Array, " steps"]
) -> tuple[States, Streams, MetricsOfGroups]:
    """Trains the groups of a stage for some steps, one after the other.

    Args:
        plan: of the run; in a jitted function `Plan.program`.
        first: the index of the stage's first group.
        task: the task, for the first stage; None for the others.
        states: of the stage's groups.
        given: the batches for the first stage, and the streams out of the stage before for the others; each array `[steps, ...]`.
        hyper: the hyperparameters of all groups, `[steps, groups]`.
        keys: of the steps.

    Returns:
        The new states, the output streams of each step, and each group's metrics of each step. Nothing reads the last stage's streams, so
        it returns no rows.
    """

    def step(states: States, inputs: Any) -> Any:
        given, hyper, key = inputs
        streams = given if task is None else trainer.step_streams(plan, None, task, (), given.shaped(task.codebook.shape[1:]))
        states, streams, metrics = trainer.train_groups(plan, first, states, streams, hyper, key)
        ends = first + len(states) == len(plan.groups)
        return states, (streams._replace(rows=streams.rows[:0]) if ends else streams, metrics)

    states, (streams, metrics) = jax.lax.scan(step, states, (given, hyper, keys))
    return states, streams, metrics


def collect(plan: Plan, labels: Array, metrics: MetricsOfGroups) -> dict[str, Array]:
    """The metrics of each step, as `trainer.train_step` names them, from those of each group and the labels, `[steps, batch]`."""
    return jax.lax.scan(lambda _, step: (None, trainer.of_all_groups(*step)), None, (labels, metrics))[1]


stage = jax.jit(run_stage, static_argnums=(0, 1), donate_argnums=3)
collected = jax.jit(collect, static_argnums=0)


def in_one(plan: Plan, spans: Sequence[Span], task: Task, states: States, batches: Batch) -> tuple[States, dict[str, Array]]:
    """What the stages compute together, as one function like `trainer.run_segment`. The locality certificate traces it."""
    given: Any = batches
    done: list[Any] = []
    metrics: MetricsOfGroups = []
    for first, last in spans:
        new, given, own = stage(plan, first, None if first else task, states[first:last], given, batches.hyper, batches.key)
        done += new
        metrics += own
    return tuple(done), collected(plan, batches.labels, metrics)


def chunk_length(plan: Plan, image_shape: tuple[int, int, int], stages: int, length: int) -> int:
    """How many steps a stage trains in one call.

    Args:
        plan: of the run; `config.segment_steps` wins if it is set.
        image_shape: height, width and channels of an image.
        stages: how many there are.
        length: the most.

    Returns:
        As many as leave `_CHUNKS` chunks for each stage, and as have at most `LARGEST_BYTES` of images in float32; but 2 at the least.
    """
    if plan.config.segment_steps:
        return plan.config.segment_steps
    most = LARGEST_BYTES // (4 * plan.rows_of_a_step * int(np.prod(image_shape)))
    return max(2, min(length, plan.steps_per_epoch // (_CHUNKS * stages), most))  # a loop of one step is none, and rounds otherwise


def on(device: Any, tree: Any) -> Any:
    """The arrays of a tree on a device. They may share memory with the given ones, so they must not be donated."""
    return jax.device_put(tree, SingleDeviceSharding(device))


def owned(device: Any, tree: Any) -> Any:
    """The arrays of a tree on a device, for a program to which they are donated. JAX arrays are gone afterwards, as the states given to an
    `Epoch` are: those that lie there are taken as they are, and others are moved. NumPy arrays are copied."""
    place = SingleDeviceSharding(device)

    def put(leaf: Any) -> Array:
        if isinstance(leaf, jax.Array) and leaf.sharding.device_set == {device}:
            return jax.device_put(leaf, place)
        moved = jax.device_put(leaf, place, may_alias=False)
        if isinstance(leaf, jax.Array):
            leaf.delete()  # or the device where all states lie at first would keep those of all stages for the whole run
        return moved

    return jax.tree.map(put, tree)


def abstract(device: Any, tree: Any) -> Any:
    """The shapes of a tree's arrays, placed on a device, which need not be present."""
    place = SingleDeviceSharding(device)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree)


class Programs:
    """The compiled programs of all stages, for chunks of one length. The arguments may be shapes, and the devices need not be present."""

    def __init__(self, plan: Plan, spans: Sequence[Span], devices: Sequence[Any], task: Task, states: States, batches: Batch):
        program, given = plan.program, batches
        self.stages: list[jax.stages.Compiled] = []
        self.crossing: list[int] = []  # bytes of the streams that each stage but the last passes on, in a chunk
        metrics: MetricsOfGroups = []
        for (first, last), device in zip(spans, devices, strict=True):
            inputs = (None if first else task, states[first:last], given, batches.hyper, batches.key)
            placed = abstract(device, inputs)
            self.stages.append(compiled(stage, program, first, *placed))
            _, given, own = jax.eval_shape(functools.partial(run_stage, program, first), *inputs)
            metrics += own
            self.crossing.append(bytes_of(given))
            reported = bytes_of(own)
        self.crossing.pop()
        told = len(self.crossing) * bytes_of((batches.hyper, batches.key)) + bytes_of(metrics) - reported + bytes_of(batches.labels)
        self.moved = sum(self.crossing) + told if self.crossing else 0  # bytes from device to device in a chunk, all in all
        self.collect = compiled(collected, program, *abstract(devices[-1], (batches.labels, metrics)))


def bytes_of(tree: Any) -> int:
    """The bytes of all arrays of a tree of arrays or shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


class PipelinedEpoch(Epoch):
    """Trains epochs like `Epoch`, in chunks that go from stage to stage, and with the same results.

    Args:
        plan: of the run, with config.schedule=pipeline.
        length: the most steps in a chunk; see `chunk_length`.
        devices: how many stages there are, each on a device of its own.
        image_shape: height, width and channels of an image.
    """

    def __init__(self, plan: Plan, length: int, devices: int, image_shape: tuple[int, int, int]):
        super().__init__(plan, None, length)
        self.pieces = pieces(plan.steps_per_epoch, chunk_length(plan, image_shape, devices, length))
        self.spans, self.devices = spans_of(plan, image_shape, devices), jax.devices()[:devices]
        self._programs: dict[int, Programs] = {}

    def compile(self, task: Task, states: States, data: Images, done: int = 0) -> jax.stages.Compiled:
        """As `Epoch.compile`; returns the largest program of a stage."""
        draws = self._draws(data, 0)
        for piece in {len(piece): piece for piece in (*self.pieces, *self._left(done))}.values():
            self._of(task, states, self._batches(data, piece, draws))
        longest = self._programs[max(self._programs)].stages
        return max(longest, key=lambda program: program.memory_analysis().temp_size_in_bytes)  # type: ignore[union-attr]

    def segments(self, task: Task, states: States, data: Images, epoch: int, done: int = 0) -> Iterator[Segment]:
        """As `Epoch.segments`. The states that it yields lie on the devices of their stages.

        When a chunk is yielded, the one that was dispatched as many chunks before it as there are stages has finished. So every stage has
        work queued, and at most one chunk more than there are stages is in flight.
        """
        draws, flying = self._draws(data, epoch), collections.deque[Any]()
        own = [owned(device, states[first:last]) for (first, last), device in zip(self.spans, self.devices, strict=True)]
        first_device, last_device = self.devices[0], self.devices[-1]
        task = on(first_device, task)
        for piece in self._left(done):
            batches = self._batches(data, piece, draws)
            programs = self._of(task, sum(own, ()), batches)
            given: Any = on(first_device, batches)
            found: MetricsOfGroups = []
            for i, (program, device) in enumerate(zip(programs.stages, self.devices, strict=True)):
                given, hyper, keys = on(device, (given, batches.hyper, batches.key))
                own[i], given, metrics = program(None if i else task, own[i], given, hyper, keys)
                found += on(last_device, metrics)
            out = programs.collect(on(last_device, batches.labels), found)
            flying.append(out)
            if len(flying) > len(self.devices):
                jax.block_until_ready(flying.popleft())
            yield Segment(piece.stop, sum(own, ()), out)

    def programs(self, length: int) -> Programs:
        """The programs for chunks of so many steps, once they are compiled."""
        return self._programs[length]

    def together(self, states: States) -> States:
        """The states of all groups on JAX's first device, where they are validated."""
        return on(self.devices[0], states)

    def _batches(self, data: Images, piece: range, draws: Any) -> Batch:
        """The batches of some steps. Numbers of hyperparameters are JAX arrays, as the compiled programs take them."""
        batches = self._gathered(data, piece, draws)
        return batches._replace(epoch=jnp.asarray(batches.epoch), hyper=jax.tree.map(jnp.asarray, batches.hyper))

    def _of(self, task: Task, states: States, batches: Batch) -> Programs:
        length = batches.labels.shape[0]
        if length not in self._programs:
            self._programs[length] = Programs(self._plan, self.spans, self.devices, task, states, batches)
        return self._programs[length]


def epoch_of(plan: Plan, active: int | None, length: int, devices: int, image_shape: tuple[int, int, int]) -> Epoch:
    """What trains epochs by a plan.

    Args:
        plan: of the run.
        active: the index of the group that trains; None if all groups train.
        length: steps in a segment, about.
        devices: how many train.
        image_shape: height, width and channels of an image.
    """
    if is_pipeline(plan.config):
        return PipelinedEpoch(plan, length, devices, image_shape)
    return Epoch(plan, active, length, mesh_of(devices))
