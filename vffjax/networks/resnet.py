"""ResNets (He et al., 2016, arXiv:1512.03385) as torchvision has them, and with a stem for 32x32 images.

The head of the last group is the classifier. In a bottleneck the 3x3 convolution has the stride (torchvision's "v1.5"). Parameters have
torchvision's names, with `_` for `.`, so that `weights.torchvision` needs no table of names.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vffjax.config import Config
from vffjax.errors import bad_key
from vffjax.networks.layers import UNSCALED, Layer, Norm, common, resized, scaled
from vffjax.networks.network import Block, Network
from vffjax.ops.conv import conv
from vffjax.ops.normalisation import Rows
from vffjax.ops.pooling import max_pool_overlapping

_STAGES = (64, 128, 256, 512)  # channels of each stage
# Side and stride of the first convolution. The imagenet stem has 3x3 max-pooling of stride 2 behind it.
STEMS = {"cifar": (3, 1), "imagenet": (7, 2)}


class _Conv(nn.Module):
    """A convolution without bias, with PyTorch's padding. Its kernel is kept in float32, and `conv` casts it."""

    width: int
    side: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.side, self.side, x.shape[3], self.width)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape, jnp.float32)
        return conv(x.astype(self.dtype), kernel, self.stride)


class Stem(Layer):
    """The first convolution with normalisation and ReLU.

    Attributes:
        kind: `cifar`: a 3x3 convolution. `imagenet`: a 7x7 convolution of stride 2, followed by 3x3 max-pooling of stride 2.
        resize: side to which the input images are resized first; 0: none.
    """

    kind: str = "cifar"
    resize: int = 0

    @property
    def pool(self) -> int:
        """The stride of the max-pooling; 1: there is none."""
        return 2 if self.kind == "imagenet" else 1

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w c"], clean: Rows, train: bool) -> Float[Array, "batch h2 w2 width"]:
        x = _Conv(self.width, *STEMS[self.kind], self.dtype, name="conv1")(resized(x, self.resize))
        x = Norm(self.norm, activation="relu", frozen=self.frozen, name="bn1")(x, clean, train)
        return max_pool_overlapping(x) if self.pool > 1 else x


class ResidualBlock(Layer):
    """Adds the output of convolutions to the input: of two 3x3, or in a bottleneck of 1x1, 3x3 and 1x1. The first 3x3 has the stride.

    If the shape changes, the input passes a 1x1 convolution and a normalisation of its own.
    """

    inner: int = 64
    stride: int = 1
    bottleneck: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w c"], clean: Rows, train: bool) -> Float[Array, "batch h2 w2 width"]:
        steps = [(self.inner, 3, self.stride), (self.width, 3, 1)]
        if self.bottleneck:
            steps = [(self.inner, 1, 1), (self.inner, 3, self.stride), (self.width, 1, 1)]
        out = x
        for i, (width, side, stride) in enumerate(steps, 1):
            out = _Conv(width, side, stride, self.dtype, name=f"conv{i}")(out)
            out = Norm(self.norm, activation="relu" if i < len(steps) else "", frozen=self.frozen, name=f"bn{i}")(out, clean, train)
        if self.stride > 1 or x.shape[3] != self.width:
            x = _Conv(self.width, 1, self.stride, self.dtype, name="downsample_0")(x)
            x = Norm(self.norm, frozen=self.frozen, name="downsample_1")(x, clean, train)
        return nn.relu(out + x.astype(out.dtype))


def stem_width(config: Config) -> int:
    """Channels of the first convolution."""
    return scaled(_STAGES[0], config.width_factor)


def resnet(counts: tuple[int, ...], bottleneck: bool = False) -> Network:
    """A ResNet with so many residual blocks in each stage, its channels `config.width_factor` times the published ones."""

    def layers(config: Config, norm: str) -> tuple[Layer, ...]:
        given = common(config, norm)
        stem = Stem(stem_width(config), kind=config.stem, resize=config.image_size, joins_next=True, **given)
        return stem, *(ResidualBlock(b.width, inner=b.inner, stride=b.stride, bottleneck=b.bottleneck, **given) for b in blocks(config))

    def blocks(config: Config) -> list[Block]:
        found = []
        for stage, count in enumerate(counts):
            inner = scaled(_STAGES[stage], config.width_factor)
            for i in range(count):
                stride, width = 2 if stage and not i else 1, 4 * inner if bottleneck else inner
                found.append(Block(f"layer{stage + 1}.{i}", width, inner, stride, bottleneck))
        return found

    return Network(layers, keys=("width_factor", "stem", "image_size"), check=_check, blocks=blocks)


def _check(config: Config, norm: str) -> None:
    if norm in UNSCALED:
        because = f" (which norm=auto means under rule {config.rule})" if config.norm == "auto" else ""
        raise bad_key("network", config.network, f"residual sums need a normalisation, not norm={norm}{because}", "use vgg8b or conv")
