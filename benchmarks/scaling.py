"""Measures a training step over several devices: batches divided over them, and the pipeline of groups. And says what to expect elsewhere.

    python benchmarks/scaling.py --config configs/digits.py --config.grouping=layer [--devices 1,2,4,8] [--steps 64] [--out FILE.json]
    python benchmarks/scaling.py --config configs/cifar10.py --config.grouping=layer --target tpu

Three ways to train are compared on random images of the data set's size: the rule as a pipeline, the rule with divided batches (data
parallel), and back-propagation with divided batches. On a CPU the devices are fake: they share its cores, so times show only that the
programs run, and in which order. The bytes that go from device to device in a step are those of real devices: for the pipeline they are
the arrays that cross, for divided batches those that a ring of devices sends for the collectives of the compiled program: of n devices
each sends 2 (n - 1) / n times the result of a sum over all, (n - 1) / n times that of a gathering or an exchange, and once that of a
permutation.

`expected` is a small model, and no measurement. A stage or device takes FLOP / (--flops x --utilisation) seconds for a step, and a link
bytes / --bandwidth. In the pipeline links and stages work at the same time, so the slowest of all sets the pace; with divided batches a
device first computes and then sends. FLOPs are those of layers, two for each multiplication. The defaults are the public figures of a TPU
v5e: 197 TFLOP/s in bf16, and 50 GB/s for one of its four links.

With --target tpu nothing is run: each stage is compiled for its own device of a TPU v5e of 2x2 chips, which need not be there.
"""

import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from arguments import one_line, parser_of, read_config
from keys import JOINT, RANDOM_WEIGHTS, Only, refuse
from vffjax import rules
from vffjax.cli.options import whole_numbers
from vffjax.config import Config
from vffjax.costs import targets
from vffjax.costs.program_text import Program
from vffjax.data import sizes_of
from vffjax.errors import UserError
from vffjax.files import write_json
from vffjax.training import checks
from vffjax.training.batch import abstract_batch
from vffjax.training.compiled import program_bytes
from vffjax.training.epochs import Epoch, segment_length
from vffjax.training.mesh import everywhere, mesh_of, within
from vffjax.training.pipeline import PipelinedEpoch, Programs
from vffjax.training.plan import Images, Plan, abstract_start, blank_task, init_states
from vffjax.training.stages import balance, balanced, group_work, spans_of

TRIALS = 3
FORMS: dict[str, dict[str, Any]] = {
    "pipeline": {"schedule": "pipeline"},
    "data parallel": {"schedule": "joint"},
    "back-propagation, data parallel": rules.BACK_PROPAGATION | {"schedule": "joint"},
}
# How many times the bytes of its result each of n devices sends for a collective, if they form a ring.
RING: dict[str, Callable[[int], float]] = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,
    "collective-permute": lambda n: 1,
}


def sent_bytes(collectives: Mapping[str, Mapping[str, int]], devices: int) -> float:
    """The bytes that each device sends for collectives as `Program.collectives` gives them.

    >>> sent_bytes({"all-reduce f32": {"count": 2, "bytes": 64}, "all-gather bf16": {"count": 1, "bytes": 40}}, devices=4)
    126.0
    """
    return sum((RING[kind.split()[0]](devices) * entry["bytes"] for kind, entry in collectives.items()), 0.0)


def expected_seconds(flop: Sequence[float], link_bytes: float, flops: float, bandwidth: float, overlaps: bool) -> float:
    """The seconds of a step by the model above.

    Args:
        flop: of each stage, or of each device.
        link_bytes: what the busiest device sends.
        flops: FLOP/s of a device, its utilisation included.
        bandwidth: bytes per second of a link.
        overlaps: whether links work while devices compute.
    """
    computing, sending = max(flop) / flops, link_bytes / bandwidth
    return max(computing, sending) if overlaps else computing + sending


class Bench:
    """Random images of a configuration's data set, and the measurements on them."""

    def __init__(self, config: Config, steps: int, flops: float, bandwidth: float):
        self._config, self._steps, self._flops, self._bandwidth = config, steps, flops, bandwidth
        _, self._shape, self._classes = sizes_of(config)
        n, rng = steps * config.batch_size, np.random.default_rng(config.seed)
        images = rng.integers(0, 256, (n, *self._shape), np.uint8)
        self._data = Images(jnp.asarray(images), jnp.asarray(rng.integers(0, self._classes, n), jnp.int32)).as_rows()

    def measure(self, form: str, number: int) -> dict[str, Any]:
        """A row: seconds of a step, bytes between devices, and what the model expects; or the `problem`, why it cannot be measured."""
        row: dict[str, Any] = {"form": form, "devices": number}
        config = checks.make_config(self._config.to_dict() | FORMS[form] | {"devices": 0})
        plan = checks.plan_of(config, len(self._data.labels), self._shape, self._classes)
        if form == "pipeline" and number > len(plan.groups):
            return row | {"problem": f"there are {len(plan.groups)} groups"}
        if config.batch_size % number and form != "pipeline":
            return row | {"problem": f"config.batch_size={config.batch_size} cannot be divided"}
        return row | (self._pipeline(plan, number) if form == "pipeline" else self._divided(plan, number))

    def _pipeline(self, plan: Plan, number: int) -> dict[str, Any]:
        epoch = PipelinedEpoch(plan, segment_length(plan, self._shape), number, self._shape)
        task, states = blank_task(plan, self._shape), jax.jit(functools.partial(init_states, plan, self._shape))()
        epoch.compile(task, states, self._data)
        length = max(map(len, epoch.pieces))
        programs = epoch.programs(length)
        work = group_work(plan, self._shape)
        flop = [sum(w.flop for w in work[first:last]) for first, last in balanced(work, number)]
        link = max(programs.crossing, default=0) / length
        return {
            "seconds": self._seconds(epoch, task, states),
            "bytes_between_devices": programs.moved / length,
            "most_bytes_out_of_a_device": link,
            "expected_seconds": expected_seconds(flop, link, self._flops, self._bandwidth, True),
            "chunks": len(epoch.pieces),
            "balance": balance(plan, self._shape, number),
        }

    def _divided(self, plan: Plan, number: int) -> dict[str, Any]:
        mesh = mesh_of(number)
        epoch = Epoch(plan, None, segment_length(plan, self._shape), mesh)
        made = blank_task(plan, self._shape), jax.jit(functools.partial(init_states, plan, self._shape))()
        with within(mesh):
            task, states = everywhere(mesh, made)
            images, labels = everywhere(mesh, (self._data.images, self._data.labels))
            data = self._data._replace(images=images, labels=labels)
            program = Program(epoch.compile(task, states, data).as_text() or "")
            step = program.round() if program.loops() else program
            seconds = self._seconds(epoch, task, states, data)
        link = sent_bytes(step.collectives(), number)
        flop = sum(w.flop for w in group_work(plan, self._shape)) / number
        return {
            "seconds": seconds,
            "bytes_between_devices": number * link,
            "most_bytes_out_of_a_device": link,
            "expected_seconds": expected_seconds([flop], link, self._flops, self._bandwidth, False),
        }

    def _seconds(self, epoch: Epoch, task: Any, states: Any, data: Images | None = None) -> float:
        found = []
        for number in range(TRIALS + 1):
            start = time.perf_counter()
            states, _ = epoch(task, states, self._data if data is None else data, number)
            jax.block_until_ready(states)
            found.append((time.perf_counter() - start) / self._steps)
        return statistics.median(found[1:])


def stage_programs(config: Config, devices: Sequence[Any], steps: int) -> Programs:
    """The compiled programs of a pipeline's stages on these devices, which need not be present, for chunks of so many steps."""
    plan, sizes = checks.plan_before_data(config)
    devices = devices[: len(plan.groups)]
    task, states = abstract_start(plan, sizes.image_shape)
    batch = abstract_batch(config.batch_size, sizes.image_shape, len(plan.groups), steps=(steps,))
    return Programs(plan, spans_of(plan, sizes.image_shape, len(devices)), devices, task, states, batch)


def compiled_for_tpu(config: Config, steps: int) -> list[dict[str, Any]]:
    """The memory of each stage's program on its own chip of a TPU v5e 2x2."""
    mesh = targets.find("v5e:2x2").mesh
    assert mesh is not None
    devices = list(mesh.devices.flat)
    rows = []
    for number, program in enumerate(stage_programs(config, devices, steps).stages):
        rows.append({"stage": number, "device": str(devices[number]), "steps": steps} | program_bytes(program))
    return rows


@one_line(__file__)
def main() -> None:
    parser = parser_of(__file__, __doc__, "--out")
    parser.add_argument("--devices", default="1,2,4,8", metavar="N,N", help="numbers of devices; default: 1,2,4,8")
    parser.add_argument("--steps", default="64", help="steps in an epoch; with --target tpu in a call of a stage; default: 64")
    parser.add_argument("--target", default="here", choices=("here", "tpu"), help="here: measure; tpu: only compile, for v5e 2x2")
    for flag, usual, about in (
        ("--flops", 1.97e14, "FLOP/s of a device"),
        ("--utilisation", 0.4, "the share of them that is reached"),
        ("--bandwidth", 5e10, "bytes per second out of a device"),
    ):
        parser.add_argument(flag, type=float, default=usual, help=f"of the model: {about}; default: {usual:g}")
    own, rest = parser.parse_known_args()
    config, name = read_config(rest)
    numbers, (steps,) = whole_numbers("--devices", own.devices), whole_numbers("--steps", own.steps)
    every_form = Only(("joint", "pipeline"), JOINT.problem, "use schedule=joint")
    own_number = Only((0,), "every form is measured with the numbers of --devices", "leave it at 0 and give the numbers to --devices")
    refuse(config, {"schedule": every_form, "init_from": RANDOM_WEIGHTS, "devices": own_number})
    for flag in ("flops", "utilisation", "bandwidth"):
        if not getattr(own, flag) > 0:
            raise UserError(f"--{flag}={getattr(own, flag)}: must be above 0; leave it out for the default")
    config = checks.make_config(config.to_dict() | {"schedule": "pipeline"})
    if own.target == "tpu":
        rows = compiled_for_tpu(config, steps)
    else:
        # Read when the first device is asked for. It changes nothing where there are other devices than a CPU.
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={max(numbers)}".strip()
        if len(jax.devices()) < max(numbers):
            raise UserError(f"--devices={own.devices}: JAX sees {len(jax.devices())}; use at most so many")
        bench = Bench(config, steps, own.flops * own.utilisation, own.bandwidth)
        rows = [bench.measure(form, number) for form in FORMS for number in numbers]
    model = {key: getattr(own, key) for key in ("flops", "utilisation", "bandwidth")}
    found = {"config": name, "target": own.target, "steps": steps, "model": model, "jax": jax.__version__, "rows": rows}
    found["device"] = "TPU v5e 2x2, not present" if own.target == "tpu" else jax.devices()[0].device_kind
    print(json.dumps(found, indent=2))
    if own.out:
        write_json(own.out, found | {"command": sys.argv[1:]})


if __name__ == "__main__":
    main()
