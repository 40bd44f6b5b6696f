"""VFF-Net on CIFAR-100: four convolutions, or the six of a cifarnet, in two groups. The recipe is that of configs/cifar10.py.

    python train.py --config configs/cifar100.py             # full: more than an hour on 2 CPU cores; for a GPU or TPU too
    python train.py --config configs/cifar100.py:laptop      # about 12 minutes on 2 CPU cores
    python train.py --config configs/cifar100.py:small       # about 3 minutes on 2 CPU cores, with 20,000 images
    python train.py --config configs/cifar100.py:cifarnet    # more than an hour on 2 CPU cores

MEASURED below has the test errors of laptop and small; back-propagation has 37.6 ± 0.2 % (n = 2, results/cifar100-laptop-bp) with the
laptop variant and a learning rate of 5e-3. Six epochs of cifarnet, half of its own, have 36.0 % (n = 1, results/cifar100-cifarnet6-vff),
and with six views of each image 34.0 % (n = 1, results/cifar100-cifarnet6-vff, test_error_views). docs/results.md has what is known of the
others. The times are estimates.
"""

import ml_collections

from vffjax.config import default_config

VARIANTS = ("full", "laptop", "small", "cifarnet")
# Test errors by variant and rule. `vffjax configs` shows them; benchmarks/tables.py compares them with the records that they name.
MEASURED = {
    "laptop": {
        "vff": "39.9 ± 0.1 % (n = 2, results/cifar100-laptop-vff)",
        "supcon": "39.4 ± 0.2 % (n = 2, results/cifar100-laptop-supcon)",
        "head": "39.2 ± 0.0 % (n = 2, results/cifar100-laptop-head)",
    },
    "small": {"vff": "50.4 % (n = 1, results/cifar100-small-vff)"},
}


def get_config(variant: str = "full") -> ml_collections.ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r}: choose one of {', '.join(VARIANTS)}")
    config = default_config()
    config.dataset = "cifar100"
    if variant == "cifarnet":
        config.network = "cifarnet"
        config.widths = (64, 256, 256)  # channels of each block of two convolutions; two widths make two groups
    else:
        config.network = "conv4"
        config.widths = (96, 96, 384, 384)  # channels; two widths make two groups
        config.pools = (2, 2, 2, 1)  # positions per side: 32x32 -> 16x16 -> 8x8 -> 4x4
    config.whitening = 2  # pixels per side of the patches that a fixed first layer whitens
    config.activation = "gelu"
    config.norm_scale = False  # a normalised channel has a bias alone
    config.initialisation = "identity"
    config.auxiliary = (64,)  # channels of a convolution between the first group and its head
    config.flip = True
    config.alternating_flip = True
    config.crop_padding = 2  # pixels
    config.noise_cell = 4  # pixels per side of a cell of class noise, so that whitening leaves the image visible
    config.copies_per_class = 1  # labelled images of each class in a step: 100 beside a batch
    config.head_weight = 10.0  # of the head's gradient, beside the 1 of CSCL
    config.label_smoothing = 0.1
    config.epochs = 20
    config.batch_size = 256  # images
    config.learning_rate = 1e-2
    config.bias_rate = 8.0  # of the learning rate
    config.decay = "linear"
    config.weight_decay = 0.01  # of kernels
    config.checkpoint_every = 5  # epochs
    if variant == "laptop":
        config.widths = (64, 64, 256, 256)
        config.epochs = 5
    elif variant == "small":
        config.train_examples = 20_000  # images, validation included
        config.widths = (32, 32, 128, 128)
        config.epochs = 6
    elif variant == "cifarnet":
        config.epochs = 12
    config.warmup_epochs = round(0.3 * config.epochs, 1)
    return config
