"""ResNet-18, -34 and -50 as torchvision has them, and with a stem for 32x32 images; the classifier is the last group's head.

Parameters are named as torchvision names them, with `_` for `.`, so that `pretrained` needs no table.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vffjax.architectures import STEMS, residual_blocks, stem_width
from vffjax.config import Config
from vffjax.networks.layers import Layer, Norm, common, resized
from vffjax.ops.conv import conv
from vffjax.ops.pooling import max_pool_overlapping


class _Conv(nn.Module):
    """A convolution without bias, padded as PyTorch pads; its parameters live in float32 and are cast at use."""

    width: int
    side: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.side, self.side, x.shape[3], self.width)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape, jnp.float32)
        return conv(x.astype(self.dtype), kernel.astype(self.dtype), self.stride)


class Stem(Layer):
    """First convolution, normalisation, ReLU; `imagenet`: 7x7 with stride 2, then 3x3 max-pooling with stride 2; `cifar`: 3x3."""

    kind: str
    norm: str
    dtype: Any
    frozen: bool
    resize: int = 0

    @property
    def ends_block(self) -> bool:
        return False

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w c"], clean: int, train: bool) -> Float[Array, "batch h2 w2 width"]:
        x = _Conv(self.width, *STEMS[self.kind], self.dtype, name="conv1")(resized(x, self.resize))
        x = Norm(self.norm, relu=True, frozen=self.frozen, name="bn1")(x, clean, train)
        return max_pool_overlapping(x) if self.kind == "imagenet" else x


class ResidualBlock(Layer):
    """Two 3x3 convolutions, or as a bottleneck 1x1, 3x3 and 1x1, added to the input; the first 3x3 has the stride.

    Where the shape changes, the input passes a 1x1 convolution and a normalisation of its own.
    """

    inner: int
    stride: int
    bottleneck: bool
    norm: str
    dtype: Any
    frozen: bool

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w c"], clean: int, train: bool) -> Float[Array, "batch h2 w2 width"]:
        steps = [(self.inner, 3, self.stride), (self.width, 3, 1)]
        if self.bottleneck:
            steps = [(self.inner, 1, 1), (self.inner, 3, self.stride), (self.width, 1, 1)]
        out = x
        for i, (width, side, stride) in enumerate(steps, 1):
            out = _Conv(width, side, stride, self.dtype, name=f"conv{i}")(out)
            out = Norm(self.norm, relu=i < len(steps), frozen=self.frozen, name=f"bn{i}")(out, clean, train)
        if self.stride > 1 or x.shape[3] != self.width:
            x = _Conv(self.width, 1, self.stride, self.dtype, name="downsample_0")(x)
            x = Norm(self.norm, frozen=self.frozen, name="downsample_1")(x, clean, train)
        return nn.relu(out + x.astype(out.dtype))


def resnet(config: Config) -> tuple[Layer, ...]:
    """Stem and residual blocks of `config.network`, each `config.width_factor` times as wide as published."""
    given = common(config)
    stem = Stem(stem_width(config.width_factor), kind=config.stem, resize=config.image_size, **given)
    blocks = residual_blocks(config.network, config.width_factor)
    return stem, *(ResidualBlock(b.width, b.inner, b.stride, b.bottleneck, **given) for b in blocks)
