"""The options of the commands, and of the benchmarks: parsers, the types of their values, and what commands do alike. Needs no JAX."""

import argparse
import contextlib
import json
import os
import pathlib
import re
import textwrap
import unicodedata
from collections.abc import Iterator
from typing import Any, NoReturn

from vffjax import files, outside, paths
from vffjax.errors import UserError, printable

COLUMNS = 80  # of the narrowest terminal that texts are made for
MOST_RUNS = 1000  # of one sweep
MAX_DIGITS = 18  # no number that a user gives has more, and Python refuses to read one of thousands


class Parser(argparse.ArgumentParser):
    """A parser whose errors are a `UserError`: one line, without the usage. It does not guess abbreviated options."""

    def __init__(self, **settings: Any):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def parser_of(command: str, about: str | None, *shared: str, usage: str | None = None) -> Parser:
    """The parser of a command, with those of the `shared` options that it has: --epoch, --data_dir, --code, --json, --out."""
    parser = Parser(prog=f"vffjax {command}", usage=usage, description=about)
    for option in shared:
        parser.add_argument(option, **_SHARED[option])
    return parser


def parser_with_config(command: str, about: str | None, own: str) -> Parser:
    """The parser of a command that trains nothing but takes a configuration, besides its `own` options, --json and --out."""
    usage = f"vffjax {command} --config NAME|FILE[:VARIANT] [--config.KEY=VALUE ...]"
    whole = re.sub(r" (?!\[)", "\N{NO-BREAK SPACE}", f"{own} [--json] [--out FILE.json]")  # lines end between options only
    rest = [line.replace("\N{NO-BREAK SPACE}", " ") for line in beside("", whole, 15 + len(command))]
    note = "--config and --config.KEY=VALUE are those of train; see vffjax train --help."
    return parser_of(command, about, "--json", "--out", usage="\n".join([usage, *rest, "", note]))


def beside(name: str, text: str, column: int) -> list[str]:
    """Lines of at most `COLUMNS` characters: a name, and from `column` on a text. A name that is too long has a line of its own."""
    lines = textwrap.wrap(text, COLUMNS - column, break_long_words=False, break_on_hyphens=False)
    first = [name] if len(name) >= column else [f"{name:{column}s}{lines.pop(0) if lines else ''}".rstrip()]
    return [*first, *(" " * column + line for line in lines)]


def give(a: argparse.Namespace, found: Any, text: str) -> None:
    """Hands over the result of a command: as JSON in the file of --out, and on stdout, as JSON with --json, else as `text`."""
    if getattr(a, "out", None):
        with naming_files(a.out, "--out"):
            files.write_json(a.out, found)
    print(json.dumps(found, indent=2) if a.json else text)


def whole_numbers(flag: str, text: str, most: int = 10**6) -> list[int]:
    """The distinct numbers of a comma-separated list, in their order; none if the text is empty. Raises `UserError` outside 1 to `most`."""
    words = text.split(",") if text else []
    if not all(re.fullmatch("[0-9]{1,6}", word) and int(word) for word in words):
        raise UserError(f"{flag}={text}: not whole numbers from 1; give for example 2,4,8")
    if words and max(map(int, words)) > most:
        raise UserError(f"{flag}={text}: too large; the most is {most}")
    return list(dict.fromkeys(map(int, words)))


def json_file(text: str) -> pathlib.Path:
    """The value of --out, if it is a .json file that can be written."""
    return new_file("--out", text, ".json")


def new_file(flag: str, text: str, *suffixes: str) -> pathlib.Path:
    """The path of a file that is to be written, and may be replaced. Raises `UserError` if it cannot be, or has none of the suffixes."""
    path, suffix = a_path(text), " or ".join(suffixes)
    # os.path, because a Path raises if a folder may not be read or a name is too long.
    folder = os.path.dirname(os.path.expanduser(text)) or "."
    if path.suffix not in suffixes or len(path.name) > 200 or not (os.path.isdir(folder) and os.access(folder, os.W_OK)):
        raise UserError(f"{flag}={text}: cannot be written; give a {suffix} file in an existing folder that you may write to")
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{flag}={text}: exists and is not a file; give another {suffix} file")
    return path


def a_path(text: str) -> pathlib.Path:
    """A local path, with `~` replaced. Refuses an empty one, and control characters, which a terminal would obey."""
    if not text or any(unicodedata.category(c) == "Cc" for c in text):
        raise argparse.ArgumentTypeError(f"{text!r} is empty or holds a control character; give a path")
    if problem := paths.problem_of(text):
        raise argparse.ArgumentTypeError(f"{text!r} {problem}")
    try:
        return paths.local(text, "")
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("=")) from None


def a_data_dir(text: str) -> str:
    """The value of --data_dir; empty: as configured, or the default."""
    return str(a_path(text)) if text else ""


def a_code_folder(text: str) -> pathlib.Path:
    """The value of --code: a folder whose modules may be run, if the configuration names them."""
    folder = a_path(text)
    if not folder.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is no folder; give the folder that holds the module")
    outside.allow(folder)
    return folder


def seeds_of(text: str) -> list[int]:
    """The distinct seeds of --seeds: numbers and ranges, as 0-4 or 0,1,7. Raises `UserError` for anything else.

    >>> seeds_of("0-2,7")
    [0, 1, 2, 7]
    """
    found: list[int] = []
    for word in text.split(","):
        if not (match := re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", word)):
            raise UserError(f"--seeds={text}: not whole numbers or ranges of them; give for example 0-4 or 0,1,7")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise UserError(f"--seeds={text}: {word} goes down; give the lower end first")
        if len(found) + last - first >= MOST_RUNS:
            raise UserError(f"--seeds={text}: more than {MOST_RUNS} seeds; give fewer")
        found += range(first, last + 1)
    return list(dict.fromkeys(found))


def an_epoch(text: str) -> str:
    """The value of --epoch. Whether the run has saved that epoch is checked when it is read."""
    if len(text) > MAX_DIGITS:
        raise argparse.ArgumentTypeError(f"{printable(text, 40)!r} is no epoch; give best, latest, or a saved epoch's number")
    return text


def a_count(text: str, least: int = 1) -> int:
    """A whole number that is not below `least`."""
    if not re.fullmatch(f"[0-9]{{1,{MAX_DIGITS}}}", text) or int(text) < least:
        raise argparse.ArgumentTypeError(f"{printable(text, 40)!r} is too small or no whole number; give at least {least}")
    return int(text)


_SHARED: dict[str, dict[str, Any]] = {
    "--epoch": {"type": an_epoch, "default": "best", "help": "best (the default, by validation error), latest, or a saved epoch's number"},
    "--data_dir": {
        "type": a_data_dir,
        "default": "",
        "help": "where the data set lies now, as config.data_dir; default: as configured, else $TFDS_DATA_DIR, else ~/tensorflow_datasets",
    },
    "--code": {
        "type": a_code_folder,
        "metavar": "DIR",
        "help": "folder of the rule, network or source of your own (MODULE:NAME) that the run was trained with; its code is run",
    },
    "--json": {"action": "store_true", "help": "print JSON"},
    "--out": {"type": json_file, "metavar": "FILE.json", "help": "write JSON to a file"},
}


@contextlib.contextmanager
def naming_files(folder: pathlib.Path, flag: str = "--workdir") -> Iterator[None]:
    """Turns what the disk and the memory refuse into a `UserError` that names the file, or else `folder`, and `flag`.

    That is a full disk, a folder without permission, a network that does not fit into memory, or a file that is nested too deeply.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except RecursionError as error:
        raise UserError(f"{folder}: a file there is nested too deeply to be read; restore it, or give another {flag}") from error
    except FloatingPointError as error:  # raised by JAX if JAX_DEBUG_NANS or JAX_DEBUG_INFS is set
        fix = "unset JAX_DEBUG_NANS and JAX_DEBUG_INFS, or lower config.learning_rate"
        problem = f"JAX was told to stop at a number that is not finite, and found one ({printable(str(error), 200)})"
        raise UserError(f"{problem}; {fix}") from error
    except (MemoryError, RuntimeError) as error:
        # jax.errors.JaxRuntimeError has no subclass for it.
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        fix = "use smaller config.widths, config.batch_size or config.eval_batch_size, or --config.rematerialise=True"
        raise UserError(f"out of memory ({printable(str(error), 200)}); {fix}") from error
    except OSError as error:
        where = error.filename or folder
        raise UserError(f"{where}: {error.strerror or error}; check space and permissions, or give another {flag}") from error
