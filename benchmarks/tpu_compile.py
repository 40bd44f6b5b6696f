"""Compiles the training of a configuration for a TPU that need not be present, and reports what the compiler says about it.

    pip install -e ".[tpu-compiler]"
    JAX_PLATFORMS=cpu python benchmarks/tpu_compile.py --config configs/cifar10.py:yardstick [--config.KEY=VALUE ...] [--out FILE.json]

libtpu is Google's own TPU compiler. Given a topology, it makes a real executable without the device, the same on every machine. No data set
is read, because only its sizes matter. Memory is that of a segment, of which an epoch calls several. FLOPs, bytes and estimates of time are
those of one training step that is compiled by itself, because the compiler cannot estimate a loop.

There are two estimates of time, which differ, and neither is a measurement. `optimal_seconds` of the cost analysis uses the chip's peak
rates. The other is the sum of the cycles that the scheduler expects for each operation, as if no two operations ran at the same time.
"""

import functools
import json
import math
import re
import time
from typing import Any

import jax
import jax.numpy as jnp

from arguments import one_line, parser_of, read_config
from keys import JOINT, refuse
from vffjax.config import Config
from vffjax.costs import targets
from vffjax.costs.memory import step_arguments
from vffjax.data import sizes_of
from vffjax.data.load import split_sizes
from vffjax.files import write_json
from vffjax.training.batch import abstract_batch
from vffjax.training.checks import check_against_data
from vffjax.training.epochs import gathered, pieces, segment, segment_length
from vffjax.training.plan import make_plan
from vffjax.training.trainer import train_step


class Target:
    """The abstract arguments of a configuration's epoch and step, placed on one chip of a TPU.

    Raises:
        UserError: the configuration does not fit its data set, its groups do not train together, or libtpu is not installed.
    """

    def __init__(self, config: Config):
        refuse(config, {"schedule": JOINT})
        sizes = sizes_of(config)
        n = split_sizes(config, sizes.train_images)[0]
        self.plan = make_plan(config, n, sizes.classes)
        check_against_data(self.plan, n, sizes.image_shape)
        self.tpu = targets.find("tpu")
        self.task, self.states, self.batch = step_arguments(self.plan, self.tpu)
        self.length = len(pieces(self.plan.steps_per_epoch, segment_length(self.plan, sizes.image_shape, backend="tpu"))[0])
        self.batches = self.tpu.place(abstract_batch(config.batch_size, sizes.image_shape, len(self.plan.groups), steps=(self.length,)))

    def compile_segment(self) -> dict[str, Any]:
        """The compile time in seconds and the memory in bytes of a segment, which is what an epoch calls."""
        start = time.perf_counter()
        compiled = segment.lower(self.plan.program, self.plan.active(0), self.task, self.states, self.batches).compile()
        memory: Any = compiled.memory_analysis()
        return {
            "device": self.tpu.device.device_kind,
            "steps_per_epoch": self.plan.steps_per_epoch,
            "steps_per_segment": self.length,
            "compile_seconds": time.perf_counter() - start,
            "argument_bytes": memory.argument_size_in_bytes,
            "output_bytes": memory.output_size_in_bytes,
            "alias_bytes": memory.alias_size_in_bytes,
            "temp_bytes": memory.temp_size_in_bytes,
        }

    def compile_gather(self) -> dict[str, Any]:
        """The temporaries in bytes of the program that gathers the images of a segment, and how often it copies the whole data set."""
        sizes = sizes_of(self.plan.config)
        n, row = split_sizes(self.plan.config, sizes.train_images)[0], math.prod(sizes.image_shape)
        images, ids = self.tpu.array(n, row, dtype=jnp.uint8), self.tpu.array(self.length, self.plan.config.batch_size)
        gather = gathered.lower(sizes.image_shape, images, ids).compile()
        memory: Any = gather.memory_analysis()
        copies = re.findall(rf"= u8\[{n},[^ ]* (?:copy|copy-start|reshape|transpose)\(", gather.as_text() or "")
        return {"gather_temp_bytes": memory.temp_size_in_bytes, "copies_of_the_data_set": len(copies)}

    def compile_step(self) -> dict[str, Any]:
        """The temporaries of one training step in bytes, and the compiler's estimates of its cost."""
        function = functools.partial(train_step, self.plan.program, self.plan.active(0))
        step = jax.jit(function, donate_argnums=1).lower(self.task, self.states, self.batch).compile()
        cost: Any = step.cost_analysis()
        memory: Any = step.memory_analysis()
        seconds = cost.get("optimal_seconds", math.nan)
        cycles = [int(found) for found in re.findall(r'"estimated_cycles":"(\d+)"', step.as_text() or "")]
        return {
            "step_temp_bytes": memory.temp_size_in_bytes,
            "flops_per_step": cost["flops"],
            "bytes_accessed_per_step": cost["bytes accessed"],
            # The compiler adds -1 for each operation that it cannot estimate. A step takes far less than a second, so the fraction is the
            # estimate, and the whole part counts these operations.
            "optimal_seconds_per_step": seconds - math.floor(seconds),
            "operations_without_estimate": -math.floor(seconds),
            "estimated_cycles_per_step": sum(cycles),
        }


@one_line(__file__)
def main() -> None:
    own, rest = parser_of(__file__, __doc__, "--out").parse_known_args()
    config, name = read_config(rest)
    target = Target(config)
    found = {"config": name} | {key: getattr(config, key) for key in ("rule", "grouping", "precision", "batch_size")}
    found |= target.compile_segment() | target.compile_gather() | target.compile_step() | {"jax": jax.__version__}
    print(json.dumps(found, indent=2))
    if own.out:
        write_json(own.out, found)


if __name__ == "__main__":
    main()
