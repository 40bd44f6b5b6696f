"""One saved epoch, read from disk: the run's state, its groups and its task. Files are compared with their SHA-256 before they are read.

Digests find damage, not forgery: whoever can write the files can also write their digests.
"""

import contextlib
import functools
import json
import pathlib
import stat
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from vffjax import hosts, versions
from vffjax.config import Config
from vffjax.errors import UserError
from vffjax.files import read_json, sha256_of
from vffjax.networks.groups import GroupState, States
from vffjax.rules.streams import Task
from vffjax.runs import state as run_state
from vffjax.training.checks import from_json
from vffjax.training.plan import Plan, abstract_start

OWN_CONFIG = "restore the run's own config.json, or start in a new --workdir"
AGAIN = "train with this --workdir again, which goes back to a sound checkpoint, or start in a new one"
# Names of files and folders that operating systems, network shares and file managers put into any folder. They are ignored.
_DROPPED = {
    *(".ds_store", ".localized", ".appledouble", ".fseventsd", ".temporaryitems", ".spotlight-v100", ".trashes", "icon\r", "__macosx"),
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information"),
    *(".directory", "lost+found", "@eadir", "#recycle", ".dropbox", ".dropbox.attr", ".sync", ".ipynb_checkpoints"),
}
_DROPPED_PREFIXES = ("._", ".nfs", ".fuse_hidden", ".smbdelete", ".trash-", ".~lock.")


class Fault(UserError):
    """What is wrong with a saved epoch, as `problem`, and the smallest repair, as `repair`. The message holds both."""

    def __init__(self, problem: object, repair: str):
        super().__init__(f"{problem}; {repair}")
        self.problem, self.repair = str(problem), repair


class SavedEpoch:
    """An epoch of a run as it lies on disk. No file is read or verified twice.

    `folder` is its Orbax step, and `digests` the file beside it. Every method that reads raises `UserError`, which names the file.
    """

    def __init__(self, folder: pathlib.Path, digests: pathlib.Path):
        self.folder, self.epoch = folder, int(folder.name)
        self._digests = digests
        self._verified: set[str] = set()

    @functools.cached_property
    def run(self) -> dict[str, Any]:
        """The run's state; see `runs.state`."""
        self.verify("run")
        run = self._restore(run=ocp.args.JsonRestore())["run"]
        if not isinstance(run, dict) or run.get("format") != run_state.FORMAT:
            raise Fault(f"{self.folder}: {_other_format(run)}", "read it with that one (summary.json names its commit)")
        if wrong := run_state.problem(run):
            raise Fault(f"{self.folder / 'run'}: not the state of a run ({wrong})", AGAIN)
        if run_state.number(run) != self.epoch:
            raise Fault(f"{self.folder}: foreign checkpoint, of epoch {run['epoch']}", AGAIN)
        return run

    def fault(self, config: Config) -> Fault | None:
        """What is wrong with this epoch, which should be of a run by `config`; None if all of its files are as they were saved."""
        try:
            self.verify()
            self._check_config(config)
        except Fault as fault:
            return fault
        except UserError as error:  # of the configuration that was saved
            return Fault(error, OWN_CONFIG)
        return None

    def restore(self, plan: Plan) -> tuple[States, Task]:
        """All groups and the task."""
        self.verify()
        self._check_config(plan.config)
        task, states = _abstract_start(plan, self.run)
        wanted = {f"group{i}": state for i, state in enumerate(states)} | {"task": task}
        saved = sum(name.startswith("group") for name in _roots(self._expected))
        if saved != len(wanted) - 1:
            raise Fault(f"{self.folder}: saved by another network ({saved} groups, not {len(wanted) - 1})", OWN_CONFIG)
        restored = self._restore_arrays(wanted)
        return tuple(restored[name] for name in wanted if name != "task"), restored["task"]

    def restore_group(self, plan: Plan, group: int) -> GroupState:
        """One group alone. No file of another group is read."""
        name = f"group{group}"
        self.verify(name)
        self._check_config(plan.config)
        return self._restore_arrays({name: _abstract_start(plan, self.run)[1][group]})[name]

    def verify(self, item: str = "") -> None:
        """Compares files with their SHA-256: those of one item, such as `group0`, and of the step itself, or those of all items.

        A file that was compared before is not read again. Raises `Fault` if a file differs, is missing, or was not saved with the step.
        """
        expected = self._expected
        wanted = {name: digest for name, digest in expected.items() if not item or "/" not in name or name.startswith(f"{item}/")}
        if not any("/" in name for name in wanted):
            raise Fault(f"{self._digests}: damaged checkpoint digests", AGAIN)
        try:
            present = {path.relative_to(self.folder).as_posix(): path for path in saved_files(self.folder)}
            for path in present.values():
                if not stat.S_ISREG(path.lstat().st_mode):  # a pipe would block, and a link could lead anywhere
                    raise Fault(f"{path}: damaged checkpoint (not a file)", AGAIN)
        except OSError as error:
            raise Fault(f"{error.filename or self.folder}: damaged checkpoint ({error.strerror})", AGAIN) from None
        for name, digest in wanted.items():
            if name not in present:  # which is also true of names that lead out of the step
                raise Fault(f"{self.folder / name}: damaged checkpoint (no such file)", AGAIN)
            if name in self._verified:
                continue
            try:
                sound = sha256_of(present[name]) == digest
            except OSError as error:
                raise Fault(f"{self.folder / name}: damaged checkpoint ({error.strerror})", AGAIN) from None
            if not sound:
                raise Fault(f"{self.folder / name}: damaged checkpoint (SHA-256 differs)", AGAIN)
            self._verified.add(name)
        for name in sorted(present.keys() - expected.keys()):
            if not item or name.startswith(f"{item}/") or "/" not in name:
                where = self.folder / name.partition("/")[0] if name.partition("/")[0] not in _roots(expected) else self.folder / name
                raise Fault(f"{where}: foreign file or folder in a checkpoint, not saved with it", "move it out of there, and start again")

    @functools.cached_property
    def _expected(self) -> dict[str, str]:
        try:
            return read_json(self._digests)
        except (OSError, ValueError):
            raise Fault(f"{self._digests}: damaged checkpoint digests", AGAIN) from None

    def _check_config(self, config: Config) -> None:
        written = {"vffjax": self.run["origins"][-1].get("versions", {}).get("vffjax", "another version")}
        saved = from_json(written | self.run["config"], f"{self.folder}: foreign checkpoint").trained_by()
        here = config.trained_by()
        for key in saved:
            if saved[key] != here[key]:
                difference = f"config.{key} is {saved[key]!r} there, not {here[key]!r}"
                raise Fault(f"{self.folder}: foreign checkpoint, saved by another run ({difference})", OWN_CONFIG)

    def _restore_arrays(self, wanted: dict[str, Any]) -> Any:
        for name, abstract in wanted.items():
            with _readable(self.folder):
                _check_fits(self.folder / name, abstract)
        return self._restore(**{name: ocp.args.StandardRestore(abstract) for name, abstract in wanted.items()})

    def _restore(self, **items: Any) -> Any:
        with _readable(self.folder), _reader() as checkpointer:
            return checkpointer.restore(self.folder, args=ocp.args.Composite(**items))


@contextlib.contextmanager
def _readable(folder: pathlib.Path, fix: str = OWN_CONFIG) -> Iterator[None]:
    """Turns what Orbax and TensorStore raise on files that they cannot read into a `Fault`, whose one line names the step."""
    try:
        yield
    except (ValueError, KeyError, OSError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise Fault(f"{folder}: cannot be restored ({reason})", fix) from error


def _reader() -> ocp.Checkpointer:
    """Reads for this process alone. If several processes train together, each reads when it wants to, and waits for no other."""
    options, own = ocp.options.MultiprocessingOptions(), hosts.index()
    if hosts.count() > 1:
        options = ocp.options.MultiprocessingOptions(own, {own}, f"reader{own}")
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler(), multiprocessing_options=options)


def saved_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """All that lies below a saved epoch's folder, sorted, without folders and without what an operating system has put there."""
    return sorted(path for path in folder.rglob("*") if not any(map(_dropped, path.relative_to(folder).parts)) and not path.is_dir())


def _other_format(run: Any) -> str:
    """Says which version wrote a state that this version cannot read, as far as that can be told."""
    here = f"this is vffjax {versions.own()}, which reads format {run_state.FORMAT}"
    try:
        return f"saved by vffjax {run['origins'][-1]['versions']['vffjax']} in format {run['format']}; {here}"
    except (KeyError, TypeError, IndexError):
        return f"saved by another version of vffjax; {here}"


def _roots(names: Iterable[str]) -> set[str]:
    """The first parts of paths relative to a step: its items, and the files beside them."""
    return {name.partition("/")[0] for name in names}


def _dropped(name: str) -> bool:
    return name.lower() in _DROPPED or name.lower().startswith(_DROPPED_PREFIXES)


def check_readable(folder: pathlib.Path, items: dict[str, Any], run: dict[str, Any]) -> None:
    """Reads a step back through Orbax before its digests declare it complete, since digests of unreadable files would be worth nothing.

    Compared are the whole state of the run, the names, shapes and types of all arrays, and the bits of the smallest array of each item.

    Args:
        folder: the step.
        items: the trees that were saved, by name.
        run: the run's state that was saved.

    Raises:
        UserError: something cannot be read, or differs; the message names the step.
    """
    fix = "nothing of this epoch is kept; give a --workdir in another place"
    with _readable(folder, fix), _reader() as checkpointer:
        if checkpointer.restore(folder, args=ocp.args.Composite(run=ocp.args.JsonRestore()))["run"] != json.loads(json.dumps(run)):
            raise Fault(f"{folder / 'run'}: was read back with other values than were saved", "check the disk")
        for name, tree in items.items():
            _check_fits(folder / name, tree)
            leaves, structure = jax.tree.flatten(tree)
            smallest = min(range(len(leaves)), key=lambda i: leaves[i].size)
            wanted = [_abstract(leaf) if i == smallest else ocp.PLACEHOLDER for i, leaf in enumerate(leaves)]
            how = [ocp.ArrayRestoreArgs(sharding=_here()) for _ in leaves]
            args = ocp.args.PyTreeRestore(jax.tree.unflatten(structure, wanted), restore_args=jax.tree.unflatten(structure, how))
            found = jax.tree.leaves(checkpointer.restore(folder, args=ocp.args.Composite(**{name: args}))[name])[smallest]
            if np.asarray(found).tobytes() != np.asarray(leaves[smallest]).tobytes():
                raise Fault(f"{folder / name}: an array was read back with other bits than were saved", "check the disk")


def _check_fits(folder: pathlib.Path, tree: Any) -> None:
    """Raises `Fault` unless a tree's arrays have the names, shapes and types of the saved ones.

    Orbax itself would cast some arrays that differ, and leave threads behind on others.
    """
    saved, here = ocp.StandardCheckpointHandler().metadata(folder).tree, ocp.tree.serialize_tree(tree, keep_empty_nodes=True)
    found, wanted = ({name: f"{x.dtype}{list(x.shape)}" for name, x in ocp.tree.to_flat_dict(tree).items()} for tree in (saved, here))
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            difference = f"{'.'.join(name)} is {found.get(name, 'missing')}, not {wanted.get(name, 'missing')}"
            raise Fault(f"{folder}: saved by another network or optimizer ({difference})", OWN_CONFIG)


def _abstract_start(plan: Plan, run: dict[str, Any]) -> tuple[Task, States]:
    # Orbax restores optax states as plain dictionaries unless it is given a tree of the same structure.
    return jax.tree.map(_abstract, abstract_start(plan, tuple(run["image_shape"])))


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_here())


def _here() -> jax.sharding.SingleDeviceSharding:
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
