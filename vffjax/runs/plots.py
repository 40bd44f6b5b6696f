"""The figures of a run: curves.png, features.png, and the curve of its early exits.

They are made by matplotlib's object API, without pyplot's global state. matplotlib is imported only when `drawing.draw` draws a figure.
"""

import itertools
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vffjax.runs.drawing import draw
from vffjax.runs.logbook import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = ("clean", "right label\nadded", "wrong label\nadded")


def plot_curves(workdir: pathlib.Path) -> pathlib.Path | None:
    """Draws the training loss and the error of each group from metrics.jsonl into curves.png. Returns what `drawing.draw` does."""
    return draw(pathlib.Path(workdir) / "curves.png", lambda: curves_figure(read_metrics(workdir)))


def curves_figure(records: list[dict[str, Any]]) -> "Figure":
    """The figure of curves.png, from the records of metrics.jsonl."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    legend_rows = math.ceil((_num_groups(records, "val_error_per_group") + 1) / 3)
    figure = Figure(figsize=(11.0, 4.4 + 0.18 * legend_rows), dpi=120, layout="constrained")
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
        _mark_stages(axes, records)
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


def _num_groups(records: list[dict[str, Any]], key: str) -> int:
    return max((len(r.get(key) or []) for r in records), default=0)


def _points(records: list[dict[str, Any]], key: str, group: int | None = None) -> list[tuple[int, float]]:
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
    count = _num_groups(records, f"{key}_per_group")
    series = [(_points(records, f"{key}_per_group", g), f"group {g}", {"color": _color(g, count)}) for g in range(count)]
    # The groups' sum of losses adds little to their own curves, and is drawn only if there are no such curves.
    if key != "loss" or not any(points for points, _, _ in series):
        series.append((_points(records, key), whole, {"color": "black", "linestyle": "--", "linewidth": 2.0}))
    for points, label, style in series:
        if points:
            x, y = np.array([p[0] for p in points]), np.array([scale(p[1]) for p in points], dtype=float)
            axes.plot(x, y, label=f"{label} (last: {last.format(y[-1])})", marker="o" if len(x) <= 30 else "", markersize=3.5, **style)


def _color(index: int, count: int) -> Any:
    import matplotlib

    return f"C{index}" if count <= 10 else matplotlib.colormaps["viridis"](0.95 * index / (count - 1))


def _mark_stages(axes: "Axes", records: list[dict[str, Any]]) -> None:
    """Draws a line wherever the next group begins to train under the sequential schedule."""
    for before, after in itertools.pairwise(records):
        if before.get("group") != after.get("group"):
            axes.axvline((before["epoch"] + after["epoch"]) / 2, color="0.6", linewidth=0.8, linestyle=":")


LEFT, USABLE, WIDTH = 1.05, 10.0, 11.25


def plot_features(path: pathlib.Path, **what: Any) -> pathlib.Path | None:
    """Draws features.png from the arguments of `features_figure`. Returns what `drawing.draw` does."""
    return draw(pathlib.Path(path), lambda: features_figure(**what))


def features_figure(
    images: np.ndarray,
    class_names: Sequence[str],
    labels: Sequence[int] | np.ndarray,
    wrong_labels: Sequence[int] | np.ndarray,
    codebook: np.ndarray | None,
    streams: Sequence[np.ndarray],
    filters: np.ndarray | None,
) -> "Figure":
    """The codebook, the filters of the first layer, and the features of clean and labelled images in each group.

    Args:
        images: test images [n, h, w, c] on the scale 0 to 1; the first three are drawn.
        class_names: the names of all classes.
        labels: the classes of the images.
        wrong_labels: the wrong classes that the labelled copies were given.
        codebook: the noise that labels each class [classes, h, w, c]; None if the rule has none.
        streams: for each group the features [3, n, h, w, c] or [3, n, units] of the clean, right-labelled and wrong-labelled images.
        filters: the first layer's kernel [kh, kw, cin, cout] or [fan_in, cout], or None.
    """
    images = np.asarray(images, np.float32)[:3]
    codebook = None if codebook is None else np.asarray(codebook, np.float32)
    streams = [np.asarray(stream, np.float32) for stream in streams]
    from matplotlib.figure import Figure

    # Everything is placed by inches from the top left on one pair of axes, because automatic layouts fail with a hundred axes.
    figure = Figure(dpi=120, facecolor="white")
    sheet, y = figure.add_axes((0, 0, 1, 1)), 0.15
    if codebook is not None:
        y = _draw_codebook(sheet, y, codebook, class_names)
    if filters is not None:
        tiles = _filter_tiles(np.asarray(filters, np.float32), images.shape[1:])
        y = _draw_filters(sheet, y, tiles, filters.shape[-1]) if tiles else y
    if len(images):
        names = [(_short(class_names[int(a)], 16), _short(class_names[int(b)], 16)) for a, b in zip(labels, wrong_labels, strict=True)]
        inputs = [_inputs(image, codebook, int(a), int(b)) for image, a, b in zip(images, labels, wrong_labels, strict=False)]
        y = _draw_streams(sheet, y, inputs, names, streams)
    figure.set_size_inches(WIDTH, max(y, 1.0))
    sheet.set(xlim=(0, WIDTH), ylim=(-max(y, 1.0), 0))
    sheet.axis("off")
    return figure


def _draw(sheet: "Axes", x: float, y: float, side: float, pixels: np.ndarray, cmap: str = "gray") -> None:
    axes = sheet.inset_axes((x, -y - side, side, side), transform=sheet.transData)
    axes.imshow(pixels, cmap=cmap, vmin=0, vmax=1, interpolation="nearest" if max(pixels.shape[:2]) <= 64 else "antialiased")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(linewidth=0.4, color="0.6")


def _write(sheet: "Axes", x: float, y: float, string: str, **style: Any) -> None:
    given: dict[str, Any] = {"fontsize": 8, "ha": "center", "va": "center"} | style
    sheet.text(x, -y, string, parse_math=False, **given)  # a class name may hold a dollar sign


def _heading(sheet: "Axes", y: float, title: str, note: str) -> float:
    _write(sheet, LEFT, y + 0.12, title, fontsize=11, fontweight="bold", ha="left")
    _write(sheet, LEFT, y + 0.32, note, color="0.35", ha="left")
    return y + 0.48


def _draw_codebook(sheet: "Axes", y: float, codebook: np.ndarray, class_names: Sequence[str]) -> float:
    shown = min(10, len(codebook))
    count = f"{len(codebook)} classes" if shown == len(codebook) else f"the first {shown} of {len(codebook)} classes"
    y = _heading(sheet, y, "Codebook", f"the noise that labels an image; {count}, each scaled from its least to its greatest value")
    pitch = USABLE / 10
    for i in range(shown):
        _write(sheet, LEFT + (i + 0.46) * pitch, y + 0.08, _short(class_names[i], 13))
        _draw(sheet, LEFT + i * pitch, y + 0.18, 0.92 * pitch, _picture(_unit(codebook[i])))
    return y + 0.18 + pitch + 0.2


def _draw_filters(sheet: "Axes", y: float, tiles: list[np.ndarray], total: int) -> float:
    count = f"{total} units" if len(tiles) == total else f"the first {len(tiles)} of {total} units"
    y = _heading(sheet, y, "Filters of the first layer", f"{count}; mid-grey is 0, each unit scaled by its greatest absolute weight")
    pitch = USABLE / 12
    for i, tile in enumerate(tiles):
        _draw(sheet, LEFT + (i % 12) * pitch, y + (i // 12) * pitch, 0.92 * pitch, tile)
    return y + math.ceil(len(tiles) / 12) * pitch + 0.2


def _draw_streams(
    sheet: "Axes", y: float, inputs: list[list[np.ndarray]], names: list[tuple[str, str]], streams: list[np.ndarray]
) -> float:
    """Draws a block of three rows for each image, and puts blocks side by side if the maps stay legible."""
    folded = "units in rows" if all(stream.ndim == 3 for stream in streams) else "mean over channels"
    note = f"first column: the image, then the noise added to it; groups: {folded}, one scale for three rows (dark: low; top 0.5 % clipped)"
    y = _heading(sheet, y, "Features of each group", note)
    columns, between = len(streams) + 1, 0.35
    abreast = max(1, min(len(inputs), 12 // columns))
    pitch = min(1.2, (USABLE - (abreast - 1) * between) / (abreast * columns))
    for start in range(0, len(inputs), abreast):
        for row, kind in enumerate(KINDS):
            _write(sheet, LEFT - 0.1, y + 0.45 + (row + 0.46) * pitch, kind, ha="right")
        for place, i in enumerate(range(start, min(start + abreast, len(inputs)))):
            x = LEFT + place * max(columns * pitch + between, 3.1)  # room for two long class names
            _write(sheet, x, y + 0.1, f"{names[i][0]}  (wrong: {names[i][1]})", fontsize=9, ha="left")
            for column in range(columns):
                header = "input" if column == 0 else (f"group {column - 1}" if pitch >= 0.6 else f"g{column - 1}")
                _write(sheet, x + (column + 0.46) * pitch, y + 0.34, header, color="0.35")
                maps = inputs[i] if column == 0 else _unit(np.stack([_fold(features) for features in streams[column - 1][:, i]]), 99.5)
                for row, pixels in enumerate(maps):
                    top = y + 0.45 + row * pitch
                    _draw(sheet, x + column * pitch, top, 0.92 * pitch, pixels, "gray" if column == 0 else "magma")
        y += 0.45 + 3 * pitch + 0.15
    return y


def _inputs(image: np.ndarray, codebook: np.ndarray | None, label: int, wrong: int) -> list[np.ndarray]:
    clean = [_picture(np.clip(np.nan_to_num(image), 0, 1))]
    return clean if codebook is None else [*clean, _picture(_unit(codebook[label])), _picture(_unit(codebook[wrong]))]


def _filter_tiles(filters: np.ndarray, image_shape: tuple[int, ...], most: int = 24) -> list[np.ndarray]:
    """A picture for each of the first `most` units; none if the weights do not have the shape of an image."""
    if filters.ndim == 2 and filters.shape[0] == math.prod(image_shape):
        filters = filters.reshape(*image_shape, -1)
    if filters.ndim != 4 or filters.shape[2] not in (1, 3):
        return []
    filters = np.nan_to_num(np.moveaxis(filters, -1, 0)[:most], posinf=0.0, neginf=0.0)
    return [_picture(0.5 + unit / (2 * max(float(np.abs(unit).max()), 1e-12))) for unit in filters]


def _fold(features: np.ndarray) -> np.ndarray:
    """Features as one picture: maps [h, w, c] as their mean over channels, units [n] in rows of a near-square that NaN fills up."""
    if features.ndim == 3:
        return features.mean(axis=-1)
    side = math.ceil(math.sqrt(features.size))
    folded = np.full(side * math.ceil(features.size / side), np.nan, np.float32)
    folded[: features.size] = features
    return folded.reshape(-1, side)


def _unit(values: np.ndarray, top: float = 100.0) -> np.ndarray:
    """Values scaled to 0..1, from the least finite one to percentile `top`; a constant becomes 0.5. NaN stays, and is drawn blank."""
    values = np.where(np.isfinite(values), values, np.nan).astype(np.float64)
    if not np.isfinite(values).any():
        return values
    low, high = np.nanmin(values), np.nanpercentile(values, top)
    if high <= low:
        high = np.nanmax(values)
    return np.minimum((values - low) / (high - low), 1.0) if high > low else values * 0 + 0.5


def _picture(pixels: np.ndarray) -> np.ndarray:
    """An image [h, w, c] as imshow takes it: RGB if it has three channels, else grey."""
    return np.nan_to_num(pixels, nan=0.5) if pixels.shape[-1] == 3 else pixels.mean(axis=-1)


def _short(name: object, most: int) -> str:
    name = str(name)
    return name if len(name) <= most else name[: most - 1] + "…"
