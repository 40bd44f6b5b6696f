"""Code from outside of this package: a rule, network or data source that a configuration names as `my_module:RULE`.

Such code is run only from a folder that a person has named: that of a configuration file given on a command line, of which only the
modules that the configuration itself names are run, or one that `allow` was told. A workdir's config.json can name code, but it can
never say where the code lies.
"""

import contextlib
import importlib
import importlib.machinery
import importlib.util
import inspect
import itertools
import os
import pathlib
import re
import sys
import traceback
import types
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from vffjax import files
from vffjax.errors import bad_key, printable

MAX_FILE = 2**20  # bytes of a module
_folders: dict[str, set[str] | None] = {}  # the modules that may be run, None for all; the folder allowed last stands last
_loaded: dict[tuple[str, str], "_Loaded"] = {}  # by file, and the record's name in it
_numbers = itertools.count()


class _Loaded(NamedTuple):
    record: Any
    folder: str
    sha256: dict[str, str]  # of the module, and of each module of its folder that it imported, by file name


def is_outside(name: str) -> bool:
    """Whether a name in a configuration means code from outside of this package."""
    return ":" in name


def allow(folder: pathlib.Path | str, names: Iterable[str] | None = None) -> None:
    """Lets modules directly in this folder be run where a configuration names them. The folder that was allowed last is searched first.

    A module that has been run is kept. If a file of it has changed, this call forgets it, and the module is run again when it is needed.

    Args:
        folder: where the modules lie.
        names: values of configuration keys; only modules that these name are allowed. None: all modules of the folder.
    """
    place = os.path.abspath(folder)
    before = _folders.pop(place, set())
    _folders[place] = None if before is None or names is None else before | {name.partition(":")[0] for name in names if is_outside(name)}
    for where, (_, home, digests) in list(_loaded.items()):
        if home == place and any(_digest(os.path.join(home, file)) != digest for file, digest in digests.items()):
            del _loaded[where]


def load(key: str, name: str, kind: type = object) -> Any:
    """The object that `config.KEY = "my_module:NAME"` names.

    Raises `UserError` if the name is malformed, if no allowed folder has the module, if the module fails or lacks the object, or if the
    object is of another kind.
    """
    found = _load(key, name)
    if not isinstance(found.record, kind):
        wanted, module, record = f"{kind.__module__}.{kind.__name__}", *name.split(":")
        problem = f"{record} in {os.path.join(found.folder, module)}.py is of type {type(found.record).__name__}"
        raise bad_key(key, name, problem, f"make it a {wanted}")
    return found.record


def sha256(names: dict[str, str]) -> dict[str, str]:
    """Digests of all files that outside code was run from, by file name.

    Args:
        names: configuration keys and their values; those that mean no outside code are passed over.
    """
    found: dict[str, str] = {}
    for key, name in names.items():
        if is_outside(name):
            for file, digest in _load(key, name).sha256.items():
                # Two folders may hold files of one name; then the digest is that of both digests.
                same = found.get(file, digest) == digest
                found[file] = digest if same else files.sha256((found[file] + digest).encode())
    return found


def _load(key: str, name: str) -> _Loaded:
    parts = re.fullmatch(r"([A-Za-z_]\w*):([A-Za-z_]\w*)", name, re.ASCII)
    if not parts:
        raise bad_key(key, name, "not of the form MODULE:NAME", "give for example my_module:RULE, of a file my_module.py")
    module, record = parts.groups()
    allowed = [folder for folder, modules in reversed(_folders.items()) if modules is None or module in modules]
    if not allowed:
        problem = f"{module}.py is code from outside of vffjax, and nobody who may has said where it lies"
        ways = "by --code, in Python by vffjax.outside.allow, or give by --config a configuration file beside it that names it"
        raise bad_key(key, name, problem, f"give its folder {ways}")
    file = next((path for folder in allowed if os.path.isfile(path := os.path.join(folder, f"{module}.py"))), "")
    if not file:
        raise bad_key(key, name, f"there is no {module}.py in {' or '.join(allowed)}", "put it there")
    folder = os.path.dirname(file)
    if os.path.dirname(os.path.realpath(file)) != os.path.realpath(folder):
        raise bad_key(key, name, f"{file} is a link that leads out of its folder", "put the file itself there")
    if (file, record) not in _loaded:
        _loaded[file, record] = _run(key, name, file, record)
    return _loaded[file, record]


def _run(key: str, name: str, file: str, record: str) -> _Loaded:
    try:
        program = files.read_bytes(file, MAX_FILE)
    except OSError as error:
        raise bad_key(key, name, f"{file}: {error.strerror or error}", "give a Python file that can be read") from None
    try:
        with as_module(file) as (module, beside):
            exec(compile(program, file, "exec", dont_inherit=True), module.__dict__)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a module is a program, which may even call sys.exit
        raise bad_key(key, name, "{}, line {}: {}".format(*failure(error, file)), "correct the file") from error
    if record not in vars(module):
        raise bad_key(key, name, f"{file} has no {record}", f"define {record} there, or name another object of that file")
    return _Loaded(vars(module)[record], os.path.dirname(file), beside | {os.path.basename(file): files.sha256(program)})


def failure(error: BaseException, file: str) -> tuple[str, int | str, str]:
    """Where the program of a file failed, or a module beside it, and what it said: a file, a line, and one line of text."""
    folder = os.path.dirname(os.path.abspath(file))
    frames: list[tuple[str, int | None]] = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError):
        frames.append((error.filename or "", error.lineno))
    place, line = next((f for f in reversed(frames) if f[1] and (f[0] == file or os.path.dirname(f[0]) == folder)), (file, None))
    try:
        plain = isinstance(error, (KeyError, SyntaxError)) and error.args  # their own text has quotes or the line's number
        text = str(error.args[0] if plain else error).partition("\n")[0]
    except Exception:  # the program may define the class of the error
        text = "without a message"
    return place, line or "?", f"{type(error).__name__}: {printable(text, 300)}"


@contextlib.contextmanager
def as_module(file: str) -> Iterator[tuple[types.ModuleType, dict[str, str]]]:
    """An empty module to run the program of a file in, and the digests of the files that the program imports from its own folder.

    The module stands in `sys.modules` while the program runs: dataclasses look it up there. The program can import modules from its own
    folder, which is first on the path. They are read from their source, and are removed from `sys.modules` afterwards; otherwise another
    file would get them in place of its own modules of the same name. No byte code is written.
    """
    folder = os.path.abspath(os.path.dirname(file))
    name = f"_vffjax_outside_{next(_numbers)}"
    spec = importlib.util.spec_from_file_location(name, file, loader=importlib.machinery.SourceFileLoader(name, file))
    assert spec is not None  # there is a loader
    module, beside = importlib.util.module_from_spec(spec), _Beside(folder)
    path, writes = list(sys.path), sys.dont_write_bytecode
    # What the process has imported from the folder before is set aside. Its files may have changed since, and they belong to the digests.
    aside = {other: sys.modules.pop(other) for other in list(sys.modules) if beside.holds(other)}
    sys.modules[name] = module
    sys.path.insert(0, folder)
    sys.meta_path.insert(0, beside)
    sys.dont_write_bytecode = True
    importlib.invalidate_caches()
    try:
        yield module, beside.sha256
    finally:
        new = [other for other in sys.modules if other == name or beside.holds(other)]
        for other in new:
            del sys.modules[other]
        sys.meta_path.remove(beside)
        sys.path[:], sys.dont_write_bytecode = path, writes
        sys.modules.update(aside)


class _Source(importlib.machinery.SourceFileLoader):
    """Compiles a module from its source, because the byte code beside it may be of another program."""

    def get_code(self, fullname: str) -> types.CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


class _Beside:
    """Finds the modules that lie in one folder, or in a package there, before Python does, and keeps the digests of their files."""

    def __init__(self, folder: str):
        self._folder = folder
        self.sha256: dict[str, str] = {}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        spec = importlib.machinery.PathFinder.find_spec(name, [self._folder] if path is None else path)
        if spec is None or spec.origin is None or not self._is_own(name, spec.origin):
            return None
        if isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Source(spec.loader.name, spec.loader.path)
        self.sha256[pathlib.Path(os.path.relpath(spec.origin, self._folder)).as_posix()] = _digest(spec.origin)
        return spec

    def holds(self, name: str) -> bool:
        """Whether an imported module lies in the folder, or in a package there."""
        # Static: a module may compute its attributes, as torch.classes does, or be loaded by the first question.
        file, path = (inspect.getattr_static(sys.modules.get(name), attribute, ()) for attribute in ("__file__", "__path__"))
        places = [file, *(path if isinstance(path, Iterable) else ())]
        return any(isinstance(place, str) and self._is_own(name, place) for place in places)

    def _is_own(self, name: str, place: str) -> bool:
        # What lies deeper than `TOP.py` or `TOP/` was imported by another entry of the path, such as a virtual environment below the
        # folder. This package lies in the folder too, if that is the root of a checkout.
        top = name.partition(".")[0]
        own = os.path.join(self._folder, top)
        return top not in ("vffjax", "__main__") and (place == own or os.path.abspath(place).startswith((f"{own}.", f"{own}{os.sep}")))


def _digest(file: pathlib.Path | str) -> str:
    """The SHA-256 of a file; empty if it cannot be read."""
    try:
        return files.sha256(files.read_bytes(file))
    except OSError:
        return ""
