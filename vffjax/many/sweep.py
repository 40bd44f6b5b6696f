"""Trains many runs in one process, so that those whose programs are equal compile them once, and tells what came out of them."""

import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from vffjax.config import Config, of_program
from vffjax.costs import fits
from vffjax.data import load as data_module
from vffjax.errors import UserError, notice
from vffjax.files import replace_file, write_json
from vffjax.many.figures import plot_sweep
from vffjax.many.members import Member
from vffjax.many.tables import Spread, markdown, named
from vffjax.runs import experiment
from vffjax.runs.logbook import finished
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
    for config in {named(member.values): member.config for member in found}.values():
        fits.check_memory(config)
    return found


def trained(config: Config, folder: pathlib.Path) -> dict[str, Any]:
    """What summary.json of a run holds. A run that has finished is not trained again, but its data and its code must be the same.

    Raises:
        UserError: as `experiment.train` does.
        Terminated: SIGTERM came, and the run has been saved.
    """
    claim_workdir(folder, config)
    summary = finished(folder)
    if summary is None or not isinstance(summary.get("data_sha256"), str) or "test_error" not in summary:
        return experiment.train(config, folder)
    experiment.check_same_data(config, data_module.load(config), summary["data_sha256"])
    check_code(summary, config)
    return summary


def run(members: Sequence[Member], out: pathlib.Path, about: dict[str, Any]) -> dict[str, Any]:
    """Trains the runs one after the other, from where an earlier call was stopped. Those that share a program follow each other.

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
    done: dict[int, dict[str, Any]] = {}
    found: dict[str, Any] = {}

    def kept() -> str:
        """What SIGTERM and errors leave of a sweep, in words. Runs that an earlier call has trained count too."""
        ended = sum(index in done or finished(folder_of(out, member)) is not None for index, member in enumerate(members))
        return f"{ended} of {len(members)} runs have ended and are kept"

    with deferred() as request:
        for index in _by_program(members):
            member, request.saved = members[index], kept()
            notice(f"== {len(done) + 1}/{len(members)}  {member.name}")
            request.idle = False  # the run itself says when it may be left
            try:
                done[index] = _outcome(member, folder_of(out, member))
            except Terminated as leave:
                raise Terminated(f"{kept()}; {leave}") from None
            except UserError as error:
                raise UserError(f"{_speaking_of_out(error)}; {kept()}") from error.__cause__
            runs = [done[i] for i in sorted(done)]
            found = about | {"keys": list(member.values), "rows": rows_of(runs), "runs": runs}
            write_json(out / "sweep.json", found)
            replace_file(out / "sweep.md", (table(found["rows"], found["keys"]) + "\n").encode())
            request.saved, request.idle = kept(), True
            if request.leave:
                raise Terminated(f"{request.saved}; the same command goes on")
    plot_sweep(out / "sweep.png", found)
    if others := {path.parent.name for path in (out / "runs").glob("*/config.json")} - {member.name for member in members}:
        notice(f"{out}: other runs lie here too ({len(others)}), of which this table has none; vffjax compare {out} shows all")
    return found


def _by_program(members: Sequence[Member]) -> list[int]:
    """Their indices, those of equal programs next to each other, because a process keeps a few compiled programs only."""
    programs: dict[Config, list[int]] = {}
    for index, member in enumerate(members):
        programs.setdefault(of_program(member.config), []).append(index)
    return [index for indices in programs.values() for index in indices]


def _outcome(member: Member, folder: pathlib.Path) -> dict[str, Any]:
    about = {"name": member.name, "values": member.values, "seed": member.config.seed, "diverged": ""}
    try:
        summary = trained(member.config, folder)
    except Diverged as error:
        notice(f"{member.name}: {_speaking_of_out(error)}; the others go on")
        return about | dict.fromkeys((*ERRORS, *_KEPT)) | {"diverged": str(error).partition("; ")[0]}
    return about | {key: summary.get(key) for key in (*ERRORS, *_KEPT)}


def _speaking_of_out(error: UserError) -> str:
    """The message of a single run, for somebody who gave --out and not --workdir."""
    return str(error).replace("--workdir", "--out")


def rows_of(runs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for the runs that differ in their seed alone: mean and sample standard deviation of errors and seconds, and their number.

    Runs that diverged are counted under `diverged` and are in no mean.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for one in runs:
        groups.setdefault(named(one["values"]), []).append(one)
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
        figures = [cell(row, "val_error", ".2f"), cell(row, "test_error", ".2f"), cell(row, "seconds", ".1f")]
        cells.append([*map(str, row["values"].values()), *figures, str(row["n"]), *([str(row["diverged"])] if diverged else [])])
    text = markdown(head, cells, len(keys))
    if len(rows) > 1 and (best := best_of(rows)):
        text += f"\n\nLowest validation error: {named(best['values'])}."
    return text


def cell(row: dict[str, Any], key: str, spec: str) -> str:
    """A figure of a row that has `key`, `key_sd` and `n`."""
    return "-" if row[key] is None else format(Spread(row[key], row[f"{key}_sd"], row["n"]), spec)
