"""Cached features of frozen groups: the same training, with or without, on the device or on the host."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import oracles
import runs
from vffjax.data import load as data_module
from vffjax.runs import experiment
from vffjax.runs.checkpoint import Checkpoints
from vffjax.training import feature_cache
from vffjax.training.epochs import Epoch
from vffjax.training.plan import Images, init_states, make_plan, make_task
from vffjax.training.trainer import before

KINDS = {
    "conv": {"network": "conv4", "widths": (4, 4, 6, 6), "pools": (1, 2, 1, 2), "train_examples": 120},
    "triplet, hard negatives": {"labelling": "triplet", "negatives": "hard"},
    "head": {"rule": "head"},
    "forward-forward": {"rule": "ff", "norm": "input"},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, pytest.param("conv", id="conv, as a run compiles", marks=pytest.mark.full_optimisation)])
def test_training_is_the_same_with_and_without(kind, tmp_path):
    found = {}
    for cache in ("none", "device", "host"):
        config = runs.tiny(schedule="sequential", epochs=1, segment_steps=2, feature_cache=cache, **KINDS[kind])
        runs.train(config, tmp_path / cache)
        plan = experiment.plan_for(config, data_module.load(config))
        found[cache] = [state.params for state in Checkpoints(tmp_path / cache).opened(plan.total_epochs).restore(plan)[0]]
    for cache in ("device", "host"):
        oracles.assert_close(found[cache], found["none"], rtol=2e-3, atol=2e-4)


@pytest.fixture
def second_stage():
    """Plan, task, states and data of a tiny run whose second group is to train."""
    config = runs.tiny(schedule="sequential", feature_cache="device", eval_batch_size=64)
    dataset = data_module.load(config)
    plan = make_plan(config, len(dataset.train.labels), 10)
    task = make_task(config, 10, dataset.image_shape, dataset.mean, dataset.std)
    data = Images(jnp.asarray(dataset.train.images), jnp.asarray(dataset.train.labels))
    return plan, task, init_states(plan, dataset.image_shape), data


def test_features_are_those_of_evaluation(second_stage):
    plan, task, states, data = second_stage
    found = feature_cache.with_features(plan, 1, task, states, data).features[: len(data.labels)]
    x = (data.images / 255 - task.mean.reshape(1, 1, 1, -1)) / task.std.reshape(1, 1, 1, -1)
    np.testing.assert_allclose(found, before(plan, 1, states, x, len(x)), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["device", "host"])
def test_the_cached_features_are_what_is_trained_on(cache, second_stage):
    """Other features, other parameters: or the cache would be decoration."""
    plan, task, states, data = second_stage
    plan = dataclasses.replace(plan, config=dataclasses.replace(plan.config, feature_cache=cache))
    results = []
    for factor in (1, 2):
        cached = feature_cache.with_features(plan, 1, task, states, data)
        cached = cached._replace(features=factor * cached.features)
        fresh = init_states(plan, data.images.shape[1:])
        results.append(Epoch(plan, 1, 4)(task, fresh, cached, 0)[1]["loss"])
    assert results[0] != results[1]


def test_the_host_s_cache_lies_on_the_host(second_stage):
    plan, task, states, data = second_stage
    plan = dataclasses.replace(plan, config=dataclasses.replace(plan.config, feature_cache="host"))
    assert isinstance(feature_cache.with_features(plan, 1, task, states, data).features, np.ndarray)
