"""Several devices as one mesh: the rows of a batch are divided over them, and each device holds everything else (data parallelism).

The training program is the same for any number of devices. Where its inputs lie, and a hint at the input of each group, tell the compiler
to divide the work; it adds what the devices have to tell each other. Means over a batch, the contrast within it and its order stay those
of the whole batch, so that the result is that of one device up to rounding.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, TypeVar

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vffjax.config import Config
from vffjax.errors import bad_key
from vffjax.ops.rows import AXIS

T = TypeVar("T")


def count(config: Config, before: int = 0) -> int:
    """How many devices train.

    With config.devices = 0 these are as many as a run began with, or else all that JAX sees; but only so many that the batch can be
    divided by them.

    Args:
        config: of the run.
        before: how many devices trained a run that goes on; 0 for a new one.

    Raises:
        UserError: there are not as many as config.devices, or config.batch_size cannot be divided by them.
    """
    there = len(jax.devices())
    if config.devices > there:
        problem = f"JAX sees {there} ({jax.devices()[0].device_kind})"
        raise bad_key("devices", config.devices, problem, f"use at most {there}, or 0")
    if config.devices and config.batch_size % config.devices:
        nearest = max(1, round(config.batch_size / config.devices)) * config.devices
        problem = f"cannot be divided by config.devices={config.devices}"
        raise bad_key("batch_size", config.batch_size, problem, f"use {nearest}, or devices=0 for as many as divide it")
    most = config.devices or (before if 0 < before <= there else there)
    return max(number for number in range(1, most + 1) if config.batch_size % number == 0)


def told(config: Config, number: int, before: int = 0) -> str:
    """How many devices train, in words, and why not all of them; empty if there is one device, and always was."""
    there, words = len(jax.devices()), ""
    if there > 1 or before > 1:
        words = f"{number} of {there} device{'s' * (there > 1)}"
    if before and before != number:
        return f"{words}, and {before} until here: the bits are no longer those of a run that keeps its number of devices"
    if number < there and not config.devices:
        return words + (", as the run began" if before else f", because config.batch_size={config.batch_size} cannot be divided by more")
    return words


def of_run(run: dict[str, Any]) -> Mesh | None:
    """The devices that measure the errors of a saved epoch: as many as trained it, so that its errors are found again to the bit.

    If there are fewer devices here, one measures them.
    """
    number = run.get("devices", 1)
    return mesh_of(number if number <= len(jax.devices()) else 1)


@functools.cache
def mesh_of(number: int) -> Mesh | None:
    """The first so many devices as a mesh of one axis; None for one device, where nothing is said about the place of arrays."""
    if number == 1:
        return None
    return jax.make_mesh((number,), (AXIS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:number])


def everywhere(mesh: Mesh | None, tree: T) -> T:
    """The arrays of a tree, each on every device of the mesh; without a mesh the tree itself."""
    return tree if mesh is None else jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def divided(mesh: Mesh | None, axes_before: int) -> Any:
    """The place of an array whose axis behind `axes_before` others is divided over the mesh; None without a mesh."""
    return None if mesh is None else NamedSharding(mesh, PartitionSpec(*[None] * axes_before, AXIS))


@contextlib.contextmanager
def within(mesh: Mesh | None) -> Iterator[None]:
    """Within, programs are traced for this mesh: `ops.rows` divides the rows of batches over it."""
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        yield
