"""Networks as plain sequences of layers with declared widths. They know nothing of labels, groups or training."""

from vffjax.config import Config
from vffjax.networks.conv4 import conv4
from vffjax.networks.layers import Layer
from vffjax.networks.mlp import mlp


def build(config: Config) -> tuple[Layer, ...]:
    """The layers of `config.network`, from input to output."""
    return {"mlp": mlp, "conv4": conv4}[config.network](config)
