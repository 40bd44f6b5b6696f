"""Makes the tables of the documentation from the ledger of results, and checks that every quoted figure agrees with it.

    python benchmarks/tables.py [--results results] [--write] [FILE ...]

Without --write nothing is changed. The script then prints a line for each table and figure that differs from the ledger, and ends with
status 1 if there are any. FILE defaults to README.md, docs/*.md and configs/*.py. In Markdown, a table stands between two comments. The
first of them says what the table shows:

    <!-- ledger: NAME, NAME columns: test_error, val_error, model_flop -->
    <!-- end of ledger -->

Each NAME has a row with mean ± standard deviation over its seeds (`results/NAME-s0.json`, `results/NAME-s1.json`, ...). `NAME*` stands for
all names with this beginning. The column `minus OTHER` has the test error minus that of OTHER with the same seed: the mean ± its standard
error over the seeds that both have, in bold if it is more than two standard errors away from 0 over five seeds or more. A figure that
names its source is checked wherever it stands, also in a configuration. In a table written by hand the source is a comment, which readers
do not see:

    28.3 ± 0.8 % (n = 3, results/NAME)              the test error
    0.84 % (n = 1, results/NAME, val_error)         any other figure of the ledger
    28.3 ± 0.8<!-- n = 3, results/NAME -->          the test error, in a cell of a table

In the same way the list of all keys in docs/keys.md is made from the fields of vffjax/config.py.
"""

import fnmatch
import pathlib
import re
import sys
from typing import Any

import records
from arguments import one_line, parser_of
from vffjax.cli.key_help import every_key_as_markdown
from vffjax.errors import UserError
from vffjax.files import replace_file
from vffjax.many.tables import Spread

_MINUS = "minus "
ROOT = pathlib.Path(__file__).resolve().parents[1]
_TABLE = re.compile(r"(<!-- ledger: (?P<names>[^>]*?) columns: (?P<columns>[^>]*?) -->\n)(?P<body>.*?)(<!-- end of ledger -->)", re.DOTALL)
_FIGURE = re.compile(
    r"(?P<mean>\d+(?:\.\d+)?)(?:\s*±\s*(?P<sd>\d+(?:\.\d+)?))?(?:\s*%\s*\(|<!-- )"
    r"n = (?P<n>\d+),\s+results/(?P<name>[a-z0-9._-]+)(?:,\s+(?P<key>\w+))?(?:\)| -->)"
)
_KEYS = re.compile(r"(<!-- keys -->\n).*?(\n<!-- end of keys -->)", re.DOTALL)
_TITLES = {
    "test_error": "test error %",
    "val_error": "validation error %",
    "test_error_views": "test error %, with views",
    "n": "n",
    "seeds": "seeds",
    "changes": "differs by",
    "parameters": "parameters of layers + heads",
    "model_flop": "model FLOP of training",
    "seconds": "training seconds",
}


def names_of(found: dict[str, dict[str, Any]], pattern: str) -> list[str]:
    """The names, without their seeds, that match a table's pattern. Raises `UserError` if there are none."""
    every = sorted({re.sub(r"-s\d+$", "", name) for name in found})
    matching = fnmatch.filter(every, pattern)
    if not matching:
        raise UserError(f"results: no record fits {pattern}; correct the table, or train it")
    return matching


def table(found: dict[str, dict[str, Any]], names: list[str], columns: list[str]) -> str:
    """A Markdown table with a row for each name. Raises `UserError` for a column that is not known."""
    for column in columns:
        if column not in _TITLES and not column.startswith(_MINUS):
            raise UserError(f"columns: {column}: not known; choose from {', '.join(_TITLES)}, {_MINUS}OTHER")
    titles = [_TITLES.get(column, f"{column}, seed by seed") for column in columns]
    lines = ["| run | " + " | ".join(titles) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(_cell(found, name, column) for column in columns) + " |" for name in names]
    return "\n".join(lines) + "\n"


def _cell(found: dict[str, dict[str, Any]], name: str, column: str) -> str:
    own = records.seeds_of(found, name)
    lost = [one for one in own if "problem" in one]
    if column == "n":
        return str(len(own)) + (f", {len(lost)} lost" if lost else "")
    if column == "seeds":
        return ", ".join(str(one["seed"]) for one in own)
    if column == "changes":
        return ", ".join(f"{key}={value}" for key, value in own[0]["changes"].items()) or "nothing"
    if lost:
        return "lost: " + lost[0]["problem"].partition(";")[0] if column == "test_error" else ""
    if column.startswith(_MINUS):
        return _difference(found, name, column.removeprefix(_MINUS))
    if column == "parameters":
        return f"{own[0]['parameters']['layers']:,} + {own[0]['parameters']['heads']:,}"
    if column == "model_flop":
        return "not counted" if own[0]["model_flop"] is None else f"{own[0]['model_flop']:.2e}"
    if column == "seconds":
        trusted = all(one["quiet"] for one in own)
        return f"{records.over_seeds(found, name, 'seconds').mean:,.0f}" if trusted else "(busy machine)"
    if column == "test_error_views" and all(one.get(column) is None for one in own):
        return "not measured"
    return f"{records.over_seeds(found, name, column):.2f}"


def _difference(found: dict[str, dict[str, Any]], name: str, other: str) -> str:
    """The mean difference of test errors over the seeds that two names share, with its standard error."""
    if name == other:
        return "0"
    values = records.paired(found, name, other)
    if len(values) < 2:
        return "".join(f"{value:+.2f} (n = 1)" for value in values) or "no seed in common"
    mean, sd, n = Spread.of(values)
    error = (sd or 0.0) / n**0.5
    text = f"{mean:+.2f} ± {error:.2f} (n = {n})"
    return f"**{text}**" if n > 4 and abs(mean) > 2 * error else text


def differences(found: dict[str, dict[str, Any]], text: str, where: str) -> list[str]:
    """The tables and figures of a text that differ from the ledger.

    Args:
        found: the records of the ledger, by name.
        text: the text.
        where: the name of its file.

    Returns:
        A line for each difference, which begins with the file and the line number.
    """
    wrong = []
    for match in _TABLE.finditer(text):
        if match["body"] != _made(found, match):
            line = text[: match.start()].count("\n") + 1
            wrong.append(f"{where}:{line}: the table of {match['names']} differs from the ledger; run benchmarks/tables.py --write")
    for match in _FIGURE.finditer(text):
        row = records.over_seeds(found, match["name"], match["key"] or "test_error")
        shown = f"{row:.{len(match['mean'].partition('.')[2])}f}"
        if (" ± ".join(filter(None, (match["mean"], match["sd"]))), int(match["n"])) != (shown, row.n):
            line = text[: match.start()].count("\n") + 1
            wrong.append(f"{where}:{line}: {' '.join(match[0].split())}: the ledger has {shown} % (n = {row.n})")
    return wrong


def _made(found: dict[str, dict[str, Any]], match: re.Match[str]) -> str:
    patterns, columns = ([part.strip() for part in match[group].split(",")] for group in ("names", "columns"))
    names = [name for pattern in patterns for name in names_of(found, pattern)]
    return table(found, list(dict.fromkeys(names)), columns)


@one_line(__file__)
def main() -> None:
    parser = parser_of(__file__, __doc__)
    parser.add_argument("files", nargs="*", type=pathlib.Path, metavar="FILE")
    parser.add_argument("--results", type=pathlib.Path, default=ROOT / "results")
    parser.add_argument("--write", action="store_true", help="write the tables into the files")
    a = parser.parse_args()
    files = a.files or [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "configs").glob("*.py"))]
    found, wrong = records.read_all(a.results), []
    for path in files:
        text = path.read_text()
        if a.write:
            made = _TABLE.sub(lambda match: match[1] + _made(found, match) + match[5], text)
            made = _KEYS.sub(lambda match: match[1] + every_key_as_markdown() + match[2], made)
            if made != text:
                replace_file(path, made.encode())
            text = made
        wrong += differences(found, text, path.name)
    print("\n".join(wrong) or f"{len(files)} files agree with {len(found)} records")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
