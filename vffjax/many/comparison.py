"""Reads several runs, and shows in what they differ and what came out of it."""

import contextlib
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vffjax import data
from vffjax.config import Config
from vffjax.errors import UserError, notice, printable
from vffjax.many.tables import Spread, markdown, named
from vffjax.runs import plots
from vffjax.runs.logbook import finished, read_metrics
from vffjax.runs.workdir import read_config

_LONGEST = 40  # characters of a value in the table
_DASH = "-"


def folders_of(given: Iterable[pathlib.Path]) -> list[pathlib.Path]:
    """The runs' folders: each folder given that holds a run, and the runs in each folder of runs and in each that `vffjax sweep` wrote.

    Files beside them, as `runs/*` names them too, are passed over.

    Raises:
        UserError: a folder holds none of these, or only files were given.
    """
    found, files = list[pathlib.Path](), list[pathlib.Path]()
    for folder in given:
        inside = sorted(path.parent for pattern in ("runs/*/config.json", "*/config.json") for path in folder.glob(pattern))
        if (folder / "config.json").is_file():
            found.append(folder)
        elif inside:
            found += inside
        elif folder.is_file():
            files.append(folder)
        else:
            raise UserError(f"{folder}: neither a run nor a sweep nor a folder of runs; give such folders")
    if files and not found:
        raise UserError(f"{files[0]}: a file; give folders of runs or of sweeps")
    if files:
        notice(f"{files[0]}: passed over, since it is a file" + f"; so are {len(files) - 1} more" * (len(files) > 1))
    return list({path.resolve(): path for path in found}.values())


def read(folders: Sequence[pathlib.Path]) -> dict[str, Any]:
    """What the table and the picture show.

    Args:
        folders: of runs, which may be training.

    Returns:
        `keys` in which the runs differ, as far as they make a run another one; `runs`, each with `name`, `row` (what it has in common with
        the runs of other seeds), `values` of these keys, `seed`, errors in percent, `epochs` done, `total_epochs`, `seconds` of training,
        `images_per_second`, `device`, `data_sha256` and `records`.

    Raises:
        UserError: a configuration cannot be read.
    """
    configs = [_compared(read_config(folder)) for folder in folders]
    keys = [key for key in configs[0] if key != "seed" and any(config[key] != configs[0][key] for config in configs)]
    runs = []
    for name, folder, config in zip(_names(folders), folders, configs, strict=True):
        values = {key: config[key] for key in keys}
        runs.append({"name": name, "row": named(values), "values": values, "seed": config["seed"]} | _measured(folder))
    return {"keys": keys, "runs": runs}


def _compared(config: Config) -> dict[str, Any]:
    """The keys that make a run another one. data_dir is among them where it is what names the images."""
    by_data_dir = False
    with contextlib.suppress(UserError):  # of a source of one's own, whose code may not be run here
        by_data_dir = data.find(config).by_data_dir
    return config.trained_by() | {"data_dir": config.data_dir if by_data_dir else ""}


def _names(folders: Sequence[pathlib.Path]) -> list[str]:
    """As much of the end of each path as tells it from the others."""
    parts, kept = [folder.resolve().parts for folder in folders], 1
    while len({path[-kept:] for path in parts}) < len(parts):
        kept += 1
    return [printable("/".join(path[-kept:])) for path in parts]


def _measured(folder: pathlib.Path) -> dict[str, Any]:
    """Of a run that has not finished: its lowest validation error so far, and no test error."""
    records, summary = read_metrics(folder), finished(folder)
    errors, seconds = ([one for record in records if (one := _figure(record, key)) is not None] for key in ("val_error", "seconds"))
    found = summary or {}
    return {
        "val_error": _figure(found, "val_error") if summary else min(errors, default=None),
        "test_error": _figure(found, "test_error"),
        "epochs": max((record["epoch"] for record in records), default=0),
        "total_epochs": found["epochs"] if summary else plots.total_epochs(read_config(folder).to_dict(), records),
        "seconds": sum(seconds) if seconds else None,
        "images_per_second": _figure(found, "images_per_second"),
        "device": printable(str(found.get("device", "")), 100),
        "data_sha256": digest if isinstance(digest := found.get("data_sha256"), str) else None,
        "records": records,
    }


def _figure(record: dict[str, Any], key: str) -> float | None:
    """A number of a file that may come from anyone; None in the place of anything else."""
    value = record.get(key)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def text(found: dict[str, Any]) -> str:
    """What `read` returns as tables: of the runs; and, where runs differ in their seed alone, of means and standard deviations."""
    keys, runs = found["keys"], found["runs"]
    head = ["run", *keys, "seed", "validation error %", "test error %", "epochs", "seconds", "images/s"]
    parts = [markdown(head, [_cells(run, keys) for run in runs], 1 + len(keys))]
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault(run["row"], []).append(run)
    means = {row: _by_seed(group) for row, group in groups.items()}
    if any(len(seeds) > 1 for seeds in means.values()):
        parts += ["Mean and standard deviation over the seeds of finished runs:", _means(groups, means, keys)]
    images: dict[int, set[str]] = {}
    for run in runs:
        images.setdefault(run["seed"], set()).update({run["data_sha256"]} - {None})
    if any(len(digests) > 1 for digests in images.values()):
        parts.append("Runs of the same seed did not have the same images: the data have changed, or a key that chooses images differs.")
    return "\n\n".join(parts)


def _cells(run: dict[str, Any], keys: Sequence[str]) -> list[str]:
    errors = [_number(run[key], ".2f") for key in ("val_error", "test_error")]
    times = [f"{run['epochs']}/{run['total_epochs']}", _number(run["seconds"], ",.1f"), _number(run["images_per_second"], ",.0f")]
    return [run["name"], *_values(run, keys), str(run["seed"]), *errors, *times]


def _by_seed(group: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The finished runs of a group, one of each seed: a copy of a run says nothing about other seeds."""
    return list({run["seed"]: run for run in group if run["test_error"] is not None}.values())


def _means(groups: Mapping[str, Sequence[dict[str, Any]]], means: Mapping[str, Sequence[dict[str, Any]]], keys: Sequence[str]) -> str:
    """The table with a row for each group of runs that differ in their seed alone, over those that `_by_seed` has chosen."""
    rows = []
    for row, group in groups.items():
        figures = [_spread(means[row], key) for key in ("val_error", "test_error")]
        rows.append([*_values(group[0], keys), *figures, str(len(means[row]))])
    return markdown([*keys, "validation error %", "test error %", "n"], rows, len(keys))


def _values(run: dict[str, Any], keys: Sequence[str]) -> list[str]:
    return [plots.short(run["values"][key], _LONGEST) for key in keys]


def _number(value: float | None, spec: str) -> str:
    return _DASH if value is None else f"{value:{spec}}"


def _spread(runs: Sequence[dict[str, Any]], key: str) -> str:
    values = [run[key] for run in runs if run[key] is not None]
    return f"{Spread.of(values):.2f}" if values else _DASH
