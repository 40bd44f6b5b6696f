"""Downloads a data set and prepares it, so that training finds it without a network.

Sets of tensorflow-datasets are written as array_record files; those of the Hugging Face Hub go where its library keeps them.
"""

import pathlib

from vffjax.cli.options import naming_files, parser_of
from vffjax.errors import printable


def run(arguments: list[str]) -> None:
    parser = parser_of("prepare", __doc__, "--data_dir", "--code")
    known = "such as cifar10, tfds:NAME for any set of tensorflow-datasets, hf:OWNER/NAME, or MODULE:NAME of a source of your own"
    parser.add_argument("dataset", metavar="DATASET", help=known)
    a = parser.parse_args(arguments)
    from vffjax.data import load

    with naming_files(pathlib.Path(a.data_dir), "--data_dir"):
        folder = load.prepare(a.dataset, a.data_dir)
    print(printable(f"{a.dataset}: ready in {folder}"))
