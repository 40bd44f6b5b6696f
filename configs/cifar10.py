"""VFF-Net on CIFAR-10: four convolutions in two groups.

    python train.py --config configs/cifar10.py          # GPU or TPU
    python train.py --config configs/cifar10.py:small    # 2 CPU cores, minutes
"""

import ml_collections

from vffjax.config import default_config

VARIANTS = ("full", "small")


def get_config(variant: str = "full") -> ml_collections.ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r}: choose one of {', '.join(VARIANTS)}")
    config = default_config()
    config.dataset = "cifar10"
    config.network = "conv4"
    config.widths = (96, 96, 192, 192)
    config.flip = True
    config.crop_padding = 4
    config.epochs = 30
    config.head_weight = 1.0
    return config
