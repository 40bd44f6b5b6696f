"""Downloads a data set and prepares it for tensorflow-datasets, as array_record files."""

import pathlib

from vffjax.cli.options import naming_files, parser_of
from vffjax.errors import printable
from vffjax.registry import SOURCES


def run(arguments: list[str]) -> None:
    parser = parser_of("prepare", __doc__, "--data_dir")
    known = [name for name in SOURCES.names if SOURCES.find(name).prepare]
    parser.add_argument("dataset", metavar="DATASET", help=f"one of {', '.join(known)}")
    a = parser.parse_args(arguments)
    from vffjax.data import load

    with naming_files(pathlib.Path(a.data_dir), "--data_dir"):
        folder = load.prepare(a.dataset, a.data_dir)
    print(printable(f"{a.dataset}: ready in {folder}"))
