"""The command lines of the benchmarks. Bad input of any kind ends a benchmark with exit status 2 and one line on stderr."""

import argparse
import contextlib
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from vffjax.cli.flags import checked, parse_train
from vffjax.cli.options import Parser, json_file, seeds_of
from vffjax.config import Config
from vffjax.errors import UserError, printable
from vffjax.runs.termination import Terminated


def parser_of(file: str, about: str | None, *shared: str) -> Parser:
    """Makes the parser of a benchmark.

    Args:
        file: the benchmark's file.
        about: the benchmark's docstring, which `--help` prints.
        shared: the names of those flags in `_SHARED` that the benchmark has.
    """
    prog = f"python benchmarks/{pathlib.Path(file).name}"
    parser = Parser(prog=prog, description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in shared:
        parser.add_argument(flag, **_SHARED[flag])
    return parser


@contextlib.contextmanager
def one_line(file: str) -> Iterator[None]:
    """Turns a `UserError` or `OSError` into exit status 2 and one line on stderr that begins with the name of the benchmark in `file`; and
    SIGTERM, after a run has been saved, into status 143 and such a line."""
    try:
        yield
    except Terminated as leave:
        print(f"{pathlib.Path(file).stem}: told to leave (SIGTERM): {printable(str(leave))}", file=sys.stderr)
        sys.exit(143)
    except (UserError, OSError) as error:
        print(f"{pathlib.Path(file).stem}: error: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)


def read_config(arguments: Sequence[str], instead: str = "use --out") -> tuple[Config, str]:
    """Reads the configuration from --config and --config.KEY=VALUE. No device is used.

    Args:
        arguments: the command line without the benchmark's own options.
        instead: what to do instead of giving --workdir, which no benchmark has.

    Returns:
        The checked configuration and its name.

    Raises:
        UserError: an argument is not known, the configuration is not valid, or --workdir was given.
    """
    config, name, workdir = parse_train(list(arguments), "the benchmark's own options")
    if workdir:
        raise UserError(f"--workdir={workdir}: this benchmark keeps no run there; {instead}")
    return checked(config), name


def some_of(flag: str, known: Mapping[str, object]) -> Callable[[str], list[str]]:
    """The type of a flag whose value is a comma-separated list of known names. A name that is given twice is taken once."""

    def chosen(text: str) -> list[str]:
        for name in text.split(","):
            if name not in known:
                raise UserError(f"{flag}={name}: not known; choose from {', '.join(known)}")
        return list(dict.fromkeys(text.split(",")))

    return chosen


_SHARED: dict[str, dict[str, Any]] = {
    "--out": {"type": json_file, "metavar": "FILE.json", "help": "file of the results"},
    "--seeds": {"type": seeds_of, "default": "0,1,2", "help": "such as 0-4 or 0,1,7; default: 0,1,2"},
    "--set": {"default": [], "action": "append", "metavar": "RULE.KEY=VALUE", "help": "a configuration value for one row; may be repeated"},
}
