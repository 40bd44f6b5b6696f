"""The state of a run, which every checkpoint keeps beside its arrays: to go on, to be judged without the training data, and to say what
made it. Plain JSON. What is written here passes the same check as what is read.
"""

import base64
import io
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from vffjax.config import MAX_SIDE, Config

# Raised by one whenever a state, or the arrays beside it, can no longer be read by the version before: see docs/runs.md.
FORMAT = 3
# What a state has only where it was saved at the end of an epoch.
_OF_WHOLE_EPOCHS = ("trained_groups", "scheduled", "val_error", "val_error_per_group", "voting")


def new_state(config: Config, data: dict[str, Any], init_from_sha256: str | None) -> dict[str, Any]:
    """The state before the first epoch. `data` holds data_sha256, train_size, image_shape and class_names, in JSON types.

    After an epoch it also holds that epoch's validation, `scheduled`, and `trained_groups`.
    """
    return {
        "epoch": 0,
        "history": [],  # one record for each epoch, as in metrics.jsonl
        "due": [],  # the epochs whose checkpoint was due by config.checkpoint_every: one of these is chosen as the best
        "config": config.to_dict(),
        **data,
        "init_from_sha256": init_from_sha256,
        "compile_seconds": 0.0,
        "peak_bytes": 0,
        "segment_steps": 0,  # how many steps the device runs in one call; chosen once, and of no consequence for the result
        "origins": [],  # more than one if the run went on elsewhere, with other versions, or with other `config.CHANGEABLE` settings
    }


def inside(run: dict[str, Any], epoch: int, step: int, steps: int, seconds: float, metrics: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The state of a run that is saved inside of an epoch.

    Args:
        run: the run's state as it would be saved at the end of an epoch.
        epoch: how many epochs are done.
        step: how many steps of the next one are done, of `steps`.
        seconds: what those took.
        metrics: of those steps, as `epochs.joined`.
    """
    arrays = {name: _packed(values) for name, values in metrics.items()}
    position = {"step": step, "number": epoch * steps + step, "seconds": seconds, "metrics": arrays}
    return {key: value for key, value in run.items() if key not in _OF_WHOLE_EPOCHS} | {"epoch": epoch, "inside": position}


def metrics_of(position: dict[str, Any]) -> dict[str, np.ndarray]:
    """The metrics of the steps behind a position, the `inside` of a state, to the bit. Raises `ValueError` if they cannot be read."""
    return {name: np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False) for name, text in position["metrics"].items()}


def _packed(values: np.ndarray) -> str:
    file = io.BytesIO()
    np.save(file, np.asarray(values), allow_pickle=False)
    return base64.b64encode(file.getvalue()).decode()


def number(run: dict[str, Any]) -> int:
    """By what number a state is saved: its epoch, or inside of an epoch all steps of the run so far."""
    return run["inside"]["number"] if "inside" in run else run["epoch"]


def rank(run: dict[str, Any]) -> tuple[bool, int, float]:
    """How good the epoch of a saved state is: the better epoch has the greater rank, and of equal ones the later epoch is taken.

    An epoch that was saved only because the run was told to leave ranks below all others: an undisturbed run could not choose it.
    Of a sequential run, an epoch of a later stage ranks above all of earlier ones, whose later groups had not been trained.
    A state inside of an epoch is not ranked.
    """
    if "inside" in run:
        return False, 0, 0.0
    return run["scheduled"], run["trained_groups"], -(run["val_error"] or 0.0)


def best_epoch(run: dict[str, Any]) -> int:
    """The epoch of least validation error by the record of all epochs, in the last stage reached; among equals the last.

    Only epochs whose checkpoint was due count; 0 if there is none. Without validation data it is the last one.
    """
    due = set(run["due"])
    ranks = [(r.get("group", 0), -(r["val_error"] or 0.0), r["epoch"]) for r in run["history"] if r["epoch"] in due]
    return max(ranks)[2] if ranks else 0


def problem(run: Any) -> str:
    """The first key of a state that is missing or not of its kind; empty if the rest of the library can rely on all of them.

    Files may come from anyone, so nothing in them is taken for granted.
    """
    if not isinstance(run, dict):
        return "the whole"
    return next((key for key, sound in _checks(run) if not sound()), "")


def _checks(run: dict[str, Any]) -> Iterable[tuple[str, Callable[[], bool]]]:
    """Pairs of a key and whether it is sound. Later checks may rely on earlier ones."""

    def whole(value: Any, low: int, high: int = 2**53) -> bool:
        return type(value) is int and low <= value <= high

    def finite(value: Any) -> bool:
        return type(value) in (int, float) and math.isfinite(value)

    def listed(key: str, sound: Callable[[Any], bool], least: int = 0) -> bool:
        return isinstance(run.get(key), list) and len(run[key]) >= least and all(map(sound, run[key]))

    def line(record: Any) -> bool:
        times = isinstance(record, dict) and all(finite(record.get(key)) for key in ("seconds", "images_per_second"))
        group = times and whole(record.get("group", 0), 0)
        return group and (record.get("val_error") is None or finite(record["val_error"]))

    complete = "inside" not in run
    yield "epoch", lambda: whole(run.get("epoch"), int(complete), 10**7)
    for key in ("train_size", "peak_bytes", "segment_steps"):
        yield key, lambda key=key: whole(run.get(key), 1)  # type: ignore[misc]
    for key, kind in (("config", dict), ("data_sha256", str)):
        yield key, lambda key=key, kind=kind: isinstance(run.get(key), kind)  # type: ignore[misc]
    yield "compile_seconds", lambda: finite(run.get("compile_seconds"))
    yield "image_shape", lambda: listed("image_shape", lambda side: whole(side, 1, MAX_SIDE)) and len(run["image_shape"]) == 3
    yield "class_names", lambda: listed("class_names", lambda name: isinstance(name, str), 2)
    yield "origins", lambda: listed("origins", lambda origin: isinstance(origin, dict), 1)
    epochs = list(range(1, run["epoch"] + 1)) if whole(run.get("epoch"), 0, 10**7) else []
    yield "history", lambda: listed("history", line) and [record.get("epoch") for record in run["history"]] == epochs
    yield "due", lambda: listed("due", lambda epoch: whole(epoch, 1, run["epoch"]))
    if not complete:
        yield "inside", lambda: _sound_inside(run["inside"], run["epoch"])
        return
    yield "trained_groups", lambda: whole(run.get("trained_groups"), 1)
    yield "scheduled", lambda: isinstance(run.get("scheduled"), bool)
    yield "val_error", lambda: run.get("val_error") is None or finite(run["val_error"])
    yield "voting", lambda: listed("voting", lambda group: whole(group, 0, run["trained_groups"] - 1), 1)


def _sound_inside(position: Any, epoch: int) -> bool:
    """Whether the position of a state inside of an epoch can be relied on."""
    if not isinstance(position, dict) or type(position.get("step")) is not int or position["step"] < 1:
        return False
    if type(position.get("number")) is not int or not epoch <= position["number"] < 2**53:
        return False
    if type(position.get("seconds")) not in (int, float) or not 0 <= position["seconds"] < math.inf:
        return False
    try:
        metrics = metrics_of(position)
    except (ValueError, AttributeError, TypeError, EOFError, OSError):
        return False
    return "finite" in metrics and all(values.ndim and len(values) == position["step"] for values in metrics.values())
