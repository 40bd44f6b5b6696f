"""A run's folder: whose it is, that one process writes it, and what can be read back from it without the data."""

import contextlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any

from vffjax.checkpoint import Checkpoints
from vffjax.config import Config, from_json
from vffjax.errors import UserError, bad_key
from vffjax.groups import GroupState
from vffjax.rules import Task
from vffjax.trainer import Plan, make_plan

try:
    import fcntl
except ImportError:  # Windows has no advisory locks of this kind; there two runs in one workdir are not refused
    fcntl = None  # type: ignore[assignment]

# Where the data lie does not change a run.
_FREE_KEYS = ("data_dir",)


def claim_workdir(workdir: pathlib.Path, config: Config) -> None:
    """Refuses a workdir that holds another configuration's run."""
    path = workdir / "config.json"
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir={workdir}: not a folder; give a folder, new or of the same run")
    if not path.exists():
        if Checkpoints(workdir).epochs():
            raise UserError(f"--workdir={workdir}: has checkpoints but no {path.name}; restore it, or give another --workdir")
        return
    wanted, found = config.to_dict(), read_config(workdir).to_dict()
    for key in wanted:
        if key not in _FREE_KEYS and wanted[key] != found[key]:
            raise bad_key(key, wanted[key], f"--workdir {workdir} holds a run with {found[key]!r}", "give another --workdir")


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
    """Holds the workdir for this process. A lock is the kernel's: it goes with its process, however that ends."""
    with open(workdir / ".lock", "a") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"--workdir={workdir}: another run is writing here; wait for it, or give another --workdir") from None
        yield


def read_config(workdir: pathlib.Path) -> Config:
    """The configuration of the run in `workdir`."""
    path = workdir / "config.json"
    try:
        return from_json(json.loads(path.read_text()), str(path))
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
