"""Devices to compile for, a TPU that is not there among them."""

import dataclasses
import importlib.util
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vffjax.errors import UserError

# What a TPU's own machine would say of it. Without, the TPU library looks for a cloud machine's metadata server, for minutes. And no
# lock: a compiler, unlike a chip, serves several processes.
_TPU_MACHINE = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}
_TPU_MACHINE |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


@dataclasses.dataclass(frozen=True)
class Target:
    """One device; arrays that only have a shape and a type are placed on it."""

    device: Any

    def array(self, *shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        """An abstract array on the device."""
        sharding = NamedSharding(Mesh(np.array([self.device]), ("device",)), PartitionSpec())
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def place(self, tree: Any) -> Any:
        """The tree's leaves, abstract, on the device."""
        return jax.tree.map(lambda leaf: self.array(*leaf.shape, dtype=leaf.dtype), tree)


def find(name: str) -> Target:
    """`here` JAX's first device, `cpu` this machine's processor, `tpu` a chip of a TPU v5e, which need not be there.

    For `tpu`, libtpu, Google's own TPU compiler, makes a real executable, the same on every machine. Raises `UserError` if it is not
    installed, or if JAX may not use the CPU.
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
    """Whether `find("tpu")` can work."""
    return importlib.util.find_spec("libtpu") is not None
