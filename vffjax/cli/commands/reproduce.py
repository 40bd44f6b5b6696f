"""Trains a finished run again, from its config.json, and compares every bit of the results.

The exit status is 1 if anything differs.
"""

import pathlib
import tempfile

from vffjax import backend, paths
from vffjax.cli.options import a_path, give, naming_files, parser_of
from vffjax.runs.termination import Terminated


def run(arguments: list[str]) -> int:
    parser = parser_of("reproduce", __doc__, "--data_dir", "--json", "--code")
    parser.add_argument("workdir", type=a_path, metavar="WORKDIR", help="folder of the finished run; nothing is written there")
    parser.add_argument("--into", type=a_run_folder, metavar="DIR", help="folder to train in, which is kept; default: one that is deleted")
    a = parser.parse_args(arguments)
    backend.start()
    from vffjax.uses import reproduction

    with tempfile.TemporaryDirectory(prefix="vffjax-") as scratch, naming_files(a.into or pathlib.Path(scratch), "--into"):
        if a.into is None:
            paths.check_run_folder(scratch, "TMPDIR")
        try:
            found = reproduction.reproduce(a.workdir, a.into or pathlib.Path(scratch), a.data_dir)
        except (KeyboardInterrupt, Terminated) as leave:
            raise leave if a.into else type(leave)("nothing is kept; with --into DIR the same command would continue") from None
    give(a, found, reproduction.text(found))
    return 0 if found["identical"] else 1


def a_run_folder(text: str) -> pathlib.Path:
    """The value of --into: a folder in which a run can be trained."""
    path = a_path(text)
    paths.check_run_folder(path, "--into")
    return path
