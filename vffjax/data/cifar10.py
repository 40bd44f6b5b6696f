"""CIFAR-10 (Krizhevsky, 2009): 60,000 colour images of ten kinds of things."""

from vffjax.data.sets import Sizes
from vffjax.data.tfds import tfds

SOURCE = tfds("cifar10", Sizes(train_images=50_000, image_shape=(32, 32, 3), classes=10))
