"""Runs a configuration file, which is a Python program, and reads what it returns. Every error names the file.

The file is given by its path, or by its name if it comes with vffjax (see `packaged`).
"""

import contextlib
import difflib
import inspect
import os
import pathlib
import re
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_collections

from vffjax import files, outside, paths
from vffjax.cli import packaged
from vffjax.config import Config, nearest_key
from vffjax.errors import UserError, printable
from vffjax.registry import outside_names

MAX_FILE = 2**20  # bytes; no configuration file is larger
_GIVE = "give a file such as configs/digits.py, or a name that vffjax configs lists"


def split_variant(given: str) -> tuple[str, str | None]:
    """Splits FILE[:VARIANT] into the file and the variant, or None. Paths may hold colons themselves, as C:\\configs\\digits.py does.

    The file is the longest part in front of a colon, or the whole, that exists. If none exists, the variant is the text behind the last
    colon, unless it looks like a part of a path.
    """
    colons = [i for i, c in enumerate(given) if c == ":"]
    for end in (len(given), *reversed(colons)):
        if os.path.exists(os.path.expanduser(given[:end])):
            return given[:end], given[end + 1 :] if end < len(given) else None
    file, colon, variant = given.rpartition(":")
    return (file, variant) if colon and not re.search(r"[/\\.]", variant) else (given, None)


class Loaded(NamedTuple):
    """A configuration file that has run."""

    module: types.ModuleType
    file: str
    shown: str  # the file or the name as it was given, without a variant
    variant: str | None

    @property
    def variants(self) -> tuple[str, ...] | None:
        """The variants that it declares. Empty: its `get_config` takes any. None: it takes none.

        Raises `UserError` if they are no names.
        """
        takes = bool(inspect.signature(self.module.get_config).parameters)
        variants = getattr(self.module, "VARIANTS", () if takes else None)
        if variants is not None and not (isinstance(variants, (tuple, list, dict, set)) and all(isinstance(v, str) for v in variants)):
            raise UserError(f"VARIANTS={printable(repr(variants), 100)}: not names; make it a tuple of them, as in configs/cifar10.py")
        return None if variants is None else tuple(variants)

    def config(self, variant: str | None) -> dict[str, Any]:
        """The keys and values, unchecked, that `get_config` returns for a variant, or without one.

        Raises `UserError` if either does not fit the other. Any exception of the program passes.
        """
        if not callable(get_config := getattr(self.module, "get_config", None)):
            raise UserError("the file has no function get_config; define it, as in configs/digits.py")
        parameters, variants = inspect.signature(get_config).parameters, self.variants
        if variant is not None and variants is None:
            raise UserError(f"the file has no variants; use --config={self.shown}")
        if variant is not None and variants and variant not in variants:
            raise UserError(f"the file has no variant {variant!r}; choose one of {', '.join(variants)}")
        if variant is None and any(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters.values()):
            known = f", one of {', '.join(variants)}" if variants else ""
            raise UserError(f"get_config needs {', '.join(parameters)}; give a variant, --config={self.shown}:NAME{known}")
        config = get_config() if variant is None else get_config(variant)
        if not isinstance(config, ml_collections.ConfigDict):
            raise UserError(f"get_config returns {type(config).__name__}; return a ConfigDict, as default_config() gives")
        return config.to_dict()


@contextlib.contextmanager
def running(given: str) -> Iterator[Loaded]:
    """Runs the file that `given` names, as FILE[:VARIANT] or NAME[:VARIANT]. Its functions may be called within.

    Raises:
        UserError: names the file, the line and the fix, whatever exception the program or its functions raise.
    """
    file, shown, variant = _located(given)
    # ml_collections could load the file too, but it reports errors as tracebacks, and it remembers the last file.
    try:
        with outside.as_module(file) as (module, _):
            exec(compile(_program(file), file, "exec", dont_inherit=True), module.__dict__)
            yield Loaded(module, file, shown, variant)
    except UserError as error:
        raise UserError(f"--config={given}: {error}") from None
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the program may raise anything, or call sys.exit
        place, line, reason = outside.failure(error, file)
        locked = re.search(r'Key "(\w+)" does not exist', reason)  # ml_collections adds the list of all keys
        problem = f"config.{locked[1]}: no such key; {nearest_key(locked[1])}" if locked else f"{reason}; correct the file"
        where = f"line {line}" if place == file else f"{place}, line {line}"
        raise UserError(f"--config={given}: {where}: {problem}") from error


def load_config_file(given: str) -> tuple[dict[str, Any], str]:
    """Runs the file that `given` names and calls its `get_config`.

    Returns:
        The keys and values of the `ConfigDict` that it returns, unchecked. And a name for them, such as digits or cifar10-small.

    Raises:
        UserError: as `running`.
    """
    with running(given) as loaded:
        return loaded.config(loaded.variant), pathlib.Path(loaded.file).stem + (f"-{loaded.variant}" if loaded.variant else "")


def allow_code(given: str, config: Config) -> None:
    """Lets the modules that a configuration names be run from the folder of its file.

    A person who gives a name has named no folder, and the files that come with vffjax need no code beside them.
    """
    if not packaged.is_name(given):
        folder = os.path.dirname(os.path.abspath(_located(given)[0]))
        outside.allow(folder, outside_names(vars(config)).values())


def _located(given: str) -> tuple[str, str, str | None]:
    """The file that --config=`given` means, the part of `given` that names it, and the variant or None."""
    if not packaged.is_name(given):
        shown, variant = split_variant(given)
        return str(paths.local(shown, "--config")), shown, variant
    name, colon, text = given.partition(":")
    if name not in packaged.names():
        own = f"; for your file {name} give ./{given}" if name and os.path.lexists(name) else ""
        raise UserError(f"--config={given}: no configuration of this name comes with vffjax; {_nearest(given)}{own}")
    return str(packaged.folder() / f"{name}.py"), name, text if colon else None


def _nearest(given: str) -> str:
    """The advice for a name that does not exist."""
    near = difflib.get_close_matches(given.partition(":")[0], packaged.names(), n=1)
    if not near:
        return "vffjax configs lists all; the name of a file ends in .py"
    with running(near[0]) as loaded:
        every = [near[0], *(f"{near[0]}:{variant}" for variant in loaded.variants or ())]
    return f"did you mean {difflib.get_close_matches(given, every, n=1, cutoff=0)[0]}? vffjax configs lists all"


def _program(file: str) -> bytes:
    try:
        return files.read_bytes(file, MAX_FILE)
    except (OSError, ValueError) as error:  # a null byte is a ValueError
        problem, missing = getattr(error, "strerror", None) or str(error), isinstance(error, FileNotFoundError)
    name = pathlib.Path(file).stem
    if missing and name in packaged.names():
        raise UserError(f"{problem}; --config={name} is the configuration of this name that comes with vffjax")
    raise UserError(f"{problem}; {_GIVE}") from None
