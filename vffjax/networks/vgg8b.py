"""vgg8b: six convolutions and a dense layer (Nokland and Eidnes, 2019, arXiv:1901.06656)."""

from vffjax.networks.vgg import vgg

NETWORK = vgg(((128, 1), (256, 2), (256, 1), (512, 2), (512, 2), (512, 2)))
