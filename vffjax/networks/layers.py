"""Layers: a linear map, normalisation, ReLU, and for convolutions max-pooling. Each declares the width of its output.

Rows of a batch come in two streams, first `clean` images, then labelled copies. The streams differ in distribution (a copy
carries class noise), so normalisation treats them apart: see `Norm`.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vffjax.conv import conv
from vffjax.pooling import max_pool

MOMENTUM = 0.9
EPSILON = 1e-5


class Layer(nn.Module):
    """What a network is made of: `__call__(x, clean, train)`, with `width` output channels."""

    width: int


def divide_by_rms(x: Float[Array, "batch *feature"]) -> Float[Array, "batch *feature"]:
    """Each row scaled to root mean square 1 over all its features, so that its length says nothing (Hinton, 2022)."""
    z = x.astype(jnp.float32)
    squared = jnp.mean(z * z, axis=tuple(range(1, z.ndim)), keepdims=True)
    return (z * jax.lax.rsqrt(squared + EPSILON)).astype(x.dtype)


class Norm(nn.Module):
    """Normalisation over the two streams.

    `batch`: each stream by its own batch statistics, and by its own running statistics in evaluation. `anchor`: both by the clean
    stream's, so that no labelled image touches a clean one nor rescales itself. `layer`: each row by itself. Computed in float32.
    """

    kind: str

    @nn.compact
    def __call__(self, x: Float[Array, "batch *feature"], clean: int, train: bool) -> Float[Array, "batch *feature"]:
        channels = x.shape[-1]
        last = (1,) * (x.ndim - 1) + (channels,)
        scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32).reshape(last)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32).reshape(last)
        z = x.astype(jnp.float32)
        if self.kind == "layer":
            axes = tuple(range(1, z.ndim))
            mean, var = z.mean(axes, keepdims=True), z.var(axes, keepdims=True)
            return ((z - mean) * jax.lax.rsqrt(var + EPSILON) * scale + bias).astype(x.dtype)

        streams = 2 if self.kind == "batch" else 1
        means = self.variable("batch_stats", "mean", jnp.zeros, (streams, channels), jnp.float32)
        variances = self.variable("batch_stats", "var", jnp.ones, (streams, channels), jnp.float32)
        parts = [z[:clean], z[clean:]]
        out = []
        for row, part in enumerate(parts):
            if part.shape[0] == 0:
                continue
            source = row if self.kind == "batch" else 0
            if train and source == row:
                axes = tuple(range(part.ndim - 1))
                mean = part.mean(axes)
                var = jnp.maximum(jnp.mean(part * part, axes) - mean * mean, 0.0)
                if not self.is_initializing():
                    means.value = means.value.at[row].set(MOMENTUM * means.value[row] + (1 - MOMENTUM) * mean)
                    variances.value = variances.value.at[row].set(MOMENTUM * variances.value[row] + (1 - MOMENTUM) * var)
            elif not train:
                mean, var = means.value[source], variances.value[source]
            gain = scale * jax.lax.rsqrt(var.reshape(last) + EPSILON)
            out.append((part * gain + (bias - mean.reshape(last) * gain)).astype(x.dtype))
        return jnp.concatenate(out) if len(out) > 1 else out[0]


class _Affine(Layer):
    """Normalisation and activation shared by both kinds of layer; subclasses give the linear map."""

    norm: str = "batch"
    dtype: Any = jnp.float32

    def finish(self, x: Array, clean: int, train: bool) -> Array:
        if self.norm in ("input", "none"):
            bias = self.param("bias", nn.initializers.zeros, (self.width,), jnp.float32).astype(x.dtype)
            x = x + bias.reshape((1,) * (x.ndim - 1) + (self.width,))
        else:
            x = Norm(self.norm, name="norm")(x, clean, train)
        return nn.relu(x)

    def kernel(self, shape: tuple[int, ...]) -> Array:
        # He initialisation (He et al., 2015) for ReLU; parameters live in float32 and are cast at use.
        return self.param("kernel", nn.initializers.he_normal(), shape, jnp.float32).astype(self.dtype)


class DenseLayer(_Affine):
    """Dense map of the flattened input, normalisation, ReLU."""

    @nn.compact
    def __call__(self, x: Float[Array, "batch *feature"], clean: int, train: bool) -> Float[Array, "batch width"]:
        x = x.reshape(x.shape[0], -1).astype(self.dtype)
        if self.norm == "input":
            x = divide_by_rms(x)
        return self.finish(x @ self.kernel((x.shape[1], self.width)), clean, train)


class ConvLayer(_Affine):
    """3x3 convolution with zero padding, normalisation, ReLU, max-pooling over `pool` x `pool` windows."""

    pool: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w c"], clean: int, train: bool) -> Float[Array, "batch h2 w2 width"]:
        x = x.astype(self.dtype)
        if self.norm == "input":
            x = divide_by_rms(x)
        x = conv(x, self.kernel((3, 3, x.shape[3], self.width)))
        return max_pool(self.finish(x, clean, train), self.pool)
