"""Sets of channels, one for each class: their means, and a normalisation by them. Rules whose classes compete by channels need both."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vffjax.ops.normalisation import EPSILON


def shares(channels: int, sets: int) -> Float[Array, "channels sets"]:
    """The weight of each channel in the mean of each set. A channel belongs to one set, and sets differ by at most one channel."""
    owners = jax.nn.one_hot(jnp.arange(channels) * sets // channels, sets, dtype=jnp.float32)
    return owners / owners.sum(axis=0, keepdims=True)


def means(x: Float[Array, "batch *feature"], sets: int) -> Float[Array, "batch sets"]:
    """The mean of each set over its channels and all positions, for each row. Computed in float32."""
    z = x.astype(jnp.float32)
    of_channels = jnp.mean(z, axis=tuple(range(1, z.ndim - 1)))
    return jnp.dot(of_channels, shares(z.shape[-1], sets), precision=jax.lax.Precision.HIGHEST)


def normalise_sets(x: Float[Array, "batch *feature"], sets: int) -> Float[Array, "batch *feature"]:
    """Gives each set mean 0 and variance 1 over its channels and all positions, for each row.

    This is group normalisation (Wu and He, 2018, arXiv:1803.08494) by sets that may differ by one channel. If there are fewer than two
    channels for each set, all channels are one set, because a single number has no variance. That is layer normalisation (Ba et al., 2016,
    arXiv:1607.06450). Computed in float32.
    """
    z = x.astype(jnp.float32)
    channels = z.shape[-1]
    sets = sets if 2 * sets <= channels else 1
    owner = jnp.arange(channels) * sets // channels
    shape = (z.shape[0], *(1,) * (z.ndim - 2), channels)
    z = z - means(z, sets)[:, owner].reshape(shape)
    return (z * jax.lax.rsqrt(means(z * z, sets) + EPSILON)[:, owner].reshape(shape)).astype(x.dtype)
