"""The figures of a report, from arrays. Each function returns a matplotlib figure, which `runs.drawing.draw` writes.

Figures are narrow and their letters large, so that they can be read on a phone and on paper.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vffjax.errors import printable
from vffjax.runs.plots import color_of, mark_stages, num_groups, points_of, short, spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from vffjax.uses.report import (  # at run time this would import JAX, of which the report of a live run has no need
        Agreement,
        Exits,
        Fits,
    )

WIDTH, WIDE, DPI = 6.4, 10.0, 150  # inches, and points an inch
NUMBERED = 16  # the most classes of a matrix that has numbers in its cells
NAMED = 120  # the most classes of a matrix whose rows are named
LONG = 10  # epochs from which the first errors may be cut off
BARS = 30  # the most bars of classes
SHOWN_GROUPS = 8  # the most groups that are drawn one by one, or probed


def _figure(height: float, width: float = WIDTH) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")


def _plain(axes: "Axes") -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _name(name: object, most: int = 14) -> str:
    """A name from outside as matplotlib draws it: one line, in which a dollar sign begins no formula."""
    return short(printable(str(name), 200), most).replace("$", r"\$")


def _legend_below(figure: "Figure", axes: "Axes", columns: int = 3) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(labels)), frameon=False, fontsize="small")


def curves(records: list[dict[str, Any]], keys: dict[str, str], ylabel: str, mark: int | None = None) -> "Figure":
    """Values of each group, and of the ensemble, over the epochs.

    Args:
        records: of metrics.jsonl.
        keys: at most two keys of the records, and what each is called in the legend. The second is dashed. Of `KEY`, the list
            `KEY_per_group` is drawn too. `train_accuracy` is drawn as an error in percent.
        ylabel: the name of the axis.
        mark: the epoch to be marked, or None.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    groups = max(num_groups(records, f"{key}_per_group") for key in keys)
    figure = _figure(4.2 + 0.18 * -(-(groups + 4) // 4))
    axes = figure.subplots()
    for key, style in zip(keys, ("-", "--"), strict=False):
        lines: list[tuple[list[tuple[int, float]], Any, str, float]] = [
            (points_of(records, f"{key}_per_group", g), color_of(g, groups), f"group {g}", 1.3)
            for g in range(groups)
            if groups > 1 or not points_of(records, key)  # one group is the ensemble
        ]
        lines.append((points_of(records, key), "black", "ensemble" if groups > 1 else "group 0", 2.0))
        for points, color, name, width in lines:
            if points:
                x, y = zip(*((epoch, 100 * (1 - value) if key == "train_accuracy" else value) for epoch, value in points), strict=True)
                label = name if style == "-" else None
                axes.plot(x, y, style, color=color, label=label, linewidth=width, marker="o" if len(x) <= 30 else "", markersize=3)
    values = np.concatenate([np.asarray(line.get_ydata(), float) for line in axes.lines] or [np.empty(0)])
    values = values[np.isfinite(values)]
    if values.size and "error" in ylabel:
        # In a long run the first errors would flatten all others.
        top = 1.5 * np.percentile(values, 90) if len(records) >= LONG else np.inf
        axes.set_ylim(0, min(top, 1.05 * values.max()) or 1)
    elif values.size and values.min() > 0 and values.max() > 30 * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    for called, style in zip(keys.values(), ("-", "--"), strict=False):
        if len(keys) > 1:
            axes.plot([], [], style, color="0.5", label=called)
    if mark is not None:
        axes.axvline(mark, color="0.35", linewidth=1.2, linestyle=":", label=f"epoch {mark}")
    mark_stages(axes, records)
    first, last = records[0]["epoch"], records[-1]["epoch"]
    margin = max(0.5, 0.02 * (last - first))
    axes.set(xlabel="epoch", ylabel=ylabel, xlim=(first - margin, last + margin))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    _plain(axes)
    _legend_below(figure, axes, 4)
    return figure


def confusion(counts: np.ndarray, names: Sequence[str]) -> "Figure":
    """A confusion matrix in percent of the images of each class. With many classes only the mistakes have a colour."""
    from matplotlib import colormaps

    classes = len(counts)
    share = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    numbered = classes <= NUMBERED
    side = WIDTH if numbered else WIDE
    figure = _figure(side * (0.95 if numbered else 0.98), side)
    axes = figure.subplots()
    off = np.where(np.eye(classes, dtype=bool), np.nan, share)
    most = max(float(np.nanmax(off, initial=0)), 10.0)  # few mistakes look like few
    drawn = axes.imshow(off, cmap=colormaps["Reds"].with_extremes(bad="0.88"), vmin=0, vmax=most, interpolation="nearest")
    bar = figure.colorbar(drawn, ax=axes, shrink=0.6, pad=0.01, aspect=25 if numbered else 40)
    bar.set_label("mistakes, % of the images of the class")
    size = _name_classes(axes, names)
    if numbered:
        for row, column in np.ndindex(classes, classes):
            if share[row, column] >= 0.5:
                dark = row != column and off[row, column] > 0.55 * most
                weight = "bold" if row == column else "normal"
                color = "white" if dark else "black"
                axes.text(column, row, f"{share[row, column]:.0f}", ha="center", va="center", fontsize=size, color=color, fontweight=weight)
    axes.set(xlabel="class that was said", ylabel="right class")
    return figure


def class_errors(counts: np.ndarray, names: Sequence[str]) -> "Figure":
    """The error of each class, the greatest first; of many classes the greatest ones."""
    images = counts.sum(axis=1)
    errors = 100 * (1 - np.diag(counts) / np.maximum(images, 1))
    order = [int(c) for c in np.argsort(-errors, kind="stable") if images[c]][:BARS]
    figure = _figure(0.9 + 0.26 * len(order))
    axes = figure.subplots()
    drawn = axes.barh(range(len(order)), errors[order], color="C0", height=0.72)
    axes.bar_label(drawn, [f"{errors[c]:.1f}" for c in order], padding=3, fontsize=9)
    axes.set_yticks(range(len(order)), [_name(names[c], 22) for c in order], fontsize=9)
    axes.invert_yaxis()
    axes.set(xlabel="error (%)", xlim=(0, 1.12 * max(errors[order].max(initial=0), 1)), ylim=(len(order) - 0.4, -0.6))
    _plain(axes)
    axes.grid(axis="y", visible=False)
    return figure


def mistakes(images: np.ndarray, labels: np.ndarray, said: np.ndarray, sure: np.ndarray | None, names: Sequence[str]) -> "Figure":
    """Misclassified images, bytes [n, h, w, c], with the right class and the class that was said; `sure` are its probabilities."""
    columns = 4
    rows = -(-len(images) // columns)
    figure = _figure(0.15 + 1.95 * rows)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.axis("off")
    for i, axes in enumerate(grid[: len(images)]):
        pixels = images[i] if images.shape[3] == 3 else images[i, ..., 0]
        axes.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest" if max(pixels.shape[:2]) <= 64 else "antialiased")
        share = "" if sure is None else f", {100 * sure[i]:.0f} %"
        axes.set_title(f"is {_name(names[labels[i]])}\nsaid {_name(names[said[i]], 11)}{share}", fontsize=8.5, pad=4)
    return figure


def by_depth(heads: Sequence[float], probes: Sequence[tuple[int, float]]) -> "Figure":
    """Accuracy in percent of each group's head, and of linear probes: pairs of a group, -1 for the images themselves, and accuracy."""
    figure = _figure(4.0)
    axes = figure.subplots()
    axes.plot(range(len(heads)), heads, "o-", color="C0", label="the group's own head")
    if probes:
        axes.plot([g for g, _ in probes], [value for _, value in probes], "s--", color="C1", label="linear probe")
    shown = sorted({-1 if probes else 0, *(spread(len(heads), 10))})
    axes.set_xticks(shown, ["pixels" if g < 0 else f"group {g}" if len(heads) <= 5 else str(g) for g in shown])
    axes.set(xlabel="" if len(heads) <= 5 else "group", ylabel="accuracy on test images (%)")
    points = [*((g, value, "C0") for g, value in enumerate(heads)), *((g, value, "C1") for g, value in probes)]
    for g, value, color in points if len(heads) <= 8 else []:
        # The lower of two values at one place is written below its point.
        above = all(value >= other for at, other, _ in points if at == g)
        offset = (0, 7) if above else (0, -15)
        axes.annotate(f"{value:.1f}", (g, value), offset, textcoords="offset points", ha="center", fontsize=9, color=color)
    axes.margins(x=0.12, y=0.18)
    _plain(axes)
    _legend_below(figure, axes)
    return figure


def fits(found: "Fits") -> "Figure":
    """For each group, histograms of how well the right label and the wrong labels fit."""
    groups = spread(len(found.right), SHOWN_GROUPS)
    figure = _figure(0.7 + (1.55 if len(groups) <= 4 else 1.2) * len(groups))
    low, high = (float(of([of(found.right[groups]), of(found.wrong[groups])])) for of in (np.min, np.max))
    bins = np.linspace(low, high + 1e-6, 61)
    for row, (axes, g) in enumerate(zip(figure.subplots(len(groups), 1, squeeze=False, sharex=True).ravel(), groups, strict=True)):
        both = [found.right[g], found.wrong[g].ravel()]
        for values, color, name in zip(both, ("C2", "C3"), ("right class", "wrong classes"), strict=True):
            axes.hist(values, bins, density=True, color=color, alpha=0.55, label=f"{name} (mean {values.mean():.2f})")
        axes.set_title(f"group {g}: the right label fits best for {100 * found.best[g]:.1f} % of the images", fontsize=10, loc="left")
        axes.set(yticks=[], ylabel="density", xlabel="cosine similarity" if row == len(groups) - 1 else "")
        axes.legend(fontsize=8, frameon=False)
        axes.spines[["top", "right", "left"]].set_visible(False)
    return figure


def fit_means(means: np.ndarray, names: Sequence[str]) -> "Figure":
    """How much better than the mean of all labels each label [column] fits images of a class [row]."""
    from matplotlib import colormaps

    classes = len(means)
    above = means - means.mean(axis=1, keepdims=True)
    most = max(float(np.nanmax(np.abs(above), initial=0)), 1e-3)
    side = WIDTH if classes <= 40 else WIDE
    figure = _figure(side * 0.9, side)
    axes = figure.subplots()
    drawn = axes.imshow(above, cmap=colormaps["RdBu_r"].with_extremes(bad="0.88"), vmin=-most, vmax=most, interpolation="nearest")
    figure.colorbar(drawn, ax=axes, shrink=0.6, pad=0.02).set_label("cosine similarity above the mean of the row")
    _name_classes(axes, names)
    axes.set(xlabel="label that the copy was told", ylabel="class of the image")
    return figure


def _name_classes(axes: "Axes", names: Sequence[str]) -> float:
    """Names the rows and columns of a matrix of classes, unless there are too many; returns the size of the letters."""
    classes = len(names)
    size = 9.0 if classes <= 12 else 7.5 if classes <= NUMBERED else max(5.0, 8 - classes / 40)
    labels = [_name(name, 14 if classes <= NUMBERED else 18) for name in names]
    if classes <= NAMED:
        axes.set_xticks(range(classes), labels, rotation=90 if max(map(len, labels)) > 2 else 0, fontsize=size)
        axes.set_yticks(range(classes), labels, fontsize=size)
        axes.tick_params(length=0)
    return size


def silent(layers: Sequence[tuple[str, np.ndarray]]) -> "Figure":
    """The share of silent channels of each layer."""
    figure = _figure(0.9 + 0.28 * len(layers))
    axes = figure.subplots()
    shares = [100 * float(dead.mean()) for _, dead in layers]
    drawn = axes.barh(range(len(layers)), shares, color="C3", height=0.72)
    axes.bar_label(drawn, [f"{int(dead.sum())} of {len(dead)}" for _, dead in layers], padding=3, fontsize=9)
    axes.set_yticks(range(len(layers)), [name for name, _ in layers], fontsize=9)
    axes.invert_yaxis()
    axes.set(xlabel="silent channels (%)", xlim=(0, max(1.35 * max(shares), 5)), ylim=(len(layers) - 0.4, -0.6))
    _plain(axes)
    axes.grid(axis="y", visible=False)
    return figure


def agreement(found: "Agreement") -> "Figure":
    """Two matrices: how often two groups say the same class, and how often both are wrong."""
    groups = len(found.same)
    figure = _figure(3.6)
    for axes, values, title in zip(figure.subplots(1, 2), found, ("same class (%)", "both wrong (%)"), strict=True):
        axes.imshow(100 * values, cmap="Blues", vmin=0, vmax=max(100 * float(values.max()), 1), interpolation="nearest")
        shown = spread(groups, 7)
        axes.set_xticks(shown, map(str, shown))
        axes.set_yticks(shown, map(str, shown))
        axes.set(title=title, xlabel="group", ylabel="group")
        for row, column in np.ndindex(groups, groups) if groups <= 8 else ():
            dark = values[row, column] > 0.6 * values.max()
            text = f"{100 * values[row, column]:.1f}" if groups <= 4 else f"{100 * values[row, column]:.0f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=9, color="white" if dark else "black")
    return figure


def exits(found: "Exits") -> "Figure":
    """Accuracy against the share of operations that early exit computes."""
    figure = _figure(4.2)
    axes = figure.subplots()
    order = np.argsort(found.costs, kind="stable")
    axes.plot(100 * found.costs[order], 100 - found.errors[order], "-", color="C0", marker="o", markersize=3, label="by threshold")
    axes.plot([100], [100 - found.full_error], "s", color="black", label="no early exit")
    if found.chosen is not None:
        label = f"threshold {found.chosen['threshold']:g}, chosen on validation images"
        place = [100 * found.chosen["cost"]], [100 - found.chosen["error"]]
        axes.plot(*place, "*", color="C1", markersize=15, markeredgecolor="black", label=label)
    axes.set(xlabel="operations (% of a pass of the full ensemble)", ylabel="accuracy on test images (%)")
    _plain(axes)
    _legend_below(figure, axes, 2)
    return figure
