"""Devices to compile for, among them TPUs and GPUs that need not be present, alone or several together."""

import functools
import importlib.resources
import importlib.util
import os
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vffjax.errors import UserError, said
from vffjax.ops.rows import AXIS
from vffjax.training.mesh import divided

_TPU_MACHINE = {
    # The TPU library would otherwise search minutes for the metadata server of a cloud machine.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # The library's lock protects a chip. Several processes may compile at the same time.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# The smallest machine of each kind of TPU, whose first chip is the target.
_TPUS = {"v4": "2x2x1", "v5e": "2x2", "v5p": "2x2x1", "v6e": "2x2"}
_OTHER_NAMES = {"tpu": "v5e"}
# The figures of each card are in gpu_targets/NAME.txtpb.
GPUS = ("a100", "b200", "h100", "t4")
NAMES = ("here", "cpu", *GPUS, *_TPUS, *_OTHER_NAMES)
_GPU_PLUGINS = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")
_GPU_FIX = "use Python >= 3.12 and pip install -e '.[cuda-compiler]', which takes jax >= 0.11"
BFLOAT16_FROM = 8.0  # compute capability: Ampere


class Target(NamedTuple):
    """A device, or several, on which abstract arrays, which have only a shape and a dtype, can be placed.

    Attributes:
        device: the device; of several, the first.
        mesh: of several devices; None for one.
    """

    device: Any
    mesh: Mesh | None = None

    def array(self, *shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        """An abstract array of a shape and a dtype on the device, or on every device."""
        mesh = Mesh(np.array([self.device]), ("device",)) if self.mesh is None else self.mesh
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    def place(self, tree: Any) -> Any:
        """A tree with an abstract array on the device, or on every device, for each leaf of `tree`."""
        return jax.tree.map(lambda leaf: self.array(*leaf.shape, dtype=leaf.dtype), tree)

    def divide(self, tree: Any, axes_before: int) -> Any:
        """As `place`, but the axis behind `axes_before` others is divided over several devices, as `mesh.divided` does it."""
        if self.mesh is None:
            return self.place(tree)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=divided(self.mesh, axes_before)), tree)

    @property
    def number(self) -> int:
        """How many devices there are."""
        return 1 if self.mesh is None else self.mesh.size


def find(name: str) -> Target:
    """Finds a device, or several, by a name.

    Args:
        name: `here` for JAX's first device; `cpu` for this machine's processor; or the name of a GPU or TPU, which need not be present,
            because its compiler makes the same executable on every machine: a GPU of `GPUS`, a TPU `v4`, `v5e` (also `tpu`), `v5p` or
            `v6e`. Several devices are named by their arrangement behind a colon: `v5e:4x4` for 16 chips, `h100:4` for the 4 cards of a
            machine, `h100:2x4` for 2 machines of 4 cards.

    Raises:
        UserError: the name is not known, its compiler is not installed or too old, there is no such arrangement, or JAX may not use
            the CPU.
    """
    if name == "here":
        return Target(jax.devices()[0])
    if name == "cpu":
        try:
            return Target(jax.devices("cpu")[0])
        except RuntimeError as error:
            raise UserError(f"--target=cpu: {' '.join(str(error).split())}; add cpu to JAX_PLATFORMS, or unset it") from None
    kind, _, arrangement = name.partition(":")
    kind = _OTHER_NAMES.get(kind, kind)
    if kind not in (*GPUS, *_TPUS):
        raise UserError(f"--target={name}: not known; choose one of {', '.join(NAMES)}")
    if ":" in name and not re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3}){0,2}", arrangement):
        raise UserError(f"--target={name}: {arrangement!r} is no arrangement of devices; give for example v5e:2x2, h100:4 or h100:2x4")
    devices = _gpus(name, kind, arrangement) if kind in GPUS else _tpus(name, kind, arrangement)
    if not arrangement or len(devices) == 1:
        return Target(devices[0])
    return Target(devices[0], Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,)))


def _tpus(name: str, kind: str, arrangement: str) -> list[Any]:
    if not has_tpu_compiler():
        raise UserError(f"--target={name}: libtpu, the TPU's compiler, is not installed; pip install -e '.[tpu-compiler]'")
    for key, value in _TPU_MACHINE.items():
        os.environ.setdefault(key, value)
    return _devices(name, "tpu", f"{kind}:{arrangement or _TPUS[kind]}")


def _gpus(name: str, kind: str, arrangement: str) -> list[Any]:
    if not has_gpu_compiler():
        raise UserError(f"--target={name}: a compiler for GPUs is not installed, or jax {jax.__version__} cannot use it; {_GPU_FIX}")
    sides = arrangement.split("x") if arrangement else ["1"]
    # Clusters, machines in each, and cards in each machine.
    return _devices(name, "cuda", "x".join(["1"] * (3 - len(sides)) + sides), target_config=gpu_figures(kind))


@functools.cache
def _devices(name: str, platform: str, topology: str, **options: str) -> list[Any]:
    try:
        if platform == "cuda":
            return list(topologies.get_topology_desc(platform=platform, topology=topology, **options).devices)
        return list(topologies.get_topology_desc(topology, platform).devices)
    except Exception as error:  # the compilers raise errors of several types
        fix = "set JAX_PLATFORMS=cpu" if isinstance(error, NotImplementedError) else "give another arrangement"
        raise UserError(f"--target={name}: the compiler does not take {topology} ({said(error)}); {fix}") from None


def gpu_figures(kind: str) -> str:
    """The figures of a card of `GPUS`, as text that XLA reads."""
    lines = (importlib.resources.files("vffjax.costs") / "gpu_targets" / f"{kind}.txtpb").read_text().splitlines()
    return "\n".join(re.sub(r"\s*#.*", "", line) for line in lines)


def lacks_bfloat16(device: Any) -> bool:
    """Whether a device is a GPU that computes no convolution in bfloat16: one of a compute capability below 8.0, such as a T4 or a V100."""
    capability = str(getattr(device, "compute_capability", ""))
    found = re.match(r"\d+\.\d+", capability)
    return bool(found) and float(found[0]) < BFLOAT16_FROM  # type: ignore[index]


def has_tpu_compiler() -> bool:
    """Whether libtpu is installed, which the names of TPUs need."""
    return importlib.util.find_spec("libtpu") is not None


def has_gpu_compiler() -> bool:
    """Whether a plugin of JAX for GPUs is installed, and JAX is new enough to compile with it for a GPU that is not there."""
    if tuple(map(int, jax.__version__.split(".")[:2])) < (0, 11) or importlib.util.find_spec("jax_plugins") is None:
        return False
    return any(importlib.util.find_spec(plugin) is not None for plugin in _GPU_PLUGINS)
