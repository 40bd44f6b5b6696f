"""conv: any number of 3x3 convolutions; widths and pooling are the configuration's."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from vffjax.config import Config
from vffjax.errors import bad_key
from vffjax.networks.layers import OWN_CHOICE, ConvLayer, Layer, WhiteningLayer, common, plain
from vffjax.networks.network import Network


def layers(config: Config, norm: str) -> tuple[Layer, ...]:
    """One `ConvLayer` per entry of `config.widths`, each followed by max-pooling over its entry of `config.pools`."""
    return convolutions(config, norm, zip(config.widths, config.pools, strict=True))


def convolutions(config: Config, norm: str, sizes: Iterable[tuple[int, int]]) -> tuple[Layer, ...]:
    """Layers of given widths and pooling windows, the first of which resizes the images. A block ends where a layer pools."""
    first = whitening(config)
    return first + tuple(
        ConvLayer(width, ends_block=pool > 1, pool=pool, resize=0 if i or first else config.image_size, **plain(config, norm))
        for i, (width, pool) in enumerate(sizes)
    )


def whitening(config: Config) -> tuple[Layer, ...]:
    """The fixed layer that whitens the images, if the configuration asks for it."""
    if not config.whitening:
        return ()
    given = {
        "side": config.whitening,
        "resize": config.image_size,
        "activation": config.activation,
        "dtype": common(config, "none")["dtype"],
    }
    return (WhiteningLayer(0, ends_block=False, joins_next=True, learns=False, **given),)


def check(config: Config, norm: str) -> None:
    """Raises `UserError` unless each layer has a pooling window."""
    count = len(config.widths)
    if len(config.pools) != count or any(pool < 1 for pool in config.pools):
        problem = f"{config.network} with {count} widths needs {count} windows of at least 1"
        raise bad_key("pools", config.pools, problem, f"give for example {(1, 2, *[1] * count)[:count]}")


def deepened(config: Config, depth: int) -> Mapping[str, Any]:
    """`depth` layers as wide as the first, without pooling."""
    return {"network": "conv", "widths": config.widths[:1] * depth, "pools": (1,) * depth}


def check_side(config: Config, key: str, pools: Iterable[int], image_shape: tuple[int, int, int], fix: str) -> None:
    """Raises `UserError` if max-pooling leaves nothing of an image."""
    side = config.image_size or min(image_shape[:2])
    if config.whitening > side:
        raise bad_key("whitening", config.whitening, f"is larger than {side}x{side} images", "use 2")
    if math.prod(pools) > side:
        raise bad_key(key, getattr(config, key), f"pools {side}x{side} images to nothing", fix)


NETWORK = Network(
    layers,
    keys=("widths", "pools", "image_size", "whitening", "auxiliary", *OWN_CHOICE),
    check=check,
    check_images=lambda config, shape: check_side(config, "pools", config.pools, shape, "use smaller windows"),
    deepened=deepened,
)
