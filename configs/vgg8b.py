"""VGG8B (Nokland and Eidnes, 2019) on CIFAR-10 or CIFAR-100 from scratch, four groups by width.

    python train.py --config configs/vgg8b.py               # CIFAR-10; GPU or TPU
    python train.py --config configs/vgg8b.py:cifar100      # CIFAR-100
    python train.py --config configs/vgg8b.py --config.rule=head --config.grouping=all      # the same by back-propagation

Not trained at full width yet. What was checked is that a step compiles for a TPU v5e (docs/performance.md).
"""

import ml_collections

from vffjax.config import default_config

VARIANTS = ("cifar10", "cifar100")


def get_config(variant: str = "cifar10") -> ml_collections.ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r}: choose one of {', '.join(VARIANTS)}")
    config = default_config()
    config.dataset = "cifar10" if variant == "cifar10" else "cifar100"
    config.network = "vgg8b"
    config.head_grid = 0  # by width: every head has at most 4,096 inputs
    config.flip = True
    config.crop_padding = 4  # pixels
    config.copies_per_class = 1  # of each class in a step beside the batch
    config.head_weight = 1.0  # of the head's gradient, beside CSCL's
    config.epochs = 60
    config.batch_size = 128  # images
    config.learning_rate = 5e-3
    config.warmup_epochs = 1.0  # epochs
    config.weight_decay = 0.01  # of kernels
    return config
