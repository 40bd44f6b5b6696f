"""3x3 convolutions: four of them, as in the paper's CIFAR experiments, or any number; widths and pooling are ours."""

import jax.numpy as jnp

from vffjax.config import Config
from vffjax.networks.layers import ConvLayer, Layer


def convolutional(config: Config) -> tuple[Layer, ...]:
    """One `ConvLayer` per entry of `config.widths`, each followed by max-pooling over its entry of `config.pools`."""
    dtype = jnp.bfloat16 if config.precision == "bf16" else jnp.float32
    frozen, norm = config.norm_statistics == "frozen", config.resolved_norm
    pairs = enumerate(zip(config.widths, config.pools, strict=True))
    return tuple(ConvLayer(w, norm, dtype, frozen, pool=p, resize=0 if i else config.image_size) for i, (w, p) in pairs)
