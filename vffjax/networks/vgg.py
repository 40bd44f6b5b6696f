"""vgg8b and vgg11b (Nokland and Eidnes, 2019): 3x3 convolutions, then a dense layer; the classifier behind it is the last group's head.

Ours differ from the published ones in the activation, ReLU for leaky ReLU, and in having no dropout.
"""

import jax.numpy as jnp

from vffjax.architectures import VGG, VGG_HIDDEN, scaled
from vffjax.config import Config
from vffjax.networks.layers import ConvLayer, DenseLayer, Layer


def vgg(config: Config) -> tuple[Layer, ...]:
    """The layers of `config.network`, each `config.width_factor` times as wide as published."""
    dtype = jnp.bfloat16 if config.precision == "bf16" else jnp.float32
    frozen, norm = config.norm_statistics == "frozen", config.resolved_norm
    sizes = [(scaled(width, config.width_factor), pool) for width, pool in VGG[config.network]]
    convolutions = [
        ConvLayer(width, norm, dtype, frozen, pool=pool, resize=0 if i else config.image_size) for i, (width, pool) in enumerate(sizes)
    ]
    return (*convolutions, DenseLayer(scaled(VGG_HIDDEN, config.width_factor), norm, dtype, frozen))
