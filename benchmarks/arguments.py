"""The command lines of the benchmarks: bad input of any kind ends them with status 2 and one line on stderr."""

import argparse
import contextlib
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

from vffjax.cli.flags import checked, parse_train
from vffjax.cli.options import Parser
from vffjax.config import Config
from vffjax.errors import UserError, printable


def parser_of(file: str, about: str | None) -> Parser:
    """The parser of the benchmark in `file`; `about` is the module's docstring."""
    prog = f"python benchmarks/{pathlib.Path(file).name}"
    return Parser(prog=prog, description=about, formatter_class=argparse.RawDescriptionHelpFormatter)


@contextlib.contextmanager
def one_line(file: str) -> Iterator[None]:
    """Ends the process with status 2, and a line that begins with the name of the benchmark, at a `UserError` or `OSError` within."""
    try:
        yield
    except (UserError, OSError) as error:
        print(f"{pathlib.Path(file).stem}: error: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)


def read_config(arguments: Sequence[str], instead: str) -> tuple[Config, str]:
    """The checked configuration of --config and --config.KEY=VALUE, and its name. No device is used.

    Raises `UserError`, also for --workdir: a benchmark has none, and `instead` says what to use.
    """
    config, name, workdir = parse_train(list(arguments), "the benchmark's own options")
    if workdir:
        raise UserError(f"--workdir={workdir}: this benchmark keeps no run there; {instead}")
    return checked(config), name


def seeds(text: str) -> list[int]:
    """The value of --seeds."""
    if not all(word.isdecimal() and len(word) < 10 for word in text.split(",")):
        raise UserError(f"--seeds={text}: not whole numbers; give for example 0,1,2")
    return [int(word) for word in text.split(",")]


def some_of(flag: str, known: Mapping[str, object]) -> Callable[[str], list[str]]:
    """The type of a flag whose value is a comma-separated list of known names; each is taken once, in order."""

    def chosen(text: str) -> list[str]:
        for name in text.split(","):
            if name not in known:
                raise UserError(f"{flag}={name}: not known; choose from {', '.join(known)}")
        return list(dict.fromkeys(text.split(",")))

    return chosen
