"""cifarnet: blocks of two 3x3 convolutions, the first of which pools before it is normalised, usually behind a whitening layer.

It follows the network of airbench (K. Jordan, 2024, arXiv:2404.00498), whose blocks are 64, 256 and 256 channels wide. Ours ends in
the last group's head on a grid of cells, for its last max-pooling and scaled linear layer.
"""

import itertools

from vffjax.config import Config
from vffjax.networks.conv import check_side, whitening
from vffjax.networks.layers import OWN_CHOICE, ConvLayer, Layer, plain
from vffjax.networks.network import Network


def layers(config: Config, norm: str) -> tuple[Layer, ...]:
    """Two `ConvLayer`s per entry of `config.widths`, behind the whitening layer if there is one."""
    given, first = plain(config, norm), whitening(config)
    blocks = [
        (
            ConvLayer(width, ends_block=False, pool=2, pools_first=True, resize=0 if i or first else config.image_size, **given),
            ConvLayer(width, **given),
        )
        for i, width in enumerate(config.widths)
    ]
    return (*first, *itertools.chain(*blocks))


NETWORK = Network(
    layers,
    keys=("widths", "image_size", "whitening", "auxiliary", *OWN_CHOICE),
    check_images=lambda config, shape: check_side(config, "widths", (2,) * len(config.widths), shape, "use fewer widths"),
)
