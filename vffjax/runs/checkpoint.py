"""Checkpoints: one Orbax step for each saved epoch.

A workdir's `checkpoints/EPOCH/` holds the items `group0`, `group1`, ... (parameters, batch statistics, optax state), `task` (codebook,
pixel statistics) and `run` (the run's state as JSON; see `runs.state`). `checkpoints/EPOCH.sha256.json` beside it holds the digests of all
files. It is written last and removed first: a step without it was interrupted and is not used. A file that differs from its digest is
damaged.

A run that is saved inside of an epoch writes the same into `checkpoints/inside/STEPS/`, which is deleted when a whole epoch has been saved.
"""

import contextlib
import errno
import os
import pathlib
import re
import shutil
from collections.abc import Mapping
from typing import Any

import orbax.checkpoint as ocp

from vffjax import hosts
from vffjax.errors import UserError
from vffjax.files import sha256_of, sync, write_json
from vffjax.networks.groups import States
from vffjax.rules.streams import Task
from vffjax.runs import state as run_state
from vffjax.runs.saved_epoch import SavedEpoch, check_readable, saved_files

FOLDER, INSIDE = "checkpoints", "inside"


class Checkpoints:
    """The saved epochs of one workdir. Whatever cannot be read raises `UserError`, which names the file."""

    def __init__(self, workdir: pathlib.Path, name: str = FOLDER):
        self.folder = pathlib.Path(workdir).resolve() / name

    @property
    def inside(self) -> "Checkpoints":
        """What was saved inside of an epoch. There the count of all steps of the run so far stands for the epoch's number."""
        return Checkpoints(self.folder, INSIDE)

    def epochs(self) -> list[int]:
        """The numbers of the epochs that are completely saved, in order."""
        return sorted(epoch for epoch in self._folders() if self._digests(epoch).exists())

    def missing(self) -> list[int]:
        """The numbers of epochs that were saved and whose folder is gone."""
        digests = (path.name.partition(".")[0] for path in self.folder.glob("*.sha256.json"))
        return sorted(int(epoch) for epoch in digests if epoch.isdigit() and not (self.folder / epoch).is_dir())

    def incomplete(self) -> list[int]:
        """The numbers of epochs whose folder has no digests: the run was killed while it saved them, or the digests are lost."""
        deleted = {path.name for path in self.folder.glob("*.deleted")}
        return sorted(epoch for epoch in set(self._folders()) - set(self.epochs()) if f"{epoch}.deleted" not in deleted)

    def aside(self) -> list[int]:
        """The epochs that were set aside and have not been trained again yet."""
        names = (path.name.removesuffix(".aside") for path in self.folder.glob("*.aside"))
        return sorted(int(name) for name in names if name.isdigit())

    def opened(self, epoch: int) -> SavedEpoch:
        """A saved epoch; nothing of it is read yet."""
        return SavedEpoch(self.folder / str(epoch), self._digests(epoch))

    def chosen(self, name: str) -> SavedEpoch:
        """The saved epoch that `best`, `latest` or a number means. Raises `UserError` if there is none.

        The best epoch has the least validation error, and is the last among equals; see `run_state.Rank`. To find it, only the `run` items
        are read.
        """
        if name == "latest":
            return self.opened(self._some_epochs()[-1])
        if name == "best":
            return max(map(self.opened, self._some_epochs()), key=lambda saved: run_state.rank(saved.run))
        epochs = self.epochs()
        if not name.isdecimal() or int(name) not in epochs:
            raise UserError(f"--epoch={name}: not saved; choose best, latest, or one of {', '.join(map(str, epochs)) or 'none'}")
        return self.opened(int(name))

    def set_aside(self, epoch: int) -> pathlib.Path:
        """Renames a saved epoch so that nothing uses it; returns its new path. It is deleted when its epoch has been trained again."""
        aside = self.folder / f"{epoch}.aside"
        shutil.rmtree(aside, ignore_errors=True)
        # The digests go first: without them the step is ignored, even if the process is killed here.
        self._digests(epoch).unlink(missing_ok=True)
        (self.folder / str(epoch)).rename(aside)
        return aside

    def clear(self, keep: int = 0) -> None:
        """Deletes all steps but the one with the number `keep`."""
        with contextlib.suppress(OSError):  # a network share may refuse to delete; the next writer tries again
            for path in self.folder.glob("*.sha256.json"):  # first: without its digests a step is ignored
                if path != self._digests(keep):
                    path.unlink()
            for path in self.folder.glob("*"):
                if path.is_dir() and path.name != str(keep):
                    shutil.rmtree(path)
            if not keep and self.folder.exists():
                shutil.rmtree(self.folder)

    def writer(self, known: Mapping[int, SavedEpoch] | None = None) -> "Writer":
        """A writer for further epochs; `known` are saved epochs that have been read already, by their numbers."""
        return Writer(self, known)

    def _folders(self) -> list[int]:
        return [int(p.name) for p in self.folder.glob("*") if re.fullmatch("[1-9][0-9]{0,9}", p.name) and p.is_dir()]

    def _some_epochs(self) -> list[int]:
        epochs = self.epochs()
        if not epochs and (incomplete := self.incomplete()):
            problem = f"not completely saved, or {self._digests(incomplete[-1]).name} is lost; restore that file"
            raise UserError(f"{self.folder / str(incomplete[-1])}: {problem}, or train with --workdir {self.folder.parent}")
        if not epochs:
            raise UserError(f"{self.folder}: no complete checkpoint; train first, with --workdir {self.folder.parent}")
        return epochs

    def _digests(self, epoch: int) -> pathlib.Path:
        return self.folder / f"{epoch}.sha256.json"


def _save_without_fsync() -> contextlib.ExitStack:
    """Makes TensorStore write without flushing, for a file system that cannot flush folders; `Writer.save` flushes what can be flushed.

    Orbax has no setting for this, only internal tables, which another version may have renamed. If they are not there nothing is changed,
    and TensorStore's own error will say what it cannot do. Closing the result restores the tables.
    """
    changed = contextlib.ExitStack()
    with contextlib.suppress(ImportError, AttributeError):
        from orbax.checkpoint._src.serialization import tensorstore_utils

        for context in (tensorstore_utils._BASE_TS_CONTEXT, tensorstore_utils._DEFAULT_OCDBT_TS_CONTEXT):
            changed.callback(context.update, dict(context))  # after the next line, because the last callback is called first
            changed.callback(context.clear)
            context["file_io_sync"] = False
    return changed


class Writer:
    """Saves epochs into a workdir, and keeps the two latest and the best. A workdir has one writer at a time.

    `known` are saved epochs that have been read already, by their numbers; the states of all others are read here.
    """

    def __init__(self, checkpoints: Checkpoints, known: Mapping[int, SavedEpoch] | None = None):
        self._checkpoints = checkpoints
        folder = checkpoints.folder
        if not folder.exists():
            folder.mkdir(parents=True, exist_ok=True)  # another process may have made it meanwhile
            for above in (folder.parent, folder.parent.parent):  # a power cut could otherwise lose the entry that leads to the folder
                with contextlib.suppress(OSError):  # nobody but its owner may be allowed to open it
                    sync(above)
        self._ranks = _agreed_ranks(checkpoints, known or {})
        self._first = max(self._ranks, default=0)
        with hosts.first_only() as first:
            if first:
                self._tidy()
        self._changed = contextlib.ExitStack() if sync(folder) else _save_without_fsync()
        self._manager = ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(enable_async_checkpointing=False))
        self._prune()  # the last run may have been killed before it could

    def _tidy(self) -> None:
        """Removes what earlier runs have left half written or half deleted."""
        checkpoints, folder = self._checkpoints, self._checkpoints.folder
        self._remove_halves()
        for path in folder.glob("*.deleted"):
            shutil.rmtree(path.with_suffix(""), ignore_errors=True)
            if not path.with_suffix("").exists():
                path.unlink()
        # Orbax would not save over an incomplete step. If only its digests are lost, its owner may still want it.
        for epoch in checkpoints.incomplete():
            checkpoints.set_aside(epoch)
        for epoch in checkpoints.missing():
            if epoch < self._first:  # the digests of a later one stay until it is trained again, as a sign that it may have been the best
                checkpoints._digests(epoch).unlink()

    def save(self, epoch: int, states: States, task: Task, run: dict[str, Any]) -> None:
        """Saves a step, and reads something of each item back before the step counts as saved. If it fails, earlier steps stay as they are.

        Args:
            epoch: the step's number: how many epochs are done.
            states: all groups.
            task: the run's task.
            run: the run's state; see `runs.state`.

        Raises:
            OSError: the disk refuses; the error names the step.
            UserError: what was saved cannot be read back, or another process has saved this step.
        """
        step = self._checkpoints.folder / str(epoch)
        if wrong := run_state.problem(run):
            raise UserError(f"{step}: not saved, because it could not be read again ({wrong} of the run's state is out of range)")
        arrays = {f"group{i}": state for i, state in enumerate(states)} | {"task": task}
        state = {"format": run_state.FORMAT} | run
        items = ocp.args.Composite(**{name: ocp.args.StandardSave(tree) for name, tree in arrays.items()}, run=ocp.args.JsonSave(state))
        # Orbax knows the steps that it has found or saved itself, and would write over one that has appeared since.
        if hosts.of_first(step.exists()) or not self._write(epoch, items):
            raise UserError(f"{step}: exists already, so that another run may be writing here; stop it, or give another --workdir")
        with hosts.first_only() as first:
            if first:
                self._complete(epoch, step, arrays, state)
        self._ranks[epoch] = run_state.rank(run)
        self._prune()
        with hosts.first_only() as first:
            if first:
                self._checkpoints.inside.clear()

    def _complete(self, epoch: int, step: pathlib.Path, arrays: dict[str, Any], state: dict[str, Any]) -> None:
        """Reads a step back that all processes have written, and writes its digests, which makes it count as saved."""
        try:
            check_readable(step, arrays, state)
        except UserError:
            shutil.rmtree(step, ignore_errors=True)
            raise
        digests = {path.relative_to(step).as_posix(): sha256_of(path) for path in saved_files(step)}
        # All files must be on disk before the digests are: else a power cut could leave digests beside empty files.
        for path in (*step.rglob("*"), step, self._checkpoints.folder):
            sync(path)
        write_json(self._checkpoints._digests(epoch), digests)

    @property
    def newest(self) -> int:
        """The number of the newest saved epoch, or 0."""
        return max(self._ranks, default=0)

    def close(self) -> None:
        """Ends the writing. To be called once."""
        self._manager.close()
        self._changed.close()

    def _write(self, epoch: int, items: ocp.args.Composite) -> bool:
        try:
            saved = self._manager.save(epoch, args=items)
            self._manager.wait_until_finished()
            return saved
        except OSError:
            self._remove_halves()
            raise
        except ValueError as error:  # TensorStore raises it for whatever the system says
            self._remove_halves()
            reason = next((words for words in _SYSTEM_ERRORS if words in str(error)), "cannot be written")
            raise OSError(_SYSTEM_ERRORS.get(reason, errno.EIO), reason, str(self._checkpoints.folder / str(epoch))) from error

    def _remove_halves(self) -> None:
        """Deletes what Orbax had not finished when it was killed or when the disk refused."""
        for path in self._checkpoints.folder.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(path)

    def _prune(self) -> None:
        """Deletes all steps but the latest of all and, of those that were due, the two latest and the best."""
        scheduled = sorted(epoch for epoch, rank in self._ranks.items() if rank.due)
        best = max(scheduled, key=self._ranks.__getitem__, default=None)
        newest = max(self._ranks, default=0)
        old = sorted(self._ranks.keys() - {*scheduled[-2:], best, newest})
        with hosts.first_only() as first:
            for epoch in old if first else ():
                self._delete(epoch)
            for epoch in self._checkpoints.aside() if first else ():
                if epoch in self._ranks or self._first < epoch <= newest:  # it has been trained again, to the same bits
                    shutil.rmtree(self._checkpoints.folder / f"{epoch}.aside")
        for epoch in old:
            del self._ranks[epoch]

    def _delete(self, epoch: int) -> None:
        # First the digests get another name, so that a step which is only half deleted is not taken for damaged or incomplete.
        self._checkpoints._digests(epoch).rename(self._checkpoints.folder / f"{epoch}.deleted")
        # A network share may refuse to delete a file that somebody still reads; the next writer tries again.
        with contextlib.suppress(OSError):
            if hosts.count() == 1:
                self._manager.delete(epoch)
            else:  # the manager would wait for the other processes, for ever if it fails here
                shutil.rmtree(self._checkpoints.folder / str(epoch))
            (self._checkpoints.folder / f"{epoch}.deleted").unlink()


def _agreed_ranks(checkpoints: Checkpoints, known: Mapping[int, SavedEpoch]) -> dict[int, run_state.Rank]:
    """The ranks of all saved epochs, as process 0 sees them: on a network share another process may see older names of files."""
    found = []
    if hosts.is_first():
        found = [(epoch, run_state.rank((known.get(epoch) or checkpoints.opened(epoch)).run)) for epoch in checkpoints.epochs()]
    return {epoch: run_state.Rank(*rank) for epoch, rank in hosts.of_first(found)}


_SYSTEM_ERRORS = {
    os.strerror(number): number for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG)
}
