"""Compiled programs: what they take, and where they are kept."""

import os
import pathlib
from typing import Any

import jax


def executable_bytes(compiled: jax.stages.Compiled) -> int:
    """Peak bytes of a compiled program by the compiler's own plan: arguments, outputs and temporaries. Exact, on every device."""
    plan: Any = compiled.memory_analysis()
    return int(plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes + plan.temp_size_in_bytes)


def keep_compiled_programs() -> None:
    """On GPU and TPU, the second start of a configuration compiles nothing: programs are kept in `$XDG_CACHE_HOME/vffjax`, or
    `~/.cache/vffjax`. What JAX was told otherwise wins (`JAX_COMPILATION_CACHE_DIR`).

    Not on CPU, where a program kept by one machine can be wrong for another that shares the home folder.
    """
    told = jax.config.values.get("jax_compilation_cache_dir")
    if jax.default_backend() != "cpu" and not told:
        home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(home) / "vffjax"))
