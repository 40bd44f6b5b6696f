"""Measures the seconds of training that a local rule needs to reach a validation accuracy.

    python benchmarks/speedrun.py --target 0.80 [--config configs/cifar10_speed.py] [--config.KEY=VALUE ...] [--seeds 0,1,2]
                                  [--out FILE.json]

The rules of the race:

1. No gradient crosses from one group to another. A configuration that puts all layers into one group is refused.
2. The network trains on the training images without the validation part, which the seed draws (`config.val_fraction`). The test images are
   used once, after the clock has stopped for good, and nothing depends on them.
3. The accuracy is that of all groups' heads together on the validation images. It is taken after each epoch, in one clean pass. No group is
   left out, and nothing is chosen.
4. The clock runs while an epoch runs, with its augmentation, from the dispatch of the epoch until its last parameter is computed. It is
   paused while the accuracy is taken. It stops at the end of the first epoch that reaches the target. The schedule of the learning rate is
   fixed by the configuration, and does not depend on when the target is reached.
5. Before the clock starts, the data lie on the device, and all programs are compiled, including that of the accuracy. One whole epoch has
   run on other parameters with random labels, so that nothing that was learnt enters the race. Compile time is reported separately.
6. Every seed counts. The result says how many seeds reached the target, because the mean and the standard deviation are over these seeds
   only. Under `config.on_nonfinite=stop` a seed whose loss is not finite is stopped, and has not reached the target.
7. Weights start from the seed, and every seed comes from `--seeds`. Keys that say otherwise are refused.

The protocol of warm-up and clock follows airbench (K. Jordan, 2024), with epochs in the place of steps.
"""

import dataclasses
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from arguments import one_line, parser_of, read_config
from keys import JOINT, RANDOM_WEIGHTS, SEEDS, Only, refuse
from spread import Spread
from vffjax.config import Config
from vffjax.data import load as data_module
from vffjax.errors import UserError, bad_key
from vffjax.files import write_json
from vffjax.runs.experiment import plan_for
from vffjax.runs.loop import on_device, training_images
from vffjax.training import scores as inference
from vffjax.training.checks import make_config
from vffjax.training.epochs import Epoch, segment_length
from vffjax.training.plan import Plan, init_states, make_task, noise_root, task_of_epoch, whitened

# Keys whose values the race sets itself.
SET_HERE = {
    "schedule": JOINT,
    "init_from": RANDOM_WEIGHTS,
    "inference": Only(("heads",), "the accuracy of the race is that of all heads together", "use inference=heads"),
}


def check_rules(plan: Plan) -> None:
    """Raises `UserError` for a plan that the rules of the race do not admit."""
    config = plan.config
    if len(plan.groups) == 1 and len(plan.groups[0].module.layers) > 1:
        raise bad_key("grouping", config.grouping, "one group of all layers is back-propagation", "use grouping=layer or width")
    refuse(config, SET_HERE)
    if config.val_fraction == 0:
        raise bad_key("val_fraction", config.val_fraction, "leaves nothing to measure on", "hold out some images, such as 0.1")


def race(config: Config, target: float) -> dict[str, Any]:
    """Runs the race of one seed.

    Args:
        config: a checked configuration.
        target: the validation accuracy to reach, between 0 and 1.

    Returns:
        The result in plain JSON types. `seconds_to_target` is None if the target was not reached. `curve` has the seconds and the
        validation accuracy after each epoch.
    """
    dataset = data_module.load(config)
    plan = plan_for(config, dataset)
    check_rules(plan)
    train = training_images(dataset.train)
    judged = {"validation": on_device(dataset.validation), "test": on_device(dataset.test)}
    task = make_task(config, dataset.num_classes, dataset.image_shape, dataset.mean, dataset.std, dataset.train.images)
    root = noise_root(config, dataset.train.images, task.mean, task.std)
    start = time.perf_counter()
    fresh = whitened(plan, init_states(plan, dataset.image_shape), dataset.train.images, task)
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
        task = task_of_epoch(config, task, number, root)
        states, metrics = jax.block_until_ready(epoch(task, states, train, number))
        seconds += time.perf_counter() - start
        curve.append({"epoch": number + 1, "seconds": seconds, "val_accuracy": accuracy(states, "validation")})
        print(f"seed {config.seed} epoch {number + 1}: {seconds:.1f} s, {curve[-1]['val_accuracy']:.4f}", file=sys.stderr, flush=True)
        if curve[-1]["val_accuracy"] >= target:
            reached = seconds
            break
        if config.on_nonfinite == "stop" and np.any(metrics["nonfinite_steps"]):
            print(f"seed {config.seed}: a loss is not finite; the race of this seed ends here", file=sys.stderr, flush=True)
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
    """The number of seeds, how many reached the target, and the mean and standard deviation of their seconds."""
    times = [r["seconds_to_target"] for r in races if r["seconds_to_target"] is not None]
    mean, sd, _ = Spread.of(times) if times else (None, None, 0)
    accuracy = Spread.of(r["test_accuracy"] for r in races).mean
    return {"reached": len(times), "n": len(races), "seconds_mean": mean, "seconds_sd": sd, "test_accuracy_mean": accuracy}


def line(result: dict[str, Any], target: float) -> str:
    """The result of `summarise` in one line."""
    reached, mean = result["reached"], result["seconds_mean"]
    seconds = "never" if mean is None else f"{Spread(mean, result['seconds_sd'], reached):.1f} s"
    of_seeds = f"{reached} of {result['n']} seeds"
    return f"{target:.0%} validation accuracy: {seconds} ({of_seeds}); test accuracy then {result['test_accuracy_mean']:.2%}"


@one_line(__file__)
def main() -> None:
    parser = parser_of(__file__, __doc__, "--seeds", "--out")
    parser.add_argument("--target", type=float, required=True, help="validation accuracy to reach, between 0 and 1, such as 0.80")
    own, rest = parser.parse_known_args()
    if not any(argument.lstrip("-").partition("=")[0] == "config" for argument in rest):
        rest = ["--config", str(pathlib.Path(__file__).resolve().parents[1] / "configs" / "cifar10_speed.py"), *rest]
    if not 0 < own.target < 1:
        raise UserError(f"--target={own.target}: not between 0 and 1; give for example 0.80")
    config, name = read_config(rest)
    refuse(config, SET_HERE | {"seed": SEEDS})  # `race` would refuse them too, but only after the data have been read
    races = [race(make_config(dataclasses.replace(config, seed=seed).to_dict()), own.target) for seed in own.seeds]
    result = {"target": own.target, "config_name": name, "device": jax.devices()[0].device_kind} | summarise(races)
    if own.out:
        write_json(own.out, result | {"config": config.to_dict(), "races": races, "jax": jax.__version__, "command": sys.argv[1:]})
    print(line(result, own.target))


if __name__ == "__main__":
    main()
