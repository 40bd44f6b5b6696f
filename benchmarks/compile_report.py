"""Compiles the training of a configuration for GPUs and TPUs that need not be present, and reports what their compilers made of it.

    pip install -e ".[tpu-compiler,cuda-compiler]"                     # GPUs need Python >= 3.12
    JAX_PLATFORMS=cpu python benchmarks/compile_report.py --config configs/cifar10.py:yardstick --config.precision=bf16
        [--targets h100,v5e,v5e:2x2] [--methods rule,head,bp] [--images 1281167,224,1000] [--config.KEY=VALUE ...] [--out FILE.json]

libtpu is Google's own TPU compiler, and JAX's plugin for CUDA holds XLA's compiler for GPUs. Given a description of the device, each makes
a real executable without it, the same on every machine. No data set is read, because only its sizes matter; `--images` gives others, such
as those of ImageNet: training images, pixels of a side, classes.

Methods: the configuration's own rule; `head`, which has the same groups and the loss of their heads alone; and `bp`, back-propagation
through the same network. Targets are those of `vffjax memory`, and several devices are named by their arrangement: `v5e:2x2` for 4 chips,
`h100:4` for the 4 cards of one machine, `h100:2x4` for 2 machines of 4 cards. Several devices train as the trainer lets them: each batch is
divided over them, and every device holds the states.

What is read, for one step if nothing else is said:

launches: operations in the order that the compiler has scheduled, in one round of a segment's loop, or in a program of one step alone. They
are kernels (a fusion is one), library calls (a convolution of cuDNN is one, though cuDNN may start several kernels for it), copies, and
collectives. What names memory, waits or chooses what runs next is not counted. On a TPU these are operations of one program, and cost no
launch by the host.

convolutions: with the type of their operands, their layout by letters (b01f is NHWC, bf01 is NCHW) and by the order in memory.

collectives: what devices tell each other, by kind and type, with the bytes of the results on one device.

temporaries: by the compiler's plan. On a GPU the workspace of cuDNN is chosen on the device itself, and is not counted.

Of a TPU's step there are two estimates of time, which differ, and neither is a measurement. `optimal_seconds` of the cost analysis uses the
chip's peak rates. The other is the sum of the cycles that the scheduler expects for each operation, as if no two operations ran at the same
time. The compiler for GPUs estimates no time.
"""

import argparse
import functools
import math
import re
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp

from arguments import one_line, parser_of, read_config, some_of
from keys import JOINT, refuse
from vffjax import rules, versions
from vffjax.config import Config
from vffjax.costs import targets
from vffjax.costs.memory import step_arguments
from vffjax.costs.program_text import Program
from vffjax.data import sizes_of
from vffjax.data.load import split_sizes
from vffjax.data.sets import Sizes
from vffjax.files import write_json
from vffjax.training.batch import abstract_batch
from vffjax.training.checks import check_against_data, make_config
from vffjax.training.compiled import program_bytes
from vffjax.training.epochs import gathered, pieces, segment_length, segment_on
from vffjax.training.mesh import within
from vffjax.training.pipeline import bytes_of
from vffjax.training.plan import make_plan
from vffjax.training.trainer import train_step

# The keys that each method changes. `head` without groups of its own would be `bp`.
METHODS: dict[str, dict[str, Any]] = {
    "rule": {},
    "head": {"rule": "head", "rule_options": {}},
    "bp": rules.BACK_PROPAGATION | {"rule_options": {}},
}


class Job:
    """The training of a configuration on a target: abstract arguments, and programs that are compiled for them.

    Args:
        config: a checked configuration.
        target: the name of the device or devices; see `targets.find`.
        sizes: of the images, if they are not those of the configuration's data set.

    Raises:
        UserError: the configuration does not fit its data set, its groups do not train together, the target is not known, or its compiler
            is not installed.
    """

    def __init__(self, config: Config, target: str, sizes: Sizes | None = None):
        refuse(config, {"schedule": JOINT})
        self.sizes = sizes or sizes_of(config)
        self.images = split_sizes(config, self.sizes.train_images)[0]
        self.plan = make_plan(config, self.images, self.sizes.classes)
        check_against_data(self.plan, self.images, self.sizes.image_shape)
        self.target = targets.find(target)
        self.task, self.states, self.batch = step_arguments(self.plan, self.target, self.sizes)
        platform = self.target.device.platform
        self.length = len(pieces(self.plan.steps_per_epoch, segment_length(self.plan, self.sizes.image_shape, backend=platform))[0])
        batches = abstract_batch(config.batch_size, self.sizes.image_shape, len(self.plan.groups), steps=(self.length,))
        # As `epochs` places them: images and labels are divided over the devices, all else is on each.
        divided = {"images": self.target.divide(batches.images, 1), "labels": self.target.divide(batches.labels, 1)}
        self.batches = self.target.place(batches)._replace(**divided)

    def segment(self) -> jax.stages.Compiled:
        """Compiles a segment, which is what an epoch calls."""
        with within(self.target.mesh):
            jitted = segment_on(self.target.mesh)
            return jitted.lower(self.plan.program, self.plan.active(0), self.task, self.states, self.batches).compile()

    def step(self) -> jax.stages.Compiled:
        """Compiles one training step by itself, on one device."""
        function = functools.partial(train_step, self.plan.program, self.plan.active(0))
        return jax.jit(function, donate_argnums=1).lower(self.task, self.states, self.batch).compile()

    def of_segment(self) -> dict[str, Any]:
        """The time that a segment takes to compile in seconds, its bytes on each device, and the `Program.figures` of a step within it."""
        began = time.perf_counter()
        compiled = self.segment()
        seconds = time.perf_counter() - began
        program = Program(compiled.as_text() or "")
        found = {
            "device": self.target.device.device_kind,
            "devices": self.target.number,
            "steps_per_epoch": self.plan.steps_per_epoch,
            "steps_per_segment": self.length,
            "compile_seconds": seconds,
            "rounds_of_the_loop": max((rounds or 0 for _, rounds in program.loops()), default=0),
            "state_bytes": bytes_of(self.states),
        }
        return found | program_bytes(compiled) | program.round().figures() | {"host_calls": program.host_calls()}

    def of_gather(self) -> dict[str, Any]:
        """The temporaries in bytes of the program that gathers the images of a segment, and how often it copies the whole data set."""
        row = math.prod(self.sizes.image_shape)
        images, ids = self.target.array(self.images, row, dtype=jnp.uint8), self.target.array(self.length, self.plan.config.batch_size)
        gather = gathered.lower(images, ids).compile()
        copies = re.findall(rf"= u8\[{self.images},[^ ]* (?:copy|copy-start|reshape|transpose)\(", gather.as_text() or "")
        return {"gather_temp_bytes": program_bytes(gather)["temp_bytes"], "copies_of_the_data_set": len(copies)}

    def of_step(self) -> dict[str, Any]:
        """The bytes and the figures of a step by itself, and the compiler's estimates of its cost, where it gives any."""
        compiled = self.step()
        program = Program(compiled.as_text() or "")
        found = program_bytes(compiled) | program.figures() | {"estimated_cycles": program.cycles()}
        cost: Any = compiled.cost_analysis()
        if cost:
            seconds = cost.get("optimal_seconds", math.nan)
            found |= {
                "flops": cost["flops"],
                "bytes_accessed": cost["bytes accessed"],
                # The compiler adds -1 for each operation that it cannot estimate. A step takes far less than a second, so the fraction is
                # the estimate, and the whole part counts these operations.
                "optimal_seconds": None if math.isnan(seconds) else seconds - math.floor(seconds),
                "operations_without_estimate": None if math.isnan(seconds) else -math.floor(seconds),
            }
        return found


def measured(config: Config, target: str, sizes: Sizes | None = None) -> dict[str, Any]:
    """What the compiler of a target makes of a configuration: `segment`, and for one device also `gather` and `step`."""
    job = Job(config, target, sizes)
    found = {"segment": job.of_segment()}
    return found if job.target.mesh else found | {"gather": job.of_gather(), "step": job.of_step()}


def configs_of(config: Config, methods: list[str]) -> dict[str, Config]:
    """The configuration of each method, by the name of its rule, or `bp`. Equal configurations come once."""
    found: dict[str, Config] = {}
    for method in methods:
        changed = make_config(config.to_dict() | METHODS[method])
        if changed not in found.values():
            found[config.rule if method == "rule" else method] = changed
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table: one step of a segment, bytes of a segment, and the cycles of a step by itself."""
    title = (
        "target",
        "devices",
        "method",
        "launches",
        "kernels, calls, copies",
        "collectives",
        "temporaries MB",
        "arguments MB",
        "Mcycles",
    )
    lines = [f"| {' | '.join(title)} |", "|---" * len(title) + "|"]
    for row in rows:
        segment, cycles = row["segment"], row.get("step", {}).get("estimated_cycles")
        launches = segment["launches"]
        told = ", ".join(f"{entry['count']} {kind} {entry['bytes'] / 1e6:,.2f} MB" for kind, entry in segment["collectives"].items())
        kinds = ", ".join(str(launches[kind]) for kind in ("kernels", "library_calls", "copies"))
        cells = [row["target"], segment["devices"], row["method"], launches["all"], kinds, told or "-"]
        cells += [f"{segment[f'{kind}_bytes'] / 1e6:,.1f}" for kind in ("temp", "argument")] + [f"{cycles / 1e6:.2f}" if cycles else "-"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def images_of(text: str) -> Sizes:
    """The sizes of a set of square pictures in colour: training images, pixels of a side and classes."""
    found = re.fullmatch(r"(\d{1,9}),(\d{1,4}),(\d{1,6})", text)
    if not found or "0" in found.groups():
        raise argparse.ArgumentTypeError("give training images, pixels of a side and classes, such as 1281167,224,1000")
    images, side, classes = map(int, found.groups())
    return Sizes(images, (side, side, 3), classes)


@one_line(__file__)
def main() -> None:
    parser = parser_of(__file__, __doc__, "--out")
    parser.add_argument("--targets", default="h100,v5e", metavar="NAME,NAME", help="devices to compile for; default: h100,v5e")
    parser.add_argument(
        "--methods", type=some_of("--methods", METHODS), default=list(METHODS), metavar="NAME,NAME", help=", ".join(METHODS)
    )
    parser.add_argument(
        "--images", type=images_of, metavar="N,SIDE,CLASSES", help="sizes of a set of pictures; default: those of the data set"
    )
    own, rest = parser.parse_known_args()
    config, name = read_config(rest)
    refuse(config, {"schedule": JOINT})
    names = list(dict.fromkeys(own.targets.split(",")))
    for target in names:
        targets.find(target)  # a name that is wrong is refused before the first target is compiled for
    packages = ("jax", "jaxlib", "jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12", "libtpu")
    rows: list[dict[str, Any]] = []
    found = {
        "config": name,
        "command": sys.argv[1:],
        "versions": {package: versions.installed(package) for package in packages},
        "batch_size": config.batch_size,
        "precision": config.precision,
        "rows": rows,
    }
    for target in names:
        for method, changed in configs_of(config, own.methods).items():
            print(f"== {target}: {method}", file=sys.stderr, flush=True)
            rows.append({"target": target, "method": method, "grouping": changed.grouping} | measured(changed, target, own.images))
            if own.out:
                write_json(own.out, found)
    print(table(rows))


if __name__ == "__main__":
    main()
