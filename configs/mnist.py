"""VFF-Net on MNIST: three dense layers of equal width, each its own group, so no gradient crosses any layer.

    python train.py --config configs/mnist.py

Test error 0.76 ± 0.08 % (mean and standard deviation, n = 3 seeds); back-propagation on the same network and budget
(--config.rule=head --config.grouping=all) 0.81 ± 0.12 %. The learning rate was chosen on validation images.
"""

import ml_collections

from vffjax.config import default_config


def get_config() -> ml_collections.ConfigDict:
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
    return config
