"""The configuration that a command line gives: --config FILE, and --config.KEY=VALUE for single keys. Raises `UserError`. Needs no JAX."""

import argparse
import ast
import difflib
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from absl import flags
from ml_collections.config_flags import tuple_parser

from vffjax import backend, paths
from vffjax.cli import config_file, options, packaged
from vffjax.config import FIELDS, Config, converted, key_like, nearest_key
from vffjax.errors import UserError, bad_key

_DEFAULTS = Config()


def parse_train(arguments: list[str], others: str = "--workdir DIR") -> tuple[Config, str, str]:
    """Reads --config FILE[:VARIANT], --config.KEY=VALUE, --workdir DIR and --code DIR. No other argument is allowed.

    If two flags set the same, the last one wins. A value may also follow its flag as the next argument. --config.KEY and --noconfig.KEY
    set a truth value.

    Args:
        arguments: the command line, without the name of the command.
        others: options that the caller knows besides --config, for the message about an unknown one.

    Returns:
        The configuration, its name, and the workdir or ''. Each value is of the right type and in its range; `ready` checks whether
        the values fit together.

    Raises:
        UserError: names the argument or key, its value and the fix.
    """
    given, workdir, code, settings, left = "", None, None, [], iter(arguments)
    for argument in left:
        flag, equals, value = argument.partition("=")
        match = re.fullmatch(r"--?(config|workdir|code|(no)?config\.(.*))", flag, re.DOTALL)
        name, no, path = match.groups() if match else ("", None, None)
        truth = isinstance(getattr(_DEFAULTS, path or "", None), bool)
        if not match or (no and (equals or not truth)):
            fix = _meant(flag, value if equals else next(left, "")) or f"give --config FILE, --config.KEY=VALUE and {others}"
            raise UserError(f"argument {argument!r}: not known; {fix}")
        if not equals:
            value = ("false" if no else "true") if truth else next(left, "")
        if path is not None:
            settings.append((path, value))
        elif name == "config":
            given = value
        elif name == "workdir":
            workdir = value
        else:
            code = value
    if not given:
        raise UserError("--config: missing; give a name such as --config digits (vffjax configs lists them), or a file: configs/digits.py")
    plain, name = config_file.load_config_file(given)
    for path, value in settings:
        _set(plain, path, value)
    if workdir is not None:
        workdir = str(_value("workdir", workdir, options.a_path))
        paths.check_run_folder(workdir)
    config = converted(plain)
    if code is not None:
        _value("code", code, options.a_code_folder)
    config_file.allow_code(given, config)
    return config, name, workdir or ""


def _value(flag: str, text: str, kind: Callable[[str], Any]) -> Any:
    try:
        return kind(text)
    except argparse.ArgumentTypeError as error:
        raise UserError(f"--{flag}={text}: {error}") from None


def _meant(flag: str, value: str) -> str:
    """The advice for an argument that is not known; empty if nothing like it is."""
    word = flag.lstrip("-")
    if not flag.startswith("-"):
        return f"did you mean --config={word}?" if word.partition(":")[0] in packaged.names() or word.endswith(".py") else ""
    near = difflib.get_close_matches(word, ("config", "workdir", "code"), n=1, cutoff=0.7)
    meant = near[0] if near else key_like(word) and f"config.{key_like(word)}"
    shown = f"={value}" if value and not value.startswith("--") else ""
    return f"did you mean --{meant}{shown}?" if meant else ""


def parse_with_config(parser: argparse.ArgumentParser, arguments: list[str]) -> tuple[argparse.Namespace, Config, str]:
    """The parser's own options, the configuration and its name, for a command that trains nothing and so takes no --workdir."""
    a, rest = parser.parse_known_args(arguments)
    config, name, workdir = parse_train(rest, f"the options of {parser.prog} --help")
    if workdir:
        raise UserError(f"--workdir={workdir}: nothing is kept there; leave it out, or use --out")
    return a, config, name


def ready(config: Config) -> Config:
    """Starts JAX, and then returns the `checked` configuration."""
    backend.start()
    return checked(config)


def checked(config: Config) -> Config:
    """Checks that the values fit together. Imports JAX, because networks and rules check themselves; uses no device."""
    from vffjax.training.checks import check

    return check(config)


def _set(plain: dict[str, Any], path: str, text: str) -> None:
    """Sets config.PATH. The path is a key, or leads on to an entry of a key that is a dictionary."""
    key, *deeper = path.split(".")
    if key not in FIELDS:
        raise bad_key(key, text, "no such key", nearest_key(key))
    default = getattr(_DEFAULTS, key)
    free = isinstance(default, Mapping)
    if deeper and not free:
        raise bad_key(path, text, f"config.{key} has no entries", f"set the whole of it, as --config.{key}={str(default)!r}")
    if not deeper:
        try:
            plain[key] = _PARSERS[type(default)](text)
        # A value that is nested deeply ends Python's parser with the last two.
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            fix = f"give one such as {default!r}" + (f", or single entries as --config.{key}.NAME=VALUE" if free else "")
            raise bad_key(key, text, f"not a value of type {type(default).__name__}", fix) from None
        return
    holder = plain.setdefault(key, {})
    for name in deeper[:-1]:
        holder = holder.setdefault(name, {}) if isinstance(holder, dict) else None
    if not isinstance(holder, dict):
        above = path.rpartition(".")[0]
        raise bad_key(path, text, f"config.{above} is not a dictionary", "leave it out, or set the whole of it")
    holder[deeper[-1]] = literal(text)


def _dictionary(text: str) -> dict[Any, Any]:
    if not isinstance(found := literal(text), dict):
        raise TypeError("not a dictionary")
    return found


def literal(text: str) -> Any:
    """A Python literal, such as a number, True or a tuple; also true and false. Any other text stands for itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python's, about text that is not one
        try:
            return ast.literal_eval(text.capitalize() if text in ("true", "false") else text)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            return text


_PARSERS = {
    bool: flags.BooleanParser().parse,
    int: flags.IntegerParser().parse,
    float: flags.FloatParser().parse,
    str: str,
    tuple: tuple_parser.TupleParser().parse,
    dict: _dictionary,
}
