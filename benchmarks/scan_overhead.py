"""A scanned epoch against the same steps in a Python loop, with compile times; and whether a second epoch compiles anything.

    python benchmarks/scan_overhead.py --config configs/cifar10.py:small [--config.KEY=VALUE ...]

Random images of the data set's size, as many as make 24 steps. Both run in turn, five times after a warm-up; the ratio is taken pair by
pair. The loop calls a jitted `train_step` that donates its states, waits for the device once at its end, and gathers its batches by
the same order as the scan.
"""

import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from keys import JOINT, RANDOM_WEIGHTS, read_config, refuse

from vffjax.checks import check_against_data
from vffjax.config import Config
from vffjax.data import SIZES
from vffjax.errors import UserError
from vffjax.plan import Images, init_states, make_plan, make_task
from vffjax.trainer import make_epoch, train_step

STEPS, PAIRS = 24, 5


def measure(config: Config) -> dict[str, Any]:
    """Seconds of an epoch of `STEPS` steps both ways, and their ratio, scan over loop. Raises `UserError` for what it would not obey."""
    refuse(config, {"schedule": JOINT, "init_from": RANDOM_WEIGHTS})
    _, shape, classes = SIZES[config.dataset]
    n = STEPS * config.batch_size
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.integers(0, 256, (n, *shape), np.uint8))
    data = Images(images, jnp.asarray(rng.integers(0, classes, n), jnp.int32))
    plan = make_plan(config, n, classes)
    check_against_data(config, n, shape, classes, len(plan.groups))
    task = make_task(config, classes, shape, (0.5,) * shape[2], (0.25,) * shape[2])

    start = time.perf_counter()
    epoch = make_epoch(plan, plan.active(0))
    compiled = epoch.lower(task, init_states(plan, shape), data, jnp.int32(0)).compile()
    scan_compile = time.perf_counter() - start
    step = jax.jit(functools.partial(train_step, plan, plan.active(0)), donate_argnums=1)
    take = jax.jit(lambda data, rows: (data.images[rows], data.labels[rows]))

    def scanned() -> Any:
        return compiled(task, init_states(plan, shape), data, jnp.int32(0))

    def looped() -> Any:
        states = init_states(plan, shape)
        order = np.asarray(jax.random.permutation(jax.random.key(0), n)).reshape(STEPS, -1)
        metrics = None
        for number, rows in enumerate(order):
            states, metrics = step(task, states, *take(data, rows), jax.random.key(number))
        return states, metrics

    def seconds(run: Callable[[], Any]) -> float:
        start = time.perf_counter()
        jax.block_until_ready(run())
        return time.perf_counter() - start

    seconds(scanned), seconds(looped)
    pairs = [(seconds(scanned), seconds(looped)) for _ in range(PAIRS)]
    before = epoch._cache_size()  # type: ignore[attr-defined]
    states, _ = epoch(task, init_states(plan, shape), data, jnp.int32(0))
    once = epoch._cache_size()  # type: ignore[attr-defined]
    epoch(task, states, data, jnp.int32(1))
    return {
        "steps": STEPS,
        "pairs": PAIRS,
        "scan_compile_seconds": scan_compile,
        "scan_seconds": statistics.median(a for a, _ in pairs),
        "loop_seconds": statistics.median(b for _, b in pairs),
        "scan_over_loop": statistics.median(a / b for a, b in pairs),
        "scan_over_loop_range": [min(a / b for a, b in pairs), max(a / b for a, b in pairs)],
        "compilations_of_first_epoch": once - before,
        "compilations_of_second_epoch": epoch._cache_size() - once,  # type: ignore[attr-defined]
        "device": jax.devices()[0].device_kind,
    }


if __name__ == "__main__":
    try:
        config, name = read_config(sys.argv[1:], "the result is printed")
        found = {"config": name} | measure(config)
    except UserError as error:
        print("scan_overhead: error:", error, file=sys.stderr)
        sys.exit(2)
    print(json.dumps(found, indent=2))
