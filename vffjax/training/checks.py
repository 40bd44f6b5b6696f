"""Checks that the keys of a configuration fit together, and that they fit the data, before anything is compiled."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_collections

from vffjax import file_kinds, networks, rules, versions
from vffjax.config import FIELDS, HUB, MAX_ENTRIES, MAX_LAYERS, MAX_SIDE, MAX_WIDTH, WEIGHT_FILES, Config, converted
from vffjax.data import find, load, sets, sizes_of
from vffjax.errors import UserError, bad_key, printable
from vffjax.keys import default_of, options
from vffjax.networks.groups import layer_sizes
from vffjax.networks.layers import OWN_CHOICE
from vffjax.training.plan import Plan, make_plan
from vffjax.training.stages import is_pipeline

# Keys by which training images differ from epoch to epoch.
AUGMENTATIONS = ("flip", "crop_padding", "cutout", "random_erasing", "trivial_augment", "random_resized_crop", "color_jitter", "mixup")


def make_config(raw: ml_collections.ConfigDict | Mapping[str, Any]) -> Config:
    """A checked configuration from plain values. Raises `UserError` naming `config.KEY`, the value and the fix."""
    return check(converted(raw))


def check(config: Config) -> Config:
    """Checks that the keys of a configuration fit together; its rule and its network check what concerns them.

    Returns:
        The configuration, in which all keys of the rule's own (`rule_options`) have a value.

    Raises:
        UserError: names config.KEY, the value and the fix.
    """
    rule, network = rules.find(config), networks.find(config)
    own = options(rule.options, config.rule_options, "rule_options")
    config = dataclasses.replace(config, rule_options=dataclasses.asdict(own))
    _check_together(config)
    for key in ("image_size", "width_factor", "stem", "whitening", "auxiliary", *OWN_CHOICE):
        obeyed = key in network.keys or (key == "image_size" and find(config).resizes)
        if not obeyed and getattr(config, key) != (usual := default_of(FIELDS[key])):
            raise bad_key(key, getattr(config, key), f"means nothing to network={config.network}", f"leave it at {usual!r}")
    if is_pipeline(config) and rule.predicts(config):
        problem = f"rule {config.rule} draws wrong labels from the heads of all groups, which another batch has trained meanwhile"
        raise bad_key("schedule", config.schedule, problem, "use schedule=joint, or negatives=uniform")
    if why := rule.cannot_score_by(config.inference):
        raise bad_key("inference", config.inference, f"rule {config.rule} {why}", "use inference=heads")
    rule.check(config)
    if unknown := sorted(set(network.keys) - FIELDS.keys()):
        raise bad_key("network", config.network, f"its `keys` name {unknown[0]}, which is no configuration key", "correct them")
    network.check(config, rules.norm_of(config))
    return config


def from_json(plain: Any, path: str) -> Config:
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
    for name in ("widths", "auxiliary"):
        widths = getattr(c, name)
        if any(w < 1 for w in widths):
            raise bad_key(name, widths, "a width below 1", "give each layer at least one unit")
        if max(widths, default=0) > MAX_WIDTH or len(widths) > MAX_LAYERS:
            fix = f"give at most {MAX_LAYERS} widths of at most {MAX_WIDTH}"
            raise bad_key(name, widths, "more units or layers than can be meant", fix)
    if c.init_from and not c.init_from.startswith(HUB) and not c.init_from.endswith(WEIGHT_FILES):
        fix = f"give one, a {WEIGHT_FILES[1]} file of PyTorch, or {HUB}OWNER/NAME"
        raise bad_key("init_from", c.init_from, file_kinds.not_weights(c.init_from), fix)
    if c.norm_statistics == "frozen" and not c.init_from:
        raise bad_key("norm_statistics", c.norm_statistics, "random weights have no statistics", "set config.init_from, or use batch")
    if c.norm_statistics == "frozen" and (norm := rules.norm_of(c)) not in ("batch", "anchor"):
        raise bad_key("norm_statistics", c.norm_statistics, f"norm={norm} has no running statistics", "use batch")
    if c.feature_cache != "none" and c.schedule != "sequential":
        raise bad_key("feature_cache", c.feature_cache, "no group is frozen where all train together", "use schedule=sequential")
    for name in AUGMENTATIONS if c.feature_cache != "none" else ():
        if getattr(c, name) != (usual := default_of(FIELDS[name])):
            problem = f"the features of augmented images change in every epoch, and {name}={getattr(c, name)!r}"
            raise bad_key("feature_cache", c.feature_cache, problem, f"use {name}={usual!r}, or feature_cache=none")
    if c.noise_spectrum == "images":
        for key, usual in (("noise_cell", 1), ("noise_kind", "normal")):
            if getattr(c, key) != usual:
                problem = "noise with the spectrum of the images is normal and white before it is filtered"
                raise bad_key(key, getattr(c, key), problem, f"use {key}={usual}, or noise_spectrum=drawn")
    if c.alternating_flip and not c.flip:
        raise bad_key("alternating_flip", c.alternating_flip, "says when images are flipped, and flip=False", "set flip=True too")
    if c.warmup_epochs > c.epochs:
        raise bad_key("warmup_epochs", c.warmup_epochs, f"longer than the {c.epochs} epochs of the run", "lower it")
    least = FIELDS["temperature"].metadata["low"]
    for shown, end in [("temperature_end", c.temperature_end)] + [
        (f"overrides.{name}.temperature_end", override.get("temperature_end", 0)) for name, override in c.overrides.items()
    ]:
        if 0 < end < least:
            raise bad_key(shown, end, "too small", f"the least is {least}; 0 keeps the temperature constant")
    for name, override in c.overrides.items():
        if override.get("warmup_epochs", 0) > c.epochs:
            shown = f"overrides.{name}.warmup_epochs"
            raise bad_key(shown, override["warmup_epochs"], f"longer than the {c.epochs} epochs of the run", "lower it")


def plan_of(config: Config, train_size: int, image_shape: tuple[int, int, int], classes: int) -> Plan:
    """The plan of a run on data of these sizes, after `check_against_data`."""
    plan = make_plan(config, train_size, classes)
    check_against_data(plan, train_size, image_shape)
    return plan


def plan_before_data(config: Config) -> tuple[Plan, sets.Sizes]:
    """The plan of a run on config.dataset and the sizes of that set, of which nothing is read. Checks and errors are those of `plan_of`."""
    sizes = sizes_of(config)
    return plan_of(config, load.split_sizes(config, sizes.train_images)[0], sizes.image_shape, sizes.classes), sizes


def check_against_data(plan: Plan, train_size: int, image_shape: tuple[int, int, int]) -> None:
    """Checks a plan against the data.

    Args:
        plan: of a checked configuration.
        train_size: training images, without those of validation.
        image_shape: height, width and channels of an image.

    Raises `UserError` naming `config.KEY`, the value and the fix.
    """
    c, groups, classes = plan.config, plan.groups, plan.classes
    if c.batch_size > train_size:
        raise bad_key("batch_size", c.batch_size, f"larger than the {train_size} training images", f"use at most {train_size}")
    if classes < 2:
        raise bad_key("dataset", c.dataset, "has one class, so that there is nothing to learn", "use a set of two classes or more")
    if max(image_shape[:2]) > MAX_SIDE:
        raise bad_key("dataset", c.dataset, f"has images of {image_shape[0]}x{image_shape[1]} pixels", f"use sides up to {MAX_SIDE}")
    networks.find(c).check_images(c, image_shape)
    plan.rule.check_data(c, image_shape, classes, tuple(group.width for group in groups))
    if c.pixel_statistics == "imagenet" and image_shape[2] != 3:
        raise bad_key("pixel_statistics", c.pixel_statistics, "ImageNet's are those of colour images", "use data")
    side = min(image_shape[:2])
    for key, pixels in (("cutout", c.cutout), ("crop_padding", c.crop_padding)):
        if pixels > side:
            raise bad_key(key, pixels, f"larger than the {side}-pixel images", f"use at most {side}")
    if c.inference == "rule" and plan.rule.parameters and c.frozen_groups and not c.init_from:
        problem = f"scores by parameters of rule {c.rule}, which never learn in a frozen group"
        raise bad_key("inference", c.inference, problem, "use inference=heads, set config.init_from, or use frozen_groups=0")
    if plan.rule.codebook and c.noise_cell >= max(image_shape[:2]):
        problem = f"leaves one point of class noise on images of {image_shape[0]}x{image_shape[1]} pixels"
        raise bad_key("noise_cell", c.noise_cell, problem, f"use at most {max(1, max(image_shape[:2]) // 2)}")
    if c.epochs * (train_size // c.batch_size) > MAX_ENTRIES:  # optax counts in 32 bits
        raise bad_key("epochs", c.epochs, f"more than {MAX_ENTRIES} steps", "use fewer epochs or a larger batch_size")
    if c.frozen_groups > len(groups):
        raise bad_key("frozen_groups", c.frozen_groups, f"the network has {len(groups)} groups", f"use at most {len(groups)}")
    for name in sorted(c.overrides.keys() - {group.name for group in groups}):
        problem = f"the network has {len(groups)} groups"
        raise bad_key(f"overrides.{name}", dict(c.overrides[name]), problem, f"use group0 to {groups[-1].name}")
    for layer, size in enumerate(layer_sizes(groups, image_shape)):
        if size.kernels > MAX_ENTRIES:
            key = "widths" if "widths" in networks.find(c).keys else "width_factor"
            problem = f"layer {layer} would have {size.kernels} parameters"
            raise bad_key(key, getattr(c, key), problem, f"use smaller widths: at most {MAX_ENTRIES} parameters in a layer")
