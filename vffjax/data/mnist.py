"""MNIST (LeCun et al., 1998): 70,000 handwritten digits."""

from vffjax.data.sets import Sizes
from vffjax.data.tfds import tfds

SOURCE = tfds("mnist", Sizes(train_images=60_000, image_shape=(28, 28, 1), classes=10))
