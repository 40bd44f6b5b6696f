"""Which keys of the configuration a benchmark obeys. It refuses what it would ignore, so that no figure belongs to another configuration
than its title says.

There are two kinds. `PEER` and `FLOPS` stand for code that does again what the trainer does: the PyTorch networks, and the count of FLOPs.
Their lists name every key that they know; any other key must keep its default, so a new key is refused until somebody lists it. All other
benchmarks hand the configuration to the trainer, which obeys every key; they list only the keys whose values they set themselves.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from vffjax import rules
from vffjax.config import FIELDS, Config
from vffjax.errors import bad_key
from vffjax.networks.layers import ConvLayer, DenseLayer
from vffjax.rules import head, vff
from vffjax.training.plan import groups_of


class Only(NamedTuple):
    """The values of a key that a benchmark takes, and what it says of any other. `matters` tells for which configurations."""

    accepted: tuple[Any, ...]
    problem: str
    fix: str
    matters: Callable[[Config], bool] = lambda config: True


class Known(NamedTuple):
    """What code that does the trainer's work again makes of the keys. Every key is in one of the three."""

    who: str
    obeyed: tuple[str, ...]
    immaterial: tuple[str, ...]  # its result does not depend on them
    only: Mapping[str, Only]

    def check(self, config: Config, otherwise: str = "") -> None:
        """Raises `UserError` for the first key whose value would be ignored; `otherwise` is one more way to mend it."""
        refuse(config, self._unknown() | dict(self.only), otherwise)

    def _unknown(self) -> dict[str, Only]:
        known = {*self.obeyed, *self.immaterial, *self.only}
        return {
            key: Only((default(key),), f"{self.who} do not know this key", f"use {default(key)!r}") for key in FIELDS if key not in known
        }


def default(key: str) -> Any:
    """The value of a key that nobody has set."""
    return getattr(Config(), key)


def refuse(config: Config, only: Mapping[str, Only], otherwise: str = "") -> None:
    """Raises `UserError` for the first key of `only` that has another value than those accepted."""
    for key, rule in only.items():
        if rule.matters(config) and getattr(config, key) not in rule.accepted:
            raise bad_key(key, getattr(config, key), rule.problem, rule.fix + (f", {otherwise}" if otherwise else ""))


def refuse_other_groups(config: Config, groupings: Mapping[str, str], flag: str = "") -> None:
    """Raises `UserError` where keys that count or name groups meet a contender that cuts the network into other groups.

    Args:
        config: the configuration of all contenders.
        groupings: the grouping of each contender, by its name.
        flag: the flag that chooses the contenders, if there is one.
    """
    others = [name for name, grouping in groupings.items() if grouping != config.grouping]
    for key in ("frozen_groups", "overrides"):
        if others and getattr(config, key) != default(key):
            problem = f"means the groups of grouping={config.grouping}, and {others[0]} has grouping={groupings[others[0]]}"
            without = f", or leave {', '.join(others)} out by {flag}" if flag else ""
            raise bad_key(key, getattr(config, key), problem, f"use {default(key)!r}{without}")


JOINT = Only(("joint",), "groups that train one after the other are several programs, not one", "use schedule=joint")
SEEDS = Only((0,), "every run takes its seed from --seeds", "leave it at 0 and give the seed to --seeds")
RANDOM_WEIGHTS = Only(("",), "every contender starts from random weights", "leave it empty")


def _has_other_layers(config: Config) -> bool:
    """Whether the network has layers that are neither plain convolutions nor dense."""
    return not all(isinstance(layer, (ConvLayer, DenseLayer)) for group in groups_of(config, 2) for layer in group.module.layers)


def _owns_parameters(config: Config) -> bool:
    return rules.find(config).parameters is not None


def _is_head(config: Config) -> bool:
    return rules.find(config) is head.RULE


def _is_vff(config: Config) -> bool:
    return rules.find(config) is vff.RULE


def _predicts(config: Config) -> bool:
    return rules.find(config).predicts(config)


PEER = Known(
    "the PyTorch contenders",
    obeyed=(
        *("seed", "dataset", "flip", "crop_padding", "cutout", "pixel_statistics", "widths", "pools", "width_factor", "head_grid"),
        *("noise_scale", "similarity", "margin", "temperature", "head_weight", "label_smoothing", "epochs", "batch_size", "optimizer"),
        *("learning_rate", "group_decay", "weight_decay", "momentum", "warmup_epochs", "clip_norm", "overrides", "precision"),
    ),
    immaterial=(
        *("data_dir", "train_examples", "val_fraction"),  # no data set is read, nothing is held out
        "copies_per_class",  # of labelling=shared
        *("goodness_threshold", "peer_normalisation"),  # of rule=ff
        *(
            "inference",
            "eval_batch_size",
            "checkpoint_every",
            "checkpoint_seconds",
            "segment_steps",
        ),  # nothing is classified, nothing is saved
    ),
    only={
        "network": Only((), "the PyTorch contenders have plain layers alone", "use conv4 or vgg8b", _has_other_layers),
        "stem": Only(("cifar",), "the PyTorch contenders have no ResNet", "use cifar"),
        "alternating_flip": Only((False,), "the PyTorch contenders flip by chance", "use alternating_flip=False"),
        "image_size": Only((0,), "the PyTorch contenders do not resize images", "use image_size=0"),
        "norm": Only(("auto", "batch"), "the PyTorch contenders normalise by batch alone", "use norm=auto"),
        "norm_statistics": Only(("batch",), "the PyTorch contenders train by the batch's statistics alone", "use norm_statistics=batch"),
        "frozen_groups": Only((0,), "the PyTorch contenders train every group", "use frozen_groups=0"),
        "init_from": RANDOM_WEIGHTS,
        "rule": Only(("vff", "head"), "the PyTorch contenders have no such rule", "use rule=vff or rule=head"),
        "rule_options": Only(({},), "the PyTorch contenders know no options of a rule", "leave it empty"),
        "grouping": Only(("all",), "the head loss alone is back-propagation through one group in PyTorch", "use grouping=all", _is_head),
        "labelling": Only(("triplet",), "the PyTorch contenders have a right and a wrong copy of each image", "use triplet", _is_vff),
        "contrast": Only(("auto", "triplet"), "the PyTorch contenders contrast triplets", "use contrast=auto", _is_vff),
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
        *("widths", "pools", "width_factor", "head_grid", "grouping", "frozen_groups", "rule_options", "labelling"),
        *("copies_per_class", "negatives", "head_weight", "batch_size"),
    ),
    immaterial=(
        *("seed", "dataset", "data_dir", "train_examples", "val_fraction", "init_from"),  # the caller gives image shape and classes
        *(
            "flip",
            "alternating_flip",
            "crop_padding",
            "cutout",
            "pixel_statistics",
            "noise_scale",
        ),  # images count nothing until the first layer has them
        *("norm", "norm_statistics", "contrast", "similarity", "margin", "temperature", "label_smoothing"),  # nor do these, see rates.py
        *("goodness_threshold", "peer_normalisation", "on_nonfinite"),
        *("optimizer", "learning_rate", "group_decay", "weight_decay", "momentum", "warmup_epochs", "clip_norm", "overrides"),
        *("epochs", "precision", "rematerialise"),  # the model's FLOPs of one step, not those that a program executes
        *("inference", "eval_batch_size", "checkpoint_every", "checkpoint_seconds", "segment_steps"),  # not of training
    ),
    only={
        "network": Only((), "the count of FLOPs knows plain layers alone", "use conv4 or vgg8b", _has_other_layers),
        "stem": Only(("cifar",), "the count of FLOPs has no ResNet", "use cifar"),
        "image_size": Only((0,), "the count of FLOPs does not resize images", "use image_size=0"),
        "rule": Only((), "the count of FLOPs knows no parameters that a rule owns", "use another rule", _owns_parameters),
        "schedule": JOINT,
        "feature_cache": Only(("none",), "the count of FLOPs is of groups that train together", "use feature_cache=none"),
    },
)
