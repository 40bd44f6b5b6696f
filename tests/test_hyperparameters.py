"""The numbers by which groups train: their course over a run, their values by group, and that programs read nothing else."""

import dataclasses
import functools
import sys

import jax
import numpy as np
import optax
import pytest

from oracles import CONV, MLP, assert_close, assert_same, config_of, differs, quick_jit, slow_but, small_run
from vffjax import config as config_module
from vffjax.config import ARGUMENTS, FIELDS, Config
from vffjax.costs import memory, targets
from vffjax.data import sizes_of
from vffjax.hyperparameters import HyperParameters, at_peak, in_epoch, learning_rate
from vffjax.training import scores as inference
from vffjax.training import trainer
from vffjax.training.batch import abstract_batch
from vffjax.training.plan import make_plan
from vffjax.training.trainer import train_step
from vffjax.uses.early_exit import make_early_exit, votes_of

STEPS = 5  # of an epoch


@pytest.mark.parametrize("warmup", [0.0, 0.6, 2.0, 4.0])
def test_the_rate_is_optax_s_warm_up_and_cosine(warmup):
    config = config_of(learning_rate=0.3, epochs=4, warmup_epochs=warmup)
    warmup_steps = min(round(warmup * STEPS), 4 * STEPS - 1)  # a warm-up to the end leaves one step to decay in
    schedule = optax.warmup_cosine_decay_schedule(0.0, 0.3, warmup_steps, 4 * STEPS) if warmup else optax.cosine_decay_schedule(0.3, 20)
    steps = np.arange(4 * STEPS + 1)
    found = learning_rate(config, STEPS, steps)
    np.testing.assert_allclose(found, [schedule(step) for step in steps], atol=1e-7)
    assert found[warmup_steps] == 0.3
    by_epoch = [in_epoch(config, 1, STEPS, epoch).learning_rate[:, 0] for epoch in range(4)]
    np.testing.assert_array_equal(np.concatenate(by_epoch), found[:-1].astype(np.float32))


def test_the_numbers_are_by_step_and_group_and_of_32_bits():
    found = in_epoch(config_of(**MLP), 3, STEPS, 1)
    assert {(values.shape, values.dtype) for values in found} == {((STEPS, 3), np.dtype(np.float32))}
    assert {(values.shape, values.dtype) for values in at_peak(config_of(**MLP), 3)} == {((3,), np.dtype(np.float32))}


def test_overrides_and_the_decay_by_group():
    overrides = {"group1": {"learning_rate": 0.5, "warmup_epochs": 1.0, "margin": 0.25}, "group2": {"momentum": 0.1}}
    config = config_of(**MLP, learning_rate=0.08, group_decay=0.5, epochs=4, overrides=overrides)
    found = [in_epoch(config, 3, STEPS, epoch) for epoch in (0, 1)]
    # Group 0 has two groups behind it; an override is not decayed, and warms up by itself.
    np.testing.assert_allclose(found[0].learning_rate[0], [0.02, 0.0, 0.08], rtol=1e-6)
    np.testing.assert_allclose(found[0].learning_rate[1, 1], 0.1, rtol=1e-6)
    np.testing.assert_allclose(found[1].learning_rate[0, 1], 0.5, rtol=1e-6)
    np.testing.assert_allclose(at_peak(config, 3).learning_rate, [0.02, 0.5, 0.08], rtol=1e-6)
    for numbers in (*found, at_peak(config, 3)):
        np.testing.assert_allclose(numbers.margin.reshape(-1, 3), [[0.0, 0.25, 0.0]] * (numbers.margin.size // 3))
        np.testing.assert_allclose(numbers.momentum.reshape(-1, 3)[0], [0.9, 0.9, 0.1])
    assert HyperParameters(*(values[0] for values in found[0])).of(1).margin == np.float32(0.25)


@pytest.mark.parametrize("end", [0.01, 0.8])
def test_the_temperature_goes_to_its_end_by_equal_factors(end):
    config = config_of(**MLP, temperature=0.2, temperature_end=end, epochs=4, overrides={"group1": {"temperature_end": 0.0}})
    found = np.concatenate([in_epoch(config, 3, STEPS, epoch).temperature for epoch in range(4)])
    factor = (end / 0.2) ** (1 / (4 * STEPS))
    expected = [0.2]
    for _ in range(4 * STEPS):
        expected.append(expected[-1] * factor)
    np.testing.assert_allclose(expected[-1], end)
    for group in (0, 2):
        np.testing.assert_allclose(found[:, group], expected[:-1], rtol=1e-6)
    np.testing.assert_array_equal(found[:, 1], np.float32(0.2))
    np.testing.assert_array_equal(at_peak(config, 3).temperature, np.float32(0.2))


def test_a_temperature_without_an_end_is_constant_to_the_bit():
    numbers = in_epoch(config_of(**MLP, temperature=0.05, overrides={"group2": {"temperature": 0.3}}), 3, STEPS, 1)
    np.testing.assert_array_equal(numbers.temperature, np.float32([[0.05, 0.05, 0.3]] * STEPS))


def test_each_stage_of_the_sequential_schedule_begins_anew():
    config = config_of(**MLP, schedule="sequential", epochs=2, warmup_epochs=0.5)
    sequential = make_plan(config, STEPS * 12, 3)
    joint = make_plan(dataclasses.replace(config, schedule="joint"), STEPS * 12, 3)
    for epoch in range(6):
        assert_same(sequential.hyperparameters(epoch), joint.hyperparameters(epoch % 2))
    assert differs(sequential.hyperparameters(0), sequential.hyperparameters(1))


def test_every_argument_has_a_field_and_every_field_is_an_argument():
    assert sorted(HyperParameters._fields) == sorted(ARGUMENTS)
    assert all(isinstance(FIELDS[key].default, float) for key in ARGUMENTS)
    different = {key: 0.5 + i / 16 for i, key in enumerate(ARGUMENTS)}
    for key, values in at_peak(dataclasses.replace(Config(), **different), 2)._asdict().items():
        np.testing.assert_array_equal(values, [different[key]] * 2)


BASE = {**MLP, "optimizer": "sgd", "head_weight": 0.5, "clip_norm": 0.5, "weight_decay": 0.01, "label_smoothing": 0.1, "learning_rate": 0.1}
FF = {"rule": "ff", "peer_normalisation": 0.1}
OWN = {
    "learning_rate": 0.02,
    "bias_rate": 3.0,
    "weight_decay": 0.3,
    "momentum": 0.2,
    "clip_norm": 0.1,
    "temperature": 0.4,
    "margin": 0.3,
    "head_weight": 0.1,
    "label_smoothing": 0.4,
    "goodness_threshold": 0.3,
    "peer_normalisation": 0.7,
    "slow_share": 0.5,
}


@functools.cache
def step_of(program):
    return quick_jit(functools.partial(train_step, program, None))


def stepped(**changes):
    """New states and metrics by group, from the same states, batch and key whatever the numbers are."""
    run = small_run(config_of(**BASE | changes))
    states, metrics = step_of(run.plan.program)(run.task, run.states, run.batch())
    metrics.pop("ensemble_accuracy")
    return [(state, {name: values[i] for name, values in metrics.items()}) for i, state in enumerate(states)]


@pytest.mark.slow
@pytest.mark.parametrize("key", ARGUMENTS)
def test_a_group_s_own_number_is_as_if_configured_alone_and_leaves_the_others(key):
    given = {"goodness_threshold": FF, "peer_normalisation": FF, "slow_share": {"look_ahead": 1}}.get(key, {})
    base, everywhere, own = stepped(**given), stepped(**given | {key: OWN[key]}), stepped(**given, overrides={"group1": {key: OWN[key]}})
    # One program, so to the bit. Every group takes the features that the group before had before its update.
    assert_same(own, [base[0], everywhere[1], base[2]])
    assert differs(everywhere[1][0], base[1][0])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(own))
    changes_the_loss = key in ("temperature", "margin", "label_smoothing", "goodness_threshold", "peer_normalisation")
    assert (everywhere[1][1]["loss"] != base[1][1]["loss"]) == changes_the_loss


@pytest.mark.full_optimisation  # the tolerance is for the rounding of programs as a run compiles them
@pytest.mark.parametrize("key", ["head_weight", "clip_norm", "peer_normalisation"])
def test_one_group_alone_may_have_a_part_that_0_takes_out(key):
    """Another program, and so to the last digits only."""
    rule = FF if key == "peer_normalisation" else {}
    off, on = stepped(**rule | {key: 0.0}), stepped(**rule)
    own = stepped(**rule | {key: 0.0}, overrides={"group1": {key: (BASE | FF)[key]}})
    without = stepped(**rule, overrides={"group1": {key: 0.0}})
    assert_close(own, [off[0], on[1], off[2]], rtol=1e-4, atol=1e-6)
    assert_close(without, [on[0], off[1], on[2]], rtol=1e-4, atol=1e-6)
    apart = jax.tree.map(lambda a, b: np.abs(a - b).max(), off[1][0].params, on[1][0].params)
    assert max(jax.tree.leaves(apart)) > 1e-4


# ----------------------------------------------------------------------------------------------------------------------------------
# No program reads a number, or a key outside of it, from the configuration


PROGRAMS = [
    {"head_weight": 0.5, "clip_norm": 1.0, "weight_decay": 0.1},
    {"labelling": "triplet", "negatives": "hard", "optimizer": "sgd", "flip": True, "alternating_flip": True, "crop_padding": 1},
    {"rule": "ff", "peer_normalisation": 0.1, "cutout": 3, "inference": "sweep"},
    {"schedule": "sequential", "on_nonfinite": "skip", "frozen_groups": 1, "overrides": {"group1": {"margin": 0.1, "optimizer": "sgd"}}},
    {"rule": "head", "grouping": "all", "precision": "bf16", "rematerialise": True, "image_size": 8},
    {"random_erasing": 0.5, "trivial_augment": True, "mixup": 0.8, "random_resized_crop": 0.5, "color_jitter": 0.3},
]


@pytest.mark.parametrize("changes", slow_but(PROGRAMS, PROGRAMS[0]), ids=str)
def test_no_program_reads_a_key_that_it_does_not_know(changes, monkeypatch, traces):
    """`of_program` sets such keys to NaN or to their defaults: a program that read one would train by these."""
    config = config_of(**CONV | {"dataset": "synthetic", "batch_size": 8} | changes)
    plan, shape = make_plan(config, 80, 10), sizes_of(Config(dataset="synthetic")).image_shape
    task, states, _ = memory.step_arguments(plan, targets.find("cpu"))
    batches = abstract_batch(8, shape, len(plan.groups), None, (3,))
    images, program, read = jax.ShapeDtypeStruct((80, *shape), np.uint8), plan.program, set()
    hash(program)
    active = plan.active(plan.total_epochs - 1)
    unknown = {*config_module._OUTSIDE, *ARGUMENTS}.difference(config_module._SWITCHES)

    def watched(self, key):
        reader = sys._getframe(1).f_globals["__name__"]
        if key in unknown and reader not in ("dataclasses", "vffjax.config"):
            read.add((key, reader))
        return object.__getattribute__(self, key)

    monkeypatch.setattr(Config, "__getattribute__", watched)
    jax.eval_shape(functools.partial(trainer.run_segment, program, active), task, states, batches)
    for name in ["heads"] + ["sweep"] * (config.rule != "head"):
        jax.eval_shape(inference.make_scores(plan, name), task, states, images)
    jax.eval_shape(
        make_early_exit(plan, votes_of(tuple(range(len(plan.groups))))), task, states, images, jax.ShapeDtypeStruct((), np.float32)
    )
    assert read == set()
    assert config.learning_rate == 1e-3 and ("learning_rate", __name__) in read  # the watch works
