"""Which versions of this and other packages run here."""

import importlib.metadata
import pathlib
import tomllib


def installed(package: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def own() -> str:
    """The version of vffjax, also where a checkout is on the path and not installed."""
    found = installed("vffjax")
    return found or str(tomllib.loads((pathlib.Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["version"])
