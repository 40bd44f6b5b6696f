"""The ledger of results: one small file `results/NAME.json` for each run that is published. All tables are made from these files.

A record holds the configuration, the errors in percent, the curves by epoch, the code and machine that trained it (commit, versions,
device), and the time and memory that it took.
"""

import json
import pathlib
import re
from typing import Any

import jax

from rates import training_flops
from vffjax.config import CHANGEABLE, Config
from vffjax.data import sizes_of
from vffjax.errors import UserError
from vffjax.files import read_json, write_json
from vffjax.many.tables import Spread
from vffjax.runs.logbook import read_metrics
from vffjax.runs.origin import origin
from vffjax.training.plan import Plan, abstract_start

FORMAT = 1
CURVES = ("val_error", "train_accuracy", "loss", "seconds")
_FROM_SUMMARY = ("test_error", "test_error_per_group", "val_error", "voting", "best_epoch", "epochs", "seed")
_ORIGIN = ("commit", "versions", "device", "cores", "flags", "data_sha256", "seconds", "images_per_second", "compile_seconds", "peak_bytes")


def record(name: str, config_name: str, changes: dict[str, Any], plan: Plan, workdir: pathlib.Path, quiet: bool) -> dict[str, Any]:
    """Makes the record of a finished run from its workdir and its plan.

    Args:
        name: the name of the run, such as `cifar10-small-vff-s0`.
        config_name: the configuration file, as the list of runs names it.
        changes: the keys that differ from this file.
        plan: the plan of the run.
        workdir: the folder of the run.
        quiet: whether the machine was quiet, so that the seconds can be trusted.
    """
    summary, history = read_json(workdir / "summary.json"), read_metrics(workdir)
    return {
        "format": FORMAT,
        "name": name,
        "config_name": config_name,
        "changes": changes,
        **{key: summary[key] for key in _FROM_SUMMARY},
        "model_flop": model_flop(plan),
        "parameters": parameters(plan),
        "quiet": quiet,
        **{key: summary[key] for key in _ORIGIN},
        # Variables that name folders describe the machine, and do not change a result.
        "flags": {key: value for key, value in summary["flags"].items() if not key.endswith("_DIR")},
        "earlier_origins": len(summary["earlier_origins"]),
        "curves": {key: [_short(line.get(key)) for line in history] for key in CURVES},
        "config": plan.config.to_dict() | {"data_dir": ""},
    }


def failed(name: str, config_name: str, changes: dict[str, Any], config: Config, problem: str) -> dict[str, Any]:
    """Makes the record of a run that could not be finished, such as one that diverged, so that failed trials are reported too.

    Args:
        name: the name of the run.
        config_name: the configuration file, as the list of runs names it.
        changes: the keys that differ from this file.
        config: the configuration of the run.
        problem: why the run ended.
    """
    about = {"format": FORMAT, "name": name, "config_name": config_name, "changes": changes, "problem": problem, "seed": config.seed}
    about |= {key: value for key, value in origin(config).items() if key in ("commit", "versions", "device", "cores")}
    return about | {"config": config.to_dict() | {"data_dir": ""}}


def model_flop(plan: Plan) -> int | None:
    """The floating-point operations of the whole training as `rates` counts them, or None for a configuration that it does not count."""
    sizes = sizes_of(plan.config)
    try:
        return training_flops(plan.config, sizes.image_shape, sizes.classes) * plan.steps_per_epoch * plan.config.epochs
    except UserError:
        return None


def parameters(plan: Plan) -> dict[str, int]:
    """The number of scalar parameters in all `heads`, and in everything else (`layers`)."""
    count = {"layers": 0, "heads": 0}
    for state in abstract_start(plan, sizes_of(plan.config).image_shape)[1]:
        for part, leaves in state.params.items():
            count["heads" if part == "head" else "layers"] += sum(leaf.size for leaf in jax.tree.leaves(leaves))
    return count


def write(folder: pathlib.Path, found: dict[str, Any]) -> None:
    """Writes a record to `folder/NAME.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{found['name']}.json", found)


def read_all(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Reads all records of a folder, by name. Raises `UserError` for a JSON file that is not a record or has another format."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            one = read_json(path)
            known = one["format"] == FORMAT and one["name"] == path.stem
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not a record of a run ({type(error).__name__}: {error}); move it out of {folder}") from None
        if not known:
            raise UserError(f"{path}: a record of format {one['format']} named {one['name']!r}, and this reads format {FORMAT}; rename it")
        found[path.stem] = one
    return found


def seeds_of(found: dict[str, dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The records of all seeds of a name (`NAME-s0`, `NAME-s1`, ...), in the order of the seeds.

    Raises `UserError` if they have other values of a key that makes a run another one.
    """
    own = sorted((one for key, one in found.items() if re.fullmatch(re.escape(name) + r"-s\d+", key)), key=lambda one: one["seed"])
    for one in own[1:]:
        first, other = own[0].get("config", {}), one.get("config", {})  # an older record lacks keys that came later
        if differs := [key for key in first if key in other and key not in (*CHANGEABLE, "seed") and first[key] != other[key]]:
            values = f"{differs[0]}={first[differs[0]]!r} and {other[differs[0]]!r}"
            raise UserError(f"results: {own[0]['name']} and {one['name']} have config.{values}; give one of them another name")
    return own


def over_seeds(found: dict[str, dict[str, Any]], name: str, key: str) -> Spread:
    """The figure `key` over all seeds of a name. Raises `UserError` if no record has this name, or if a seed lacks the figure."""
    own = seeds_of(found, name)
    if not own:
        raise UserError(f"results: no record is named {name}-sSEED; correct the name, or train it")
    values = [one.get(key) for one in own]
    if not all(isinstance(value, (int, float)) for value in values):
        raise UserError(f"results: {name} has no {key} for each of its seeds ({json.dumps(values)}); leave it out, or say so in words")
    return Spread.of(value for value in values if value is not None)


def paired(found: dict[str, dict[str, Any]], name: str, other: str) -> list[float]:
    """The test errors of a name minus those of another one, for the seeds of which both have a finished run. Raises as `over_seeds`."""
    first, second = ({one["seed"]: one["test_error"] for one in _finished(found, which)} for which in (name, other))
    return [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]


def _finished(found: dict[str, dict[str, Any]], name: str) -> list[dict[str, Any]]:
    own = seeds_of(found, name)
    if not own:
        raise UserError(f"results: no record is named {name}-sSEED; correct the name, or train it")
    return [one for one in own if "problem" not in one]


def _short(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value
