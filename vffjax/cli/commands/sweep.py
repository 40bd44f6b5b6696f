"""Trains a configuration with several seeds and values, and makes a table of it.

All runs train in one process, one after the other; seeds and learning rates compile nothing anew. The same command goes on
where it was stopped. OUT gets sweep.md and sweep.json (a row for each combination of values: mean and sample standard
deviation over the seeds, errors in percent), sweep.png, and the runs in OUT/runs. Choose by the validation error.
"""

import argparse
import itertools
import json
import math
import os

from vffjax import backend
from vffjax.cli import flags, options
from vffjax.errors import UserError, printable

USAGE = """vffjax sweep --config NAME|FILE[:VARIANT] [--config.KEY=VALUE ...]
                    [--seeds 0-4] [--vary KEY=VALUE,VALUE ...] --out DIR
                    [--code DIR] [--json]"""


def run(arguments: list[str]) -> None:
    parser = options.parser_of("sweep", __doc__, "--code", "--json", usage=USAGE)
    parser.add_argument("--seeds", type=options.seeds_of, help="such as 0-4 or 0,1,7; default: that of the configuration")
    values = "values of a key, or of an entry of one (overrides.group1.learning_rate), separated by commas; may be repeated"
    parser.add_argument("--vary", type=_varied, default=[], action="append", metavar="KEY=V1,V2", help=values + ": all combinations run")
    parser.add_argument("--out", type=options.a_path, required=True, metavar="DIR", help="folder of the results")
    a, rest = parser.parse_known_args(arguments)
    config, name, workdir = flags.parse_train(rest, "the options of vffjax sweep --help")
    if workdir:
        raise UserError(f"--workdir={workdir}: the runs of a sweep lie in OUT/runs; give --out DIR alone")
    varied, seeds = _checked(a.vary), a.seeds or [config.seed]
    number = math.prod(map(len, varied.values())) * len(seeds)
    if number > options.MOST_RUNS:
        raise UserError(f"--vary, --seeds: ask for {number} runs; give fewer values or seeds, for {options.MOST_RUNS} runs at most")
    # As if each row were given by --config.KEY=VALUE, so that files, code of one's own and messages are treated alike.
    settings = ([f"--config.{path}={text}" for path, text in zip(varied, row, strict=True)] for row in itertools.product(*varied.values()))
    rows = [flags.parse_train([*rest, *row])[0] for row in settings]
    with options.naming_files(a.out, "--out"):
        if os.path.lexists(a.out) and not a.out.is_dir():
            raise UserError(f"--out={a.out}: is no folder; give a new one, or that of the same sweep")
        backend.start()
        from vffjax.many import members, sweep

        runs = sweep.ready(members.members(rows, list(varied), seeds), a.out)
        a.out.mkdir(parents=True, exist_ok=True)
        found = sweep.run(runs, a.out, {"config": name, "command": arguments})
    print(json.dumps(found, indent=2) if a.json else sweep.table(found["rows"], found["keys"]))


def _varied(text: str) -> tuple[str, list[str]]:
    """A key and its values."""
    path, equals, values = text.partition("=")
    path, shown = path.removeprefix("config."), repr(printable(text, 60))
    if not equals or not path:
        raise argparse.ArgumentTypeError(f"{shown} is not KEY=VALUE,VALUE; give for example learning_rate=1e-3,3e-3")
    if path == "seed":
        raise argparse.ArgumentTypeError(f"{shown}: seeds have a flag of their own; give --seeds 0-4")
    try:
        found = split(values)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{shown}: a bracket or a quote is not closed; put a value that holds one into quotes") from None
    if not all(found):
        raise argparse.ArgumentTypeError(f"{shown} has an empty value; give for example learning_rate=1e-3,3e-3")
    return path, found


def split(text: str) -> list[str]:
    """The values between the commas that stand in no bracket and in no quotes. Quotes around a whole value are removed.

    >>> split("(64, 64),(32, 32)"), split("'a,b',c")
    (['(64, 64)', '(32, 32)'], ['a,b', 'c'])

    Raises:
        ValueError: a bracket or a quote is not closed.
    """
    parts, depth, quote = [""], 0, ""
    for c in text:
        if quote:
            quote = "" if c == quote else quote
        elif c in "'\"" and (depth or not parts[-1].strip()):  # elsewhere it is an apostrophe
            quote = c
        else:
            depth += (c in "([{") - (c in ")]}")
        if depth < 0:
            raise ValueError("a bracket is closed that was not opened")
        if c == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += c
    if depth or quote:
        raise ValueError("a bracket or a quote is not closed")
    parts = [part.strip() for part in parts]
    return [part[1:-1] if len(part) > 1 and part[0] == part[-1] and part[0] in "'\"" else part for part in parts]


def _checked(given: list[tuple[str, list[str]]]) -> dict[str, list[str]]:
    """The values by their keys. Raises `UserError` if one of the keys holds another."""
    paths = [path for path, _ in given]
    for i, path in enumerate(paths):
        for other in paths[:i]:
            if path == other:
                raise UserError(f"--vary={path}: is given twice; give all its values in one, such as {path}=1,2")
            if f"{path}.".startswith(f"{other}.") or f"{other}.".startswith(f"{path}."):
                raise UserError(f"--vary={path}: one of {path} and {other} holds the other; give one of them")
    return dict(given)
