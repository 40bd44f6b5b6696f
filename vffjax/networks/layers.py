"""Layers: a linear map, normalisation and an activation, and for convolutions max-pooling.

The rows of a batch are two streams: first `clean` rows, then labelled copies. Their distributions differ, because a copy carries class
noise, so normalisation treats the two streams separately; see `Norm`.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from vffjax.config import Config
from vffjax.errors import chosen
from vffjax.ops.channel_sets import normalise_sets
from vffjax.ops.conv import conv
from vffjax.ops.normalisation import ACTIVATIONS, EPSILON, Rows, affine, by_row, normalise, streams_of
from vffjax.ops.pooling import max_pool

MOMENTUM = 0.9
UNSCALED = ("input", "class", "none")  # kinds of normalisation after which the scale of a layer's output is arbitrary
BLOCK = 64  # images that are read and whose patches are in memory at a time, where their covariance is taken
FIXED = "fixed"  # the name of a parameter that is set from the training images before training and then stays


def scaled(channels: int, factor: float) -> int:
    """`factor` times the number of channels, rounded, but at least 1."""
    return max(1, round(channels * factor))


def common(config: Config, norm: str) -> dict[str, Any]:
    """The arguments that all layers of a network share."""
    dtype = chosen("precision", config.precision, {"bf16": jnp.bfloat16, "f32": jnp.float32})
    frozen = chosen("norm_statistics", config.norm_statistics, {"frozen": True, "batch": False})
    return {"norm": norm, "dtype": dtype, "frozen": frozen}


OWN_CHOICE = ("activation", "norm_scale", "initialisation")  # the keys of `plain`


def plain(config: Config, norm: str) -> dict[str, Any]:
    """The arguments of layers that obey the keys of activation, scales and initialisation, which published networks fix themselves."""
    own = {"activation": config.activation, "scaled": config.norm_scale, "initialisation": config.initialisation}
    return common(config, norm) | own


class Layer(nn.Module):
    """A layer of a network, called as `layer(x, clean, train)`.

    Attributes:
        width: output channels.
        norm, dtype, frozen: as `common` gives them.
        sets: how many sets of channels of the input norm `class` normalises separately.
        ends_block: whether a block of the network ends with this layer, for groups that are blocks.
        joins_next: whether it is a stem, which belongs to the group of the next layer.
        learns: whether it has parameters that training changes. A layer without them is in the next layer's group whatever the grouping.
    """

    width: int
    norm: str = "batch"
    dtype: Any = jnp.float32
    frozen: bool = False
    sets: int = 1
    ends_block: bool = True
    joins_next: bool = False
    learns: bool = True


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
    """Normalises the two streams, and then applies an activation and max-pooling if it is told to. Computed in float32.

    Attributes:
        kind: `batch`: each stream by its own statistics, of the batch in training and running in evaluation. `anchor`: both streams by the
            statistics of the clean one, so that labelled rows change no clean row. `layer`: each row by its own statistics.
        pool: side of the max-pooling window; 1: none.
        activation: which one is applied; empty: none.
        frozen: whether training uses the running statistics too, and leaves them unchanged.
        scaled: whether each channel has a scale beside its bias.
    """

    kind: str
    pool: int = 1
    activation: str = ""
    frozen: bool = False
    scaled: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "batch *feature"], clean: Rows, train: bool) -> Float[Array, "batch *out"]:
        channels = x.shape[-1]
        ones = nn.initializers.ones
        scale = self.param("scale", ones, (channels,), jnp.float32) if self.scaled else jnp.ones(channels, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
        if self.kind == "layer":
            last = (1,) * (x.ndim - 1) + (channels,)
            z, axes = x.astype(jnp.float32), tuple(range(1, x.ndim))
            mean, var = z.mean(axes, keepdims=True), z.var(axes, keepdims=True)
            z = (z - mean) * jax.lax.rsqrt(var + EPSILON) * scale.reshape(last) + bias.reshape(last)
            return self._finish(z.astype(x.dtype))

        shared = chosen("norm", self.kind, {"anchor": True, "batch": False})
        streams = 1 if shared else 2
        means = self.variable("batch_stats", "mean", jnp.zeros, (streams, channels), jnp.float32)
        variances = self.variable("batch_stats", "var", jnp.ones, (streams, channels), jnp.float32)
        some_clean, some_labelled = streams_of(clean, x.shape[0])
        present = slice(0, 1) if shared else slice(0 if some_clean else 1, 2 if some_labelled else 1)
        if train and not self.frozen:
            out, mean, var = normalise(x, scale, bias, clean, shared, self.pool, self.activation)
            if not self.is_initializing():
                means.value = means.value.at[present].set(MOMENTUM * means.value[present] + (1 - MOMENTUM) * mean)
                variances.value = variances.value.at[present].set(MOMENTUM * variances.value[present] + (1 - MOMENTUM) * var)
            return out
        gain, offset = affine(means.value[present], variances.value[present], scale, bias)
        return self._finish((x.astype(jnp.float32) * by_row(gain, x, clean) + by_row(offset, x, clean)).astype(x.dtype))

    def _finish(self, z: Array) -> Array:
        return max_pool(ACTIVATIONS[self.activation](z), self.pool)


def identity_like(key: PRNGKeyArray, shape: tuple[int, ...], dtype: Any) -> Float[Array, "*k in out"]:
    """A kernel whose first output channels are its input channels, and whose others are drawn as He et al. (2015) draw them.

    The identity start is that of partly Dirac-initialised filters (K. Jordan, 2024, arXiv:2404.00498).
    """
    kernel = nn.initializers.he_normal()(key, shape, dtype)
    same = min(shape[-2:])
    centre = tuple(side // 2 for side in shape[:-2])
    return kernel.at[..., :same].set(0.0).at[(*centre, jnp.arange(same), jnp.arange(same))].set(1.0)


class _Affine(Layer):
    """Normalisation and activation, which dense layers and convolutions share. Subclasses compute the linear map."""

    activation: str = "relu"
    scaled: bool = True
    initialisation: str = "he"

    def finish(self, x: Array, clean: Rows, train: bool, pool: int = 1) -> Array:
        if self.norm in UNSCALED:
            bias = self.param("bias", nn.initializers.zeros, (self.width,), jnp.float32).astype(x.dtype)
            return max_pool(ACTIVATIONS[self.activation](x + bias.reshape((1,) * (x.ndim - 1) + (self.width,))), pool)
        return Norm(self.norm, pool, self.activation, self.frozen, self.scaled, name="norm")(x, clean, train)

    def start(self, x: Array) -> Array:
        """The input, normalised if the kind of normalisation is one of inputs."""
        if self.norm == "input":
            return divide_by_rms(x)
        return normalise_sets(x, self.sets) if self.norm == "class" else x

    def kernel(self, shape: tuple[int, ...]) -> Array:
        # Parameters are kept in float32 and cast where they are used. `conv` casts its kernel itself: its gradient can then stay float32.
        initial = chosen("initialisation", self.initialisation, {"he": nn.initializers.he_normal(), "identity": identity_like})
        return self.param("kernel", initial, shape, jnp.float32)


class DenseLayer(_Affine):
    """A dense map of the flattened input, normalisation and the activation."""

    @nn.compact
    def __call__(self, x: Float[Array, "batch *feature"], clean: Rows, train: bool) -> Float[Array, "batch width"]:
        x = self.start(x.astype(self.dtype)).reshape(x.shape[0], -1)
        return self.finish(x @ self.kernel((x.shape[1], self.width)).astype(self.dtype), clean, train)


class ConvLayer(_Affine):
    """A 3x3 convolution with zero padding, normalisation, the activation and max-pooling.

    Attributes:
        pool: side of the max-pooling window; 1: none.
        resize: side to which the input images are resized first; 0: none.
        pools_first: whether the map is pooled before it is normalised.
    """

    pool: int = 1
    resize: int = 0
    pools_first: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w c"], clean: Rows, train: bool) -> Float[Array, "batch h2 w2 width"]:
        x = self.start(resized(x, self.resize).astype(self.dtype))
        x = conv(x, self.kernel((3, 3, x.shape[3], self.width)))
        if self.pools_first:
            return self.finish(max_pool(x, self.pool), clean, train)
        return self.finish(x, clean, train, self.pool)


class WhiteningLayer(Layer):
    """A fixed convolution that whitens patches of the images, and the activation. The last row and column of pixels are repeated.

    Its kernel is `whitening_kernel` of the training images, which `training.plan` sets before training, and which nothing changes.

    Attributes:
        width: 0, because the number of its output channels follows from the images (see `channels`).
        side: of a patch, in pixels.
        resize: side to which the input images are resized first; 0: none.
    """

    side: int = 2
    resize: int = 0
    activation: str = "relu"

    def channels(self, of: int) -> int:
        """Its output channels for images of so many channels: each eigenvector of the patches with either sign."""
        return 2 * self.side * self.side * of

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w c"], clean: Rows, train: bool) -> Float[Array, "batch h2 w2 width"]:
        x = resized(x, self.resize).astype(self.dtype)
        width = self.channels(x.shape[3])
        kernel = self.param(FIXED, nn.initializers.zeros, (self.side, self.side, x.shape[3], width), jnp.float32)
        kernel = jax.lax.stop_gradient(kernel).astype(self.dtype)
        # An even side stays even, as the fast form of the next convolution needs it. A product of patches is faster on CPU than XLA's
        # convolution of so few channels.
        h, w = x.shape[1:3]
        x = jnp.pad(x, ((0, 0), (0, self.side - 1), (0, self.side - 1), (0, 0)), mode="edge")
        patches = jnp.concatenate([x[:, i : i + h, j : j + w] for i in range(self.side) for j in range(self.side)], axis=3)
        return ACTIVATIONS[self.activation](patches @ kernel.reshape(-1, width))


def whitening_kernel(
    images: Any, side: int, smallest: float = 5e-4, prepare: Callable[[Any], Any] = np.asarray
) -> Float[np.ndarray, "k k c d"]:
    """The kernel whose outputs on patches of the images are uncorrelated and of variance 1, and then the same with the opposite sign.

    It consists of the eigenvectors of the patches' covariance, each divided by the root of its eigenvalue (K. Jordan, 2024,
    arXiv:2404.00498), in order of falling eigenvalues. The entry of an eigenvector with the largest absolute value is positive. Computed in
    float64.

    Args:
        images: `[n, h, w, c]`, of which a block is read at a time and every patch counts.
        side: of a patch, in pixels.
        smallest: is added to each eigenvalue, in squared units of normalised pixels.
        prepare: makes normalised images, of the size that counts, from a block of images.
    """
    size, count = side * side * images.shape[3], 0
    covariance = np.zeros((size, size))
    for start in range(0, len(images), BLOCK):  # All patches of all images together would take side * side times the memory of the images.
        block = np.asarray(prepare(images[start : start + BLOCK]), np.float64)
        patches = np.lib.stride_tricks.sliding_window_view(block, (side, side), axis=(1, 2))
        rows = patches.transpose(0, 1, 2, 4, 5, 3).reshape(-1, size)
        covariance += rows.T @ rows
        count += len(rows)
    values, vectors = np.linalg.eigh(covariance / count)
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(axis=0)[None], axis=0)
    filters = (vectors * np.sign(largest) / np.sqrt(values + smallest))[:, ::-1]
    kernel = filters.reshape(side, side, images.shape[3], -1)
    return np.concatenate([kernel, -kernel], axis=3).astype(np.float32)
