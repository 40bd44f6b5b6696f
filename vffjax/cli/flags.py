"""What a command line says: the configuration from --config FILE and --config.KEY=VALUE, numbers and files. Raises `UserError`."""

import argparse
import contextlib
import json
import os
import pathlib
import re
import textwrap
import unicodedata
from collections.abc import Iterator
from typing import Any, NoReturn

from vffjax.cli.config_file import MAX_DIGITS, MAX_FILE, load_config_file
from vffjax.config import FIELDS, Config, nearest_key
from vffjax.errors import UserError, bad_key, printable
from vffjax.paths import check_run_folder, local, problem_of
from vffjax.training.checks import make_config

# What export writes: the end of a file's name, and its default name.
EXPORTS = {"safetensors": "weights", "stablehlo": "ensemble"}


def parse_train(arguments: list[str]) -> tuple[Config, str, str]:
    """The validated configuration, the configuration's name, and the workdir or ''."""
    from absl import flags
    from ml_collections import config_flags

    given, rest = _take_config(arguments)
    for argument in rest:
        if argument.lstrip("-").startswith(
            ("flagfile", "undefok")
        ):  # absl's own: to read flags from a file, and to pass over a misspelt one
            raise UserError(f"argument {argument!r}: not known; give each --config.KEY=VALUE itself")
    names = [argument.lstrip("-").partition("=")[0] for argument in rest]
    for key in FIELDS:
        if isinstance(FIELDS[key].default, tuple) and names.count(f"config.{key}") > 1:  # ml_collections would join them
            raise UserError(f"--config.{key}: given {names.count(f'config.{key}')} times; give it once")
    values = flags.FlagValues()
    argv = ["train.py", *rest]
    raw, name = load_config_file(given)
    try:
        flags.DEFINE_string("workdir", "", "folder of the run", flag_values=values)
        config_flags.DEFINE_config_dict("config", raw, flag_values=values, sys_argv=argv)
        stray = values(argv)[1:]
        raw = values.config
    # Deep nesting in a value ends Python's parser with the last two.
    except (flags.Error, OSError, AttributeError, KeyError, TypeError, ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise _flag_at_fault(rest, error) from error
    if stray:
        raise UserError(f"argument {stray[0]!r}: not known; give --config FILE, --config.KEY=VALUE and --workdir DIR")
    workdir = ""
    if values["workdir"].present:
        try:
            workdir = str(a_path(values.workdir))
        except argparse.ArgumentTypeError as error:
            raise UserError(f"--workdir={values.workdir}: {error}") from None
        check_run_folder(workdir)
    return make_config(raw), name, workdir


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


def _flag_at_fault(arguments: list[str], error: Exception) -> UserError:
    """Names the override that cannot be parsed, else says what the library says."""
    reason = printable(str(error), 300) or type(error).__name__
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
        default: Any = {} if key == "overrides" else FIELDS[key].default
        if flag in reason or isinstance(error, (MemoryError, RecursionError)):
            return bad_key(key, value, f"not a value of the right type ({reason})", f"give one such as {default!r}")
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


def whole_numbers(flag: str, text: str, most: int = 10**6) -> list[int]:
    """The different numbers of a comma-separated list, in order, each at most `most`; none if it is empty."""
    words = text.split(",") if text else []
    if not all(re.fullmatch("[0-9]{1,6}", word) and int(word) for word in words):
        raise UserError(f"{flag}={text}: not whole numbers from 1; give for example 2,4,8")
    if words and max(map(int, words)) > most:
        raise UserError(f"{flag}={text}: too large; the most is {most}")
    return list(dict.fromkeys(map(int, words)))


def json_file(text: str) -> pathlib.Path:
    """The value of --out, if it is a .json file that can be written."""
    return _new_file(text, ".json")


def export_file(text: str) -> pathlib.Path:
    """The value of --out, if it is a .safetensors or .stablehlo file that can be written."""
    return _new_file(text, *(f".{form}" for form in EXPORTS))


def export_target(
    workdir: pathlib.Path, form: str, names: str, out: pathlib.Path | None, group: int | None = None
) -> tuple[str, pathlib.Path]:
    """The format and the file that export writes: each as given, or as the other says, or by default."""
    form = form or (out.suffix[1:] if out else "safetensors")
    if out and out.suffix != f".{form}":
        raise UserError(f"--format={form}: --out={out} is of another format; give a .{form} file, or leave out --format")
    if names != "auto" and form != "safetensors":
        raise UserError(f"--names={names}: a .{form} file names no tensors; leave it out, or use --format=safetensors")
    if group is not None and form != "safetensors":
        raise UserError(f"--group={group}: a .{form} file holds the ensemble; leave it out, or use --format=safetensors")
    if group is not None and names == "torchvision":
        raise UserError(f"--group={group}: torchvision knows no groups; leave out --names, or use --names=vffjax")
    name = EXPORTS[form] if group is None else f"group{group}"
    return form, out or workdir / f"{name}.{form}"


def _new_file(text: str, *suffixes: str) -> pathlib.Path:
    path, suffix = a_path(text), " or ".join(suffixes)
    # os.path, because a Path raises where a folder may not be read or a name is too long.
    folder = os.path.dirname(os.path.expanduser(text)) or "."
    if path.suffix not in suffixes or len(path.name) > 200 or not (os.path.isdir(folder) and os.access(folder, os.W_OK)):
        raise UserError(f"--out={text}: cannot be written; give a {suffix} file in a folder that exists and is yours")
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"--out={text}: there already, and not a file; give another {suffix} file")
    return path


def a_path(text: str) -> pathlib.Path:
    """A local path of the command line, `~` replaced; neither empty nor with control characters, which a terminal would obey."""
    if not text or any(unicodedata.category(c) == "Cc" for c in text):
        raise argparse.ArgumentTypeError(f"{text!r} is empty or holds a control character; give a path")
    if problem := problem_of(text):
        raise argparse.ArgumentTypeError(f"{text!r} {problem}")
    return local(text, "")


def a_run_folder(text: str) -> pathlib.Path:
    """The value of --into: a folder in which a run can be trained."""
    path = a_path(text)
    check_run_folder(path, "--into")
    return path


def an_image(text: str) -> pathlib.Path:
    """An image file of the command line, `~` replaced; it is judged when it is read."""
    return local(text, "IMAGE")


def a_data_dir(text: str) -> str:
    """The value of --data_dir; empty: as configured, or the default."""
    return str(a_path(text)) if text else ""


def an_epoch(text: str) -> str:
    """The value of --epoch, which only a run can judge."""
    if len(text) > MAX_DIGITS:
        raise argparse.ArgumentTypeError(f"{printable(text, 40)!r} is no epoch; give best, latest, or a saved epoch's number")
    return text


def a_count(text: str) -> int:
    """A whole number from 1."""
    if not re.fullmatch(f"[0-9]{{1,{MAX_DIGITS}}}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{printable(text, 40)!r} is too small or no whole number; give at least 1")
    return int(text)


def a_group(text: str) -> int:
    """A group's number, from 0, which only a run can judge."""
    if not re.fullmatch("[0-9]{1,6}", text):
        raise argparse.ArgumentTypeError(f"{printable(text, 40)!r} is no group's number; give one from 0")
    return int(text)


def a_threshold(text: str) -> float:
    """The value of --threshold: a probability above 0."""
    try:
        threshold = float(text)
    except ValueError:
        threshold = 0.0
    if not 0 < threshold <= 1:
        raise argparse.ArgumentTypeError(f"{printable(text, 40)!r} is no probability above 0; give one up to 1, such as 0.9")
    return threshold


def a_curve(text: str) -> pathlib.Path:
    """The value of --curve: a .json file that can be written, and so can the .png beside it."""
    try:
        path = json_file(text)
    except UserError as error:
        raise UserError(str(error).replace("--out=", "--curve=", 1)) from None
    # A run's config.json has that suffix too, and its features.png.
    for there in (path, path.with_suffix(".png")):
        if os.path.lexists(there) and not _is_curve(path):
            raise UserError(f"--curve={text}: {there} is there already, and not of a curve; give another .json file")
    return path


def _is_curve(path: pathlib.Path) -> bool:
    try:
        return os.path.getsize(path) <= MAX_FILE and "curve" in json.loads(path.read_bytes())
    except (OSError, ValueError, TypeError, RecursionError):
        return False


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see vffjax {self.prog.split()[-1]} --help")


def parser_of(command: str, description: str) -> argparse.ArgumentParser:
    return _Parser(prog=f"vffjax {command}", description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)


@contextlib.contextmanager
def naming_files(folder: pathlib.Path, flag: str = "--workdir") -> Iterator[None]:
    """A disk that is full, a folder that is not ours, or a network that the memory does not hold is bad input too."""
    try:
        yield
    except BrokenPipeError:
        raise
    except RecursionError as error:
        raise UserError(f"{folder}: a file there is nested too deeply to be read; restore it, or give another {flag}") from error
    except FloatingPointError as error:  # JAX's own, of JAX_DEBUG_NANS or JAX_DEBUG_INFS
        fix = "unset JAX_DEBUG_NANS and JAX_DEBUG_INFS, or lower config.learning_rate"
        raise UserError(f"JAX was told to stop where a number is not finite, and one is ({printable(str(error), 200)}); {fix}") from error
    except (MemoryError, RuntimeError) as error:
        # Of jax.errors.JaxRuntimeError there is no finer kind.
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        fix = "use smaller config.widths, config.batch_size or config.eval_batch_size, or --config.rematerialise=True"
        raise UserError(f"out of memory ({printable(str(error), 200)}); {fix}") from error
    except OSError as error:
        where = error.filename or folder
        raise UserError(f"{where}: {error.strerror or error}; check space and permissions, or give another {flag}") from error
