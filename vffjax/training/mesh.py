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
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vffjax import hosts
from vffjax.config import Config
from vffjax.errors import bad_key
from vffjax.ops.rows import AXIS

T = TypeVar("T")


def check_there(config: Config) -> None:
    """Raises `UserError` if there are fewer devices than config.devices."""
    if config.devices > (there := len(jax.devices())):
        problem = f"JAX sees {there} ({jax.devices()[0].device_kind})"
        raise bad_key("devices", config.devices, problem, f"use at most {there}, or 0")


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
    there, processes = len(jax.devices()), hosts.count()
    check_there(config)
    if config.devices and config.batch_size % config.devices:
        nearest = max(1, round(config.batch_size / config.devices)) * config.devices
        problem = f"cannot be divided by config.devices={config.devices}"
        raise bad_key("batch_size", config.batch_size, problem, f"use {nearest}, or devices=0 for as many as divide it")
    most = config.devices or (before if processes <= before <= there else there)
    found = [number for number in range(processes, most + 1, processes) if config.batch_size % number == 0]
    if config.devices % processes or not found:  # a process without a device in the mesh could not take part
        key, fix = ("devices", "use a multiple of that, or 0") if config.devices else ("batch_size", "use a multiple of that")
        raise bad_key(key, getattr(config, key), f"cannot be divided by the {processes} processes of this run", fix)
    return max(found)


def told(config: Config, number: int, before: int = 0, processes_before: int = 0) -> str:
    """How many devices train, in words, and why not all of them; empty if there is one device, and always was."""
    there, words = len(jax.devices()), ""
    if there > 1 or before > 1:
        words = f"{number} of {there} device{'s' * (there > 1)}" + (f" in {hosts.count()} processes" if hosts.count() > 1 else "")
    if before and before != number:
        return f"{words}, and {before} until here: the bits are no longer those of a run that keeps its number of devices"
    if processes_before and processes_before != hosts.count():
        until = f"in {processes_before} process{'es' * (processes_before > 1)} until here"
        return f"{words}, and {until}: the bits are no longer those of a run that keeps its number of processes"
    if number < there and not config.devices:
        return words + (", as the run began" if before else f", because config.batch_size={config.batch_size} cannot be divided by more")
    return words


@functools.cache
def mesh_of(number: int) -> Mesh | None:
    """So many devices, as many of each process, as a mesh of one axis; None for one, where nothing is said about the place of arrays."""
    if number == 1:
        return None
    devices, each = jax.devices(), number // hosts.count()
    if number < len(devices):
        devices = [d for process in range(hosts.count()) for d in [d for d in devices if d.process_index == process][:each]]
    return jax.make_mesh((number,), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def everywhere(mesh: Mesh | None, tree: T) -> T:
    """The arrays of a tree, each on every device of the mesh; without a mesh the tree itself."""
    if mesh is None:
        return tree
    place = NamedSharding(mesh, PartitionSpec())
    return jax.device_put(tree, place) if place.is_fully_addressable else jax.tree.map(lambda leaf: put(leaf, place), tree)


def put(leaf: Any, place: Any) -> Any:
    """An array, put on the devices of a place. If these belong to several processes, each process puts its own part there.

    Args:
        leaf: the whole array. All processes have the same.
        place: a sharding, or None for JAX's first device.
    """
    if place is None or place.is_fully_addressable:
        return jax.device_put(leaf, place)
    if not getattr(leaf, "is_fully_addressable", True):  # it lies on devices of several processes already
        same = leaf.sharding.is_equivalent_to(place, leaf.ndim)
        return leaf if same else jax.jit(lambda x: x, out_shardings=place)(leaf)
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(put(jax.random.key_data(leaf), place), impl=jax.random.key_impl(leaf))
    whole = np.asarray(leaf)  # device_put would compare it with that of every other process, which takes as much traffic as it has bytes
    return jax.make_array_from_callback(whole.shape, place, lambda part: whole[part])


def fetched(tree: Any) -> Any:
    """The arrays of a tree as NumPy arrays, also where other processes hold parts of them. All processes must ask."""
    return jax.tree.map(_fetched, tree)


def _fetched(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable and not leaf.is_fully_replicated:
        leaf = put(leaf, NamedSharding(leaf.sharding.mesh, PartitionSpec()))  # type: ignore[attr-defined]
    return jax.device_get(leaf)


def divided(mesh: Mesh | None, axes_before: int) -> Any:
    """The place of an array whose axis behind `axes_before` others is divided over the mesh; None without a mesh."""
    return None if mesh is None else NamedSharding(mesh, PartitionSpec(*[None] * axes_before, AXIS))


@contextlib.contextmanager
def within(mesh: Mesh | None) -> Iterator[None]:
    """Within, programs are traced for this mesh: `ops.rows` divides the rows of batches over it."""
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        yield
