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
    """The version of the vffjax that runs: of its checkout, if it runs from one, whatever else is installed."""
    checkout = pathlib.Path(__file__).parents[1] / "pyproject.toml"
    if checkout.is_file():
        project = tomllib.loads(checkout.read_text()).get("project", {})
        if project.get("name") == "vffjax":
            return str(project["version"])
    return installed("vffjax") or "of unknown version"
