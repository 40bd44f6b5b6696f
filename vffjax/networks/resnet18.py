"""resnet18: the residual network of 18 layers (He et al., 2016, arXiv:1512.03385), as torchvision has it."""

from vffjax.networks.resnet import resnet

NETWORK = resnet((2, 2, 2, 2))
