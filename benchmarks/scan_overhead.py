"""Compares an epoch in segments with the same steps in a Python loop, and checks whether a second epoch compiles anything.

    python benchmarks/scan_overhead.py --config configs/cifar10.py:small [--config.KEY=VALUE ...]

Both train 24 steps on random images of the data set's size. They run in turn, five times after a warm-up, and the ratio is taken for each
pair. The loop calls a jitted `train_step` with donated states, gathers its batches one by one, and waits for the device once at its end.
"""

import functools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from arguments import one_line, parser_of, read_config
from keys import JOINT, RANDOM_WEIGHTS, refuse
from spread import median_and_range
from vffjax.config import Config
from vffjax.data import sizes_of
from vffjax.hyperparameters import HyperParameters
from vffjax.training.batch import Batch
from vffjax.training.checks import check_against_data
from vffjax.training.epochs import Epoch, segment_length
from vffjax.training.plan import Images, blank_task, init_states, make_plan
from vffjax.training.trainer import train_step

STEPS, PAIRS = 24, 5


def measure(config: Config) -> dict[str, Any]:
    """Measures the seconds of an epoch of `STEPS` steps both ways, and their ratio.

    Returns:
        The result in plain JSON types. `scan_over_loop` is the time of the segments divided by that of the loop.

    Raises:
        UserError: a key of the configuration would be ignored, or the configuration does not fit the data.
    """
    refuse(config, {"schedule": JOINT, "init_from": RANDOM_WEIGHTS})
    _, shape, classes = sizes_of(config)
    n = STEPS * config.batch_size
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.integers(0, 256, (n, *shape), np.uint8))
    data = Images(images, jnp.asarray(rng.integers(0, classes, n), jnp.int32))
    plan = make_plan(config, n, classes)
    check_against_data(plan, n, shape)
    task = blank_task(plan, shape)

    start = time.perf_counter()
    epoch = Epoch(plan, plan.active(0), segment_length(plan, shape))
    epoch.compile(task, init_states(plan, shape), data)
    scan_compile = time.perf_counter() - start
    step = jax.jit(functools.partial(train_step, plan.program, plan.active(0)), donate_argnums=1)
    take = jax.jit(lambda data, rows: (data.images[rows], data.labels[rows]))
    hyper = plan.hyperparameters(0)

    def scanned() -> Any:
        return epoch(task, init_states(plan, shape), data, 0)

    def looped() -> Any:
        states = init_states(plan, shape)
        order = np.asarray(jax.random.permutation(jax.random.key(0), n)).reshape(STEPS, -1)
        metrics = None
        for number, rows in enumerate(order):
            numbers: Any = (values[number] for values in hyper)
            zero: Any = np.int32(0)
            images, labels = take(data, rows)
            batch = Batch(images, labels, jnp.asarray(rows), zero, jax.random.key(number), HyperParameters(*numbers))
            states, metrics = step(task, states, batch)
        return states, metrics

    def seconds(run: Callable[[], Any]) -> float:
        start = time.perf_counter()
        jax.block_until_ready(run())
        return time.perf_counter() - start

    seconds(scanned), seconds(looped)
    pairs = [(seconds(scanned), seconds(looped)) for _ in range(PAIRS)]
    compilations: list[str] = []

    def count(event: str, duration_secs: float, **_: Any) -> None:
        compilations.extend([event] if "backend_compile" in event else [])

    jax.monitoring.register_event_duration_secs_listener(count)
    epoch(task, init_states(plan, shape), data, 1)
    return {
        "steps": STEPS,
        "pairs": PAIRS,
        "scan_compile_seconds": scan_compile,
        "scan_seconds": statistics.median(a for a, _ in pairs),
        "loop_seconds": statistics.median(b for _, b in pairs),
        **median_and_range("scan_over_loop", [a / b for a, b in pairs]),
        "segments": len(epoch.pieces),
        "compilations_of_another_epoch": len(compilations),
        "device": jax.devices()[0].device_kind,
    }


@one_line(__file__)
def main() -> None:
    _, rest = parser_of(__file__, __doc__).parse_known_args()
    config, name = read_config(rest, "the result is printed")
    print(json.dumps({"config": name} | measure(config), indent=2))


if __name__ == "__main__":
    main()
