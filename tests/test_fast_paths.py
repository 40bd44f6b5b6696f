"""What makes a step fast or light changes no result: the same seed with each such path and with the plain one in its place.

Both compute the same numbers in another order, so a single step agrees to float32's rounding. Over an epoch the roundings grow, as those of
any two compilers do: losses agree to 1 %, accuracies to two points.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracles
from vffjax.networks import layers
from vffjax.ops import normalisation, winograd
from vffjax.ops.pooling import max_pool
from vffjax.rules import local as rules
from vffjax.training import trainer
from vffjax.training.epochs import Epoch
from vffjax.training.plan import Images, init_states, make_plan, make_task
from vffjax.training.trainer import train_step

CONFIG = oracles.config_of(
    dataset="digits",
    network="conv4",
    widths=(16, 16, 32, 32),
    pools=(1, 2, 1, 2),
    batch_size=64,
    learning_rate=3e-3,
    head_weight=1.0,
    crop_padding=1,
    copies_per_class=1,
    head_grid=2,
)


def plain_normalise(x, scale, bias, clean, shared, pool=1, activation=""):
    """In the order of the definition, its gradient left to autodiff: normalise, activate, pool."""
    parts = [x[:clean]] if shared else [part for part in (x[:clean], x[clean:]) if len(part)]
    axes = tuple(range(x.ndim - 1))
    mean, var = (jnp.stack([getattr(part, name)(axes) for part in parts]) for name in ("mean", "var"))
    gain, offset = normalisation.affine(mean, var, scale, bias)
    z = x * normalisation.by_row(gain, x, clean) + normalisation.by_row(offset, x, clean)
    return max_pool(normalisation.ACTIVATIONS[activation](z), pool), jax.lax.stop_gradient(mean), jax.lax.stop_gradient(var)


PLAIN = {
    "convolution by tiles": (winograd, "applies", lambda x, kernel: False),
    "one operation for normalisation, pooling and ReLU": (layers, "normalise", plain_normalise),
    "one group's maps at a time": (trainer, "_as_branch_on_cpu", lambda function, labels: function),
    "cells pooled once": (rules, "_pooled", lambda config, head_grid, features: features),
}


@pytest.fixture(scope="module")
def digits():
    from vffjax.data import load as data

    return data.load(CONFIG)


def run(dataset, one_step):
    """Metrics and parameters after one step, or metrics of the second epoch."""
    plan = make_plan(CONFIG, len(dataset.train.labels), dataset.num_classes)
    task = make_task(CONFIG, dataset.num_classes, dataset.image_shape, dataset.mean, dataset.std)
    states = init_states(plan, dataset.image_shape)
    data = Images(jnp.asarray(dataset.train.images), jnp.asarray(dataset.train.labels))
    small = oracles.Run(plan, task, states, data)
    if one_step:
        step = oracles.quick_jit(lambda states, batch: train_step(plan.program, None, task, states, batch))
        states, metrics = step(states, small.batch(key=jax.random.key(3)))
        return metrics, [state.params for state in states]
    epoch = Epoch(plan)
    for number in range(2):
        states, metrics = epoch(task, states, data, number)
    return metrics


@pytest.fixture(scope="module")
def fast(digits):
    return run(digits, True), run(digits, False)


@pytest.mark.slow
@pytest.mark.full_optimisation
@pytest.mark.parametrize("path", PLAIN)
def test_the_plain_path_learns_the_same(path, digits, fast, monkeypatch, traces):
    monkeypatch.setattr(*PLAIN[path])
    (fast_metrics, fast_params), fast_epoch = fast
    metrics, params = run(digits, True)
    oracles.assert_close(metrics, fast_metrics, rtol=1e-4, atol=1e-5)
    # AdamW's first step moves every parameter by the learning rate's sign: a gradient that is only rounding may turn.
    moved = np.concatenate([np.abs(a - b).ravel() for (_, a), (_, b) in zip(*map(oracles.leaves, (params, fast_params)), strict=True)])
    assert np.mean(moved > 1e-5) < 0.01
    epoch = run(digits, False)
    np.testing.assert_allclose(epoch["loss"], fast_epoch["loss"], rtol=0.01)
    np.testing.assert_allclose(epoch["ensemble_accuracy"], fast_epoch["ensemble_accuracy"], atol=0.02)


@pytest.mark.slow
def test_each_path_is_one_that_this_run_takes(digits, monkeypatch, traces):
    """Or the comparison above would compare a thing with itself."""
    taken = set()
    for name, (module, attribute, _) in PLAIN.items():
        original = getattr(module, attribute)

        def watched(*arguments, name=name, original=original, **more):
            out = original(*arguments, **more)
            if name != "convolution by tiles" or out:
                taken.add(name)
            return out

        monkeypatch.setattr(module, attribute, watched)
    plan = make_plan(CONFIG, len(digits.train.labels), digits.num_classes)
    task = make_task(CONFIG, digits.num_classes, digits.image_shape, digits.mean, digits.std)
    small = oracles.Run(plan, task, init_states(plan, digits.image_shape), Images(digits.train.images, digits.train.labels))
    jax.eval_shape(lambda states, batch: train_step(plan.program, None, task, states, batch), small.states, small.batch())
    assert taken == set(PLAIN)
