"""Paths as users write them: with `~`, as addresses, or with characters that checkpoints cannot have in their path. Needs no JAX."""

import itertools
import os
import pathlib
import re

from vffjax.errors import UserError

# At least two letters, because one letter is a drive of Windows. One slash, because pathlib turns `gs://bucket` into `gs:/bucket`.
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
# The characters of file name patterns: Orbax finds its checkpoints by a pattern that begins with the folder's path.
_PATTERN = r"[]*?" + ("" if os.sep == "\\" else "\\")


def problem_of(text: str) -> str:
    """What is wrong with the text as a local path, and the fix; '' if nothing is."""
    address = _ADDRESS.match(text)
    supported = "only local files and folders are supported: mount the bucket or the remote disk, and give the folder where it is mounted"
    return f"is an address, because it begins with {address[0]}; {supported}" if address else ""


def local(text: str | os.PathLike[str], named: str) -> pathlib.Path:
    """The path, with `~` or `~user` at its beginning replaced by the home folder.

    Args:
        text: the path as the user wrote it.
        named: the flag or key that gave it, for the message.

    Raises:
        UserError: the path is an address such as `gs://bucket/run`, or the user of `~user` has no home folder.
    """
    shown = os.fspath(text)
    if problem := problem_of(shown):
        raise UserError(f"{named}={shown}: {problem}")
    expanded = os.path.expanduser(shown)
    if expanded.startswith("~"):
        user = expanded.partition(os.sep)[0]
        problem = f"there is no user {user[1:]!r}, whose home folder {user} means"
        raise UserError(f"{named}={shown}: {problem}; write ./{user} for a folder of that name")
    return pathlib.Path(expanded)


def check_run_folder(folder: str | os.PathLike[str], named: str = "--workdir") -> None:
    """Raises `UserError` if no checkpoint can be written to this folder and found again.

    That is an address, a path that is not UTF-8, or a character of file name patterns in the path or in the path that its links lead to.
    `named` is the flag that gave the folder, for the message.
    """
    local(folder, named)
    if any("\ud800" <= c <= "\udfff" for c in os.path.realpath(folder)):
        raise UserError(f"{named}={os.fspath(folder)}: the path is not valid UTF-8, and no checkpoint could be written there; rename it")
    for path in (os.path.abspath(folder), os.path.realpath(folder)):
        found = [c for c in _PATTERN if c in path]
        if found:
            where = "" if path == os.fspath(folder) else f" (that is {path})"
            problem = f"the path holds {found[0]!r}, and checkpoints under it could not be found again"
            raise UserError(f"{named}={os.fspath(folder)}{where}: {problem}; give a path without any of {' '.join(_PATTERN)}")


def cache_folder(kind: str) -> pathlib.Path:
    """The folder for what can be made again: `$XDG_CACHE_HOME/vffjax/KIND`, or `~/.cache/vffjax/KIND`. It need not exist."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return pathlib.Path(home) / "vffjax" / kind


def refuse_links(workdir: pathlib.Path, *folders: str) -> None:
    """Raises `UserError` if a link in a workdir, or deeper in one of these folders in it, leads out of the workdir.

    It may have been packed by somebody else, and nothing is written outside of it.
    """
    root = os.path.realpath(workdir)
    for path in itertools.chain(workdir.glob("*"), *((workdir / name).rglob("*") for name in folders)):
        # Not resolve(), which raises if links form a circle.
        if path.is_symlink() and not pathlib.Path(os.path.realpath(path)).is_relative_to(root):
            raise UserError(f"{path}: a link that leads out of --workdir {workdir}; remove it, or give another --workdir")
