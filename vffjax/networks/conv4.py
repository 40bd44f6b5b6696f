"""conv4: four 3x3 convolutions, as in the paper's CIFAR experiments; widths and pooling are the configuration's."""

import dataclasses

from vffjax.config import Config
from vffjax.errors import bad_key
from vffjax.networks import conv


def check(config: Config, norm: str) -> None:
    """Raises `UserError` unless there are four widths and four pooling windows."""
    if len(config.widths) != 4:
        fix = "give 4 widths, such as (48, 48, 96, 96), or use network=conv"
        raise bad_key("widths", config.widths, f"conv4 has 4 layers, not {len(config.widths)}", fix)
    conv.check(config, norm)


NETWORK = dataclasses.replace(conv.NETWORK, check=check)
