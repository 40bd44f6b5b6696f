"""Runs a configuration file, which is a Python program, and reads what it returns. Every error names the file."""

import inspect
import os
import pathlib
import re
import types
from typing import Any

import ml_collections

from vffjax import files, outside, paths
from vffjax.config import Config, nearest_key
from vffjax.errors import UserError, printable
from vffjax.registry import outside_names

MAX_FILE = 2**20  # bytes; no configuration file is larger


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


def load_config_file(given: str) -> tuple[dict[str, Any], str]:
    """Runs the file of FILE[:VARIANT] and calls its `get_config`.

    Returns:
        The keys and values of the `ConfigDict` that it returns, unchecked. And a name for them, such as digits or cifar10-small.

    Raises:
        UserError: names the file, the line and the fix, whatever exception the program raises.
    """
    name, variant = split_variant(given)
    file = str(paths.local(name, "--config"))
    # ml_collections could load the file too, but it reports errors as tracebacks, and it remembers the last file.
    try:
        with outside.as_module(file) as (module, _):
            exec(compile(_program(file), file, "exec", dont_inherit=True), module.__dict__)
            plain = _called(module, file, variant)
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
    return plain, pathlib.Path(file).stem + (f"-{variant}" if variant else "")


def allow_code(given: str, config: Config) -> None:
    """Lets the modules that a configuration names be run from the folder of FILE[:VARIANT], which a person has named."""
    folder = os.path.dirname(os.path.abspath(paths.local(split_variant(given)[0], "--config")))
    outside.allow(folder, outside_names(vars(config)).values())


def _called(module: types.ModuleType, file: str, variant: str | None) -> dict[str, Any]:
    """What `get_config` of the module returns for a variant, or without one. Raises `UserError` if either does not fit the other."""
    if not callable(get_config := getattr(module, "get_config", None)):
        raise UserError("the file has no function get_config; define it, as in configs/digits.py")
    parameters = inspect.signature(get_config).parameters
    variants = getattr(module, "VARIANTS", () if parameters else None)
    if variants is not None and not (isinstance(variants, (tuple, list, dict, set)) and all(isinstance(v, str) for v in variants)):
        raise UserError(f"VARIANTS={printable(repr(variants), 100)}: not names; make it a tuple of them, as in configs/cifar10.py")
    if variant is not None and variants is None:
        raise UserError(f"the file has no variants; use --config={file}")
    if variant is not None and variants and variant not in variants:
        raise UserError(f"the file has no variant {variant!r}; choose one of {', '.join(variants)}")
    if variant is None and any(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters.values()):
        known = f", one of {', '.join(variants)}" if variants else ""
        raise UserError(f"get_config needs {', '.join(parameters)}; give a variant, --config={file}:NAME{known}")
    config = get_config() if variant is None else get_config(variant)
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(f"get_config returns {type(config).__name__}; return a ConfigDict, as default_config() gives")
    return config.to_dict()


def _program(file: str) -> bytes:
    try:
        return files.read_bytes(file, MAX_FILE)
    except (OSError, ValueError) as error:  # a null byte is a ValueError
        problem = getattr(error, "strerror", None) or str(error)
    raise UserError(f"{problem}; give a configuration file such as configs/digits.py") from None
