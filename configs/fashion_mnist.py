"""VFF-Net on Fashion-MNIST.

    python train.py --config configs/fashion_mnist.py         # three dense layers, each its own group, so no gradient crosses any layer
    python train.py --config configs/fashion_mnist.py:conv    # four convolutions in two groups

MEASURED below has test errors: mean and standard deviation over n seeds. Back-propagation trains the same network in the same steps
(--config.rule=head --config.grouping=all). The dense layers have the settings of MNIST, and no others were tried.

The convolutions have 6.51 % by VFF (n = 1, results/fashion-conv-recipe-aux64-vff), on the seed on which their settings were chosen.
"""

import ml_collections

from vffjax.config import default_config

VARIANTS = ("dense", "conv")
# Test errors by variant and rule, older than the ledger. `vffjax configs` shows them.
MEASURED = {"dense": {"vff": "10.2 ± 0.2 % (n = 3)", "back-propagation": "10.0 ± 0.3 % (n = 3)"}}


def get_config(variant: str = "dense") -> ml_collections.ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r}: choose one of {', '.join(VARIANTS)}")
    config = default_config()
    config.dataset = "fashion_mnist"
    config.network = "mlp"
    config.widths = (512, 512, 512)  # units
    config.grouping = "layer"  # equal widths would make one group, which is back-propagation
    config.flip = True
    config.crop_padding = 1  # pixels
    config.head_weight = 1.0  # of the head's gradient, beside CSCL's
    config.epochs = 20
    config.batch_size = 128  # images
    config.learning_rate = 3e-3
    config.checkpoint_every = 5  # epochs
    if variant == "conv":
        config.network = "conv4"
        config.widths = (64, 64, 128, 128)  # channels; two widths make two groups
        config.pools = (2, 1, 2, 1)  # positions per side: 28x28 -> 14x14 -> 7x7
        config.grouping = "width"
        config.copies_per_class = 1  # images
        config.epochs = 12
        config.batch_size = 256  # images
        config.learning_rate = 1e-2
        config.decay = "linear"
        config.warmup_epochs = 3.6  # epochs
        config.weight_decay = 0.01  # of kernels
        config.bias_rate = 8.0  # of the learning rate
        config.label_smoothing = 0.1
        config.head_weight = 10.0  # of the head's gradient, beside the 1 of CSCL
        config.activation = "gelu"
        config.norm_scale = False  # a normalised channel has a bias alone
        config.initialisation = "identity"
        config.auxiliary = (64,)  # channels of a convolution between the first group and its head
    return config
