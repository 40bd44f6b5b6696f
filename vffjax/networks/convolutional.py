"""3x3 convolutions: four of them, as in the paper's CIFAR experiments, or any number; widths and pooling are ours."""

from collections.abc import Iterable

from vffjax.config import Config
from vffjax.networks.layers import ConvLayer, Layer, common


def convolutional(config: Config) -> tuple[Layer, ...]:
    """One `ConvLayer` per entry of `config.widths`, each followed by max-pooling over its entry of `config.pools`."""
    return convolutions(config, zip(config.widths, config.pools, strict=True))


def convolutions(config: Config, sizes: Iterable[tuple[int, int]]) -> tuple[Layer, ...]:
    """Layers of given widths and pooling windows, the first of which resizes the images."""
    return tuple(ConvLayer(w, **common(config), pool=p, resize=0 if i else config.image_size) for i, (w, p) in enumerate(sizes))
