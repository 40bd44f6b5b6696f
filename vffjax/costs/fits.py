"""Whether training fits into the memory of a device, before anything is compiled."""

import contextlib
import os
from typing import Any

import jax

from vffjax.config import Config
from vffjax.costs.memory import least_bytes
from vffjax.errors import UserError


def check_memory(config: Config) -> None:
    """Raises `UserError` if training cannot fit into memory. Without this check XLA or the kernel would kill the process."""
    device = jax.devices()[0]
    here, least = bytes_of(device), least_bytes(config)
    if here is not None and least > here:  # one device trains, however many there are
        shown = ", ".join(f"config.{key}={getattr(config, key)}" for key in ("widths", "batch_size", "copies_per_class"))
        raise UserError(f"{shown}: needs {least / 1e9:,.1f} GB at the least, and {device.device_kind} has {here / 1e9:,.1f}; lower them")


def bytes_of(device: Any) -> int | None:
    """The memory of a device in bytes; for a processor that of the machine. None if it is not known."""
    with contextlib.suppress(Exception):  # a plugin without statistics may raise anything
        if limit := (device.memory_stats() or {}).get("bytes_limit"):
            return int(limit)
    if device.platform == "cpu":
        with contextlib.suppress(AttributeError, ValueError, OSError):  # Windows has no sysconf
            found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            return found if found > 0 else None
    return None
