"""The command line: train, evaluate, predict, prepare. Bad input ends with status 2 and one line on stderr."""

import argparse
import contextlib
import hashlib
import json
import os
import pathlib
import sys
import textwrap
from typing import Any, NoReturn

from vffjax.config import FIELDS, Config, make_config
from vffjax.errors import UserError

USAGE = """usage: vffjax COMMAND [OPTION ...]

  train     train a network by a configuration; python train.py is the same
  evaluate  validation and test error of a trained workdir
  predict   classes of image files, by each group and by the ensemble
  prepare   download a data set for tensorflow-datasets

vffjax COMMAND --help tells more."""

TRAIN_USAGE = """usage: python train.py --config FILE[:VARIANT] [--config.KEY=VALUE ...] [--workdir DIR]

Trains the network of a configuration file, group by group, without back-propagation across groups. The same command
with the same workdir goes on where it stopped. The workdir gets config.json, metrics.jsonl, checkpoints/, summary.json
(errors in percent), curves.png and features.png.

  --config FILE   such as configs/digits.py (embedded data, seconds) or configs/cifar10.py:small
  --workdir DIR   default: runs/ and the file's name and a hash of the configuration

The keys and their defaults; a file sets some of them, --config.KEY=VALUE wins:
"""


def main(arguments: list[str] | None = None) -> NoReturn:
    """Runs one command and exits: 0 done, 2 bad input, 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # Before jax is imported; what a user sets wins. XLA's and Orbax's own chatter is not ours to show.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    commands = {"train": _train, "evaluate": _evaluate, "predict": _predict, "prepare": _prepare}
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

    print(f"workdir {folder}", file=sys.stderr, flush=True)
    with _naming_files(folder):
        summary = experiment.train(config, folder)
    shown = ", ".join(f"{e:.2f}" for e in summary["test_error_per_group"])
    print(f"test error {summary['test_error']:.2f} % (groups {shown}; voting {summary['voting']}), best epoch {summary['best_epoch']}")


def parse_train(arguments: list[str]) -> tuple[Config, str, str]:
    """The validated configuration, the configuration's name, and the workdir or ''."""
    from absl import flags
    from ml_collections import config_flags

    values = flags.FlagValues()
    argv = ["train.py", *arguments]
    try:
        config_flags.DEFINE_config_file("config", None, "configuration file", flag_values=values, sys_argv=argv)
        flags.DEFINE_string("workdir", "", "folder of the run", flag_values=values)
        rest = values(argv)[1:]
        raw = values.config
    except SystemExit:
        raise
    except (flags.Error, OSError, AttributeError, KeyError, TypeError, ValueError, ImportError, SyntaxError) as error:
        raise UserError(f"{_flag_at_fault(arguments, error)}; see python train.py --help") from error
    if rest:
        raise UserError(f"argument {rest[0]!r}: not known; give --config FILE, --config.KEY=VALUE and --workdir DIR")
    if raw is None:
        raise UserError("--config: missing; give a configuration file such as --config configs/digits.py")
    file = next(a.split("=", 1)[1] if "=" in a else arguments[i + 1] for i, a in enumerate(arguments) if a.lstrip("-").split("=")[0] == "config")
    name = pathlib.Path(file.split(":")[0]).stem + ("-" + file.split(":", 1)[1] if ":" in file else "")
    return make_config(raw), name, values.workdir


def _flag_at_fault(arguments: list[str], error: Exception) -> str:
    """The key and value of the override that cannot be parsed, else what the library says of it."""
    reason = " ".join(str(error).split())[:300]
    for i, argument in enumerate(arguments):
        flag, _, value = argument.lstrip("-").partition("=")
        key = flag.removeprefix("config.")
        if flag.startswith("config.") and key.split(".")[0] not in FIELDS:
            import difflib

            near = difflib.get_close_matches(key, FIELDS, n=1)
            return f"config.{key}={value!r}: no such key; " + (f"did you mean config.{near[0]}?" if near else "see the list of keys")
        if flag.startswith("config.") and (f"config.{key}" in reason or repr(key) in reason or value and value in reason):
            value = value or (arguments[i + 1] if i + 1 < len(arguments) else "")
            return f"config.{key}={value!r}: not a value of the right type, such as {FIELDS[key.split('.')[0]].default!r} ({reason})"
        if flag == "config":
            value = value or (arguments[i + 1] if i + 1 < len(arguments) else "")
            file = value.split(":")[0]
            if not pathlib.Path(file).is_file():
                return f"--config={value}: no such file; give a configuration file such as configs/digits.py"
    return reason


def describe_keys() -> str:
    """Every configuration key with its default, its choices and what it means."""
    lines = []
    for key, field in FIELDS.items():
        default = {} if key == "overrides" else field.default
        choices = f" One of {', '.join(field.metadata['choices'])}." if field.metadata["choices"] else ""
        text = f"{field.metadata['doc']}.{choices}"
        lines += [f"  {key} = {default!r}", *textwrap.wrap(text, 110, initial_indent=" " * 6, subsequent_indent=" " * 6)]
    return "\n".join(lines)


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


@contextlib.contextmanager
def _naming_files(folder: pathlib.Path) -> Any:
    """A disk that is full or a folder that is not ours is bad input too."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        where = error.filename or folder
        raise UserError(f"{where}: {error.strerror or error}; check space and permissions, or give another --workdir") from error
