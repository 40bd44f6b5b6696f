"""The networks of `vffjax` in PyTorch, group by group, and how our parameters get into them."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vffjax.networks.groups import LayerGroup
from vffjax.networks.layers import EPSILON, MOMENTUM, ConvLayer


class Dense(nn.Module):
    """Dense map of the flattened input, batch normalisation, ReLU."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.linear = nn.Linear(inputs, width, bias=False)
        self.norm = nn.BatchNorm1d(width, EPSILON, 1 - MOMENTUM)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, *feature] to [batch, width]."""
        return F.relu(self.norm(self.linear(flat(x))), inplace=True)


class Conv(nn.Module):
    """3x3 convolution with zero padding, batch normalisation, ReLU, max-pooling over `pool` x `pool` windows."""

    def __init__(self, channels: int, width: int, pool: int):
        super().__init__()
        self.linear = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width, EPSILON, 1 - MOMENTUM)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, h, w] to [batch, width, h / pool, w / pool]."""
        x = F.relu(self.norm(self.linear(x)), inplace=True)
        return F.max_pool2d(x, self.pool) if self.pool > 1 else x


class Group(nn.Module):
    """The layers and the linear head of one group of `vffjax`, for inputs of `shape` (h, w, c) or (units,)."""

    def __init__(self, group: LayerGroup, shape: tuple[int, ...], classes: int):
        super().__init__()
        layers: list[nn.Module] = []
        for layer in group.module.layers:
            if isinstance(layer, ConvLayer):
                layers.append(Conv(shape[2], layer.width, layer.pool))
                shape = (shape[0] // layer.pool, shape[1] // layer.pool, layer.width)
            else:
                layers.append(Dense(math.prod(shape), layer.width))
                shape = (layer.width,)
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
            ours, norm = params[f"layers_{i}"], stats[f"layers_{i}"]["norm"]
            pairs = {"linear.weight": _weight(ours["kernel"]), "norm.weight": ours["norm"]["scale"], "norm.bias": ours["norm"]["bias"]}
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
