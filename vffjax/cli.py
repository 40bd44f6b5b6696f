"""The command line: train, evaluate, predict, prepare, memory. Bad input ends with status 2 and one line on stderr."""

import argparse
import contextlib
import hashlib
import importlib.metadata
import inspect
import json
import os
import pathlib
import re
import sys
import textwrap
import traceback
from typing import Any, NoReturn

from vffjax import ledger
from vffjax.config import FIELDS, Config, make_config, nearest_key
from vffjax.errors import UserError, bad_key
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


def parse_train(arguments: list[str]) -> tuple[Config, str, str]:
    """The validated configuration, the configuration's name, and the workdir or ''."""
    from absl import flags
    from ml_collections import config_flags

    given, rest = _take_config(arguments)
    values = flags.FlagValues()
    argv = ["train.py", *rest]
    raw, name = load_config_file(given)
    try:
        flags.DEFINE_string("workdir", "", "folder of the run", flag_values=values)
        config_flags.DEFINE_config_dict("config", raw, flag_values=values, sys_argv=argv)
        stray = values(argv)[1:]
        raw = values.config
    except (flags.Error, OSError, AttributeError, KeyError, TypeError, ValueError, SyntaxError) as error:
        raise _flag_at_fault(rest, error) from error
    if stray:
        raise UserError(f"argument {stray[0]!r}: not known; give --config FILE, --config.KEY=VALUE and --workdir DIR")
    return make_config(raw), name, values.workdir


def _take_config(arguments: list[str]) -> tuple[str, list[str]]:
    """The value of --config, the last if there are several, and the other arguments."""
    given, rest, left = "", [], iter(arguments)
    for argument in left:
        flag, equals, value = argument.partition("=")
        if flag in ("--config", "-config"):
            given = value if equals else next(left, "")
        else:
            rest.append(argument)
    if not given:
        raise UserError("--config: missing; give a configuration file such as --config configs/digits.py")
    return given, rest


def load_config_file(given: str) -> tuple[Any, str]:
    """What `get_config` of FILE[:VARIANT] returns, and a name for it. Whatever goes wrong there, `UserError` names the file."""
    import ml_collections

    file, colon, variant = given.partition(":")
    # Not by ml_collections: its errors are tracebacks, and it remembers the last file.
    space: dict[str, Any] = {"__name__": "config_file", "__file__": file}
    try:
        exec(compile(pathlib.Path(file).read_bytes(), file, "exec"), space)
        if "get_config" not in space:
            raise UserError(f"--config={given}: {file} has no function get_config; define it, as in configs/digits.py")
        variants = space.get("VARIANTS", () if inspect.signature(space["get_config"]).parameters else None)
        if colon and variants is None:
            raise UserError(f"--config={given}: {file} has no variants; use --config={file}")
        if colon and variants and variant not in variants:
            raise UserError(f"--config={given}: {file} has no variant {variant!r}; choose one of {', '.join(variants)}")
        config = space["get_config"](variant) if colon else space["get_config"]()
    except UserError:
        raise
    except OSError as error:
        if error.filename != file:
            raise
        raise UserError(f"--config={given}: {error.strerror}; give a configuration file such as configs/digits.py") from error
    except Exception as error:  # a configuration file is a program
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        line = getattr(error, "lineno", None) or (lines[-1] if lines else "?")
        locked = re.search(r'Key "(\w+)" does not exist', str(error))  # ml_collections adds the list of all keys
        problem = f"config.{locked[1]}: no such key; {nearest_key(locked[1])}" if locked else f"{_first_line(error)}; correct the file"
        raise UserError(f"--config={given}: line {line}: {problem}") from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(f"--config={given}: get_config returns {type(config).__name__}; return what default_config() gives")
    return config, pathlib.Path(file).stem + (f"-{variant}" if variant else "")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(map(str, error.args[:1])).partition(chr(10))[0]}"


def _flag_at_fault(arguments: list[str], error: Exception) -> UserError:
    """Names the override that cannot be parsed, else says what the library says."""
    reason = " ".join(str(error).split())[:300]
    for i, argument in enumerate(arguments):
        flag, equals, value = argument.lstrip("-").partition("=")
        if not flag.startswith("config."):
            continue
        key, _, deeper = flag.removeprefix("config.").partition(".")
        if not equals:
            value = arguments[i + 1] if i + 1 < len(arguments) else ""
        if key not in FIELDS:
            return bad_key(key, value, "no such key", nearest_key(key))
        if deeper:
            fix = f"give the whole of config.{key}" + (", as \"{'group0': {'learning_rate': 1e-4}}\"" if key == "overrides" else "")
            return bad_key(f"{key}.{deeper}", value, "cannot be set alone", fix)
        if flag in reason:
            return bad_key(key, value, f"not a value of the right type ({reason})", f"give one such as {FIELDS[key].default!r}")
    return UserError(f"{reason}; see python train.py --help")


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


def whole_numbers(flag: str, text: str) -> list[int]:
    """The different numbers of a comma-separated list, in order; none if it is empty."""
    words = text.split(",") if text else []
    if not all(re.fullmatch("[0-9]{1,6}", word) and int(word) for word in words):
        raise UserError(f"{flag}={text}: not whole numbers from 1; give for example 2,4,8")
    return list(dict.fromkeys(map(int, words)))


def json_file(text: str) -> pathlib.Path:
    """The value of --out, if it is a .json file that can be written."""
    path = pathlib.Path(text)
    if path.suffix != ".json" or path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"--out={text}: cannot be written; give a .json file in a folder that exists and is yours")
    return path


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
