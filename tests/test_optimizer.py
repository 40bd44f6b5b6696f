"""A group's optimizer: rates over the steps, both update rules, decay and clipping."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from oracles import CONV, assert_close, config_of, leaves, quick_jit, small_run
from vffjax.config import of_program
from vffjax.hyperparameters import HyperParameters, at_peak, in_epoch
from vffjax.training.optimizers import make_optimizer


def updates_of(config, gradients, params, steps_per_epoch=5):
    """Parameters after each of the gradients, the first `steps_per_epoch` of them in epoch 0."""
    settings = [in_epoch(config, 1, steps_per_epoch, epoch) for epoch in range(-(-len(gradients) // steps_per_epoch))]
    hyper, out = HyperParameters(*(np.concatenate(values) for values in zip(*settings, strict=True))).of(0), []
    program = of_program(config)
    state = make_optimizer(config, at_peak(config, 1).of(0)).init(params)
    update = quick_jit(lambda hyper, *rest: make_optimizer(program, hyper).update(*rest))
    for step, gradient in enumerate(gradients):
        updates, state = update(HyperParameters(*(values[step] for values in hyper)), gradient, state, params)
        params = optax.apply_updates(params, updates)
        out.append(params)
    return out


@pytest.mark.parametrize("warmup_epochs", [0.0, 0.6, 2.0, 4.0])
def test_the_rate_warms_up_from_zero_and_decays_to_zero_on_a_cosine(warmup_epochs):
    config = config_of(optimizer="sgd", momentum=0.0, learning_rate=0.3, epochs=4, warmup_epochs=warmup_epochs)
    total = 4 * 5
    warmup = min(round(warmup_epochs * 5), total - 1)  # warm-up to the end leaves one step to decay in
    points = np.array([float(p["b"][0]) for p in updates_of(config, [{"b": jnp.ones(1)}] * (total + 1), {"b": jnp.zeros(1)})])
    rates = -np.diff(np.concatenate([[0.0], points]))
    expected = [0.3 * t / warmup if t < warmup else 0.15 * (1 + np.cos(np.pi * (t - warmup) / (total - warmup))) for t in range(total + 1)]
    np.testing.assert_allclose(rates, expected, atol=2e-6)
    assert abs(rates[total]) < 1e-6


PARAMS = {"kernel": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "bias": jnp.array([1.0, -1.0])}
KERNEL_GRADIENTS = jnp.asarray(np.random.default_rng(0).normal(size=(6, 2, 2)), jnp.float32)
GRADIENTS = [{"kernel": g, "bias": jnp.array([0.1 * i, 2.0])} for i, g in enumerate(KERNEL_GRADIENTS)]


def rate(step, total=20):
    return 0.1 * 0.5 * (1 + np.cos(np.pi * step / total))


def test_sgd_is_nesterov_momentum_with_decoupled_decay_of_kernels():
    config = config_of(optimizer="sgd", momentum=0.9, weight_decay=0.05, learning_rate=0.1, epochs=4)
    found = updates_of(config, GRADIENTS, PARAMS)
    for name, decay in (("kernel", 0.05), ("bias", 0.0)):
        p, trace = np.asarray(PARAMS[name], np.float64), 0.0
        for t, gradient in enumerate(GRADIENTS):
            g = np.asarray(gradient[name], np.float64)
            trace = g + 0.9 * trace
            p = p - rate(t) * (g + 0.9 * trace + decay * p)
            np.testing.assert_allclose(found[t][name], p, rtol=1e-5, atol=1e-6)


def test_adamw_is_adam_with_decoupled_decay_of_kernels():
    config = config_of(weight_decay=0.05, learning_rate=0.1, epochs=4)
    found = updates_of(config, GRADIENTS, PARAMS)
    for name, decay in (("kernel", 0.05), ("bias", 0.0)):
        p, m, v = np.asarray(PARAMS[name], np.float64), 0.0, 0.0
        for t, gradient in enumerate(GRADIENTS):
            g = np.asarray(gradient[name], np.float64)
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            p = p - rate(t) * (m / (1 - 0.9 ** (t + 1)) / (np.sqrt(v / (1 - 0.999 ** (t + 1))) + 1e-8) + decay * p)
            np.testing.assert_allclose(found[t][name], p, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_weight_decay_shrinks_kernels_and_nothing_else(optimizer):
    run = small_run(config_of(**CONV, optimizer=optimizer, weight_decay=0.1, learning_rate=0.5))
    params = run.states[0].params
    after = updates_of(run.plan.config, [jax.tree.map(jnp.zeros_like, params)], params)[0]
    for (path, old), (_, new) in zip(leaves(params), leaves(after), strict=True):
        np.testing.assert_allclose(new, old * (0.95 if "kernel" in path else 1.0), rtol=1e-6, err_msg=path)


def test_adamw_clips_before_it_averages():
    """Adam hides the scale of one gradient, not of two: the second counts as much as the first, though it is 100 times as large."""
    config = config_of(learning_rate=0.1, epochs=4, clip_norm=0.5)
    large = [{"bias": scale * jnp.array([3.0, 4.0])} for scale in (1.0, -100.0)]
    clipped = [{"bias": jnp.array([0.3, 0.4])}, {"bias": jnp.array([-0.3, -0.4])}]
    zero = {"bias": jnp.zeros(2)}
    assert_close(updates_of(config, large, zero), updates_of(config_of(learning_rate=0.1, epochs=4), clipped, zero), rtol=1e-4)


def test_clipping_bounds_the_norm_of_the_whole_groups_gradient():
    config = config_of(optimizer="sgd", momentum=0.0, learning_rate=1.0, clip_norm=0.5)
    gradient = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[4.0]])}
    zero = jax.tree.map(jnp.zeros_like, gradient)
    for scale, norm in ((1.0, 0.5), (0.01, 0.05)):
        after = updates_of(config, [jax.tree.map(lambda g, s=scale: s * g, gradient)], zero)[0]
        np.testing.assert_allclose(after["a"], [-0.6 * norm, 0], rtol=1e-5)
        np.testing.assert_allclose(after["b"], [[-0.8 * norm]], rtol=1e-5)


def test_the_rate_may_decay_along_a_line():
    config = config_of(learning_rate=0.4, epochs=4, warmup_epochs=1.0, decay="linear")
    rates = [in_epoch(config, 1, 5, epoch).learning_rate[:, 0] for epoch in range(4)]
    np.testing.assert_allclose(np.concatenate(rates), [0.4 * t / 5 if t < 5 else 0.4 * (1 - (t - 5) / 15) for t in range(20)], rtol=1e-6)


def test_looking_ahead_goes_back_to_slow_averages_whose_share_grows_with_the_cube_of_time():
    """Against a slow version of look-ahead (Zhang et al., 2019) around Nesterov SGD."""
    rng = np.random.default_rng(0)
    draw = lambda: {"a": jnp.asarray(rng.normal(size=3), jnp.float32), "b": jnp.asarray(rng.normal(size=(2, 2)), jnp.float32)}  # noqa: E731
    params, gradients = draw(), [draw() for _ in range(8)]
    given = {"optimizer": "sgd", "learning_rate": 0.3, "momentum": 0.5, "epochs": 8}  # of one step
    found = updates_of(config_of(**given, look_ahead=3, slow_share=0.9), gradients, params, steps_per_epoch=1)
    for name in params:
        fast = slow = np.asarray(params[name], np.float64)
        moment = np.zeros_like(fast)
        for step, gradient in enumerate(gradients):
            g = np.asarray(gradient[name], np.float64)
            moment = 0.5 * moment + g
            fast = fast - 0.3 * 0.5 * (1 + np.cos(np.pi * step / 8)) * (g + 0.5 * moment)
            if step % 3 == 2:
                share = 0.9 * (step / 8) ** 3
                fast = slow = share * slow + (1 - share) * fast
            np.testing.assert_allclose(found[step][name], fast, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_biases_of_layers_have_a_rate_of_their_own(optimizer):
    params = {"layers_0": {"kernel": jnp.ones((2, 2)), "norm": {"bias": jnp.ones(2), "scale": jnp.ones(2)}}, "head": {"bias": jnp.ones(2)}}
    gradient = jax.tree.map(lambda p: 0.3 * p, params)
    base, own = (
        dict(leaves(jax.tree.map(lambda new, old: new - old, updates_of(config, [gradient], params)[0], params)))
        for config in (config_of(optimizer=optimizer), config_of(optimizer=optimizer, bias_rate=8.0))
    )
    for name, moved in own.items():
        factor = 8 if "layers_0" in name and "bias" in name else 1
        np.testing.assert_allclose(moved, factor * base[name], rtol=1e-3)


def test_muon_takes_orthogonal_steps_of_kernels_and_those_of_nadam_of_the_rest():
    """Kernels against a slow version of Muon (K. Jordan, 2024): Nesterov momentum, five Newton-Schulz steps, and AdamW's size."""
    rng = np.random.default_rng(0)
    shapes = {"layers_0": {"kernel": (3, 3, 2, 5), "norm": {"bias": (5,)}}, "head": {"kernel": (7, 3)}}
    draw = lambda: jax.tree.map(lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32), shapes, is_leaf=lambda s: type(s) is tuple)  # noqa: E731
    params, gradients = draw(), [draw() for _ in range(3)]
    config = config_of(optimizer="muon", momentum=0.6, learning_rate=0.02, weight_decay=0.1)
    found = updates_of(config, gradients, params)
    kernel, moment = np.asarray(params["layers_0"]["kernel"], np.float64).reshape(18, 5), np.zeros((18, 5))
    for step, gradient in enumerate(gradients):
        g = np.asarray(gradient["layers_0"]["kernel"], np.float64).reshape(18, 5)
        moment = 0.6 * moment + 0.4 * g
        x = 0.6 * moment / (1 - 0.6 ** (step + 2)) + 0.4 * g / (1 - 0.6 ** (step + 1))
        x = x.T / np.linalg.norm(x)
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        kernel = kernel - in_epoch(config, 1, 5, 0).learning_rate[step, 0] * (0.2 * np.sqrt(18) * x.T + 0.1 * kernel)
        np.testing.assert_allclose(found[step]["layers_0"]["kernel"].reshape(18, 5), kernel, rtol=1e-3, atol=1e-4)
    rates, (first, second) = in_epoch(config, 1, 5, 0).learning_rate[:, 0], np.zeros((2, 7, 3))
    head = np.asarray(params["head"]["kernel"], np.float64)
    for step, gradient in enumerate(gradients):
        g = np.asarray(gradient["head"]["kernel"], np.float64)
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2
        ahead = 0.9 * first / (1 - 0.9 ** (step + 2)) + 0.1 * g / (1 - 0.9 ** (step + 1))
        head = head - rates[step] * ahead / (np.sqrt(second / (1 - 0.999 ** (step + 1))) + 1e-8)
        np.testing.assert_allclose(found[step]["head"]["kernel"], head, rtol=1e-3, atol=1e-5)
