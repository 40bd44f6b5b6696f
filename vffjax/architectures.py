"""Published networks on paper: which layers, how wide. Needs no JAX, so that a configuration is checked by it at once.

`vgg8b`, `vgg11b`: Nokland and Eidnes (2019), arXiv:1901.06656, the networks of most work on local losses. `resnet18`, `resnet34`,
`resnet50`: He et al. (2016), arXiv:1512.03385, as torchvision has them: in a bottleneck the 3x3 convolution has the stride (its "v1.5").
"""

import dataclasses

# Channels of each 3x3 convolution, and the side of the max-pooling window behind it.
VGG = {
    "vgg8b": ((128, 1), (256, 2), (256, 1), (512, 2), (512, 2), (512, 2)),
    "vgg11b": ((128, 1), (128, 1), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1), (512, 2), (512, 2)),
}
VGG_HIDDEN = 1024  # units of the dense layer behind them
RESNET = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3)}  # blocks of each stage
PUBLISHED = (*VGG, *RESNET)
_STAGES = (64, 128, 256, 512)
STEMS = {"cifar": (3, 1), "imagenet": (7, 2)}  # side and stride of the first convolution; imagenet: 3x3 max-pooling of stride 2 behind it


@dataclasses.dataclass(frozen=True)
class Block:
    """A residual block: its output's channels, its 3x3 convolution's, and its stride in positions."""

    name: str  # torchvision's, such as layer2.0
    width: int
    inner: int
    stride: int
    bottleneck: bool


def scaled(channels: int, factor: float) -> int:
    """Channels of a narrower or wider network, at least 1."""
    return max(1, round(channels * factor))


def stem_width(factor: float) -> int:
    """Channels of a ResNet's first convolution."""
    return scaled(_STAGES[0], factor)


def residual_blocks(network: str, factor: float) -> list[Block]:
    """The blocks of a ResNet from input to output."""
    bottleneck, found = network == "resnet50", []
    for stage, count in enumerate(RESNET[network]):
        inner = scaled(_STAGES[stage], factor)
        for i in range(count):
            stride = 2 if stage and not i else 1
            found.append(Block(f"layer{stage + 1}.{i}", 4 * inner if bottleneck else inner, inner, stride, bottleneck))
    return found


def resnet_sizes(network: str, factor: float, stem: str, image_shape: tuple[int, int, int]) -> list[tuple[int, int]]:
    """Of the stem and of each block the entries of its kernels together and of its largest feature map of one image."""
    side, stride = STEMS[stem]
    channels, (h, w) = stem_width(factor), (-(-s // stride) for s in image_shape[:2])
    found = [(side * side * image_shape[2] * channels, h * w * channels)]
    if stem == "imagenet":
        h, w = -(-h // 2), -(-w // 2)
    for block in residual_blocks(network, factor):
        ways = (channels, block.inner, block.width)
        kernels = ways[0] * ways[1] + 9 * ways[1] * ways[1] + ways[1] * ways[2] if block.bottleneck else 9 * (ways[0] + ways[2]) * ways[2]
        kernels += channels * block.width if block.stride > 1 or channels != block.width else 0
        before = h * w * block.inner if block.bottleneck else 0
        h, w = -(-h // block.stride), -(-w // block.stride)
        found.append((kernels, max(before, h * w * block.width)))
        channels = block.width
    return found
