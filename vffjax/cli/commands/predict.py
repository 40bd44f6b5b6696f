"""Classifies PNG, JPEG, WebP or BMP files, with probabilities, by each group's head and by the voting ensemble.

Of a folder all image files are taken, also those in its folders. An image is first turned upright by its EXIF orientation. Transparent
pixels become black, or white if the visible ones are dark. The short side is resized to the network's input, and the middle is cut out. A
note says if an image is unlike the training images. A file that cannot be read is named on stderr, and the others are classified; the exit
status is then 1, or 2 if there are no others.
"""

import csv
import functools
import io
import json
from typing import Any, NamedTuple

from vffjax import backend, files, paths
from vffjax.cli.options import a_count, a_path, naming_files, new_file, parser_of
from vffjax.errors import notice, printable


def run(arguments: list[str]) -> int:
    parser = parser_of("predict", __doc__, "--epoch", "--json", "--code")
    parser.add_argument("--workdir", type=a_path, required=True, help="folder of the run")
    parser.add_argument("--top", type=a_count, default=3, help="number of classes shown; default: 3")
    about = "write a table: file, the likeliest classes with their probabilities by the ensemble, note, error; replaces an existing file"
    about += ", unless no image could be read"
    parser.add_argument("--csv", type=lambda text: new_file("--csv", text, ".csv"), metavar="FILE.csv", help=about)
    image = functools.partial(paths.local, named="IMAGE")
    parser.add_argument("images", nargs="+", type=image, metavar="IMAGE", help="image file, or a folder of them")
    a = parser.parse_args(arguments)
    backend.start()
    from vffjax.uses import prediction

    kept, rows, read, refused = [], list[_Row](), 0, 0
    with naming_files(a.workdir):
        for entry in prediction.predict(a.workdir, a.images, a.epoch, a.top):
            read, refused = read + ("by" in entry), refused + ("error" in entry)
            if "error" in entry:
                notice(f"vffjax: error: {entry['error']}")
            elif "note" in entry and not a.csv:
                notice(f"{entry['image']}: {entry['note']}")
            if a.csv:
                rows.append(_Row.of(entry))
            if a.json:
                kept.append(entry)
            elif "by" in entry and not a.csv:
                print(_text(entry))
    if not read:
        return 2
    if a.csv:
        with naming_files(a.csv, "--csv"):
            files.replace_file(a.csv, _as_csv(rows).encode("utf-8", "backslashreplace"))
    if a.json:
        print(json.dumps(kept, indent=2))
    elif a.csv:
        print(printable(f"{a.csv}: {read} images" + (f", and {refused} that could not be read" if refused else "")))
    return 1 if refused else 0


def _text(entry: dict[str, Any]) -> str:
    lines = [printable(entry["image"])]
    for name, ranking in entry["by"].items():
        shown = "   ".join(f"{printable(r['class'])} {100 * r['probability']:.1f} %" for r in ranking)
        lines.append(f"  {name:9s} {shown}")
    return "\n".join(lines)


class _Row(NamedTuple):
    """What a table holds of an entry of `predict`."""

    file: str
    ranking: list[dict[str, Any]]  # by the ensemble
    note: str
    error: str

    @classmethod
    def of(cls, entry: dict[str, Any]) -> "_Row":
        error = entry.get("error", "").removeprefix(f"{entry['image']}: ")
        return cls(entry["image"], entry.get("by", {}).get("ensemble", []), entry.get("note", ""), error)


def _as_csv(rows: list[_Row]) -> str:
    text, most = io.StringIO(newline=""), max(len(row.ranking) for row in rows)
    later = [f"{column}_{i}" for i in range(2, most + 1) for column in ("class", "probability")]
    writer = csv.writer(text)
    writer.writerow(["file", "class", "probability", *later, "note", "error"])
    for row in rows:
        cells = [cell for one in row.ranking for cell in (one["class"], f"{one['probability']:.6f}")]
        writer.writerow([row.file, *cells, *[""] * (2 * most - len(cells)), row.note, row.error])
    return text.getvalue()
