"""Networks as plain sequences of layers with declared widths. They know nothing of labels, groups or training."""

from vffjax.architectures import RESNET, VGG
from vffjax.config import Config
from vffjax.errors import chosen
from vffjax.networks.convolutional import convolutional
from vffjax.networks.layers import Layer
from vffjax.networks.mlp import mlp
from vffjax.networks.resnet import resnet
from vffjax.networks.vgg import vgg

_BUILDERS = {"mlp": mlp, "conv4": convolutional, "conv": convolutional} | dict.fromkeys(VGG, vgg) | dict.fromkeys(RESNET, resnet)


def build(config: Config) -> tuple[Layer, ...]:
    """The layers of `config.network`, from input to output."""
    return chosen("network", config.network, _BUILDERS)(config)
