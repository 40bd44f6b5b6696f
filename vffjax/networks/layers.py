"""Layers: a linear map, normalisation and ReLU, and for convolutions max-pooling.

The rows of a batch are two streams: first `clean` rows, then labelled copies. Their distributions differ, because a copy carries class
noise, so normalisation treats the two streams separately; see `Norm`.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vffjax.config import Config
from vffjax.errors import chosen
from vffjax.ops.conv import conv
from vffjax.ops.normalisation import EPSILON, Rows, affine, by_row, normalise
from vffjax.ops.pooling import max_pool

MOMENTUM = 0.9


def scaled(channels: int, factor: float) -> int:
    """`factor` times the number of channels, rounded, but at least 1."""
    return max(1, round(channels * factor))


def common(config: Config, norm: str) -> dict[str, Any]:
    """The arguments that all layers of a network share."""
    dtype = chosen("precision", config.precision, {"bf16": jnp.bfloat16, "f32": jnp.float32})
    frozen = chosen("norm_statistics", config.norm_statistics, {"frozen": True, "batch": False})
    return {"norm": norm, "dtype": dtype, "frozen": frozen}


class Layer(nn.Module):
    """A layer of a network, called as `layer(x, clean, train)`.

    Attributes:
        width: output channels.
        norm, dtype, frozen: as `common` gives them.
        ends_block: whether a block of the network ends with this layer, for groups that are blocks.
        joins_next: whether it is a stem, which belongs to the group of the next layer.
    """

    width: int
    norm: str = "batch"
    dtype: Any = jnp.float32
    frozen: bool = False
    ends_block: bool = True
    joins_next: bool = False


def divide_by_rms(x: Float[Array, "batch *feature"]) -> Float[Array, "batch *feature"]:
    """Scales each row to root mean square 1 over all its features, so that its length carries no information (Hinton, 2022)."""
    z = x.astype(jnp.float32)
    squared = jnp.mean(z * z, axis=tuple(range(1, z.ndim)), keepdims=True)
    return (z * jax.lax.rsqrt(squared + EPSILON)).astype(x.dtype)


def resized(x: Float[Array, "batch h w c"], side: int) -> Float[Array, "batch h2 w2 c"]:
    """Resizes images to `side` x `side` positions by bilinear interpolation; 0 leaves them as they are."""
    if not side or x.shape[1:3] == (side, side):
        return x
    return jax.image.resize(x, (x.shape[0], side, side, x.shape[3]), "linear")


class Norm(nn.Module):
    """Normalises the two streams, and then applies ReLU and max-pooling. Computed in float32.

    Attributes:
        kind: `batch`: each stream by its own statistics, of the batch in training and running in evaluation. `anchor`: both streams by the
            statistics of the clean one, so that labelled rows change no clean row. `layer`: each row by its own statistics.
        pool: side of the max-pooling window; 1: none.
        relu: whether ReLU is applied.
        frozen: whether training uses the running statistics too, and leaves them unchanged.
    """

    kind: str
    pool: int = 1
    relu: bool = False
    frozen: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "batch *feature"], clean: Rows, train: bool) -> Float[Array, "batch *out"]:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
        if self.kind == "layer":
            last = (1,) * (x.ndim - 1) + (channels,)
            z, axes = x.astype(jnp.float32), tuple(range(1, x.ndim))
            mean, var = z.mean(axes, keepdims=True), z.var(axes, keepdims=True)
            z = (z - mean) * jax.lax.rsqrt(var + EPSILON) * scale.reshape(last) + bias.reshape(last)
            return self._finish(z).astype(x.dtype)

        shared = chosen("norm", self.kind, {"anchor": True, "batch": False})
        streams = 1 if shared else 2
        means = self.variable("batch_stats", "mean", jnp.zeros, (streams, channels), jnp.float32)
        variances = self.variable("batch_stats", "var", jnp.ones, (streams, channels), jnp.float32)
        present = slice(0, 1) if shared else slice(0 if clean else 1, 1 if clean == x.shape[0] else 2)
        if train and not self.frozen:
            out, mean, var = normalise(x, scale, bias, clean, shared, self.pool, self.relu)
            if not self.is_initializing():
                means.value = means.value.at[present].set(MOMENTUM * means.value[present] + (1 - MOMENTUM) * mean)
                variances.value = variances.value.at[present].set(MOMENTUM * variances.value[present] + (1 - MOMENTUM) * var)
            return out
        gain, offset = affine(means.value[present], variances.value[present], scale, bias)
        return self._finish(x.astype(jnp.float32) * by_row(gain, x, clean) + by_row(offset, x, clean)).astype(x.dtype)

    def _finish(self, z: Array) -> Array:
        return max_pool(nn.relu(z) if self.relu else z, self.pool)


class _Affine(Layer):
    """Normalisation and activation, which dense layers and convolutions share. Subclasses compute the linear map."""

    def finish(self, x: Array, clean: Rows, train: bool, pool: int = 1) -> Array:
        if self.norm in ("input", "none"):
            bias = self.param("bias", nn.initializers.zeros, (self.width,), jnp.float32).astype(x.dtype)
            return max_pool(nn.relu(x + bias.reshape((1,) * (x.ndim - 1) + (self.width,))), pool)
        return Norm(self.norm, pool, relu=True, frozen=self.frozen, name="norm")(x, clean, train)

    def kernel(self, shape: tuple[int, ...]) -> Array:
        # He initialisation (He et al., 2015) for ReLU. Parameters are kept in float32 and cast where they are used.
        return self.param("kernel", nn.initializers.he_normal(), shape, jnp.float32).astype(self.dtype)


class DenseLayer(_Affine):
    """A dense map of the flattened input, normalisation and ReLU."""

    @nn.compact
    def __call__(self, x: Float[Array, "batch *feature"], clean: Rows, train: bool) -> Float[Array, "batch width"]:
        x = x.reshape(x.shape[0], -1).astype(self.dtype)
        if self.norm == "input":
            x = divide_by_rms(x)
        return self.finish(x @ self.kernel((x.shape[1], self.width)), clean, train)


class ConvLayer(_Affine):
    """A 3x3 convolution with zero padding, normalisation, ReLU and max-pooling.

    Attributes:
        pool: side of the max-pooling window; 1: none.
        resize: side to which the input images are resized first; 0: none.
    """

    pool: int = 1
    resize: int = 0

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w c"], clean: Rows, train: bool) -> Float[Array, "batch h2 w2 width"]:
        x = resized(x, self.resize).astype(self.dtype)
        if self.norm == "input":
            x = divide_by_rms(x)
        x = conv(x, self.kernel((3, 3, x.shape[3], self.width)))
        return self.finish(x, clean, train, self.pool)
