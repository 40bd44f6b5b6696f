"""The rows of a batch, divided over several devices where a program is traced for them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Shaped

AXIS = "data"  # the axis of the mesh of devices


def divided() -> bool:
    """Whether the rows of batches are divided over several devices in the program that is being traced."""
    return AXIS in jax.sharding.get_abstract_mesh().axis_names


def in_equal_parts(x: Shaped[Array, "rows *rest"]) -> Shaped[Array, "padded *rest"]:
    """`x` with rows of zeros behind it, so that all devices have as many rows; without a mesh `x` itself.

    Where rows do not divide, the compiler pads them itself, and masks its padding in the maps, which takes memory.
    """
    missing = -x.shape[0] % _devices()
    return jnp.pad(x, ((0, missing), *[(0, 0)] * (x.ndim - 1))) if missing else x


def _devices() -> int:
    return int(dict(jax.sharding.get_abstract_mesh().shape).get(AXIS, 1))


def over_devices(x: Shaped[Array, "rows *rest"]) -> Shaped[Array, "rows *rest"]:
    """`x`, with a hint to the compiler that its rows are divided over the devices; without a mesh `x` itself.

    The number of rows need not be a multiple of the number of devices.
    """
    return jax.lax.with_sharding_constraint(x, PartitionSpec(AXIS)) if divided() else x


def by_device(
    function: Callable[..., Array], rows: tuple[Shaped[Array, "rows ..."], ...], whole: tuple[Array, ...] = (), total: bool = False
) -> Array:
    """`function(*rows, *whole)`, computed by each device for its own rows, so that no device waits for another inside of `function`.

    A loop over a few rows at a time needs this. Divided by the compiler, it would fetch the rows of every step from the device that has
    them, because it goes through the rows of one device after those of the other.

    Args:
        function: of arrays with as many rows each, and of arrays that every device has. It has to treat each row by itself, and rows of
            zeros have to add nothing to a total: the last device is given such rows if the rows are no multiple of the devices.
        rows: arrays with the same number of rows.
        whole: arrays that every device has.
        total: whether the result is a sum over the rows; else it has as many rows as `rows`.

    Returns:
        The result of `function` for all rows. Without a mesh `function` is called as it is.
    """
    count = rows[0].shape[0]
    if _devices() == 1:
        return function(*rows, *whole)

    def own(*arguments: Array) -> Array:
        found = function(*arguments)
        return jax.lax.psum(found, AXIS) if total else found

    apart, same = PartitionSpec(AXIS), PartitionSpec()
    places = (*[apart] * len(rows), *[same] * len(whole))
    # The check for values that differ between devices would refuse the zeros with which a loop begins.
    each = jax.shard_map(own, in_specs=places, out_specs=same if total else apart, check_vma=False)
    found = each(*map(in_equal_parts, rows), *whole)
    return found if total else found[:count]
