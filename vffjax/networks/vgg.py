"""The VGG networks of work on local losses (Nokland and Eidnes, 2019, arXiv:1901.06656): 3x3 convolutions, then a dense layer.

The classifier behind it is the last group's head. Ours differ from the published ones in the activation, ReLU for leaky ReLU, and in
having no dropout.
"""

from vffjax.config import Config
from vffjax.networks.conv import check_side, convolutions
from vffjax.networks.layers import OWN_CHOICE, DenseLayer, Layer, plain, scaled
from vffjax.networks.network import Network

HIDDEN = 1024  # units of the dense layer


def vgg(convolutional: tuple[tuple[int, int], ...]) -> Network:
    """A network of 3x3 convolutions of given channels, each with the window of the max-pooling behind it (1: none), and a dense layer.

    Its channels and units are `config.width_factor` times the published ones.
    """

    def layers(config: Config, norm: str) -> tuple[Layer, ...]:
        sizes = ((scaled(width, config.width_factor), pool) for width, pool in convolutional)
        dense = DenseLayer(scaled(HIDDEN, config.width_factor), **plain(config, norm))
        return (*convolutions(config, norm, sizes), dense)

    def check_images(config: Config, image_shape: tuple[int, int, int]) -> None:
        check_side(config, "network", (pool for _, pool in convolutional), image_shape, "set config.image_size=32")

    return Network(layers, keys=("width_factor", "image_size", "whitening", "auxiliary", *OWN_CHOICE), check_images=check_images)
