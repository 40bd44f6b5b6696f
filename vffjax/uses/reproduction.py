"""A finished run once more, from its config.json alone, and what came out differently."""

import dataclasses
import itertools
import pathlib
from typing import Any

import jax
import numpy as np

from vffjax.errors import UserError
from vffjax.files import read_json
from vffjax.runs import experiment
from vffjax.runs.checkpoint import Checkpoints
from vffjax.runs.logbook import read_metrics
from vffjax.runs.origin import check_code
from vffjax.runs.workdir import load_run, read_config

# They say how fast and where it ran, not what came out.
COSTS = ("seconds", "images_per_second", "compile_seconds", "peak_bytes")
SURROUNDINGS = ("versions", "commit", "device", "cores", "flags", "earlier_origins", "settings")


def reproduce(workdir: pathlib.Path | str, into: pathlib.Path | str, data_dir: str = "") -> dict[str, Any]:
    """Trains the finished run of `workdir` again in the folder `into`, where it goes on if it was interrupted, and compares the two.

    `data_dir`: where the data lie now, if not where they lay then. Returns what `compare` does. Raises `UserError` if there is no
    finished run, or if `into` is its own folder.
    """
    workdir, into = pathlib.Path(workdir), pathlib.Path(into)
    config = read_config(workdir)
    summary = _summary(workdir)
    check_code(summary, config)
    if into.resolve() == workdir.resolve():
        raise UserError(f"--into={into}: the run's own folder; give another")
    experiment.train(dataclasses.replace(config, data_dir=data_dir or config.data_dir), into, summary["data_sha256"])
    return compare(workdir, into)


def compare(one: pathlib.Path, other: pathlib.Path) -> dict[str, Any]:
    """Two finished runs, to the bit: `identical`, `differences` of results, and of `surroundings`, each a line.

    Compared are the summary, the record of every epoch, and every array of every saved epoch; not times and peak bytes.
    """
    first, second = _summary(one), _summary(other)
    ignored = {*COSTS, *SURROUNDINGS}
    differences = _fields("summary.json", *({key: s[key] for key in s if key not in ignored} for s in (first, second)))
    records = [[{key: r[key] for key in r if key not in COSTS} for r in read_metrics(folder)] for folder in (one, other)]
    for line, (a, b) in enumerate(itertools.zip_longest(*records, fillvalue={}), 1):
        differences += _fields(f"metrics.jsonl, line {line}", a, b)
    arrays, found = _compare_checkpoints(one, other)
    differences += found
    return {
        "identical": not differences,
        "arrays": arrays,
        "epochs": len(records[0]),
        "differences": differences,
        "surroundings": _fields("", *({key: s.get(key) for key in SURROUNDINGS} for s in (first, second))),
    }


def text(found: dict[str, Any]) -> str:
    """`compare`'s result for people."""
    lines = [f"  {line}" for line in found["differences"]]
    if found["surroundings"]:
        lines += ["ran under other conditions:", *(f"  {line}" for line in found["surroundings"])]
    compared = f"{found['epochs']} epochs' records, {found['arrays']} arrays of the saved epochs and the summary"
    verdict = f"identical to the bit: {compared}" if found["identical"] else f"NOT identical; compared were {compared}:"
    return "\n".join([verdict, *lines])


def _summary(workdir: pathlib.Path) -> dict[str, Any]:
    path = workdir / "summary.json"
    try:
        summary = read_json(path)
        missing = [key for key in (*SURROUNDINGS[:-1], "data_sha256") if key not in summary]  # settings came later
    except FileNotFoundError:
        raise UserError(f"--workdir={workdir}: its run is not finished ({path.name} is missing); train it to the end first") from None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); delete it and train with this --workdir, which writes it again") from None
    if missing:
        raise UserError(f"{path}: has no {missing[0]}, so that another version of vffjax wrote it; reproduce it with that one")
    return summary


def _fields(where: str, one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    keys = list(dict.fromkeys([*one, *other]))
    return [f"{where} {key}: {one.get(key)} then, {other.get(key)} now".strip() for key in keys if one.get(key) != other.get(key)]


def _compare_checkpoints(one: pathlib.Path, other: pathlib.Path) -> tuple[int, list[str]]:
    """How many arrays both have, and a line for each that differs."""
    epochs, count, found = [Checkpoints(folder).epochs() for folder in (one, other)], 0, []
    if epochs[0] != epochs[1]:
        found.append(f"checkpoints: epochs {epochs[0]} then, {epochs[1]} now")
    for epoch in sorted(set(epochs[0]) & set(epochs[1])):
        pairs = zip(*(_arrays(folder, epoch) for folder in (one, other)), strict=True)
        for (name, a), (_, b) in pairs:
            count += 1
            if a.tobytes() != b.tobytes():
                apart = np.abs(a.astype(np.float64) - b.astype(np.float64)).max()
                found.append(f"checkpoints/{epoch}: {name} differs by up to {apart:.3g}")
    return count, found


def _arrays(workdir: pathlib.Path, epoch: int) -> list[tuple[str, np.ndarray]]:
    _, states, task, _ = load_run(workdir, str(epoch))
    named = {f"group{i}": state for i, state in enumerate(states)} | {"task": task}
    leaves = jax.tree_util.tree_leaves_with_path(named)
    return [(jax.tree_util.keystr(path, simple=True, separator="."), np.asarray(leaf)) for path, leaf in leaves]
