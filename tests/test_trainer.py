"""Training: the update of one group, all groups on a batch, the sequential schedule, the scanned epoch and its speed."""

import functools
import statistics
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from oracles import (
    CONV,
    MLP,
    assert_close,
    assert_same,
    config_of,
    differs,
    leaves,
    quick_jit,
    random_states,
    small_run,
    streams_from,
    traced_afresh,
)
from vffjax.hyperparameters import HyperParameters
from vffjax.rules import local as rules
from vffjax.training import trainer
from vffjax.training.augment import normalise
from vffjax.training.batch import abstract_batch
from vffjax.training.epochs import Epoch, over_steps
from vffjax.training.plan import Images, init_states, make_plan, make_task
from vffjax.training.trainer import train_step


def copied(tree):
    """A copy that survives the donation of the original."""
    return jax.tree.map(jnp.copy, tree)


def step_of(run, active=None, jit=quick_jit):
    return jit(functools.partial(train_step, run.plan.program, active))


# --- one batch


class Plain(nn.Module):
    """The network of `CONV` as anyone would write it."""

    @nn.compact
    def __call__(self, x, train):
        for i, (width, pool) in enumerate(zip(CONV["widths"], CONV["pools"], strict=True)):
            x = nn.Conv(width, (3, 3), use_bias=False, name=f"conv{i}")(x)
            x = nn.relu(nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5, name=f"norm{i}")(x))
            x = nn.max_pool(x, (pool, pool), (pool, pool))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


@pytest.mark.full_optimisation
def test_one_group_under_the_head_rule_is_plain_back_propagation(key):
    """Four steps of AdamW with weight decay; float32 roundings of Adam's quotient allow 2e-5 of a parameter, the steps being 1e-2."""
    config = config_of(**CONV, grouping="all", rule="head", head_grid=1, learning_rate=1e-2, weight_decay=0.1, label_smoothing=0.1)
    run = small_run(config, examples=48)
    (state,) = run.states
    ours = [("norm", f"norm{i}", f"layers_{i}") for i in range(4)]
    params = {"head": state.params["head"]}
    params |= {f"conv{i}": {"kernel": state.params[f"layers_{i}"]["kernel"]} for i in range(4)}
    params |= {theirs: state.params[layer]["norm"] for _, theirs, layer in ours}
    stats = {theirs: {k: v[0] for k, v in state.batch_stats[layer]["norm"].items()} for _, theirs, layer in ours}
    kernels = lambda params: jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)  # noqa: E731
    optimizer = optax.adamw(optax.cosine_decay_schedule(1e-2, 2 * 4), weight_decay=0.1, mask=kernels)
    opt_state, mean, std = optimizer.init(params), np.asarray(run.task.mean), np.asarray(run.task.std)

    @quick_jit
    def plain_step(params, stats, opt_state, x, labels):
        def loss(params):
            logits, new = Plain().apply({"params": params, "batch_stats": stats}, x, True, mutable=["batch_stats"])
            targets = optax.smooth_labels(jax.nn.one_hot(labels, 3), 0.1)
            return optax.softmax_cross_entropy(logits, targets).mean(), (new["batch_stats"], logits)

        (value, (new_stats, logits)), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), new_stats, opt_state, value, logits

    step, states = step_of(run, jit=jax.jit), run.states
    for i in range(4):
        batch = run.batch(12 * i, key, step=i)
        images, labels = batch.images, batch.labels
        x = ((np.asarray(images) / 255 - mean) / std).astype(np.float32)
        params, stats, opt_state, value, logits = plain_step(params, stats, opt_state, x, labels)
        states, metrics = step(run.task, states, batch)
        np.testing.assert_allclose(metrics["loss"], [value], rtol=1e-4)
        np.testing.assert_allclose(metrics["accuracy"], [np.mean(logits.argmax(1) == labels)], rtol=1e-6)
    (state,) = states
    assert_close({k: state.params["head"][k] for k in params["head"]}, params["head"], rtol=1e-4, atol=2e-5)
    for i in range(4):
        layer = state.params[f"layers_{i}"]
        np.testing.assert_allclose(layer["kernel"], params[f"conv{i}"]["kernel"], rtol=1e-4, atol=2e-5)
        assert_close(layer["norm"], params[f"norm{i}"], rtol=1e-4, atol=2e-5)
        assert_close({k: v[0] for k, v in state.batch_stats[f"layers_{i}"]["norm"].items()}, stats[f"norm{i}"], rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def mlp():
    """A run of three groups with two optimizers, its jitted step, and one step's result."""
    overrides = {"group1": {"learning_rate": 3e-4, "clip_norm": 0.01}}
    # Shared copies under the triplet contrast draw wrong labels inside each group, by its own key.
    run = small_run(config_of(**MLP, contrast="triplet", head_weight=0.5, weight_decay=0.01, overrides=overrides))
    step, key = step_of(run), jax.random.key(5)
    return run, step, key, step(run.task, run.states, run.batch(key=key))


def test_each_group_steps_as_if_alone_on_the_features_of_its_predecessors(mlp):
    run, _, key, (joint, metrics) = mlp
    plan, batch = run.plan.program, run.batch(key=key)

    @quick_jit
    def alone(states):
        x = normalise(batch.images, run.task.mean, run.task.std)
        streams = streams_from(run, jax.random.fold_in(key, 1), x, batch.labels)
        out = []
        for i, group in enumerate(plan.groups):
            new, _, m = trainer.group_step(plan.setting(i, batch.hyper, key), group, states[i], streams)
            out.append((new, m["loss"]))
            # The next group sees what this one computed before its update.
            features, _ = group.features(states[i].params, states[i].batch_stats, streams.rows, len(batch.labels), True)
            streams = streams._replace(rows=features)
        return out

    for i, (state, loss) in enumerate(alone(run.states)):
        assert_close(joint[i], state, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(metrics["loss"][i], loss, rtol=1e-5)
        assert differs(joint[i].params, run.states[i].params)


def test_every_group_owns_its_optimizer_state(mlp):
    run, _, _, (joint, _) = mlp
    for before, after in zip(run.states, joint, strict=True):
        shapes = sorted(leaf.shape for _, leaf in leaves(after.params))
        moments = [sorted(leaf.shape for path, leaf in leaves(after.opt_state) if name in path) for name in (".mu", ".nu")]
        assert moments == [shapes, shapes]
        counts = [leaf for path, leaf in leaves(after.opt_state) if "count" in path]
        assert counts and all(count == 1 for count in counts)
        assert differs(before.opt_state, after.opt_state)


@pytest.mark.slow
def test_overrides_change_their_group_only(mlp):
    run, _, key, (with_overrides, _) = mlp
    config = config_of(**{k: v for k, v in run.plan.config.to_dict().items() if k != "overrides"})
    plain = run._replace(plan=make_plan(config, 12, 3), states=random_states(make_plan(config, 12, 3), (8, 8, 2)))
    assert_same([s.params for s in plain.states], [s.params for s in run.states])
    without, _ = step_of(plain)(run.task, plain.states, plain.batch(key=key))
    for i in (0, 2):  # two programs: equal but for the last bit
        assert_close(with_overrides[i], without[i], rtol=1e-4, atol=1e-7)
    assert differs(with_overrides[1].params, without[1].params)
    # Adam's first step is the learning rate in every entry with a gradient, but for epsilon and decay.
    moves = [np.abs(s.params["head"]["bias"] - old.params["head"]["bias"]).max() for s, old in zip(with_overrides, run.states, strict=True)]
    np.testing.assert_allclose(moves, [1e-3, 3e-4, 1e-3], rtol=0.01)


def test_a_step_is_a_function_of_its_key(mlp):
    run, step, key, (states, _) = mlp
    again, _ = step(run.task, run.states, run.batch(key=key))
    other, _ = step(run.task, run.states, run.batch(key=jax.random.key(6)))
    assert_same(again, states)
    assert differs([s.params for s in other], [s.params for s in states])


@pytest.mark.slow
@pytest.mark.parametrize("active", [0, 1, 2])
def test_the_sequential_schedule_changes_the_active_group_only(active):
    run = small_run(config_of(**MLP, schedule="sequential", epochs=3))
    assert [run.plan.active(epoch) for epoch in range(run.plan.total_epochs)] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    states, metrics = step_of(run, active)(run.task, run.states, run.batch(key=jax.random.key(5)))
    for i in range(3):
        if i == active:
            pairs = zip(leaves(states[i].params), leaves(run.states[i].params), strict=True)
            assert all((new != old).any() for (path, new), (_, old) in pairs if "kernel" in path)
        else:
            assert_same(states[i], run.states[i])
    assert metrics["loss"].shape == metrics["accuracy"].shape == (1,)


@pytest.mark.slow
def test_hard_negatives_are_drawn_from_the_groups_that_have_trained():
    """In the first stage the other heads do not count, whatever they say."""
    run = small_run(config_of(**MLP, schedule="sequential", labelling="triplet", negatives="hard"))
    other = tuple(state._replace(params=jax.tree.map(lambda p: 5 * p, state.params)) if i else state for i, state in enumerate(run.states))
    results = [step_of(run, 0)(run.task, states, run.batch(key=jax.random.key(5))) for states in (run.states, other)]
    assert_same((results[0][0][0], results[0][1]), (results[1][0][0], results[1][1]))


@pytest.mark.slow
def test_a_frozen_group_passes_on_what_evaluation_would_see(key):
    """Running statistics, each stream its own."""
    run = small_run(config_of(**MLP))
    group, state = run.plan.groups[0], run.states[0]
    streams = streams_from(run, key, normalise(run.batch()[0], run.task.mean, run.task.std), run.batch()[1])
    out = trainer.behind_frozen(run.plan, 1, run.states, streams)
    clean, _ = group.features(state.params, state.batch_stats, streams.clean, 12, False)
    copies, _ = group.features(state.params, state.batch_stats, streams.copies, 0, False)
    np.testing.assert_allclose(out.clean, clean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(out.copies, copies, rtol=1e-5, atol=1e-6)
    assert_same((out.labels, out.copy_labels), (streams.labels, streams.copy_labels))


@pytest.mark.slow
@pytest.mark.parametrize("network", [CONV, MLP], ids=["conv4", "mlp"])
def test_bf16_computes_in_bf16_on_float32_parameters(network, key):
    run = small_run(config_of(**network, precision="bf16", head_weight=1.0))
    states, metrics = step_of(run)(run.task, run.states, run.batch(key=key))
    for state in states:
        dtypes = {leaf.dtype for _, leaf in leaves((state.params, state.batch_stats))}
        assert dtypes == {np.dtype(np.float32)}
        assert all(np.isfinite(leaf).all() for _, leaf in leaves(state))
    assert metrics["loss"].dtype == jnp.float32
    assert np.isfinite(metrics["loss"]).all()
    group, state = run.plan.groups[0], states[0]
    out = jax.eval_shape(lambda x: group.features(state.params, state.batch_stats, x, 12, False)[0], jnp.zeros((12, 8, 8, 2)))
    assert out.dtype == jnp.bfloat16


# --- epochs


@pytest.fixture(scope="module")
def conv():
    """A run with augmentation whose last batch of an epoch would be short; its epoch and its step, jitted as for use."""
    config = config_of(**CONV | {"widths": (8, 8, 16, 16)}, batch_size=32, epochs=3, flip=True, crop_padding=2)
    run = small_run(config, shape=(12, 12, 3), examples=8 * 32 + 5)
    return run, Epoch(run.plan, length=4), step_of(run, jit=jax.jit)


def segment_of(run, steps=2):
    """The shapes of a segment's batches."""
    return abstract_batch(run.plan.config.batch_size, run.data.images.shape[1:], len(run.plan.groups), None, (steps,))


def looped_epoch(run, step, states, epoch):
    """What the segments do, as a Python loop; the derivation of keys is part of what a seed means, so it is repeated here."""
    steps, batch = run.plan.steps_per_epoch, run.plan.config.batch_size
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(run.plan.config.seed), 2), epoch)
    order = np.asarray(jax.random.permutation(jax.random.fold_in(key, 0), len(run.data.labels)))[: steps * batch].reshape(steps, batch)
    history = []
    for i, rows in enumerate(order):
        hyper = HyperParameters(*(values[i] for values in run.plan.hyperparameters(epoch)))
        of_step = np.asarray(rows, np.int32), np.int32(epoch), jax.random.fold_in(key, i + 1), hyper
        states, metrics = step(run.task, states, trainer.Batch(run.data.images[rows], run.data.labels[rows], *of_step))
        history.append(metrics)
    return states, history


@pytest.mark.slow
def test_an_epoch_is_the_loop_of_steps_over_the_same_order(conv):
    run, epoch, step = conv
    scanned, metrics = epoch(run.task, copied(run.states), run.data, 1)
    looped, history = looped_epoch(run, step, run.states, 1)
    assert run.plan.steps_per_epoch == len(history) == 8
    # Adam divides by small numbers: roundings grow to a hundredth of a step of 1e-3.
    assert_close([s.params for s in scanned], [s.params for s in looped], rtol=1e-3, atol=2e-5)
    assert_close([s.batch_stats for s in scanned], [s.batch_stats for s in looped], rtol=1e-3, atol=1e-4)
    assert not metrics.pop("nonfinite_steps").any()
    assert not metrics.pop("first_nonfinite").any()
    assert all(m.pop("finite").all() for m in history)
    assert_close(metrics, {name: np.mean([m[name] for m in history], axis=0) for name in history[0]}, rtol=1e-3)
    assert [int(leaf) for path, leaf in leaves(scanned) if "count" in path] == [8] * 2


def test_metrics_of_an_epoch_count_finite_steps_only():
    finite = np.array([[True, True], [True, False], [True, False], [True, True]])
    loss = np.where(finite, [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]], np.nan).astype(np.float32)
    metrics = {"finite": finite, "loss": loss, "ensemble_accuracy": np.array([0.0, 0.9, 0.9, 1.0], np.float32)}
    found = over_steps(metrics)
    assert set(found) == {"loss", "ensemble_accuracy", "nonfinite_steps", "first_nonfinite"}
    np.testing.assert_allclose(found["loss"], [4.0, 5.0])
    assert found["ensemble_accuracy"] == 0.5
    assert found["nonfinite_steps"].tolist() == [0, 2]
    assert found["first_nonfinite"].tolist() == [0, 2]


@pytest.mark.slow
def test_epochs_differ_in_order_and_draws(conv):
    run, epoch, _ = conv
    first, second = (epoch(run.task, copied(run.states), run.data, i)[0] for i in (0, 1))
    assert differs([s.params for s in first], [s.params for s in second])


@pytest.mark.slow
def test_further_epochs_trace_nothing(monkeypatch, traces):
    run = small_run(config_of(network="mlp", widths=(5,)), examples=24)
    traced = []
    original = trainer.train_step
    monkeypatch.setattr(trainer, "train_step", lambda *args: traced.append(1) or original(*args))
    # From real initial states, whose types the results must have to the bit: a compiled epoch refuses others.
    states = init_states(run.plan, (8, 8, 2))
    for epoch in (Epoch(run.plan), Epoch(run.plan)):
        for number in (1, 2):
            states, _ = epoch(run.task, states, run.data, number)
    assert traced == [1]


@pytest.mark.slow
def test_each_group_is_traced_once_though_its_program_has_a_branch_for_each_kind_of_device(monkeypatch, traces):
    run = small_run(config_of(**CONV, grouping="layer"), examples=24)
    traced = []
    original = rules.local_loss
    monkeypatch.setattr(
        rules, "local_loss", lambda params, setting, group, *rest: traced.append(group.name) or original(params, setting, group, *rest)
    )
    jax.make_jaxpr(functools.partial(trainer.run_segment, run.plan.program, None))(run.task, run.states, segment_of(run))
    assert traced == [group.name for group in run.plan.groups]


@pytest.mark.slow
def test_an_epoch_takes_over_the_buffers_of_the_old_states(conv):
    run, epoch, _ = conv
    states = copied(run.states)
    epoch(run.task, states, run.data, 0)
    # Donation needs a backend that supports it, as CPU does since jax 0.4.31.
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(states))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((run.task, run.data)))


@pytest.mark.slow
def test_a_seed_fixes_a_run_bitwise_and_another_seed_another_run():
    @traced_afresh()
    def result(seed):
        config = config_of(network="mlp", widths=(6, 6), grouping="layer", seed=seed, labelling="triplet", crop_padding=1)
        run = small_run(config, shape=(4, 4, 2), examples=36)
        task = make_task(config, 3, (4, 4, 2), (0.4, 0.5), (0.3, 0.3))
        states = quick_jit(lambda: init_states(run.plan, (4, 4, 2)))()
        codebook, first = np.asarray(task.codebook), jax.device_get(states)
        return codebook, first, Epoch(run.plan)(task, states, run.data, 0)

    one, again, other = result(3), result(3), result(4)
    assert_same(one, again)
    assert differs(one[0], other[0])
    assert differs(one[1], other[1])
    assert differs(one[2], other[2])


EASY = {"batch_size": 32, "learning_rate": 1e-2, "epochs": 2}
LEARNERS = {
    "shared": {},
    "triplet": {"labelling": "triplet"},
    "head": {"rule": "head"},
    "ff": {"rule": "ff"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNERS)
def test_two_epochs_learn_two_easy_classes(name):
    """Bright above against bright below, under noise: every group's head must read the class off its own group's features."""
    rng, labels = np.random.default_rng(0), np.arange(384) % 2
    images = rng.integers(0, 160, (384, 8, 8, 1))
    images[labels == 0, :4] += 60
    images[labels == 1, 4:] += 60
    config = config_of(**{"network": "mlp", "widths": (32, 32), "grouping": "layer"} | EASY | LEARNERS[name])
    plan = make_plan(config, 384, 2)
    task = make_task(config, 2, (8, 8, 1), (0.43,), (0.21,))
    states, data = init_states(plan, (8, 8, 1)), Images(jnp.asarray(images, jnp.uint8), jnp.asarray(labels, jnp.int32))
    epoch, accuracies, local = Epoch(plan), [], []
    for number in range(2):
        states, metrics = epoch(task, states, data, number)
        accuracies.append(float(metrics["ensemble_accuracy"]))
        local.append(np.asarray(metrics["local_loss"]))
    assert accuracies[1] > 0.9, accuracies
    assert (metrics["accuracy"] > 0.8).all()
    assert config.rule == "head" or (local[1] < local[0]).all(), local


@pytest.mark.full_optimisation
def test_an_epoch_costs_no_more_than_a_loop_of_steps(conv):
    """Aimed at: 1.1. XLA:CPU's own gradient of a convolution is a hundred times slower in a scan."""
    run, epoch, step = conv
    ways = {"scan": lambda s: epoch(run.task, s, run.data, 0)[0], "loop": lambda s: looped_epoch(run, step, s, 0)[0]}
    times = {name: [] for name in ways}
    for repetition in range(6):
        for name, f in ways.items():
            states = jax.block_until_ready(copied(run.states))
            start = time.perf_counter()
            jax.block_until_ready(f(states))
            if repetition:  # the first one warms up
                times[name].append(time.perf_counter() - start)
    assert statistics.median(times["scan"]) < 1.3 * statistics.median(times["loop"]), times
