"""Trains a configuration with several seeds and values, and makes a table of it.

All runs train in one process, one after the other; seeds and learning rates compile nothing anew. The same command goes on
where it was stopped. OUT gets sweep.md and sweep.json (a row for each combination of values: mean and sample standard
deviation over the seeds, errors in percent), sweep.png, and the runs in OUT/runs. Choose by the validation error.
"""

import argparse
import itertools
import json
import pathlib

from vffjax import backend
from vffjax.cli import flags, options
from vffjax.errors import UserError, printable

USAGE = """vffjax sweep --config NAME|FILE[:VARIANT] [--config.KEY=VALUE ...]
                    [--seeds 0-4] [--vary KEY=VALUE,VALUE ...] --out DIR
                    [--code DIR] [--json]"""


def run(arguments: list[str]) -> None:
    parser = options.parser_of("sweep", __doc__, "--code", "--json", usage=USAGE)
    parser.add_argument("--seeds", default="", help="such as 0-4 or 0,1,7; default: that of the configuration")
    values = "values of a key, or of an entry of one (overrides.group1.learning_rate), separated by commas; may be repeated"
    parser.add_argument("--vary", type=_varied, default=[], action="append", metavar="KEY=V1,V2", help=values + ": all combinations run")
    parser.add_argument("--out", type=options.a_path, required=True, metavar="DIR", help="folder of the results")
    a, rest = parser.parse_known_args(arguments)
    config, name, workdir = flags.parse_train(rest, "the options of vffjax sweep --help")
    if workdir:
        raise UserError(f"--workdir={workdir}: the runs of a sweep lie in OUT/runs; give --out DIR alone")
    varied = _once(a.vary)
    rows = [flags.changed(config, dict(zip(varied, texts, strict=True))) for texts in itertools.product(*varied.values())]
    out = pathlib.Path(a.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out={out}: is no folder; give a new one, or that of the same sweep")
    with options.naming_files(out, "--out"):
        backend.start()
        from vffjax.many import members, sweep

        seeds = sweep.seeds_of(a.seeds) if a.seeds else [config.seed]
        runs = sweep.ready(members.members(rows, list(varied), seeds), out)
        out.mkdir(parents=True, exist_ok=True)
        found = sweep.run(runs, out, {"config": name, "command": arguments})
    print(json.dumps(found, indent=2) if a.json else sweep.table(found["rows"], found["keys"]))


def _varied(text: str) -> tuple[str, list[str]]:
    """A key and its values."""
    path, equals, values = text.partition("=")
    path = path.removeprefix("config.")
    if not equals or not path:
        raise argparse.ArgumentTypeError(f"{printable(text, 60)!r} is not KEY=VALUE,VALUE; give for example learning_rate=1e-3,3e-3")
    if path == "seed":
        raise argparse.ArgumentTypeError(f"{printable(text, 60)!r}: seeds have a flag of their own; give --seeds 0-4")
    found = [value.strip() for value in split(values)]
    if not all(found):
        raise argparse.ArgumentTypeError(f"{printable(text, 60)!r} has an empty value; give for example learning_rate=1e-3,3e-3")
    return path, found


def split(text: str) -> list[str]:
    """The parts between the commas that stand in no bracket and in no quotes.

    >>> split("(64, 64),(32, 32)")
    ['(64, 64)', '(32, 32)']
    """
    parts, depth, quote = [""], 0, ""
    for c in text:
        if quote:
            quote = "" if c == quote else quote
        elif c in "'\"":
            quote = c
        depth += 0 if quote else (c in "([{") - (c in ")]}")
        if c == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += c
    return parts


def _once(given: list[tuple[str, list[str]]]) -> dict[str, list[str]]:
    found = dict(given)
    if len(found) < len(given):
        twice = next(path for i, (path, _) in enumerate(given) if path in dict(given[:i]))
        raise UserError(f"--vary={twice}: is given twice; give all its values in one, such as {twice}=1,2")
    return found
