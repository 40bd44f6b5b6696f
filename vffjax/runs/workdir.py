"""A run's folder: which run it belongs to, its lock, the epoch from which its run goes on, and how a trained run is read from it."""

import contextlib
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from vffjax import files, paths
from vffjax.config import BITWISE, CHANGEABLE, Config, to_json
from vffjax.errors import UserError, bad_key, notice
from vffjax.networks.groups import GroupState
from vffjax.runs import lock, origin
from vffjax.runs import state as run_state
from vffjax.runs.checkpoint import FOLDER, Checkpoints
from vffjax.runs.saved_epoch import AGAIN, OWN_CONFIG, Fault, SavedEpoch
from vffjax.runs.trained import Trained
from vffjax.training.checks import from_json
from vffjax.training.plan import Plan, make_plan

LOCK = ".lock"
# What runs, and the commands that read them, write into a run's folder.
WRITTEN = (
    *(LOCK, "config.json", "metrics.jsonl", "summary.json", "curves.png", "features.png", "tensorboard", FOLDER),
    *("report", "report.html", "live.html", "weights.safetensors", "ensemble.stablehlo", "ensemble.json"),
)
_Read = TypeVar("_Read")


def claim_workdir(workdir: pathlib.Path, config: Config, named: str = "--workdir") -> None:
    """Raises `UserError` if a run by `config` cannot use this workdir: it holds a run by another configuration, is no folder, contains
    links that lead out of it, or has a path under which checkpoints could not be found again. `named` is the flag that gave it."""
    paths.check_run_folder(workdir, named)
    path = workdir / "config.json"
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"{named}={workdir}: not a folder; give a folder, new or of the same run")
    paths.refuse_links(workdir, FOLDER, "tensorboard")
    if not path.exists():
        if Checkpoints(workdir).epochs():
            raise UserError(f"{named}={workdir}: has checkpoints but no {path.name}; restore it, or give another {named}")
        return
    wanted, found = config.trained_by(), read_config(workdir).trained_by()
    for key in wanted:
        if wanted[key] != found[key]:
            raise bad_key(key, wanted[key], f"{named} {workdir} holds a run with {found[key]!r}", f"give another {named}")


def write_config(workdir: pathlib.Path, config: Config, trains: bool = True) -> list[str]:
    """Writes config.json for a run that begins, that goes on with other settings, or that has finished (then nothing `trains`).

    config.data_dir stays as it was when the run began, because the data may lie elsewhere only this time.

    Returns:
        A line for each key that has changed, and one more if these changes can change the bits of the result.
    """
    path = workdir / "config.json"
    before = read_config(workdir) if path.exists() else config
    keys = [key for key in (*CHANGEABLE, "schedule") if key != "data_dir" and getattr(before, key) != getattr(config, key)]
    if keys or not path.exists():
        files.write_json(path, to_json(config) | {"data_dir": before.data_dir})
    lines = [f"config.{key}: {getattr(before, key)!r} until here, {getattr(config, key)!r} from here on" for key in keys]
    piped = "pipeline" in (before.schedule, config.schedule)  # has the bits of one device; `stages.told` warns where others trained
    rounds = [key for key in keys if key not in (*BITWISE, "schedule", *["devices"] * piped)]
    return [*lines, "from here on the run need not have the bits of a run by one configuration"] if rounds and trains else lines


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
    """Locks the workdir for this process. The kernel releases the lock when the process ends, however it ends.

    Raises `UserError` if another process holds the lock. If the file system has no locks, one line on stderr says so.
    """
    with open(workdir / LOCK, "a") as file:
        try:
            free = lock.take(file)
        except OSError as error:
            free = True
            reason = error.strerror or error
            notice(f"{workdir / LOCK}: this file system cannot lock ({reason}); see to it yourself that no other run writes here")
        if not free:
            raise UserError(f"--workdir={workdir}: another run is writing here; wait for it, or give another --workdir")
        yield


def sound_epochs(checkpoints: Checkpoints, config: Config) -> tuple[dict[int, SavedEpoch], SavedEpoch | None]:
    """Finds the saved epochs that are sound, and the one from which the run goes on. Each file is read once.

    Epochs with a fault are set aside, and lines on stderr say what is damaged, incomplete or missing.

    Returns:
        The sound epochs by their numbers; and what the run goes on from: a save inside of an epoch, the newest sound epoch, or None.

    Raises:
        UserError: all saved epochs have a fault; or the best one has a fault or is gone, and no epoch that is still to be trained can
            replace it.
    """
    saved = {epoch: checkpoints.opened(epoch) for epoch in checkpoints.epochs()}
    faults = {epoch: fault for epoch, step in saved.items() if (fault := step.fault(config))}
    for fault in faults.values():
        if fault.repair not in (AGAIN, OWN_CONFIG):  # such as a foreign file, which is quickly removed; to train again would take an epoch
            raise fault
    sound = {epoch: step for epoch, step in saved.items() if epoch not in faults}
    newest = max(sound, default=0)
    if saved and not newest:
        raise _repair(checkpoints, faults[max(saved)], sound)
    lost = {epoch: f"{checkpoints.folder / str(epoch)}: missing, though its digests are there" for epoch in checkpoints.missing()}
    for epoch in checkpoints.incomplete():
        lost[epoch] = f"{checkpoints.folder / str(epoch)}: not completely saved, or its digests are lost"
    last_lost = max([*faults, *lost, *checkpoints.aside()], default=0)
    if newest > last_lost:
        # Only then: if a newer epoch was lost, it may have been the best, and the one that was best before it may have been deleted.
        check_best(checkpoints, sound[newest].run, sound, faults | {epoch: Fault(problem, AGAIN) for epoch, problem in lost.items()})
    for epoch, fault in faults.items():
        lost[epoch] = f"{fault.problem}; now {checkpoints.set_aside(epoch)}"
    for epoch in sorted(lost):
        notice(lost[epoch])
    begun = sound.get(newest)
    inside = _sound_inside(checkpoints, config, newest)
    # A best epoch that is gone is a reason to train it again, unless a lost epoch is still to come, which may be better.
    if inside is not None and (run_state.best_epoch(inside.run) in {0, *sound} or last_lost > inside.run["epoch"]):
        begun = inside
    if lost:
        notice(f"going on inside of epoch {begun.run['epoch'] + 1}" if begun and begun is inside else f"going on from epoch {newest}")
    return sound, begun


def _sound_inside(checkpoints: Checkpoints, config: Config, newest: int) -> SavedEpoch | None:
    """The newest sound save inside of an epoch that comes after epoch `newest`; None if there is none."""
    for number in reversed(checkpoints.inside.epochs()):
        saved = checkpoints.inside.opened(number)
        if fault := saved.fault(config):
            notice(f"{fault.problem}; it was saved inside of an epoch, which is trained again from its start")
        elif saved.run["epoch"] >= newest:
            return saved
    return None


def check_best(
    checkpoints: Checkpoints, run: dict[str, Any], sound: Mapping[int, SavedEpoch], faults: Mapping[int, Fault] | None = None
) -> SavedEpoch | None:
    """The best epoch by a run's record; None if there is none yet.

    Args:
        checkpoints: the run's checkpoints.
        run: the run's state, which holds the record.
        sound: saved epochs that have been read already, by their numbers.
        faults: the faults of the others.

    Raises:
        UserError: that epoch has a fault or is gone. Otherwise another epoch would be taken for the best.
    """
    best = run_state.best_epoch(run)
    if not best:
        return None
    fault = (faults or {}).get(best)
    if fault is None and best not in checkpoints.epochs():
        fault = Fault(f"{checkpoints.folder / str(best)}: gone", AGAIN)
    if fault is not None:
        raise _repair(checkpoints, Fault(f"{fault.problem}, and it is the best epoch", fault.repair), sound)
    return sound.get(best) or checkpoints.opened(best)


def _repair(checkpoints: Checkpoints, fault: Fault, sound: Mapping[int, SavedEpoch]) -> UserError:
    """The error for a fault in a saved epoch that the run needs. It advises the smallest repair, and never to delete anything."""
    if fault.repair != AGAIN:
        return fault
    others = f", or read epoch {max(sound)} with vffjax evaluate --epoch {max(sound)}" if sound else ""
    repair = f"restore it from a copy, or move {checkpoints.folder} away to train again from the start{others}"
    return UserError(f"{fault.problem}; {repair}")


def read_config(workdir: pathlib.Path) -> Config:
    """The configuration of the run in `workdir`. Raises `UserError` if there is none, or if it cannot be read."""
    path = workdir / "config.json"
    try:
        return from_json(files.read_json(path), str(path))
    except FileNotFoundError:
        raise UserError(f"--workdir={workdir}: no run here ({path.name} is missing); give the folder of a run") from None
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); restore it, or start in a new --workdir") from None


def load_run(workdir: pathlib.Path | str, epoch: str = "best") -> Trained:
    """A trained run, read without its data set. The run may be training meanwhile.

    Args:
        workdir: the run's folder.
        epoch: best, latest, or the number of a saved epoch.

    Raises:
        UserError: there is no run, no such epoch, or one of its files is damaged.
    """
    return _read_run(workdir, epoch, lambda saved, plan: Trained(plan, *saved.restore(plan), saved.run))


def load_group(workdir: pathlib.Path | str, group: int, epoch: str = "best") -> tuple[Plan, GroupState, dict[str, Any]]:
    """One group of a trained run, with its plan and run state.

    No file of another group is read, so that the group can be saved from a run whose other files are damaged. Arguments and errors are
    those of `load_run`; it is also an error if the network has no such group.
    """

    def read(saved: SavedEpoch, plan: Plan) -> tuple[Plan, GroupState, dict[str, Any]]:
        if group >= len(plan.groups):
            raise UserError(f"--group={group}: the network has {len(plan.groups)} groups; give one from 0 to {len(plan.groups) - 1}")
        return plan, saved.restore_group(plan, group), saved.run

    return _read_run(workdir, epoch, read)


def _read_run(workdir: pathlib.Path | str, epoch: str, read: Callable[[SavedEpoch, Plan], _Read]) -> _Read:
    workdir = paths.local(workdir, "--workdir")
    paths.check_run_folder(workdir)
    config = read_config(workdir)

    def with_plan(saved: SavedEpoch) -> _Read:
        origin.check_code(saved.run, config)
        return read(saved, make_plan(config, saved.run["train_size"], len(saved.run["class_names"])))

    return while_it_trains(Checkpoints(workdir), epoch, with_plan)


def while_it_trains(checkpoints: Checkpoints, epoch: str, read: Callable[[SavedEpoch], _Read]) -> _Read:
    """The result of `read` for the chosen epoch. If a run that is training deletes that epoch meanwhile, it is chosen again."""
    while True:
        listed, chosen = checkpoints.epochs(), None
        try:
            chosen = checkpoints.chosen(epoch)
            return read(chosen)
        except Fault as fault:
            if checkpoints.epochs() == listed:
                # A run goes back only from its newest epoch.
                goes_back = len(listed) > 1 and chosen is not None and chosen.epoch == listed[-1]
                raise fault if goes_back else _repair(checkpoints, fault, {}) from None
        except UserError:
            if checkpoints.epochs() == listed:
                raise
