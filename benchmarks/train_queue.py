"""Trains the runs of a list one after the other, at the lowest priority, and writes a record of each into the ledger of results.

    python benchmarks/train_queue.py FILE.toml [FILE.toml ...] [--results results] [--runs runs/queue] [--by-name] [--quiet]

The list is TOML. Each run has a name, a configuration file, the keys that differ from it, and seeds (default: 0):

    [[run]]
    name = "cifar10-small-vff"
    config = "configs/cifar10.py:small"
    seeds = [0, 1, 2]
    set = { learning_rate = 1e-2 }

This makes three runs, `cifar10-small-vff-s0` to `-s2`. Values that all runs share can be given once in a table [common] with the keys
config, seeds, set and views; a run's own keys take precedence. With `views = "six"` the errors with test-time views are measured too. A
run whose record `results/NAME.json` exists is skipped. The list is read again before each run, so that runs can be added, removed and
reordered at any time. Of several lists, each begins when all runs of the one before are done or in the hands of another process.

Several processes may work on one list in one folder of runs: each takes the first run that no other is training. On two CPU cores, two
processes that are bound to one core each (`taskset -c 0`) train more images in the same time than one process on both. On a GPU several
processes overlap, one compiling while another trains: start one for each two cores of the CPU, give each its share of the memory by
XLA_PYTHON_CLIENT_MEM_FRACTION, and use --by-name. Each process then trains the runs of one name after the other, of which only the first
compiles, and leaves the other names to the other processes.

If a run is refused, such as one whose folder holds a run of another configuration, the others go on, and the script ends with status 2.

On SIGTERM the run saves its state within seconds and the script ends with status 143; the same command goes on from there, also within an
epoch. To time something else meanwhile, pause the process with SIGSTOP and resume it with SIGCONT.

`quiet` in a record says whether the seconds of the run can be trusted. This needs --quiet, which states that nothing else runs on the
machine, all cores of the machine, and a load that does not contradict it.

This file is not named queue.py, because scripts in this folder would then import it in the place of the standard library's `queue`, which
PyTorch needs.
"""

import contextlib
import functools
import os
import pathlib
import re
import signal
import sys
import time
import tomllib
from typing import Any, NamedTuple

import records
from arguments import one_line, parser_of
from vffjax import backend
from vffjax.cli.flags import parse_train
from vffjax.cli.options import naming_files
from vffjax.config import Config
from vffjax.data import load as data
from vffjax.errors import UserError, notice, printable
from vffjax.files import read_bytes
from vffjax.runs import experiment, lock
from vffjax.runs.loop import Diverged
from vffjax.runs.termination import Terminated, interruptible
from vffjax.training.checks import make_config
from vffjax.uses import evaluation

_IDLE_LOAD = 0.5  # A machine is quiet if no more other processes than this want a processor, on average.
_stopped: list[int] = []  # not empty if the process was paused and resumed since the run began


class Run(NamedTuple):
    """One run of a list."""

    name: str  # ends with its seed
    config_name: str
    changes: dict[str, Any]
    config: Config
    views: str = ""  # which views are measured besides, if any


def read_list(path: pathlib.Path) -> list[Run]:
    """Reads a list of runs from a TOML file.

    Returns:
        The runs in order, one for each seed, with checked configurations.

    Raises:
        UserError: the file cannot be read, or a run in it is not valid. The message names the file and the run.
    """
    try:
        found = tomllib.loads(read_bytes(path).decode())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as TOML ({getattr(error, 'strerror', None) or error}); correct it") from None
    common = found.pop("common", {})
    if set(found) != {"run"} or not isinstance(found["run"], list) or not isinstance(common, dict):
        raise UserError(f"{path}: holds {', '.join(found) or 'nothing'}; give only tables [[run]], and optionally one table [common]")
    if not all(isinstance(entry, dict) and isinstance(entry.get("set", {}), dict) for entry in (common, *found["run"])):
        raise UserError(f"{path}: a run, or its set, is no table; write [[run]] and set = {{ KEY = VALUE }}")
    runs = [one for entry in found["run"] for one in _runs(path, common | entry | {"set": common.get("set", {}) | entry.get("set", {})})]
    for name in {run.name for run in runs}:
        if sum(run.name == name for run in runs) > 1:
            raise UserError(f"{path}: {name} is given more than once; give each run a name of its own")
    return runs


def _runs(path: pathlib.Path, entry: Any) -> list[Run]:
    """The runs of one entry of the list, one for each seed."""
    known = {"name", "config", "seeds", "set", "views"}
    if not isinstance(entry, dict) or not {"name", "config"} <= set(entry) or set(entry) - known:
        raise UserError(
            f"{path}: a run has the keys {', '.join(map(str, entry))}; it needs name and config, and may have seeds, set and views"
        )
    name, given, seeds, changes = str(entry["name"]), str(entry["config"]), entry.get("seeds", [0]), entry.get("set", {})
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", name):
        raise UserError(f"{path}: name={name!r}: not a file's name; use small letters, digits and hyphens")
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds) or "seed" in changes:
        raise UserError(f"{path}: {name}: seeds={seeds!r}: not a list of whole numbers; give for example [0, 1, 2], and no set.seed")
    if (views := entry.get("views", "")) not in ("", "one", "mirror", "six"):
        raise UserError(f"{path}: {name}: views={views!r}: not known; give one, mirror or six, or leave it out")
    try:
        base, _, _ = parse_train(["--config", given])
        changes = {key: tuple(value) if isinstance(value, list) else value for key, value in changes.items()}
        return [Run(f"{name}-s{s}", given, changes, make_config(base.to_dict() | changes | {"seed": s}), views) for s in seeds]
    except UserError as error:
        raise UserError(f"{path}: {name}: {error}") from None


def train(run: Run, runs: pathlib.Path, results: pathlib.Path, quiet: bool) -> None:
    """Trains one run, or goes on with it, and writes its record. If the run diverges, its record names the problem.

    Args:
        run: the run.
        runs: the folder of all runs.
        results: the folder of the records.
        quiet: whether the machine is said to be quiet.
    """
    workdir, load = runs / run.name, os.getloadavg()[0]
    quiet = quiet and not workdir.exists()  # Some seconds of a run that goes on were measured at another time.
    _stopped.clear()
    try:
        with naming_files(workdir):
            experiment.train(run.config, workdir)
    except Diverged as error:
        notice(f"{run.name}: {error}")
        records.write(results, records.failed(run.name, run.config_name, run.changes, run.config, printable(str(error), 300)))
        return
    plan = experiment.plan_for(run.config, data.load(run.config))
    load = max(load, os.getloadavg()[0]) - (os.cpu_count() or 1)
    quiet = quiet and backend.cores() == os.cpu_count()  # A process that is bound to some of the cores has neighbours on the others.
    found = records.record(run.name, run.config_name, run.changes, plan, workdir, quiet and load < _IDLE_LOAD and not _stopped)
    if run.views:
        seen = evaluation.evaluate(workdir, views=run.views)
        found |= {"views": run.views, "test_error_views": seen["test_error"], "val_error_views": seen["val_error"]}
    records.write(results, found)
    # The log then holds what the record says, should the record be lost with a machine that is lent for a while.
    errors = ", ".join(
        f"{key} {found[key]:.2f} %" for key in ("test_error", "val_error", "test_error_views", "val_error_views") if key in found
    )
    print(f"{run.name}: {errors}", file=sys.stderr, flush=True)


def work(path: pathlib.Path, runs: pathlib.Path, results: pathlib.Path, quiet: bool, by_name: bool = False) -> list[str]:
    """Trains runs until each run of the list has a record, was refused, or is in the hands of another process.

    Args:
        path: the list.
        runs: the folder of all runs.
        results: the folder of the records.
        quiet: whether the machine is said to be quiet.
        by_name: whether to train the runs of one name, which differ by their seeds, before those of another one, and to begin with a name
            that no other process trains.

    Returns:
        The names of the runs that were refused. A line on stderr has said why.
    """
    backend.start()
    name, refused = "", list[str]()
    with contextlib.ExitStack() as own:  # holds the lock of the name that this process trains
        while True:
            left = [run for run in read_list(path) if run.name not in refused and not (results / f"{run.name}.json").exists()]
            if by_name and name not in (names := dict.fromkeys(_without_seed(run) for run in left)):
                own.close()
                name = next((other for other in names if _taken(runs / f"{other}.name.lock", own)), "")
            left.sort(key=lambda run: by_name and _without_seed(run) != name)
            with contextlib.ExitStack() as held:
                run = next((run for run in left if _taken(runs / f"{run.name}.lock", held)), None)
                if run is None:
                    print(f"train_queue: other processes train the {len(left)} runs that are left", file=sys.stderr, flush=True)
                    return refused
                if (results / f"{run.name}.json").exists():  # Another process has finished it since the list was read.
                    continue
                print(f"== {time.strftime('%H:%M:%S')}  {run.name}; {len(left)} are left", file=sys.stderr, flush=True)
                try:
                    train(run, runs, results, quiet)
                except UserError as error:
                    notice(f"{run.name}: {error}; the other runs go on")
                    refused.append(run.name)


def _without_seed(run: Run) -> str:
    return run.name.rpartition("-s")[0]


def _taken(path: pathlib.Path, held: contextlib.ExitStack) -> bool:
    """Takes the lock of a run or a name until `held` is closed. False if another process has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = held.enter_context(path.open("ab"))
    try:
        return lock.take(file)
    except OSError:
        notice(f"{path}: the file system has no locks; let one process alone work on this list")
        return True


@one_line(__file__)
def main() -> None:
    parser = parser_of(__file__, __doc__)
    parser.add_argument("files", type=pathlib.Path, nargs="+", metavar="FILE.toml")
    parser.add_argument("--results", type=pathlib.Path, default=pathlib.Path("results"), help="folder of the records; default: results")
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs/queue"), help="folder of the runs; default: runs/queue")
    parser.add_argument("--by-name", action="store_true", help="one name after the other, each process another one: compiles less on a GPU")
    parser.add_argument("--quiet", action="store_true", help="nothing else runs on this machine, so that the seconds can be trusted")
    a = parser.parse_args()
    if hasattr(os, "nice") and not a.quiet:
        os.nice(19)
    if hasattr(signal, "SIGCONT"):
        signal.signal(signal.SIGCONT, lambda *_: _stopped.append(1))
    refused: list[str] = []
    try:
        for path in a.files:
            read_list(path)  # so that a mistake in the last list is not found hours later
        for path in a.files:
            refused += interruptible(functools.partial(work, path, a.runs, a.results, a.quiet, a.by_name))
    except Terminated as leave:
        print(f"train_queue: told to leave (SIGTERM): {leave}", file=sys.stderr, flush=True)
        os._exit(143)  # at once, without waiting for a program that may still be compiling
    except KeyboardInterrupt:
        os._exit(130)
    if refused:
        raise UserError(f"{len(refused)} runs were refused, as said above: {', '.join(refused)}; correct them and start again")


if __name__ == "__main__":
    main()
