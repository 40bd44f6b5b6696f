"""The figures of many runs: errors by the values that vary, and curves over each other."""

import math
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vffjax.many.tables import named
from vffjax.runs.drawing import draw
from vffjax.runs.plots import color_of, points_of, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NAMES = {"val_error": "validation", "test_error": "test"}


def plot_sweep(path: pathlib.Path, found: dict[str, Any]) -> pathlib.Path | None:
    """Draws the errors of a sweep's rows, from what sweep.json holds. Returns what `drawing.draw` does."""
    return draw(path, lambda: sweep_figure(found))


def sweep_figure(found: dict[str, Any]) -> "Figure":
    """Errors against the key that varies, if it is one number; else a line for each row. Bars are standard deviations over seeds."""
    from matplotlib.figure import Figure

    rows, keys = [row for row in found["rows"] if row["test_error"] is not None], found["keys"]
    firsts = [next(iter(row["values"].values()), None) for row in rows]
    numbers = [float(first) for first in firsts if isinstance(first, (int, float)) and not isinstance(first, bool)]
    by_number = len(keys) == 1 and len(rows) > 1 and len(numbers) == len(rows)
    figure = Figure(figsize=(7.2, 4.8 if by_number else 1.8 + 0.3 * len(rows)), dpi=120, layout="constrained")
    axes = figure.subplots()
    if by_number:
        order = sorted(range(len(rows)), key=lambda i: numbers[i])
        _errors(axes, [rows[i] for i in order], [numbers[i] for i in order], upright=True)
        if min(numbers) > 0 and max(numbers) >= 8 * min(numbers):
            axes.set_xscale("log")
        axes.set_xlabel(keys[0])
        axes.set_ylabel("error (%)")
    else:
        _errors(axes, rows, [float(i) for i in range(len(rows))], upright=False)
        labels = [short(named(row["values"]), 60) for row in rows]
        axes.set_yticks(range(len(rows)), labels, parse_math=False)
        axes.invert_yaxis()
        axes.set_xlabel("error (%)")
    runs = max((row["n"] for row in rows), default=0)
    axes.set_title(f"Mean and standard deviation over {runs} seeds" if runs > 1 else "One seed")
    _finish(axes)
    return figure


def _errors(axes: "Axes", rows: Sequence[dict[str, Any]], places: Sequence[float], upright: bool) -> None:
    for i, (key, name) in enumerate(_NAMES.items()):
        known = [(place, row[key], row[f"{key}_sd"] or 0.0) for place, row in zip(places, rows, strict=True) if row[key] is not None]
        if not known:
            continue
        at, means, deviations = zip(*known, strict=True)
        style: dict[str, Any] = {"color": f"C{i}", "marker": "o", "capsize": 3, "label": f"{name} images"}
        if upright:
            axes.errorbar(at, means, yerr=deviations, **style)
        else:
            axes.errorbar(means, [place + 0.16 * i - 0.08 for place in at], xerr=deviations, linestyle="", **style)


def plot_curves(path: pathlib.Path, runs: Sequence[dict[str, Any]]) -> pathlib.Path | None:
    """Draws the validation error of several runs over their epochs. Returns what `drawing.draw` does.

    Args:
        path: the PNG file.
        runs: each with its `label`, its `row` (runs of one row have one colour), and its `records` of metrics.jsonl.
    """
    return draw(path, lambda: curves_figure(runs))


def curves_figure(runs: Sequence[dict[str, Any]]) -> "Figure":
    """The figure of `plot_curves`. Runs without validation images show their training error."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows = list(dict.fromkeys(run["row"] for run in runs))
    figure = Figure(figsize=(8.4, 4.8 + 0.18 * math.ceil(len(rows) / 2)), dpi=120, layout="constrained")
    axes, named, trained_on = figure.subplots(), set[str](), False
    for run in runs:
        points = points_of(run["records"], "val_error")
        if not points:
            points = [(epoch, 100 * (1 - share)) for epoch, share in points_of(run["records"], "train_accuracy")]
            trained_on = trained_on or bool(points)
        if points:
            label = None if run["row"] in named else short(run["row"], 60)
            named.add(run["row"])
            color = color_of(rows.index(run["row"]), len(rows))
            axes.plot(*zip(*points, strict=True), color=color, label=label, marker="o" if len(points) <= 30 else "", markersize=3.5)
    axes.set(xlabel="epoch", ylabel="error (%)")
    axes.set_title("Error on validation images" + (" (without any: on training images)" if trained_on else ""))
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    _finish(axes, below=True)
    return figure


def _finish(axes: "Axes", below: bool = False) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.13), "ncols": 2} if below else {}
        for text in axes.legend(fontsize="small", frameon=False, **place).get_texts():
            text.set_parse_math(False)
