"""vgg8b and vgg11b (Nokland and Eidnes, 2019): 3x3 convolutions, then a dense layer; the classifier behind it is the last group's head.

Ours differ from the published ones in the activation, ReLU for leaky ReLU, and in having no dropout.
"""

from vffjax.architectures import VGG, VGG_HIDDEN, scaled
from vffjax.config import Config
from vffjax.networks.convolutional import convolutions
from vffjax.networks.layers import DenseLayer, Layer, common


def vgg(config: Config) -> tuple[Layer, ...]:
    """The layers of `config.network`, each `config.width_factor` times as wide as published."""
    sizes = ((scaled(width, config.width_factor), pool) for width, pool in VGG[config.network])
    return (*convolutions(config, sizes), DenseLayer(scaled(VGG_HIDDEN, config.width_factor), **common(config)))
