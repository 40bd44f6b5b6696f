"""Runs an epoch as a few calls of one compiled segment. Here the training program is jitted and its states are donated;
`pipeline` does the same for its stages.

The batches of a segment are gathered before it is called: by a small program if the images are on the device, by NumPy if they are on the
host. Both feed the same executable, and the result does not depend on the length of a segment. So the bits are the same wherever the
images are and however the epoch is cut.
"""

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int, Key, PRNGKeyArray, Shaped

from vffjax.backend import cores
from vffjax.data.on_disk import Pixels
from vffjax.hyperparameters import HyperParameters
from vffjax.networks.groups import States, layer_sizes
from vffjax.rules.streams import Task
from vffjax.training.batch import Batch
from vffjax.training.compiled import compiled
from vffjax.training.mesh import divided, everywhere, within
from vffjax.training.plan import EPOCH, Images, Plan, run_key
from vffjax.training.trainer import run_segment

# A segment takes about this long, so that dispatching it costs little, and so that a run which receives SIGTERM can save soon.
SECONDS, LARGEST_BYTES = 3.0, 2**26
# FLOP/s assumed for a core and for an accelerator when the length of a segment is chosen. Only the order of magnitude matters.
_CORE, _ACCELERATOR = 5e10, 2e13

segment = jax.jit(run_segment, static_argnums=(0, 1), donate_argnums=3)


@functools.cache
def segment_on(mesh: Mesh | None) -> Any:
    """`segment` for the devices of a mesh, each of which gets all of the results."""
    if mesh is None:
        return segment
    return jax.jit(run_segment, static_argnums=(0, 1), donate_argnums=3, out_shardings=NamedSharding(mesh, PartitionSpec()))


Metrics = dict[str, Shaped[np.ndarray, "_steps *_groups"]]


class Segment(NamedTuple):
    """A segment that has been dispatched. The device may still be computing its arrays.

    Attributes:
        done: steps of the epoch up to the end of this segment.
        states: the groups' states after these steps.
        metrics: of the segment's own steps.
    """

    done: int
    states: States
    metrics: dict[str, Array]


class Epoch:
    """Trains epochs in segments.

    Each length of a segment is compiled once, when it is first used or by `compile`. The states that are passed in are donated, so the
    caller cannot use them afterwards.

    Args:
        plan: of the run.
        active: the index of the group that trains; None if all groups train together.
        length: steps in a segment, about; None for the whole epoch.
        mesh: the devices, on all of which task, states and the data on devices lie; None for one device.
    """

    def __init__(self, plan: Plan, active: int | None = None, length: int | None = None, mesh: Mesh | None = None):
        self._plan, self._active, self._mesh = plan, active, mesh
        self.pieces = pieces(plan.steps_per_epoch, length or plan.steps_per_epoch)
        self._compiled: dict[int, jax.stages.Compiled] = {}

    def compile(self, task: Task, states: States, data: Images, done: int = 0) -> jax.stages.Compiled:
        """Compiles every program that an epoch needs, without training.

        Args:
            task, states, data: as an epoch takes them.
            done: steps of the first epoch that have been trained already, if the run resumes inside of it.

        Returns:
            The program of the longest segment.
        """
        draws = self._draws(data, 0)
        for piece in {len(piece): piece for piece in (*self.pieces, *self._left(done))}.values():
            batches = _batches(data, piece, draws, self._mesh)  # the programs that gather are compiled where they are called
            self._program(len(piece), task, states, batches)
        return self._compiled[max(self._compiled)]

    def __call__(self, task: Task, states: States, data: Images, epoch: int) -> tuple[States, dict[str, np.ndarray]]:
        """Trains a whole epoch, numbered from 0. Returns the new states, and the metrics as `over_steps` gives them."""
        parts = []
        for part in self.segments(task, states, data, epoch):
            states = part.states
            parts.append(part.metrics)
        return states, over_steps(joined(jax.device_get(parts)))

    def segments(self, task: Task, states: States, data: Images, epoch: int, done: int = 0) -> Iterator[Segment]:
        """Trains an epoch from its step `done` on, and yields each segment after dispatching it.

        When a segment is yielded, the one before it has finished. So the device always has work queued, and never more than two segments.
        """
        draws, before = self._draws(data, epoch), dict[str, Array]()
        for piece in self._left(done):
            batches = _batches(data, piece, draws, self._mesh)
            states, metrics = self._program(len(piece), task, states, batches)(task, states, batches)
            jax.block_until_ready(before)
            before = metrics
            yield Segment(piece.stop, states, metrics)

    def together(self, states: States) -> States:
        """The states of all groups, where they can be given to one program."""
        return states

    def _gathered(self, data: Images, piece: range, draws: "_Draws") -> Batch:
        return _batches(data, piece, draws, self._mesh)

    def _left(self, done: int) -> list[range]:
        """The segments after the first `done` steps. If no segment of the epoch begins there, the rest is cut anew into the same length."""
        left = [piece for piece in self.pieces if piece.start >= done]
        if sum(map(len, left)) == self._plan.steps_per_epoch - done:
            return left
        cut = pieces(self._plan.steps_per_epoch - done, max(map(len, self.pieces)))
        return [range(done + piece.start, done + piece.stop) for piece in cut]

    def _draws(self, data: Images, epoch: int) -> "_Draws":
        """The random draws and the hyperparameters of all steps of an epoch."""
        ids, keys = epoch_order(self._plan, len(data.labels), epoch)
        # Fetched once in an epoch: to fetch the ids of a segment, the host would wait for the segment before it.
        on_host = not all(isinstance(rows, jax.Array) for rows in (data.images, data.labels, data.features) if rows is not None)
        numbers = np.asarray(ids) if on_host else None
        return _Draws(epoch, *everywhere(self._mesh, (ids, keys)), self._plan.hyperparameters(epoch), numbers)

    def _program(self, length: int, task: Task, states: States, batches: Batch) -> jax.stages.Compiled:
        if length not in self._compiled:
            with within(self._mesh):
                self._compiled[length] = compiled(segment_on(self._mesh), self._plan.program, self._active, task, states, batches)
        return self._compiled[length]


class _Draws(NamedTuple):
    """For every step of an epoch: the images' ids, the key and the hyperparameters."""

    epoch: int
    ids: Int[Array, "steps batch"]
    keys: Key[Array, " steps"]
    hyper: HyperParameters
    numbers: Int[np.ndarray, "steps batch"] | None  # the ids, for rows that the host gathers


def _batches(data: Images, piece: range, draws: _Draws, mesh: Mesh | None) -> Batch:
    """Gathers the batches of some steps of an epoch. Their images, labels and features are divided over the mesh."""
    ids, keys = _slice(len(piece), piece.start, draws.ids, draws.keys)
    hyper: Any = (values[piece.start : piece.stop] for values in draws.hyper)
    of_epoch: Any = np.full(len(piece), draws.epoch, np.int32)
    numbers = None if draws.numbers is None else draws.numbers[piece.start : piece.stop]
    take = functools.partial(_take, mesh, ids, numbers)
    images, labels, features = take(data.images), take(data.labels), None if data.features is None else take(data.features)
    return Batch(images, labels, ids, everywhere(mesh, of_epoch), keys, everywhere(mesh, HyperParameters(*hyper)), features)


def pieces(steps: int, length: int) -> list[range]:
    """Cuts the steps of an epoch, from 0, into consecutive segments of about `length`. They have at most two lengths, one step apart."""
    count = min(-(-steps // length), max(1, steps // 2)) if length > 1 else steps
    bounds = [steps * i // count for i in range(count + 1)]
    return [range(first, last) for first, last in itertools.pairwise(bounds)]


def segment_length(plan: Plan, image_shape: tuple[int, int, int], feature_bytes: int = 0, backend: str = "") -> int:
    """How many steps make a segment: as many as take a few seconds by a rough count of FLOPs, but at most `LARGEST_BYTES` of images.

    Args:
        plan: the run's plan; `config.segment_steps` wins if it is set.
        image_shape: height, width and channels of an image.
        feature_bytes: of the kept features of one image, where there are any.
        backend: what it will run on, such as tpu; empty: what JAX runs on here.
    """
    if plan.config.segment_steps:
        return plan.config.segment_steps
    sizes = layer_sizes(plan.groups, image_shape)
    # Forward, gradient of inputs, gradient of kernels; two for each multiplication.
    flop = 6 * plan.rows_of_a_step * sum(size.multiplications for size in sizes)
    speed = _CORE * cores() if (backend or jax.default_backend()) == "cpu" else _ACCELERATOR
    most = LARGEST_BYTES // (plan.config.batch_size * (math.prod(image_shape) + feature_bytes))
    return max(2, min(round(SECONDS * speed / flop), most))


def epoch_order(plan: Plan, examples: int, epoch: int) -> tuple[Int[Array, "steps batch"], Key[Array, " steps"]]:
    """Draws the images' ids and the key of each step of an epoch (numbered from 0), from the seed and the epoch's number."""
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


def _take(mesh: Mesh | None, ids: Array, numbers: np.ndarray | None, rows: Array | Pixels) -> Array:
    """The rows with these ids, put on the device, or divided over the mesh. `numbers` are the ids on the host, where it holds any rows."""
    if not isinstance(rows, jax.Array):
        assert numbers is not None
        place, known = divided(mesh, 1), numbers

        def part(where: Any) -> np.ndarray:
            return rows[known[where[:2]]]

        if place is None or place.is_fully_addressable:
            return jax.device_put(part((slice(None), slice(None))), place)
        return jax.make_array_from_callback((*ids.shape, *rows.shape[1:]), place, part)  # each process gathers the rows of its own devices
    return _gathered_on(mesh)(rows, ids)


def _gather(rows: Array, ids: Int[Array, "steps batch"]) -> Array:
    """Gathers the rows with these ids on the device."""
    return rows[ids]


gathered = jax.jit(_gather)


@functools.cache
def _gathered_on(mesh: Mesh | None) -> Any:
    """`gathered` for the devices of a mesh, over which the batches are divided."""
    return gathered if mesh is None else jax.jit(_gather, out_shardings=divided(mesh, 1))


def joined(parts: list[Metrics]) -> Metrics:
    """Concatenates the metrics of consecutive segments."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def over_steps(metrics: Metrics) -> dict[str, Shaped[np.ndarray, "*_groups"]]:
    """Averages the metrics of an epoch, for each group over the steps in which its loss was finite. Sums are in float64.

    A mean over no step is NaN. `ensemble_accuracy` is averaged over the steps in which every group was finite.

    Returns:
        The means by metric. And `nonfinite_steps`, how many steps of each group were left out, and `first_nonfinite`, the number of the
        first of them, from 1, or 0 if there is none.
    """
    finite: Bool[np.ndarray, "steps groups"] = metrics["finite"]

    def mean(values: np.ndarray) -> np.ndarray:
        counted = finite if values.ndim == 2 else finite.all(axis=1)
        with np.errstate(invalid="ignore"):
            return np.asarray(np.where(counted, values, 0).sum(axis=0, dtype=np.float64) / counted.sum(axis=0))

    means = {name: mean(values) for name, values in metrics.items() if name != "finite"}
    first = np.where(finite.all(axis=0), 0, 1 + np.argmin(finite, axis=0))
    return means | {"nonfinite_steps": (~finite).sum(axis=0), "first_nonfinite": first}
