"""Whether a configuration fits its data, and what it takes at the least: sizes on paper, before anything is compiled."""

import math
from collections.abc import Mapping
from typing import Any

import ml_collections

from vffjax import file_kinds, versions
from vffjax.architectures import PUBLISHED, RESNET, VGG, VGG_HIDDEN, resnet_sizes, scaled
from vffjax.config import CONVOLUTIONAL, HUB, MAX_ENTRIES, MAX_LAYERS, MAX_SIDE, MAX_WIDTH, WEIGHT_FILES, Config, converted
from vffjax.errors import UserError, bad_key, chosen, printable


def make_config(raw: ml_collections.ConfigDict | Mapping[str, Any]) -> Config:
    """Converts and checks. Raises `UserError` naming `config.KEY`, the value and the fix."""
    config = converted(raw)
    _check_together(config)
    return config


def from_json(plain: Mapping[str, Any], path: str) -> Config:
    """The configuration of a workdir, from its `config.json` or its checkpoints.

    One that an older version wrote lacks keys that came later, and these have their defaults: the default of a new key has to be what
    older versions did. Raises `UserError` that names both versions if another one wrote what this one cannot read.
    """
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in plain.items() if k != "vffjax"}
    try:
        return make_config(values)
    except UserError as error:
        by, own = printable(str(plain.get("vffjax", "another version")), 40), versions.own()
        raise UserError(f"{path}: {error}" + (f" (written by vffjax {by}; this is {own})" if by != own else "")) from None


def _check_together(c: Config) -> None:
    if any(w < 1 for w in c.widths):
        raise bad_key("widths", c.widths, "a width below 1", "give each layer at least one unit")
    if max(c.widths) > MAX_WIDTH or len(c.widths) > MAX_LAYERS:
        fix = f"give at most {MAX_LAYERS} widths of at most {MAX_WIDTH}"
        raise bad_key("widths", c.widths, "more units or layers than can be meant", fix)
    if c.init_from and not c.init_from.startswith(HUB) and not c.init_from.endswith(WEIGHT_FILES):
        kind = file_kinds.by_name(c.init_from)
        problem = f"{kind}{', ' * bool(kind)}not a {WEIGHT_FILES[0]} file"
        raise bad_key("init_from", c.init_from, problem, f"give one, a {WEIGHT_FILES[1]} file of PyTorch, or {HUB}OWNER/NAME")
    if c.norm_statistics == "frozen" and not c.init_from:
        raise bad_key("norm_statistics", c.norm_statistics, "random weights have no statistics", "set config.init_from, or use batch")
    if c.norm_statistics == "frozen" and c.resolved_norm not in ("batch", "anchor"):
        raise bad_key("norm_statistics", c.norm_statistics, f"norm={c.resolved_norm} has no running statistics", "use batch")
    if c.image_size and c.network == "mlp":
        raise bad_key("image_size", c.image_size, "mlp takes images as they are", "use 0, or a convolutional network")
    if c.width_factor != 1 and c.network not in PUBLISHED:
        raise bad_key("width_factor", c.width_factor, f"{c.network} has no published widths", "set config.widths")
    if c.stem != "cifar" and c.network not in RESNET:
        raise bad_key("stem", c.stem, f"{c.network} has no stem", "use a resnet, or leave it at cifar")
    if c.network in RESNET and c.resolved_norm in ("input", "none"):
        because = " (rule ff needs norm=input)" if c.rule == "ff" else ""
        raise bad_key("network", c.network, f"residual sums need a normalisation, not norm={c.resolved_norm}{because}", "use vgg8b or conv")
    if c.network in CONVOLUTIONAL:
        layers = len(c.widths)
        if c.network == "conv4" and layers != 4:
            fix = "give 4 widths, such as (48, 48, 96, 96), or use network=conv"
            raise bad_key("widths", c.widths, f"conv4 has 4 layers, not {layers}", fix)
        if len(c.pools) != layers or any(p < 1 for p in c.pools):
            problem = f"{c.network} with {layers} widths needs {layers} windows of at least 1"
            raise bad_key("pools", c.pools, problem, f"give for example {(1, 2, *[1] * layers)[:layers]}")
    if c.feature_cache != "none" and c.schedule != "sequential":
        raise bad_key("feature_cache", c.feature_cache, "no group is frozen where all train together", "use schedule=sequential")
    if c.feature_cache != "none" and (c.flip or c.crop_padding or c.cutout):
        problem = "the features of augmented images change in every epoch"
        raise bad_key("feature_cache", c.feature_cache, problem, "use flip=False, crop_padding=0 and cutout=0, or feature_cache=none")
    if c.alternating_flip and not c.flip:
        raise bad_key("alternating_flip", c.alternating_flip, "says when images are flipped, and flip=False", "set flip=True too")
    if c.warmup_epochs > c.epochs:
        raise bad_key("warmup_epochs", c.warmup_epochs, f"longer than the {c.epochs} epochs of the run", "lower it")
    if c.rule == "ff" and c.resolved_norm != "input":
        raise bad_key("norm", c.norm, "rule ff measures goodness on features that no statistic has rescaled", "use norm=auto or norm=input")
    if c.rule == "vff" and c.negatives == "hard" and c.labelling == "shared" and c.resolved_contrast == "in_batch":
        fix = "use labelling=triplet or contrast=triplet"
        raise bad_key("negatives", c.negatives, "every class is a negative already where shared copies are contrasted in the batch", fix)
    if c.inference == "sweep" and c.rule == "head":
        raise bad_key("inference", c.inference, "rule head never sees a labelled image", "use inference=heads, or rule=vff or ff")
    for name, override in c.overrides.items():
        if override.get("warmup_epochs", 0) > c.epochs:
            shown = f"overrides.{name}.warmup_epochs"
            raise bad_key(shown, override["warmup_epochs"], f"longer than the {c.epochs} epochs of the run", "lower it")


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
