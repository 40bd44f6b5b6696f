"""Compiles a configuration's training epoch for a TPU that is not there, and reads what the compiler says of it.

    pip install libtpu
    JAX_PLATFORMS=cpu python benchmarks/tpu_compile.py --config configs/cifar10.py [--config.KEY=VALUE ...] [--out FILE.json]

libtpu is Google's own TPU compiler; given a topology it makes a real executable without the device, the same on every machine. No
data set is read: only its sizes matter. `optimal_seconds` is the compiler's model of one step, not a measurement; it counts the
body of a loop once, so for an epoch it reads as one step.
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
from vffjax.trainer import Images, init_states, make_plan, make_task, run_epoch

SIZES = {"mnist": (60_000, (28, 28, 1), 10), "fashion_mnist": (60_000, (28, 28, 1), 10), "cifar10": (50_000, (32, 32, 3), 10)}
SIZES["cifar100"] = (50_000, (32, 32, 3), 100)


def compile_epoch(config: Config, topology: str = "v5e:2x2") -> tuple[Any, dict[str, Any]]:
    """The compiled epoch of `config` on one chip of a TPU topology, and its compile time, memory in bytes and cost."""
    total, shape, classes = SIZES[config.dataset]
    total = config.train_examples or total
    n = total - round(config.val_fraction * total)
    plan = make_plan(config, n, classes)
    device = topologies.get_topology_desc(topology, "tpu").devices[0]
    sharding = NamedSharding(Mesh(np.array([device]), ("chip",)), PartitionSpec())

    def abstract(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    states = abstract(jax.eval_shape(lambda: init_states(plan, shape)))
    channels = (0.5,) * shape[2]
    task = abstract(jax.eval_shape(lambda: make_task(config, classes, shape, channels, channels)))
    data = abstract(Images(jax.ShapeDtypeStruct((n, *shape), jnp.uint8), jax.ShapeDtypeStruct((n,), jnp.int32)))
    epoch = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding)
    start = time.perf_counter()
    compiled = jax.jit(functools.partial(run_epoch, plan, plan.active(0)), donate_argnums=1).lower(task, states, data, epoch).compile()
    seconds = time.perf_counter() - start
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    return compiled, {
        "topology": topology,
        "device": device.device_kind,
        "compile_seconds": seconds,
        "steps_per_epoch": plan.steps_per_epoch,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "flops_per_step": cost.get("flops"),
        "bytes_accessed_per_step": cost.get("bytes accessed"),
        "optimal_seconds_per_step": cost.get("optimal_seconds"),
        "jax": jax.__version__,
    }


def main() -> None:
    arguments = sys.argv[1:]
    out = None
    if "--out" in arguments:
        at = arguments.index("--out")
        out = pathlib.Path(arguments[at + 1])
        del arguments[at : at + 2]
    config, name, _ = parse_train(arguments)
    _, found = compile_epoch(config)
    found = {"config": name, "rule": config.rule, "grouping": config.grouping, "precision": config.precision, "batch_size": config.batch_size} | found
    text = json.dumps(found, indent=2)
    print(text)
    if out:
        out.write_text(text + "\n")


if __name__ == "__main__":
    main()
