"""An epoch as a few calls of one compiled segment. The only place where training is jitted, and where its states are donated.

The batches of a segment are gathered outside of it: by a small program of its own where the images lie on the device, by NumPy where they
lie on the host. Both feed the same executable, and its length does not enter the result: wherever the images lie and however an epoch is
cut, the bits are the same.
"""

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key, PRNGKeyArray, Shaped

from vffjax.backend import cores
from vffjax.hyperparameters import HyperParameters
from vffjax.networks.groups import GroupState, layer_sizes
from vffjax.rules.streams import Task
from vffjax.training.batch import Batch, abstract_batch
from vffjax.training.plan import EPOCH, Images, Plan, run_key
from vffjax.training.trainer import run_segment

# What a segment aims at: long enough that its start costs nothing, short enough that a run which is told to leave can save in time.
SECONDS, LARGEST_BYTES = 3.0, 2**26
# FLOP/s that a core, or an accelerator, is taken for where the length of a segment is chosen. Only the order of magnitude matters.
_CORE, _ACCELERATOR = 5e10, 2e13

segment = jax.jit(run_segment, static_argnums=(0, 1), donate_argnums=3)

Metrics = dict[str, Shaped[np.ndarray, "_steps *_groups"]]


class Segment(NamedTuple):
    """What is there when a segment of an epoch has been dispatched: `done` steps of the epoch, the states behind them, and the metrics of
    the segment's own steps. States and metrics are arrays that the device may still be computing."""

    done: int
    states: tuple[GroupState, ...]
    metrics: dict[str, Array]


class Epoch:
    """The epochs in which the group `active` trains, or all if it is None, cut into segments of about `length` steps.

    Each length is compiled once, when it is first used or by `compile`. Donated: the states that are given are gone afterwards.
    """

    def __init__(self, plan: Plan, active: int | None = None, length: int | None = None):
        self._plan, self._active = plan, active
        self.pieces = pieces(plan.steps_per_epoch, length or plan.steps_per_epoch)
        self._compiled: dict[int, jax.stages.Compiled] = {}

    def compile(self, task: Task, states: tuple[GroupState, ...], data: Images, done: int = 0) -> jax.stages.Compiled:
        """Compiles all that an epoch on such data needs, also one of which `done` steps are done already; returns the program of the
        longest segment. Nothing is trained."""
        draws, groups = self._draws(data, 0), len(self._plan.groups)
        for piece in {len(piece): piece for piece in (*self.pieces, *self._left(done))}.values():
            _batches(data, piece, draws)  # the programs that gather are compiled where they are called
            shapes = abstract_batch(self._plan.config.batch_size, data.image_shape, groups, data.features, (len(piece),))
            self._program(len(piece), task, states, shapes)
        return self._compiled[max(self._compiled)]

    def __call__(
        self, task: Task, states: tuple[GroupState, ...], data: Images, epoch: int
    ) -> tuple[tuple[GroupState, ...], dict[str, np.ndarray]]:
        """The whole epoch (from 0): the new states and the metrics as `over_steps`."""
        parts = []
        for part in self.segments(task, states, data, epoch):
            states = part.states
            parts.append(part.metrics)
        return states, over_steps(joined(jax.device_get(parts)))

    def segments(self, task: Task, states: tuple[GroupState, ...], data: Images, epoch: int, done: int = 0) -> Iterator[Segment]:
        """Runs what is left of an epoch behind its first `done` steps, and yields each segment when it has been dispatched.

        The segment before it is then finished, so that the device always has the next one and never more than two.
        """
        draws, before = self._draws(data, epoch), dict[str, Array]()
        for piece in self._left(done):
            batches = _batches(data, piece, draws)
            states, metrics = self._program(len(piece), task, states, batches)(task, states, batches)
            jax.block_until_ready(before)
            before = metrics
            yield Segment(piece.stop, states, metrics)

    def _left(self, done: int) -> list[range]:
        """The segments behind the first `done` steps. Where none of this epoch's begins there, the rest is cut anew, by the same length."""
        left = [piece for piece in self.pieces if piece.start >= done]
        if sum(map(len, left)) == self._plan.steps_per_epoch - done:
            return left
        cut = pieces(self._plan.steps_per_epoch - done, max(map(len, self.pieces)))
        return [range(done + piece.start, done + piece.stop) for piece in cut]

    def _draws(self, data: Images, epoch: int) -> "_Draws":
        """What is drawn or known once for all steps of an epoch."""
        ids, keys = epoch_order(self._plan, len(data.labels), epoch)
        return _Draws(epoch, ids, keys, self._plan.hyperparameters(epoch))

    def _program(self, length: int, task: Task, states: tuple[GroupState, ...], batches: Batch) -> jax.stages.Compiled:
        if length not in self._compiled:
            self._compiled[length] = segment.lower(self._plan.program, self._active, task, states, batches).compile()
        return self._compiled[length]


class _Draws(NamedTuple):
    """Of every step of an epoch the images, the key and the numbers."""

    epoch: int
    ids: Int[Array, "steps batch"]
    keys: Key[Array, " steps"]
    hyper: HyperParameters


def _batches(data: Images, piece: range, draws: _Draws) -> Batch:
    """The batches of some steps of an epoch, gathered."""
    ids, keys = _slice(len(piece), piece.start, draws.ids, draws.keys)
    hyper: Any = (values[piece.start : piece.stop] for values in draws.hyper)
    of_epoch: Any = np.full(len(piece), draws.epoch, np.int32)
    images, labels = _take(data.images, ids, data.shape), _take(data.labels, ids)
    features = None if data.features is None else _take(data.features, ids)
    return Batch(images, labels, ids, of_epoch, keys, HyperParameters(*hyper), features)


def pieces(steps: int, length: int) -> list[range]:
    """The steps of an epoch, from 0, in consecutive segments of about `length`: of two lengths at most, which differ by one."""
    count = min(-(-steps // length), max(1, steps // 2)) if length > 1 else steps
    bounds = [steps * i // count for i in range(count + 1)]
    return [range(first, last) for first, last in itertools.pairwise(bounds)]


def segment_length(plan: Plan, image_shape: tuple[int, int, int], feature_bytes: int = 0, backend: str = "") -> int:
    """Steps that take a few seconds on this machine by a rough count of the arithmetic, or whose images take `LARGEST_BYTES` at the most.

    Args:
        plan: the run's plan; `config.segment_steps` wins if it is set.
        image_shape: height, width and channels of an image.
        feature_bytes: of the kept features of one image, where there are any.
        backend: what it will run on, such as tpu; empty: what JAX runs on here.
    """
    if plan.config.segment_steps:
        return plan.config.segment_steps
    widths = [layer.width for group in plan.groups for layer in group.module.layers]
    sizes = zip(layer_sizes(plan.groups, image_shape), widths, strict=True)
    # Forward, gradient of inputs, gradient of kernels; two for each multiplication.
    flop = 6 * plan.rows_of_a_step * sum(kernel * max(1, area // width) for (kernel, area), width in sizes)
    speed = _CORE * cores() if (backend or jax.default_backend()) == "cpu" else _ACCELERATOR
    most = LARGEST_BYTES // (plan.config.batch_size * (math.prod(image_shape) + feature_bytes))
    return max(2, min(round(SECONDS * speed / flop), most))


def epoch_order(plan: Plan, examples: int, epoch: int) -> tuple[Int[Array, "steps batch"], Key[Array, " steps"]]:
    """The images of each step of an epoch (from 0), and each step's key, drawn from the seed and the epoch's number."""
    return _order(examples, plan.steps_per_epoch, plan.config.batch_size, run_key(plan.config, EPOCH), np.int32(epoch))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _order(examples: int, steps: int, batch: int, key: PRNGKeyArray, epoch: Int[Array, ""]) -> tuple[Array, Array]:
    key = jax.random.fold_in(key, epoch)
    order = jax.random.permutation(jax.random.fold_in(key, 0), examples)
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(1, steps + 1))
    return order[: steps * batch].reshape(steps, batch).astype(jnp.int32), keys


@functools.partial(jax.jit, static_argnums=0)
def _slice(length: int, first: Int[Array, ""], ids: Array, keys: Array) -> tuple[Array, Array]:
    ids, keys = (jax.lax.dynamic_slice_in_dim(a, first, length) for a in (ids, keys))
    return ids, keys


def _take(rows: Array | np.ndarray, ids: Array, shape: tuple[int, ...] | None = None) -> Array:
    """The rows of these numbers, on the device, from wherever they lie; each of the given shape, or as it is."""
    shape = rows.shape[1:] if shape is None else shape
    if isinstance(rows, np.ndarray):
        return jax.device_put(rows[np.asarray(ids)].reshape(*ids.shape, *shape))
    return gathered(shape, rows, ids)


@functools.partial(jax.jit, static_argnums=0)
def gathered(shape: tuple[int, ...], rows: Array, ids: Int[Array, "steps batch"]) -> Array:
    """The rows of these numbers, each brought to a shape: what gathers the batches of a segment on the device."""
    return rows[ids].reshape(*ids.shape, *shape)


def joined(parts: list[Metrics]) -> Metrics:
    """The metrics of consecutive segments as those of all their steps."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def over_steps(metrics: Metrics) -> dict[str, Shaped[np.ndarray, "*_groups"]]:
    """Of each group, the mean of each metric over its `finite` steps, summed in float64; `nonfinite_steps`, how many others there were,
    and `first_nonfinite`, the first of them from 1, or 0.

    A mean over no step is NaN. `ensemble_accuracy` is taken over the steps in which every group was finite.
    """
    finite: Bool[np.ndarray, "steps groups"] = metrics["finite"]

    def mean(values: np.ndarray) -> np.ndarray:
        counted = finite if values.ndim == 2 else finite.all(axis=1)
        with np.errstate(invalid="ignore"):
            return np.asarray(np.where(counted, values, 0).sum(axis=0, dtype=np.float64) / counted.sum(axis=0))

    means = {name: mean(values) for name, values in metrics.items() if name != "finite"}
    first = np.where(finite.all(axis=0), 0, 1 + np.argmin(finite, axis=0))
    return means | {"nonfinite_steps": (~finite).sum(axis=0), "first_nonfinite": first}
