"""Commands on a run that has been trained: evaluate, predict, export, reproduce."""

import argparse
import dataclasses
import json
import pathlib
import tempfile

from vffjax import backend
from vffjax.cli.flags import (
    EXPORTS,
    a_count,
    a_curve,
    a_data_dir,
    a_group,
    a_path,
    a_run_folder,
    a_threshold,
    an_epoch,
    an_image,
    export_file,
    export_target,
    naming_files,
    parse_train,
    parser_of,
)
from vffjax.config import Config
from vffjax.errors import UserError, bad_key, notice, printable
from vffjax.files import write_json
from vffjax.paths import check_run_folder
from vffjax.runs.termination import Terminated
from vffjax.weights import weights

EVALUATE_USAGE = """vffjax evaluate (--workdir DIR | --config FILE[:VARIANT] [--config.KEY=VALUE ...])
                       [--inference heads|sweep|early_exit [--threshold T] [--exits voting|all] [--curve FILE.json]]
                       [--epoch best|latest|N] [--data_dir DIR [--other_data]] [--json]"""


def evaluate(arguments: list[str]) -> None:
    what = (
        "Validation and test error of a trained workdir, or of the weights that a configuration starts from, in percent, per group and of"
    )
    parser = parser_of("evaluate", f"{what} the voting ensemble.")
    parser.usage = EVALUATE_USAGE
    parser.add_argument("--workdir", type=a_path, help="folder of the run; or instead, as for train:")
    parser.add_argument(
        "--config", metavar="FILE", help="and --config.KEY=VALUE, such as --config.init_from: weights that nobody has trained here"
    )
    ways = "how to classify; early_exit: by the heads, an image only as far as it needs; default: as the run was configured"
    parser.add_argument("--inference", choices=("heads", "sweep", "early_exit"), default="", help=ways)
    sure = "early_exit: probability, up to 1, at which an image leaves; default: chosen on validation images"
    parser.add_argument("--threshold", type=a_threshold, metavar="T", help=sure)
    parser.add_argument("--exits", choices=("voting", "all"), help="early_exit: groups where images may leave; default: those that vote")
    parser.add_argument("--curve", type=a_curve, metavar="FILE.json", help="early_exit: write figures by threshold, draw FILE.png")
    parser.add_argument("--epoch", type=an_epoch, default="best", help="best (by validation error), latest, or a saved epoch's number")
    parser.add_argument("--data_dir", type=a_data_dir, default="", help="folder of tensorflow-datasets, if not as configured")
    others = "judge the run by other images than its own; they must have the same shape and classes"
    parser.add_argument("--other_data", action="store_true", help=others)
    parser.add_argument("--json", action="store_true", help="print JSON")
    a, rest = parser.parse_known_args(arguments)
    config = _start_of(a, rest)
    for option in ("threshold", "exits", "curve"):
        if (value := getattr(a, option)) is not None and a.inference != "early_exit":
            raise UserError(f"--{option}={value}: of early exit alone; add --inference=early_exit, or leave it out")
    backend.start()
    from vffjax.uses import early_exit, evaluation

    early = early_exit.Wanted(a.threshold, a.exits or "voting", a.curve is not None)
    if config:
        with naming_files(pathlib.Path(config.init_from), "--config.init_from"):
            found = evaluation.evaluate_start(config, a.inference, early)
    else:
        with naming_files(a.workdir):
            found = evaluation.evaluate(a.workdir, a.inference, a.epoch, a.data_dir, True, early, a.other_data)
    if a.curve:
        from vffjax.runs.plots import plot_exits

        with naming_files(a.curve, "--curve"):
            write_json(a.curve, found)
            plot_exits(a.curve.with_suffix(".png"), found)
        del found["curve"]
    if a.json:
        print(json.dumps(found, indent=2))
        return
    if not found.get("own_data", True):
        print("judged by other data than the run's own")
    print(f"epoch {found['epoch']}, inference {found['inference']}, voting groups {found['voting']}")
    for split in ("val", "test"):
        if found[f"{split}_error"] is not None:
            groups = "  ".join(f"group{i} {e:.2f} %" for i, e in enumerate(found[f"{split}_error_per_group"]))
            print(f"{split:4s} error {found[f'{split}_error']:.2f} %   {groups}")
    if "threshold" in found:
        print(early_exit.text(found))


def _start_of(a: argparse.Namespace, rest: list[str]) -> Config | None:
    """The configuration whose start is to be evaluated, or None for a workdir."""
    if not a.config:
        if rest:
            raise UserError(f"unrecognized arguments: {' '.join(rest)}; see vffjax evaluate --help")
        if not a.workdir:
            raise UserError("--workdir or --config: missing; give the folder of a run, or a configuration; see vffjax evaluate --help")
        return None
    if a.workdir:
        raise UserError(f"--workdir={a.workdir}: a run has its configuration; leave out --config")
    if a.other_data:
        raise UserError("--other_data: a configuration names its data itself; leave it out, or give a --workdir")
    if a.epoch != "best":
        raise UserError(f"--epoch={a.epoch}: nothing has been trained; leave it out, or give a --workdir")
    config = parse_train(["--config", a.config, *rest])[0]
    if not config.init_from:
        raise bad_key("init_from", "", "nothing to evaluate but random weights", "give --config.init_from=FILE, or a --workdir")
    return dataclasses.replace(config, data_dir=a.data_dir or config.data_dir)


def predict(arguments: list[str]) -> None:
    about = (
        "Classes of PNG or JPEG files, with probabilities, by each group's head and by the voting ensemble. The network sees a file as a"
    )
    about += (
        " person does: turned by its EXIF orientation; what is transparent on black, or on white where what is visible is dark. Its short"
    )
    about += " side is resized to the network's input and the middle cut out. A picture unlike the training images gets a note on stderr."
    parser = parser_of("predict", about)
    parser.add_argument("--workdir", type=a_path, required=True, help="folder of the run")
    parser.add_argument("--epoch", type=an_epoch, default="best", help="best (by validation error), latest, or a saved epoch's number")
    parser.add_argument("--top", type=a_count, default=3, help="classes shown")
    parser.add_argument("--json", action="store_true", help="print JSON")
    shown = "PNG or JPEG; of a wide or tall one the middle is seen"
    parser.add_argument("images", nargs="+", type=an_image, metavar="IMAGE", help=shown)
    a = parser.parse_args(arguments)
    backend.start()
    from vffjax.uses import prediction

    with naming_files(a.workdir):
        found = prediction.predict(a.workdir, a.images, a.epoch, a.top)
    for entry in found:
        if "note" in entry:
            notice(f"{entry['image']}: {entry['note']}")
    if a.json:
        print(json.dumps(found, indent=2))
        return
    for entry in found:
        print(printable(entry["image"]))
        for name, ranking in entry["by"].items():
            shown = "   ".join(f"{printable(r['class'])} {100 * r['probability']:.1f} %" for r in ranking)
            print(f"  {name:9s} {shown}")


def export(arguments: list[str]) -> None:
    what = "Writes what a run has learnt: its weights, for other programs or for --config.init_from, or the ensemble of its voting groups"
    parser = parser_of(
        "export", what + ", byte images in, log-probabilities out, as one program that runs without this package, by JAX and flatbuffers."
    )
    parser.add_argument("--workdir", type=a_path, required=True, help="folder of the run")
    form = "safetensors: weights; stablehlo: the ensemble, with a FILE.json that says how to call it; default: as --out, else safetensors"
    parser.add_argument("--format", choices=tuple(EXPORTS), default="", help=form)
    names = "of the tensors in a safetensors file; auto: torchvision's where it has such a network, else ours"
    parser.add_argument("--names", choices=weights.NAMES, default="auto", help=names)
    out = "an existing file is replaced; default: weights.safetensors, groupN.safetensors or ensemble.stablehlo in the workdir"
    parser.add_argument("--out", type=export_file, metavar="FILE", help=out)
    parser.add_argument("--epoch", type=an_epoch, default="best", help="best (by validation error), latest, or a saved epoch's number")
    alone = "write only this group, by our names, and read no file of another group's checkpoint. A run may start from it by"
    alone += " config.init_from; its other groups then start from its seed. Default: all groups"
    parser.add_argument("--group", type=a_group, metavar="N", help=alone)
    a = parser.parse_args(arguments)
    form, path = export_target(a.workdir, a.format, a.names, a.out, a.group)
    backend.start()
    from vffjax.runs.workdir import load_group, load_run
    from vffjax.uses import artefact

    if a.group is not None:
        with naming_files(a.workdir):
            plan, state, run = load_group(a.workdir, a.group, a.epoch)
        with naming_files(path, "--out"):
            weights.write_group(path, plan, a.group, state, {key: run[key] for key in ("epoch", "class_names", "image_shape")})
        print(printable(f"{path}: group{a.group} of epoch {run['epoch']}"))
        return
    if form == "stablehlo":
        artefact.check_place(path)
    with naming_files(a.workdir):
        plan, states, task, run = load_run(a.workdir, a.epoch)
    with naming_files(path, "--out"):
        if form == "stablehlo":
            found = artefact.write_artefact(path, plan, states, task, run)
            where = f"for {', '.join(found['platforms'])}; {artefact.sidecar(path)} says how to call it"
            print(printable(f"{path}: groups {found['voting']} of epoch {run['epoch']} vote, {where}"))
            return
        about = {key: run[key] for key in ("epoch", "class_names", "image_shape")}
        about |= {"pixel_mean": task.mean.tolist(), "pixel_std": task.std.tolist()}
        notes = weights.write_weights(path, plan, states, about, names=a.names)
    print(printable("; ".join([f"{path}: {len(states)} groups of epoch {run['epoch']}", *notes])))


def reproduce(arguments: list[str]) -> int:
    parser = parser_of(
        "reproduce", "Trains a finished run again from its config.json and compares, to the bit. Status 1 if anything differs."
    )
    parser.add_argument("workdir", type=a_path, metavar="WORKDIR", help="folder of the finished run; nothing is written there")
    parser.add_argument("--into", type=a_run_folder, metavar="DIR", help="folder to train in and keep; default: one that is deleted")
    parser.add_argument("--data_dir", type=a_data_dir, default="", help="folder of tensorflow-datasets, if not as configured")
    parser.add_argument("--json", action="store_true", help="print JSON")
    a = parser.parse_args(arguments)
    backend.start()
    from vffjax.uses import reproduction

    with tempfile.TemporaryDirectory(prefix="vffjax-") as scratch, naming_files(a.into or pathlib.Path(scratch), "--into"):
        if a.into is None:
            check_run_folder(scratch, "TMPDIR")
        try:
            found = reproduction.reproduce(a.workdir, a.into or pathlib.Path(scratch), a.data_dir)
        except Terminated as leave:
            raise leave if a.into else Terminated("nothing is kept; with --into DIR it would go on from there") from None
    print(json.dumps(found, indent=2) if a.json else reproduction.text(found))
    return 0 if found["identical"] else 1
