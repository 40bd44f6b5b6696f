"""Which groups lie on which device in the pipeline of groups (config.schedule = pipeline), and how many devices train.

A stage is one device with consecutive groups. The pipeline is as fast as its largest stage, so the groups are dealt out so that the
largest stage is as small as it can be.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vffjax import hosts
from vffjax.config import Config
from vffjax.errors import bad_key, chosen
from vffjax.networks.groups import LayerSize, layer_sizes
from vffjax.training import mesh
from vffjax.training.plan import Plan, groups_of

Span = tuple[int, int]  # the first group of a stage, and the first one behind it
# A stage with so many times its fair share of the work is worth a word about where to cut.
_DOMINANT = 1.25
_COPIES = 3  # of each parameter, about: itself and what an optimizer keeps for it


class Work(NamedTuple):
    """What a group, or a layer, takes in a training step.

    Attributes:
        flop: floating-point operations, two for each multiplication: the forward pass and the gradients of inputs and kernels. The first
            layer of a group has no gradient of its inputs, because none leaves the group. Heads and losses are not counted.
        parameters: bytes of the kernels, with what the optimizer keeps for them.
        largest_map: bytes of the largest feature map.
    """

    flop: int
    parameters: int
    largest_map: int

    @property
    def bytes(self) -> int:
        return self.parameters + self.largest_map


def is_pipeline(config: Config) -> bool:
    """Whether groups lie on devices and train as a pipeline."""
    return chosen("schedule", config.schedule, {"joint": False, "sequential": False, "pipeline": True})


def mesh_for(config: Config, number: int) -> Mesh | None:
    """The devices over which batches are divided, if so many train; None in a pipeline, and for one device."""
    return None if is_pipeline(config) else mesh.mesh_of(number)


def judges(config: Config, run: Mapping[str, Any]) -> Mesh | None:
    """The devices that measure the errors of a run: as many as trained it, so that its errors are found again to the bit.

    One device does it if there are fewer here, in a pipeline, and in each of several processes.
    """
    number, trained = run.get("devices", 1), run.get("config", {"schedule": config.schedule})
    if trained["schedule"] == "pipeline" or number > len(jax.devices()) or hosts.count() > 1:
        return None
    return mesh_for(config, number)


def layer_work(plan: Plan, image_shape: tuple[int, int, int]) -> list[list[Work]]:
    """What each layer of each group takes in a step, for images of this shape (height, width, channels)."""
    sizes, rows, found = iter(layer_sizes(plan.groups, image_shape)), plan.rows_of_a_step, []
    itemsize = jnp.dtype(plan.groups[0].module.layers[0].dtype).itemsize

    def work(size: LayerSize, passes: int) -> Work:
        return Work(2 * passes * rows * size.multiplications, 4 * _COPIES * size.kernels, rows * size.map * itemsize)

    for group in plan.groups:
        count = len(group.module.layers)
        passes = [1 if group.frozen else 2 if first else 3 for first in (True, *[False] * (count - 1))]
        found.append([work(next(sizes), each) for each in passes])
    return found


def group_work(plan: Plan, image_shape: tuple[int, int, int]) -> list[Work]:
    """What each group takes in a step, for images of this shape (height, width, channels)."""
    return [
        Work(sum(w.flop for w in layers), sum(w.parameters for w in layers), max(w.largest_map for w in layers))
        for layers in layer_work(plan, image_shape)
    ]


def balanced(work: Sequence[Work], stages: int) -> list[Span]:
    """Cuts groups into so many stages of consecutive groups, each with one group at least.

    The largest FLOP of a stage is as small as it can be; among the ways to reach that, the largest bytes of a stage are. Both are found by
    dynamic programming over the groups, which tries all cuts and is exact.

    Args:
        work: of each group, from input to output.
        stages: at least 1, at most as many as there are groups.
    """
    flop = [w.flop for w in work]
    least = max(sum(flop[first:last]) for first, last in _cut(flop, stages, flop, float("inf")))
    return _cut([w.bytes for w in work], stages, flop, least)


def _cut(sizes: Sequence[int], stages: int, limited: Sequence[int], most: float) -> list[Span]:
    """The cut whose largest sum of `sizes` in a stage is least, among those whose sums of `limited` are `most` or less."""
    ends = range(len(sizes) + 1)
    # By number of stages and of groups in them: the least largest sum, and the groups in all stages but the last.
    best: dict[tuple[int, int], tuple[float, int]] = {(0, 0): (0.0, 0)}
    for stage, end in itertools.product(range(1, stages + 1), ends):
        options = [
            (max(best[stage - 1, first][0], sum(sizes[first:end])), first)
            for first in range(end)
            if (stage - 1, first) in best and sum(limited[first:end]) <= most
        ]
        if options:
            best[stage, end] = min(options)
    spans, end = list[Span](), len(sizes)
    for stage in range(stages, 0, -1):
        spans.append((best[stage, end][1], end))
        end = best[stage, end][1]
    return spans[::-1]


def spans_of(plan: Plan, image_shape: tuple[int, int, int], stages: int) -> list[Span]:
    """The groups of each stage, as `balanced` deals them out."""
    return balanced(group_work(plan, image_shape), stages)


def count(config: Config, before: int = 0, schedule_before: str = "") -> int:
    """How many devices train.

    In the pipeline a device has one group at least, and with config.devices = 0 every group has a device as long as they last. All other
    schedules divide batches over the devices: see `mesh.count`. A run that has been a pipeline until here has the bits of one device, so it
    goes on with one.

    Args:
        config: of the run.
        before: how many devices trained a run that goes on; 0 for a new one.
        schedule_before: config.schedule until here.

    Raises:
        UserError: there are not as many devices as config.devices, or not as many groups; or several processes train.
    """
    if not is_pipeline(config):
        return mesh.count(config, 1 if schedule_before == "pipeline" else before)
    if hosts.count() > 1:
        problem = f"the groups of a pipeline lie on devices of one process, and {hosts.count()} train"
        raise bad_key("schedule", config.schedule, problem, "use schedule=joint, or one process")
    mesh.check_there(config)
    groups = len(groups_of(config, 2))
    if config.devices > groups:
        fix = f"use at most {groups}, or 0, or a config.grouping that makes more groups"
        raise bad_key("devices", config.devices, f"a pipeline has at most one device for each group, and there are {groups}", fix)
    return config.devices or min(len(jax.devices()), groups)


def told(
    plan: Plan, image_shape: tuple[int, int, int], number: int, before: int = 0, schedule_before: str = "", processes_before: int = 0
) -> str:
    """How many devices train, and in the pipeline which groups lie on which; in words. Empty if there is one device, and always was.

    Args:
        plan: of the run.
        image_shape: height, width and channels of an image.
        number: how many devices train.
        before: how many trained a run that goes on; 0 for a new one.
        schedule_before: config.schedule until here.
        processes_before: how many processes trained a run that goes on; 0 for a new one.
    """
    config = plan.config
    piped = {"pipeline": 1}.get(schedule_before, before)  # which has the bits of one device
    if not is_pipeline(config):
        if schedule_before == "pipeline" and before > 1 and number == 1:
            return f"1 of {len(jax.devices())} devices, and a pipeline over {before} until here, which has the same bits"
        return mesh.told(config, number, piped, processes_before)
    there = len(jax.devices())
    words = f"{number} of {there} device{'s' * (there > 1)}: {balance(plan, image_shape, number)}" if there > 1 or number > 1 else ""
    if piped > 1:
        words += "; " * bool(words) + f"batches were divided over {before} devices until here: "
        words += "the bits are no longer those of one way to train"
    return words


def _largest(work: Sequence[Work], stages: int) -> int:
    """The FLOP of the largest stage, with so many stages."""
    return max(sum(w.flop for w in work[first:last]) for first, last in balanced(work, stages))


def balance(plan: Plan, image_shape: tuple[int, int, int], stages: int) -> str:
    """Which groups lie on which device and how much the largest stage does; and if that is too much, where to cut."""
    work = group_work(plan, image_shape)
    spans = balanced(work, stages)
    done = [sum(w.flop for w in work[first:last]) for first, last in spans]
    if stages == 1:
        return f"{len(work)} group{'s' * (len(work) > 1)} on one device"
    share = max(done) / sum(done)
    groups = " | ".join(" ".join(map(str, range(first, last))) for first, last in spans)
    words = f"groups {groups}; the largest does {share:.0%} of the work"
    if share * stages < _DOMINANT:
        return words
    first, last = spans[done.index(max(done))]
    if last - first > 1:
        more = next((n for n in range(stages + 1, len(work) + 1) if _largest(work, n) < max(done)), 0)
        return f"{words}; on {more} devices it would be {_largest(work, more) / sum(done):.0%}" if more else words
    layers = [w.flop for w in layer_work(plan, image_shape)[first]]
    if len(layers) == 1:
        return f"{words}; group {first} is one layer and cannot be cut"
    cut = min(range(1, len(layers)), key=lambda at: max(sum(layers[:at]), sum(layers[at:])))
    return f"{words}; another config.grouping could cut group {first}, best before its layer {cut} (from 0)"
