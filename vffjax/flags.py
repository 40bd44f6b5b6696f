"""What a command line says: the configuration from --config FILE and --config.KEY=VALUE, numbers and files. Raises `UserError`."""

import inspect
import os
import pathlib
import re
import textwrap
import traceback
from typing import Any

from vffjax.config import FIELDS, Config, make_config, nearest_key
from vffjax.errors import UserError, bad_key


def parse_train(arguments: list[str]) -> tuple[Config, str, str]:
    """The validated configuration, the configuration's name, and the workdir or ''."""
    from absl import flags
    from ml_collections import config_flags

    given, rest = _take_config(arguments)
    values = flags.FlagValues()
    argv = ["train.py", *rest]
    raw, name = load_config_file(given)
    try:
        flags.DEFINE_string("workdir", "", "folder of the run", flag_values=values)
        config_flags.DEFINE_config_dict("config", raw, flag_values=values, sys_argv=argv)
        stray = values(argv)[1:]
        raw = values.config
    except (flags.Error, OSError, AttributeError, KeyError, TypeError, ValueError, SyntaxError) as error:
        raise _flag_at_fault(rest, error) from error
    if stray:
        raise UserError(f"argument {stray[0]!r}: not known; give --config FILE, --config.KEY=VALUE and --workdir DIR")
    return make_config(raw), name, values.workdir


def _take_config(arguments: list[str]) -> tuple[str, list[str]]:
    """The value of --config, the last if there are several, and the other arguments."""
    given, rest, left = "", [], iter(arguments)
    for argument in left:
        flag, equals, value = argument.partition("=")
        if flag in ("--config", "-config"):
            given = value if equals else next(left, "")
        else:
            rest.append(argument)
    if not given:
        raise UserError("--config: missing; give a configuration file such as --config configs/digits.py")
    return given, rest


def load_config_file(given: str) -> tuple[Any, str]:
    """What `get_config` of FILE[:VARIANT] returns, and a name for it. Whatever goes wrong there, `UserError` names the file."""
    import ml_collections

    file, colon, variant = given.partition(":")
    # Not by ml_collections: its errors are tracebacks, and it remembers the last file.
    space: dict[str, Any] = {"__name__": "config_file", "__file__": file}
    try:
        exec(compile(pathlib.Path(file).read_bytes(), file, "exec"), space)
        if "get_config" not in space:
            raise UserError(f"--config={given}: {file} has no function get_config; define it, as in configs/digits.py")
        variants = space.get("VARIANTS", () if inspect.signature(space["get_config"]).parameters else None)
        if colon and variants is None:
            raise UserError(f"--config={given}: {file} has no variants; use --config={file}")
        if colon and variants and variant not in variants:
            raise UserError(f"--config={given}: {file} has no variant {variant!r}; choose one of {', '.join(variants)}")
        config = space["get_config"](variant) if colon else space["get_config"]()
    except UserError:
        raise
    except OSError as error:
        if error.filename != file:
            raise
        raise UserError(f"--config={given}: {error.strerror}; give a configuration file such as configs/digits.py") from error
    except Exception as error:  # a configuration file is a program
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        line = getattr(error, "lineno", None) or (lines[-1] if lines else "?")
        locked = re.search(r'Key "(\w+)" does not exist', str(error))  # ml_collections adds the list of all keys
        problem = f"config.{locked[1]}: no such key; {nearest_key(locked[1])}" if locked else f"{_first_line(error)}; correct the file"
        raise UserError(f"--config={given}: line {line}: {problem}") from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(f"--config={given}: get_config returns {type(config).__name__}; return what default_config() gives")
    return config, pathlib.Path(file).stem + (f"-{variant}" if variant else "")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(map(str, error.args[:1])).partition(chr(10))[0]}"


def _flag_at_fault(arguments: list[str], error: Exception) -> UserError:
    """Names the override that cannot be parsed, else says what the library says."""
    reason = " ".join(str(error).split())[:300]
    for i, argument in enumerate(arguments):
        flag, equals, value = argument.lstrip("-").partition("=")
        if not flag.startswith("config."):
            continue
        key, _, deeper = flag.removeprefix("config.").partition(".")
        if not equals:
            value = arguments[i + 1] if i + 1 < len(arguments) else ""
        if key not in FIELDS:
            return bad_key(key, value, "no such key", nearest_key(key))
        if deeper:
            fix = f"give the whole of config.{key}" + (", as \"{'group0': {'learning_rate': 1e-4}}\"" if key == "overrides" else "")
            return bad_key(f"{key}.{deeper}", value, "cannot be set alone", fix)
        if flag in reason:
            return bad_key(key, value, f"not a value of the right type ({reason})", f"give one such as {FIELDS[key].default!r}")
    return UserError(f"{reason}; see python train.py --help")


def describe_keys() -> str:
    """Every configuration key with its default, its choices and what it means."""
    lines = []
    for key, field in FIELDS.items():
        default = {} if key == "overrides" else field.default
        choices = f" One of {', '.join(field.metadata['choices'])}." if field.metadata["choices"] else ""
        text = f"{field.metadata['doc']}.{choices}"
        lines += [f"  {key} = {default!r}", *textwrap.wrap(text, 110, initial_indent=" " * 6, subsequent_indent=" " * 6)]
    return "\n".join(lines)


def whole_numbers(flag: str, text: str) -> list[int]:
    """The different numbers of a comma-separated list, in order; none if it is empty."""
    words = text.split(",") if text else []
    if not all(re.fullmatch("[0-9]{1,6}", word) and int(word) for word in words):
        raise UserError(f"{flag}={text}: not whole numbers from 1; give for example 2,4,8")
    return list(dict.fromkeys(map(int, words)))


def json_file(text: str) -> pathlib.Path:
    """The value of --out, if it is a .json file that can be written."""
    path = pathlib.Path(text)
    if path.suffix != ".json" or path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"--out={text}: cannot be written; give a .json file in a folder that exists and is yours")
    return path
