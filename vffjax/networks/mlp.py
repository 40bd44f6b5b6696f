"""Dense layers on the flattened image: three for MNIST, as in the paper's abstract; the widths are ours."""

from vffjax.config import Config
from vffjax.networks.layers import DenseLayer, Layer, common


def mlp(config: Config) -> tuple[Layer, ...]:
    """One `DenseLayer` per entry of `config.widths`."""
    return tuple(DenseLayer(width, **common(config)) for width in config.widths)
