"""What an exported weight file says of itself, so that another program can compute what the run computed: docs/pytorch.md shows one."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from vffjax import networks, rules
from vffjax.config import NORMS, Config
from vffjax.errors import UserError, printable
from vffjax.files import as_json
from vffjax.networks.layers import Layer
from vffjax.ops.normalisation import EPSILON
from vffjax.rules.local import Rule
from vffjax.training.plan import Plan

FORMAT = "vffjax weights 1"
# How the axes of tensors are ordered, by whose names they have. A dense layer takes a map of features in the order of `flattened`.
_LAYOUTS = {
    "vffjax": {"images": "NHWC", "convolution": "HWIO", "dense": "IO", "flattened": "HWC"},
    "torchvision": {"images": "NCHW", "convolution": "OIHW", "dense": "OI"},
}
# Attributes of a layer that say nothing about what it computes from given tensors.
_NOT_SAID = ("dtype", "frozen", "ends_block", "joins_next", "learns", "initialisation", "parent", "name")


def described(plan: Plan, names: str, about: Mapping[str, Any]) -> dict[str, Any]:
    """The description of a file of weights, in JSON's types but for what layers of one's own may have as attributes.

    Args:
        plan: of the run.
        names: whose names the tensors have: vffjax or torchvision.
        about: more that it shall say, such as class_names.
    """
    config = plan.config
    network = {key: getattr(config, key) for key in ("network", *networks.find(config).keys)}
    network |= {"norm": rules.norm_of(config), "grouping": config.grouping}
    streams = ["clean images", "labelled copies"] if names == "vffjax" and network["norm"] == "batch" else ["clean images"]
    groups = [
        {
            "layers": [_layer(layer) for layer in group.module.layers],
            "head": {
                "grid": group.head.grid,
                "normalises": group.head.normalises,
                "auxiliary": [_layer(each) for each in group.head.auxiliary],
            },
        }
        for group in plan.groups
    ]
    return {
        "format": FORMAT,
        "names": names,
        "network": as_json(network),
        "layout": _LAYOUTS[names],
        "epsilon": EPSILON,
        "batch_statistics": {"rows": streams, "clean_row": 0},
        "rule_changes_images": plan.rule.shown is not Rule.shown,
        "groups": groups,
        **about,
    }


def _layer(layer: Layer) -> dict[str, Any]:
    said = {field.name: getattr(layer, field.name) for field in dataclasses.fields(layer) if field.name not in _NOT_SAID}
    return {"layer": type(layer).__name__, **as_json(said)}


def compared(path: Any, found: Any, config: Config) -> list[str]:
    """How a file differs from a run that starts from it, in words, where tensors of the same names and shapes mean something else.

    Args:
        path: the file, for messages.
        found: what the file says of itself. It may come from anyone, and an older version said less.
        config: of the run.

    Raises:
        UserError: the file's layers are normalised in another way.
    """
    network = found.get("network") if isinstance(found, dict) else None
    if not isinstance(network, dict):
        return []
    here, there = rules.norm_of(config), network.get("norm")
    # Until the version after 0.2.0 files said `auto`, from which it cannot be told.
    if found.get("names") == "vffjax" and there in NORMS and there not in ("auto", here):
        because = f", which norm=auto means under rule {config.rule}" if config.norm == "auto" else ""
        raise UserError(
            f"{path}: was trained with norm={there}, and this run has norm={here}{because}; set config.norm={there}, or give other weights"
        )
    notes = []
    for key in networks.find(config).keys:
        ours = as_json(getattr(config, key))
        if key != "initialisation" and key in network and network[key] != ours:
            notes.append(f"was trained with {key}={printable(str(network[key]), 100)}, and this run has {ours}")
    return notes


def other_classes(found: Any, class_names: Sequence[str]) -> str:
    """What is wrong with the heads of a file for as many classes, in words; empty if its classes are these, or are not known.

    Args:
        found: what the file says of itself. It may come from anyone.
        class_names: of the data, in the order of the numbers of the classes.
    """
    names = found.get("class_names") if isinstance(found, dict) else None
    if not isinstance(names, list) or len(names) != len(class_names) or [str(name) for name in names] == list(class_names):
        return ""
    here, there = (printable(", ".join(map(str, some[:5])) + ", ..." * (len(some) > 5), 200) for some in (class_names, names))
    return f"its heads were trained for the classes {there}, in this order, and the data have {here}"
