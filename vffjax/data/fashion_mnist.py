"""Fashion-MNIST (Xiao et al., 2017, arXiv:1708.07747): 70,000 pieces of clothing."""

from vffjax.data.sets import Sizes
from vffjax.data.tfds import tfds

SOURCE = tfds("fashion_mnist", Sizes(train_images=60_000, image_shape=(28, 28, 1), classes=10))
