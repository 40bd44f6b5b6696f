"""The page of a report: sections of text, tables and pictures, as one HTML file that needs nothing else. Needs no JAX.

All that a page shows is escaped: names of classes and groups, paths and values of the configuration may come from anyone.
"""

import base64
import dataclasses
import functools
import pathlib
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from vffjax.config import FIELDS
from vffjax.errors import aid, printable
from vffjax.files import as_json, replace_file
from vffjax.keys import default_of
from vffjax.registry import ROOMS, outside_names
from vffjax.runs.drawing import draw
from vffjax.runs.plots import num_groups, points_of
from vffjax.uses import report_figures as figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURES = "report"  # the folder in the workdir that gets the pictures
# The lists of metrics.jsonl that have pictures of their own, or none. All others are the rule's.
_KNOWN = ("loss", "local_loss", "head_loss", "train_accuracy", "val_error", "skipped_steps")
_MOST_METRICS = 6  # pictures of a rule's own metrics
# The names of all pictures, by which those of an earlier report are known.
NAMES = (
    *("errors", "local_loss", "head_loss", *(f"metric{i}" for i in range(_MOST_METRICS)), "confusion", "class_errors", "mistakes", "depth"),
    *("dead", "agreement", "exits", "copies", "copy_means", "features"),
)


class Picture(NamedTuple):
    """A picture of a page."""

    title: str
    caption: str
    wide: bool  # whether it takes the whole width
    base64: str  # of a PNG file


class Table(NamedTuple):
    """A table of a page."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    fold: str = ""  # if it is not empty, the table is folded up behind it


@dataclasses.dataclass
class Section:
    """A section of a page. One that has nothing to show is left out."""

    title: str
    folder: pathlib.Path  # of the pictures
    texts: list[str] = dataclasses.field(default_factory=list)
    tables: list[Table] = dataclasses.field(default_factory=list)
    command: str = ""
    pictures: list[Picture] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def draw(self, name: str, title: str, caption: str, make: "Callable[[], Figure]", wide: bool = False) -> None:
        """Adds the picture that `make` returns, which is also written to NAME.png. If it fails, a note says so."""
        self.add(draw(self.folder / f"{name}.png", make), title, caption, wide)

    def add(self, path: pathlib.Path | None, title: str, caption: str, wide: bool = False) -> None:
        """Adds a PNG file; for None, which `drawing.draw` returns if it fails, a note."""
        if path is None:
            self.notes.append(f"The picture “{title}” could not be drawn; vffjax report says why on the terminal.")
        else:
            self.pictures.append(Picture(title, caption, wide, base64.b64encode(path.read_bytes()).decode()))

    def fill(self, fill: "Callable[[Section], None]") -> "Section":
        """Calls `fill` with this section, and returns it. If that fails, a note says so, and what was added until then stays."""
        with aid(f"{self.folder.parent / 'report.html'}, {self.title}"):
            fill(self)
            return self
        self.notes.append("A part of this section could not be made; vffjax report says why on the terminal.")
        return self

    @property
    def empty(self) -> bool:
        return not (self.tables or self.pictures or self.notes)


def write(
    path: pathlib.Path, title: str, about: str, facts: Sequence[tuple[str, str]], sections: Sequence[Section], refresh: int = 0
) -> None:
    """Writes a page. With `refresh` it reloads itself after so many seconds."""
    import jinja2

    environment = jinja2.Environment(loader=jinja2.PackageLoader("vffjax.uses"), autoescape=True, undefined=jinja2.StrictUndefined)
    shown = [section for section in sections if not section.empty]
    page = environment.get_template("report.html").render(title=title, about=about, facts=facts, sections=shown, refresh=refresh)
    replace_file(path, page.encode("utf-8", "xmlcharrefreplace"))  # a class name may hold half of a surrogate pair


def picture_folder(workdir: pathlib.Path, fresh: bool = False) -> pathlib.Path:
    """The folder of the pictures, which is made if there is none. If it is to be `fresh`, pictures of an earlier report are deleted."""
    folder = workdir / PICTURES
    folder.mkdir(exist_ok=True)
    for name in NAMES if fresh else ():
        (folder / f"{name}.png").unlink(missing_ok=True)
    return folder


def text(value: Any) -> str:
    """Any value as one line."""
    return printable(str(as_json(value)), 400)


def about_the_run(section: Section, config: Mapping[str, Any], origins: Sequence[Mapping[str, Any]], workdir: pathlib.Path) -> None:
    """The configuration, where the run was trained, and the command that trains it again."""
    default = {key: as_json(default_of(field)) for key, field in FIELDS.items()}
    changed = [(key, text(value), text(default.get(key))) for key, value in config.items() if key in default and value != default[key]]
    section.tables.append(Table(("changed key", "value", "default"), changed))
    every = [(key, text(value)) for key, value in config.items() if key in default]
    section.tables.append(Table(("key", "value"), every, f"All {len(every)} keys of the configuration"))
    for i, origin in enumerate(reversed(origins)):
        fold = f"Where earlier epochs were trained ({len(origins) - i} of {len(origins)})" if i else ""
        section.tables.append(Table((), list(_rows_of(origin)), fold))
    if origins:
        outside = outside_names({room.key: config[room.key] for room in ROOMS})
        section.command = f"vffjax reproduce {shlex.quote(str(workdir.resolve()))}" + (" --code FOLDER_OF_YOUR_CODE" if outside else "")


def _rows_of(origin: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    versions = origin.get("versions")
    if isinstance(versions, Mapping):
        yield "versions", ", ".join(f"{text(name)} {text(version)}" for name, version in versions.items() if version is not None)
    for key in ("commit", "device", "cores", "flags"):
        if origin.get(key):
            yield key, text(origin[key])


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else ""


def curves(section: Section, records: list[dict[str, Any]], mark: int | None = None, called: str = "") -> None:
    """The curves of a run's record: errors, local loss, head loss, and the rule's own metrics. Epoch `mark` is `called` so."""
    if len(records) < 2:  # a curve of one epoch would be a point
        lists = [(text(key.removesuffix("_per_group")), value) for r in records for key, value in r.items() if key.endswith("_per_group")]
        rows = [(name, *map(_number, values)) for name, values in lists if isinstance(values, list)]
        heads = [f"group {g}" for g in range(max((len(row) - 1 for row in rows), default=0))]
        section.tables += [Table(("after one epoch", *heads), rows)] if rows else []
        return
    marked = "" if mark is None else f" The dotted line marks the {called}."
    both = {key: name for key, name in (("val_error", "validation"), ("train_accuracy", "training")) if points_of(records, key)}
    augmented = "The training error is that of augmented images, while the weights change."
    augmented += " The first errors may lie above the scale." if len(records) >= figures.LONG else ""
    if both:
        title = "Training and validation error" if len(both) == 2 else f"Error on {next(iter(both.values()))} images"
        section.draw("errors", title, augmented + marked, functools.partial(figures.curves, records, both, "error (%)", mark))
    for key, title, about in (
        ("local_loss", "Local loss", "The loss by which the rule trains each group, without that of the head; no unit."),
        ("head_loss", "Head loss", "The cross-entropy of each group's head on training images; no unit."),
    ):
        if any(value for g in range(num_groups(records, f"{key}_per_group")) for _, value in points_of(records, f"{key}_per_group", g)):
            section.draw(key, title, about + marked, functools.partial(figures.curves, records, {key: ""}, "loss", mark))
    own = sorted({key.removesuffix("_per_group") for record in records for key in record if key.endswith("_per_group")} - {*_KNOWN})
    for i, key in enumerate(own[:_MOST_METRICS]):
        # The name of a metric may come from outside, so the file is not called by it.
        make = functools.partial(figures.curves, records, {key: ""}, text(key), mark)
        section.draw(f"metric{i}", f"{text(key)}, a metric of the rule", "By group." + marked, make)
