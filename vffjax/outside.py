"""Code from outside of this package: a rule, network or data source that a configuration names as `my_module:RULE`.

Such code is run only from a folder that a person has named: the folder of a configuration file that was given on a command line or loaded
by a program, or one that `allow` was told. A workdir's config.json can name code, but it can never say where the code lies.
"""

import contextlib
import importlib.machinery
import importlib.util
import itertools
import os
import pathlib
import re
import sys
import traceback
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

from vffjax import files
from vffjax.errors import UserError, bad_key, printable

MAX_FILE = 2**20  # bytes of a module
_folders: list[str] = []  # the newest last
_loaded: dict[tuple[str, str, str], "_Loaded"] = {}  # by file, digest and record
_numbers = itertools.count()


class _Loaded(NamedTuple):
    record: Any
    sha256: dict[str, str]  # of the module, and of each module beside it that it imported, by file name


def is_outside(name: str) -> bool:
    """Whether a name in a configuration means code from outside of this package."""
    return ":" in name


def allow(folder: pathlib.Path | str) -> None:
    """Lets modules directly in this folder be run where a configuration names them. Folders allowed later are searched first."""
    place = os.path.abspath(folder)
    if place in _folders:
        _folders.remove(place)
    _folders.append(place)


def load(key: str, name: str) -> Any:
    """The object that `config.KEY = "my_module:NAME"` names.

    A module is run once for each content that it has. Raises `UserError` if the name is malformed, if no allowed folder has the module, or
    if the module fails or lacks the object.
    """
    return _load(key, name).record


def sha256(names: dict[str, str]) -> dict[str, str]:
    """Digests of all files that outside code was run from, by file name.

    Args:
        names: configuration keys and their values; those that mean no outside code are passed over.
    """
    found: dict[str, str] = {}
    for key, name in names.items():
        if is_outside(name):
            found |= _load(key, name).sha256
    return found


def _load(key: str, name: str) -> _Loaded:
    parts = re.fullmatch(r"([A-Za-z_]\w*):([A-Za-z_]\w*)", name, re.ASCII)
    if not parts:
        raise bad_key(key, name, "not of the form MODULE:NAME", "give for example my_module:RULE, of a file my_module.py")
    file = next((path for folder in reversed(_folders) if os.path.isfile(path := os.path.join(folder, f"{parts[1]}.py"))), "")
    if not file:
        problem = f"{parts[1]}.py is code from outside of vffjax, and it lies in no folder that may be used"
        raise bad_key(key, name, problem, "put it beside the configuration file and give that by --config, or give its folder by --code")
    program = _program(file)
    where = (file, files.sha256(program), parts[2])
    if where not in _loaded:
        _loaded[where] = _run(key, name, file, program, parts[2])
    return _loaded[where]


def _program(file: str) -> bytes:
    try:
        return files.read_bytes(file, MAX_FILE)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}; give a Python file that can be read") from None


def _run(key: str, name: str, file: str, program: bytes, record: str) -> _Loaded:
    beside: dict[str, str] = {}
    try:
        with as_module(file, beside) as module:
            exec(compile(program, file, "exec", dont_inherit=True), module.__dict__)
        found = getattr(module, record)
    except (KeyboardInterrupt, UserError):
        raise
    except BaseException as error:  # a module is a program, which may even call sys.exit
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        line = getattr(error, "lineno", None) or (lines[-1] if lines else "?")
        reason = printable(f"{type(error).__name__}: {error}".partition("\n")[0], 300)
        raise bad_key(key, name, f"{file}, line {line}: {reason}", "correct the file") from error
    return _Loaded(
        found,
        {os.path.basename(file): files.sha256(program)}
        | {os.path.basename(other): files.sha256(_program(other)) for other in beside.values()},
    )


@contextlib.contextmanager
def as_module(file: str, beside: dict[str, str] | None = None) -> Iterator[types.ModuleType]:
    """An empty module to run the program of a file in. It stands in `sys.modules` while the program runs: dataclasses look it up there.

    The program can import modules from its own folder, which is first on the path. They are removed from `sys.modules` afterwards;
    otherwise another file would get them in place of its own modules of the same name. No byte code is written.

    Args:
        file: the program.
        beside: gets the names and files of the modules that the program imported from its folder.
    """
    folder = os.path.abspath(os.path.dirname(file))
    name = f"_vffjax_outside_{next(_numbers)}"
    spec = importlib.util.spec_from_file_location(name, file, loader=importlib.machinery.SourceFileLoader(name, file))
    assert spec is not None  # there is a loader
    module = importlib.util.module_from_spec(spec)
    known, path, writes = dict(sys.modules), list(sys.path), sys.dont_write_bytecode
    sys.modules[name] = module
    sys.path.insert(0, folder)
    sys.dont_write_bytecode = True
    importlib.invalidate_caches()
    try:
        yield module
    finally:
        sys.path[:], sys.dont_write_bytecode = path, writes
        for other in [other for other in sys.modules.keys() - known.keys() if other == name or _is_neighbour(other, folder)]:
            if beside is not None and other != name and (place := getattr(sys.modules[other], "__file__", None)):
                beside[other] = place
            del sys.modules[other]


def _is_neighbour(name: str, folder: str) -> bool:
    """Whether a module, or the package that it belongs to, lies directly in this folder.

    What lies deeper was imported by another entry of the path, such as a virtual environment below the folder, and stays. So does this
    package, which lies there too if the file is in the root of a checkout.
    """
    top = name.partition(".")[0]
    place = getattr(sys.modules.get(top, sys.modules[name]), "__file__", None) or ""
    return top != "vffjax" and os.path.abspath(place) in (os.path.join(folder, f"{top}.py"), os.path.join(folder, top, "__init__.py"))
