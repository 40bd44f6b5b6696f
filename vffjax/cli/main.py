"""The command `vffjax`: finds the module of a command and runs it; holds descriptors, streams, signals and the exit status.

Bad input ends with status 2 and one line on stderr. Importing this module imports neither JAX nor a library that draws.
"""

import contextlib
import importlib
import os
import pkgutil
import sys
import traceback
from typing import NoReturn

from vffjax import hosts
from vffjax.cli import commands
from vffjax.cli.options import beside
from vffjax.errors import SafeStream, UserError, notice
from vffjax.runs import termination
from vffjax.runs.termination import Terminated


def names() -> list[str]:
    """The commands: the modules of `vffjax.cli.commands`, sorted."""
    return [module.name for module in pkgutil.iter_modules(commands.__path__)]


def usage() -> str:
    """The help of `vffjax` itself."""
    documented = {name: importlib.import_module(f"{commands.__name__}.{name}").__doc__ or "" for name in names()}
    lines = [line for name, text in documented.items() for line in beside(f"  {name}", text.partition("\n")[0], 13)]
    return "\n".join(["usage: vffjax COMMAND [OPTION ...]", "", *lines, "", "vffjax COMMAND --help tells more."])


def main(arguments: list[str] | None = None) -> NoReturn:
    """Runs one command and exits.

    The status is 0 if all went well, 1 if what was asked does not hold, 2 for bad input, 130 after an interrupt, 143 after SIGTERM.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    # Hides the chatter of XLA and Orbax, unless the user has set it. It has to be set before JAX is imported.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if arguments[:1] in (["--version"], ["-V"]):
        arguments = ["version"]
    _hold_descriptors()
    out = SafeStream(sys.stdout)
    # Libraries print too, and either stream may be missing.
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(SafeStream(sys.stderr)):
        try:
            status = termination.interruptible(lambda: _run(arguments))
        except (KeyboardInterrupt, Terminated) as leave:  # SIGTERM arrives here while there was nothing to save
            _leave_at_once(out, leave)
        except Exception:
            if not hosts.joined():
                raise
            traceback.print_exc()
            status = 1  # of several processes; by `hosts.leave` the others learn of it at once
        out.flush()
    if out.failure:
        if not isinstance(out.failure, BrokenPipeError):  # the reader, such as head, has gone
            notice(f"vffjax: error: standard output cannot be written ({out.failure})")
        with contextlib.suppress(Exception):  # otherwise Python tries again when it ends, and complains
            os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
        status = status or 1
    hosts.leave(status)
    sys.exit(status)


def _leave_at_once(out: SafeStream, leave: KeyboardInterrupt | Terminated) -> NoReturn:
    """Ends the process, whatever its other thread does: unwinding the compiler and the device can take long, or crash."""
    saved = termination.saved()
    with contextlib.suppress(KeyboardInterrupt):  # pressed twice
        saved = termination.settle(1.0) or saved
    saved = str(leave) or saved  # a command knows more than its run
    status, why = 130, f"interrupted; {saved}" if saved else "interrupted"
    if isinstance(leave, Terminated):
        status, why = 143, f"told to leave (SIGTERM): {leave}"
    notice(f"vffjax: {why}")
    out.flush()
    hosts.leave(status)
    if termination.working():
        os._exit(status)
    sys.exit(status)


def _run(arguments: list[str]) -> int:
    """Runs the command and returns its exit status. Errors are reported on stderr."""
    try:
        if not arguments or arguments[0] in ("-h", "--help", "help"):
            print(usage())
            return 0
        command, *rest = arguments
        if command not in names():
            raise UserError(f"COMMAND={command}: not known; choose one of {', '.join(names())}")
        return importlib.import_module(f"{commands.__name__}.{command}").run(rest) or 0
    except UserError as error:
        notice(f"vffjax: error: {error}")
        return 2
    except Terminated as leave:
        if not termination.abandoned():
            notice(f"vffjax: told to leave (SIGTERM): {leave}")
        return 143
    except SystemExit as leave:  # of argparse after its help, or of a library that gives its reason in words
        if leave.code is None or isinstance(leave.code, int):
            return leave.code or 0
        notice(f"vffjax: error: {leave.code}")
        return 1


def _hold_descriptors() -> None:
    """Opens descriptors 0, 1 and 2 where a shell has closed them. Otherwise the next file would get that number, and library output."""
    with contextlib.suppress(OSError):
        while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(descriptor)
