"""mlp: dense layers on the flattened image; three for MNIST, as in the paper's abstract. The widths are ours."""

from collections.abc import Mapping
from typing import Any

from vffjax.config import Config
from vffjax.networks.layers import OWN_CHOICE, DenseLayer, Layer, plain
from vffjax.networks.network import Network


def layers(config: Config, norm: str) -> tuple[Layer, ...]:
    """One `DenseLayer` per entry of `config.widths`."""
    return tuple(DenseLayer(width, **plain(config, norm)) for width in config.widths)


def deepened(config: Config, depth: int) -> Mapping[str, Any]:
    """`depth` layers as wide as the first."""
    return {"widths": config.widths[:1] * depth}


NETWORK = Network(layers, keys=("widths", *OWN_CHOICE), deepened=deepened)
