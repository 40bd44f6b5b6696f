"""An epoch in segments: the same bits however it is cut and wherever the images lie, and nothing is compiled twice."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oracles import CONV, assert_same, config_of, differs, small_run
from vffjax.hyperparameters import HyperParameters
from vffjax.training import epochs, feature_cache
from vffjax.training import scores as inference
from vffjax.training.augment import augmented
from vffjax.training.batch import Batch, abstract_batch
from vffjax.training.epochs import Epoch, pieces, segment_length
from vffjax.training.plan import Images, init_states, make_plan, make_task

MLP = {"network": "mlp", "widths": (6, 5), "grouping": "layer"}  # two groups: each costs seconds of compiling
AUGMENTED = {"flip": True, "alternating_flip": True, "crop_padding": 1}


@contextlib.contextmanager
def compilations():
    """A list of what is compiled within, whether or not it then comes from JAX's cache on disk."""
    found = []

    def listen(event, duration, **about):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(about.get("fun_name", event))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def on_host(run):
    return run._replace(data=Images(*(None if a is None else np.asarray(a) for a in run.data)))


def trained(run, length=None, numbers=(0, 1), active=None):
    """The states after these epochs, and the metrics of each; `run` keeps its own states."""
    states, epoch, found = jax.tree.map(jnp.copy, run.states), Epoch(run.plan, active, length), []
    for number in numbers:
        states, metrics = epoch(run.task, states, run.data, number)
        found.append(metrics)
    return states, found


# ----------------------------------------------------------------------------------------------------------------------------------
# The same bits


@pytest.mark.slow
@pytest.mark.full_optimisation
def test_any_segmentation_of_a_convolutional_network_gives_the_same_bits():
    config = config_of(**CONV, **AUGMENTED, batch_size=8, head_weight=0.5, warmup_epochs=0.5)
    run = small_run(config, shape=(8, 8, 3), examples=8 * 70 + 3)
    whole = trained(run)
    assert differs(whole[0], run.states)
    for length in (1, 7, 64):
        assert len(Epoch(run.plan, None, length).pieces) == {1: 70, 7: 10, 64: 2}[length]
        assert_same(trained(run, length), whole)
    assert_same(trained(on_host(run), 64), whole)


RULES = {
    "shared, cutout": {**AUGMENTED, "cutout": 2, "head_weight": 0.5},
    "erased, mixed": {"random_erasing": 0.5, "trivial_augment": True, "mixup": 0.8, "random_resized_crop": 0.5, "head_weight": 0.5},
    "ff": {"rule": "ff", "peer_normalisation": 0.1, "negatives": "hard", **AUGMENTED},
    "triplet, hard negatives": {"labelling": "triplet", "negatives": "hard", "optimizer": "sgd", "clip_norm": 1.0},
}


@functools.cache
def dense(rule):
    """A run of twelve steps an epoch, and what two epochs of it give."""
    run = small_run(config_of(**MLP, **RULES[rule], batch_size=8), examples=8 * 12 + 3)
    return run, trained(run)


@pytest.mark.full_optimisation
@pytest.mark.parametrize("rule", RULES)
def test_any_segmentation_gives_the_same_bits(rule):
    """As a run compiles: without optimisation, XLA's older fused loops round differently in loops of another length."""
    run, whole = dense(rule)
    assert differs(whole[0], run.states)
    for length in (1, 4):
        assert_same(trained(run, length), whole)


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_images_on_the_host_give_the_same_bits(rule):
    run, whole = dense(rule)
    assert_same(trained(on_host(run), 4), whole)


@pytest.mark.slow
@pytest.mark.parametrize("labelling", ["shared", "triplet"])
def test_features_kept_on_the_host_give_the_same_bits(labelling):
    found = {}
    for cache in ("device", "host"):
        changes = {"schedule": "sequential", "feature_cache": cache, "eval_batch_size": 2, "labelling": labelling}
        run = small_run(config_of(**MLP, **changes, batch_size=8), examples=8 * 6 + 3)  # more images than the host fetches at a time
        given = run.data if cache == "device" else on_host(run).data
        data = feature_cache.with_features(run.plan, 1, run.task, run.states, given)
        assert isinstance(data.features, np.ndarray) == (cache == "host")
        found[cache] = np.asarray(data.features), trained(run._replace(data=data), 2, (0,), active=1)
    assert_same(found["host"], found["device"])


@pytest.mark.slow
def test_an_epoch_can_go_on_at_the_end_of_any_segment():
    run, _ = dense("shared, cutout")
    epoch = Epoch(run.plan, None, 4)
    undisturbed = {}
    for part in epoch.segments(run.task, jax.tree.map(jnp.copy, run.states), run.data, 1):
        undisturbed[part.done] = jax.device_get((part.states, part.metrics))
    assert [0, *undisturbed] == [0, *(piece.stop for piece in epoch.pieces)] and len(undisturbed) > 2
    for done in list(undisturbed)[:-1]:
        rest = Epoch(run.plan, None, 4).segments(run.task, jax.device_put(undisturbed[done][0]), run.data, 1, done)
        found = {part.done: jax.device_get((part.states, part.metrics)) for part in rest}
        assert_same(found, {stop: undisturbed[stop] for stop in undisturbed if stop > done})


# ----------------------------------------------------------------------------------------------------------------------------------
# What a segment is given


def test_order_and_keys_are_what_a_seed_means():
    """The derivation is part of what a seed means: repeated here, so that it cannot change unnoticed."""
    plan = make_plan(config_of(seed=5, batch_size=8, **MLP), 43, 3)
    for epoch in (0, 3):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(5), 2), epoch)
        order = np.asarray(jax.random.permutation(jax.random.fold_in(key, 0), 43))[:40].reshape(5, 8)
        ids, keys = epochs.epoch_order(plan, 43, epoch)
        np.testing.assert_array_equal(ids, order)
        wanted = [jax.random.key_data(jax.random.fold_in(key, step + 1)) for step in range(5)]
        np.testing.assert_array_equal(jax.random.key_data(keys), wanted)


@pytest.mark.parametrize("host", [False, True], ids=["device", "host"])
def test_a_segment_is_given_the_images_labels_numbers_keys_and_features_of_its_steps(host):
    """The program is replaced by one that keeps what it is given."""
    run = small_run(config_of(**MLP, batch_size=8, warmup_epochs=1.0), examples=43)
    run = run._replace(data=run.data._replace(features=jnp.arange(43.0).reshape(43, 1)).as_rows())
    data, given = (on_host(run) if host else run).data, []

    class Watched(Epoch):
        def _program(self, length, task, states, batches):
            return lambda task, states, batches: given.append(batches) or (states, {"finite": jnp.ones((length, 2), bool)})

    done = [part.done for part in Watched(run.plan, None, 2).segments(run.task, run.states, data, 1)]
    assert done == [2, 5]
    ids, keys = epochs.epoch_order(run.plan, 43, 1)
    hyper = run.plan.hyperparameters(1)
    for batches, steps in zip(given, (slice(0, 2), slice(2, 5)), strict=True):
        np.testing.assert_array_equal(batches.ids, ids[steps])
        np.testing.assert_array_equal(batches.images, np.asarray(run.data.images)[ids[steps]])
        np.testing.assert_array_equal(batches.labels, np.asarray(run.data.labels)[ids[steps]])
        np.testing.assert_array_equal(batches.features[..., 0], ids[steps])
        np.testing.assert_array_equal(jax.random.key_data(batches.key), jax.random.key_data(keys[steps]))
        assert set(np.asarray(batches.epoch)) == {1}
        assert_same(batches.hyper, HyperParameters(*(values[steps] for values in hyper)))
        # What the certificate and the memory ledger take for granted.
        shapes = jax.tree.map(lambda a: (a.shape, a.dtype), batches)
        assert shapes == jax.tree.map(lambda a: (a.shape, a.dtype), abstract(run, len(batches.epoch)))
    assert isinstance(given[0], Batch)


def abstract(run, steps):
    feature = jax.ShapeDtypeStruct((43, 1), jnp.float32)
    return abstract_batch(8, run.data.image_shape, 2, feature, (steps,))


def test_a_segment_is_handed_over_while_the_one_before_it_runs_and_never_a_third(monkeypatch):
    """The programs are replaced by notes of what happens, in its order."""
    run, log = on_host(small_run(config_of(**MLP, batch_size=8), examples=43)), []

    class Watched(Epoch):
        def _program(self, length, task, states, batches):
            number = sum(entry.startswith("begin") for entry in log)
            return lambda *_: log.append(f"begin {number}") or (states, {"segment": number})

    put, given = jax.device_put, [*epochs.epoch_order(run.plan, 43, 0)]
    monkeypatch.setattr(epochs, "epoch_order", lambda *_: given)
    monkeypatch.setattr(epochs.jax, "device_put", lambda rows, *place: (log.append("put"), put(rows, *place))[1])
    monkeypatch.setattr(epochs.jax, "block_until_ready", lambda metrics: log.append(f"wait {metrics.get('segment')}"))
    for number, _ in enumerate(Watched(run.plan, None, 1).segments(run.task, run.states, run.data, 0)):
        log.append(f"end {number}")
    log = [entry for entry, before in zip(log, [None, *log], strict=False) if entry != before]  # images and labels as one
    wanted = [[f"begin {n}", f"wait {n - 1 if n else None}", f"end {n}"] for n in range(5)]
    assert log == [entry for part in wanted for entry in ("put", *part)]


@pytest.mark.parametrize("host", [False, True], ids=["device", "host"])
def test_the_host_fetches_the_order_of_the_images_once_in_an_epoch(host, monkeypatch):
    """If it fetched the ids of a segment, it would wait for the segment before, and nothing would be queued."""
    run, fetched = small_run(config_of(**MLP, batch_size=8), examples=43), []

    class Watched(Epoch):
        def _program(self, length, task, states, batches):
            return lambda *_: (states, {})

    class Counting:
        def __getattr__(self, name):
            return getattr(np, name)

        def asarray(self, values):
            fetched.append(np.shape(values))
            return np.asarray(values)

    monkeypatch.setattr(epochs, "np", Counting())
    assert len([*Watched(run.plan, None, 1).segments(run.task, run.states, (on_host(run) if host else run).data, 0)]) == 5
    assert fetched == ([(5, 8)] if host else [])


@pytest.mark.slow
def test_kept_features_have_the_same_bits_wherever_the_images_are_though_the_last_batch_is_not_full():
    found = []
    for where in ("device", "host"):
        changes = {"schedule": "sequential", "feature_cache": "device", "eval_batch_size": 22, "norm": "layer", "batch_size": 8}
        run = small_run(config_of(network="mlp", widths=(512, 64), grouping="layer", **changes), examples=16 * 22 + 7)
        given = run.data if where == "device" else on_host(run).data
        found.append(np.asarray(feature_cache.with_features(run.plan, 1, run.task, run.states, given).features))
    np.testing.assert_array_equal(*found)


@pytest.mark.slow
def test_each_image_is_mirrored_in_every_other_epoch_of_a_run():
    """By the numbers of the images in the data set: their places in the batches change from epoch to epoch."""
    run = small_run(config_of(**MLP, flip=True, alternating_flip=True, batch_size=8), examples=40)
    views, plain = [], []
    for epoch in range(3):
        ids, keys = epochs.epoch_order(run.plan, 40, epoch)
        seen = {}
        for some, key in zip(np.asarray(ids), keys, strict=True):
            batch = run.batch(key=key)._replace(images=run.data.images[some], ids=jnp.asarray(some), epoch=jnp.int32(epoch))
            seen |= dict(zip(some.tolist(), np.asarray(augmented(run.plan.config, run.task, batch)[0]), strict=True))
            plain.append(some)
        views.append([seen[i] for i in range(40)])
    np.testing.assert_array_equal(views[0], views[2])
    np.testing.assert_allclose(views[0], [view[:, ::-1] for view in views[1]], rtol=1e-6, atol=1e-6)
    assert (plain[0] != plain[5]).any()


# ----------------------------------------------------------------------------------------------------------------------------------
# Segments


def test_pieces_cover_an_epoch_in_two_lengths_that_differ_by_one_at_the_most():
    for steps in [*range(1, 40), 97, 128, 391]:
        for length in [*range(1, 45), 200, 1000]:
            found = pieces(steps, length)
            assert [step for piece in found for step in piece] == list(range(steps))
            lengths = {len(piece) for piece in found}
            assert max(lengths) - min(lengths) <= 1
            assert max(lengths) <= (3 if length == 2 else length)
            if length == 1:
                assert lengths == {1}
            elif steps > 1:
                assert min(lengths) > 1
                # No more of them than the length asks for.
                assert len(found) <= -(-steps // length)


def test_the_length_of_a_segment_is_the_configured_or_at_least_two_and_of_few_bytes():
    plan = lambda **changes: make_plan(config_of(**CONV | {"batch_size": 8} | changes), 800, 3)  # noqa: E731
    assert [segment_length(plan(segment_steps=n), (8, 8, 3)) for n in (1, 7, 10**6)] == [1, 7, 10**6]
    large = {"widths": (512,) * 4, "batch_size": 64}
    assert segment_length(plan(**large), (512, 512, 3), backend="cpu") == 2
    # A small network is limited by the bytes of its images, and by what is kept beside them.
    tiny = plan()
    assert segment_length(tiny, (8, 8, 3), backend="tpu") == epochs.LARGEST_BYTES // (8 * 192)
    assert segment_length(tiny, (8, 8, 3), feature_bytes=808, backend="tpu") == epochs.LARGEST_BYTES // (8 * 1000)
    # Between both by time: a wider network takes shorter segments, and an accelerator longer ones.
    wide, wider = (plan(widths=(width,) * 4, batch_size=64) for width in (64, 256))
    lengths = [segment_length(wider, (32, 32, 3), backend="cpu"), segment_length(wide, (32, 32, 3), backend="cpu")]
    lengths.append(segment_length(wide, (32, 32, 3), backend="tpu"))
    assert 2 <= lengths[0] < lengths[1] < lengths[2] <= epochs.LARGEST_BYTES // (64 * 3072)
    assert segment_length(wide, (32, 32, 3)) == lengths[1]


# ----------------------------------------------------------------------------------------------------------------------------------
# What is compiled


BASE = {**MLP, "optimizer": "sgd", "head_weight": 0.5, "clip_norm": 1.0, "batch_size": 8, "segment_steps": 2, "epochs": 3}
NUMBERS = [
    *({"seed": seed} for seed in (1, 2)),
    *({"learning_rate": rate} for rate in (1e-2, 3e-2, 0.0)),
    *({key: value} for key, value in {"temperature": 0.1, "margin": 0.2, "weight_decay": 0.01, "momentum": 0.5}.items()),
    *({key: value} for key, value in {"label_smoothing": 0.1, "head_weight": 0.2, "clip_norm": 0.1, "group_decay": 0.5}.items()),
    *({key: value} for key, value in {"epochs": 5, "warmup_epochs": 0.5, "noise_scale": 1.0}.items()),
    {"overrides": {"group1": {"learning_rate": 1e-4, "temperature": 0.3, "head_weight": 0.1}}},
]
FF = {"rule": "ff", "peer_normalisation": 0.1}


def everything(config):
    """First states, codebook, two epochs and the scores of a run on random images."""
    rng = np.random.default_rng(config.seed)
    data = Images(jnp.asarray(rng.integers(0, 256, (43, 8, 8, 1), np.uint8)), jnp.asarray(rng.integers(0, 3, 43, np.int32)))
    plan = make_plan(config, 43, 3)
    task = make_task(config, 3, (8, 8, 1), (float(rng.uniform()),), (0.3,))
    states = init_states(plan, (8, 8, 1))
    epoch = Epoch(plan, None, segment_length(plan, (8, 8, 1)))
    epoch.compile(task, states, data)
    losses = []
    for number in range(2):
        states, metrics = epoch(task, states, data, number)
        losses.append(metrics["loss"])
    return losses, np.asarray(inference.make_scores(plan, "heads")(task, states, data.images))


@pytest.mark.slow
def test_other_seeds_and_numbers_of_one_shape_compile_nothing():
    jax.clear_caches()
    with compilations() as found:
        base = everything(config_of(**BASE))
    assert len(found) > 5, found  # the watch works
    for changes in NUMBERS:
        with compilations() as found:
            result = everything(config_of(**BASE | changes))
        assert found == [], changes
        assert differs(result, base), changes
    with compilations() as found:
        everything(config_of(**BASE | FF))
    assert found
    for changes in ({"goodness_threshold": 0.5}, {"peer_normalisation": 0.2}):
        with compilations() as found:
            everything(config_of(**BASE | FF | changes))
        assert found == [], changes


OTHER_PROGRAMS = [{"head_weight": 0.0}, {"clip_norm": 0.0}, {"temperature": 0.1, "norm": "layer"}]


@pytest.mark.slow
@pytest.mark.parametrize("changes", OTHER_PROGRAMS, ids=str)
def test_what_takes_a_part_out_of_the_program_is_another_program(changes):
    base, other = (make_plan(config_of(**BASE | own), 43, 3).program for own in ({}, changes))
    assert base != other
    jax.clear_caches()  # or another test may have compiled it
    everything(config_of(**BASE))
    with compilations() as found:
        everything(config_of(**BASE | changes))
    assert found


@pytest.mark.slow
def test_an_epoch_compiles_each_length_once_and_nothing_while_it_runs():
    run = small_run(config_of(**MLP, batch_size=8, schedule="sequential"), examples=43)
    epoch = Epoch(run.plan, 0, 2)
    jax.clear_caches()
    with compilations() as found:
        longest = epoch.compile(run.task, run.states, run.data)
    assert [name for name in found if "segment" in name] == ["jit(run_segment)"] * 2, found  # of two and of three steps
    batches = longest.in_avals[0][2]
    assert batches.epoch.shape == (3,)
    states, _ = epoch(run.task, jax.tree.map(jnp.copy, run.states), run.data, 0)  # and the small programs that gather its images
    with compilations() as found:
        for other in (epoch, Epoch(run.plan, 0, 2)):
            other.compile(run.task, states, run.data)
            states, _ = other(run.task, states, run.data, 1)
    assert found == []


def test_runs_whose_programs_are_equal_share_a_plan_s_program():
    plans = [make_plan(config_of(**BASE | changes), 43, 3) for changes in ({}, *NUMBERS)]
    assert len({plan.program for plan in plans}) == 1
    assert len(set(plans)) == len(plans)
    assert len({dataclasses.replace(plan, steps_per_epoch=plan.steps_per_epoch + i).program for i, plan in enumerate(plans)}) == 1
