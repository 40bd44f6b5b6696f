"""Measures the seconds of training that a local rule needs to reach a validation accuracy.

    python benchmarks/speedrun.py --target 0.80 [--config configs/cifar10_speed.py] [--config.KEY=VALUE ...] [--seeds 0,1,2]
                                  [--also KEY=VALUE ...] [--peer [KEY=VALUE ...]] [--torch-modes MODE,MODE] [--out FILE.json]

With --also, a second configuration of ours races, which differs by the keys given. With --peer, back-propagation of the same network by
PyTorch races too, in the same process, from initial parameters of the same seed, with the same recipe except for the keys given. It takes
the fastest of eager and compiled execution and of PyTorch's implementations of the optimizer, as a trial finds it. Rule 1 is not for the
peer, and the others are.

The rules of the race:

1. No gradient crosses from one group to another. A configuration that puts all layers into one group is refused.
2. The network trains on the training images without the validation part, which the seed draws (`config.val_fraction`). The test images are
   used once, after the last epoch of the race, and nothing depends on them.
3. The accuracy is taken after each epoch on the validation images, in one clean pass, in two ways: by the heads of all groups together, and
   by the head of the last group alone, which is how back-propagation classifies. Both results are reported, so nothing is chosen.
4. The clock runs while an epoch runs, with its augmentation, from the dispatch of the epoch until its last parameter is computed. It is
   paused while the accuracy is taken. The result is its reading at the end of the first epoch that reaches the target, for each of the two
   accuracies. The schedule of the learning rate is fixed by the configuration, and does not depend on when the target is reached.
5. Before the clock starts, parameters are initialised, the kernel of a whitening layer among them. The data lie on the device, and all
   programs are compiled, including that of the accuracy. One whole epoch has run with random labels, and all parameters are then reset, so
   that nothing that was learnt enters the race. Compile time is reported separately.
6. Every seed counts. The result says how many seeds reached the target, because the mean and the standard deviation are over these seeds
   only. Under `config.on_nonfinite=stop` a seed whose loss is not finite is stopped, and has not reached the target.
7. Weights start from the seed, and every seed comes from `--seeds`. Keys that say otherwise are refused.

The protocol of warm-up and clock follows airbench (K. Jordan, 2024), with epochs in the place of steps.
"""

import functools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from arguments import one_line, parser_of, read_config, some_of
from contenders import COMPILE_MODES
from keys import JOINT, ONE_DEVICE, PEER, RANDOM_WEIGHTS, SEEDS, Only, refuse
from racers import Ours, Racer, Torch
from vffjax import rules
from vffjax.cli.flags import literal
from vffjax.config import Config
from vffjax.data import load as data
from vffjax.data.sets import Dataset
from vffjax.errors import UserError, bad_key
from vffjax.files import write_json
from vffjax.many.tables import Spread
from vffjax.runs.experiment import plan_for
from vffjax.training.checks import make_config
from vffjax.training.plan import Plan

# Keys whose values the race sets itself.
SET_HERE = ONE_DEVICE | {
    "schedule": JOINT,
    "init_from": RANDOM_WEIGHTS,
    "views": Only(("one",), "every racer is judged on the images as they are", "use views=one"),
    "votes": Only(("subset",), "all groups vote alike", "use votes=subset"),
    "inference": Only(("heads",), "the accuracies of the race are those of heads", "use inference=heads"),
}

# Keys of what all racers have alike, which none can have for itself.
SHARED = ("seed", "dataset", "data_dir", "data_on", "train_examples", "val_fraction", "test_fraction", "wrong_labels")
# How the accuracy is read: by which heads, and the ends of the names of its results. In the order of `racers.Accuracies`.
READINGS = {"": "all heads", "_last": "the last head"}


def check_rules(plan: Plan) -> None:
    """Raises `UserError` for a plan that the rules of the race do not admit."""
    config = plan.config
    if len(plan.groups) == 1 and len(plan.groups[0].module.layers) > 1:
        raise bad_key("grouping", config.grouping, "one group of all layers is back-propagation", "use grouping=layer or width")
    refuse(config, SET_HERE)
    if config.val_fraction == 0:
        raise bad_key("val_fraction", config.val_fraction, "leaves nothing to measure on", "hold out some images, such as 0.1")


def race(racer: Racer, config: Config, target: float, labels: int, classes: int) -> dict[str, Any]:
    """Runs the race of one seed.

    Args:
        racer: who trains.
        config: its configuration.
        target: the validation accuracy to reach, between 0 and 1.
        labels: how many training images there are.
        classes: of how many classes.

    Returns:
        The result in plain JSON types. `seconds_to_target` is None if the heads together did not reach the target, and so is
        `seconds_to_target_last` for the last head alone. The race ends when both have reached it. `curve` has the seconds and the
        validation accuracies after each epoch.
    """
    racer.epoch(0, np.random.default_rng(config.seed).integers(0, classes, labels, np.int32))
    racer.accuracies("validation")
    racer.restart()
    who = f"{racer.name} seed {config.seed}"
    seconds, curve = 0.0, list[dict[str, Any]]()
    reached: dict[str, float | None] = dict.fromkeys(READINGS)
    for number in range(config.epochs):
        start = time.perf_counter()
        finite = racer.epoch(number)
        seconds += time.perf_counter() - start
        seen = racer.accuracies("validation")
        curve.append({"epoch": number + 1, "seconds": seconds} | {f"val_accuracy{r}": a for r, a in zip(READINGS, seen, strict=True)})
        print(f"{who} epoch {number + 1}: {seconds:.1f} s, {seen.together:.4f}, last {seen.last:.4f}", file=sys.stderr, flush=True)
        for reading, accuracy in zip(READINGS, seen, strict=True):
            if reached[reading] is None and accuracy >= target:
                reached[reading] = seconds
        if None not in reached.values():
            break
        if config.on_nonfinite == "stop" and not finite:
            print(f"{who}: a loss is not finite; the race of this seed ends here", file=sys.stderr, flush=True)
            break
    tested = dict(zip(READINGS, racer.accuracies("test"), strict=True))
    return {
        "racer": racer.name,
        "seed": config.seed,
        **{f"seconds_to_target{reading}": reached[reading] for reading in READINGS},
        "epochs": len(curve),
        "images_per_second": len(curve) * (labels // config.batch_size) * config.batch_size / seconds,
        **{f"test_accuracy{reading}": tested[reading] for reading in READINGS},
        "compile_seconds": racer.compile_seconds,
        "curve": curve,
    } | racer.facts


def races_of(
    config: Config,
    peer: Mapping[str, Any] | None,
    target: float,
    modes: Sequence[str] | None = None,
    also: Mapping[str, Any] | None = None,
    turned: bool = False,
) -> list[dict[str, Any]]:
    """The races of one seed: ours, then a second of ours and PyTorch's back-propagation, each if the keys are given by which it differs.

    The order in which they run turns around with `turned`, so that a machine that slows down favours neither end.
    """
    dataset = data.load(config)
    entries: list[tuple[Callable[[Config, Dataset], Racer], Config]] = [(Ours, config)]
    if also is not None:
        entries.append((Ours, changed(config, also)))
    for _, own in entries:
        check_rules(plan_for(own, dataset))
    if peer is not None:
        entries.append((functools.partial(Torch, modes=modes), back_propagation(config, peer)))
    size, results = (len(dataset.train.labels), dataset.num_classes), dict[int, dict[str, Any]]()
    order = range(len(entries))
    for i in reversed(order) if turned else order:
        kind, own = entries[i]
        results[i] = race(kind(own, dataset), own, target, *size)
    return [results[i] for i in range(len(entries))]


def pairs(flag: str, texts: Sequence[str]) -> dict[str, Any]:
    """Keys and their values, each read as a Python literal, else as text.

    Raises `UserError` for a text without `=`, and for a key that all racers share.
    """
    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"{flag} {text}: not KEY=VALUE; give for example learning_rate=5e-3")
        if key in SHARED:
            fix = "give --seeds" if key == "seed" else f"give --config.{key}, which is for all of them"
            raise UserError(f"{flag} {text}: all racers have the same seed and images; {fix}")
        found[key] = literal(value)
    return found


def changed(config: Config, changes: Mapping[str, Any]) -> Config:
    """The same configuration but for some keys. Raises `UserError` for one that the race does not admit."""
    own = make_config(config.to_dict() | dict(changes))
    refuse(own, SET_HERE)
    return own


def back_propagation(config: Config, changes: Mapping[str, Any]) -> Config:
    """The same configuration for back-propagation. Raises `UserError` for a key that the PyTorch network does not obey."""
    own = make_config(config.to_dict() | rules.BACK_PROPAGATION | dict(changes))
    PEER.check(own)
    return own


def summarise(races: list[dict[str, Any]]) -> dict[str, Any]:
    """The number of seeds, and for each reading how many reached the target, and the mean and standard deviation of their seconds."""
    found: dict[str, Any] = {"n": len(races)}
    for reading in READINGS:
        times = [r[f"seconds_to_target{reading}"] for r in races if r[f"seconds_to_target{reading}"] is not None]
        mean, sd, _ = Spread.of(times) if times else (None, None, 0)
        accuracy = Spread.of(r[f"test_accuracy{reading}"] for r in races).mean
        own = {"reached": len(times), "seconds_mean": mean, "seconds_sd": sd, "test_accuracy_mean": accuracy}
        found |= {f"{key}{reading}": value for key, value in own.items()}
    return found


def line(result: dict[str, Any], target: float, reading: str = "") -> str:
    """One reading of the result of `summarise` in one line."""
    reached, mean, sd, accuracy = (result[f"{key}{reading}"] for key in ("reached", "seconds_mean", "seconds_sd", "test_accuracy_mean"))
    seconds = "never" if mean is None else f"{Spread(mean, sd, reached):.1f} s"
    return f"{target:.0%} validation accuracy: {seconds} ({reached} of {result['n']} seeds); test accuracy at the end {accuracy:.2%}"


@one_line(__file__)
def main() -> None:
    parser = parser_of(__file__, __doc__, "--seeds", "--out")
    parser.add_argument("--target", type=float, required=True, help="validation accuracy to reach, between 0 and 1, such as 0.80")
    keys = "race a second configuration of ours too, with these keys of its own, such as rule=supcon"
    parser.add_argument("--also", nargs="+", metavar="KEY=VALUE", help=keys)
    parser.add_argument("--peer", nargs="*", metavar="KEY=VALUE", help="race PyTorch's back-propagation too, with these keys of its own")
    modes = some_of("--torch-modes", COMPILE_MODES)
    parser.add_argument("--torch-modes", type=modes, metavar="MODE,MODE", help="modes of torch.compile; default: all that suit the device")
    own, rest = parser.parse_known_args()
    if not any(argument.lstrip("-").partition("=")[0] == "config" for argument in rest):
        rest = ["--config", "cifar10_speed", *rest]
    if not 0 < own.target < 1:
        raise UserError(f"--target={own.target}: not between 0 and 1; give for example 0.80")
    config, name = read_config(rest)
    refuse(config, SET_HERE | {"seed": SEEDS})  # `races_of` would refuse them too, but only after the data have been read
    if own.torch_modes and own.peer is None:
        raise UserError(f"--torch-modes={','.join(own.torch_modes)}: PyTorch does not race; add --peer, or leave it out")
    also = None if own.also is None else pairs("--also", own.also)
    peer = None if own.peer is None else pairs("--peer", own.peer)
    others = {}
    if also is not None:
        others["also"] = changed(config, also)
    if peer is not None:
        others["peer"] = back_propagation(config, peer)
    settings = [make_config(config.to_dict() | {"seed": seed}) for seed in own.seeds]
    found = [races_of(setting, peer, own.target, own.torch_modes, also, i % 2 == 1) for i, setting in enumerate(settings)]
    mine, *rest_of_them = (list(of_one) for of_one in zip(*found, strict=True))
    result = {"target": own.target, "config_name": name, "device": jax.devices()[0].device_kind} | summarise(mine)
    for (role, setting), races in zip(others.items(), rest_of_them, strict=True):
        result[role] = summarise(races) | {"config": setting.to_dict(), "races": races}
    if own.out:
        write_json(own.out, result | {"config": config.to_dict(), "races": mine, "jax": jax.__version__, "command": sys.argv[1:]})
    for races in (mine, *rest_of_them):
        for reading, heads in READINGS.items():
            print(f"{races[0]['racer']}, {heads}: {line(summarise(races), own.target, reading)}")


if __name__ == "__main__":
    main()
