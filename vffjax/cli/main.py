"""The command line: one function for each command. Bad input ends with status 2 and one line on stderr."""

import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from vffjax import backend, versions
from vffjax.cli import run_commands
from vffjax.cli.flags import a_data_dir, describe_keys, json_file, naming_files, parse_train, parser_of, whole_numbers
from vffjax.config import CHANGEABLE, FIELDS, MAX_LAYERS, Config
from vffjax.costs import ledger
from vffjax.errors import SafeStream, UserError, notice, printable
from vffjax.files import write_json
from vffjax.runs import termination
from vffjax.runs.termination import Terminated
from vffjax.weights import weights

USAGE = """usage: vffjax COMMAND [OPTION ...]

  train      train a network by a configuration; python train.py is the same
  evaluate   validation and test error of a trained workdir
  predict    classes of image files, by each group and by the ensemble
  prepare    download a data set for tensorflow-datasets
  export     weights of a trained workdir as a safetensors file, or its ensemble as a program for JAX and flatbuffers
  memory     what a training step takes, beside what back-propagation takes
  locality   whether any gradient crosses a group, proved on the program that trains; and what each group sees
  reproduce  train a finished workdir's run again and compare, to the bit
  version    print the version; also --version and -V

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
        "evaluate": run_commands.evaluate,
        "predict": run_commands.predict,
        "prepare": _prepare,
        "export": run_commands.export,
        "memory": _memory,
        "locality": _locality,
        "reproduce": run_commands.reproduce,
        "version": _version,
    }
    if arguments[:1] in (["--version"], ["-V"]):
        arguments = ["version"]
    _hold_descriptors()
    out = SafeStream(sys.stdout)
    # Also for what libraries print: neither stream need be there.
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(SafeStream(sys.stderr)):
        try:
            status = termination.interruptible(lambda: _run(commands, arguments))
        except (KeyboardInterrupt, Terminated) as leave:  # SIGTERM comes here while nothing could be lost
            _leave_at_once(out, leave)
        out.flush()
    if out.failure:
        if not isinstance(out.failure, BrokenPipeError):  # of a reader such as head, which has gone
            notice(f"vffjax: error: standard output cannot be written ({out.failure})")
        with contextlib.suppress(Exception):  # else Python tries once more at its end, and says so
            os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
        status = status or 1
    sys.exit(status)


def _leave_at_once(out: SafeStream, leave: KeyboardInterrupt | Terminated) -> NoReturn:
    """Ends the process, whatever its other thread is doing: to unwind the compiler and the device can take long, or crash."""
    saved = termination.saved()
    with contextlib.suppress(KeyboardInterrupt):  # pressed twice
        saved = termination.settle(1.0) or saved
    status, why = 130, f"interrupted; {saved}" if saved else "interrupted"
    if isinstance(leave, Terminated):
        status, why = 143, f"told to leave (SIGTERM): {leave}"
    notice(f"vffjax: {why}")
    out.flush()
    if termination.working():
        os._exit(status)
    sys.exit(status)


def _run(commands: dict[str, Callable[[list[str]], int | None]], arguments: list[str]) -> int:
    """Runs the command; its exit status. An error has been told on stderr."""
    try:
        if not arguments or arguments[0] in ("-h", "--help", "help"):
            print(USAGE)
            return 0
        if arguments[0] not in commands:
            raise UserError(f"COMMAND={arguments[0]}: not known; choose one of {', '.join(commands)}")
        return commands[arguments[0]](arguments[1:]) or 0
    except UserError as error:
        notice(f"vffjax: error: {error}")
        return 2
    except Terminated as leave:
        notice(f"vffjax: told to leave (SIGTERM): {leave}")
        return 143
    except SystemExit as leave:  # argparse, after it has printed its help; a library, with what is wrong in words
        if leave.code is None or isinstance(leave.code, int):
            return leave.code or 0
        notice(f"vffjax: error: {leave.code}")
        return 1


def _hold_descriptors() -> None:
    """If a shell has closed descriptor 0, 1 or 2, the next file to be opened would get its number, and what libraries print."""
    with contextlib.suppress(OSError):
        while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(descriptor)


def _version(arguments: list[str]) -> None:
    if arguments:
        raise UserError(f"argument {arguments[0]!r}: not known; vffjax version takes none")
    print(f"vffjax {versions.own()}")


def _train(arguments: list[str]) -> None:
    if not arguments or {"-h", "--help"} & set(arguments):
        print(TRAIN_USAGE + describe_keys())
        return
    config, name, workdir = parse_train(arguments)
    digest = hashlib.sha256(json.dumps(config.to_dict() | {key: FIELDS[key].default for key in CHANGEABLE}).encode()).hexdigest()[:8]
    folder = pathlib.Path(workdir) if workdir else pathlib.Path("runs") / f"{name}-{digest}"
    with naming_files(folder):
        if not (folder / "config.json").exists():  # a run that goes on has its weights already
            weights.check_start(config)
        backend.start()
        from vffjax.runs import experiment

        _check_memory(config)
        summary = experiment.train(config, folder)
    shown = ", ".join(f"{e:.2f}" for e in summary["test_error_per_group"])
    print(f"test error {summary['test_error']:.2f} % (groups {shown}; voting {summary['voting']}), best epoch {summary['best_epoch']}")


def _of_config(parser: argparse.ArgumentParser, arguments: list[str]) -> tuple[argparse.Namespace, Config, str]:
    """Options, configuration and its name, for a command that looks at a configuration and trains nothing."""
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--out", type=json_file, metavar="FILE.json", help="write JSON")
    a, rest = parser.parse_known_args(arguments)
    config, name, workdir = parse_train(rest)
    if workdir:
        raise UserError(f"--workdir={workdir}: nothing is trained to keep; use --out FILE.json")
    return a, config, name


def _prepare(arguments: list[str]) -> None:
    parser = parser_of("prepare", "Downloads a data set and prepares it for tensorflow-datasets, as array_record files.")
    parser.add_argument("dataset", metavar="DATASET", help="mnist, fashion_mnist, cifar10 or cifar100")
    parser.add_argument(
        "--data_dir", type=a_data_dir, default="", help="folder of tensorflow-datasets; default: $TFDS_DATA_DIR, else ~/tensorflow_datasets"
    )
    a = parser.parse_args(arguments)
    from vffjax.data import load as data

    with naming_files(pathlib.Path(a.data_dir), "--data_dir"):
        folder = data.prepare(a.dataset, a.data_dir)
    print(printable(f"{a.dataset}: ready in {folder}"))


def _memory(arguments: list[str]) -> None:
    about = "MB of one training step by the compiler's own plan: of back-propagation, of the same with its maps recomputed (checkpointed)"
    about += " or its batch in four parts (accumulated), and of the configuration's own rule. Nothing is trained and no data set is read."
    parser = parser_of("memory", about)
    parser.usage = MEMORY_USAGE
    of_depths = "layers, all of the first width, without pooling, each a group; default: the configuration's own network"
    parser.add_argument("--depths", default="", metavar="N,N", help=of_depths)
    parser.add_argument("--batches", default="", metavar="N,N", help="images in a step; default: config.batch_size")
    target = "here: JAX's first device; cpu; tpu: a TPU v5e, which need not be there (its compiler: pip install -e '.[tpu-compiler]')"
    parser.add_argument("--target", choices=ledger.TARGETS, default="here", help=target)
    a, config, name = _of_config(parser, arguments)
    depths = whole_numbers("--depths", a.depths, MAX_LAYERS)
    cases, network = ledger.cases(config, depths, whole_numbers("--batches", a.batches)), ledger.network_of(config, depths)
    backend.start()
    from vffjax.costs import memory, targets

    device = targets.find(a.target)
    rows = []
    for case in cases:
        if sys.stderr.isatty():
            notice(f"== {case}")
        rows.append(memory.measure(case, device))
    ledger.compare(rows)
    found = {"config": name, "network": network, "target": a.target, "jax": importlib.metadata.version("jax"), "rows": rows}
    if a.out:
        with naming_files(a.out, "--out"):
            write_json(a.out, found)
    if a.json:
        print(json.dumps(found, indent=2))
        return
    if not network["own"]:
        print(f"network: {network['measured']}")
    print(ledger.table(rows))


def _check_memory(config: Config) -> None:
    """Refuses at once what cannot fit: XLA would end the process, or the kernel would."""
    import jax

    from vffjax.costs.memory import least_bytes

    device = jax.devices()[0]
    here, least = _bytes_of(device), least_bytes(config)
    if here is not None and least > here:  # one device trains, however many there are
        shown = ", ".join(f"config.{key}={getattr(config, key)}" for key in ("widths", "batch_size", "copies_per_class"))
        raise UserError(f"{shown}: needs {least / 1e9:,.1f} GB at the least, and {device.device_kind} has {here / 1e9:,.1f}; lower them")


def _bytes_of(device: Any) -> int | None:
    """The device's memory, for the processor the machine's; None where nobody says."""
    with contextlib.suppress(Exception):  # a plugin may know no statistics and raise whatever it likes
        if limit := (device.memory_stats() or {}).get("bytes_limit"):
            return int(limit)
    if device.platform == "cpu":
        with contextlib.suppress(AttributeError, ValueError, OSError):  # Windows has no sysconf
            found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            return found if found > 0 else None
    return None


def _locality(arguments: list[str]) -> int:
    about = "Proves, on the program that trains, that no gradient crosses from one group to another, confirms it by numbers"
    about += (
        " on random images, and lists what each group learns from. Status 1 if something crosses. Nothing is trained, no data set read."
    )
    parser = parser_of("locality", about)
    parser.usage = LOCALITY_USAGE
    parser.add_argument("--structure", action="store_true", help="the traced program alone, no numbers: nothing is compiled")
    a, config, name = _of_config(parser, arguments)
    backend.start()
    from vffjax.proofs import locality

    certificate = locality.certify(config, numeric=not a.structure)
    found = {"config": name, "jax": importlib.metadata.version("jax")} | certificate
    if a.out:
        with naming_files(a.out, "--out"):
            write_json(a.out, found)
    print(json.dumps(found, indent=2) if a.json else f"{name}: {locality.text(certificate)}")
    return 0 if certificate["local"] else 1


if __name__ == "__main__":
    main()
