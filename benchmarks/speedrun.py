"""Seconds of training to a validation accuracy, by local rules only.

    python benchmarks/speedrun.py --target 0.80 [--config configs/cifar10_speed.py] [--config.KEY=VALUE ...] [--seeds 0,1,2]
                                  [--out FILE.json]

The rules of the board:

1. No gradient crosses a group. A configuration whose layers make one group is refused.
2. Training sees the data set's training images without the validation part, which the seed draws (`config.val_fraction`). The test images
   are looked at once, after the clock has stopped for good, and nothing depends on them.
3. The accuracy is that of all groups' heads together on the validation images, after each epoch, in one clean pass. No group is left out
   and nothing is chosen.
4. The clock runs while an epoch runs, augmentation included, from its dispatch until its last parameter is there. It stands still while
   the accuracy is taken. It stops at the end of the first epoch that reaches the target. The schedule is what the configuration says, fixed
   before the start: it does not know when the target will come.
5. Before the clock starts, the data lie on the device, all programs are compiled, that of the accuracy too, and one whole epoch has run on
   other parameters with random labels, so that nothing trained leaks into the run. Compilation is reported apart.
6. Every seed counts. One that never reaches the target makes the board's mean meaningless, so the number of seeds that reached it is
   part of the result, and mean and standard deviation are over those. Under `config.on_nonfinite=stop` a seed whose loss is no longer
   finite is stopped, and has not reached the target.
7. Weights start from the seed, and every seed comes from `--seeds`: keys that say otherwise are refused.

The protocol of warm-up and clock follows airbench (K. Jordan, 2024), with epochs in place of steps.
"""

import dataclasses
import pathlib
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from arguments import one_line, parser_of, read_config, seeds
from keys import JOINT, RANDOM_WEIGHTS, SEEDS, Only, refuse
from vffjax.cli.options import json_file
from vffjax.config import Config
from vffjax.data import load as data_module
from vffjax.errors import UserError, bad_key
from vffjax.files import write_json
from vffjax.runs.experiment import plan_for
from vffjax.runs.loop import on_device, training_images
from vffjax.training import scores as inference
from vffjax.training.checks import make_config
from vffjax.training.epochs import Epoch, segment_length
from vffjax.training.plan import Plan, init_states, make_task

# Keys whose values the board sets itself.
SET_HERE = {
    "schedule": JOINT,
    "init_from": RANDOM_WEIGHTS,
    "inference": Only(("heads",), "the board's accuracy is that of all heads together", "use inference=heads"),
}


def check_rules(plan: Plan) -> None:
    """Refuses what the board does not admit."""
    config = plan.config
    if len(plan.groups) == 1 and len(plan.groups[0].module.layers) > 1:
        raise bad_key("grouping", config.grouping, "one group of all layers is back-propagation", "use grouping=layer or width")
    refuse(config, SET_HERE)
    if config.val_fraction == 0:
        raise bad_key("val_fraction", config.val_fraction, "leaves nothing to measure on", "hold out some images, such as 0.1")


def race(config: Config, target: float) -> dict[str, Any]:
    """One seed: seconds to `target`, or None, and what each epoch reached. `target` is a share of 1."""
    dataset = data_module.load(config)
    plan = plan_for(config, dataset)
    check_rules(plan)
    train = training_images(dataset.train)
    judged = {"validation": on_device(dataset.validation), "test": on_device(dataset.test)}
    task = make_task(config, dataset.num_classes, dataset.image_shape, dataset.mean, dataset.std)
    start = time.perf_counter()
    fresh = init_states(plan, dataset.image_shape)
    epoch = Epoch(plan, None, segment_length(plan, dataset.image_shape))
    epoch.compile(task, fresh, train)
    scores_of = {name: inference.compile_scores(plan, "heads", task, fresh, split.images) for name, split in judged.items()}
    compile_seconds = time.perf_counter() - start

    def accuracy(states: Any, split: str) -> float:
        found = np.asarray(scores_of[split](task, states, judged[split].images))
        everyone = tuple(range(len(plan.groups)))
        return 1 - inference.error_percent(inference.ensemble(found, everyone), judged[split].labels) / 100

    random_labels = np.random.default_rng(config.seed).integers(0, dataset.num_classes, len(train.labels), np.int32)
    warm, _ = epoch(task, fresh, train._replace(labels=jnp.asarray(random_labels)), 0)
    accuracy(warm, "validation")
    del warm

    states = jax.block_until_ready(init_states(plan, dataset.image_shape))
    seconds, curve, reached = 0.0, [], None
    for number in range(config.epochs):
        start = time.perf_counter()
        states, metrics = jax.block_until_ready(epoch(task, states, train, number))
        seconds += time.perf_counter() - start
        curve.append({"epoch": number + 1, "seconds": seconds, "val_accuracy": accuracy(states, "validation")})
        print(f"seed {config.seed} epoch {number + 1}: {seconds:.1f} s, {curve[-1]['val_accuracy']:.4f}", file=sys.stderr, flush=True)
        if curve[-1]["val_accuracy"] >= target:
            reached = seconds
            break
        if config.on_nonfinite == "stop" and np.any(metrics["nonfinite_steps"]):
            print(f"seed {config.seed}: a loss is not finite; the race of this seed is over", file=sys.stderr, flush=True)
            break
    return {
        "seed": config.seed,
        "seconds_to_target": reached,
        "epochs": len(curve),
        "images_per_second": len(curve) * plan.steps_per_epoch * config.batch_size / seconds,
        "test_accuracy": accuracy(states, "test"),
        "compile_seconds": compile_seconds,
        "curve": curve,
    }


def summarise(races: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and sample standard deviation in seconds over the seeds that reached the target, and how many did."""
    times = [r["seconds_to_target"] for r in races if r["seconds_to_target"] is not None]
    return {
        "reached": len(times),
        "n": len(races),
        "seconds_mean": statistics.mean(times) if times else None,
        "seconds_sd": statistics.stdev(times) if len(times) > 1 else None,
        "test_accuracy_mean": statistics.mean(r["test_accuracy"] for r in races),
    }


def line(result: dict[str, Any], target: float) -> str:
    """The board's line."""
    sd = "" if result["seconds_sd"] is None else f" ± {result['seconds_sd']:.1f}"
    seconds = "never" if result["seconds_mean"] is None else f"{result['seconds_mean']:.1f}{sd} s"
    of_seeds = f"{result['reached']} of {result['n']} seeds"
    return f"{target:.0%} validation accuracy: {seconds} ({of_seeds}); test accuracy then {result['test_accuracy_mean']:.2%}"


@one_line(__file__)
def main() -> None:
    parser = parser_of(__file__, __doc__)
    parser.add_argument("--target", type=float, required=True, help="validation accuracy, a share of 1 such as 0.80")
    parser.add_argument("--seeds", type=seeds, default="0,1,2", help="comma-separated")
    parser.add_argument("--out", type=json_file, metavar="FILE.json", help="write the result to a file")
    own, rest = parser.parse_known_args()
    if not any(argument.lstrip("-").partition("=")[0] == "config" for argument in rest):
        rest = ["--config", str(pathlib.Path(__file__).resolve().parents[1] / "configs" / "cifar10_speed.py"), *rest]
    if not 0 < own.target < 1:
        raise UserError(f"--target={own.target}: not a share of 1; give for example 0.80")
    config, name = read_config(rest, "use --out")
    refuse(config, SET_HERE | {"seed": SEEDS})  # before any data are read
    races = [race(make_config(dataclasses.replace(config, seed=seed).to_dict()), own.target) for seed in own.seeds]
    result = {"target": own.target, "config_name": name, "device": jax.devices()[0].device_kind} | summarise(races)
    if own.out:
        write_json(own.out, result | {"config": config.to_dict(), "races": races, "jax": jax.__version__, "command": sys.argv[1:]})
    print(line(result, own.target))


if __name__ == "__main__":
    main()
