"""Exports the weights of a run as a safetensors file, or its ensemble as a program for JAX and flatbuffers.

The weights are for other programs, or for --config.init_from. The program is the ensemble of the voting groups: byte images in,
log-probabilities out. It runs without this package.
"""

import argparse
import functools
import pathlib

from vffjax import backend
from vffjax.cli.options import a_count, a_path, naming_files, new_file, parser_of
from vffjax.errors import UserError, printable

# The formats, each also the suffix of its files, and the default name of the file.
FORMATS = {"safetensors": "weights", "stablehlo": "ensemble"}
NAMES = ("auto", "vffjax", "torchvision")


def run(arguments: list[str]) -> None:
    a = _parsed(arguments)
    form, path = _target(a)
    backend.start()
    from vffjax.runs.workdir import load_group, load_run
    from vffjax.uses import artefact
    from vffjax.weights import weights

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
        trained = load_run(a.workdir, a.epoch)
    plan, states, _, run = trained
    with naming_files(path, "--out"):
        if form == "stablehlo":
            found = artefact.write_artefact(path, trained)
            where = f"for {', '.join(found['platforms'])}; {artefact.sidecar(path)} says how to call it"
            print(printable(f"{path}: groups {found['voting']} of epoch {run['epoch']} vote, {where}"))
            return
        notes = weights.write_weights(path, plan, states, trained.about, names=a.names, half=a.half)
    print(printable("; ".join([f"{path}: {len(states)} groups of epoch {run['epoch']}", *notes])))


def _parsed(arguments: list[str]) -> argparse.Namespace:
    parser = parser_of("export", __doc__, "--epoch", "--code")
    parser.add_argument("--workdir", type=a_path, required=True, help="folder of the run")
    form = "safetensors: weights; stablehlo: the ensemble, with a FILE.json that says how to call it; default: by the suffix of --out"
    parser.add_argument("--format", choices=tuple(FORMATS), default="", help=form + ", else safetensors")
    names = "names of the tensors in a safetensors file; auto, the default: torchvision's if it has this network, else our own"
    half = "write kernels as float16, which halves a safetensors file of weights and rounds them"
    parser.add_argument("--half", action="store_true", help=half)
    parser.add_argument("--names", choices=NAMES, default="auto", help=names)
    out = "an existing file is replaced; default: weights.safetensors, groupN.safetensors or ensemble.stablehlo in the workdir"
    parser.add_argument("--out", type=_export_file, metavar="FILE", help=out)
    group = "write this group only, by our own names, and read only its files; default: all groups. A run that starts from this file by"
    group += " config.init_from takes its other groups from its seed."
    parser.add_argument("--group", type=functools.partial(a_count, least=0), metavar="N", help=group)
    return parser.parse_args(arguments)


def _export_file(text: str) -> pathlib.Path:
    return new_file("--out", text, *(f".{form}" for form in FORMATS))


def _target(a: argparse.Namespace) -> tuple[str, pathlib.Path]:
    """The format and the file to write, each as given or by the other options. Raises `UserError` if the options contradict each other."""
    form = a.format or (a.out.suffix[1:] if a.out else "safetensors")
    if a.out and a.out.suffix != f".{form}":
        raise UserError(f"--format={form}: --out={a.out} is of another format; give a .{form} file, or leave out --format")
    if a.names != "auto" and form != "safetensors":
        raise UserError(f"--names={a.names}: a .{form} file holds no named tensors; leave it out, or use --format=safetensors")
    if a.half and (form != "safetensors" or a.group is not None):
        raise UserError("--half: only a safetensors file of all groups can have float16 kernels; leave it out")
    if a.group is not None and form != "safetensors":
        raise UserError(f"--group={a.group}: a .{form} file holds the ensemble; leave it out, or use --format=safetensors")
    if a.group is not None and a.names == "torchvision":
        raise UserError(f"--group={a.group}: torchvision knows no groups; leave out --names, or use --names=vffjax")
    name = FORMATS[form] if a.group is None else f"group{a.group}"
    return form, a.out or a.workdir / f"{name}.{form}"
