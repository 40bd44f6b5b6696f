"""Trains the runs of a list, one after the other, at the lowest priority, and writes each into the ledger.

    python benchmarks/train_queue.py FILE.toml [--results results] [--runs runs/queue] [--quiet]

The list is TOML. Each run has a name, a configuration file, the keys that differ from it, and seeds (default: 0):

    [[run]]
    name = "cifar10-small-vff"
    config = "configs/cifar10.py:small"
    seeds = [0, 1, 2]
    set = { learning_rate = 1e-2 }

which is three runs, `cifar10-small-vff-s0` and so on. What all runs have in common may stand once in a table [common] with the keys config,
seeds and set; a run's own keys win. A run whose file `results/NAME.json` exists is passed over. Before each run the list
is read again, so that it may grow, shrink or change its order meanwhile. SIGTERM saves within seconds and leaves with status 143; the same
command goes on from there, inside of an epoch too. To time something else meanwhile, stop the process (SIGSTOP) and let it go on (SIGCONT).

`quiet` in the ledger says whether the seconds of a run can be trusted: only with --quiet, which states that nothing else runs, and only if
the machine's load did not contradict it.

This is not named queue.py, because every script of this folder that needs the standard library's `queue`, as PyTorch does, would get it.
"""

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
from vffjax.runs import experiment
from vffjax.runs.termination import Terminated, interruptible
from vffjax.training.checks import make_config

# Other processes that may want a processor while a run still counts as quiet.
_IDLE_LOAD = 0.5
_stopped: list[int] = []  # holds something if the process was stopped, and went on, since the run began


class Run(NamedTuple):
    """One run of a list."""

    name: str  # with its seed
    config_name: str
    changes: dict[str, Any]
    config: Config


def read_list(path: pathlib.Path) -> list[Run]:
    """The runs of a list in their order, one for each seed, every configuration checked. Raises `UserError` that names the run."""
    try:
        found = tomllib.loads(read_bytes(path).decode())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as TOML ({getattr(error, 'strerror', None) or error}); correct it") from None
    common = found.pop("common", {})
    if set(found) != {"run"} or not isinstance(found["run"], list) or not isinstance(common, dict):
        raise UserError(f"{path}: holds {', '.join(found) or 'nothing'}; give tables [[run]], perhaps [common], and nothing else")
    if not all(isinstance(entry, dict) and isinstance(entry.get("set", {}), dict) for entry in (common, *found["run"])):
        raise UserError(f"{path}: a run, or its set, is no table; give [[run]] and set = {{ KEY = VALUE }}")
    runs = [one for entry in found["run"] for one in _runs(path, common | entry | {"set": common.get("set", {}) | entry.get("set", {})})]
    for name in {run.name for run in runs}:
        if sum(run.name == name for run in runs) > 1:
            raise UserError(f"{path}: {name} stands there more than once; give each run a name of its own")
    return runs


def _runs(path: pathlib.Path, entry: Any) -> list[Run]:
    known = {"name", "config", "seeds", "set"}
    if not isinstance(entry, dict) or not {"name", "config"} <= set(entry) or set(entry) - known:
        raise UserError(f"{path}: a run has the keys {', '.join(map(str, entry))}; it needs name and config, and may have seeds and set")
    name, given, seeds, changes = str(entry["name"]), str(entry["config"]), entry.get("seeds", [0]), entry.get("set", {})
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", name):
        raise UserError(f"{path}: name={name!r}: not a file's name; use small letters, digits and hyphens")
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds) or "seed" in changes:
        raise UserError(f"{path}: {name}: seeds={seeds!r}: not a list of whole numbers; give seeds = [0, 1, 2], say, and no set.seed")
    try:
        base, _, _ = parse_train(["--config", given])
        changes = {key: tuple(value) if isinstance(value, list) else value for key, value in changes.items()}
        return [Run(f"{name}-s{s}", given, changes, make_config(base.to_dict() | changes | {"seed": s})) for s in seeds]
    except UserError as error:
        raise UserError(f"{path}: {name}: {error}") from None


def train(run: Run, runs: pathlib.Path, results: pathlib.Path, quiet: bool) -> None:
    """Trains one run, or goes on with it, and writes its record. A run that diverges gets a record of its problem."""
    workdir, load = runs / run.name, os.getloadavg()[0]
    quiet = quiet and not workdir.exists()  # a run that goes on has seconds of another time
    _stopped.clear()
    try:
        with naming_files(workdir):
            experiment.train(run.config, workdir)
    except UserError as error:
        if "is not finite" not in str(error) and "no step" not in str(error):
            raise
        notice(f"{run.name}: {error}")
        records.write(results, records.failed(run.name, run.config_name, run.changes, run.config, printable(str(error), 300)))
        return
    plan = experiment.plan_for(run.config, data.load(run.config))
    load = max(load, os.getloadavg()[0]) - (os.cpu_count() or 1)
    records.write(
        results, records.record(run.name, run.config_name, run.changes, plan, workdir, quiet and load < _IDLE_LOAD and not _stopped)
    )


def work(path: pathlib.Path, runs: pathlib.Path, results: pathlib.Path, quiet: bool) -> None:
    """Trains the list until every run of it has a record."""
    backend.start()
    while True:
        left = [run for run in read_list(path) if not (results / f"{run.name}.json").exists()]
        if not left:
            return
        print(f"== {time.strftime('%H:%M:%S')}  {left[0].name}, the first of {len(left)} left", file=sys.stderr, flush=True)
        train(left[0], runs, results, quiet)


@one_line(__file__)
def main() -> None:
    parser = parser_of(__file__, __doc__)
    parser.add_argument("file", type=pathlib.Path, metavar="FILE.toml")
    parser.add_argument("--results", type=pathlib.Path, default=pathlib.Path("results"), help="the ledger's folder; default: results")
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs/queue"), help="where the runs lie; default: runs/queue")
    parser.add_argument("--quiet", action="store_true", help="nothing else runs on this machine, so that seconds can be trusted")
    a = parser.parse_args()
    if hasattr(os, "nice") and not a.quiet:
        os.nice(19)
    if hasattr(signal, "SIGCONT"):
        signal.signal(signal.SIGCONT, lambda *_: _stopped.append(1))
    try:
        interruptible(lambda: work(a.file, a.runs, a.results, a.quiet))
    except Terminated as leave:
        print(f"train_queue: told to leave (SIGTERM): {leave}", file=sys.stderr, flush=True)
        os._exit(143)  # it may still be compiling what nobody will use
    except KeyboardInterrupt:
        os._exit(130)


if __name__ == "__main__":
    main()
