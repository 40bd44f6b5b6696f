"""Devices to compile for, among them a TPU that need not be present."""

import importlib.util
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vffjax.errors import UserError

_TPU_MACHINE = {
    # The TPU library would otherwise search minutes for the metadata server of a cloud machine.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # The library's lock protects a chip. Several processes may compile at the same time.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class Target(NamedTuple):
    """A device on which abstract arrays, which have only a shape and a dtype, can be placed."""

    device: Any

    def array(self, *shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        """An abstract array of a shape and a dtype on the device."""
        sharding = NamedSharding(Mesh(np.array([self.device]), ("device",)), PartitionSpec())
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def place(self, tree: Any) -> Any:
        """A tree with an abstract array on the device for each leaf of `tree`."""
        return jax.tree.map(lambda leaf: self.array(*leaf.shape, dtype=leaf.dtype), tree)


def find(name: str) -> Target:
    """Finds a device by its name.

    Args:
        name: `here` for JAX's first device, `cpu` for this machine's processor, or `tpu` for a chip of a TPU v5e. The chip need not be
            present, because libtpu, Google's TPU compiler, makes the same executable on every machine.

    Raises:
        UserError: the name is not known, libtpu is not installed, or JAX may not use the CPU.
    """
    if name == "here":
        return Target(jax.devices()[0])
    if name == "cpu":
        try:
            return Target(jax.devices("cpu")[0])
        except RuntimeError as error:
            raise UserError(f"--target=cpu: {' '.join(str(error).split())}; add cpu to JAX_PLATFORMS, or unset it") from None
    if name != "tpu":
        raise UserError(f"--target={name}: not known; choose one of here, cpu, tpu")
    if not has_tpu_compiler():
        raise UserError("--target=tpu: libtpu, the TPU's compiler, is not installed; pip install -e '.[tpu-compiler]'")
    for key, value in _TPU_MACHINE.items():
        os.environ.setdefault(key, value)
    return Target(topologies.get_topology_desc("v5e:2x2", "tpu").devices[0])


def has_tpu_compiler() -> bool:
    """Whether libtpu is installed, which `find("tpu")` needs."""
    return importlib.util.find_spec("libtpu") is not None
