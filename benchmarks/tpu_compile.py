"""Compiles a configuration's training epoch for a TPU that is not there, and reads what the compiler says of it.

    pip install -e ".[tpu-compiler]"
    JAX_PLATFORMS=cpu python benchmarks/tpu_compile.py --config configs/cifar10.py [--config.KEY=VALUE ...] [--out FILE.json]

libtpu is Google's own TPU compiler; given a topology it makes a real executable without the device, the same on every machine. No
data set is read: only its sizes matter. Memory is that of the whole scanned epoch; flops, bytes and `optimal_seconds`, the compiler's
own estimate and not a measurement, are those of one training step, compiled by itself: the compiler cannot cost a loop.
"""

import functools
import json
import os
import pathlib
import sys
import time
from typing import Any

# Without these the TPU library looks for a cloud machine's metadata server, for minutes.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vffjax.cli import parse_train
from vffjax.config import Config
from vffjax.trainer import Images, init_states, make_plan, make_task, run_epoch, train_step

SIZES = {"mnist": (60_000, (28, 28, 1), 10), "fashion_mnist": (60_000, (28, 28, 1), 10), "cifar10": (50_000, (32, 32, 3), 10)}
SIZES["cifar100"] = (50_000, (32, 32, 3), 100)


class Target:
    """Abstract arguments of a configuration's epoch and step, placed on one chip of a TPU topology."""

    def __init__(self, config: Config, topology: str = "v5e:2x2"):
        total, self.shape, self.classes = SIZES[config.dataset]
        total = config.train_examples or total
        n = total - round(config.val_fraction * total)
        self.config, self.plan = config, make_plan(config, n, self.classes)
        self.device: Any = topologies.get_topology_desc(topology, "tpu").devices[0]
        self._sharding = NamedSharding(Mesh(np.array([self.device]), ("chip",)), PartitionSpec())
        channels = (0.5,) * self.shape[2]
        self.states = self._place(jax.eval_shape(lambda: init_states(self.plan, self.shape)))
        self.task = self._place(jax.eval_shape(lambda: make_task(config, self.classes, self.shape, channels, channels)))
        self.data = Images(self.array(n, *self.shape, dtype=jnp.uint8), self.array(n))  # type: ignore[arg-type]

    def array(self, *shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self._sharding)

    def _place(self, tree: Any) -> Any:
        return jax.tree.map(lambda x: self.array(*x.shape, dtype=x.dtype), tree)

    def compile_epoch(self) -> dict[str, Any]:
        """Compile seconds, and memory in bytes of the whole scanned epoch."""
        start = time.perf_counter()
        function = functools.partial(run_epoch, self.plan, self.plan.active(0))
        epoch = jax.jit(function, donate_argnums=1).lower(self.task, self.states, self.data, self.array()).compile()
        memory: Any = epoch.memory_analysis()
        return {
            "device": self.device.device_kind,
            "steps_per_epoch": self.plan.steps_per_epoch,
            "compile_seconds": time.perf_counter() - start,
            "argument_bytes": memory.argument_size_in_bytes,
            "output_bytes": memory.output_size_in_bytes,
            "alias_bytes": memory.alias_size_in_bytes,
            "temp_bytes": memory.temp_size_in_bytes,
        }

    def compile_step(self) -> dict[str, Any]:
        """The compiler's cost of one training step."""
        batch = (self.array(self.config.batch_size, *self.shape, dtype=jnp.uint8), self.array(self.config.batch_size))
        key = self.array(dtype=jax.random.key(0).dtype)
        function = functools.partial(train_step, self.plan, self.plan.active(0))
        step = jax.jit(function, donate_argnums=1).lower(self.task, self.states, *batch, key).compile()
        cost: Any = step.cost_analysis()
        memory: Any = step.memory_analysis()
        seconds = cost.get("optimal_seconds")
        return {
            "step_temp_bytes": memory.temp_size_in_bytes,
            "flops_per_step": cost["flops"],
            "bytes_accessed_per_step": cost["bytes accessed"],
            # The compiler adds -1 for each operation that it cannot estimate; such a sum says nothing.
            "optimal_seconds_per_step": seconds if seconds and seconds > 0 else None,
        }


def main() -> None:
    arguments = sys.argv[1:]
    out = None
    if "--out" in arguments:
        at = arguments.index("--out")
        out = pathlib.Path(arguments[at + 1])
        del arguments[at : at + 2]
    config, name, _ = parse_train(arguments)
    target = Target(config)
    found = target.compile_epoch() | target.compile_step() | {"jax": jax.__version__}
    found = {
        "config": name,
        "rule": config.rule,
        "grouping": config.grouping,
        "precision": config.precision,
        "batch_size": config.batch_size,
    } | found
    text = json.dumps(found, indent=2)
    print(text)
    if out:
        out.write_text(text + "\n")


if __name__ == "__main__":
    main()
