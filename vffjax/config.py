"""From an `ml_collections.ConfigDict` to one frozen, validated dataclass.

Everything below the command line reads `Config` by attribute, so that a typo fails where it is written. Checks that need no
data happen here, before anything is compiled; checks against the data are in `check_against_data`.
"""

import dataclasses
import difflib
import functools
import math
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

import ml_collections
from ml_collections import config_dict

from vffjax import versions
from vffjax.architectures import PUBLISHED, STEMS
from vffjax.errors import UserError, bad_key, printable

DATASETS = ("digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "synthetic")
CONVOLUTIONAL = ("conv4", "conv")
NETWORKS = ("mlp", *CONVOLUTIONAL, *PUBLISHED)
WEIGHT_FILES, HUB = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".pth.tar"), "hf://"
# Beyond these a number is a slip, and XLA ends the process where an array has more than 2**31 entries.
MAX_WIDTH, MAX_LAYERS, MAX_ENTRIES = 2**16, 1_000, 2**31 - 1
_MOST, _LARGE = 10**9, 1e6  # of what only has to be finite and representable
MAX_SIDE = 4096  # of an image, in pixels
# Keys that a run may change when it goes on: where the data lie, and how much memory and disk it takes. All others make it another run.
CHANGEABLE = ("data_dir", "eval_batch_size", "checkpoint_every", "rematerialise", "segment_steps", "checkpoint_seconds")
BITWISE = ("checkpoint_every", "checkpoint_seconds", "segment_steps")  # no result depends on these
# Numbers that a compiled program takes as arrays, by step and group: see `hyperparameters`. Each may differ by group.
ARGUMENTS: tuple[str, ...] = (
    *("learning_rate", "weight_decay", "momentum", "clip_norm", "temperature", "margin", "head_weight", "label_smoothing"),
    *("goodness_threshold", "peer_normalisation"),
)
# Those of which 0 takes a part out of the program. The locality certificate has to see that a head_weight of 0 cuts the gradient.
_SWITCHES = ("clip_norm", "head_weight", "peer_normalisation")
# Keys of which no compiled program knows anything: they say which data and which arrays it is given, how often and where it runs.
_OUTSIDE = (
    *("seed", "dataset", "data_dir", "train_examples", "val_fraction", "init_from", "noise_scale", "feature_cache", "epochs"),
    *("group_decay", "warmup_epochs", "inference", "checkpoint_every", "checkpoint_seconds", "segment_steps"),
)
OVERRIDABLE = ("optimizer", "warmup_epochs", *ARGUMENTS)


def _field(default: Any, doc: str, choices: tuple[str, ...] = (), low: float | None = None, high: float | None = None) -> Any:
    if isinstance(default, dict):
        return dataclasses.field(default_factory=dict, metadata={"doc": doc, "choices": choices, "low": low, "high": high})
    return dataclasses.field(default=default, metadata={"doc": doc, "choices": choices, "low": low, "high": high})


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment. The documentation of each field is printed by `python train.py --help`."""

    # fmt: off
    seed: int = _field(0, "seed of everything random: split, initialisation, codebook, order, augmentation", low=0, high=2**31 - 1)
    dataset: str = _field("digits", "what to learn", DATASETS)
    data_dir: str = _field("", "folder of tensorflow-datasets; empty: $TFDS_DATA_DIR, else ~/tensorflow_datasets")
    train_examples: int = _field(0, "images kept for training and validation, drawn by the seed; 0: all", low=0, high=_MOST)
    val_fraction: float = _field(0.1, "share of the training images held out for every choice", low=0.0, high=0.9)
    flip: bool = _field(False, "mirror training images left to right with probability 1/2")
    alternating_flip: bool = _field(False, "flip: mirror each image in every other epoch instead, half of the images in each")
    crop_padding: int = _field(0, "pixels of black padding before a random crop; 0: no crop", low=0, high=1024)
    cutout: int = _field(0, "side in pixels of one random square set to the mean; 0: none", low=0, high=1024)
    pixel_statistics: str = _field("data", "mean and deviation of pixels: the training images', or ImageNet's", ("data", "imagenet"))

    network: str = _field("mlp", "layers to train; conv: as conv4, with any number of layers", NETWORKS)
    widths: tuple[int, ...] = _field((512, 512, 512), "mlp, conv4, conv: output units or channels of each layer")
    pools: tuple[int, ...] = _field((1, 2, 1, 2), "conv4, conv: side of the max-pooling window after each layer, in positions; 1: none")
    width_factor: float = _field(1.0, "vgg, resnet: channels of each layer, as a multiple of the published", low=0.01, high=16.0)
    stem: str = _field("cifar", "resnet: first layers: 3x3 (cifar), or 7x7 and max-pooling, each with stride 2 (imagenet)", tuple(STEMS))
    image_size: int = _field(0, "conv, vgg, resnet: side in pixels to which images are resized, on device; 0: none", low=0, high=1024)
    norm: str = _field("auto", "normalisation; auto: batch, for rule ff input", ("auto", "batch", "anchor", "layer", "input", "none"))
    norm_statistics: str = _field("batch", "what trains by: the batch's, or init_from's, which then stay (frozen)", ("batch", "frozen"))
    head_grid: int = _field(4, "side in cells of the grid to which conv features are pooled for the head; 0: by width", low=0, high=1024)
    grouping: str = _field("width", "what makes one group: equal width, block, layer, or all layers", ("width", "block", "layer", "all"))
    frozen_groups: int = _field(0, "first groups whose layers stay as they start; their heads learn", low=0, high=MAX_LAYERS)
    init_from: str = _field("", "weights to start from: by vffjax, torchvision, timm or transformers, or hf://OWNER/NAME; empty: random")

    rule: str = _field("vff", "local objective of a group: CSCL (+ head), forward-forward goodness, head loss alone", ("vff", "ff", "head"))
    labelling: str = _field("shared", "LWNL copies: shared by all anchors, or one right and one wrong per image", ("shared", "triplet"))
    noise_scale: float = _field(3.0, "standard deviation of the class noise, in units of normalised pixels", low=0.0, high=_LARGE)
    copies_per_class: int = _field(2, "shared: labelled copies of each class in a step", low=1, high=10_000)
    negatives: str = _field("uniform", "wrong labels: uniform, or drawn from the head's own prediction", ("uniform", "hard"))
    contrast: str = _field("auto", "form of CSCL; auto: in_batch for shared, triplet for triplet", ("auto", "in_batch", "triplet"))
    similarity: str = _field("grid", "cosine of positions, flat map, 2x2 cells, mean; alike on mlp", ("position", "flat", "grid", "pooled"))
    margin: float = _field(0.0, "cosine by which the right class must win", low=-2.0, high=2.0)
    temperature: float = _field(0.05, "scale of cosine differences in CSCL; above 0", low=1e-4, high=_LARGE)
    head_weight: float = _field(0.0, "share of the head's gradient that trains the group; 0: the head only reads", low=0.0, high=_LARGE)
    label_smoothing: float = _field(0.0, "probability spread over all classes in the head's cross-entropy", low=0.0, high=0.99)
    goodness_threshold: float = _field(1.0, "ff: mean squared activity that divides positive from negative", low=0.0, high=_LARGE)
    peer_normalisation: float = _field(0.0, "ff: weight of the penalty on units far from the mean activity; 0: off", low=0.0, high=_LARGE)

    schedule: str = _field("joint", "groups train together on each batch, or one after the other", ("joint", "sequential"))
    feature_cache: str = _field("none", "sequential: keep the frozen groups' features of the training images", ("none", "device", "host"))
    epochs: int = _field(10, "passes over the training images (sequential: for each group)", low=1, high=1_000_000)
    batch_size: int = _field(128, "images in a step", low=1, high=2**20)
    optimizer: str = _field("adamw", "optax optimizer of each group", ("adamw", "sgd"))
    learning_rate: float = _field(1e-3, "peak learning rate; cosine decay to 0 at the end", low=0.0, high=_LARGE)
    group_decay: float = _field(1.0, "learning rate of a group, as a multiple of the next one's; overrides win", low=0.0, high=1.0)
    weight_decay: float = _field(0.0, "decoupled decay of kernels, multiplied by the learning rate; per step", low=0.0, high=_LARGE)
    momentum: float = _field(0.9, "sgd: Nesterov momentum", low=0.0, high=0.9999)
    warmup_epochs: float = _field(0.0, "linear warm-up, in epochs", low=0.0, high=_LARGE)
    clip_norm: float = _field(0.0, "largest global gradient norm of a group; 0: no clipping", low=0.0, high=1e30)
    overrides: Mapping[str, Mapping[str, Any]] = _field({}, "by group: {'group1': {'learning_rate': 1e-4}}; of " + ", ".join(OVERRIDABLE))
    on_nonfinite: str = _field("stop", "infinity or NaN in a group's loss: end the run, or skip its step", ("stop", "skip"))
    precision: str = _field("f32", "compute type of the layers; parameters stay f32", ("f32", "bf16"))
    rematerialise: bool = _field(False, "recompute each layer's forward pass in the backward pass: more time, less memory in large groups")

    inference: str = _field("heads", "how the final error is measured: head ensemble, or sweep over all labels", ("heads", "sweep"))
    eval_batch_size: int = _field(500, "images in a step of evaluation", low=1, high=2**20)
    checkpoint_every: int = _field(1, "epochs between checkpoints; the last epoch is always saved", low=1, high=_MOST)
    checkpoint_seconds: float = _field(0.0, "seconds after which a long epoch is saved before its end; 0: never", low=0.0, high=_LARGE)
    segment_steps: int = _field(0, "steps that the device runs in one call; 0: as many as take a few seconds", low=0, high=_MOST)
    # fmt: on

    @functools.cached_property
    def _text(self) -> str:
        return str(self.to_dict())

    def __hash__(self) -> int:
        return hash(self._text)  # not that of the fields, because overrides are a dictionary

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Config) and self._text == other._text  # here NaN equals NaN: see `of_program`

    @property
    def resolved_norm(self) -> str:
        return ("input" if self.rule == "ff" else "batch") if self.norm == "auto" else self.norm

    @property
    def resolved_contrast(self) -> str:
        return ("in_batch" if self.labelling == "shared" else "triplet") if self.contrast == "auto" else self.contrast

    def trained_by(self) -> dict[str, Any]:
        """What makes two runs the same: all keys that are not `CHANGEABLE`. Plain JSON types, tuples as lists."""
        return {key: value for key, value in self.to_dict().items() if key not in CHANGEABLE}

    def checkpoint_due(self, epochs: int) -> bool:
        """Whether a checkpoint is due when so many epochs are done: the last epoch of a stage always has one."""
        return epochs % self.epochs == 0 or epochs % self.checkpoint_every == 0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, tuples as lists."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain["overrides"] = {group: dict(override) for group, override in self.overrides.items()}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}


FIELDS = {field.name: field for field in dataclasses.fields(Config)}


def default_config() -> ml_collections.ConfigDict:
    """All keys with their defaults, locked: a config file that sets an unknown key fails there."""
    config = ml_collections.ConfigDict(Config().to_dict() | {"widths": Config().widths, "pools": Config().pools})
    return config.lock()


def converted(raw: ml_collections.ConfigDict | Mapping[str, Any]) -> Config:
    """The values as a `Config`, each of the right type and in its range. Raises `UserError` naming `config.KEY`, the value and the fix.

    Whether they fit together is for `training.checks.make_config` to say.
    """
    try:
        plain = raw.to_dict() if isinstance(raw, ml_collections.ConfigDict) else dict(raw)
    except (RecursionError, config_dict.RequiredValueError) as error:
        raise UserError(
            f"config: cannot be read ({type(error).__name__}: {printable(str(error), 200)}); give each key a plain value"
        ) from None
    for key in plain:
        if key not in FIELDS:
            raise bad_key(printable(str(key), 100), plain[key], "no such key", nearest_key(str(key)))
    values = {key: _convert(key, value, type(FIELDS[key].default if key != "overrides" else {})) for key, value in plain.items()}
    values["overrides"] = _convert_overrides(values.get("overrides", {}))
    config = Config(**values)
    for key in FIELDS:
        _check_range(key, getattr(config, key))
    return config


def nearest_key(key: str) -> str:
    """What to do about a key that does not exist."""
    near = difflib.get_close_matches(key, FIELDS, n=1)
    return f"did you mean config.{near[0]}?" if near else "see python train.py --help for the keys"


def _convert_overrides(overrides: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A copy, its values converted and in range."""
    out: dict[str, dict[str, Any]] = {}
    for name, override in overrides.items():
        if not isinstance(name, str) or not re.fullmatch("group(0|[1-9][0-9]{0,3})", name):
            raise bad_key(f"overrides.{printable(str(name), 100)}", override, "not a group", "name groups group0, group1, ...")
        if not isinstance(override, Mapping):
            raise bad_key(f"overrides.{name}", override, "not a dictionary", "give for example {'learning_rate': 1e-4}")
        out[name] = {}
        for key, value in override.items():
            if key not in OVERRIDABLE:
                raise bad_key(
                    f"overrides.{name}.{printable(str(key), 100)}", value, "cannot be overridden", f"use one of {', '.join(OVERRIDABLE)}"
                )
            out[name][key] = _convert(f"overrides.{name}.{key}", value, type(FIELDS[key].default))
            _check_range(key, out[name][key], f"overrides.{name}.{key}")
    return out


def _convert(key: str, value: Any, kind: type) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        if abs(value) > 10**300:  # float() would raise
            raise bad_key(key, value, "too large", "give a number of common size")
        value = float(value)
    if kind is tuple:
        if isinstance(value, (list, tuple)) and value and all(isinstance(v, int) and not isinstance(v, bool) for v in value):
            return tuple(value)
        raise bad_key(key, value, "not a tuple of whole numbers", f"give for example --config.{key}='{FIELDS[key].default}'")
    if (kind is int and isinstance(value, bool)) or not isinstance(value, kind):
        raise bad_key(key, value, f"has type {type(value).__name__}", f"give a value of type {kind.__name__}")
    return value


def _check_range(key: str, value: Any, shown: str = "") -> None:
    """Checks a value against the choices and limits of `key`; errors name `shown` if it is given."""
    meta, key = FIELDS[key].metadata, shown or key
    if meta["choices"] and value not in meta["choices"]:
        near = difflib.get_close_matches(str(value), meta["choices"], n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise bad_key(key, value, "not known", f"{hint}choose one of {', '.join(meta['choices'])}")
    if isinstance(value, str) and any(unicodedata.category(c) == "Cc" for c in value):
        raise bad_key(key, value, "holds a control character", "remove it; a path with one has to be renamed")
    if isinstance(value, float) and not math.isfinite(value):
        raise bad_key(key, value, "not a finite number", "give a finite number")
    if meta["low"] is not None and value < meta["low"]:
        raise bad_key(key, value, "too small", f"the least is {meta['low']}")
    if meta["high"] is not None and value > meta["high"]:
        raise bad_key(key, value, "too large", f"the most is {meta['high']}")


def for_group(config: Config, group: int, later: int = 0) -> Config:
    """The configuration as group number `group` sees it, `later` groups behind it: its learning rate, and its overrides applied."""
    rate = config.learning_rate * config.group_decay**later
    return dataclasses.replace(config, **{"learning_rate": rate, **config.overrides.get(f"group{group}", {})})


def to_json(config: Config) -> dict[str, Any]:
    """What `config.json` holds: all keys, and under `vffjax` the version that wrote it."""
    return {"vffjax": versions.own()} | config.to_dict()


def of_program(config: Config) -> Config:
    """The configuration as far as compiled programs depend on it. Equal ones have the same programs.

    Numbers that a program takes as arrays are NaN here, so that code which reads one of them from the configuration cannot pass
    unnoticed. Where 0 takes a part out of the program it stays 0. Keys that no program knows have their defaults.
    """

    def number(key: str, value: float) -> float:
        return 0.0 if key in _SWITCHES and value == 0 else math.nan

    defaults = {key: FIELDS[key].default for key in _OUTSIDE}
    numbers = {key: number(key, getattr(config, key)) for key in ARGUMENTS}
    overrides = {}
    for group, override in sorted(config.overrides.items()):
        own = {key: number(key, value) if key in ARGUMENTS else value for key, value in override.items() if key not in _OUTSIDE}
        base = {key: numbers.get(key, getattr(config, key)) for key in own}
        overrides[group] = {key: value for key, value in sorted(own.items()) if str(value) != str(base[key])}
    changes: dict[str, Any] = defaults | numbers | {"overrides": {group: own for group, own in overrides.items() if own}}
    return dataclasses.replace(config, **changes)
