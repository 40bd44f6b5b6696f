"""Whether training fits into the memory of a device, before anything is compiled."""

import contextlib
import os
from typing import Any

import jax

from vffjax.config import Config
from vffjax.costs.memory import least_bytes
from vffjax.costs.targets import lacks_bfloat16
from vffjax.errors import UserError, chosen
from vffjax.training import stages


def check_memory(config: Config) -> None:
    """Raises `UserError` if training cannot fit into memory. Without this check XLA or the kernel would kill the process."""
    device = jax.local_devices()[0]
    devices = 1 if device.platform == "cpu" else stages.count(config)  # all devices of a processor share the memory of the machine
    here, least = bytes_of(device), least_bytes(config, devices)
    if here is not None and least > here:
        shown = ", ".join(f"config.{key}={getattr(config, key)}" for key in ("widths", "batch_size", "copies_per_class"))
        needs = f"needs {least / 1e9:,.1f} GB at the least"
        if devices > 1:
            needs += f" on each of {devices} devices"
        raise UserError(f"{shown}: {needs}, and {device.device_kind} has {here / 1e9:,.1f}; lower them")


def about_precision(config: Config, device: Any) -> str:
    """Says that config.precision=bf16 gains nothing on a device that does not compute in it; empty where there is nothing to say."""
    if not (chosen("precision", config.precision, {"bf16": True, "f32": False}) and lacks_bfloat16(device)):
        return ""
    card = f"{device.device_kind} (compute capability {device.compute_capability})"
    return f"config.precision=bf16: {card} has no bfloat16, so convolutions run in float32 and gain nothing; use precision=f32"


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
