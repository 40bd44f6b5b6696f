"""Weight files: what a run has learnt, to hand on or to start from, by our names or by torchvision's. No pickle of ours.

By our names each group's parameters and batch statistics are float32 tensors named after their place, such as
`group0.params.layers_0.kernel`: those of all groups, or of one. torchvision's are those of a ResNet without groups; see
`networks.pretrained`. One metadata entry, `vffjax`, holds JSON: format, network, classes, image shape. Files are opened, checked and
unwrapped by `weight_files`.
"""

import json
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.numpy

from vffjax import backend, networks
from vffjax.config import HUB, WEIGHT_FILES, Config
from vffjax.data import sizes_of
from vffjax.errors import UserError, bad_key, printable
from vffjax.files import replace_file
from vffjax.networks.groups import layer_sizes
from vffjax.paths import local
from vffjax.training.plan import groups_of
from vffjax.weights import hub
from vffjax.weights.formats import opened
from vffjax.weights.tensor_files import AGAIN, Tensor

if TYPE_CHECKING:
    from vffjax.networks.groups import GroupState
    from vffjax.training.plan import Plan

_KINDS = ("params", "batch_stats")
FORMAT = "vffjax weights 1"
_OTHER = "give weights of this network, as vffjax export writes them, or set config.init_from=''"


def write_weights(
    path: pathlib.Path | str, plan: "Plan", states: tuple["GroupState", ...], about: Mapping[str, Any], names: str = "auto"
) -> list[str]:
    """Writes parameters and batch statistics, float32, to a .safetensors file; returns what was left out, in words.

    `names`: vffjax, of every group; torchvision, of a ResNet as PyTorch has it; auto, torchvision's where there are such. `about` holds
    JSON values such as class_names and image_shape. Equal weights give equal bytes; an existing file is replaced in one step. Raises
    `OSError`, and `UserError` where torchvision has no names.
    """
    from vffjax.weights import torchvision as pretrained  # not above, for the sake of JAX

    config = plan.config
    nameless = f"there is no {config.network}" if networks.find(config).blocks is None else ""
    nameless = nameless or ("no norm=layer" if config.norm == "layer" else "")
    if names == "torchvision" and nameless:
        raise UserError(f"--names=torchvision: {nameless} in torchvision; use --names=vffjax")
    theirs = names != "vffjax" and not nameless
    leaves = {name: np.array(leaf, np.float32, order="C") for name, leaf in _named(states).items()}
    tensors, notes = pretrained.exported(config, leaves) if theirs else (leaves, [])
    _write(path, config, tensors, "torchvision" if theirs else "vffjax", about)
    return notes


def write_group(path: pathlib.Path | str, plan: "Plan", group: int, state: "GroupState", about: Mapping[str, Any]) -> None:
    """Writes one group alone, by our names, as `write_weights` does all. A run that starts from it takes the other groups from its seed."""
    leaves = {name: np.array(leaf, np.float32, order="C") for name, leaf in _named((state,), group).items()}
    _write(path, plan.config, leaves, "vffjax", {**about, "group": group})


def _write(path: pathlib.Path | str, config: Config, tensors: dict[str, np.ndarray], names: str, about: Mapping[str, Any]) -> None:
    network = {key: getattr(config, key) for key in ("network", *networks.find(config).keys, "norm", "grouping")}
    described = {"format": FORMAT, "names": names, "network": network, **about}
    # One entry, because safetensors writes several in random order.
    replace_file(pathlib.Path(path), safetensors.numpy.save(tensors, {"vffjax": json.dumps(described)}))


def read_weights(path: pathlib.Path | str, plan: "Plan", states: tuple["GroupState", ...]) -> tuple[tuple["GroupState", ...], list[str]]:
    """`states` with the parameters and statistics of a file, and what of it was left out, in words. Optimizer states stay, and so do heads
    that the file does not hold. The given leaves need only a shape.

    By our names, to the bit, of all groups or of some, each whole; a ResNet by torchvision's or transformers' too, converted to float32.
    Raises `UserError` naming the file and the tensor: not a sound file, a tensor that is missing, not of this network, misshapen, of
    another type, not finite, or a negative variance.
    """
    import jax.numpy as jnp

    from vffjax.weights import torchvision as pretrained

    leaves, config = _named(states), plan.config
    with _opened(path, config) as found:
        if networks.find(config).blocks and not any(re.match(r"group\d+\.", name) for name in found):
            arrays, notes = pretrained.imported(path, config, leaves, found)
        else:
            arrays, notes = _own(path, config, leaves, found)

    def read(i: int, kind: str, tree: Any) -> Any:
        return _mapped(lambda name, leaf: jnp.asarray(arrays[name]) if name in arrays else leaf, tree, f"group{i}.{kind}")

    read_states = tuple(state._replace(**{kind: read(i, kind, getattr(state, kind)) for kind in _KINDS}) for i, state in enumerate(states))
    return read_states, notes


def _own(
    path: pathlib.Path | str, config: Config, leaves: Mapping[str, Any], found: Mapping[str, Tensor]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The tensors of a file by our names, and what is not in it, in words. It holds every group or only some, and each of them whole."""
    groups = dict.fromkeys(name.partition(".")[0] for name in leaves)
    present = {name.partition(".")[0] for name in found} & groups.keys() or groups.keys()
    absent = [group for group in groups if group not in present]
    if absent and config.norm_statistics == "frozen":
        problem = f"{printable(str(path), 200)} holds no statistics of {', '.join(absent)}"
        raise bad_key("norm_statistics", config.norm_statistics, problem, "use batch, or give weights of every group")
    wanted = {name: f"F32{list(leaf.shape)}" for name, leaf in leaves.items() if name.partition(".")[0] in present}
    for name in sorted(wanted.keys() | found.keys()):
        here, there = str(found.get(name, "missing")), wanted.get(name, f"of this {config.network} network")
        if here != there:
            raise UserError(f"{path}: tensor {printable(name, 200)} is {printable(here, 200)}, not {there}; {_OTHER}")
    arrays = {name: tensor.read() for name, tensor in found.items()}
    for name, array in arrays.items():
        if not np.isfinite(array).all() or (name.endswith(".var") and (array < 0).any()):
            raise UserError(f"{path}: tensor {name} holds infinity, NaN or a negative variance; {AGAIN}")
    taken = ", ".join(group for group in groups if group in present)
    return arrays, [f"holds {taken} only; the other groups ({', '.join(absent)}) start from the seed"] if absent else []


def check_start(config: Config) -> None:
    """Raises `UserError` if a run of `config` could not start from config.init_from. Needs no data; nothing is compiled."""
    if config.init_from:
        path = local_file(config)
        with _opened(path, config):  # a header is checked without JAX
            pass
        backend.start()
        import jax

        from vffjax.training.plan import init_states, make_plan

        sizes = sizes_of(config)
        plan = make_plan(config, sizes.train_images, sizes.classes)
        read_weights(path, plan, jax.eval_shape(lambda: init_states(plan, sizes.image_shape)))


def local_file(config: Config) -> str:
    """The file that config.init_from names; of an address, what is downloaded, once."""
    if config.init_from.startswith(HUB):
        return hub.downloaded(config.init_from, _most_bytes(config))
    return str(local(config.init_from, "config.init_from"))


def _most_bytes(config: Config) -> int:
    """What a file of this network's weights may take, in float64 and with a classifier of any classes."""
    sizes = sizes_of(config)
    return 8 * sum(kernel for kernel, _ in layer_sizes(groups_of(config, sizes.classes), sizes.image_shape)) + 2**28


def _opened(path: pathlib.Path | str, config: Config) -> Any:
    if str(path).endswith(WEIGHT_FILES[1:]) and networks.find(config).blocks is None:
        raise UserError(
            f"{path}: PyTorch's files are read for residual networks such as resnet18; give a {WEIGHT_FILES[0]} file by vffjax export"
        )
    return opened(path, _most_bytes(config))


def _named(states: tuple["GroupState", ...], first: int = 0) -> dict[str, Any]:
    """Every leaf of parameters and statistics by its name in the file; `first` is the number of the first group."""
    out: dict[str, Any] = {}
    for i, state in enumerate(states, first):
        for kind in _KINDS:
            _mapped(out.__setitem__, getattr(state, kind), f"group{i}.{kind}")
    return out


def _mapped(function: Callable[[str, Any], Any], tree: Any, prefix: str) -> Any:
    if isinstance(tree, Mapping):
        return {key: _mapped(function, value, f"{prefix}.{key}") for key, value in tree.items()}
    return function(prefix, tree)
