"""Images of your own in a folder: four convolutions in two groups, on images that are brought to 64x64 pixels.

    python train.py --config configs/folder.py --config.data_dir=DIR

DIR holds a folder for each class, or train/CLASS/* and test/CLASS/*; docs/your_data.md says what happens to the pictures. For larger
pictures set config.image_size to 96 or 128; for small ones, such as icons, to their own side. With fewer than about 2,000 pictures more
epochs help.
"""

import ml_collections

from vffjax.config import default_config


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.dataset = "folder"
    config.image_size = 64  # pixels per side: the short side is resized, and the middle is cut out
    config.val_fraction = 0.15  # of the training images
    config.test_fraction = 0.2  # of each class, if DIR has no folder test
    config.network = "conv4"
    config.widths = (32, 32, 128, 128)  # channels; two widths make two groups
    config.pools = (2, 2, 2, 2)  # positions per side: 64x64 -> 32x32 -> 16x16 -> 8x8 -> 4x4
    config.whitening = 2  # pixels per side of the patches that a fixed first layer whitens
    config.activation = "gelu"
    config.norm_scale = False  # a normalised channel has a bias alone
    config.initialisation = "identity"
    config.auxiliary = (64,)  # channels of a convolution between the first group and its head
    config.flip = True
    config.random_resized_crop = 0.5  # least share of an image in a random part that fills it
    config.color_jitter = 0.2  # largest change of brightness, contrast and saturation
    config.noise_cell = 4  # pixels per side of a cell of class noise, so that whitening leaves the image visible
    config.copies_per_class = 1  # labelled images of each class in a step
    config.head_weight = 10.0  # of the head's gradient, beside the 1 of CSCL
    config.label_smoothing = 0.1
    config.epochs = 20
    config.batch_size = 32  # images
    config.learning_rate = 3e-3
    config.bias_rate = 8.0  # of the learning rate
    config.decay = "linear"
    config.warmup_epochs = 3.0
    config.weight_decay = 0.01  # of kernels
    config.checkpoint_every = 5  # epochs
    return config
