"""The network and schedule of the speed board: CIFAR-10 to a validation accuracy in the least training time, local rules only.

    python benchmarks/speedrun.py --target 0.80

Four convolutions in two groups, pooled early. Untried: no accuracy and no time have been measured yet, and the target may need more epochs.
"""

import ml_collections

from vffjax.config import default_config


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.dataset = "cifar10"
    config.network = "conv4"
    config.widths = (64, 64, 128, 128)  # channels; two widths make two groups
    config.pools = (2, 1, 2, 1)  # positions per side: 32x32 -> 16x16 -> 8x8
    config.flip = True
    config.crop_padding = 2  # pixels
    config.head_weight = 1.0  # of the head's gradient, beside CSCL's
    config.epochs = 10
    config.batch_size = 128  # images
    config.learning_rate = 1e-2
    config.copies_per_class = 1  # images
    return config
