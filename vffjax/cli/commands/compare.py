"""Shows side by side what runs were configured with and what came out.

The table has the keys in which the runs differ, their errors in percent and their times; runs that differ in their seed
alone are also averaged. A run may still be training. --plot overlays their curves.
"""

from vffjax import backend
from vffjax.cli import options

USAGE = """vffjax compare DIR [DIR ...] [--plot FILE.png] [--json]
                      [--out FILE.json] [--code DIR]"""


def run(arguments: list[str]) -> None:
    parser = options.parser_of("compare", __doc__, "--json", "--out", "--code", usage=USAGE)
    folders = "folders of runs or of sweeps, or folders that hold runs"
    parser.add_argument("runs", nargs="+", type=options.a_path, metavar="DIR", help=folders)
    plot = "draw the validation errors of all runs over their epochs"
    parser.add_argument("--plot", type=lambda text: options.new_file("--plot", text, ".png"), metavar="FILE.png", help=plot)
    a = parser.parse_args(arguments)
    with options.naming_files(a.runs[0], "DIR"):
        backend.start()
        from vffjax.many import comparison, figures

        found = comparison.read(comparison.folders_of(a.runs))
        if a.plot:
            figures.plot_curves(a.plot, found["runs"])
        shown = found | {"runs": [{key: value for key, value in run.items() if key != "records"} for run in found["runs"]]}
        options.give(a, shown, comparison.text(found))
