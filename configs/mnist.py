"""VFF-Net on MNIST.

    python train.py --config configs/mnist.py         # three dense layers, each its own group, so no gradient crosses any layer
    python train.py --config configs/mnist.py:conv    # four convolutions in two groups

MEASURED below has test errors: mean and standard deviation over n seeds. Back-propagation trains the same network in the same steps
(--config.rule=head --config.grouping=all). The learning rate of the dense layers was chosen on validation images; that of the
convolutions was not tuned. Three dense layers do better with
--config.label_smoothing=0.1 --config.head_weight=10 --config.learning_rate=1e-2: 0.62 ± 0.02 % (n = 5, results/dense-20-vff).
Back-propagation at 3e-3 with the same label smoothing has 0.67 ± 0.04 % (n = 5, results/dense-20-bp).

The convolutions have 0.38 ± 0.01 % by VFF with seeds that no choice has seen (n = 3, results/conv-12-vff), and by back-propagation
0.35 ± 0.01 % (n = 3, results/conv-12-bp). With seed 0 they have 0.45 % (n = 1, results/mnist-conv-recipe-aux64-vff) and 0.34 %
(n = 1, results/mnist-conv-recipe-bp). docs/trials.md has the trials of their settings.
"""

import ml_collections

from vffjax.config import default_config

VARIANTS = ("dense", "conv")
# Test errors by variant and rule, older than the ledger. `vffjax configs` shows them.
MEASURED = {"dense": {"vff": "0.76 ± 0.08 % (n = 3)", "back-propagation": "0.81 ± 0.12 % (n = 3)"}}


def get_config(variant: str = "dense") -> ml_collections.ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r}: choose one of {', '.join(VARIANTS)}")
    config = default_config()
    config.dataset = "mnist"
    config.network = "mlp"
    config.widths = (1024, 1024, 1024)  # units
    config.grouping = "layer"  # equal widths would make one group, which is back-propagation
    config.crop_padding = 2  # pixels
    config.head_weight = 1.0  # of the head's gradient, beside CSCL's
    config.epochs = 20
    config.batch_size = 128  # images
    config.learning_rate = 3e-3
    config.checkpoint_every = 5  # epochs
    if variant == "conv":
        config.network = "conv4"
        config.widths = (32, 32, 64, 64)  # channels; two widths make two groups
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
