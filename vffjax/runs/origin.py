"""Where a run is trained: versions, device and settings, as far as they can change its numbers."""

import contextlib
import functools
import os
import pathlib
import platform
import subprocess
from typing import Any

import jax

from vffjax import backend, outside, versions
from vffjax.config import CHANGEABLE, Config
from vffjax.errors import UserError
from vffjax.registry import outside_names

# Environment variables that can change numbers, beside those of JAX.
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE")
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def origin(config: Config) -> dict[str, Any]:
    """Where this process trains, as far as that can change numbers.

    Returns:
        `versions` of Python and packages, the `commit` of this code, `device`, `cores`, environment `flags`, and `settings`: the values of
        the configuration keys that may change when a run goes on.
    """
    return {
        "versions": {"python": platform.python_version()}
        | {"vffjax": versions.own()}
        | {package: versions.installed(package) for package in _PACKAGES},
        "commit": _commit(),
        "device": jax.devices()[0].device_kind,
        "cores": backend.cores(),
        "flags": {name: os.environ[name] for name in sorted(os.environ) if name in _FLAGS or name.startswith("JAX_")},
        "settings": {key: getattr(config, key) for key in CHANGEABLE if key != "data_dir"},
    }


def code_of(config: Config) -> dict[str, str]:
    """SHA-256 of the files from which code outside of this package is run under a configuration, by file name."""
    return outside.sha256(outside_names(vars(config)))


def check_code(run: dict[str, Any], config: Config) -> None:
    """Raises `UserError` unless the code from outside is that by which the run began."""
    began, here = run.get("code_sha256", {}), code_of(config)
    for file in sorted(began.keys() | here.keys()):
        if began.get(file) != here.get(file):
            raise UserError(f"{file}: not the code by which the run began (other SHA-256); restore it, or start in a new --workdir")


@functools.cache  # A process that trains several runs has loaded its modules once, whatever the checkout holds later.
def _commit() -> str | None:
    """The commit of this code, with `-dirty` if files have been changed since; None if it does not run from its own checkout."""
    root = pathlib.Path(__file__).resolve().parents[2]

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, timeout=5, check=True).stdout.strip()

    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if pathlib.Path(git("rev-parse", "--show-toplevel")) == root:
            return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    return None
