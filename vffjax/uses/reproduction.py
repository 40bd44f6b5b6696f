"""Trains a finished run again from its config.json alone, and compares what came out."""

import dataclasses
import itertools
import pathlib
from typing import Any

import jax
import numpy as np

from vffjax import files
from vffjax.config import Config
from vffjax.errors import UserError, bad_key
from vffjax.files import read_json
from vffjax.runs import checkpoint, experiment, logbook, origin
from vffjax.runs.workdir import load_run, read_config
from vffjax.training import stages
from vffjax.weights import weights

# Entries of the summary that say how fast and where a run was trained. They are not results.
COSTS = ("seconds", "images_per_second", "compile_seconds", "peak_bytes")
LATER = {"settings": None, "devices": 1, "processes": 1}  # which the first versions did not write, and what they would have written
SURROUNDINGS = ("versions", "commit", "device", "cores", "flags", "earlier_origins", *LATER)


def reproduce(workdir: pathlib.Path | str, into: pathlib.Path | str, data_dir: str = "") -> dict[str, Any]:
    """Trains a finished run again and compares both to the bit.

    Args:
        workdir: the folder of the finished run, in which nothing is changed.
        into: the folder of the second run. If that was interrupted before, it goes on there.
        data_dir: where the data set lies now, if not where it lay when the run was trained.

    Returns:
        What `compare` returns.

    Raises:
        UserError: there is no finished run in `workdir`, `into` is the same folder or has a finished run already, or the data have changed.
    """
    workdir, into = pathlib.Path(workdir), pathlib.Path(into)
    config = read_config(workdir)
    summary = _summary(workdir)
    origin.check_code(summary, config)
    if into.resolve() == workdir.resolve():
        raise UserError(f"--into={into}: the run's own folder; give another")
    if logbook.finished(into):
        raise UserError(f"--into={into}: holds a run that has ended, so that nothing would be trained; give another")
    _check_original(workdir, config, summary)
    # If the run asked for more devices than there are here, all of these train, and the comparison names the difference.
    devices = config.devices if config.devices <= len(jax.devices()) else 0
    again = dataclasses.replace(config, data_dir=data_dir or config.data_dir, devices=devices)
    number = summary.get("devices", 1)
    if number != stages.count(again) and number <= len(jax.devices()):  # the bits are those of a number of devices
        again = dataclasses.replace(again, devices=number)
    experiment.train(again, into, summary["data_sha256"])
    return compare(workdir, into)


def _check_original(workdir: pathlib.Path, config: Config, summary: dict[str, Any]) -> None:
    """Raises `UserError` if the run could not be compared, or not be trained again, so that nothing is trained for it."""
    epochs = checkpoint.Checkpoints(workdir).epochs()
    if not epochs:
        raise UserError(f"{workdir}: has no saved epoch to compare with; restore its checkpoints")
    for epoch in epochs:
        load_run(workdir, str(epoch))
    if config.init_from:
        weights.check_start(config)
        if files.sha256_of(weights.local_file(config)) != summary["init_from_sha256"]:
            raise bad_key("init_from", config.init_from, "other weights than the run began with", "restore them")


def compare(one: pathlib.Path, other: pathlib.Path) -> dict[str, Any]:
    """Compares two finished runs to the bit: their summaries, the records of all epochs, and every array of every saved epoch. Times and
    peak memory are not compared.

    Returns:
        `identical`; `arrays` and `epochs`, how many were compared; `differences` of the results, and of the `surroundings` in which they
        were trained, each as lines of text.
    """
    first, second = _summary(one), _summary(other)
    ignored = {*COSTS, *SURROUNDINGS}
    differences = _fields("summary.json", *({key: s[key] for key in s if key not in ignored} for s in (first, second)))
    records = [[{key: r[key] for key in r if key not in COSTS} for r in logbook.read_metrics(folder)] for folder in (one, other)]
    for line, (a, b) in enumerate(itertools.zip_longest(*records, fillvalue={}), 1):
        differences += _fields(f"metrics.jsonl, line {line}", a, b)
    arrays, found = _compare_checkpoints(one, other)
    differences += found
    return {
        "identical": not differences,
        "arrays": arrays,
        "epochs": len(records[0]),
        "differences": differences,
        "surroundings": _fields("", _surroundings(first), _surroundings(second)),
    }


def text(found: dict[str, Any]) -> str:
    """The result of `compare` in words."""
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
        missing = [key for key in (*SURROUNDINGS, "data_sha256") if key not in summary and key not in LATER]
    except FileNotFoundError:
        raise UserError(f"{workdir}: its run is not finished ({path.name} is missing); train it to the end first") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); delete it and train with --workdir={workdir}, which writes it again") from None
    if missing:
        raise UserError(f"{path}: has no {missing[0]}, so that another version of vffjax wrote it; reproduce it with that one")
    return summary


def _fields(where: str, one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    keys = list(dict.fromkeys([*one, *other]))
    return [f"{where} {key}: {one.get(key)} then, {other.get(key)} now".strip() for key in keys if one.get(key) != other.get(key)]


def _surroundings(summary: dict[str, Any]) -> dict[str, Any]:
    return {key: summary.get(key, LATER.get(key)) for key in SURROUNDINGS}


def _compare_checkpoints(one: pathlib.Path, other: pathlib.Path) -> tuple[int, list[str]]:
    """The number of arrays that both runs have saved, and a line for each that differs."""
    epochs, count, found = [checkpoint.Checkpoints(folder).epochs() for folder in (one, other)], 0, []
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
    run = load_run(workdir, str(epoch))
    named = {f"group{i}": state for i, state in enumerate(run.states)} | {"task": run.task}
    leaves = jax.tree_util.tree_leaves_with_path(named)
    return [(jax.tree_util.keystr(path, simple=True, separator="."), np.asarray(leaf)) for path, leaf in leaves]
