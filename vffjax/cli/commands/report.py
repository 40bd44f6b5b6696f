"""Writes a page about what a run has learnt, with pictures; or, while it trains, its curves.

The page is report.html in the workdir, or live.html with --live. It is one file, which needs no network. The pictures also
lie in the folder report/ as PNG files.
"""

from vffjax import backend
from vffjax.cli.options import a_path, naming_files, parser_of
from vffjax.errors import UserError

USAGE = """vffjax report --workdir DIR [--epoch best|latest|N] [--data_dir DIR]
                     [--code DIR]
       vffjax report --workdir DIR --live"""


def run(arguments: list[str]) -> None:
    parser = parser_of("report", __doc__, "--epoch", "--data_dir", "--code", usage=USAGE)
    parser.add_argument("--workdir", type=a_path, required=True, help="folder of the run")
    live = "draw the curves of a run that is training, again after each epoch, until it has ended or Ctrl-C is pressed"
    parser.add_argument("--live", action="store_true", help=live)
    a = parser.parse_args(arguments)
    if a.live:
        for option, given in (("epoch", a.epoch != "best"), ("data_dir", a.data_dir), ("code", a.code)):
            if given:
                raise UserError(f"--{option}={getattr(a, option)}: --live reads metrics.jsonl alone; leave it out")
        from vffjax.uses import report_live

        with naming_files(a.workdir):
            path = report_live.follow(a.workdir)
            print(f"{path}: the run has ended; vffjax report --workdir {a.workdir} shows what was learnt")
        return
    backend.start()
    from vffjax.uses import report_sections

    with naming_files(a.workdir):
        print(report_sections.write(a.workdir, a.epoch, a.data_dir))
