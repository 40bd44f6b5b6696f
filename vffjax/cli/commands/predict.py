"""Classifies PNG or JPEG files, with probabilities, by each group's head and by the voting ensemble.

An image is first turned upright by its EXIF orientation. Transparent pixels become black, or white if the visible ones are dark. The
short side is resized to the network's input, and the middle is cut out. A note on stderr says if an image is unlike the training images.
"""

import functools

from vffjax import backend, paths
from vffjax.cli.options import a_count, a_path, give, naming_files, parser_of
from vffjax.errors import notice, printable


def run(arguments: list[str]) -> None:
    parser = parser_of("predict", __doc__, "--epoch", "--json", "--code")
    parser.add_argument("--workdir", type=a_path, required=True, help="folder of the run")
    parser.add_argument("--top", type=a_count, default=3, help="number of classes shown; default: 3")
    parser.add_argument("images", nargs="+", type=functools.partial(paths.local, named="IMAGE"), metavar="IMAGE", help="PNG or JPEG file")
    a = parser.parse_args(arguments)
    backend.start()
    from vffjax.uses import prediction

    with naming_files(a.workdir):
        found = prediction.predict(a.workdir, a.images, a.epoch, a.top)
    lines = []
    for entry in found:
        if "note" in entry:
            notice(f"{entry['image']}: {entry['note']}")
        lines.append(printable(entry["image"]))
        for name, ranking in entry["by"].items():
            shown = "   ".join(f"{printable(r['class'])} {100 * r['probability']:.1f} %" for r in ranking)
            lines.append(f"  {name:9s} {shown}")
    give(a, found, "\n".join(lines))
