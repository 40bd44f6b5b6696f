"""Prints the version; also --version and -V."""

from vffjax import versions
from vffjax.errors import UserError


def run(arguments: list[str]) -> None:
    if arguments in (["--help"], ["-h"]):
        print(f"usage: vffjax version\n\n{__doc__}")
        return
    if arguments:
        raise UserError(f"argument {arguments[0]!r}: not known; vffjax version takes no arguments, leave it out")
    print(f"vffjax {versions.own()}")
