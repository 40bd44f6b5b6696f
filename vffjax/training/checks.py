"""Whether a configuration fits its data, and what it takes at the least: sizes on paper, before anything is compiled."""

import math

from vffjax.architectures import PUBLISHED, RESNET, VGG, VGG_HIDDEN, resnet_sizes, scaled
from vffjax.config import CONVOLUTIONAL, MAX_ENTRIES, MAX_SIDE, Config
from vffjax.errors import bad_key, chosen


def check_against_data(c: Config, train_size: int, image_shape: tuple[int, int, int], num_classes: int, num_groups: int) -> None:
    """Checks that need the data's sizes; `train_size` excludes the validation images."""
    if c.batch_size > train_size:
        raise bad_key("batch_size", c.batch_size, f"larger than the {train_size} training images", f"use at most {train_size}")
    if num_classes < 2:
        raise bad_key("dataset", c.dataset, "has one class, so that there is nothing to learn", "use a set of two classes or more")
    if max(image_shape[:2]) > MAX_SIDE:
        raise bad_key("dataset", c.dataset, f"has images of {image_shape[0]}x{image_shape[1]} pixels", f"use sides up to {MAX_SIDE}")
    side = min(image_shape[:2])
    seen = c.image_size or side
    if c.network in CONVOLUTIONAL and math.prod(c.pools) > seen:
        raise bad_key("pools", c.pools, f"pools {seen}x{seen} images to nothing", "use smaller windows")
    if c.network in VGG and math.prod(pool for _, pool in VGG[c.network]) > seen:
        raise bad_key("network", c.network, f"pools {seen}x{seen} images to nothing", "set config.image_size=32")
    if c.pixel_statistics == "imagenet" and image_shape[2] != 3:
        raise bad_key("pixel_statistics", c.pixel_statistics, "ImageNet's are those of colour images", "use data")
    for key, pixels in (("cutout", c.cutout), ("crop_padding", c.crop_padding)):
        if pixels > side:
            raise bad_key(key, pixels, f"larger than the {side}-pixel images", f"use at most {side}")
    if c.epochs * (train_size // c.batch_size) > MAX_ENTRIES:  # optax counts in 32 bits
        raise bad_key("epochs", c.epochs, f"more than {MAX_ENTRIES} steps", "use fewer epochs or a larger batch_size")
    for layer, (kernel, _) in enumerate(layer_sizes(c, image_shape)):
        if kernel > MAX_ENTRIES:
            key = "width_factor" if c.network in PUBLISHED else "widths"
            problem = f"layer {layer} would have {kernel} parameters"
            raise bad_key(key, getattr(c, key), problem, f"use smaller widths: at most {MAX_ENTRIES} parameters in a layer")
    if c.rule == "ff" and num_classes > image_shape[0] * image_shape[1] // 2:
        # The overlay writes one pixel per class, row by row; more than half of the image would leave little to see.
        raise bad_key("rule", c.rule, f"{num_classes} label pixels do not fit {image_shape[:2]} images", "use rule=vff")
    if c.frozen_groups > num_groups:
        raise bad_key("frozen_groups", c.frozen_groups, f"the network has {num_groups} groups", f"use at most {num_groups}")
    for name in c.overrides:
        if int(name[5:]) >= num_groups:
            problem = f"the network has {num_groups} groups"
            raise bad_key(f"overrides.{name}", dict(c.overrides[name]), problem, f"use group0 to group{num_groups - 1}")


def layer_sizes(c: Config, image_shape: tuple[int, int, int]) -> list[tuple[int, int]]:
    """Of each layer the entries of its kernels and of its largest feature map of one image, before pooling."""
    height, width, channels = (c.image_size or image_shape[0], c.image_size or image_shape[1], image_shape[2])
    if c.network in RESNET:
        return resnet_sizes(c.network, c.width_factor, c.stem, (height, width, channels))
    pools = c.pools if c.network in CONVOLUTIONAL else (0,) * len(c.widths)  # a window of 0: a dense layer
    layers = list(zip(c.widths, pools, strict=True))
    if c.network in VGG:
        layers = [(scaled(units, c.width_factor), pool) for units, pool in (*VGG[c.network], (VGG_HIDDEN, 0))]
    found = []
    for units, pool in layers:
        if pool:
            found.append((9 * channels * units, height * width * units))
            height, width = height // pool, width // pool
        else:
            found.append((height * width * channels * units, units))
            height = width = 1
        channels = units
    return found


def rows_of_a_step(c: Config, num_classes: int) -> int:
    """Images of a batch and their labelled copies: all that passes through the layers in a step."""
    vff = chosen("labelling", c.labelling, {"shared": c.copies_per_class * num_classes, "triplet": 2 * c.batch_size})
    return c.batch_size + chosen("rule", c.rule, {"vff": vff, "ff": 2 * c.batch_size, "head": 0})


def least_bytes(c: Config, image_shape: tuple[int, int, int], num_classes: int) -> int:
    """What training takes at the very least: parameters with their optimizer's states, and the largest feature map once."""
    sizes, rows = layer_sizes(c, image_shape), rows_of_a_step(c, num_classes)
    states = sum(kernel for kernel, _ in sizes) * 4 * chosen("optimizer", c.optimizer, {"adamw": 3, "sgd": 2})
    return states + rows * max(area for _, area in sizes) * chosen("precision", c.precision, {"bf16": 2, "f32": 4})
