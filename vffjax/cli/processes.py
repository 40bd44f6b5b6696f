"""The options that make a command one of several processes of a run: --coordinator, --processes, --process, --heartbeat. Needs no JAX."""

import argparse
import re

from vffjax.cli.options import a_count
from vffjax.errors import UserError
from vffjax.hosts import HEARTBEAT, Processes

_OPTIONS = ("coordinator", "processes", "process", "heartbeat")
_LEAST = {"processes": 1, "process": 0, "heartbeat": 3}


def split(arguments: list[str]) -> tuple[Processes | None, list[str]]:
    """Takes the options of processes from a command line.

    Returns:
        What they say, or None if there are none of them; and the other arguments.

    Raises:
        UserError: a value is wrong, or an option is missing beside the others.
    """
    found, rest, left = dict[str, str](), list[str](), iter(arguments)
    for argument in left:
        flag, equals, value = argument.partition("=")
        name = flag.lstrip("-")
        if not flag.startswith("-") or name not in _OPTIONS:
            rest.append(argument)
            if flag in ("--config", "--workdir", "--code") and not equals:  # whose value may look like anything
                rest += [word for word in [next(left, None)] if word is not None]
        else:
            found[name] = value if equals else next(left, "")
    if not found:
        return None, rest
    numbers = {name: _number(name, text) for name, text in found.items() if name in _LEAST}
    coordinator, heartbeat = found.get("coordinator", ""), numbers.pop("heartbeat", HEARTBEAT)
    if coordinator == "auto":
        for name in numbers:
            raise UserError(
                f"--{name}={numbers[name]}: --coordinator=auto finds it out itself; leave it out, or give --coordinator HOST:PORT"
            )
        return Processes(coordinator, heartbeat=heartbeat), rest
    if not re.fullmatch(r"\S+:[0-9]{1,5}", coordinator) or not 0 < int(coordinator.rpartition(":")[2]) < 2**16:
        fix = "give the address of process 0 as HOST:PORT, such as 10.0.0.1:8476, or auto on a cluster that JAX knows"
        raise UserError(f"--coordinator={coordinator}: {'no address' if coordinator else 'missing'}; {fix}")
    for name in ("processes", "process"):
        if name not in numbers:
            raise UserError(f"--{name}: missing; --coordinator {coordinator} needs --processes N and --process I, from 0 to N - 1")
    if numbers["process"] >= numbers["processes"]:
        raise UserError(f"--process={numbers['process']}: there are --processes={numbers['processes']}, numbered from 0; give a smaller")
    return Processes(coordinator, numbers["processes"], numbers["process"], heartbeat), rest


def _number(name: str, text: str) -> int:
    try:
        return a_count(text, _LEAST[name])
    except argparse.ArgumentTypeError as error:
        raise UserError(f"--{name}={text}: {error}") from None
