"""Converts weights of ResNets between torchvision's names and layout and ours, and says what does not fit.

timm uses torchvision's names; those of transformers are first turned into them. torchvision and we both name a tensor by its layer and its
place there (`layer2.0.conv1.weight`; `group1.params.layers_0.conv1.kernel`). torchvision has one set of BatchNorm statistics, and we have
one for clean images and one for labelled copies: an import fills both from theirs, and an export writes those of clean images.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from vffjax import networks, rules
from vffjax.config import Config
from vffjax.errors import UserError, bad_key, printable
from vffjax.networks.network import Block
from vffjax.networks.resnet import STEMS, stem_width
from vffjax.registry import NETWORKS
from vffjax.weights.tensor_files import FLOATS, Tensor

SHOWN = 5  # how many tensors an error names
_FIELDS = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
_FC = ("fc.weight", "fc.bias")
_NOT_THEIRS = (
    "has `blocks`, but its layers are not a stem and these blocks with torchvision's parts (conv1, bn1, downsample_0)",
    "leave `blocks` out of its Network, or export by --names=vffjax",
)


def imported(path: Any, config: Config, leaves: Mapping[str, Any], found: Mapping[str, Tensor]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Converts the tensors of a file to our names and layout.

    Args:
        path: the file, for messages.
        config: the configuration of the run that starts from it.
        leaves: the run's leaves by our names; only their shapes are used.
        found: the tensors of the file.

    Returns:
        Float32 arrays by our names, and what was not taken from the file, in words.

    Raises:
        UserError: a tensor is missing, belongs to another network, has another shape, is not floating point, not finite, or is a negative
            variance. The message names the file and the tensors.
    """
    if config.norm == "layer":
        raise bad_key("norm", config.norm, f"has no running statistics, which {printable(str(path), 200)} holds", "use norm=batch")
    names = _names(config, leaves)
    counts = "num_batches_tracked"
    here = _from_transformers(path, {name: tensor for name, tensor in found.items() if name.rpartition(".")[2] != counts})
    notes = _left_out(config, leaves, here)
    for name in _FC if notes else ():
        del names[name]
        here.pop(name, None)
    wanted = {theirs: _their_shape(leaves[ours].shape, ours) for theirs, ours in names.items()}
    problems = []
    for name in dict.fromkeys([*wanted, *here]):
        shown, tensor = printable(name, 80), here.get(name)
        if tensor is None:
            problems.append(f"{shown} is missing, not {list(wanted[name])}")
        elif name not in wanted:
            problems.append(f"{shown} is {printable(str(tensor), 80)}, not of this {config.network}")
        elif tensor.shape != wanted[name] or tensor.dtype not in FLOATS:
            problems.append(f"{shown} is {printable(str(tensor), 80)}, not {list(wanted[name])} of {', '.join(FLOATS)}")
    if problems:
        raise _unfit(path, config, wanted, here, problems)
    arrays = {}
    for theirs, ours in names.items():
        array = here[theirs].read()
        if not np.isfinite(array).all() or (theirs.endswith(".running_var") and (array < 0).any()):
            raise UserError(f"{path}: tensor {theirs} holds infinity, NaN or a negative variance; give sound weights")
        arrays[ours] = _to_ours(array, leaves[ours].shape)
    return arrays, notes


def _from_transformers(path: Any, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of transformers' ResNetModel or ResNetForImageClassification by torchvision's names; other names stay as they are."""
    here: dict[str, Tensor] = {}
    for name, tensor in found.items():
        theirs = _torchvision_name(name)
        if theirs in here:
            raise UserError(f"{path}: two tensors for {printable(theirs, 80)}, one of them {printable(name, 80)}; give sound weights")
        here[theirs] = tensor
    return here


def _torchvision_name(name: str) -> str:
    """torchvision's name for a tensor, from that of transformers; any other name stays as it is."""
    kinds = {"convolution": ("conv", "0"), "normalization": ("bn", "1")}
    if match := re.fullmatch(r"(?:resnet\.)?embedder\.embedder\.(convolution|normalization)\.(\w+)", name):
        return f"{kinds[match[1]][0]}1.{match[2]}"
    if match := re.fullmatch(r"classifier\.1\.(weight|bias)", name):
        return f"fc.{match[1]}"
    block = r"(?:resnet\.)?encoder\.stages\.(\d)\.layers\.(\d{1,3})\.(?:layer\.(\d)|shortcut)\.(convolution|normalization)\.(\w+)"
    if not (match := re.fullmatch(block, name, re.ASCII)):
        return name
    stage, layer, step, kind, field = match.groups()
    place = f"downsample.{kinds[kind][1]}" if step is None else f"{kinds[kind][0]}{int(step) + 1}"
    return f"layer{int(stage) + 1}.{layer}.{place}.{field}"


def exported(config: Config, leaves: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Converts our tensors to torchvision's names and layout; returns them, and what is left out, in words.

    The last group's head becomes `fc` if it reads the mean over all positions, as torchvision's classifier does.
    """
    names, notes = _names(config, leaves), []
    if why := _no_fc(config, leaves):
        notes.append(why)
        for name in _FC:
            del names[name]
    heads = len({name.partition(".")[0] for name in leaves}) - 1
    lost = [f"the head(s) of the first {heads} group(s)"] * (heads > 0)
    lost += ["the labelled copies' statistics"] * (rules.norm_of(config) == "batch")
    if lost:
        notes.append(f"{' and '.join(lost)} have no name there; --names=vffjax keeps all")
    return {theirs: _to_theirs(np.asarray(leaves[ours], np.float32), ours) for theirs, ours in names.items()}, notes


def _names(config: Config, leaves: Mapping[str, Any]) -> dict[str, str]:
    """Our name for each of torchvision's tensors, in the order of the layers; `fc` is the last group's head."""
    layers: dict[tuple[int, int], list[tuple[str, str]]] = {}
    for name in leaves:
        group, _, layer, *rest = name.split(".")
        if layer != "head":
            if len(rest) != 2 or rest[1] not in _FIELDS:
                raise bad_key("network", config.network, *_NOT_THEIRS)
            theirs = f"{rest[0].replace('_', '.')}.{_FIELDS[rest[1]]}"
            layers.setdefault((int(group[5:]), int(layer[7:])), []).append((theirs, name))
    prefixes = ["", *(f"{block.name}." for block in _blocks(config))]
    if len(prefixes) != len(layers):
        raise bad_key("network", config.network, *_NOT_THEIRS)
    found = {
        f"{prefix}{theirs}": name for prefix, key in zip(prefixes, sorted(layers), strict=True) for theirs, name in sorted(layers[key])
    }
    return found | {f"fc.{theirs}": f"{_last(leaves)}.params.head.{ours}" for theirs, ours in (("weight", "kernel"), ("bias", "bias"))}


def _their_shape(shape: tuple[int, ...], ours: str) -> tuple[int, ...]:
    if ours.endswith(".kernel"):
        return (*shape[:-3:-1], *shape[:-2])
    return shape[1:] if ".batch_stats." in ours else tuple(shape)


def _to_theirs(array: np.ndarray, ours: str) -> np.ndarray:
    if ours.endswith(".kernel"):
        return np.ascontiguousarray(array.T if array.ndim == 2 else array.transpose(3, 2, 0, 1))
    return array[0].copy() if ".batch_stats." in ours else array


def _to_ours(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if array.ndim > 1:
        return np.ascontiguousarray(array.T if array.ndim == 2 else array.transpose(2, 3, 1, 0))
    return np.broadcast_to(array, shape).copy()  # statistics, the same for both streams


def _last(leaves: Mapping[str, Any]) -> str:
    """The last group."""
    return max((name.partition(".")[0] for name in leaves), key=lambda group: int(group[5:]))


def _head(leaves: Mapping[str, Any]) -> tuple[int, int]:
    """The numbers of inputs and of classes of the last group's head."""
    return tuple(leaves[f"{_last(leaves)}.params.head.kernel"].shape)


def _blocks(config: Config) -> list[Block]:
    blocks = networks.find(config).blocks
    assert blocks is not None  # who comes here has asked
    return blocks(config)


def _no_fc(config: Config, leaves: Mapping[str, Any]) -> str:
    """Why the last head cannot be `fc`, which reads the mean over all positions; empty if it can."""
    inputs, width = _head(leaves)[0], _blocks(config)[-1].width
    problem = f"the last head has {inputs} inputs, not the {width} of a mean over all positions (config.head_grid=1)"
    return "" if inputs == width else f"fc is left out: {problem}"


def _left_out(config: Config, leaves: Mapping[str, Any], here: Mapping[str, Tensor]) -> list[str]:
    """Why `fc` is not taken from the file, if it is not; then every head starts from the seed."""
    classes = here["fc.weight"].shape[:1] if "fc.weight" in here else ()
    if not here.keys() & set(_FC):
        why = "fc is not there"
    elif problem := _no_fc(config, leaves):
        why = problem
    elif classes and classes[0] != _head(leaves)[1]:
        why = f"fc is left out: {classes[0]} classes, not {_head(leaves)[1]}"
    else:
        return []
    return [f"{why}; heads start anew"]


def _unfit(path: Any, config: Config, wanted: Mapping[str, tuple[int, ...]], here: Mapping[str, Tensor], problems: list[str]) -> UserError:
    if not wanted.keys() & here.keys():
        first = ", ".join(printable(name, 80) for name in list(here)[:SHOWN]) or "none at all"
        return UserError(
            f"{path}: not weights of a ResNet by the names of torchvision or transformers, nor by vffjax export's: its tensors are {first}"
            f"{_more(len(here))}; give such weights, or set config.init_from=''"
        )
    set_keys = " and ".join(f"config.{key}={value}" for key, value in _hints(config, wanted, here).items())
    fix = f"set {set_keys}, or" if set_keys else "give weights of this network, or set"
    fix = f"{fix} config.init_from=''"
    theirs = here["conv1.weight"].shape[1:2] if "conv1.weight" in here else ()
    if theirs and theirs != wanted["conv1.weight"][1:2]:
        fix = f"they are for images of {theirs[0]} channels, and these have {wanted['conv1.weight'][1]}; {fix}"
    return UserError(f"{path}: {', '.join(problems[:SHOWN])}{_more(len(problems))}; {fix}")


def _more(count: int) -> str:
    return f" and {count - SHOWN} more" if count > SHOWN else ""


def _hints(config: Config, wanted: Mapping[str, tuple[int, ...]], here: Mapping[str, Tensor]) -> dict[str, Any]:
    """The configuration keys, with values, that would fit the file better, judged by its names and its first kernel."""
    found: dict[str, Any] = {}
    names = {match[0] for name in here if (match := re.match(r"layer\d+\.\d+", name))}
    bottleneck = any(name.endswith(".conv3.weight") for name in here)
    for network, record in ((name, NETWORKS.find(name)) for name in NETWORKS.names):
        blocks = record.blocks(config) if record.blocks else []
        alike = names == {block.name for block in blocks} and bottleneck == blocks[0].bottleneck if blocks else False
        if alike and record is not networks.find(config):
            found["network"] = network
    first = here["conv1.weight"].shape if "conv1.weight" in here else ()
    if len(first) == 4:
        for stem, (side, _) in STEMS.items():
            if side == first[2] and stem != config.stem:
                found["stem"] = stem
        if first[0] != stem_width(config) and (factor := _width_factor(config, here)):
            found["width_factor"] = f"{factor:g}"
    return found


def _width_factor(config: Config, here: Mapping[str, Tensor]) -> float | None:
    """The roundest config.width_factor with which a network has the kernels of a file; None if there is none."""
    kernels = {f"{block.name}.conv1.weight": block.inner for block in _blocks(dataclasses.replace(config, width_factor=1.0))}
    known = [name for name in kernels if name in here]
    if not known:
        return None
    for digits in range(1, 7):
        factor = round(here[known[-1]].shape[0] / kernels[known[-1]], digits)
        scaled = dataclasses.replace(config, width_factor=factor)
        inner = {f"{block.name}.conv1.weight": block.inner for block in _blocks(scaled)}
        if here["conv1.weight"].shape[0] == stem_width(scaled) and all(here[name].shape[0] == inner[name] for name in known):
            return factor
    return None
