"""Starts JAX for a command. An error in the environment becomes one line that names the variable, not a traceback."""

import functools
import os
import re
import subprocess
import sys
from collections.abc import Mapping

from vffjax.errors import UserError, printable, shortened

_PLATFORMS = ("JAX_PLATFORMS", "JAX_PLATFORM_NAME", "JAX_DEFAULT_DEVICE")
_XLA_REFUSES = re.compile(r"(Unknown flags? in XLA_FLAGS: .*|Could not open file .*|Couldn't interpret value .*)")
_PROBE = "from jaxlib import xla_client; xla_client.CompileOptions()"


def start() -> None:
    """Imports JAX and finds its devices. Raises `UserError` for a variable of the environment that JAX, XLA or this package refuses."""
    _check_xla_flags(os.environ.get("XLA_FLAGS", ""))
    imported = False
    try:
        import jax

        imported = True
        jax.devices()
        with jax.transfer_guard("allow"):
            jax.numpy.zeros(()).block_until_ready()  # some errors appear only when an array is put on a device
    except Exception as error:  # ValueError, RuntimeError, AssertionError and errors of plugins
        raise _explained(error, imported) from error
    for name in ("jax_transfer_guard", "jax_transfer_guard_host_to_device", "jax_transfer_guard_device_to_host"):
        if str(jax.config.values.get(name) or "").startswith("disallow"):
            given = os.environ.get(name.upper(), jax.config.values[name])
            raise UserError(f"{name.upper()}={given}: training moves arrays between host and device all the time; unset it")
    if jax.config.values["jax_disable_jit"]:
        given = os.environ.get("JAX_DISABLE_JIT", "True")
        raise UserError(f"JAX_DISABLE_JIT={given}: an epoch is a compiled program, and cannot run without jit; unset it")


def cores() -> int:
    """How many processors this process may use. On a CPU they divide the sums of an operation among them, which changes its rounding."""
    affinity = getattr(os, "sched_getaffinity", None)  # only Linux has it
    return len(affinity(0)) if affinity else os.cpu_count() or 1


@functools.cache
def _check_xla_flags(flags: str) -> None:
    """Tries the flags in a process of its own, because XLA ends a process at a flag that it does not know. Takes a third of a second."""
    if not flags.strip():
        return
    try:
        command, environment = [sys.executable, "-c", _PROBE], os.environ | {"XLA_FLAGS": flags}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", timeout=60)
    except (OSError, subprocess.SubprocessError):  # no process can be started; XLA will report the flag itself
        return
    found = _XLA_REFUSES.search(done.stderr)
    if done.returncode and found:
        fix = "XLA would end the process; remove the flag, or correct it"
        raise UserError(f"XLA_FLAGS={shortened(flags, 300)}: {printable(found[1], 300)}; {fix}")


def _explained(error: Exception, imported: bool) -> UserError:
    text = printable(str(error).replace("(set JAX_PLATFORMS='' to automatically choose an available backend)", ""), 300)
    reason = f"{type(error).__name__}: {text}" if text else "the device, or JAX's plugin for it, is not there"
    given = {name: value for name, value in os.environ.items() if name.startswith("JAX_")}
    name = _at_fault(given, text, imported)
    if name in _PLATFORMS:
        fix = f"set {name}=cpu, or unset it so that JAX takes what is there, or install JAX for that device"
        return UserError(f"{name}={shortened(given[name], 100)}: JAX cannot use this platform here ({reason}); {fix}")
    if name:
        return UserError(f"{name}={shortened(given[name], 100)}: JAX cannot use this value ({reason}); correct it, or unset it")
    fix = "set JAX_PLATFORMS=cpu to use the processor, or install JAX again"
    others = f", or correct {', '.join(sorted(given))}" if given else ""
    return UserError(f"JAX_PLATFORMS={given.get('JAX_PLATFORMS', '')}: JAX cannot start ({reason}); {fix}{others}")


def _at_fault(given: Mapping[str, str], text: str, imported: bool) -> str:
    """The variable that JAX complains of; '' if that is not clear."""
    if not imported:
        # JAX's messages say JAX_ENABLE_X64, jax_enable_x64 or jax.enable_x64.
        named = [f"JAX_{word.upper()}" for word in re.findall(r"\b(?:JAX_|jax[._])(\w+)", text)]
        return next((name for name in named if name in given), "")
    if given.get("JAX_NUM_CPU_DEVICES", "1").strip() == "0":  # JAX's message does not name it
        return "JAX_NUM_CPU_DEVICES"
    quoted = set(re.findall(r"'(\w+)'", text))
    set_here = [name for name in _PLATFORMS if name in given]
    return next((name for name in set_here if quoted & set(given[name].split(","))), (set_here or [""])[0])
