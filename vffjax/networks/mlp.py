"""Dense layers on the flattened image: three for MNIST, as in the paper's abstract; the widths are ours."""

import jax.numpy as jnp

from vffjax.config import Config
from vffjax.networks.layers import DenseLayer, Layer


def mlp(config: Config) -> tuple[Layer, ...]:
    """One `DenseLayer` per entry of `config.widths`."""
    dtype = jnp.bfloat16 if config.precision == "bf16" else jnp.float32
    frozen = config.norm_statistics == "frozen"
    return tuple(DenseLayer(width, config.resolved_norm, dtype, frozen) for width in config.widths)
