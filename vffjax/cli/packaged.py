"""Where the configurations lie that come with vffjax, the files of `configs/`, and their names, such as `digits`. Needs no JAX."""

import functools
import pathlib
import re


@functools.cache
def folder() -> pathlib.Path:
    """The folder of the files: inside the installed package, or at the top of a checkout."""
    package = pathlib.Path(__file__).resolve().parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def names() -> list[str]:
    """The names, sorted, without variants."""
    return sorted(file.stem for file in folder().glob("*.py"))


def is_name(given: str) -> bool:
    """Whether the value of --config is a name, perhaps with a variant, and no file: it holds neither a separator of paths nor `.py`."""
    return not re.search(r"[/\\]|\.py", given)
