"""Layer grouping (LG): cuts the layers of a network into groups, each with an auxiliary head. No gradient crosses between groups."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from vffjax.config import Config
from vffjax.errors import chosen
from vffjax.networks import find
from vffjax.networks.layers import UNSCALED, ConvLayer, Layer, divide_by_rms, plain
from vffjax.ops import pooling, recompute
from vffjax.ops.normalisation import Rows

HEAD_INPUTS = 4096  # the most inputs of a head with config.head_grid=0, as a map of 8x8 positions and 64 channels has


class GroupState(NamedTuple):
    """Everything that training changes in one group."""

    params: Any  # {"layers_i": ..., "head": ...}, and "rule" if the rule owns parameters; float32
    batch_stats: Any  # running statistics of its normalisations, or {}
    opt_state: optax.OptState

    @property
    def has_new_head(self) -> bool:
        """Whether the kernel of the head is zero, as it starts."""
        return not np.any(self.params["head"]["kernel"])


States = tuple[GroupState, ...]  # of all groups, from input to output


class LayerSize(NamedTuple):
    """The sizes of a layer for one image."""

    kernels: int  # entries of all its kernels
    map: int  # entries of its feature map before pooling
    width: int  # channels or units of its output

    @property
    def multiplications(self) -> int:
        """Of the forward pass: each entry of a kernel is used once for each position of the feature map."""
        return self.kernels * max(1, self.map // self.width)


class Head(nn.Module):
    """The auxiliary classifier of a group: a linear map of its features, mean-pooled to a grid, behind layers of its own if it has any.

    Attributes:
        classes: how many there are.
        grid: side of the grid in cells.
        normalises: whether the linear map's input is scaled to root mean square 1.
        auxiliary: layers before the pooling, whose normalisation keeps no statistics.
    """

    classes: int
    grid: int
    normalises: bool
    auxiliary: tuple[Layer, ...] = ()

    @nn.compact
    def __call__(self, features: Float[Array, "batch *feature"]) -> Float[Array, "batch classes"]:
        z = features
        for layer in self.auxiliary:
            z = layer(z, z.shape[0], False)
        z = z.astype(jnp.float32)
        if z.ndim == 4:
            z = pooling.mean_pool_to_grid(z, self.grid)
        z = z.reshape(z.shape[0], -1)
        z = divide_by_rms(z) if self.normalises else z
        kernel = self.param("kernel", nn.initializers.zeros, (z.shape[1], self.classes), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.classes,), jnp.float32)
        return jnp.dot(z, kernel, precision=jax.lax.Precision.HIGHEST) + bias.reshape(1, -1)


class _Module(nn.Module):
    layers: tuple[Layer, ...]
    head: Head

    def features(self, x: Array, clean: Rows, train: bool, part: slice = slice(None)) -> Array:
        for layer in self.layers[part]:
            x = layer(x, clean, train)
        return x

    def logits(self, features: Array) -> Array:
        return self.head(features)

    def __call__(self, x: Array) -> Array:
        return self.logits(self.features(x, x.shape[0], False))


@dataclasses.dataclass(frozen=True)
class LayerGroup:
    """One group, as pure functions of its parameters.

    The head is a linear map of the features, mean-pooled to a grid, perhaps behind convolutions of its own. The linear map starts at zero.

    Attributes:
        index: from 0 at the input.
        module: layers and head.
        rematerialise: whether the backward pass recomputes the features instead of keeping them.
        frozen: whether the layers and their statistics keep their initial values while the head learns.
    """

    index: int
    module: _Module
    rematerialise: bool = False
    frozen: bool = False

    @property
    def name(self) -> str:
        return f"group{self.index}"

    @property
    def width(self) -> int:
        """Channels of the group's feature map."""
        return self.module.layers[-1].width

    @property
    def head(self) -> Head:
        return self.module.head

    def init(self, key: PRNGKeyArray, x: Float[Array | jax.ShapeDtypeStruct, "batch *feature"]) -> tuple[Any, Any]:
        """Parameters and batch statistics for inputs of the shape of `x`. No features are computed."""
        variables = self.module.lazy_init(key, jax.ShapeDtypeStruct(x.shape, x.dtype))
        return variables["params"], variables.get("batch_stats", {})

    def features(
        self, params: Any, batch_stats: Any, x: Float[Array, "batch *feature"], clean: Rows, train: bool
    ) -> tuple[Float[Array, "batch *out"], Any]:
        """Computes the features of the group.

        Args:
            params: of the group.
            batch_stats: its running statistics.
            x: its input: clean rows, then labelled rows.
            clean: how many rows are clean.
            train: whether normalisation uses the statistics of the batch and updates the running ones.

        Returns:
            The features, and the new running statistics.
        """
        if self.frozen:
            params, train = jax.lax.stop_gradient(params), False
        if train and self.rematerialise:
            return self._recomputed(params, batch_stats, x, clean)
        return self._features(clean, train, slice(None), params, batch_stats, x)

    def _features(self, clean: Rows, train: bool, part: slice, params: Any, batch_stats: Any, x: Array) -> tuple[Array, Any]:
        """Computes the layers of `part`. Parameters and statistics of the other layers may be missing."""
        variables = {"params": params} | ({"batch_stats": batch_stats} if batch_stats else {})
        if train and batch_stats:
            out, new = self.module.apply(variables, x, clean, True, part, method="features", mutable=["batch_stats"])
            return cast(Array, out), new["batch_stats"]
        return cast(Array, self.module.apply(variables, x, clean, train, part, method="features")), batch_stats

    def _recomputed(self, params: Any, batch_stats: Any, x: Array, clean: Rows) -> tuple[Array, Any]:
        """`features` in training. The backward pass keeps only the inputs of segments of layers, and recomputes one segment at a time.

        A segment has about sqrt(n) of n layers, which keeps the least in memory (Chen et al., 2016, arXiv:1604.06174). Each layer is
        recomputed once.
        """
        count = len(self.module.layers)
        size = round(math.sqrt(count))
        new_stats: dict[str, Any] = {}
        for first in range(0, count, size):
            names = [f"layers_{i}" for i in range(first, min(first + size, count))]
            own_params, own_stats = ({name: tree[name] for name in names if name in tree} for tree in (params, batch_stats))
            segment = functools.partial(self._features, clean, True, slice(first, first + size))
            x, own_stats = recompute.recomputed(segment)(own_params, own_stats, x)
            new_stats |= own_stats
        return x, new_stats

    def logits(self, params: Any, features: Float[Array, "batch *feature"]) -> Float[Array, "batch classes"]:
        """The class scores of the head, float32."""
        return cast(Array, self.module.apply({"params": params}, features, method="logits"))


def cut(layers: tuple[Layer, ...], grouping: str) -> tuple[tuple[Layer, ...], ...]:
    """Cuts layers, from input to output, into groups of consecutive layers.

    Args:
        layers: of a network. A residual block is one layer.
        grouping: `width`: consecutive layers of equal width make a group. `block`: the blocks that the network declares. `layer`: each
            layer. `all`: all layers, which is back-propagation.

    A stem belongs to the group after it, unless each layer is a group. A layer that does not learn always belongs to the group after it.
    """
    if chosen("grouping", grouping, {"all": True, "width": False, "block": False, "layer": False}):
        return (layers,)
    groups: list[tuple[Layer, ...]] = []
    for layer in layers:
        before = groups[-1][-1] if groups else None
        joins = {"width": before is not None and before.width == layer.width, "block": before is not None and not before.ends_block}
        if before is not None and (not before.learns or (grouping != "layer" and (joins[grouping] or before.joins_next))):
            groups[-1] += (layer,)
        else:
            groups.append((layer,))
    return tuple(groups)


def make_groups(config: Config, norm: str, classes: int) -> tuple[LayerGroup, ...]:
    """The groups of a configuration.

    Args:
        config: network, grouping and the keys of its layers and heads.
        norm: the kind of normalisation, where config.norm=auto is resolved.
        classes: outputs of each head.
    """
    # If no normalisation follows the linear map, the scale of the features is arbitrary, so the head normalises its input.
    free_scale = norm in UNSCALED
    every = find(config).layers(config, norm)
    if norm == "class":  # The channels of an image, or of a whitening layer, belong to no class.
        first = next(i for i, layer in enumerate(every) if layer.learns)
        every = (*every[: first + 1], *(layer.clone(sets=classes) for layer in every[first + 1 :]))
    parts, groups = cut(every, config.grouping), []
    given = plain(config, "layer") | {"initialisation": "he"}
    auxiliary = tuple(ConvLayer(width, **given) for width in config.auxiliary)
    for i, layers in enumerate(parts):
        own = auxiliary if i + 1 < len(parts) and isinstance(layers[-1], ConvLayer) else ()
        grid = config.head_grid or fitting_grid((own or layers)[-1].width)
        module = _Module(layers, Head(classes, grid, free_scale, own))
        groups.append(LayerGroup(i, module, config.rematerialise, i < config.frozen_groups))
    return tuple(groups)


@functools.lru_cache(maxsize=16)
def layer_sizes(groups: tuple[LayerGroup, ...], image_shape: tuple[int, int, int]) -> list[LayerSize]:
    """The sizes of each layer, from input to output. Nothing is computed."""
    x, found = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32), []
    for layer in (layer for group in groups for layer in group.module.layers):
        if "pool" in layer.__dataclass_fields__:
            before_pooling = _output_and_kernels(layer.clone(pool=1), x)[0].size
            x, kernels = _output_and_kernels(layer, x)
        else:  # a stem of a ResNet pools by its stride
            x, kernels = _output_and_kernels(layer, x)
            before_pooling = x.size * getattr(layer, "pool", 1) ** 2
        found.append(LayerSize(kernels, before_pooling, x.shape[-1]))
    return found


@functools.lru_cache(maxsize=128)  # Deep networks repeat layers, and tracing one takes about 10 ms.
def _output_and_kernels(layer: Layer, x: jax.ShapeDtypeStruct) -> tuple[jax.ShapeDtypeStruct, int]:
    """The shape of a layer's output for an input, and the entries of all its kernels."""
    y, variables = jax.eval_shape(functools.partial(layer.init_with_output, clean=1, train=False), jax.random.key(0), x)
    return y, sum(leaf.size for leaf in jax.tree.leaves(variables.get("params", {})) if leaf.ndim > 1)


def fitting_grid(width: int, most: int = HEAD_INPUTS) -> int:
    """Side, in cells, of the grid to which a map of this width is pooled: the largest power of two that leaves `most` numbers or fewer."""
    side = 1
    while 4 * side * side * width <= most:
        side *= 2
    return side


def init_variables(
    groups: tuple[LayerGroup, ...],
    key: PRNGKeyArray,
    image_shape: tuple[int, int, int],
    own: Callable[[int, tuple[int, ...]], Mapping[str, Any]] = lambda group, shape: {},
) -> tuple[tuple[Any, Any], ...]:
    """Initial parameters and statistics of all groups.

    Args:
        groups: from input to output.
        key: group `i` uses `fold_in(key, i)`.
        image_shape: height, width and channels.
        own: further parameters of a group, from its index and the shape of its features for one image.
    """
    x = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    out: list[tuple[Mapping, Mapping]] = []
    for i, group in enumerate(groups):
        params, stats = group.init(jax.random.fold_in(key, i), x)
        x, _ = jax.eval_shape(functools.partial(group.features, clean=1, train=False), params, stats, x)
        out.append((params | own(i, x.shape[1:]), stats))
    return tuple(out)
