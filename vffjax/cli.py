"""The command line: train, evaluate, predict, prepare, memory. Bad input ends with status 2 and one line on stderr."""

import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import os
import pathlib
import sys
from typing import Any, NoReturn

from vffjax import ledger
from vffjax.errors import UserError
from vffjax.flags import describe_keys, json_file, parse_train, whole_numbers
from vffjax.logbook import write_json

USAGE = """usage: vffjax COMMAND [OPTION ...]

  train     train a network by a configuration; python train.py is the same
  evaluate  validation and test error of a trained workdir
  predict   classes of image files, by each group and by the ensemble
  prepare   download a data set for tensorflow-datasets
  memory    what a training step takes, beside what back-propagation takes

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


def main(arguments: list[str] | None = None) -> NoReturn:
    """Runs one command and exits: 0 done, 2 bad input, 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # Before jax is imported; what a user sets wins. XLA's and Orbax's own chatter is not ours to show.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    commands = {"train": _train, "evaluate": _evaluate, "predict": _predict, "prepare": _prepare, "memory": _memory}
    try:
        if not arguments or arguments[0] in ("-h", "--help", "help"):
            print(USAGE)
        elif arguments[0] not in commands:
            raise UserError(f"COMMAND={arguments[0]}: not known; choose one of {', '.join(commands)}")
        else:
            commands[arguments[0]](arguments[1:])
        # A reader such as head may have gone; find out while the handler below is in force.
        sys.stdout.flush()
    except UserError as error:
        print("vffjax: error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        print("vffjax: interrupted; the same command goes on from the latest checkpoint", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


def _train(arguments: list[str]) -> None:
    if not arguments or {"-h", "--help"} & set(arguments):
        print(TRAIN_USAGE + describe_keys())
        return
    config, name, workdir = parse_train(arguments)
    digest = hashlib.sha256(json.dumps(config.to_dict() | {"data_dir": ""}).encode()).hexdigest()[:8]
    folder = pathlib.Path(workdir) if workdir else pathlib.Path("runs") / f"{name}-{digest}"
    from vffjax import experiment

    with _naming_files(folder):
        summary = experiment.train(config, folder)
    shown = ", ".join(f"{e:.2f}" for e in summary["test_error_per_group"])
    print(f"test error {summary['test_error']:.2f} % (groups {shown}; voting {summary['voting']}), best epoch {summary['best_epoch']}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see vffjax {self.prog.split()[-1]} --help")


def _parser(command: str, description: str) -> _Parser:
    return _Parser(prog=f"vffjax {command}", description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)


def _evaluate(arguments: list[str]) -> None:
    parser = _parser("evaluate", "Validation and test error of a trained workdir, in percent, per group and of the voting ensemble.")
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="folder of the run")
    parser.add_argument("--inference", choices=("heads", "sweep"), default="", help="how to classify; default: as the run was configured")
    parser.add_argument("--epoch", default="best", help="best (by validation error), latest, or a saved epoch's number")
    parser.add_argument("--data_dir", default="", help="folder of tensorflow-datasets, if not as configured")
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
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="folder of the run")
    parser.add_argument("--epoch", default="best", help="best (by validation error), latest, or a saved epoch's number")
    parser.add_argument("--top", type=int, default=3, help="classes shown")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("images", nargs="+", type=pathlib.Path, metavar="IMAGE", help="PNG or JPEG; resized to the network's input")
    a = parser.parse_args(arguments)
    if a.top < 1:
        raise UserError(f"--top={a.top}: too small; show at least 1 class")
    from vffjax import prediction

    with _naming_files(a.workdir):
        found = prediction.predict(a.workdir, a.images, a.epoch, a.top)
    if a.json:
        print(json.dumps(found, indent=2))
        return
    for entry in found:
        print(entry["image"])
        for name, ranking in entry["by"].items():
            shown = "   ".join(f"{r['class']} {100 * r['probability']:.1f} %" for r in ranking)
            print(f"  {name:9s} {shown}")


def _prepare(arguments: list[str]) -> None:
    parser = _parser("prepare", "Downloads a data set and prepares it for tensorflow-datasets, as array_record files.")
    parser.add_argument("dataset", metavar="DATASET", help="mnist, fashion_mnist, cifar10 or cifar100")
    parser.add_argument("--data_dir", default="", help="folder of tensorflow-datasets; default: $TFDS_DATA_DIR, else ~/tensorflow_datasets")
    a = parser.parse_args(arguments)
    from vffjax import data

    print(f"{a.dataset}: ready in {data.prepare(a.dataset, a.data_dir)}")


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
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--out", type=json_file, metavar="FILE.json", help="write JSON")
    a, rest = parser.parse_known_args(arguments)
    config, name, workdir = parse_train(rest)
    if workdir:
        raise UserError(f"--workdir={workdir}: nothing is trained to keep; use --out FILE.json")
    cases = ledger.cases(config, whole_numbers("--depths", a.depths), whole_numbers("--batches", a.batches))
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


@contextlib.contextmanager
def _naming_files(folder: pathlib.Path, flag: str = "--workdir") -> Any:
    """A disk that is full or a folder that is not ours is bad input too."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        where = error.filename or folder
        raise UserError(f"{where}: {error.strerror or error}; check space and permissions, or give another {flag}") from error
