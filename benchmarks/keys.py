"""Which keys of the configuration a benchmark obeys.

A benchmark refuses a key that it would ignore, so that every figure belongs to the configuration that its title names.

`PEER` and `FLOPS` describe code that reimplements a part of the trainer: the PyTorch networks, and the count of FLOPs. They list every key
that this code knows. Any other key must keep its default, so that a new key is refused until somebody lists it. All other benchmarks give
the configuration to the trainer, which obeys every key. They list only the keys whose values they set themselves.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from vffjax import rules
from vffjax.config import FIELDS, Config
from vffjax.errors import bad_key
from vffjax.networks.layers import ConvLayer, DenseLayer, Layer, WhiteningLayer
from vffjax.networks.resnet import ResidualBlock, Stem
from vffjax.rules import vff
from vffjax.training.plan import groups_of


class Only(NamedTuple):
    """The values of a key that a benchmark accepts.

    Attributes:
        accepted: the values.
        problem: what is wrong with any other value.
        fix: what to do about it.
        matters: whether the key is checked at all for a configuration.
    """

    accepted: tuple[Any, ...]
    problem: str
    fix: str
    matters: Callable[[Config], bool] = lambda config: True


class Known(NamedTuple):
    """How code that reimplements a part of the trainer treats the keys. Each key that it knows is in one of the last three fields.

    Attributes:
        who: the code, for messages.
        obeyed: keys that it obeys with any value.
        immaterial: keys that have no influence on its result.
        only: keys that it obeys only with some values.
    """

    who: str
    obeyed: tuple[str, ...]
    immaterial: tuple[str, ...]
    only: Mapping[str, Only]

    def check(self, config: Config, otherwise: str = "") -> None:
        """Raises `UserError` for the first key whose value would be ignored. `otherwise` is another fix, which the message adds."""
        known = {*self.obeyed, *self.immaterial, *self.only}
        problem = f"{self.who} do not take this key into account"
        unknown = {key: Only((default(key),), problem, f"use {default(key)!r}") for key in FIELDS if key not in known}
        refuse(config, unknown | dict(self.only), otherwise)


def default(key: str) -> Any:
    """The default value of a key."""
    return getattr(Config(), key)


def refuse(config: Config, only: Mapping[str, Only], otherwise: str = "") -> None:
    """Raises `UserError` for the first key that has a value which is not accepted.

    Args:
        config: a checked configuration.
        only: the accepted values by key. Other keys are not checked.
        otherwise: another fix, which the message adds.
    """
    for key, rule in only.items():
        if rule.matters(config) and getattr(config, key) not in rule.accepted:
            raise bad_key(key, getattr(config, key), rule.problem, rule.fix + (f", {otherwise}" if otherwise else ""))


def refuse_other_groups(config: Config, groupings: Mapping[str, str], flag: str = "") -> None:
    """Raises `UserError` if a key that counts or names groups is set, and a contender cuts the network into other groups.

    Args:
        config: the configuration that all contenders share.
        groupings: the grouping of each contender, by its name.
        flag: the flag that chooses the contenders, if there is one.
    """
    others = [name for name, grouping in groupings.items() if grouping != config.grouping]
    for key in ("frozen_groups", "overrides"):
        if others and getattr(config, key) != default(key):
            problem = f"refers to groups of grouping={config.grouping}, but {others[0]} has grouping={groupings[others[0]]}"
            without = f", or leave {', '.join(others)} out by {flag}" if flag else ""
            raise bad_key(key, getattr(config, key), problem, f"use {default(key)!r}{without}")


JOINT = Only(("joint",), "groups that train one after the other are several programs, and one is measured", "use schedule=joint")
SEEDS = Only((0,), "every run takes its seed from --seeds", "leave it at 0 and give the seed to --seeds")
# Of what trains on one device, with all images there.
ONE_DEVICE = {
    "devices": Only((0, 1), "everyone trains on one device", "use devices=0"),
    "data_on": Only(("device",), "all images lie on the device before the clock starts", "use data_on=device"),
}
RANDOM_WEIGHTS = Only(("",), "every contender starts from random weights", "leave it empty")


def own_rule(who: str, flag: str) -> Only:
    """The key `rule` of a benchmark in which each of `who` has a rule of its own, chosen by a flag."""
    return Only((default("rule"),), f"every {who} has a rule of its own", f"leave it at {default('rule')} and choose by {flag}")


def head_alone(config: Config) -> bool:
    """Whether groups learn by the loss of their heads alone, which is back-propagation where there is one group."""
    return rules.find(config).loss is None


def _is_vff(config: Config) -> bool:
    return rules.find(config) is vff.RULE


PLAIN = (ConvLayer, DenseLayer, WhiteningLayer)
COUNTED = (*PLAIN, Stem, ResidualBlock)  # the layers whose multiplications `rates.layer_work` counts


def _has_other_layers(config: Config) -> bool:
    """Whether the network has layers that are neither plain convolutions nor dense, nor a whitening layer."""
    return not all(isinstance(layer, PLAIN) for layer in _layers(config))


def _has_uncounted_layers(config: Config) -> bool:
    return not all(isinstance(layer, COUNTED) for layer in _layers(config))


def _layers(config: Config) -> list[Layer]:
    return [layer for group in groups_of(config, 2) for layer in group.module.layers]


def _predicts(config: Config) -> bool:
    return rules.find(config).predicts(config)


PEER = Known(
    "the PyTorch contenders",
    obeyed=(
        *("seed", "dataset", "flip", "alternating_flip", "crop_padding", "cutout", "pixel_statistics", "widths", "pools", "width_factor"),
        *("noise_scale", "similarity", "margin", "temperature", "head_weight", "label_smoothing", "epochs", "batch_size"),
        *("learning_rate", "group_decay", "weight_decay", "momentum", "warmup_epochs", "clip_norm", "overrides", "precision"),
        *("whitening", "activation", "norm_scale", "initialisation", "decay", "bias_rate", "head_grid"),
    ),
    immaterial=(
        # No data set is read, and nothing is held out for validation.
        *("data_dir", "data_on", "train_examples", "val_fraction", "test_fraction", "wrong_labels"),
        # These belong to labellings and rules that the peers do not have.
        *("copies_per_class", "goodness_threshold", "peer_normalisation", "slow_share"),
        # Nothing is saved, and `speedrun`, which classifies, sets these itself.
        *("inference", "votes", "views", "eval_batch_size", "checkpoint_every", "checkpoint_seconds", "segment_steps"),
    ),
    only={
        "devices": ONE_DEVICE["devices"],
        "network": Only((), "the PyTorch contenders have only plain layers", "use conv4 or vgg8b", _has_other_layers),
        "stem": Only(("cifar",), "the PyTorch contenders have no ResNet", "use cifar"),
        "random_erasing": Only((0.0,), "the PyTorch contenders erase no rectangles", "use random_erasing=0"),
        "trivial_augment": Only((False,), "the PyTorch contenders have no such operations", "use trivial_augment=False"),
        "random_resized_crop": Only((0.0,), "the PyTorch contenders enlarge no parts", "use random_resized_crop=0"),
        "color_jitter": Only((0.0,), "the PyTorch contenders change no colours", "use color_jitter=0"),
        "mixup": Only((0.0,), "the PyTorch contenders mix no images", "use mixup=0"),
        "image_size": Only((0,), "the PyTorch contenders do not resize images", "use image_size=0"),
        "norm": Only(("auto", "batch"), "the PyTorch contenders normalise only by batch", "use norm=auto"),
        "norm_statistics": Only(("batch",), "the PyTorch contenders train only by the batch's statistics", "use norm_statistics=batch"),
        "frozen_groups": Only((0,), "the PyTorch contenders train every group", "use frozen_groups=0"),
        "init_from": RANDOM_WEIGHTS,
        "auxiliary": Only(((),), "the PyTorch contenders have linear heads", "leave it empty", lambda c: c.grouping != "all"),
        "noise_cell": Only((1,), "the PyTorch contenders draw white noise", "use noise_cell=1", _is_vff),
        "noise_kind": Only(("normal",), "the PyTorch contenders draw normal noise", "use noise_kind=normal", _is_vff),
        "noise_spectrum": Only(("drawn",), "the PyTorch contenders do not filter noise", "use noise_spectrum=drawn", _is_vff),
        "noise_redrawn": Only(("never",), "the PyTorch contenders draw noise once", "use noise_redrawn=never", _is_vff),
        "temperature_end": Only((0.0,), "the PyTorch contenders keep one temperature", "use temperature_end=0", _is_vff),
        "look_ahead": Only((0,), "the PyTorch contenders keep no averages of weights", "use look_ahead=0"),
        "optimizer": Only(("adamw", "sgd"), "the PyTorch contenders have no such optimizer", "use adamw or sgd"),
        "rule": Only(
            (), "the PyTorch contenders have no such rule", "use rule=vff or rule=head", lambda c: not (_is_vff(c) or head_alone(c))
        ),
        "rule_options": Only(({},), "the PyTorch contenders have no options of rules", "leave it empty"),
        "grouping": Only(("all",), "the head loss alone is back-propagation through one group in PyTorch", "use grouping=all", head_alone),
        "labelling": Only(("triplet",), "the PyTorch contenders have a right and a wrong copy of each image", "use triplet", _is_vff),
        "contrast": Only(("auto", "triplet"), "the PyTorch contenders contrast triplets", "use contrast=auto", _is_vff),
        "contrast_gradient": Only(("both",), "the PyTorch contenders pass both gradients", "use contrast_gradient=both", _is_vff),
        "negatives": Only(("uniform",), "the PyTorch contenders draw wrong labels uniformly", "use negatives=uniform", _predicts),
        "schedule": JOINT,
        "feature_cache": Only(("none",), "the PyTorch contenders keep no features", "use feature_cache=none"),
        "on_nonfinite": Only(("stop",), "the PyTorch contenders skip no step", "use on_nonfinite=stop"),
        "rematerialise": Only((False,), "the PyTorch contenders keep their maps", "use rematerialise=False"),
    },
)

FLOPS = Known(
    "the counted FLOPs",
    obeyed=(
        *("widths", "pools", "width_factor", "head_grid", "grouping", "frozen_groups", "rule", "rule_options", "labelling"),
        *("copies_per_class", "negatives", "head_weight", "batch_size", "whitening", "auxiliary", "stem", "image_size", "overrides"),
    ),
    immaterial=(
        # The caller gives the shape of an image and the number of classes.
        *("seed", "dataset", "data_dir", "data_on", "devices", "train_examples", "val_fraction", "test_fraction"),
        *("wrong_labels", "init_from"),
        # By the definition in rates.py, only layers, heads and a rule's kernels count: not augmentation, normalisation, losses, optimizers.
        *("flip", "alternating_flip", "crop_padding", "cutout", "pixel_statistics", "noise_scale", "norm", "norm_statistics"),
        *("noise_cell", "noise_kind", "noise_spectrum", "noise_redrawn", "norm_scale", "activation", "initialisation", "decay"),
        *("bias_rate", "look_ahead", "slow_share"),
        *("contrast", "contrast_gradient", "similarity", "margin", "temperature", "temperature_end"),
        *("random_erasing", "trivial_augment", "random_resized_crop", "color_jitter", "mixup"),
        *("label_smoothing", "goodness_threshold", "peer_normalisation"),
        *("on_nonfinite", "optimizer", "learning_rate", "group_decay", "weight_decay", "momentum", "warmup_epochs", "clip_norm"),
        # The FLOPs are those of the model in one step, and not those that a program executes.
        *("epochs", "precision", "rematerialise"),
        # These do not belong to training.
        *("inference", "votes", "views", "eval_batch_size", "checkpoint_every", "checkpoint_seconds", "segment_steps"),
    ),
    only={
        "network": Only((), "the count of FLOPs does not know its layers", "use a network of vffjax", _has_uncounted_layers),
        "schedule": JOINT,
        "feature_cache": Only(("none",), "the FLOPs are counted for groups that train together", "use feature_cache=none"),
    },
)
