"""A figure as a PNG file. Pictures are aids: matplotlib is imported when the first is drawn, and a failure is one line on stderr.

Everything is drawn on the Agg canvas and by matplotlib's own defaults, so that no display, backend or matplotlibrc changes a picture.
"""

import contextlib
import importlib
import io
import os
import pathlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vffjax.errors import aid
from vffjax.files import replace_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(path: pathlib.Path, make: Callable[[], "Figure"]) -> pathlib.Path | None:
    """Writes the figure that `make` returns to `path`; returns the path, or None if a line on stderr says why there is no picture."""
    with aid(str(path)):
        matplotlib = _import_matplotlib()
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        content = io.BytesIO()
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            figure = make()
            FigureCanvasAgg(figure)
            figure.savefig(content, format="png")
        replace_file(path, content.getvalue())
        return path
    return None


def _import_matplotlib() -> Any:
    """Imports matplotlib without `MPLBACKEND`: a notebook sets it for every process, and matplotlib fails where it cannot import it."""
    if "matplotlib" in sys.modules:
        return importlib.import_module("matplotlib")
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        matplotlib = importlib.import_module("matplotlib")
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if backend:
        with contextlib.suppress(ValueError):  # for others in this process, as matplotlib itself would have done
            matplotlib.rcParams["backend"] = backend
    return matplotlib
