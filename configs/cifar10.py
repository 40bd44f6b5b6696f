"""VFF-Net on CIFAR-10: four convolutions, or the six of a cifarnet, in two groups.

    python train.py --config configs/cifar10.py             # full: about an hour on 2 CPU cores, under a minute on an H100
    python train.py --config configs/cifar10.py:laptop      # about 10 minutes on 2 CPU cores
    python train.py --config configs/cifar10.py:small       # about 2 minutes on 2 CPU cores, with 20,000 images
    python train.py --config configs/cifar10.py:cifarnet    # an hour on 2 CPU cores, under a minute on an H100
    python benchmarks/throughput.py --config configs/cifar10.py:yardstick --quick --out FILE.json

Back-propagation trains the same network in the same steps with `--config.rule=head --config.grouping=all`, and the loss of the local heads
alone with `--config.rule=head`.

MEASURED below has the test errors: mean and standard deviation over n seeds, float32, one or two CPU cores or an H100. The learning rate of
laptop is the best of three for each rule by validation errors. The other variants use 1e-2 for all rules, which was not tuned. With six
views of each image cifarnet has 7.7 ± 0.2 % (n = 2, results/cifar10-cifarnet-vff, test_error_views), and by back-propagation 6.9 ± 0.2 %
(n = 3, results/cifar10-cifarnet-bp, test_error_views). In three groups by block (`--config.grouping=block`) half of its epochs, six, give
9.5 % with them (n = 1, results/cifar10-cifarnet6-block-vff, test_error_views). The times above are estimates from images/s. The weights of
full, in float16, come with the repository:

    vffjax evaluate --config configs/cifar10.py --config.init_from=results/weights/cifar10-full-vff-s0.safetensors --views six

yardstick: the network that figures of throughput, memory and compilers are about. It is frozen, whatever becomes of the recipe of the other
variants, so that figures of different times can be compared. It is not meant to be accurate.
"""

import ml_collections

from vffjax.config import default_config

VARIANTS = ("full", "laptop", "small", "cifarnet", "yardstick")
# Test errors by variant and rule. `vffjax configs` shows them; benchmarks/tables.py compares them with the records that they name.
MEASURED = {
    "full": {
        "vff": "9.6 ± 0.4 % (n = 2, results/cifar10-full-vff)",
        "back-propagation": "9.1 ± 0.3 % (n = 3, results/cifar10-full-bp)",
    },
    "laptop": {
        "vff": "13.1 ± 0.1 % (n = 5, results/cifar10-laptop-vff)",
        "supcon": "12.6 ± 0.2 % (n = 5, results/cifar10-laptop-supcon)",
        "head": "13.0 ± 0.2 % (n = 5, results/cifar10-laptop-head)",
        "back-propagation": "12.1 ± 0.2 % (n = 5, results/cifar10-laptop-bp)",
    },
    "cifarnet": {
        "vff": "9.4 ± 0.4 % (n = 2, results/cifar10-cifarnet-vff)",
        "head": "9.0 ± 0.4 % (n = 3, results/cifar10-cifarnet-head)",
        "back-propagation": "7.9 ± 0.1 % (n = 3, results/cifar10-cifarnet-bp)",
    },
    "small": {
        "vff": "20.3 ± 0.4 % (n = 3, results/cifar10-small-vff)",
        "head": "19.9 ± 0.2 % (n = 3, results/cifar10-small-head)",
        "back-propagation": "18.7 ± 0.1 % (n = 3, results/cifar10-small-bp)",
    },
}


def get_config(variant: str = "full") -> ml_collections.ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r}: choose one of {', '.join(VARIANTS)}")
    if variant == "yardstick":
        return _yardstick()
    config = default_config()
    config.dataset = "cifar10"
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
    config.copies_per_class = 1  # labelled images of each class in a step
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
