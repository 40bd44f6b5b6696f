"""VFF-Net on scikit-learn's digits: 8x8 grey images of 10 classes, embedded, no download.

python train.py --config configs/digits.py
"""

import ml_collections

from vffjax.config import default_config

# Test errors by rule. `vffjax configs` shows them, and `python benchmarks/tables.py` compares those that name a record with it.
MEASURED = {
    "vff": "1.7 ± 0.6 % (n = 3, results/digits-vff)",
    "head": "1.2 ± 0.3 % (n = 3, results/digits-head)",
    "back-propagation": "1.4 ± 0.0 % (n = 3, results/digits-bp)",
}


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.dataset = "digits"
    config.network = "conv4"
    config.widths = (16, 16, 32, 32)  # channels; two widths make two groups
    config.pools = (1, 2, 1, 2)  # positions per side: 8x8 -> 4x4 -> 2x2
    config.rule = "vff"
    config.labelling = "shared"
    config.epochs = 30
    config.batch_size = 64  # images
    config.learning_rate = 3e-3
    config.checkpoint_every = 5  # epochs
    return config
