"""resnet50: the residual network of 50 layers (He et al., 2016, arXiv:1512.03385), as torchvision has it."""

from vffjax.networks.resnet import resnet

NETWORK = resnet((3, 4, 6, 3), bottleneck=True)
