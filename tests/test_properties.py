"""Random valid configurations are accepted, build, take a finite step and keep their groups apart; one bad value is refused by name.

The same examples in every run. VFFJAX_EXAMPLES=10 makes ten times as many.
"""

import dataclasses
import functools
import json
import os
import tempfile

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from oracles import leaves, quick_jit, small_run
from vffjax.config import FIELDS, OVERRIDABLE, Config, for_group
from vffjax.data import sizes_of
from vffjax.data.load import split_sizes
from vffjax.errors import UserError
from vffjax.proofs import locality
from vffjax.registry import RULES, SOURCES
from vffjax.training.checks import AUGMENTATIONS, check_against_data, from_json, make_config
from vffjax.training.plan import groups_of, make_plan
from vffjax.training.trainer import train_step

hypothesis.configuration.set_hypothesis_home_dir(tempfile.gettempdir())  # no folder of its own in the checkout
MORE = int(os.environ.get("VFFJAX_EXAMPLES", "1"))
CLASSES, SHAPE = 3, (8, 8, 2)


def examples(count):
    return hypothesis.settings(
        max_examples=count * MORE,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
        print_blob=False,
        phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],  # a compiled example is not made smaller for minutes
    )


def between(low, high):
    return st.floats(low, high, allow_nan=False, width=32)


# Keys that depend on no other. Those with choices and the truths take each of their values.
FREE = {
    "seed": st.integers(0, 2**31 - 1),
    "train_examples": st.sampled_from([0, 300]),
    "val_fraction": st.one_of(st.just(0.0), between(0.0625, 0.5)),
    "wrong_labels": st.one_of(st.just(0.0), between(0.0625, 1)),
    "crop_padding": st.integers(0, 2),
    "cutout": st.integers(0, 4),
    "random_erasing": between(0, 1),
    "mixup": st.one_of(st.just(0.0), between(0.125, 10)),
    "head_grid": st.integers(1, 5),
    "noise_scale": between(0, 50),
    "noise_cell": st.integers(1, 4),
    "bias_rate": between(0, 10),
    "look_ahead": st.integers(0, 3),
    "slow_share": between(0, 0.9375),
    "auxiliary": st.lists(st.integers(1, 4), max_size=2).map(tuple),
    "copies_per_class": st.integers(1, 3),
    "margin": between(-2, 2),
    "temperature": between(0.0001220703125, 10),
    "temperature_end": st.one_of(st.just(0.0), between(0.0001220703125, 10)),
    "head_weight": between(0, 5),
    "label_smoothing": between(0, 0.984375),
    "goodness_threshold": between(0, 5),
    "peer_normalisation": between(0, 5),
    "epochs": st.integers(1, 50),
    "batch_size": st.integers(4, 12),
    "learning_rate": between(0.0009765625, 2),
    "weight_decay": between(0, 2),
    "momentum": between(0, 0.984375),
    "clip_norm": st.one_of(st.just(0.0), between(0.0078125, 10)),
    "eval_batch_size": st.integers(1, 1000),
    "devices": st.integers(0, 1),
    "checkpoint_every": st.integers(1, 100),
    "segment_steps": st.integers(0, 100),
    "checkpoint_seconds": st.sampled_from([0.0, 0.5, 1e3]),
    "dataset": st.sampled_from([name for name in SOURCES.names if not callable(SOURCES.find(name).sizes)]),
    "test_fraction": between(0.015625, 0.5),
    "random_resized_crop": between(0, 1),
    "color_jitter": between(0, 1),
}


NOT_DRAWN = ("network", "stem", "norm_statistics", "pixel_statistics", "width_factor", "image_size")
NOT_DRAWN += ("group_decay", "frozen_groups", "head_grid")


RECORDS = {name: RULES.find(name) for name in RULES.names}
# The type checker of conftest.py draws which item of a tuple it looks at, also while a strategy makes a configuration.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")


def fits(name, widths, classes):
    """Whether a rule takes groups of these widths, such as one channel for each class."""
    try:
        RECORDS[name].check_data(Config(rule=name), (28, 28, 1), classes, widths)
    except UserError:
        return False
    return True


@st.composite
def valid(draw):
    """A dictionary of every key that makes a valid configuration of a tiny network, for images of at least 8x8 pixels."""
    raw = {key: getattr(Config(), key) for key in FIELDS}
    for key, field in FIELDS.items():
        if key in FREE:
            raw[key] = draw(FREE[key])
        elif field.metadata["choices"]:
            raw[key] = draw(st.sampled_from(field.metadata["choices"]))
        elif isinstance(field.default, bool):
            raw[key] = draw(st.booleans())
    # Published networks are too large for a property; frozen statistics need a file, ImageNet's pixels colours.
    raw |= {"network": draw(st.sampled_from(["mlp", "conv4", "conv", "cifarnet"])), "stem": "cifar"}
    raw |= {"norm_statistics": "batch", "pixel_statistics": "data"}
    raw["whitening"] = 0 if raw["network"] == "mlp" else draw(st.integers(0, 2))
    raw["auxiliary"] = () if raw["network"] == "mlp" else raw["auxiliary"]
    count = 4 if raw["network"] == "conv4" else draw(st.integers(1, 4))
    raw["widths"] = draw(st.tuples(*[st.integers(1, 6)] * count))
    raw["widths"] = raw["widths"][:2] if raw["network"] == "cifarnet" else raw["widths"]
    pools = st.tuples(*[st.integers(1, 3)] * count).filter(lambda pools: np.prod(pools) <= 7)
    raw["pools"] = draw(pools) if raw["network"] in ("conv", "conv4") else (1, 2, 1, 2)
    raw["warmup_epochs"] = draw(between(0, raw["epochs"]))
    raw["rule"] = draw(st.sampled_from([name for name in RECORDS if fits(name, raw["widths"], CLASSES)]))
    rule = RECORDS[raw["rule"]]
    raw["rule_options"] = dataclasses.asdict(rule.options())
    if rule.norm != "batch":
        raw["norm"] = draw(st.sampled_from(["auto", rule.norm]))
    ways = ["heads"] + ["sweep"] * (rule.fits is not None) + ["rule"] * (rule.scores is not None)
    raw["inference"] = draw(st.sampled_from(ways))
    contrast = raw["contrast"] if raw["contrast"] != "auto" else {"shared": "in_batch", "triplet": "triplet"}[raw["labelling"]]
    if raw["labelling"] == "shared" and contrast == "in_batch":
        raw["negatives"] = "uniform"
    if raw["noise_spectrum"] == "images":
        raw |= {"noise_cell": 1, "noise_kind": "normal"}
    if raw["schedule"] != "sequential":
        raw["feature_cache"] = "none"
    if raw["schedule"] == "pipeline":
        raw["negatives"] = "uniform"
    if raw["feature_cache"] != "none":
        raw |= {key: getattr(Config(), key) for key in AUGMENTATIONS}
    raw["alternating_flip"] &= raw["flip"]
    groups = len(groups_of(make_config(raw), CLASSES))
    names = st.sampled_from([f"group{i}" for i in range(groups)])
    strategies = {key: FREE[key] for key in OVERRIDABLE if key in FREE} | {"optimizer": st.sampled_from(["adamw", "sgd"])}
    raw["overrides"] = draw(st.dictionaries(names, st.fixed_dictionaries({}, optional=strategies), max_size=2))
    return raw


def back_propagates(config):
    """Whether one group holds several layers that learn: by `grouping=all`, or because one width or one block is all there is."""
    return len(groups_of(config, CLASSES)) == 1 and len(widths_of(config)) > 1


def widths_of(config):
    """Of the layers that learn."""
    return tuple(width for width in config.widths for _ in range(2 if config.network == "cifarnet" else 1))


@pytest.mark.slow
@examples(150)
@hypothesis.given(valid())
def test_a_valid_configuration_is_accepted_survives_json_and_builds(raw):
    config = make_config(raw)
    assert all(getattr(config, key) == raw[key] for key in FIELDS)
    assert from_json(json.loads(json.dumps(config.to_dict())), "config.json") == config
    sizes = sizes_of(config)
    hypothesis.assume(fits(config.rule, config.widths, sizes.classes))
    plan = make_plan(config, split_sizes(config, sizes.train_images)[0], sizes.classes)
    check_against_data(plan, split_sizes(config, sizes.train_images)[0], sizes.image_shape)
    assert tuple(layer.width for group in plan.groups for layer in group.module.layers if layer.learns) == widths_of(config)
    assert config.grouping in ("width", "block") or len(plan.groups) == (1 if config.grouping == "all" else len(widths_of(config)))
    for group, override in config.overrides.items():
        assert {key: getattr(for_group(config, int(group[5:])), key) for key in override} == override


@pytest.mark.slow
def test_the_strategy_reaches_every_key_and_every_choice():
    seen = {key: set() for key in FIELDS}

    @examples(400)
    @hypothesis.given(valid())
    def look(raw):
        for key, value in raw.items():
            seen[key].add(str(value))

    look()
    for key, field in FIELDS.items():
        if key in NOT_DRAWN:
            continue
        wanted = set(field.metadata["choices"]) or ({"True", "False"} if isinstance(field.default, bool) else set())
        assert wanted <= seen[key], key
        assert len(seen[key]) > 1 or isinstance(field.default, str), key


@pytest.mark.slow
@examples(12)
@hypothesis.given(valid(), st.integers(0, 3))
def test_a_step_is_finite_and_groups_are_isolated(raw, stage):
    config = make_config(raw | {"dataset": "digits"})
    run = small_run(config, CLASSES, SHAPE)
    active = stage % len(run.plan.groups) if config.schedule == "sequential" else None
    step = quick_jit(functools.partial(train_step, run.plan.program, active))
    new, metrics = step(run.task, run.states, run.batch())
    assert np.isfinite(metrics["loss"]).all()
    assert bool(jnp.all(metrics["finite"]))
    for name, leaf in leaves(new):
        assert np.isfinite(leaf).all(), name
    if fits(raw["rule"], raw["widths"], 10):  # digits has ten classes
        found = locality.certify(config, numeric=False)
        assert found["local"] == (not back_propagates(config)), found["violations"]


# ----------------------------------------------------------------------------------------------------------------------------------
# One bad value

ODD = [None, b"x", 1j, {1}, object, ("x",), {"a": 1}, [1.5], (True,)]
TEXT = st.text(max_size=20)


def wrong_type(key):
    kind = dict if key in ("overrides", "rule_options") else type(FIELDS[key].default)
    numbers = [] if kind in (int, float) else [3, 0.5]
    return st.sampled_from(
        [value for value in [*ODD, *numbers, 0.5 if kind is int else "x"] if not isinstance(value, kind) or kind is tuple]
    )


def out_of_range(key):
    """Beyond the limits, or not a number, or not among the choices."""
    field = FIELDS[key]
    low, high = (field.metadata[limit] for limit in ("low", "high"))
    if field.metadata["choices"]:
        return TEXT.filter(lambda text: text not in field.metadata["choices"])
    if isinstance(field.default, float):
        beyond = [st.just(float("nan")), st.sampled_from([float("inf"), -float("inf"), 10**400])]
        beyond += [] if low is None else [st.floats(max_value=low, exclude_max=True)]
        beyond += [] if high is None else [st.floats(min_value=high, exclude_min=True)]
        return st.one_of(beyond)
    if isinstance(field.default, int) and not isinstance(field.default, bool):
        beyond = [st.integers(max_value=low - 1)] + ([] if high is None else [st.integers(min_value=high + 1), st.just(10**5_000)])
        return st.one_of(beyond)
    if isinstance(field.default, tuple):
        empty = [st.just(())] if field.default else []
        return st.one_of(*empty, st.lists(st.integers(max_value=0), min_size=1), st.just("(1, 2)"))
    if isinstance(field.default, str):
        return st.tuples(TEXT, st.sampled_from("\0\n\x1b\x7f\x9b"), TEXT).map("".join)
    return wrong_type(key)


@st.composite
def one_override(draw):
    """Overrides with one mistake, and what must be named."""
    key = draw(st.sampled_from(OVERRIDABLE))
    return draw(
        st.one_of(
            st.tuples(st.one_of(TEXT.filter(lambda t: not t.startswith("group")), st.integers(), st.just("group01")), st.just({})).map(
                lambda pair: ({pair[0]: pair[1]}, "config.overrides.")
            ),
            st.sampled_from([3, None, "x", [1]]).map(lambda value: ({"group0": value}, "config.overrides.group0=")),
            TEXT.filter(lambda t: t not in OVERRIDABLE).map(lambda text: ({"group0": {text: 1}}, "config.overrides.group0.")),
            out_of_range(key).map(lambda value: ({"group0": {key: value}}, f"config.overrides.group0.{key}=")),
        )
    )


@st.composite
def invalid(draw):
    """A valid dictionary with one value wrong, and what the error must name."""
    raw = draw(valid())
    kind = draw(st.sampled_from(["type", "type", "range", "range", "range", "key", "override", "together"]))
    if kind == "key":
        key = draw(
            st.one_of(TEXT, st.integers(), st.sampled_from(list(FIELDS)).map(lambda key: key + "s")).filter(lambda key: key not in FIELDS)
        )
        return raw | {key: 1}, "no such key"
    if kind == "override":
        wrong, named = draw(one_override())
        return raw | {"overrides": wrong}, named
    if kind == "together":
        changes, key = draw(st.sampled_from(TOGETHER))
        return raw | changes, f"config.{key}="
    key = draw(st.sampled_from(list(FIELDS)))
    if key == "pools" and raw["network"] == "mlp" and kind == "range":
        raw |= {"network": "conv", "pools": (1,) * len(raw["widths"])}
    value = draw(wrong_type(key) if kind == "type" else out_of_range(key))
    return raw | {key: value}, f"config.{key}="


SAFE = {
    "rule": "vff",
    "rule_options": {},
    "norm": "auto",
    "inference": "heads",
    "negatives": "uniform",
    "schedule": "joint",
    "feature_cache": "none",
}
TOGETHER = [
    (SAFE | {"network": "conv4", "widths": (4, 4, 4)}, "widths"),
    (SAFE | {"network": "conv", "widths": (4, 4), "pools": (1,)}, "pools"),
    (SAFE | {"feature_cache": "device"}, "feature_cache"),
    (SAFE | {"schedule": "pipeline", "feature_cache": "device"}, "feature_cache"),
    (SAFE | {"schedule": "sequential", "feature_cache": "host", "flip": True}, "feature_cache"),
    (SAFE | {"schedule": "sequential", "feature_cache": "host", "flip": False, "mixup": 1.0}, "feature_cache"),
    (SAFE | {"flip": False, "alternating_flip": True}, "alternating_flip"),
    (SAFE | {"epochs": 1, "warmup_epochs": 1.5, "overrides": {}}, "warmup_epochs"),
    (SAFE | {"epochs": 1, "warmup_epochs": 0.5, "overrides": {"group0": {"warmup_epochs": 2.0}}}, "overrides.group0.warmup_epochs"),
    (SAFE | {"rule": "ff", "norm": "layer"}, "norm"),
    (SAFE | {"labelling": "shared", "contrast": "auto", "negatives": "hard"}, "negatives"),
    (SAFE | {"rule": "head", "inference": "sweep"}, "inference"),
    (SAFE | {"init_from": "weights.npz"}, "init_from"),
    (SAFE | {"network": "mlp", "widths": (2**16 + 1,)}, "widths"),
    (SAFE | {"network": "mlp", "widths": (1,) * 1_001}, "widths"),
]


@pytest.mark.slow
@examples(300)
@hypothesis.given(invalid())
def test_one_bad_value_is_refused_by_name(case):
    raw, named = case
    with pytest.raises(UserError) as caught:
        make_config(raw)
    message = str(caught.value)
    assert named in message
    assert "\n" not in message
    assert message.startswith("config.")
    assert "; " in message
    assert len(message) < 1_000
