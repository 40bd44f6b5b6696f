"""Checkpoints: one Orbax step per saved epoch, with one item per group, the task's arrays, and the run's state as JSON.

A workdir's `checkpoints/EPOCH/` holds `group0`, `group1`, ... (parameters, batch statistics, optax state), `task` (codebook, pixel
statistics) and `run` (epoch, seed, voting groups, sizes, class names). `checkpoints/EPOCH.sha256.json` beside it is written last:
a step without it was interrupted and is not used; a file that differs from it is damaged and is named.
"""

import hashlib
import json
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from vffjax.errors import UserError
from vffjax.groups import GroupState
from vffjax.logbook import write_json
from vffjax.rules import Task
from vffjax.trainer import Plan, init_states

FOLDER = "checkpoints"
_OWN_CONFIG = "restore the run's own config.json, or start in a new --workdir"


class Checkpoints:
    """The saved epochs of one workdir. Every failure to read names the file and raises `UserError`."""

    def __init__(self, workdir: pathlib.Path):
        self.folder = pathlib.Path(workdir).resolve() / FOLDER

    def epochs(self) -> list[int]:
        """Completely saved epochs, in order."""
        found = [int(p.name) for p in self.folder.glob("*") if p.name.isdigit() and p.is_dir()]
        return sorted(epoch for epoch in found if self._digests(epoch).exists())

    def best(self) -> int:
        """The saved epoch with the least validation error, among equals the last; without validation data the last.

        Of a sequential run only epochs of the last stage reached count: before it, groups were still untrained.
        """
        return max(self._some_epochs(), key=lambda epoch: (*_rank(self.run(epoch)), epoch))

    def latest(self) -> int:
        return self._some_epochs()[-1]

    def run(self, epoch: int) -> dict[str, Any]:
        """The JSON state of a saved epoch."""
        self._verify(epoch, "run")
        return self._restore(epoch, run=ocp.args.JsonRestore())["run"]

    def restore(self, epoch: int, plan: Plan) -> tuple[tuple[GroupState, ...], Task]:
        """All groups and the task of a saved epoch."""
        self._verify(epoch)
        run = self.run(epoch)
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

    def _some_epochs(self) -> list[int]:
        epochs = self.epochs()
        if not epochs:
            raise UserError(f"{self.folder}: no complete checkpoint; train first, with --workdir {self.folder.parent}")
        return epochs

    def _digests(self, epoch: int) -> pathlib.Path:
        return self.folder / f"{epoch}.sha256.json"

    def _verify(self, epoch: int, item: str = "") -> None:
        """Compares the files of one item and of the step itself, or of all items, with their SHA-256."""
        step = self.folder / str(epoch)
        fix = f"delete {step} to go on from an earlier checkpoint, or start again in a new --workdir"
        try:
            expected = json.loads(self._digests(epoch).read_text())
            wanted = {name: digest for name, digest in expected.items() if not item or "/" not in name or name.startswith(f"{item}/")}
            if not any("/" in name for name in wanted):
                raise ValueError("no digests")
        except (OSError, ValueError, AttributeError):
            raise UserError(f"{self._digests(epoch)}: damaged checkpoint digests; {fix}") from None
        for name, digest in wanted.items():
            try:
                sound = _sha256(step / name) == digest
            except OSError as error:
                raise UserError(f"{step / name}: damaged checkpoint ({error.strerror}); {fix}") from None
            if not sound:
                raise UserError(f"{step / name}: damaged checkpoint (SHA-256 differs); {fix}")

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


class Writer:
    """Saves epochs into a workdir; keeps the two latest and the best. One writer at a time."""

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints
        folder = checkpoints.folder
        folder.mkdir(parents=True, exist_ok=True)
        complete = set(checkpoints.epochs())
        for path in list(folder.iterdir()):
            if path.is_dir() and ".orbax-checkpoint-tmp" in path.name:
                shutil.rmtree(path)
            elif path.is_dir() and path.name.isdigit() and int(path.name) not in complete:
                # Interrupted before its digests, or they are lost: nothing reads it, and Orbax would not save over it. It is kept aside.
                aside = path.with_name(f"{path.name}.incomplete")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
        keep = policies.AnyPreservationPolicy(
            [policies.LatestN(2), policies.BestN(get_metric_fn=_rank, n=1, keep_checkpoints_without_metrics=False)]
        )
        self._manager = ocp.CheckpointManager(
            folder, options=ocp.CheckpointManagerOptions(preservation_policy=keep, enable_async_checkpointing=False)
        )

    def save(self, epoch: int, states: tuple[GroupState, ...], task: Task, run: dict[str, Any]) -> None:
        """Saves all groups after `epoch` epochs. `run` must be JSON; `val_error` (percent or None) and `trained_groups` rank the step."""
        groups = {f"group{i}": ocp.args.StandardSave(state) for i, state in enumerate(states)}
        items = ocp.args.Composite(**groups, task=ocp.args.StandardSave(task), run=ocp.args.JsonSave(run))
        metrics = None if run["val_error"] is None else {key: run[key] for key in ("val_error", "trained_groups")}
        step = self._checkpoints.folder / str(epoch)
        # Orbax knows the steps that it has found or saved, and would write over one that came since.
        if step.exists() or not self._manager.save(epoch, args=items, metrics=metrics):
            raise UserError(f"{step}: exists already, so that another run may be writing here; stop it, or give another --workdir")
        self._manager.wait_until_finished()
        digests = {p.relative_to(step).as_posix(): _sha256(p) for p in sorted(step.rglob("*")) if p.is_file()}
        write_json(self._checkpoints._digests(epoch), digests)
        for path in self._checkpoints.folder.glob("*.sha256.json"):  # steps that the policy has removed
            if not (self._checkpoints.folder / path.name.split(".")[0]).is_dir():
                path.unlink()

    def close(self) -> None:
        self._manager.close()


def _rank(run: dict[str, Any]) -> tuple[int, float]:
    """The better, the greater."""
    return run["trained_groups"], -(run["val_error"] or 0.0)


def _check_fits(folder: pathlib.Path, abstract: Any) -> None:
    """Compares names, shapes and types of arrays with the saved ones; Orbax casts some differences, and leaves threads behind on others."""
    saved, here = ocp.StandardCheckpointHandler().metadata(folder).tree, ocp.tree.serialize_tree(abstract, keep_empty_nodes=True)
    found, wanted = ({name: f"{x.dtype}{list(x.shape)}" for name, x in ocp.tree.to_flat_dict(tree).items()} for tree in (saved, here))
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            difference = f"{'.'.join(name)} is {found.get(name, 'missing')}, not {wanted.get(name, 'missing')}"
            raise UserError(f"{folder}: saved by another network or optimizer ({difference}); {_OWN_CONFIG}")


def _sha256(path: pathlib.Path) -> str:
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
