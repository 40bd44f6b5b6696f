"""The state of a run: what every checkpoint keeps beside its arrays, as plain JSON.

From it a run goes on, is judged without its training data, and says what made it. A state is checked by the same function, `problem`,
when it is written and when it is read.
"""

import base64
import io
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from vffjax.config import MAX_SIDE, Config

# The format's number. It is raised by one whenever the previous version can no longer read a state or the arrays beside it; see
# docs/runs.md.
FORMAT = 3
# Keys that a state has only if it was saved at the end of an epoch.
_OF_WHOLE_EPOCHS = ("trained_groups", "scheduled", "val_error", "val_error_per_group", "voting", "vote_weights")


def new_state(config: Config, data: dict[str, Any], init_from_sha256: str | None) -> dict[str, Any]:
    """The state of a run before its first epoch.

    Each finished epoch adds the results of its validation, `scheduled` (whether its checkpoint was due), and `trained_groups`.

    Args:
        config: the run's configuration.
        data: data_sha256, train_size, image_shape and class_names, in JSON types.
        init_from_sha256: the digest of the weight file that the run starts from, or None.
    """
    return {
        "epoch": 0,
        "history": [],  # one record for each epoch, as in metrics.jsonl
        "due": [],  # the epochs whose checkpoint was due by config.checkpoint_every; the best epoch is chosen among them
        "config": config.to_dict(),
        **data,
        "init_from_sha256": init_from_sha256,
        "compile_seconds": 0.0,
        "peak_bytes": 0,
        "segment_steps": 0,  # how many steps the device runs in one call, here; without influence on the result
        "devices": 1,  # how many trained it last
        "origins": [],  # more than one if the run went on elsewhere, with other versions, or with other `config.CHANGEABLE` settings
    }


def inside(run: dict[str, Any], epoch: int, step: int, steps: int, seconds: float, metrics: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The state of a run that is saved before an epoch has ended.

    Args:
        run: the run's state after its last whole epoch.
        epoch: the number of whole epochs that are done.
        step: the number of steps of the next epoch that are done.
        steps: the number of steps of an epoch.
        seconds: the time that those `step` steps took.
        metrics: the metrics of those steps, as `epochs.joined` returns them.
    """
    arrays = {name: _packed(values) for name, values in metrics.items()}
    position = {"step": step, "number": epoch * steps + step, "seconds": seconds, "metrics": arrays}
    return {key: value for key, value in run.items() if key not in _OF_WHOLE_EPOCHS} | {"epoch": epoch, "inside": position}


def metrics_of(position: dict[str, Any]) -> dict[str, np.ndarray]:
    """The metrics of the steps before a position, which is the `inside` of a state. Raises `ValueError` if they cannot be decoded."""
    return {name: np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False) for name, text in position["metrics"].items()}


def _packed(values: np.ndarray) -> str:
    file = io.BytesIO()
    np.save(file, np.asarray(values), allow_pickle=False)
    return base64.b64encode(file.getvalue()).decode()


def number(run: dict[str, Any]) -> int:
    """The number under which a state is saved: its epoch or, inside of an epoch, the count of all steps of the run so far."""
    return run["inside"]["number"] if "inside" in run else run["epoch"]


class Rank(NamedTuple):
    """How good an epoch is. The best epoch has the greatest rank, compared entry by entry; no two epochs of a run have the same rank."""

    due: bool  # whether its checkpoint was due: one saved only because the run was told to leave could not be chosen otherwise
    group: int  # the group that trained, under the sequential schedule: before a later stage, later groups were untrained
    negative_error: float  # minus the validation error in percent; 0 without validation images, so that the latest epoch wins
    epoch: int


def rank(run: dict[str, Any]) -> Rank:
    """The rank of the epoch after which a state was saved. A state that was saved inside of an epoch ranks below all others."""
    return Rank(False, 0, 0.0, 0) if "inside" in run else _ranks(run)[-1]


def best_epoch(run: dict[str, Any]) -> int:
    """The number of the best epoch by a run's record, or 0 if no epoch's checkpoint was due yet."""
    best = max(_ranks(run), default=None)
    return best.epoch if best and best.due else 0


def _ranks(run: dict[str, Any]) -> list[Rank]:
    """The rank of every epoch in a run's record, in order."""
    due = set(run["due"])
    return [Rank(r["epoch"] in due, r.get("group", 0), -(r["val_error"] or 0.0), r["epoch"]) for r in run["history"]]


def problem(run: Any) -> str:
    """The name of the first key of a state that is missing or unsound; empty if the library can rely on all of them.

    Files may come from anyone, so nothing in them is taken for granted.
    """
    if not isinstance(run, dict):
        return "the whole"
    return next((key for key, sound in _checks(run) if not sound), "")


def _whole(value: Any, low: int, high: int = 2**53) -> bool:
    return type(value) is int and low <= value <= high


def _finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _checks(run: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    """Pairs of a key and whether its value is sound. No check is made behind the first unsound value: each relies on those before."""

    def listed(key: str, sound: Callable[[Any], bool], least: int = 0) -> bool:
        return isinstance(run.get(key), list) and len(run[key]) >= least and all(map(sound, run[key]))

    def line(record: Any) -> bool:
        times = isinstance(record, dict) and all(_finite(record.get(key)) for key in ("seconds", "images_per_second"))
        group = times and _whole(record.get("group", 0), 0)
        return group and (record.get("val_error") is None or _finite(record["val_error"]))

    complete = "inside" not in run
    yield "epoch", _whole(run.get("epoch"), int(complete), 10**7)
    for key in ("train_size", "peak_bytes", "segment_steps"):
        yield key, _whole(run.get(key), 1)
    for key, kind in (("config", dict), ("data_sha256", str)):
        yield key, isinstance(run.get(key), kind)
    yield "compile_seconds", _finite(run.get("compile_seconds"))
    yield "image_shape", listed("image_shape", lambda side: _whole(side, 1, MAX_SIDE)) and len(run["image_shape"]) == 3
    yield "class_names", listed("class_names", lambda name: isinstance(name, str), 2)
    yield "origins", listed("origins", lambda origin: isinstance(origin, dict), 1)
    epochs = list(range(1, run["epoch"] + 1))
    yield "history", listed("history", line) and [record.get("epoch") for record in run["history"]] == epochs
    yield "due", listed("due", lambda epoch: _whole(epoch, 1, run["epoch"]))
    if not complete:
        yield "inside", _sound_inside(run["inside"], run["epoch"])
        return
    yield "trained_groups", _whole(run.get("trained_groups"), 1)
    yield "scheduled", isinstance(run.get("scheduled"), bool)
    yield "val_error", run.get("val_error") is None or _finite(run["val_error"])
    yield "voting", listed("voting", lambda group: _whole(group, 0, run["trained_groups"] - 1), 1)
    if "vote_weights" in run:  # only with config.votes=weighted
        weights = listed("vote_weights", lambda weight: _finite(weight) and weight > 0)
        yield "vote_weights", weights and len(run["vote_weights"]) == len(run["voting"])


def _sound_inside(position: Any, epoch: int) -> bool:
    """Whether the position of a state that was saved inside of an epoch is sound."""
    if not isinstance(position, dict) or not _whole(position.get("step"), 1) or not _whole(position.get("number"), epoch, 2**53 - 1):
        return False
    if not _finite(position.get("seconds")) or position["seconds"] < 0:
        return False
    try:
        metrics = metrics_of(position)
    except (ValueError, AttributeError, TypeError, EOFError, OSError):
        return False
    return "finite" in metrics and all(values.ndim and len(values) == position["step"] for values in metrics.values())
