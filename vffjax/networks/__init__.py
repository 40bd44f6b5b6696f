"""Networks as plain sequences of layers with declared widths. They know nothing of labels, groups or training."""

from vffjax.config import Config
from vffjax.networks.convolutional import convolutional
from vffjax.networks.layers import Layer
from vffjax.networks.mlp import mlp


def build(config: Config) -> tuple[Layer, ...]:
    """The layers of `config.network`, from input to output."""
    return {"mlp": mlp, "conv4": convolutional, "conv": convolutional}[config.network](config)
