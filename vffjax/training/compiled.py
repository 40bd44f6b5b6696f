"""Compiled programs: how much memory they need, and where they are cached."""

from typing import Any

import jax

from vffjax import paths


def executable_bytes(compiled: jax.stages.Compiled) -> int:
    """Peak memory of a compiled program in bytes, by the compiler's own plan: arguments, outputs and temporaries."""
    plan: Any = compiled.memory_analysis()
    return int(plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes + plan.temp_size_in_bytes)


def keep_compiled_programs() -> None:
    """Caches compiled programs on GPU and TPU, so that the next start of the same configuration compiles nothing.

    The cache is `$XDG_CACHE_HOME/vffjax`, or `~/.cache/vffjax`, unless JAX was given another (JAX_COMPILATION_CACHE_DIR). Programs for CPU
    are not cached: a program of one machine may be wrong for another one that shares the home folder.
    """
    told = jax.config.values.get("jax_compilation_cache_dir")
    if jax.default_backend() != "cpu" and not told:
        jax.config.update("jax_compilation_cache_dir", str(paths.cache_folder("")))
