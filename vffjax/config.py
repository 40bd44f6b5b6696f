"""The configuration of a run: one frozen dataclass, read by attribute, so that a misspelt key fails where it is written.

This module checks the type and range of each value. Whether the values fit together, and fit the data, is checked in `training.checks`.
"""

import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import ml_collections
from ml_collections import config_dict

from vffjax import files, synonyms, versions
from vffjax.errors import UserError, bad_key, printable, said
from vffjax.keys import default_of, fields_of, key, value_of
from vffjax.registry import ROOMS

WEIGHT_FILES, HUB = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".pth.tar"), "hf://"
# Larger numbers are taken for mistakes. XLA would abort the process for an array of more than 2**31 entries.
MAX_WIDTH, MAX_LAYERS, MAX_ENTRIES = 2**16, 1_000, 2**31 - 1
PLACES = ("device", "host", "disk")
SCHEDULES = ("joint", "sequential", "pipeline")
NORMS = ("auto", "batch", "anchor", "layer", "input", "class", "none")
_MOST, _LARGE = 10**9, 1e6  # for keys without a natural limit
MAX_SIDE = 4096  # of an image, in pixels
# Keys that may change when a run is resumed: where the data are, and how much memory and disk it uses. Any other makes it another run.
CHANGEABLE = (
    "data_dir",
    "data_on",
    "devices",
    "eval_batch_size",
    "checkpoint_every",
    "rematerialise",
    "segment_steps",
    "checkpoint_seconds",
)
BITWISE = ("data_on", "checkpoint_every", "checkpoint_seconds", "segment_steps")  # results do not depend on these, to the bit
# Numbers that compiled programs take as arguments, for each step and group; see `hyperparameters`.
ARGUMENTS: tuple[str, ...] = (
    *("learning_rate", "bias_rate", "weight_decay", "momentum", "clip_norm", "temperature", "margin", "head_weight", "label_smoothing"),
    *("goodness_threshold", "peer_normalisation", "slow_share"),
)
# If one of these is 0, a part of the program is left out. The locality certificate must see that head_weight=0 cuts the gradient.
_SWITCHES = ("clip_norm", "head_weight", "peer_normalisation")
# Keys that no compiled program depends on: they choose its data and arrays, and how often and where it runs.
_OUTSIDE = (
    *("seed", "dataset", "data_dir", "data_on", "devices", "train_examples", "val_fraction", "test_fraction", "wrong_labels", "init_from"),
    *("noise_scale", "feature_cache"),
    *("epochs", "noise_cell", "noise_kind", "noise_spectrum", "noise_redrawn", "group_decay", "warmup_epochs", "decay"),
    *("temperature_end", "inference", "votes", "checkpoint_every", "checkpoint_seconds", "segment_steps"),
)
OVERRIDABLE = ("optimizer", "warmup_epochs", "temperature_end", *ARGUMENTS)


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment. `vffjax train --help` prints the documentation of each field; the first field of a section names it."""

    # fmt: off
    seed: int = key(0, "seed of everything random: split, first weights, noise, order, augmentation", low=0, high=2**31 - 1, section="data")
    dataset: str = key("digits", "what to learn: a set by its name, or images of your own in a folder or an npz file")
    data_dir: str = key("", "where the images lie; sets of tensorflow-datasets: empty means $TFDS_DATA_DIR, else ~/tensorflow_datasets")
    data_on: str = key("device", "where the images lie while a run trains: on the device or, if they are many, on the host or disk", PLACES)
    train_examples: int = key(0, "images kept for training and validation, drawn by the seed; 0: all", low=0, high=_MOST)
    val_fraction: float = key(0.1, "share of the training images held out for every choice", low=0.0, high=0.9)
    test_fraction: float = key(0.2, "share of each class held out as test images where a set has none of its own", low=0.01, high=0.9)
    wrong_labels: float = key(0.0, "share of the images to train on that get another class's label, drawn by the seed", low=0.0, high=1.0)
    flip: bool = key(False, "mirror training images left to right with probability 1/2")
    alternating_flip: bool = key(False, "flip: mirror each image in every other epoch instead, half of the images in each")
    crop_padding: int = key(0, "pixels of black padding before a random crop; 0: no crop", low=0, high=1024)
    cutout: int = key(0, "side in pixels of one random square set to the mean; 0: none", low=0, high=1024)
    random_erasing: float = key(0.0, "probability that one random rectangle of an image is set to the mean; 0: none", low=0.0, high=1.0)
    trivial_augment: bool = key(False, "change each training image by one random operation of random strength, such as a rotation")
    random_resized_crop: float = key(0.0, "least share of an image's area in a random part that fills it; 0: none", low=0.0, high=1.0)
    color_jitter: float = key(0.0, "largest random change of brightness, contrast and saturation, as a share; 0: none", low=0.0, high=1.0)
    mixup: float = key(0.0, "alpha of Beta(alpha, alpha), which draws shares in which images are mixed; 0: none", low=0.0, high=_LARGE)
    pixel_statistics: str = key("data", "mean and deviation of pixels: the training images', or ImageNet's", ("data", "imagenet"))

    network: str = key("mlp", "layers to train; or MODULE:NETWORK, of a file beside the configuration", section="network")
    widths: tuple[int, ...] = key((512, 512, 512), "mlp, conv4, conv: units or channels of each layer; cifarnet: of each pair of layers")
    pools: tuple[int, ...] = key((1, 2, 1, 2), "conv4, conv: side of the max-pooling window after each layer, in positions; 1: none")
    width_factor: float = key(1.0, "vgg, resnet: channels of each layer, as a multiple of the published", low=0.01, high=16.0)
    stem: str = key("cifar", "resnet: first layers: 3x3, or 7x7 and max-pooling of stride 2 each (imagenet)", ("cifar", "imagenet"))
    image_size: int = key(0, "side in pixels to which images are resized, while they are decoded or on device; 0: none", low=0, high=1024)
    activation: str = key("relu", "all but resnet: ReLU, or GELU in its tanh form, after normalisation", ("relu", "gelu"))
    norm_scale: bool = key(True, "all but resnet, if norm is batch, anchor or layer: learn the scale of a normalised channel")
    initialisation: str = key("he", "all but resnet: kernels start as He's, or as the identity in the first channels", ("he", "identity"))
    whitening: int = key(0, "conv4, conv, cifarnet, vgg: side in pixels of patches that a fixed layer whitens; 0: none", low=0, high=8)
    norm: str = key("auto", "normalisation; auto: what the rule needs, mostly batch", NORMS)
    norm_statistics: str = key("batch", "normalise by the batch in training, or by init_from's statistics (frozen)", ("batch", "frozen"))
    head_grid: int = key(4, "side in cells of the grid to which conv features are pooled for the head; 0: by width", low=0, high=1024)
    auxiliary: tuple[int, ...] = key((), "conv4, conv, cifarnet, vgg: channels of convolutions between map and head; not in the last group")
    grouping: str = key("width", "what makes one group: equal width, block, layer, or all layers", ("width", "block", "layer", "all"))
    frozen_groups: int = key(0, "first groups whose layers stay as they start; their heads learn", low=0, high=MAX_LAYERS)
    init_from: str = key("", "weights to start from: by vffjax, torchvision, timm or transformers, or hf://OWNER/NAME; empty: random")

    rule: str = key("vff", "local objective of a group; or MODULE:RULE, of a file beside the configuration", section="rule")
    rule_options: Mapping[str, Any] = key({}, "keys of the rule's own, as its file documents them: {'weight': 0.5}")
    labelling: str = key("shared", "LWNL copies: shared by all anchors, or one right and one wrong per image", ("shared", "triplet"))
    noise_scale: float = key(3.0, "standard deviation of the class noise, in units of normalised pixels", low=0.0, high=_LARGE)
    noise_cell: int = key(1, "side in pixels of the grid on which class noise is drawn and then interpolated; 1: white", low=1, high=1024)
    noise_kind: str = key("normal", "class noise: normal, or noise_scale and -noise_scale at random (signs)", ("normal", "signs"))
    noise_spectrum: str = key("drawn", "class noise: as it is drawn, or with the spectrum of the training images", ("drawn", "images"))
    noise_redrawn: str = key("never", "when class noise is drawn: once for the run, or anew for each epoch", ("never", "epoch"))
    copies_per_class: int = key(2, "shared: labelled copies of each class in a step", low=1, high=10_000)
    negatives: str = key("uniform", "wrong labels: uniform, or drawn from the heads' predictions (hard)", ("uniform", "hard"))
    contrast: str = key("auto", "form of CSCL; auto: in_batch for shared, triplet for triplet", ("auto", "in_batch", "triplet"))
    contrast_gradient: str = key("both", "CSCL has gradients for the features of anchors, copies, or both", ("both", "anchors", "copies"))
    similarity: str = key("grid", "cosine of positions, flat map, 2x2 cells, mean; alike on mlp", ("position", "flat", "grid", "pooled"))
    margin: float = key(0.0, "cosine by which the right class must win", low=-2.0, high=2.0)
    temperature: float = key(0.05, "scale of cosine differences in CSCL; above 0", low=1e-4, high=_LARGE)
    temperature_end: float = key(0.0, "temperature at the end of run or stage; same factor in each step; 0: constant", low=0.0, high=_LARGE)
    head_weight: float = key(0.0, "factor on the head's gradient that reaches the layers; 0: the head only reads", low=0.0, high=_LARGE)
    label_smoothing: float = key(0.0, "probability spread over all classes in the head's cross-entropy", low=0.0, high=0.99)
    goodness_threshold: float = key(1.0, "ff: mean squared activity that divides positive from negative", low=0.0, high=_LARGE)
    peer_normalisation: float = key(0.0, "ff: weight of the penalty on units far from the mean activity; 0: off", low=0.0, high=_LARGE)

    schedule: str = key("joint", "groups train together, one after the other, or each on a device", SCHEDULES, section="training")
    feature_cache: str = key("none", "sequential: keep the frozen groups' features of the training images", ("none", "device", "host"))
    epochs: int = key(10, "passes over the training images (sequential: for each group)", low=1, high=1_000_000)
    batch_size: int = key(128, "images in a step", low=1, high=2**20)
    optimizer: str = key("adamw", "optax optimizer of each group; muon: for layers' kernels, NAdam for all else", ("adamw", "sgd", "muon"))
    learning_rate: float = key(1e-3, "peak learning rate; decays to 0 at the end", low=0.0, high=_LARGE)
    decay: str = key("cosine", "how the learning rate falls after the warm-up: along a cosine or a line", ("cosine", "linear"))
    bias_rate: float = key(1.0, "learning rate of biases of layers, not of heads, as a multiple of the kernels'", low=0.0, high=_LARGE)
    group_decay: float = key(1.0, "learning rate of a group over that of the group after it; overrides win", low=0.0, high=1.0)
    weight_decay: float = key(0.0, "decoupled decay of kernels (muon: layers' only), times learning rate; per step", low=0.0, high=_LARGE)
    momentum: float = key(0.9, "sgd, muon: Nesterov momentum", low=0.0, high=0.9999)
    warmup_epochs: float = key(0.0, "linear warm-up, in epochs", low=0.0, high=_LARGE)
    look_ahead: int = key(0, "steps after which weights go back towards their slow averages; 0: never", low=0, high=_MOST)
    slow_share: float = key(0.77, "look_ahead: share of the slow averages at the end; grows with the cube of time", low=0.0, high=0.999)
    clip_norm: float = key(0.0, "largest global gradient norm of a group; 0: no clipping", low=0.0, high=1e30)
    overrides: Mapping[str, Mapping[str, Any]] = key({}, "by group: {'group1': {'learning_rate': 1e-4}}; of " + ", ".join(OVERRIDABLE))
    devices: int = key(0, "devices that train, each on its part of a batch (pipeline: its groups); 0: all JAX sees", low=0, high=65_536)
    on_nonfinite: str = key("stop", "infinity or NaN in a group's loss: end the run, or skip its step", ("stop", "skip"))
    precision: str = key("f32", "compute type of the layers; parameters stay f32", ("f32", "bf16"))
    rematerialise: bool = key(False, "recompute each layer's forward pass in the backward pass: more time, less memory in large groups")

    inference: str = key("heads", "scores: by heads, by a sweep over labels, or by the rule", ("heads", "sweep", "rule"), section="output")
    votes: str = key("subset", "ensemble: plain mean of a subset of groups, or weights of all (weighted)", ("subset", "weighted"))
    views: str = key("one", "average scores of the image; and its mirror image; and both shifted two ways (six)", ("one", "mirror", "six"))
    eval_batch_size: int = key(500, "images in a step of evaluation", low=1, high=2**20)
    checkpoint_every: int = key(1, "epochs between checkpoints; the last epoch is always saved", low=1, high=_MOST)
    checkpoint_seconds: float = key(0.0, "seconds after which a long epoch is saved before its end; 0: never", low=0.0, high=_LARGE)
    segment_steps: int = key(0, "steps that the device runs in one call; 0: as many as take a few seconds", low=0, high=_MOST)
    # fmt: on

    @functools.cached_property
    def _text(self) -> str:
        return str(self.to_dict())

    def __hash__(self) -> int:
        return hash(self._text)  # the fields cannot be hashed, because some are dictionaries

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Config) and self._text == other._text  # here NaN equals NaN: see `of_program`

    def trained_by(self) -> dict[str, Any]:
        """The keys that identify a run: all that are not `CHANGEABLE`; the pipeline counts as joint. In JSON types, lists for tuples."""
        same = {"schedule": "joint"} if self.schedule == "pipeline" else {}  # which has the bits of the joint schedule
        return {key: value for key, value in self.to_dict().items() if key not in CHANGEABLE} | same

    def checkpoint_due(self, epochs: int) -> bool:
        """Whether a checkpoint is due after this many epochs. It always is after the last epoch of a stage."""
        return epochs % self.epochs == 0 or epochs % self.checkpoint_every == 0

    def to_dict(self) -> dict[str, Any]:
        """All keys, in JSON types, with lists for tuples."""
        return {key: files.as_json(getattr(self, key)) for key in FIELDS}


FIELDS = fields_of(Config)


def default_config() -> ml_collections.ConfigDict:
    """All keys with their defaults. It is locked, so that setting an unknown key fails in the line that sets it."""
    config = ml_collections.ConfigDict({name: default_of(field) for name, field in FIELDS.items()}).lock()
    for name, field in FIELDS.items():
        if isinstance(default_of(field), dict):  # of which the keys are not known here
            config[name].unlock()
    return config


def converted(raw: ml_collections.ConfigDict | Mapping[str, Any]) -> Config:
    """Converts values to a `Config`, and checks the type and range of each. Imports no JAX.

    `training.checks.make_config` also checks whether they fit together.

    Raises:
        UserError: names config.KEY, the value and the fix.
    """
    try:
        plain = raw.to_dict() if isinstance(raw, ml_collections.ConfigDict) else dict(raw)
    except (RecursionError, config_dict.RequiredValueError) as error:
        raise UserError(f"config: cannot be read ({said(error)}); give each key a plain value") from None
    for name in plain:
        if name not in FIELDS:
            raise bad_key(printable(str(name), 100), plain[name], "no such key", nearest_key(str(name)))
    values = {name: value_of(FIELDS[name], value, name) for name, value in plain.items()}
    config = Config(**values | {"overrides": _overrides(values.get("overrides", {}))})
    for room in ROOMS:
        room.check(getattr(config, room.key))
    return config


def nearest_key(name: str) -> str:
    """The advice for a key that does not exist."""
    near = key_like(name)
    return f"did you mean config.{near}?" if near else "see vffjax train --help for the keys"


def key_like(name: str) -> str:
    """The key that somebody may have meant by a name; empty if none is near: a well-known synonym, a beginning, or a near spelling."""
    word = name.lower().replace("-", "_")
    begun = [key for key in FIELDS if key.startswith(word)] if len(word) > 2 else []
    near = difflib.get_close_matches(word, FIELDS, n=1, cutoff=0.7)  # below it the keys found have little to do with the word
    return synonyms.KEYS.get(word) or next(iter(begun + near), "")


def _overrides(given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A copy of the overrides with converted values. Raises `UserError` for an unknown group or key, or a value out of range."""
    out: dict[str, dict[str, Any]] = {}
    for group, override in given.items():
        if not isinstance(group, str) or not re.fullmatch("group(0|[1-9][0-9]{0,3})", group):
            raise bad_key(f"overrides.{printable(str(group), 100)}", override, "not a group", "name groups group0, group1, ...")
        if not isinstance(override, Mapping):
            raise bad_key(f"overrides.{group}", override, "not a dictionary", "give for example {'learning_rate': 1e-4}")
        for name, value in override.items():
            if name not in OVERRIDABLE:
                shown, known = f"overrides.{group}.{printable(str(name), 100)}", ", ".join(OVERRIDABLE)
                raise bad_key(shown, value, "cannot be overridden", f"use one of {known}")
        out[group] = {name: value_of(FIELDS[name], value, f"overrides.{group}.{name}") for name, value in override.items()}
    return out


def for_group(config: Config, group: int, later: int = 0) -> Config:
    """The configuration of one group, with its own learning rate and its overrides.

    Args:
        config: of the run.
        group: the index of the group.
        later: how many groups follow it; the learning rate is multiplied by config.group_decay for each of them.
    """
    rate = config.learning_rate * config.group_decay**later
    return dataclasses.replace(config, **{"learning_rate": rate, **config.overrides.get(f"group{group}", {})})


def to_json(config: Config) -> dict[str, Any]:
    """The content of config.json: all keys, and the version that wrote them under the key `vffjax`."""
    return {"vffjax": versions.own()} | config.to_dict()


def of_program(config: Config) -> Config:
    """The part of the configuration that compiled programs depend on. Configurations with equal parts share their programs.

    Numbers that programs take as arguments are NaN here, so that code which reads one of them from the configuration gives NaN. A 0 that
    leaves out a part of the program stays 0. Keys that no program depends on have their defaults.
    """

    def number(key: str, value: float) -> float:
        return 0.0 if key in _SWITCHES and value == 0 else math.nan

    defaults = {name: default_of(FIELDS[name]) for name in _OUTSIDE}
    numbers = {key: number(key, getattr(config, key)) for key in ARGUMENTS}
    overrides = {}
    for group, override in sorted(config.overrides.items()):
        own = {key: number(key, value) if key in ARGUMENTS else value for key, value in override.items() if key not in _OUTSIDE}
        base = {key: numbers.get(key, getattr(config, key)) for key in own}
        overrides[group] = {key: value for key, value in sorted(own.items()) if str(value) != str(base[key])}
    changes: dict[str, Any] = defaults | numbers | {"overrides": {group: own for group, own in overrides.items() if own}}
    return dataclasses.replace(config, **changes)
