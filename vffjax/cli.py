"""The command line: one function for each command. Bad input ends with status 2 and one line on stderr."""

import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable
from typing import Any, NoReturn

from vffjax import ledger, weights
from vffjax.config import MAX_LAYERS, Config, least_bytes
from vffjax.data import SIZES
from vffjax.errors import UserError, printable
from vffjax.flags import (
    EXPORTS,
    a_count,
    a_data_dir,
    a_path,
    an_epoch,
    describe_keys,
    export_file,
    export_target,
    json_file,
    parse_train,
    whole_numbers,
)
from vffjax.logbook import write_json
from vffjax.termination import Terminated

USAGE = """usage: vffjax COMMAND [OPTION ...]

  train      train a network by a configuration; python train.py is the same
  evaluate   validation and test error of a trained workdir
  predict    classes of image files, by each group and by the ensemble
  prepare    download a data set for tensorflow-datasets
  export     weights of a trained workdir as a safetensors file, or its ensemble as a program that JAX alone runs
  memory     what a training step takes, beside what back-propagation takes
  locality   whether any gradient crosses a group, proved on the program that trains; and what each group sees
  reproduce  train a finished workdir's run again and compare, to the bit

vffjax COMMAND --help tells more."""

TRAIN_USAGE = """usage: python train.py --config FILE[:VARIANT] [--config.KEY=VALUE ...] [--workdir DIR]

Trains the network of a configuration file, group by group, without back-propagation across groups. The same command
with the same workdir goes on where it stopped. The workdir gets config.json, metrics.jsonl, checkpoints/, summary.json
(errors in percent), curves.png and features.png.

  --config FILE   such as configs/digits.py (embedded data, seconds) or configs/cifar10.py:small
  --workdir DIR   default: runs/ and the file's name and a hash of the configuration

The keys and their defaults; a file sets some of them, --config.KEY=VALUE wins:
"""

MEMORY_USAGE = """vffjax memory --config FILE[:VARIANT] [--config.KEY=VALUE ...] [--depths 2,4,8] [--batches 128,512]
                     [--target here|cpu|tpu] [--json] [--out FILE.json]

--config and --config.KEY=VALUE as for train; see vffjax train --help."""


LOCALITY_USAGE = """vffjax locality --config FILE[:VARIANT] [--config.KEY=VALUE ...] [--structure] [--json] [--out FILE.json]

--config and --config.KEY=VALUE as for train; see vffjax train --help."""


def main(arguments: list[str] | None = None) -> NoReturn:
    """Runs one command and exits: 0 done, 1 what was asked does not hold, 2 bad input, 130 interrupted, 143 told to leave."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # Before jax is imported; what a user sets wins. XLA's and Orbax's own chatter is not ours to show.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    commands: dict[str, Callable[[list[str]], int | None]] = {
        "train": _train,
        "evaluate": _evaluate,
        "predict": _predict,
        "prepare": _prepare,
        "export": _export,
        "memory": _memory,
        "locality": _locality,
        "reproduce": _reproduce,
    }
    status = None
    try:
        if not arguments or arguments[0] in ("-h", "--help", "help"):
            print(USAGE)
        elif arguments[0] not in commands:
            raise UserError(f"COMMAND={arguments[0]}: not known; choose one of {', '.join(commands)}")
        else:
            status = commands[arguments[0]](arguments[1:])
        # A reader such as head may have gone; find out while the handler below is in force.
        sys.stdout.flush()
    except UserError as error:
        print("vffjax: error:", printable(str(error)), file=sys.stderr)
        sys.exit(2)
    except Terminated as leave:
        print(f"vffjax: told to leave (SIGTERM): {leave}", file=sys.stderr)
        sys.exit(143)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        print("vffjax: interrupted; the same command goes on from the latest checkpoint", file=sys.stderr)
        sys.exit(130)
    sys.exit(status or 0)


def _train(arguments: list[str]) -> None:
    if not arguments or {"-h", "--help"} & set(arguments):
        print(TRAIN_USAGE + describe_keys())
        return
    config, name, workdir = parse_train(arguments)
    digest = hashlib.sha256(json.dumps(config.to_dict() | {"data_dir": ""}).encode()).hexdigest()[:8]
    folder = pathlib.Path(workdir) if workdir else pathlib.Path("runs") / f"{name}-{digest}"
    with _naming_files(folder):
        if not (folder / "config.json").exists():  # a run that goes on has its weights already
            weights.check_start(config)
        from vffjax import experiment

        _check_memory(config)
        summary = experiment.train(config, folder)
    shown = ", ".join(f"{e:.2f}" for e in summary["test_error_per_group"])
    print(f"test error {summary['test_error']:.2f} % (groups {shown}; voting {summary['voting']}), best epoch {summary['best_epoch']}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see vffjax {self.prog.split()[-1]} --help")


def _parser(command: str, description: str) -> _Parser:
    return _Parser(prog=f"vffjax {command}", description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)


def _of_config(parser: _Parser, arguments: list[str]) -> tuple[argparse.Namespace, Config, str]:
    """Options, configuration and its name, for a command that looks at a configuration and trains nothing."""
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--out", type=json_file, metavar="FILE.json", help="write JSON")
    a, rest = parser.parse_known_args(arguments)
    config, name, workdir = parse_train(rest)
    if workdir:
        raise UserError(f"--workdir={workdir}: nothing is trained to keep; use --out FILE.json")
    return a, config, name


def _evaluate(arguments: list[str]) -> None:
    parser = _parser("evaluate", "Validation and test error of a trained workdir, in percent, per group and of the voting ensemble.")
    parser.add_argument("--workdir", type=a_path, required=True, help="folder of the run")
    parser.add_argument("--inference", choices=("heads", "sweep"), default="", help="how to classify; default: as the run was configured")
    parser.add_argument("--epoch", type=an_epoch, default="best", help="best (by validation error), latest, or a saved epoch's number")
    parser.add_argument("--data_dir", type=a_data_dir, default="", help="folder of tensorflow-datasets, if not as configured")
    parser.add_argument("--json", action="store_true", help="print JSON")
    a = parser.parse_args(arguments)
    from vffjax import experiment

    with _naming_files(a.workdir):
        found = experiment.evaluate(a.workdir, a.inference, a.epoch, a.data_dir)
    if a.json:
        print(json.dumps(found, indent=2))
        return
    print(f"epoch {found['epoch']}, inference {found['inference']}, voting groups {found['voting']}")
    for split in ("val", "test"):
        if found[f"{split}_error"] is not None:
            groups = "  ".join(f"group{i} {e:.2f} %" for i, e in enumerate(found[f"{split}_error_per_group"]))
            print(f"{split:4s} error {found[f'{split}_error']:.2f} %   {groups}")


def _predict(arguments: list[str]) -> None:
    parser = _parser("predict", "Classes of PNG or JPEG files, with probabilities, by each group's head and by the voting ensemble.")
    parser.add_argument("--workdir", type=a_path, required=True, help="folder of the run")
    parser.add_argument("--epoch", type=an_epoch, default="best", help="best (by validation error), latest, or a saved epoch's number")
    parser.add_argument("--top", type=a_count, default=3, help="classes shown")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("images", nargs="+", type=pathlib.Path, metavar="IMAGE", help="PNG or JPEG; resized to the network's input")
    a = parser.parse_args(arguments)
    from vffjax import prediction

    with _naming_files(a.workdir):
        found = prediction.predict(a.workdir, a.images, a.epoch, a.top)
    if a.json:
        print(json.dumps(found, indent=2))
        return
    for entry in found:
        print(printable(entry["image"]))
        for name, ranking in entry["by"].items():
            shown = "   ".join(f"{printable(r['class'])} {100 * r['probability']:.1f} %" for r in ranking)
            print(f"  {name:9s} {shown}")


def _prepare(arguments: list[str]) -> None:
    parser = _parser("prepare", "Downloads a data set and prepares it for tensorflow-datasets, as array_record files.")
    parser.add_argument("dataset", metavar="DATASET", help="mnist, fashion_mnist, cifar10 or cifar100")
    parser.add_argument(
        "--data_dir", type=a_data_dir, default="", help="folder of tensorflow-datasets; default: $TFDS_DATA_DIR, else ~/tensorflow_datasets"
    )
    a = parser.parse_args(arguments)
    from vffjax import data

    with _naming_files(pathlib.Path(a.data_dir), "--data_dir"):
        folder = data.prepare(a.dataset, a.data_dir)
    print(printable(f"{a.dataset}: ready in {folder}"))


def _export(arguments: list[str]) -> None:
    what = "Writes what a run has learnt: its weights, for other programs or for --config.init_from, or the ensemble of its voting groups"
    parser = _parser("export", what + ", byte images in, log-probabilities out, as one program that JAX runs without this package.")
    parser.add_argument("--workdir", type=a_path, required=True, help="folder of the run")
    form = "safetensors: weights; stablehlo: the ensemble, with a FILE.json that says how to call it; default: as --out, else safetensors"
    parser.add_argument("--format", choices=tuple(EXPORTS), default="", help=form)
    names = "of the tensors in a safetensors file; auto: torchvision's where it has such a network, else ours"
    parser.add_argument("--names", choices=weights.NAMES, default="auto", help=names)
    out = "an existing file is replaced; default: weights.safetensors or ensemble.stablehlo in the workdir"
    parser.add_argument("--out", type=export_file, metavar="FILE", help=out)
    parser.add_argument("--epoch", type=an_epoch, default="best", help="best (by validation error), latest, or a saved epoch's number")
    a = parser.parse_args(arguments)
    form, path = export_target(a.workdir, a.format, a.names, a.out)
    from vffjax import artefact
    from vffjax.workdir import load_run

    if form == "stablehlo":
        artefact.check_place(path)
    with _naming_files(a.workdir):
        plan, states, task, run = load_run(a.workdir, a.epoch)
    with _naming_files(path, "--out"):
        if form == "stablehlo":
            found = artefact.write_artefact(path, plan, states, task, run)
            where = f"for {', '.join(found['platforms'])}; {artefact.sidecar(path)} says how to call it"
            print(printable(f"{path}: groups {found['voting']} of epoch {run['epoch']} vote, {where}"))
            return
        about = {key: run[key] for key in ("epoch", "class_names", "image_shape")}
        about |= {"pixel_mean": task.mean.tolist(), "pixel_std": task.std.tolist()}
        notes = weights.write_weights(path, plan, states, about, names=a.names)
    print(printable("; ".join([f"{path}: {len(states)} groups of epoch {run['epoch']}", *notes])))


def _reproduce(arguments: list[str]) -> int:
    parser = _parser(
        "reproduce", "Trains a finished run again from its config.json and compares, to the bit. Status 1 if anything differs."
    )
    parser.add_argument("workdir", type=a_path, metavar="WORKDIR", help="folder of the finished run; nothing is written there")
    parser.add_argument("--into", type=a_path, metavar="DIR", help="folder to train in and keep; default: one that is deleted")
    parser.add_argument("--data_dir", type=a_data_dir, default="", help="folder of tensorflow-datasets, if not as configured")
    parser.add_argument("--json", action="store_true", help="print JSON")
    a = parser.parse_args(arguments)
    from vffjax import reproduction

    with tempfile.TemporaryDirectory(prefix="vffjax-") as scratch, _naming_files(a.into or pathlib.Path(scratch), "--into"):
        try:
            found = reproduction.reproduce(a.workdir, a.into or pathlib.Path(scratch), a.data_dir)
        except Terminated as leave:
            raise leave if a.into else Terminated("nothing is kept; with --into DIR it would go on from there") from None
    print(json.dumps(found, indent=2) if a.json else reproduction.text(found))
    return 0 if found["identical"] else 1


def _memory(arguments: list[str]) -> None:
    about = "MB of one training step by the compiler's own plan: of back-propagation, of the same with its maps recomputed (checkpointed)"
    about += " or its batch in four parts (accumulated), and of VFF. Nothing is trained and no data set is read."
    parser = _parser("memory", about)
    parser.usage = MEMORY_USAGE
    depths = "layers, all of the first width, without pooling; VFF with each layer a group; default: the configuration's own network"
    parser.add_argument("--depths", default="", metavar="N,N", help=depths)
    parser.add_argument("--batches", default="", metavar="N,N", help="images in a step; default: config.batch_size")
    target = "here: JAX's first device; cpu; tpu: a TPU v5e, which need not be there (its compiler: pip install -e '.[tpu-compiler]')"
    parser.add_argument("--target", choices=ledger.TARGETS, default="here", help=target)
    a, config, name = _of_config(parser, arguments)
    cases = ledger.cases(config, whole_numbers("--depths", a.depths, MAX_LAYERS), whole_numbers("--batches", a.batches))
    from vffjax import memory, targets

    device = targets.find(a.target)
    rows = []
    for case in cases:
        if sys.stderr.isatty():
            print(f"== {case}", file=sys.stderr)
        rows.append(memory.measure(case, device))
    ledger.compare(rows)
    found = {"config": name, "target": a.target, "jax": importlib.metadata.version("jax"), "rows": rows}
    if a.out:
        with _naming_files(a.out, "--out"):
            write_json(a.out, found)
    print(json.dumps(found, indent=2) if a.json else ledger.table(rows))


def _check_memory(config: Config) -> None:
    """Refuses at once what cannot fit: XLA would end the process, or the kernel would."""
    import jax

    device, sizes = jax.devices()[0], SIZES[config.dataset]
    here = (device.memory_stats() or {}).get("bytes_limit") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    least = least_bytes(config, sizes.image_shape, sizes.classes)
    if least > here * jax.device_count():
        shown = ", ".join(f"config.{key}={getattr(config, key)}" for key in ("widths", "batch_size", "copies_per_class"))
        raise UserError(f"{shown}: needs {least / 1e9:,.1f} GB at the least, and {device.device_kind} has {here / 1e9:,.1f}; lower them")


def _locality(arguments: list[str]) -> int:
    about = "Proves, on the program that trains, that no gradient crosses from one group to another, confirms it by numbers"
    about += (
        " on random images, and lists what each group learns from. Status 1 if something crosses. Nothing is trained, no data set read."
    )
    parser = _parser("locality", about)
    parser.usage = LOCALITY_USAGE
    parser.add_argument("--structure", action="store_true", help="the traced program alone, no numbers: nothing is compiled")
    a, config, name = _of_config(parser, arguments)
    from vffjax import locality

    certificate = locality.certify(config, numeric=not a.structure)
    found = {"config": name, "jax": importlib.metadata.version("jax")} | certificate
    if a.out:
        with _naming_files(a.out, "--out"):
            write_json(a.out, found)
    print(json.dumps(found, indent=2) if a.json else f"{name}: {locality.text(certificate)}")
    return 0 if certificate["local"] else 1


@contextlib.contextmanager
def _naming_files(folder: pathlib.Path, flag: str = "--workdir") -> Any:
    """A disk that is full, a folder that is not ours, or a network that the memory does not hold is bad input too."""
    try:
        yield
    except BrokenPipeError:
        raise
    except RecursionError as error:
        raise UserError(f"{folder}: a file there is nested too deeply to be read; restore it, or give another {flag}") from error
    except (MemoryError, RuntimeError) as error:
        # Of jax.errors.JaxRuntimeError there is no finer kind.
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        fix = "use smaller config.widths, config.batch_size or config.eval_batch_size, or --config.rematerialise=True"
        raise UserError(f"out of memory ({printable(str(error), 200)}); {fix}") from error
    except OSError as error:
        where = error.filename or folder
        raise UserError(f"{where}: {error.strerror or error}; check space and permissions, or give another {flag}") from error
