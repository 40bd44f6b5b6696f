"""Compiled programs: how long they are kept, how much memory they need, and where they are cached."""

from collections.abc import Hashable
from typing import Any

import jax

from vffjax import paths

KEPT = 8  # `Plan.program`s whose compiled programs a process keeps
_programs: set[Hashable] = set()
_functions: set[Any] = set()


def compiled(function: Any, program: Hashable, *arguments: Any) -> jax.stages.Compiled:
    """A jitted function, compiled for these arguments. Runs of one process whose programs are equal share what is compiled.

    JAX itself keeps compiled programs by function, static arguments, shapes and settings, and returns the one that it has if the same is
    lowered and compiled again. It would keep thousands of them, though, and each takes tens of megabytes on CPU. So the programs of at most
    `KEPT` plans are kept: before those of another plan are compiled, all are forgotten. Whoever holds one can still call it.

    Args:
        function: a jitted function whose first argument is static.
        program: that argument, the `Plan.program`.
        arguments: the others, arrays or their shapes.
    """
    if program not in _programs and len(_programs) >= KEPT:
        for other in _functions:
            other.clear_cache()
        _programs.clear()
    _programs.add(program)
    _functions.add(function)
    return function.lower(program, *arguments).compile()


def program_bytes(compiled: jax.stages.Compiled) -> dict[str, int]:
    """The memory of a compiled program in bytes on each device, by the compiler's own plan.

    Returns:
        `argument_bytes`, `output_bytes`, `alias_bytes` (of the arguments whose memory the outputs take), `temp_bytes`, and `total_bytes`,
        which is the peak: all of these, where `alias_bytes` count once.
    """
    plan: Any = compiled.memory_analysis()
    found = {f"{kind}_bytes": int(getattr(plan, f"{kind}_size_in_bytes")) for kind in ("argument", "output", "alias", "temp")}
    total = found["argument_bytes"] + found["output_bytes"] - found["alias_bytes"] + found["temp_bytes"]
    return found | {"total_bytes": total}


def keep_compiled_programs() -> None:
    """Caches compiled programs on GPU and TPU, so that the next start of the same configuration compiles nothing.

    The cache is `$XDG_CACHE_HOME/vffjax`, or `~/.cache/vffjax`, unless JAX was given another (JAX_COMPILATION_CACHE_DIR). Programs for CPU
    are not cached: a program of one machine may be wrong for another one that shares the home folder.
    """
    told = jax.config.values.get("jax_compilation_cache_dir")
    if jax.default_backend() != "cpu" and not told:
        jax.config.update("jax_compilation_cache_dir", str(paths.cache_folder("")))
