"""Weight files: what a run has learnt, for other programs or as the start of another run; by our names, or by torchvision's.

By our names, each group's parameters and batch statistics are float32 tensors whose names say where they belong, such as
`group0.params.layers_0.kernel`. A file holds all groups, or one. If the run's rule has parameters of its own in a group, they are called
`group0.params.rule...`. torchvision's names are those of a ResNet without groups; see `weights.torchvision`. One metadata entry, `vffjax`,
holds JSON, which says how to compute with the tensors; see `weights.description`. Kernels may be float16, which halves the file. We write
safetensors; `weights.formats` opens what is read.
"""

import json
import pathlib
import re
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from vffjax import files, networks
from vffjax.config import HUB, WEIGHT_FILES, Config
from vffjax.data import sizes_of
from vffjax.errors import UserError, bad_key, printable
from vffjax.networks.groups import GroupState, States, layer_sizes
from vffjax.paths import local
from vffjax.registry import NETWORKS
from vffjax.training.checks import plan_before_data
from vffjax.training.plan import Plan, abstract_start, groups_of
from vffjax.weights import formats, hub, torchvision
from vffjax.weights.description import compared, described
from vffjax.weights.tensor_files import AGAIN, METADATA, Tensor, said_of

_KINDS = ("params", "batch_stats")
_OTHER = "give weights of this network, as vffjax export writes them, or set config.init_from=''"


def write_weights(
    path: pathlib.Path | str, plan: Plan, states: States, about: Mapping[str, Any], names: str = "auto", half: bool = False
) -> list[str]:
    """Writes the parameters and batch statistics of all groups to a safetensors file, as float32.

    Equal weights give equal bytes. An existing file is replaced in one step.

    Args:
        path: the file.
        plan: the run's plan.
        states: the groups.
        about: JSON values for the metadata, as `Trained.about` has them.
        names: vffjax: our names, for any network. torchvision: torchvision's, for a ResNet. auto: torchvision's if it has such a network.
        half: whether kernels are rounded to float16. Everything else stays float32, because it is small and its range is not known.

    Returns:
        What is not in the file, in words.

    Raises:
        UserError: torchvision has no names for this network, or a kernel has a number that float16 cannot hold.
        OSError: the file cannot be written.
    """
    config = plan.config
    nameless = f"there is no {config.network}" if networks.find(config).blocks is None else ""
    nameless = nameless or ("no norm=layer" if config.norm == "layer" else "")
    if names == "torchvision" and nameless:
        raise UserError(f"--names=torchvision: {nameless} in torchvision; use --names=vffjax")
    theirs = names != "vffjax" and not nameless
    leaves, notes = _float32(states), list[str]()
    if theirs:
        network = _with_rule_of(leaves, ())
        notes = ["the rule's own parameters have no name there; --names=vffjax keeps them"] * (len(network) < len(leaves))
        leaves, others = torchvision.exported(config, network)
        notes = others + notes
    leaves = {name: _halved(name, leaf) if half and _is_kernel(name, leaf) else leaf for name, leaf in leaves.items()}
    _write(path, plan, leaves, "torchvision" if theirs else "vffjax", about)
    return notes


def _halved(name: str, kernel: np.ndarray) -> np.ndarray:
    if np.abs(kernel).max(initial=0) > np.finfo(np.float16).max:
        raise UserError(f"--half: tensor {name} has numbers that float16 cannot hold; leave it out")
    return kernel.astype(np.float16)


def write_group(path: pathlib.Path | str, plan: Plan, group: int, state: GroupState, about: Mapping[str, Any]) -> None:
    """Writes one group alone, by our names, and else as `write_weights`. A run that starts from it takes other groups from its seed."""
    _write(path, plan, _float32((state,), group), "vffjax", {**about, "group": group})


def _write(path: pathlib.Path | str, plan: Plan, tensors: dict[str, np.ndarray], names: str, about: Mapping[str, Any]) -> None:
    # One metadata entry, because safetensors writes several of them in random order.
    said = {METADATA: json.dumps(described(plan, names, about))}
    files.replace_file(pathlib.Path(path), safetensors.numpy.save(tensors, said))


def read_weights(path: pathlib.Path | str, plan: Plan, states: States) -> tuple[States, list[str]]:
    """Puts the parameters and statistics of a file into the groups of a run that starts from it.

    By our names, the file holds all groups or some, each of them whole, and every number is taken to the bit; kernels may be float16. A
    ResNet is also read by the names of torchvision or transformers, and converted to float32. Optimizer states stay as they are, and so do
    heads and parameters of the rule that the file does not hold.

    Args:
        path: the file.
        plan: the run's plan.
        states: the groups as they start without the file. Of their leaves only shapes and types are needed.

    Returns:
        The groups, and what was not taken from the file or is not in it, in words.

    Raises:
        UserError: the file is not sound, or was trained with another normalisation, or a tensor is missing, belongs to another network, has
            another shape or type, is not finite, or is a negative variance. The message names the file and the tensor.
    """
    leaves, config = _named(states), plan.config
    with _opened(path, config) as found:
        differs = compared(path, said_of(path), config)
        theirs = networks.find(config).blocks and not any(re.match(r"group\d+\.", name) for name in found)
        leaves, found, notes = _matched(leaves, found)
        arrays, others = (torchvision.imported if theirs else _own)(path, config, leaves, found)

    def taken(name: str, leaf: Any) -> Any:
        return jnp.asarray(arrays[name], leaf.dtype) if name in arrays else leaf

    new = []
    for i, state in enumerate(states):
        read = [taken(name, leaf) for name, leaf in _named((state,), i).items()]
        new.append(state._replace(**jax.tree.unflatten(jax.tree.structure(_weights(state)), read)))
    return tuple(new), others + notes + differs


def _matched(leaves: dict[str, Any], found: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor], list[str]]:
    """The leaves of a run and the tensors of a file, without the rule's parameters of a group where only one of them has any; and what that
    means, in words. A file may come from a run by another rule."""
    groups, in_file = ({_group(name) for name in names} for names in (leaves, found))
    ours, theirs = ({_group(name) for name in names if _is_of_rule(name)} for names in (leaves, found))
    fresh, extra = sorted((ours - theirs) & (groups & in_file or groups)), sorted((theirs - ours) & groups)
    notes = [f"holds no parameters of the rule for {', '.join(fresh)}, which start from the seed"] * bool(fresh)
    notes += [f"parameters of another rule ({', '.join(extra)}) are left out"] * bool(extra)
    return _with_rule_of(leaves, theirs), _with_rule_of(found, theirs.difference(extra)), notes


def _own(
    path: pathlib.Path | str, config: Config, leaves: Mapping[str, Any], found: Mapping[str, Tensor]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The tensors of a file by our names, which holds all groups or some, each of them whole; and which groups it lacks, in words."""
    groups = dict.fromkeys(map(_group, leaves))
    present = set(map(_group, found)) & groups.keys() or groups.keys()
    absent = [group for group in groups if group not in present]
    if absent and config.norm_statistics == "frozen":
        problem = f"{printable(str(path), 200)} holds no statistics of {', '.join(absent)}"
        raise bad_key("norm_statistics", config.norm_statistics, problem, "use batch, or give weights of every group")
    wanted = {name: f"F32{list(leaf.shape)}" for name, leaf in leaves.items() if _group(name) in present}
    for name in sorted(wanted.keys() | found.keys()):
        here, there = str(found.get(name, "missing")), wanted.get(name, f"of this {config.network} network")
        halved = name in wanted and _is_kernel(name, leaves[name]) and here == there.replace("F32", "F16")
        if here != there and not halved:
            raise UserError(f"{path}: tensor {printable(name, 200)} is {printable(here, 200)}, not {there}; {_OTHER}")
    arrays = {name: tensor.read() for name, tensor in found.items()}
    for name, array in arrays.items():
        if not np.isfinite(array).all() or (name.endswith(".var") and (array < 0).any()):
            raise UserError(f"{path}: tensor {name} holds infinity, NaN or a negative variance; {AGAIN}")
    taken = ", ".join(group for group in groups if group in present)
    return arrays, [f"holds {taken} only; the other groups ({', '.join(absent)}) start from the seed"] if absent else []


def check_start(config: Config) -> None:
    """Raises `UserError` if a run of `config` could not start from config.init_from. No data are read and nothing is compiled."""
    if config.init_from:
        path = local_file(config)
        with _opened(path, config):  # a bad header is found at once
            pass
        plan, sizes = plan_before_data(config)
        read_weights(path, plan, abstract_start(plan, sizes.image_shape)[1])


def local_file(config: Config) -> str:
    """The path of the file that config.init_from names. A file on the Hub is downloaded, once."""
    if config.init_from.startswith(HUB):
        return hub.downloaded(config.init_from, _most_bytes(config))
    return str(local(config.init_from, "config.init_from"))


def _most_bytes(config: Config) -> int:
    """An upper bound for the bytes of a file with this network's weights, be they float64 and with a large classifier."""
    sizes = sizes_of(config)
    return 8 * sum(layer.kernels for layer in layer_sizes(groups_of(config, sizes.classes), sizes.image_shape)) + 2**28


def _opened(path: pathlib.Path | str, config: Config) -> Any:
    if str(path).endswith(WEIGHT_FILES[1:]) and networks.find(config).blocks is None:
        able = ", ".join(name for name in NETWORKS.names if NETWORKS.find(name).blocks)
        raise UserError(f"{path}: PyTorch's files are read for {able}; give a {WEIGHT_FILES[0]} file by vffjax export")
    return formats.opened(path, _most_bytes(config))


def _weights(state: GroupState) -> dict[str, Any]:
    """What a file holds of a group."""
    return {kind: getattr(state, kind) for kind in _KINDS}


def _named(states: States, first: int = 0) -> dict[str, Any]:
    """Every leaf of parameters and statistics by its name in a file; `first` is the number of the first group."""
    paths = (path for i, state in enumerate(states, first) for path in jax.tree.leaves_with_path({f"group{i}": _weights(state)}))
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}


def _float32(states: States, first: int = 0) -> dict[str, np.ndarray]:
    return {name: np.array(leaf, np.float32, order="C") for name, leaf in _named(states, first).items()}


def _group(name: str) -> str:
    """The group of a tensor by our names, such as group0."""
    return name.partition(".")[0]


def _is_of_rule(name: str) -> bool:
    """Whether a tensor by our names is one of the rule's own parameters, such as `group0.params.rule.kernel`."""
    return re.match(r"group\d+\.params\.rule(\.|$)", name) is not None


def _is_kernel(name: str, leaf: Any) -> bool:
    """Whether a tensor is a kernel, and so one that may be float16. Statistics of two streams have two axes too."""
    return leaf.ndim > 1 and ".batch_stats." not in name


def _with_rule_of(named: Mapping[str, Any], groups: Collection[str]) -> dict[str, Any]:
    """Leaves or tensors by their names, with the rule's own parameters of these groups only."""
    return {name: value for name, value in named.items() if not _is_of_rule(name) or _group(name) in groups}
