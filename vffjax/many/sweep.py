"""Trains many runs in one process, so that those whose programs are equal compile them once, and tells what came out of them."""

import contextlib
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from vffjax.config import Config
from vffjax.costs import fits
from vffjax.errors import UserError, notice
from vffjax.files import read_json, replace_file, write_json
from vffjax.many.figures import plot_sweep
from vffjax.many.members import MOST, Member
from vffjax.many.tables import Spread, markdown
from vffjax.runs import experiment
from vffjax.runs.loop import Diverged
from vffjax.runs.origin import check_code
from vffjax.runs.termination import Terminated, deferred
from vffjax.runs.workdir import claim_workdir
from vffjax.training.checks import check
from vffjax.weights import weights

ERRORS = ("val_error", "test_error")
_KEPT = (
    *("test_error_per_group", "voting", "best_epoch", "epochs", "seconds", "images_per_second", "compile_seconds", "peak_bytes"),
    *("device", "commit", "versions", "data_sha256"),
)


def folder_of(out: pathlib.Path, member: Member) -> pathlib.Path:
    """The folder of one run of a sweep."""
    return out / "runs" / member.name


def ready(members: Sequence[Member], out: pathlib.Path) -> list[Member]:
    """The runs with checked configurations. All of them are checked before the first one begins.

    Raises:
        UserError: a configuration is not valid, does not fit into memory, or its folder in `out` holds another run.
    """
    found = [member._replace(config=check(member.config)) for member in members]
    for member in found:
        folder = folder_of(out, member)
        claim_workdir(folder, member.config, "--out")
        if not (folder / "config.json").exists():
            weights.check_start(member.config)
    for config in {member.row: member.config for member in found}.values():
        fits.check_memory(config)
    return found


def trained(config: Config, folder: pathlib.Path) -> dict[str, Any]:
    """What summary.json of a run holds. A run that has finished is not trained again.

    Raises:
        UserError: as `experiment.train` does.
        Terminated: SIGTERM came, and the run has been saved.
    """
    claim_workdir(folder, config)
    if (folder / "config.json").exists():
        with contextlib.suppress(OSError, ValueError):  # not finished, or torn: it goes on, or is measured again
            summary = read_json(folder / "summary.json")
            check_code(summary, config)
            return summary
    return experiment.train(config, folder)


def run(members: Sequence[Member], out: pathlib.Path, about: dict[str, Any]) -> dict[str, Any]:
    """Trains the runs one after the other, from where an earlier call was stopped.

    Writes OUT/sweep.json and OUT/sweep.md after each run, and OUT/sweep.png at the end.

    Args:
        members: the runs, `ready`.
        out: the folder; the runs lie in OUT/runs.
        about: what the JSON file says besides.

    Returns:
        What sweep.json holds: `about`, `keys` (which vary), `rows` and `runs`.

    Raises:
        UserError: a run fails for another reason than that its numbers became infinite or NaN.
        Terminated: SIGTERM came. The run in training has been saved.
    """
    runs: list[dict[str, Any]] = []
    found: dict[str, Any] = {}
    with deferred() as request:
        for number, member in enumerate(members, 1):
            request.saved = _kept(runs, members)
            notice(f"== {number}/{len(members)}  {member.name}")
            request.idle = False  # the run itself says when it may be left
            try:
                runs.append(_outcome(member, folder_of(out, member)))
            except Terminated as leave:
                raise Terminated(f"{request.saved}; {leave}") from None
            found = about | {"keys": list(member.values), "rows": rows_of(runs), "runs": runs}
            write_json(out / "sweep.json", found)
            replace_file(out / "sweep.md", (table(found["rows"], found["keys"]) + "\n").encode())
            request.saved, request.idle = _kept(runs, members), True
            if request.leave:
                raise Terminated(f"{request.saved}; the same command goes on")
    plot_sweep(out / "sweep.png", found)
    return found


def _kept(runs: Sequence[dict[str, Any]], members: Sequence[Member]) -> str:
    return f"{len(runs)} of {len(members)} runs have ended and are kept"


def _outcome(member: Member, folder: pathlib.Path) -> dict[str, Any]:
    about = {"name": member.name, "values": member.values, "seed": member.config.seed, "diverged": ""}
    try:
        summary = trained(member.config, folder)
    except Diverged as error:
        notice(f"{member.name}: {error}; the others go on")
        return about | dict.fromkeys((*ERRORS, *_KEPT)) | {"diverged": str(error)}
    return about | {key: summary.get(key) for key in (*ERRORS, *_KEPT)}


def rows_of(runs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for the runs that differ in their seed alone: mean and sample standard deviation of errors and seconds, and their number.

    Runs that diverged are counted under `diverged` and are in no mean.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for one in runs:
        groups.setdefault(str(one["values"]), []).append(one)
    rows = []
    for group in groups.values():
        row = {"values": group[0]["values"], "n": 0, "diverged": sum(bool(one["diverged"]) for one in group)}
        row["n"] = len(group) - row["diverged"]
        for key in (*ERRORS, "seconds"):
            values = [one[key] for one in group if one[key] is not None]
            row[key], row[f"{key}_sd"], _ = Spread.of(values) if values else (None, None, 0)
        rows.append(row)
    return rows


def best_of(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The row with the lowest mean validation error among those in which no run diverged; None if none has one."""
    known = [row for row in rows if row["val_error"] is not None and not row["diverged"]]
    return min(known, key=lambda row: row["val_error"], default=None)


def table(rows: Sequence[dict[str, Any]], keys: Sequence[str]) -> str:
    """The rows as a Markdown table, errors in percent, with a sentence about the best row."""
    diverged = any(row["diverged"] for row in rows)
    head = [*keys, "validation error %", "test error %", "seconds", "n", *(["diverged"] if diverged else [])]
    cells = []
    for row in rows:
        figures = [_cell(row, "val_error", ".2f"), _cell(row, "test_error", ".2f"), _cell(row, "seconds", ".1f")]
        cells.append([*map(str, row["values"].values()), *figures, str(row["n"]), *([str(row["diverged"])] if diverged else [])])
    text = markdown(head, cells, len(keys))
    if len(rows) > 1 and (best := best_of(rows)):
        chosen = ", ".join(f"{key}={value}" for key, value in best["values"].items())
        text += f"\n\nLowest validation error: {chosen}."
    return text


def _cell(row: dict[str, Any], key: str, spec: str) -> str:
    return "-" if row[key] is None else format(Spread(row[key], row[f"{key}_sd"], row["n"]), spec)


def seeds_of(text: str) -> list[int]:
    """The seeds of --seeds: numbers and ranges, as 0-4 or 0,1,7. Raises `UserError` for anything else.

    >>> seeds_of("0-2,7")
    [0, 1, 2, 7]
    """
    found: list[int] = []
    for word in text.split(","):
        first, dash, last = word.partition("-")
        if not all(part.isdecimal() and part.isascii() and len(part) < 10 for part in (first, last or "0")) or (dash and not last):
            raise UserError(f"--seeds={text}: not whole numbers or ranges of them; give for example 0-4 or 0,1,7")
        seeds = range(int(first), int(last or first) + 1)
        if not seeds:
            raise UserError(f"--seeds={text}: {word} goes down; give the lower end first")
        if len(found) + len(seeds) > MOST:
            raise UserError(f"--seeds={text}: more than {MOST} seeds; give fewer")
        found += seeds
    return list(dict.fromkeys(found))
