"""Writes matplotlib figures as PNG files. Pictures are aids: if one cannot be drawn, one line on stderr says so and the run goes on.

matplotlib is imported when the first picture is drawn. Figures are drawn on the Agg canvas with matplotlib's defaults, so that no display,
backend or matplotlibrc changes them.
"""

import contextlib
import importlib
import io
import os
import pathlib
import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vffjax.errors import aid
from vffjax.files import replace_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(path: pathlib.Path, make: Callable[[], "Figure"]) -> pathlib.Path | None:
    """Writes the figure that `make` returns to `path`. Returns the path, or None if it failed, which one line on stderr explains."""
    with aid(str(path)):
        matplotlib = _import_matplotlib()
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        content = io.BytesIO()
        with matplotlib.rc_context(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from font")  # of a class name; a box is drawn in its place
            matplotlib.rcdefaults()
            figure = make()
            FigureCanvasAgg(figure)
            figure.savefig(content, format="png")
        replace_file(path, content.getvalue())
        return path
    return None


def _import_matplotlib() -> Any:
    """Imports matplotlib without `MPLBACKEND`, which notebooks set for all processes: matplotlib fails if it cannot import that backend."""
    if "matplotlib" in sys.modules:
        return importlib.import_module("matplotlib")
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        matplotlib = importlib.import_module("matplotlib")
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if backend:
        with contextlib.suppress(ValueError):  # as matplotlib would have done, for other users of it in this process
            matplotlib.rcParams["backend"] = backend
    return matplotlib
