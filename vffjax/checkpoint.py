"""Checkpoints: one Orbax step per saved epoch, with one item per group, the task's arrays, and the run's state as JSON.

A workdir's `checkpoints/EPOCH/` holds `group0`, `group1`, ... (parameters, batch statistics, optax state), `task` (codebook, pixel
statistics) and `run` (configuration, record of all epochs, voting groups, what trained it). `checkpoints/EPOCH.sha256.json` beside it is
written last and removed first: a step without it was interrupted and is not used; a file that differs from it is damaged and is named.
Digests find damage, not forgery: whoever can write files can write digests.
"""

import errno
import hashlib
import math
import os
import pathlib
import re
import shutil
import stat
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint._src.serialization import tensorstore_utils

from vffjax.config import Config, from_json
from vffjax.errors import UserError
from vffjax.groups import GroupState
from vffjax.logbook import read_json, sync, write_json
from vffjax.rules import Task
from vffjax.trainer import Plan, init_states

FOLDER = "checkpoints"
FORMAT = 2  # of the run's state
_OWN_CONFIG = "restore the run's own config.json, or start in a new --workdir"
_AGAIN = "train with this --workdir again, which goes back to a sound checkpoint, or start in a new one"


class Checkpoints:
    """The saved epochs of one workdir. Every failure to read names the file and raises `UserError`."""

    def __init__(self, workdir: pathlib.Path):
        self.folder = pathlib.Path(workdir).resolve() / FOLDER

    def epochs(self) -> list[int]:
        """Completely saved epochs, in order."""
        return sorted(epoch for epoch in self._folders() if self._digests(epoch).exists())

    def missing(self) -> list[int]:
        """Epochs that were saved and whose folder is gone."""
        digests = (path.name.partition(".")[0] for path in self.folder.glob("*.sha256.json"))
        return sorted(int(epoch) for epoch in digests if epoch.isdigit() and not (self.folder / epoch).is_dir())

    def incomplete(self) -> list[int]:
        """Epochs whose folder has no digests: one was being saved when the run was killed, or the digests are lost."""
        deleted = {path.name for path in self.folder.glob("*.deleted")}
        return sorted(epoch for epoch in set(self._folders()) - set(self.epochs()) if f"{epoch}.deleted" not in deleted)

    def best(self) -> int:
        """The saved epoch with the least validation error, among equals the last; without validation data the last.

        Of a sequential run only epochs of the last stage reached count: before it, groups were still untrained. An epoch that was saved
        only because the run was told to leave does not count: a run that nobody disturbs could not choose it.
        """
        return max(self._some_epochs(), key=lambda epoch: (*_rank(self.run(epoch)), epoch))

    def latest(self) -> int:
        return self._some_epochs()[-1]

    def run(self, epoch: int) -> dict[str, Any]:
        """The JSON state of a saved epoch."""
        self._verify(epoch, "run")
        run = self._restore(epoch, run=ocp.args.JsonRestore())["run"]
        step = self.folder / str(epoch)
        if not isinstance(run, dict) or run.get("format") != FORMAT:
            raise UserError(f"{step}: saved by another version of vffjax; read it with that one (summary.json names its commit)")
        if not _is_run_state(run):
            raise UserError(f"{step / 'run'}: not the state of a run; {_AGAIN}")
        if run["epoch"] != epoch:
            raise UserError(f"{step}: foreign checkpoint, of epoch {run['epoch']}; {_AGAIN}")
        return run

    def fault(self, epoch: int, config: Config) -> str:
        """What is wrong with a saved epoch of a run by `config`, in one line; empty if every file of it is as it was saved."""
        try:
            self._verify(epoch)
            self._check_config(epoch, self.run(epoch), config)
        except UserError as error:
            return str(error)
        return ""

    def set_aside(self, epoch: int) -> pathlib.Path:
        """Renames a saved epoch so that nothing uses it; returns where it is now. It goes when its epoch has been trained again."""
        aside = self.folder / f"{epoch}.aside"
        shutil.rmtree(aside, ignore_errors=True)
        # The digests first: without them the step counts for nothing, whatever happens next.
        self._digests(epoch).unlink(missing_ok=True)
        (self.folder / str(epoch)).rename(aside)
        return aside

    def restore(self, epoch: int, plan: Plan) -> tuple[tuple[GroupState, ...], Task]:
        """All groups and the task of a saved epoch."""
        self._verify(epoch)
        run = self.run(epoch)
        self._check_config(epoch, run, plan.config)
        groups = {f"group{i}": ocp.args.StandardRestore(state) for i, state in enumerate(_abstract_states(plan, run))}
        saved = len(list((self.folder / str(epoch)).glob("group*")))
        if saved != len(groups):
            raise UserError(f"{self.folder / str(epoch)}: saved by another network ({saved} groups, not {len(groups)}); {_OWN_CONFIG}")
        restored = self._restore(epoch, **groups, task=ocp.args.StandardRestore(_abstract_task(run)))
        return tuple(restored[name] for name in groups), restored["task"]

    def restore_group(self, epoch: int, plan: Plan, group: int) -> GroupState:
        """One group of a saved epoch; no file of another group is read."""
        name = f"group{group}"
        self._verify(epoch, name)
        return self._restore(epoch, **{name: ocp.args.StandardRestore(_abstract_states(plan, self.run(epoch))[group])})[name]

    def writer(self) -> "Writer":
        return Writer(self)

    def _folders(self) -> list[int]:
        return [int(p.name) for p in self.folder.glob("*") if re.fullmatch("[1-9][0-9]{0,8}", p.name) and p.is_dir()]

    def _some_epochs(self) -> list[int]:
        epochs = self.epochs()
        if not epochs:
            raise UserError(f"{self.folder}: no complete checkpoint; train first, with --workdir {self.folder.parent}")
        return epochs

    def _digests(self, epoch: int) -> pathlib.Path:
        return self.folder / f"{epoch}.sha256.json"

    def _check_config(self, epoch: int, run: dict[str, Any], config: Config) -> None:
        step = self.folder / str(epoch)
        saved, here = from_json(run["config"], f"{step}: foreign checkpoint").trained_by(), config.trained_by()
        for key in saved:
            if saved[key] != here[key]:
                difference = f"config.{key} is {saved[key]!r} there, not {here[key]!r}"
                raise UserError(f"{step}: foreign checkpoint, saved by another run ({difference}); {_OWN_CONFIG}")

    def _verify(self, epoch: int, item: str = "") -> None:
        """Compares the files of one item and of the step itself, or of all items, with their SHA-256."""
        step = self.folder / str(epoch)
        try:
            expected = read_json(self._digests(epoch))
            wanted = {name: digest for name, digest in expected.items() if not item or "/" not in name or name.startswith(f"{item}/")}
            if not any("/" in name for name in wanted):
                raise ValueError("no digests")
        except (OSError, ValueError, AttributeError):
            raise UserError(f"{self._digests(epoch)}: damaged checkpoint digests; {_AGAIN}") from None
        present = {path.relative_to(step).as_posix(): path for path in step.rglob("*") if not path.is_dir()}
        for path in present.values():
            if not stat.S_ISREG(path.lstat().st_mode):  # to read a pipe would wait for ever
                raise UserError(f"{path}: damaged checkpoint (not a file); {_AGAIN}")
        for name, digest in wanted.items():
            if name not in present:  # nor is a name that leads out of the step
                raise UserError(f"{step / name}: damaged checkpoint (no such file); {_AGAIN}")
            try:
                sound = sha256_of(present[name]) == digest
            except OSError as error:
                raise UserError(f"{step / name}: damaged checkpoint ({error.strerror}); {_AGAIN}") from None
            if not sound:
                raise UserError(f"{step / name}: damaged checkpoint (SHA-256 differs); {_AGAIN}")
        for name in present.keys() - expected.keys():
            raise UserError(f"{step / name}: foreign file in a checkpoint; remove it, or {_AGAIN}")

    def _restore(self, epoch: int, **items: Any) -> Any:
        try:
            for name, args in items.items():
                if isinstance(args, ocp.args.StandardRestore):
                    _check_fits(self.folder / str(epoch) / name, args.item)
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
                return checkpointer.restore(self.folder / str(epoch), args=ocp.args.Composite(**items))
        except (ValueError, KeyError, OSError, TypeError) as error:
            reason = str(error).splitlines()[0][:200]
            raise UserError(f"{self.folder / str(epoch)}: cannot be restored ({reason}); {_OWN_CONFIG}") from error


def _save_without_fsync() -> None:
    """For a file system that cannot flush folders, where TensorStore would refuse to write. `Writer.save` flushes what can be flushed.

    Orbax has no setting for it.
    """
    for context in (tensorstore_utils._BASE_TS_CONTEXT, tensorstore_utils._DEFAULT_OCDBT_TS_CONTEXT):
        context["file_io_sync"] = False


class Writer:
    """Saves epochs into a workdir; keeps the two latest and the best. One writer at a time."""

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints
        folder = checkpoints.folder
        folder.mkdir(parents=True, exist_ok=True)
        self._ranks = {epoch: _rank(checkpoints.run(epoch)) for epoch in checkpoints.epochs()}
        self._first = max(self._ranks, default=0)
        self._remove_halves()
        for path in folder.glob("*.deleted"):
            shutil.rmtree(path.with_suffix(""), ignore_errors=True)
            path.unlink()
        # Orbax would not save over what is incomplete. What is newer will be trained again; of what is older nobody knows whether it will.
        for epoch in checkpoints.incomplete():
            if epoch > self._first:
                shutil.rmtree(folder / str(epoch))
            else:
                checkpoints.set_aside(epoch)
        for epoch in checkpoints.missing():
            checkpoints._digests(epoch).unlink()
        if not sync(folder):
            _save_without_fsync()
        self._manager = ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(enable_async_checkpointing=False))
        self._prune()  # for a run that was killed before it could

    def save(self, epoch: int, states: tuple[GroupState, ...], task: Task, run: dict[str, Any]) -> None:
        """Saves all groups after `epoch` epochs. `run` must be JSON; its `val_error` (percent or None), `trained_groups` and `scheduled`
        rank the step. If the disk refuses, `OSError` names the step, and the earlier ones are as they were."""
        groups = {f"group{i}": ocp.args.StandardSave(state) for i, state in enumerate(states)}
        items = ocp.args.Composite(**groups, task=ocp.args.StandardSave(task), run=ocp.args.JsonSave({"format": FORMAT} | run))
        step = self._checkpoints.folder / str(epoch)
        # Orbax knows the steps that it has found or saved, and would write over one that came since.
        if step.exists() or not self._write(epoch, items):
            raise UserError(f"{step}: exists already, so that another run may be writing here; stop it, or give another --workdir")
        digests = {p.relative_to(step).as_posix(): sha256_of(p) for p in sorted(step.rglob("*")) if p.is_file()}
        # All on disk before the digests say so: else a power cut could leave digests of files that are empty.
        for path in (*step.rglob("*"), step, self._checkpoints.folder):
            sync(path)
        write_json(self._checkpoints._digests(epoch), digests)
        self._ranks[epoch] = _rank(run)
        self._prune()

    def close(self) -> None:
        self._manager.close()

    def _write(self, epoch: int, items: ocp.args.Composite) -> bool:
        try:
            saved = self._manager.save(epoch, args=items)
            self._manager.wait_until_finished()
            return saved
        except OSError:
            self._remove_halves()
            raise
        except ValueError as error:  # TensorStore's, whatever the system said
            self._remove_halves()
            reason = next((words for words in _SYSTEM_ERRORS if words in str(error)), "cannot be written")
            raise OSError(_SYSTEM_ERRORS.get(reason, errno.EIO), reason, str(self._checkpoints.folder / str(epoch))) from error

    def _remove_halves(self) -> None:
        """What Orbax had not finished when it was killed or refused."""
        for path in self._checkpoints.folder.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(path)

    def _prune(self) -> None:
        """Deletes what is no longer needed: all but the latest two and the best of the scheduled epochs, and the latest of all."""
        scheduled = sorted(epoch for epoch, rank in self._ranks.items() if rank[0])
        best = max(scheduled, key=lambda epoch: (self._ranks[epoch], epoch), default=None)
        newest = max(self._ranks, default=0)
        for epoch in self._ranks.keys() - {*scheduled[-2:], best, newest}:
            # Under another name at once: what is deleted by halves is not taken for a step that was damaged, nor for one without digests.
            self._checkpoints._digests(epoch).rename(self._checkpoints.folder / f"{epoch}.deleted")
            self._manager.delete(epoch)
            (self._checkpoints.folder / f"{epoch}.deleted").unlink()
            del self._ranks[epoch]
        for path in self._checkpoints.folder.glob("*.aside"):
            name = path.name.removesuffix(".aside")
            if name.isdigit() and self._first < int(name) <= newest:  # trained again, to the same bits
                shutil.rmtree(path)


_SYSTEM_ERRORS = {
    os.strerror(number): number for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG)
}


def _rank(run: dict[str, Any]) -> tuple[bool, int, float]:
    """The better, the greater; whether the epoch was to be saved anyway comes first."""
    return run["scheduled"], run["trained_groups"], -(run["val_error"] or 0.0)


def _is_run_state(run: dict[str, Any]) -> bool:
    """Whether everything that the rest of the library reads from a run's state is there, and of its kind: files may come from anyone."""

    def whole(value: Any, low: int, high: int = 2**53) -> bool:
        return type(value) is int and low <= value <= high

    def number(value: Any) -> bool:
        return type(value) in (int, float) and math.isfinite(value)

    def listed(key: str, sound: Callable[[Any], bool]) -> bool:
        return isinstance(run.get(key), list) and all(map(sound, run[key]))

    def line(record: Any) -> bool:
        times = isinstance(record, dict) and all(number(record.get(key)) for key in ("seconds", "images_per_second"))
        return times and (record.get("val_error") is None or number(record["val_error"]))

    return (
        all(whole(run.get(key), 1) for key in ("epoch", "trained_groups", "train_size", "peak_bytes"))
        and all(isinstance(run.get(key), kind) for key, kind in (("scheduled", bool), ("config", dict), ("data_sha256", str)))
        and number(run.get("compile_seconds"))
        and (run.get("val_error") is None or number(run["val_error"]))
        and listed("image_shape", lambda side: whole(side, 1, 4096))
        and len(run["image_shape"]) == 3
        and listed("class_names", lambda name: isinstance(name, str))
        and len(run["class_names"]) > 1
        and listed("voting", lambda group: whole(group, 0, run["trained_groups"] - 1))
        and len(run["voting"]) > 0
        and listed("origins", lambda origin: isinstance(origin, dict))
        and len(run["origins"]) > 0
        and listed("history", line)
        and [record.get("epoch") for record in run["history"]] == list(range(1, run["epoch"] + 1))
    )


def _check_fits(folder: pathlib.Path, abstract: Any) -> None:
    """Compares names, shapes and types of arrays with the saved ones; Orbax casts some differences, and leaves threads behind on others."""
    saved, here = ocp.StandardCheckpointHandler().metadata(folder).tree, ocp.tree.serialize_tree(abstract, keep_empty_nodes=True)
    found, wanted = ({name: f"{x.dtype}{list(x.shape)}" for name, x in ocp.tree.to_flat_dict(tree).items()} for tree in (saved, here))
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            difference = f"{'.'.join(name)} is {found.get(name, 'missing')}, not {wanted.get(name, 'missing')}"
            raise UserError(f"{folder}: saved by another network or optimizer ({difference}); {_OWN_CONFIG}")


def sha256_of(path: pathlib.Path | str) -> str:
    """Of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _abstract_states(plan: Plan, run: dict[str, Any]) -> tuple[GroupState, ...]:
    # Orbax restores optax states as plain dicts, unless it is given the tree that they had.
    return _on_one_device(jax.eval_shape(lambda: init_states(plan, tuple(run["image_shape"]))))


def _abstract_task(run: dict[str, Any]) -> Task:
    h, w, c = run["image_shape"]
    arrays: Any = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((len(run["class_names"]), h, w, c), (c,), (c,))]
    return _on_one_device(Task(*arrays))


def _on_one_device(tree: Any) -> Any:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)
