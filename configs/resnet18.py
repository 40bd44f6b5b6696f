"""ResNet-18 with the stem for 32x32 images on CIFAR-10 or CIFAR-100 from scratch, four groups by width.

    python train.py --config configs/resnet18.py               # CIFAR-10; GPU or TPU
    python train.py --config configs/resnet18.py:cifar100      # CIFAR-100
    python train.py --config configs/resnet18.py --config.rule=head --config.grouping=all      # the same by back-propagation
    python train.py --config configs/resnet18.py:narrow_cifar100   # 2 CPU cores, minutes: weights to fine-tune

narrow_cifar100: torchvision's ResNet-18 a quarter as wide, at 64x64, four epochs. Its use is to be fine-tuned: benchmarks/transfer.py.

Not trained at full width yet. What was checked is that a step compiles for a TPU v5e (docs/performance.md). Half as wide, with eight
epochs of the recipe of configs/cifar10.py and a rate of 3e-3 that was not tuned, CIFAR-10 has 18.57 % by VFF in eight groups by block
(n = 1, results/resnet18-half-block-vff) and 13.01 % by back-propagation (n = 1, results/resnet18-half-bp), each on one CPU core.
"""

import ml_collections

from vffjax.config import default_config

VARIANTS = ("cifar10", "cifar100", "narrow_cifar100")
# Test errors by variant and rule, older than the ledger. `vffjax configs` shows them.
MEASURED = {"narrow_cifar100": {"vff": "67.4 % (n = 1)"}}


def get_config(variant: str = "cifar10") -> ml_collections.ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r}: choose one of {', '.join(VARIANTS)}")
    config = default_config()
    config.dataset = "cifar10" if variant == "cifar10" else "cifar100"
    config.network = "resnet18"
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
    if variant == "narrow_cifar100":
        config.width_factor = 0.25
        config.stem = "imagenet"  # torchvision's network, a quarter as wide
        config.image_size = 64  # pixels per side, so that the last maps are 2x2
        config.epochs = 4
        config.batch_size = 256  # images, beside 100 labelled copies
    return config
