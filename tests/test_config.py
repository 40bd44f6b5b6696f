"""Configuration: files that come with the library, keys, types, ranges, rules between keys, and what is said about bad ones."""

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Mapping

import jax
import ml_collections
import pytest

from command_lines import ROOT
from oracles import slow_but
from vffjax import config as config_module
from vffjax import rules, synonyms
from vffjax.cli.config_file import load_config_file
from vffjax.config import ARGUMENTS, FIELDS, Config, default_config, for_group, key_like, of_program
from vffjax.errors import UserError
from vffjax.keys import value_of
from vffjax.networks.groups import init_variables
from vffjax.registry import SOURCES
from vffjax.rules import vff
from vffjax.training.checks import check_against_data, from_json, make_config
from vffjax.training.plan import make_plan

# Image shape, classes and training images of each set, from the sets' own descriptions.
SIZES = {
    "digits": ((8, 8, 1), 10, 1437),
    "synthetic": ((16, 16, 3), 10, 2_000),
    "mnist": ((28, 28, 1), 10, 60_000),
    "fashion_mnist": ((28, 28, 1), 10, 60_000),
    "cifar10": ((32, 32, 3), 10, 50_000),
    "cifar100": ((32, 32, 3), 100, 50_000),
    "folder": ((64, 64, 3), 3, 1_000),  # images of your own
}


def variants_of(path):
    space = {"__name__": "config_file"}
    exec(compile(path.read_bytes(), str(path), "exec"), space)
    return [f"{path}:{variant}" for variant in space["VARIANTS"]] if "VARIANTS" in space else [str(path)]


FILES = [given for path in sorted((ROOT / "configs").glob("*.py")) for given in variants_of(path)]


def refused(raw, *parts):
    """`raw` must be refused in one line that holds all `parts`."""
    with pytest.raises(UserError) as caught:
        make_config(raw)
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    "given",
    slow_but(FILES, *(given for given in FILES if not re.search("resnet|vgg|finetune", given))),
    ids=lambda given: pathlib.Path(given).name,
)
def test_every_configuration_file_is_valid_and_builds_its_groups(given):
    config = make_config(load_config_file(given)[0])
    shape, classes, images = SIZES[config.dataset]
    images = config.train_examples or images
    plan = make_plan(config, images, classes)
    check_against_data(plan, images - round(config.val_fraction * images), shape)
    # Traced, not run: a model of a hundred megabytes costs nothing here.
    for params, _ in jax.eval_shape(lambda: init_variables(plan.groups, jax.random.key(0), shape)):
        assert params["head"]["kernel"].shape[1] == classes


def test_there_are_configuration_files():
    # Else the test above would run on nothing.
    assert {"digits.py", "cifar10.py"} <= {path.name for path in (ROOT / "configs").glob("*.py")}
    assert len(FILES) > len(list((ROOT / "configs").glob("*.py")))  # some have variants


def test_every_data_set_has_sizes_here_and_in_the_library():
    known = {name: sizes for name in SOURCES.names if not callable(sizes := SOURCES.find(name).sizes)}
    assert {name: (s.image_shape, s.classes, s.train_images) for name, s in known.items()} == {
        n: s for n, s in SIZES.items() if n != "folder"
    }


def test_the_defaults_are_valid():
    assert make_config({}) == make_config(default_config()) == Config()


@pytest.mark.parametrize("key", FIELDS)
def test_every_key_has_a_documentation_and_a_default_in_its_range(key):
    meta = FIELDS[key].metadata
    assert len(meta["doc"]) > 10
    default = getattr(Config(), key)
    assert not meta["choices"] or default in meta["choices"]
    assert meta["low"] is None or default >= meta["low"]
    assert meta["high"] is None or default <= meta["high"]


def test_what_other_programs_call_a_key_leads_to_it():
    assert set(synonyms.KEYS.values()) <= set(FIELDS)
    assert not set(synonyms.KEYS) & set(FIELDS)
    assert [key_like(word) for word in ("lr", "wd", "BS", "batch-size", "warmup", "epoch", "device", "gpus")] == [
        *("learning_rate", "weight_decay", "batch_size", "batch_size", "warmup_epochs", "epochs", "devices", "devices")
    ]
    assert {key_like(word) for word in ("dropout", "num_workers", "betas", "patience", "steps", "x", "")} == {""}


def test_an_unknown_key_is_refused_with_the_nearest_one():
    refused({"epoch": 3}, "config.epoch=3", "no such key", "did you mean config.epochs?")
    refused({"zzz": 3}, "config.zzz=3", "no such key", "--help")


def test_a_configuration_file_cannot_invent_a_key():
    with pytest.raises(AttributeError):
        default_config().epoch = 3


BELOW = {int: 1, float: 0.01}


@pytest.mark.parametrize(("key", "limit"), [(k, m) for k in FIELDS for m in ("low", "high") if FIELDS[k].metadata[m] is not None])
def test_every_limit_is_kept_and_named(key, limit):
    value, kind = FIELDS[key].metadata[limit], type(FIELDS[key].default)
    step = BELOW[kind] * max(1, abs(value))
    beyond = kind(value + (step if limit == "high" else -step))
    refused({key: beyond}, f"config.{key}={beyond!r}", str(value), "too large" if limit == "high" else "too small")
    # The limit itself is allowed, as far as this check goes.
    assert value_of(FIELDS[key], kind(value), key) == value


@pytest.mark.parametrize("key", [key for key in FIELDS if FIELDS[key].metadata["choices"]])
def test_every_choice_is_kept_and_all_are_named(key):
    choices = FIELDS[key].metadata["choices"]
    refused({key: choices[0] + "x"}, f"config.{key}='{choices[0]}x'", f"did you mean '{choices[0]}'", ", ".join(choices))


@pytest.mark.parametrize("key", [key for key in FIELDS if isinstance(FIELDS[key].default, float)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_must_be_finite(key, value):
    refused({key: value}, f"config.{key}={value}", "finite")


TYPES = [
    ("epochs", "many"),
    ("epochs", 1.5),
    ("epochs", True),
    ("epochs", None),
    ("learning_rate", "fast"),
    ("learning_rate", True),
    ("flip", 1),
    ("dataset", 3),
    ("widths", 3),
    ("widths", ()),
    ("widths", (1.5,)),
    ("widths", (True,)),
    ("widths", "16"),
    ("overrides", [1]),
]


@pytest.mark.parametrize(("key", "value"), TYPES, ids=str)
def test_a_value_of_the_wrong_type_is_refused(key, value):
    refused({key: value}, f"config.{key}={value!r}", "give ")


def test_whole_numbers_are_taken_for_real_ones():
    config = make_config({"learning_rate": 1, "overrides": {"group0": {"learning_rate": 2}}})
    assert (config.learning_rate, type(config.learning_rate)) == (1.0, float)
    assert type(config.overrides["group0"]["learning_rate"]) is float


CONV = {"network": "conv4", "widths": (4, 4, 6, 6)}
TOGETHER = {
    "a width below 1": ({"widths": (4, 0)}, "config.widths=(4, 0)"),
    "features cached while all train": ({"feature_cache": "device"}, "config.feature_cache='device'"),
    "features cached of augmented images": (
        {"feature_cache": "host", "schedule": "sequential", "flip": True},
        "config.feature_cache='host'",
    ),
    "features cached of mixed images": (
        {"feature_cache": "device", "schedule": "sequential", "mixup": 0.2},
        "config.feature_cache='device'",
    ),
    "alternating flips without flips": ({"alternating_flip": True}, "config.alternating_flip=True"),
    "conv4 with three widths": ({"network": "conv4", "widths": (4, 4, 6)}, "config.widths=(4, 4, 6)"),
    "conv4 with three pools": (CONV | {"pools": (1, 2, 1)}, "config.pools=(1, 2, 1)"),
    "a pool below 1": (CONV | {"pools": (1, 0, 1, 1)}, "config.pools=(1, 0, 1, 1)"),
    "conv with more widths than pools": ({"network": "conv", "widths": (4,) * 6}, "config.pools=(1, 2, 1, 2)"),
    "conv with fewer widths than pools": ({"network": "conv", "widths": (4,)}, "config.pools=(1, 2, 1, 2)"),
    "conv with a pool below 1": ({"network": "conv", "widths": (4, 4), "pools": (1, 0)}, "config.pools=(1, 0)"),
    "a warm-up longer than the run": ({"epochs": 2, "warmup_epochs": 2.5}, "config.warmup_epochs=2.5"),
    "a group's warm-up longer than the run": (
        {"epochs": 2, "overrides": {"group1": {"warmup_epochs": 2.5}}},
        "config.overrides.group1.warmup_epochs=2.5",
    ),
    "smooth noise with the images' spectrum": ({"noise_spectrum": "images", "noise_cell": 2}, "config.noise_cell=2"),
    "signs with the images' spectrum": ({"noise_spectrum": "images", "noise_kind": "signs"}, "config.noise_kind='signs'"),
    "a temperature that ends too near 0": ({"temperature_end": 1e-5}, "config.temperature_end=1e-05"),
    "a group's temperature that ends too near 0": (
        {"overrides": {"group1": {"temperature_end": 1e-5}}},
        "config.overrides.group1.temperature_end=1e-05",
    ),
    "goodness behind a batch statistic": ({"rule": "ff", "norm": "batch"}, "config.norm='batch'"),
    "a sweep over labels never seen": ({"rule": "head", "inference": "sweep"}, "config.inference='sweep'"),
    "an override of no group": ({"overrides": {"first": {}}}, "config.overrides.first={}"),
    "an override of a group with a leading zero": ({"overrides": {"group01": {}}}, "config.overrides.group01={}"),
    "an override that is no dictionary": ({"overrides": {"group0": 3}}, "config.overrides.group0=3"),
    "an override of what belongs to the run": ({"overrides": {"group0": {"epochs": 3}}}, "config.overrides.group0.epochs=3"),
    "an override out of range": ({"overrides": {"group0": {"momentum": 2.0}}}, "config.overrides.group0.momentum=2.0"),
    "an override of the wrong type": ({"overrides": {"group0": {"momentum": "x"}}}, "config.overrides.group0.momentum='x'"),
    "an override of no choice": ({"overrides": {"group0": {"optimizer": "adam"}}}, "config.overrides.group0.optimizer='adam'"),
}


@pytest.mark.parametrize(("raw", "named"), TOGETHER.values(), ids=TOGETHER.keys())
def test_values_that_do_not_go_together_are_refused(raw, named):
    refused(raw, named, "; ")


def test_what_conv_needs_is_said_with_an_example():
    refused({"network": "conv", "widths": (4,) * 3}, "conv with 3 widths needs 3 windows of at least 1", "(1, 2, 1)")
    refused({"network": "conv4", "widths": (4,) * 6}, "conv4 has 4 layers, not 6", "use network=conv")
    assert make_config({"network": "conv", "widths": (4,) * 3, "pools": (1, 2, 1)}).pools == (1, 2, 1)


AGAINST_DATA = {
    "a batch larger than the data": ({"batch_size": 101}, "config.batch_size=101", "use at most 100"),
    "pools that leave nothing": (CONV | {"pools": (2, 2, 2, 2)}, "config.pools=(2, 2, 2, 2)", "smaller windows"),
    "pools of conv that leave nothing": ({"network": "conv", "widths": (4, 4), "pools": (3, 3)}, "config.pools=(3, 3)", "smaller windows"),
    "a cutout larger than the image": ({"cutout": 9}, "config.cutout=9", "use at most 8"),
    "scores by parameters that never learn": (
        {"rule": "mono_forward", "inference": "rule", "frozen_groups": 1},
        "config.inference='rule'",
        "set config.init_from",
    ),
    "noise of one point": ({"noise_cell": 8}, "config.noise_cell=8", "use at most 4"),
    "label pixels that the network would blur": (CONV | {"rule": "ff", "image_size": 4}, "config.image_size=4", "at least 8"),
    "more classes than label pixels": ({"rule": "ff"}, "config.rule='ff'", "33 label pixels"),
    "an override of a group that is not there": ({"overrides": {"group3": {}}}, "config.overrides.group3={}", "group0 to group2"),
}


@pytest.mark.parametrize(("raw", "named", "fix"), AGAINST_DATA.values(), ids=AGAINST_DATA.keys())
def test_what_does_not_fit_the_data_is_refused(raw, named, fix):
    with pytest.raises(UserError) as caught:
        plan = make_plan(make_config({"batch_size": 100, "grouping": "layer"} | raw), 100, 33 if raw == {"rule": "ff"} else 10)
        check_against_data(plan, 100, (8, 8, 1))
    assert named in str(caught.value)
    assert fix in str(caught.value)


PROBED = {"rule": "mono_forward", "inference": "rule", "frozen_groups": 1, "init_from": "w.safetensors"}


def test_what_just_fits_the_data_is_allowed():
    raw = CONV | {"pools": (2, 2, 2, 1), "batch_size": 100, "cutout": 8, "rule": "ff", "overrides": {"group2": {}}}
    check_against_data(make_plan(make_config(raw | {"grouping": "layer"}), 100, 32), 100, (8, 8, 1))
    for more in ({"image_size": 8}, {"rule": "head", "image_size": 4, "noise_cell": 8}, {"rule": "vff", "noise_cell": 7}, PROBED):
        check_against_data(make_plan(make_config(CONV | {"batch_size": 100} | more), 100, 10), 100, (8, 8, 1))


def test_overrides_change_their_group_alone():
    config = make_config({"momentum": 0.5, "overrides": {"group1": {"momentum": 0.1, "optimizer": "sgd"}}})
    assert (for_group(config, 1).momentum, for_group(config, 1).optimizer) == (0.1, "sgd")
    assert for_group(config, 0) == for_group(config, 11) == config


def test_a_configuration_survives_json():
    raw = {"widths": (3, 2), "learning_rate": 0.1, "flip": True, "overrides": {"group1": {"learning_rate": 1e-4}}}
    config = make_config(raw)
    assert from_json(json.loads(json.dumps(config.to_dict())), "config.json") == config
    assert set(config.to_dict()) == set(FIELDS)


def test_what_json_holds_is_checked_and_its_file_named():
    with pytest.raises(UserError, match=r"^runs/x/config\.json: config\.epochs=0"):
        from_json({"epochs": 0}, "runs/x/config.json")


def test_a_configuration_cannot_be_changed_afterwards():
    raw = {"overrides": {"group0": {"momentum": 0.1}}}
    config = make_config(raw)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.epochs = 3
    raw["overrides"]["group0"]["momentum"] = 0.2
    config.to_dict()["overrides"]["group0"]["momentum"] = 0.3
    assert config.overrides["group0"]["momentum"] == 0.1


def test_a_config_dict_and_a_dictionary_make_the_same():
    raw = {"epochs": 3, "widths": (4, 3), "overrides": {"group0": {"momentum": 0.1}}}
    assert make_config(ml_collections.ConfigDict(raw)) == make_config(raw)


@pytest.mark.parametrize(
    ("raw", "norm", "contrast"),
    [({}, "batch", "in_batch"), ({"rule": "ff"}, "input", "in_batch"), ({"labelling": "triplet", "norm": "none"}, "none", "triplet")],
)
def test_auto_means_what_its_documentation_says(raw, norm, contrast):
    config = make_config(raw)
    assert (rules.norm_of(config), vff.in_batch(config)) == (norm, contrast == "in_batch")


# ----------------------------------------------------------------------------------------------------------------------------------
# The configuration as compiled programs see it

# None of the numbers is 0, which takes some of them out of a program.
NONZERO = make_config(dict.fromkeys(ARGUMENTS, 0.5) | {"clip_norm": 1.0, "seed": 3, "overrides": {"group0": {"margin": 0.1}}})


def other_value(value):
    """Another value of the same type; that it is not known does not matter here."""
    if isinstance(value, Mapping):
        return {"group0": {"optimizer": "sgd"}}
    if isinstance(value, tuple):
        return (*value, 1)
    if isinstance(value, str):
        return value + "other"
    return not value if isinstance(value, bool) else value + 1


def changed(config, **changes):
    return dataclasses.replace(config, **changes)


@pytest.mark.parametrize("key", FIELDS)
def test_programs_are_equal_but_for_keys_that_they_know(key):
    config = changed(NONZERO, **{key: other_value(getattr(NONZERO, key))})
    assert config != NONZERO
    one, other = of_program(NONZERO), of_program(config)
    alike = key in (*config_module._OUTSIDE, *ARGUMENTS)
    assert (one == other) == alike
    assert not alike or hash(one) == hash(other)
    assert of_program(one) == one  # once more changes nothing


@pytest.mark.parametrize("key", ARGUMENTS)
def test_a_number_is_nan_in_a_program_and_0_where_it_takes_a_part_out(key):
    assert math.isnan(getattr(of_program(NONZERO), key))
    without = of_program(changed(NONZERO, **{key: 0.0}))
    switch = key in ("clip_norm", "head_weight", "peer_normalisation")
    assert (without != of_program(NONZERO)) == switch
    assert getattr(without, key) == 0 if switch else math.isnan(getattr(without, key))


def test_keys_that_no_program_knows_have_their_defaults_there():
    config = of_program(make_config({"seed": 7, "dataset": "mnist", "epochs": 3, "noise_scale": 1.0, "group_decay": 0.5}))
    assert (config.seed, config.dataset, config.epochs, config.noise_scale, config.group_decay) == (0, "digits", 10, 3.0, 1.0)
    assert of_program(make_config({"eval_batch_size": 7})).eval_batch_size == 7


OVERRIDES = {
    "none": ({}, True),
    "another number": ({"group0": {"margin": 0.3}, "group1": {"temperature": 2.0, "learning_rate": 0.0}}, True),
    "a warm-up": ({"group2": {"warmup_epochs": 1.0}}, True),
    "what is configured anyway": ({"group0": {"optimizer": "adamw"}}, True),
    "another optimizer": ({"group1": {"optimizer": "sgd"}}, False),
    "a part taken out": ({"group1": {"head_weight": 0.0}}, False),
    "another weight of a part": ({"group1": {"head_weight": 0.1, "clip_norm": 9.0}}, True),
}


@pytest.mark.parametrize(("overrides", "alike"), OVERRIDES.values(), ids=OVERRIDES)
def test_overrides_make_another_program_only_where_the_program_is_another(overrides, alike):
    assert (of_program(changed(NONZERO, overrides=overrides)) == of_program(changed(NONZERO, overrides={}))) == alike


def test_a_group_of_a_program_sees_its_own_parts():
    program = of_program(changed(NONZERO, overrides={"group1": {"head_weight": 0.0, "optimizer": "sgd", "margin": 0.1}}))
    first, second = (for_group(program, i) for i in range(2))
    assert math.isnan(first.head_weight) and second.head_weight == 0
    assert (first.optimizer, second.optimizer) == ("adamw", "sgd")
    assert math.isnan(second.margin)
