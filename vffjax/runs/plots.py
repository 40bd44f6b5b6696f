"""The figures of a run's record and of its early exits, and what all figures share.

They are made by matplotlib's object API, without pyplot's global state. matplotlib is imported only when `drawing.draw` draws a figure.
"""

import itertools
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from vffjax.errors import printable
from vffjax.runs.drawing import draw
from vffjax.runs.logbook import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_curves(workdir: pathlib.Path, title: str = "") -> pathlib.Path | None:
    """Draws the training loss and the error of each group from metrics.jsonl into curves.png. Returns what `drawing.draw` does."""
    return draw(pathlib.Path(workdir) / "curves.png", lambda: curves_figure(read_metrics(workdir), title))


def title_of(workdir: pathlib.Path, rule: str, test_error: float) -> str:
    """The title of the curves of a finished run, with its test error in percent."""
    return f"{workdir.resolve().name}: rule {rule}, test error {test_error:.2f} %"


def curves_figure(records: list[dict[str, Any]], title: str = "") -> "Figure":
    """The figure of curves.png, from the records of metrics.jsonl."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    legend_rows = math.ceil((num_groups(records, "val_error_per_group") + 1) / 3)
    figure = Figure(figsize=(11.0, 4.4 + 0.18 * legend_rows), dpi=120, layout="constrained")
    if title:
        figure.suptitle(short(title, 110), fontsize="large", parse_math=False)
    left, right = figure.subplots(1, 2)
    epochs = [r["epoch"] for r in records]
    _curves(left, records, "loss", "all groups", scale=lambda v: v, percent=False)
    left.set(title="Training loss of each group", ylabel="loss (no unit)")
    values = np.concatenate([line.get_ydata() for line in left.lines] or [np.empty(0)])
    if values.size and values.min() > 0 and values.max() > 30 * values.min():
        left.set_yscale("log")
        left.set_ylabel("loss (no unit, log scale)")

    _curves(right, records, "val_error", "ensemble", scale=lambda v: v, percent=True)
    if right.lines:
        right.set_title("Error on validation images")
    else:
        _curves(right, records, "train_accuracy", "ensemble", scale=lambda v: 100 * (1 - v), percent=True)
        right.set_title("Error on training images (no validation data)")
    right.set_ylabel("error (%)")
    right.set_ylim(0, 1.08 * max([line.get_ydata().max() for line in right.lines], default=1) or 1)

    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if epochs:
            margin = max(0.5, 0.02 * (max(epochs) - min(epochs)))
            axes.set_xlim(min(epochs) - margin, max(epochs) + margin)
        if axes.lines:
            # The legend is below the axes because curves of the sequential schedule leave no corner free.
            ncols = 2 if len(axes.lines) in (2, 4) else 3
            spacing = {"columnspacing": 1.2, "handlelength": 1.5, "handletextpad": 0.5}
            axes.legend(fontsize="small", frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=ncols, **spacing)
        else:
            axes.text(0.5, 0.5, "nothing recorded", transform=axes.transAxes, ha="center", va="center", color="0.4")
        mark_stages(axes, records)
    return figure


def plot_exits(path: pathlib.Path, found: dict[str, Any]) -> pathlib.Path | None:
    """Draws accuracy against images/s of early exits, from what `evaluate` returns with a `curve`. Returns what `drawing.draw` does."""
    return draw(path, lambda: exits_figure(found))


def exits_figure(found: dict[str, Any]) -> "Figure":
    """The figure of early exits, from what `evaluate` returns with a `curve`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.8), dpi=120, layout="constrained")
    axes, points = figure.subplots(), found["curve"]
    full_speed, speeds = found["ensemble_images_per_second"], [point["images_per_second"] for point in points]
    for i, split in enumerate(("val", "test")):
        if (full := found[f"ensemble_{split}_error"]) is None:
            continue
        name, color = {"val": "validation", "test": "test"}[split], f"C{i}"
        accuracies = [100 - point[f"{split}_error"] for point in points]
        axes.plot(speeds, accuracies, color=color, marker="o", markersize=3.5, label=f"{name} images, by threshold")
        axes.plot(full_speed, 100 - full, color=color, marker="s", linestyle="", label=f"{name} images, full pass")
        chosen: dict[str, Any] = {"markersize": 15, "linestyle": "", "markeredgecolor": "black"}
        label = f"threshold {found['threshold']:g}, {found['chosen']}" if split == "test" else None
        axes.plot(found["images_per_second"], 100 - found[f"{split}_error"], color=color, marker="*", label=label, **chosen)
        if split == "test":
            spread = max(speeds) - min(speeds)
            written: list[float] = []
            for point, x, y in zip(points, speeds, accuracies, strict=True):
                if any(abs(x - other) < 0.05 * spread for other in written):
                    continue  # it would overlap another label
                written.append(x)
                axes.annotate(f"{point['threshold']:g}", (x, y), (3, 4), textcoords="offset points", fontsize="x-small", color="0.35")
    axes.set(title="Early exit", xlabel="images/s on the test images", ylabel="accuracy (%)")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize="small", frameon=False)
    return figure


def num_groups(records: list[dict[str, Any]], key: str) -> int:
    """The length of the longest list under this key."""
    return max((len(r.get(key) or []) for r in records), default=0)


def total_epochs(config: Mapping[str, Any], records: list[dict[str, Any]]) -> Any:
    """How many epochs a run has in all, by the content of its config.json; each group has its own under the sequential schedule."""
    epochs = config.get("epochs")
    if config.get("schedule") == "sequential" and isinstance(epochs, int):
        epochs *= max(num_groups(records, "loss_per_group"), 1)
    return epochs


def points_of(records: list[dict[str, Any]], key: str, group: int | None = None) -> list[tuple[int, float]]:
    """Pairs of epoch and value, for the epochs that have one. Under the sequential schedule a group has values in its own epochs only."""
    points = []
    for record in records:
        value = record.get(key)
        if group is not None:
            value = value[group] if value and group < len(value) else None
        if value is not None:
            points.append((record["epoch"], value))
    return points


def _curves(axes: "Axes", records: list[dict[str, Any]], key: str, whole: str, scale: Callable[[float], float], percent: bool) -> None:
    # Errors have two decimals, as on the terminal.
    last = "{:.2f} %" if percent else "{:.3g}"
    count = num_groups(records, f"{key}_per_group")
    series = [(points_of(records, f"{key}_per_group", g), f"group {g}", {"color": color_of(g, count)}) for g in range(count)]
    # The groups' sum of losses adds little to their own curves, and is drawn only if there are no such curves.
    if key != "loss" or not any(points for points, _, _ in series):
        series.append((points_of(records, key), whole, {"color": "black", "linestyle": "--", "linewidth": 2.0}))
    for points, label, style in series:
        if points:
            x, y = np.array([p[0] for p in points]), np.array([scale(p[1]) for p in points], dtype=float)
            axes.plot(x, y, label=f"{label} (last: {last.format(y[-1])})", marker="o" if len(x) <= 30 else "", markersize=3.5, **style)


def color_of(index: int, count: int) -> Any:
    """The colour of one of `count` groups."""
    import matplotlib

    return f"C{index}" if count <= 10 else matplotlib.colormaps["viridis"](0.95 * index / (count - 1))


def mark_stages(axes: "Axes", records: list[dict[str, Any]]) -> None:
    """Draws a line wherever the next group begins to train under the sequential schedule."""
    for before, after in itertools.pairwise(records):
        if before.get("group") != after.get("group"):
            axes.axvline((before["epoch"] + after["epoch"]) / 2, color="0.6", linewidth=0.8, linestyle=":")


def short(name: object, most: int) -> str:
    """A name as one line, of which a part is left out if it has more than `most` characters."""
    shown = printable(str(name))
    return shown if len(shown) <= most else shown[: most - 1] + "…"


def spread(count: int, most: int) -> list[int]:
    """At most `most` of the numbers below `count`, evenly spaced, the first and the last among them.

    >>> spread(10, 4)
    [0, 3, 6, 9]
    """
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist()
