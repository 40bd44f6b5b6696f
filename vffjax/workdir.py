"""A run's folder: whose it is, that one process writes it, where its run goes on, and what can be read back without the data."""

import contextlib
import itertools
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from vffjax.checkpoint import FOLDER, Checkpoints
from vffjax.config import Config, from_json
from vffjax.errors import UserError, bad_key, notice
from vffjax.groups import GroupState
from vffjax.lock import take
from vffjax.logbook import read_json
from vffjax.paths import check_run_folder, local
from vffjax.rules import Task
from vffjax.trainer import Plan, make_plan

LOCK = ".lock"


def claim_workdir(workdir: pathlib.Path, config: Config) -> None:
    """Refuses a workdir that holds another configuration's run, or whose checkpoints could not be found again."""
    check_run_folder(workdir)
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
        try:
            free = take(file)
        except OSError as error:
            free = True
            reason = error.strerror or error
            notice(f"{workdir / LOCK}: this file system cannot lock ({reason}); see to it yourself that no other run writes here")
        if not free:
            raise UserError(f"--workdir={workdir}: another run is writing here; wait for it, or give another --workdir")
        yield


def sound_epoch(checkpoints: Checkpoints, plan: Plan) -> int:
    """The newest saved epoch with no fault, where the run goes on; 0 if none is saved. Others with a fault are set aside.

    stderr says what was found damaged, incomplete or missing. Raises `UserError` if there are saved epochs and all have a fault, or if the
    best has, or is gone, and nothing that the run will train can take its place.
    """
    saved = checkpoints.epochs()
    faults = {epoch: fault for epoch in saved if (fault := checkpoints.fault(epoch, plan.config))}
    sound = [epoch for epoch in saved if epoch not in faults]
    newest = max(sound, default=0)
    if saved and not newest:
        raise UserError(_start_again(checkpoints, faults[saved[-1]]))
    lost = {epoch: f"{checkpoints.folder / str(epoch)}: missing, though its digests are there" for epoch in checkpoints.missing()}
    for epoch in checkpoints.incomplete():
        lost[epoch] = f"{checkpoints.folder / str(epoch)}: not completely saved, or its digests are lost"
    if newest and newest > max([*faults, *lost], default=0):
        # Else something newer was there, for which an earlier best may have been deleted.
        check_best(checkpoints, plan, checkpoints.run(newest)["history"], faults | lost)
    for epoch in faults:
        lost[epoch] = f"{faults[epoch].partition(';')[0]}; now {checkpoints.set_aside(epoch)}"
    for epoch in sorted(lost):
        notice(lost[epoch])
    if lost:
        notice(f"going on from epoch {newest}")
    return newest


def check_best(checkpoints: Checkpoints, plan: Plan, history: list[dict[str, Any]], faults: Mapping[int, str]) -> None:
    """Raises `UserError` if the best epoch by the record is not among the sound: another would be taken for it."""
    best = plan.best(history)
    if best and (best in faults or best not in checkpoints.epochs()):
        fault = faults.get(best, f"{checkpoints.folder / str(best)}: gone")
        raise UserError(_start_again(checkpoints, f"{fault.partition(';')[0]}, and it is the best epoch"))


def _start_again(checkpoints: Checkpoints, fault: str) -> str:
    others = ", or read another epoch with vffjax evaluate --epoch N"
    return f"{fault.partition(';')[0]}; restore it, or delete {checkpoints.folder} to train again from the start{others}"


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
    workdir = local(workdir, "--workdir")
    check_run_folder(workdir)
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
