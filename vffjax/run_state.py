"""The state of a run, which every checkpoint keeps beside its arrays: to go on, to be judged without the training data, and to say what
made it. Plain JSON. What is written here passes the same check as what is read.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

from vffjax.config import MAX_SIDE, Config, from_json

FORMAT = 2


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
        "origins": [],  # more than one if the run went on elsewhere, with other versions, or with other `config.CHANGEABLE` settings
    }


def rank(run: dict[str, Any]) -> tuple[bool, int, float]:
    """How good the epoch of a saved state is: the better epoch has the greater rank, and of equal ones the later epoch is taken.

    An epoch that was saved only because the run was told to leave ranks below all others: an undisturbed run could not choose it.
    Of a sequential run, an epoch of a later stage ranks above all of earlier ones, whose later groups had not been trained.
    """
    return run["scheduled"], run["trained_groups"], -(run["val_error"] or 0.0)


def best_epoch(run: dict[str, Any]) -> int:
    """The epoch of least validation error by the record of all epochs, in the last stage reached; among equals the last.

    Only epochs whose checkpoint was due count; 0 if there is none. Without validation data it is the last one.
    """
    due = set(run["due"])
    ranks = [(r.get("group", 0), -(r["val_error"] or 0.0), r["epoch"]) for r in run["history"] if r["epoch"] in due]
    return max(ranks)[2] if ranks else 0


def completed(run: dict[str, Any]) -> dict[str, Any]:
    """A state with `due`, which older checkpoints lack: their runs could not change config.checkpoint_every."""
    if "due" in run or problem(run):
        return run
    config = from_json(run["config"], "the run's state")
    return run | {"due": [epoch for epoch in range(1, run["epoch"] + 1) if config.checkpoint_due(epoch)]}


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

    def number(value: Any) -> bool:
        return type(value) in (int, float) and math.isfinite(value)

    def listed(key: str, sound: Callable[[Any], bool], least: int = 0) -> bool:
        return isinstance(run.get(key), list) and len(run[key]) >= least and all(map(sound, run[key]))

    def line(record: Any) -> bool:
        times = isinstance(record, dict) and all(number(record.get(key)) for key in ("seconds", "images_per_second"))
        group = times and whole(record.get("group", 0), 0)
        return group and (record.get("val_error") is None or number(record["val_error"]))

    for key in ("epoch", "trained_groups", "train_size", "peak_bytes"):
        yield key, lambda key=key: whole(run.get(key), 1)  # type: ignore[misc]
    for key, kind in (("scheduled", bool), ("config", dict), ("data_sha256", str)):
        yield key, lambda key=key, kind=kind: isinstance(run.get(key), kind)  # type: ignore[misc]
    yield "compile_seconds", lambda: number(run.get("compile_seconds"))
    yield "val_error", lambda: run.get("val_error") is None or number(run["val_error"])
    yield "image_shape", lambda: listed("image_shape", lambda side: whole(side, 1, MAX_SIDE)) and len(run["image_shape"]) == 3
    yield "class_names", lambda: listed("class_names", lambda name: isinstance(name, str), 2)
    yield "voting", lambda: listed("voting", lambda group: whole(group, 0, run["trained_groups"] - 1), 1)
    yield "origins", lambda: listed("origins", lambda origin: isinstance(origin, dict), 1)
    epochs = list(range(1, run["epoch"] + 1)) if whole(run.get("epoch"), 1, 10**7) else []
    yield "history", lambda: listed("history", line) and [record.get("epoch") for record in run["history"]] == epochs
    yield "due", lambda: "due" not in run or listed("due", lambda epoch: whole(epoch, 1, run["epoch"]))
