"""Measures the validation and test error of a run, or of the weights that a configuration starts from.

The errors are in percent, of each group and of the voting ensemble.
"""

import argparse
import dataclasses
import os
import pathlib

from vffjax import backend, files
from vffjax.cli import flags, options
from vffjax.config import Config
from vffjax.errors import UserError, bad_key, printable

USAGE = """vffjax evaluate --workdir DIR [OPTION ...]
       vffjax evaluate --config NAME|FILE[:VARIANT] [--config.KEY=VALUE ...]
                       [OPTION ...]"""
MAX_CURVE = 2**20  # bytes of a file that --curve may replace


def run(arguments: list[str]) -> None:
    a, rest = _parser().parse_known_args(arguments)
    config = _start_of(a, rest)
    for option in ("threshold", "exits", "curve"):
        if (value := getattr(a, option)) is not None and a.inference != "early_exit":
            raise UserError(f"--{option}={value}: only early exit takes it; add --inference=early_exit, or leave it out")
    backend.start()
    from vffjax.uses import early_exit, evaluation

    early = early_exit.Wanted(a.threshold, a.exits or "voting", a.curve is not None)
    if config:
        with options.naming_files(pathlib.Path(config.init_from), "--config.init_from"):
            found = evaluation.evaluate_start(flags.ready(config), a.inference, early, a.views)
    else:
        with options.naming_files(a.workdir):
            found = evaluation.evaluate(a.workdir, a.inference, a.epoch, a.data_dir, True, early, a.other_data, a.views)
    if a.curve:
        from vffjax.runs.plots import plot_exits

        with options.naming_files(a.curve, "--curve"):
            files.write_json(a.curve, found)
            plot_exits(a.curve.with_suffix(".png"), found)
        del found["curve"]
    lines = [] if found.get("own_data", True) else ["evaluated on other data than the run's own"]
    lines.append(f"epoch {found['epoch']}, inference {found['inference']}, views {found['views']}, voting groups {found['voting']}")
    for split in ("val", "test"):
        if found[f"{split}_error"] is not None:
            groups = "  ".join(f"group{i} {e:.2f} %" for i, e in enumerate(found[f"{split}_error_per_group"]))
            lines.append(f"{split:4s} error {found[f'{split}_error']:.2f} % of {found[f'{split}_images']:,} images   {groups}")
    if "threshold" in found:
        lines.append(early_exit.text(found))
    options.give(a, found, "\n".join(lines))


def _parser() -> argparse.ArgumentParser:
    parser = options.parser_of("evaluate", __doc__, "--epoch", "--data_dir", "--json", "--code", usage=USAGE)
    parser.add_argument("--workdir", type=options.a_path, help="folder of the run; or in its place a configuration:")
    weights = "a configuration as for train, whose --config.init_from names weights that were not trained here"
    parser.add_argument("--config", metavar="CONFIG", help=weights)
    ways = "how to classify; early_exit: by the heads, where an image leaves at the first head that is sure; default: as configured"
    parser.add_argument("--inference", choices=("heads", "sweep", "rule", "early_exit"), default="", help=ways)
    seen = "views of an image whose scores are averaged: itself, its mirror image too, or six; default: as configured"
    parser.add_argument("--views", choices=("one", "mirror", "six"), default="", help=seen)
    sure = "early_exit: probability, above 0 and up to 1, at which an image leaves; default: chosen on validation images"
    parser.add_argument("--threshold", type=_a_threshold, metavar="T", help=sure)
    exits = "early_exit: groups at which images may leave; default: those that vote"
    parser.add_argument("--exits", choices=("voting", "all"), help=exits)
    curve = "early_exit: write the figures of every threshold, and draw them as FILE.png"
    parser.add_argument("--curve", type=_a_curve, metavar="FILE.json", help=curve)
    other = "allow images that are not the run's own; they must have the same shape and classes"
    parser.add_argument("--other_data", action="store_true", help=other)
    return parser


def _start_of(a: argparse.Namespace, rest: list[str]) -> Config | None:
    """The configuration whose first weights are evaluated, or None if a workdir is given."""
    if not a.config:
        if rest:
            raise UserError(f"argument {rest[0]!r}: not known; see vffjax evaluate --help")
        if not a.workdir:
            raise UserError("--workdir or --config: missing; give the folder of a run, or a configuration; see vffjax evaluate --help")
        return None
    if a.workdir:
        raise UserError(f"--workdir={a.workdir}: a run has its own configuration; leave out --config")
    if a.other_data:
        raise UserError("--other_data: a configuration names its data itself; leave it out, or give a --workdir")
    if a.epoch != "best":
        raise UserError(f"--epoch={a.epoch}: nothing has been trained; leave it out, or give a --workdir")
    config = flags.parse_train(["--config", a.config, *rest])[0]
    if not config.init_from:
        raise bad_key("init_from", "", "without it the weights are random", "give --config.init_from=FILE, or a --workdir")
    return dataclasses.replace(config, data_dir=a.data_dir or config.data_dir)


def _a_threshold(text: str) -> float:
    try:
        threshold = float(text)
    except ValueError:
        threshold = 0.0
    if not 0 < threshold <= 1:
        raise argparse.ArgumentTypeError(f"{printable(text, 40)!r} is no probability above 0; give one up to 1, such as 0.9")
    return threshold


def _a_curve(text: str) -> pathlib.Path:
    """The value of --curve: a .json file that can be written, and so can the .png beside it."""
    path = options.new_file("--curve", text, ".json")
    # A run's config.json has that suffix too, and its features.png.
    for there in (path, path.with_suffix(".png")):
        if os.path.lexists(there) and not files.holds(path, "curve", most=MAX_CURVE):
            raise UserError(f"--curve={text}: {there} exists and is not of a curve; give another .json file")
    return path
