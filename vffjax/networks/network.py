"""The record that a network is: how its layers are made from a configuration, and what the rest of the program may ask of it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from vffjax.config import Config
from vffjax.networks.layers import Layer


@dataclasses.dataclass(frozen=True)
class Block:
    """A residual block on paper: its output's channels, its 3x3 convolution's channels, and its stride in positions."""

    name: str  # torchvision's, such as layer2.0
    width: int
    inner: int
    stride: int
    bottleneck: bool


@dataclasses.dataclass(frozen=True)
class Network:
    """A kind of network, a plain sequence of layers. It knows nothing of labels, groups or training.

    Attributes:
        layers: the layers from input to output, for a configuration and the kind of normalisation (`auto` is resolved).
        keys: the configuration keys that the layers depend on, beside those that every network obeys.
        check: raises `UserError` if the configuration does not suit the network; takes the kind of normalisation too.
        check_images: raises `UserError` if images of a shape (height, width, channels) are too small for it.
        deepened: the changes of a configuration that give the network so many layers of its first width without pooling; None: the depth
            is the network's own.
        blocks: the residual blocks by torchvision's names, for weights that carry these names; None: it has no such weights.
    """

    layers: Callable[[Config, str], tuple[Layer, ...]]
    keys: tuple[str, ...]
    check: Callable[[Config, str], None] = lambda config, norm: None
    check_images: Callable[[Config, tuple[int, int, int]], None] = lambda config, image_shape: None
    deepened: Callable[[Config, int], Mapping[str, Any]] | None = None
    blocks: Callable[[Config], list[Block]] | None = None
