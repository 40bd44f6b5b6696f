"""The networks of `vffjax` in PyTorch, group by group, and how our parameters get into them."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vffjax.networks.groups import LayerGroup
from vffjax.networks.layers import EPSILON, FIXED, MOMENTUM, ConvLayer, DenseLayer, Layer, WhiteningLayer


def activation(layer: Any) -> Callable[[Tensor], Tensor]:
    """The activation of a layer."""
    return {"relu": functools.partial(F.relu, inplace=True), "gelu": functools.partial(F.gelu, approximate="tanh")}[layer.activation]


class Dense(nn.Module):
    """Dense map of the flattened input, batch normalisation, activation."""

    def __init__(self, inputs: int, layer: DenseLayer):
        super().__init__()
        self.linear = nn.Linear(inputs, layer.width, bias=False)
        self.norm = nn.BatchNorm1d(layer.width, EPSILON, 1 - MOMENTUM)
        self.activation = activation(layer)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, *feature] to [batch, width]."""
        return self.activation(self.norm(self.linear(flat(x))))


class Conv(nn.Module):
    """3x3 convolution with zero padding, batch normalisation, activation, and max-pooling, which comes first or last."""

    def __init__(self, channels: int, layer: ConvLayer):
        super().__init__()
        self.linear = nn.Conv2d(channels, layer.width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(layer.width, EPSILON, 1 - MOMENTUM)
        self.activation = activation(layer)
        self.first, self.last = (layer.pool, 1) if layer.pools_first else (1, layer.pool)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, h, w] to [batch, width, h / pool, w / pool]."""
        x = self.linear(x)
        x = F.max_pool2d(x, self.first) if self.first > 1 else x
        x = self.activation(self.norm(x))
        return F.max_pool2d(x, self.last) if self.last > 1 else x


class Whitening(nn.Module):
    """The fixed convolution of `WhiteningLayer`, whose kernel is no parameter, and its activation."""

    kernel: Tensor

    def __init__(self, channels: int, layer: WhiteningLayer):
        super().__init__()
        self.register_buffer("kernel", torch.zeros(layer.channels(channels), channels, layer.side, layer.side))
        self.activation = activation(layer)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, h, w] to [batch, width, h, w]. The last row and column are repeated."""
        more = self.kernel.shape[2] - 1
        return self.activation(F.conv2d(F.pad(x, (0, more, 0, more), mode="replicate"), self.kernel))


class Group(nn.Module):
    """The layers and the linear head of one group of `vffjax`, for inputs of `shape` (h, w, c) or (units,)."""

    def __init__(self, group: LayerGroup, shape: tuple[int, ...], classes: int):
        super().__init__()
        layers: list[nn.Module] = []
        for layer in group.module.layers:
            layers.append(_layer(layer, shape))
            shape = _shape_behind(layer, shape)
        for made, ours in zip(layers, group.module.layers, strict=True):
            if isinstance(made, Conv | Dense) and not getattr(ours, "scaled", True):
                made.norm.weight.requires_grad_(False)
        self.layers = nn.Sequential(*layers)
        self.shape = shape  # of one feature map: (h, w, c) or (units,)
        self.cells = [min(group.head.grid, side) for side in shape[:-1]]
        self.head = nn.Linear(math.prod(self.cells) * shape[-1], classes)

    def features(self, x: Tensor) -> Tensor:
        """The feature maps, [batch, c, h, w] or [batch, units], for a batch of inputs."""
        return self.layers(x)

    def logits(self, features: Tensor) -> Tensor:
        """The class scores [batch, classes] for feature maps, which are mean-pooled to the head's grid."""
        if features.ndim == 4 and list(features.shape[2:]) != self.cells:
            features = F.adaptive_avg_pool2d(features, (self.cells[0], self.cells[1]))
        return self.head(flat(features))


def _layer(layer: Layer, shape: tuple[int, ...]) -> nn.Module:
    """One of our layers in PyTorch, for maps of `shape` (h, w, c) or (units,)."""
    if isinstance(layer, WhiteningLayer):
        return Whitening(shape[2], layer)
    return Conv(shape[2], layer) if isinstance(layer, ConvLayer) else Dense(math.prod(shape), layer)  # type: ignore[arg-type]


def _shape_behind(layer: Layer, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a layer's output for maps of `shape`."""
    if isinstance(layer, WhiteningLayer):
        return *shape[:2], layer.channels(shape[2])
    if not isinstance(layer, ConvLayer):
        return (layer.width,)
    return shape[0] // layer.pool, shape[1] // layer.pool, layer.width


def flat(x: Tensor) -> Tensor:
    """Each row flattened in the order h, w, c, which is that of our kernels. In channels_last memory this is a view."""
    return x.permute(0, 2, 3, 1).flatten(1) if x.ndim == 4 else x


def build_network(groups: Sequence[LayerGroup], image_shape: tuple[int, ...], classes: int) -> list[Group]:
    """Builds the groups in order for images (h, w, c), with PyTorch's initial parameters."""
    network: list[Group] = []
    for group in groups:
        network.append(Group(group, network[-1].shape if network else image_shape, classes))
    return network


@torch.no_grad()
def load_from_jax(network: Sequence[Group], params_of_groups: Sequence[Any], batch_stats_of_groups: Sequence[Any]) -> None:
    """Copies our parameters and the running statistics of our clean stream into the same network in PyTorch.

    Args:
        network: the groups of `build_network`.
        params_of_groups: our parameters of each group.
        batch_stats_of_groups: our running statistics of each group.
    """
    for group, params, stats in zip(network, params_of_groups, batch_stats_of_groups, strict=True):
        for i, layer in enumerate(group.layers):
            ours = params[f"layers_{i}"]
            if isinstance(layer, Whitening):
                _assign(layer, {"kernel": _weight(ours[FIXED])})
                continue
            norm = stats[f"layers_{i}"]["norm"]
            pairs = {"linear.weight": _weight(ours["kernel"]), "norm.bias": ours["norm"]["bias"]}
            pairs |= {"norm.weight": ours["norm"]["scale"]} if "scale" in ours["norm"] else {}
            pairs |= {"norm.running_mean": norm["mean"][0], "norm.running_var": norm["var"][0]}
            _assign(layer, pairs)
        _assign(group.head, {"weight": _weight(params["head"]["kernel"]), "bias": params["head"]["bias"]})


def _weight(kernel: Any) -> np.ndarray:
    """HWIO to OIHW, or (inputs, outputs) to (outputs, inputs)."""
    kernel = np.asarray(kernel)
    return kernel.transpose(3, 2, 0, 1) if kernel.ndim == 4 else kernel.T


def _assign(module: nn.Module, values: dict[str, Any]) -> None:
    own = module.state_dict()
    for name, value in values.items():
        if own[name].shape != value.shape:  # `copy_` would broadcast silently
            raise ValueError(f"{name}: shape {tuple(own[name].shape)}, given {value.shape}")
        own[name].copy_(torch.from_numpy(np.array(value)))
