"""Paths as people write them: `~`, addresses that are no folders, and characters that checkpoints cannot lie under. Needs no JAX."""

import os
import pathlib
import re

from vffjax.errors import UserError

# Of one letter it is a drive of Windows. One slash: pathlib makes `gs:/bucket` of `gs://bucket`.
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
# Orbax looks for its checkpoints by a pattern that begins with the folder's own path.
_PATTERN = r"[]*?" + ("" if os.sep == "\\" else "\\")


def problem_of(text: str) -> str:
    """Why this is no local path, and the way out; '' if it is one."""
    address = _ADDRESS.match(text)
    supported = "only local files and folders are supported: mount the bucket or the remote disk, and give the folder where it is mounted"
    return f"is an address, by its {address[0]} in front; {supported}" if address else ""


def local(text: str | os.PathLike[str], named: str) -> pathlib.Path:
    """The path, with `~` or `~user` at its beginning replaced by the home folder.

    Raises `UserError`, which calls the path `named`, for an address such as `gs://bucket/run`.
    """
    shown = os.fspath(text)
    if problem := problem_of(shown):
        raise UserError(f"{named}={shown}: {problem}")
    expanded = os.path.expanduser(shown)
    if expanded.startswith("~"):
        user = expanded.partition(os.sep)[0]
        raise UserError(
            f"{named}={shown}: there is no user {user[1:]!r} whose home folder {user} could be; write ./{user} for a folder of that name"
        )
    return pathlib.Path(expanded)


def check_run_folder(folder: str | os.PathLike[str], named: str = "--workdir") -> None:
    """Raises `UserError` if checkpoints in this folder could be written but not found again: its path, or where its links lead, holds a
    character of a file name pattern. Also for an address, which pathlib takes for a folder."""
    local(folder, named)
    if any("\ud800" <= c <= "\udfff" for c in os.path.realpath(folder)):
        raise UserError(f"{named}={os.fspath(folder)}: the path is not valid UTF-8, and no checkpoint could be written there; rename it")
    for path in (os.path.abspath(folder), os.path.realpath(folder)):
        found = [c for c in _PATTERN if c in path]
        if found:
            where = "" if path == os.fspath(folder) else f" (that is {path})"
            problem = f"the path holds {found[0]!r}, and checkpoints under it could not be found again"
            raise UserError(f"{named}={os.fspath(folder)}{where}: {problem}; give a path without any of {' '.join(_PATTERN)}")
