"""features.png: what a network sees, and what its groups make of it."""

import itertools
import math
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vffjax.runs.drawing import draw
from vffjax.runs.plots import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = ("clean", "right label", "wrong label")  # of the columns under an image
LEFT, USABLE, WIDTH = 1.05, 10.0, 11.25


def plot_features(path: pathlib.Path, **what: Any) -> pathlib.Path | None:
    """Draws features.png from the arguments of `features_figure`. Returns what `drawing.draw` does."""
    return draw(pathlib.Path(path), lambda: features_figure(**what))


def features_figure(
    inputs: np.ndarray,
    class_names: Sequence[str],
    labels: Sequence[int] | np.ndarray,
    wrong_labels: Sequence[int] | np.ndarray,
    codebook: np.ndarray | None,
    streams: Sequence[np.ndarray],
    filters: np.ndarray | None,
) -> "Figure":
    """The codebook, the filters of the first layer, and the features of clean and labelled images in each group.

    Args:
        inputs: images as the network sees them [kinds, n, h, w, c], on the scale where black is 0 and white is 1. The first kind is clean;
            a second and third are copies that were told the right and a wrong label. Labelled copies may leave the scale.
        class_names: the names of all classes.
        labels: the classes of the images.
        wrong_labels: the wrong classes that the labelled copies were told.
        codebook: the noise that labels each class [classes, h, w, c]; None if the rule has none.
        streams: for each group the features [kinds, n, h, w, c] or [kinds, n, units].
        filters: the first layer's kernel [kh, kw, cin, cout] or [fan_in, cout], or None.
    """
    inputs = np.asarray(inputs, np.float32)
    codebook = None if codebook is None else np.asarray(codebook, np.float32)
    streams = [np.asarray(stream, np.float32) for stream in streams]
    from matplotlib.figure import Figure

    # Everything is placed by inches from the top left on one pair of axes, because automatic layouts fail with a hundred axes.
    figure = Figure(dpi=120, facecolor="white")
    sheet, y = figure.add_axes((0, 0, 1, 1)), 0.15
    if codebook is not None:
        y = _draw_codebook(sheet, y, codebook, class_names)
    if filters is not None:
        tiles = _filter_tiles(np.asarray(filters, np.float32), inputs.shape[2:])
        y = _draw_filters(sheet, y, tiles, filters.shape[-1]) if tiles else y
    if inputs.shape[1]:
        names = [[short(class_names[int(label)], 13) for label in pair] for pair in zip(labels, wrong_labels, strict=True)]
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
        _write(sheet, LEFT + (i + 0.46) * pitch, y + 0.08, short(class_names[i], 13))
        _draw(sheet, LEFT + i * pitch, y + 0.18, 0.92 * pitch, _picture(_unit(codebook[i], *_limits(codebook[i]))))
    return y + 0.18 + pitch + 0.2


def _draw_filters(sheet: "Axes", y: float, tiles: list[np.ndarray], total: int) -> float:
    count = f"{total} units" if len(tiles) == total else f"the first {len(tiles)} of {total} units"
    y = _heading(sheet, y, "Filters of the first layer", f"{count}; mid-grey is 0, each unit scaled by its greatest absolute weight")
    pitch = USABLE / 12
    for i, tile in enumerate(tiles):
        _draw(sheet, LEFT + (i % 12) * pitch, y + (i // 12) * pitch, 0.92 * pitch, tile)
    return y + math.ceil(len(tiles) / 12) * pitch + 0.2


def _draw_streams(sheet: "Axes", y: float, inputs: np.ndarray, names: list[list[str]], streams: list[np.ndarray]) -> float:
    """Draws a row of inputs and a row for each group. Each image has a column for each kind."""
    kinds, images = inputs.shape[:2]
    copies = "; labelled copies share one scale, 1 % clipped at either end" if _leaves_the_scale(inputs) else ""
    folded = "units in rows" if all(stream.ndim == 3 for stream in streams) else "mean over channels"
    note = f"inputs as the network sees them{copies}; groups: {folded}, one colour scale for a row, top 0.5 % clipped"
    y = _heading(sheet, y, "Features of each group", note)
    between, bar = (0.25 if kinds > 1 else 0.0), 0.65
    pitch = min(1.2, (USABLE - bar - (images - 1) * between) / (images * kinds), 24 / (1 + len(streams)))
    block = kinds * pitch + between
    for i, (right, wrong) in enumerate(names):
        x = LEFT + i * block
        _write(sheet, x + 0.46 * kinds * pitch, y + 0.1, right, fontsize=10, fontweight="bold")
        for k in range(kinds if kinds > 1 else 0):
            middle = x + (k + 0.46) * pitch
            _write(sheet, middle, y + 0.32, KINDS[k], color="0.35")
            _write(sheet, middle, y + 0.46, ("", right, wrong)[k], color="0.35")
    y += 0.56 if kinds > 1 else 0.22
    for row, values in enumerate([inputs, *streams]):
        _write(sheet, LEFT - 0.1, y + 0.46 * pitch, f"group {row - 1}" if row else "input", ha="right")
        maps = _displayed(values) if row == 0 else np.array([[_fold(features) for features in kind] for kind in values])
        low, high = _limits(maps, 99.5)
        for k, i in itertools.product(range(kinds), range(images)):
            pixels = _picture(maps[k, i]) if row == 0 else _unit(maps[k, i], low, high)
            _draw(sheet, LEFT + i * block + k * pitch, y, 0.92 * pitch, pixels, "magma" if row else "gray")
        if row and np.isfinite(high):
            _draw_scale(sheet, LEFT + images * block - between + 0.08, y, 0.92 * pitch, low, high)
        y += pitch
    return y + 0.15


def _draw_scale(sheet: "Axes", x: float, y: float, height: float, low: float, high: float) -> None:
    axes = sheet.inset_axes((x, -y - height, 0.1, height), transform=sheet.transData)
    axes.imshow(np.linspace(1, 0, 64)[:, None], cmap="magma", aspect="auto")
    axes.axis("off")
    for value, at in ((high, y + 0.07), (low, y + height - 0.07)):
        _write(sheet, x + 0.15, at, f"{value:.2g}", fontsize=7, ha="left", color="0.35")


def _leaves_the_scale(inputs: np.ndarray) -> bool:
    return bool(np.nanmax(np.abs(inputs - 0.5), initial=0) > 0.501)


def _displayed(inputs: np.ndarray) -> np.ndarray:
    """Inputs [kinds, n, h, w, c] brought to the range 0 to 1. Copies that leave it are scaled together, with 1 % clipped at either end."""
    shown = np.array(inputs)
    copies = shown[1:]
    if copies.size and _leaves_the_scale(copies):
        low, high = np.nanpercentile(copies, (1, 99))
        shown[1:] = (copies - low) / max(high - low, 1e-6)
    return np.clip(np.nan_to_num(shown, nan=0.5), 0, 1)


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


def _limits(values: np.ndarray, top: float = 100.0) -> tuple[float, float]:
    """The least finite value and percentile `top`, or the greatest where that is no more than the least; NaN if no value is finite."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return math.nan, math.nan
    low, high = float(finite.min()), float(np.percentile(finite, top))
    return low, high if high > low else float(finite.max())


def _unit(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Values scaled so that `low` becomes 0 and `high`, with all above it, 1; if both are equal, 0.5. What is not finite is drawn blank."""
    values = np.where(np.isfinite(values), values, np.nan).astype(np.float64)
    return np.clip((values - low) / (high - low), 0.0, 1.0) if high > low else values * 0 + 0.5


def _picture(pixels: np.ndarray) -> np.ndarray:
    """An image [h, w, c] as imshow takes it: RGB if it has three channels, else grey."""
    return np.nan_to_num(pixels, nan=0.5) if pixels.shape[-1] == 3 else pixels.mean(axis=-1)
