"""The rows of a batch, divided over several devices where a program is traced for them."""

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Shaped

AXIS = "data"  # the axis of the mesh of devices


def divided() -> bool:
    """Whether the rows of batches are divided over several devices in the program that is being traced."""
    return AXIS in jax.sharding.get_abstract_mesh().axis_names


def over_devices(x: Shaped[Array, "rows *rest"]) -> Shaped[Array, "rows *rest"]:
    """`x`, with a hint to the compiler that its rows are divided over the devices; without a mesh `x` itself.

    The number of rows need not be a multiple of the number of devices.
    """
    return jax.lax.with_sharding_constraint(x, PartitionSpec(AXIS)) if divided() else x
