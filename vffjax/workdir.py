"""A run's folder: whose it is, that one process writes it, where its run goes on, and what can be read back without the data."""

import contextlib
import itertools
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from vffjax.checkpoint import FOLDER, Checkpoints
from vffjax.config import Config, from_json
from vffjax.errors import UserError, bad_key
from vffjax.groups import GroupState
from vffjax.logbook import read_json
from vffjax.rules import Task
from vffjax.trainer import Plan, make_plan

try:
    import fcntl
except ImportError:  # Windows has no advisory locks of this kind; there two runs in one workdir are not refused
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"


def claim_workdir(workdir: pathlib.Path, config: Config) -> None:
    """Refuses a workdir that holds another configuration's run."""
    path = workdir / "config.json"
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir={workdir}: not a folder; give a folder, new or of the same run")
    _refuse_links(workdir)
    if not path.exists():
        if Checkpoints(workdir).epochs():
            raise UserError(f"--workdir={workdir}: has checkpoints but no {path.name}; restore it, or give another --workdir")
        return
    wanted, found = config.trained_by(), read_config(workdir).trained_by()
    for key in wanted:
        if wanted[key] != found[key]:
            raise bad_key(key, wanted[key], f"--workdir {workdir} holds a run with {found[key]!r}", "give another --workdir")


def _refuse_links(workdir: pathlib.Path) -> None:
    """What a run writes must lie in its workdir, also in one that somebody else has packed."""
    root = os.path.realpath(workdir)
    for path in itertools.chain(workdir.glob("*"), *((workdir / name).rglob("*") for name in (FOLDER, "tensorboard"))):
        # Not resolve(), which raises where links lead round in a circle.
        if path.is_symlink() and not pathlib.Path(os.path.realpath(path)).is_relative_to(root):
            raise UserError(f"{path}: a link that leads out of --workdir {workdir}; remove it, or give another --workdir")


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
    """Holds the workdir for this process. A lock is the kernel's: it goes with its process, however that ends."""
    with open(workdir / LOCK, "a") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"--workdir={workdir}: another run is writing here; wait for it, or give another --workdir") from None
        yield


def sound_epoch(checkpoints: Checkpoints, config: Config) -> int:
    """The newest saved epoch with no fault, where the run goes on; 0 if none is saved. Newer ones are set aside, and stderr says so.

    Raises `UserError` if there are saved epochs and all have a fault, or if one before the newest has: it may be the best.
    """
    saved = checkpoints.epochs()
    faults = {epoch: checkpoints.fault(epoch, config) for epoch in saved}
    newest = max((epoch for epoch in saved if not faults[epoch]), default=0)
    for epoch in saved:
        if faults[epoch] and (epoch < newest or not newest):
            raise UserError(faults[epoch])
    for epoch in saved:
        if epoch > newest:
            print(f"{faults[epoch].partition(';')[0]}; now {checkpoints.set_aside(epoch)}", file=sys.stderr)
    for epoch in checkpoints.missing():
        print(f"{checkpoints.folder / str(epoch)}: missing, though its digests are there", file=sys.stderr)
    if newest != max([*saved, *checkpoints.missing()], default=0):
        print(f"going on from epoch {newest}", file=sys.stderr)
    return newest


def read_config(workdir: pathlib.Path) -> Config:
    """The configuration of the run in `workdir`."""
    path = workdir / "config.json"
    try:
        return from_json(read_json(path), str(path))
    except FileNotFoundError:
        raise UserError(f"--workdir={workdir}: no run here ({path.name} is missing); give the folder of a run") from None
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); restore it, or start in a new --workdir") from None


def load_run(workdir: pathlib.Path | str, epoch: str = "best") -> tuple[Plan, tuple[GroupState, ...], Task, dict[str, Any]]:
    """A trained run without its data: plan, groups, task and run state of the `best`, the `latest`, or a numbered epoch."""
    workdir = pathlib.Path(workdir)
    config = read_config(workdir)
    checkpoints = Checkpoints(workdir)
    chosen = {"best": checkpoints.best, "latest": checkpoints.latest}.get(epoch, lambda: _numbered(checkpoints, epoch))()
    run = checkpoints.run(chosen)
    plan = make_plan(config, run["train_size"], len(run["class_names"]))
    states, task = checkpoints.restore(chosen, plan)
    return plan, states, task, run


def _numbered(checkpoints: Checkpoints, epoch: str) -> int:
    saved = checkpoints.epochs()
    if not epoch.isdecimal() or int(epoch) not in saved:
        raise UserError(f"--epoch={epoch}: not saved; choose best, latest, or one of {', '.join(map(str, saved)) or 'none'}")
    return int(epoch)
