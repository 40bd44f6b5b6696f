"""The network and schedule of the speed board: CIFAR-10 to a validation accuracy in the least training time, local rules only.

    python benchmarks/speedrun.py --target 0.85 --config configs/cifar10_speed.py          # VFF
    python benchmarks/speedrun.py --target 0.85 --config configs/cifar10_speed.py:supcon   # a contrast among clean images in place of CSCL

Four convolutions in two groups, pooled early, with the parts of the recipe of configs/cifar10.py that back-propagation by PyTorch has too
or has no use for. After four epochs on seed 0 the validation error of VFF is 14.20 % (n = 1, results/race-vff-4-epochs-alternating,
val_error). In a race on 2 CPU cores it reached 85 % with seeds 5 and 6, after 456 and 466 s, and back-propagation by PyTorch after 534 and
500 s (--peer epochs=3 warmup_epochs=0.9); docs/performance.md, "Seconds to an accuracy", says what this depends on. With three epochs and
flips by chance VFF has 15.12 % (n = 1, results/race-vff-3-epochs, val_error), and supcon 14.56 %
(n = 1, results/race-supcon-3-epochs, val_error), by the last head. With four epochs supcon has not raced yet.
"""

import ml_collections

from vffjax.config import default_config

VARIANTS = ("vff", "supcon")


def get_config(variant: str = "vff") -> ml_collections.ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r}: choose one of {', '.join(VARIANTS)}")
    config = default_config()
    config.dataset = "cifar10"
    config.network = "conv4"
    config.widths = (64, 64, 256, 256)  # channels; two widths make two groups
    config.pools = (2, 2, 2, 1)  # positions per side: 32x32 -> 16x16 -> 8x8 -> 4x4
    config.whitening = 2  # pixels per side of the patches that a fixed first layer whitens
    config.activation = "gelu"
    config.norm_scale = False  # a normalised channel has a bias alone
    config.initialisation = "identity"
    config.auxiliary = (64,)  # channels of a convolution between the first group and its head
    config.flip = True
    config.alternating_flip = True
    config.crop_padding = 2  # pixels
    config.noise_cell = 4  # pixels per side of a cell of class noise
    config.copies_per_class = 1  # labelled images of each class in a step
    config.head_weight = 10.0  # of the head's gradient, beside the 1 of CSCL
    config.label_smoothing = 0.1
    config.epochs = 4
    if variant == "supcon":
        config.rule = "supcon"  # makes no copies, so that the keys of noise and copies have no effect
    config.batch_size = 256  # images
    config.learning_rate = 1e-2
    config.bias_rate = 8.0  # of the learning rate
    config.decay = "linear"
    config.warmup_epochs = 1.2  # epochs
    config.weight_decay = 0.01  # of kernels
    config.segment_steps = 35  # in one call, a fifth of an epoch: every call allocates its memory anew
    return config
