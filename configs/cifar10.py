"""VFF-Net on CIFAR-10: four convolutions in two groups.

    python train.py --config configs/cifar10.py          # GPU or TPU
    python train.py --config configs/cifar10.py:small    # 2 CPU cores, minutes
    python benchmarks/throughput.py --config configs/cifar10.py:yardstick --quick --out FILE.json

small: test error 28.3 ± 0.8 % (mean and standard deviation, n = 3 seeds); back-propagation on the same network and budget, at its own
learning rate 5e-3, 26.6 ± 0.6 %. The full variant has not been trained: its widths, epochs, warm-up and weight decay are untried; what was
checked is that its epoch compiles for a TPU v5e.

yardstick: the network that figures of throughput, memory and compilers are about. It is frozen, whatever becomes of the recipe of the other
variants, so that figures of different times can be compared. It is not meant to be accurate.
"""

import ml_collections

from vffjax.config import default_config

VARIANTS = ("full", "small", "yardstick")


def get_config(variant: str = "full") -> ml_collections.ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r}: choose one of {', '.join(VARIANTS)}")
    if variant == "yardstick":
        return _yardstick()
    config = default_config()
    config.dataset = "cifar10"
    config.network = "conv4"
    config.widths = (128, 128, 256, 256)  # channels; two widths make two groups
    config.pools = (1, 2, 1, 2)  # positions per side: 32x32 -> 16x16 -> 8x8
    config.flip = True
    config.crop_padding = 4  # pixels
    config.head_weight = 1.0  # of the head's gradient, beside CSCL's
    config.epochs = 60
    config.batch_size = 128  # images
    config.learning_rate = 1e-2
    config.copies_per_class = 1  # images; 2 did no better on validation images
    config.warmup_epochs = 1.0  # epochs
    config.weight_decay = 0.01  # of kernels
    if variant == "small":
        config.train_examples = 20_000  # images, validation included
        config.widths = (32, 32, 64, 64)
        config.pools = (2, 1, 2, 1)  # early pooling: a quarter of the work
        config.crop_padding = 2
        config.epochs = 6
        config.weight_decay = 0.0
        config.warmup_epochs = 0.0
    return config


def _yardstick() -> ml_collections.ConfigDict:
    """Frozen: every key that the network and its training depend on is set here, and none is to be changed."""
    config = default_config()
    config.dataset = "cifar10"
    config.network = "conv4"
    config.widths = (128, 128, 256, 256)  # channels; two widths make two groups
    config.pools = (1, 2, 1, 2)  # positions per side: 32x32 -> 16x16 -> 8x8
    config.grouping = "width"
    config.norm = "batch"
    config.head_grid = 4  # cells per side
    config.flip = True
    config.crop_padding = 4  # pixels
    config.rule = "vff"
    config.labelling = "shared"
    config.copies_per_class = 1  # images
    config.similarity = "grid"
    config.contrast = "in_batch"
    config.temperature = 0.05  # of cosines
    config.noise_scale = 3.0  # standard deviations of normalised pixels
    config.head_weight = 1.0  # of the head's gradient, beside CSCL's
    config.epochs = 60
    config.batch_size = 128  # images
    config.optimizer = "adamw"
    config.learning_rate = 1e-2
    config.warmup_epochs = 1.0  # epochs
    config.weight_decay = 0.01  # of kernels
    return config
