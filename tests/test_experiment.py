"""Whole runs: the record, exact resume, refusals that leave a workdir as it was, no use of the test set, the sequential schedule."""

import contextlib
import dataclasses
import functools
import json
import pathlib
import re
import shutil
import signal
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

import runs
from oracles import slow_but, traced_afresh
from runs import TIMES, assert_same_bits, contents, copy_of, finished, shared, summary_of, tell_to_leave, tiny, train, untimed
from vffjax.data import load as data
from vffjax.errors import UserError
from vffjax.runs import checkpoint, experiment, loop
from vffjax.runs.checkpoint import Checkpoints
from vffjax.runs.logbook import Logbook, read_metrics
from vffjax.runs.termination import Terminated
from vffjax.runs.workdir import load_run
from vffjax.training import augment
from vffjax.training.plan import init_states
from vffjax.uses import evaluation


class Killed(BaseException):
    """Stands for a signal: nothing in the library catches it."""


def saved_states(config, workdir, epoch):
    """Groups and task of a saved epoch, read the way a user's program would."""
    plan, states, task, _ = load_run(workdir, str(epoch))
    assert plan.config == config
    return states, task


# ----------------------------------------------------------------------------------------------------------------------------------
# What a run leaves behind


def test_metrics_hold_one_object_per_epoch():
    lines = (finished() / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [r["epoch"] for r in records] == [1, 2, 3]
    for r in records:
        assert {"loss", "train_accuracy", "val_error", "images_per_second", "seconds", "voting"} <= set(r)
        for key in ("loss_per_group", "local_loss_per_group", "head_loss_per_group", "train_accuracy_per_group", "val_error_per_group"):
            assert len(r[key]) == 2
        assert r["loss"] == pytest.approx(sum(r["loss_per_group"]))
    assert records[-1]["loss"] < records[0]["loss"]
    assert summary_of(finished())["seconds"] == pytest.approx(sum(r["seconds"] for r in records))


@pytest.mark.slow
def test_a_run_without_a_codebook_is_drawn(tmp_path):
    changes = JOINT | {"rule": "ff"}  # trained below too, and so compiled once
    train(tiny(**changes), tmp_path, plots=True)
    with Image.open(tmp_path / "features.png") as image:
        assert np.asarray(image.convert("RGB")).std() > 5


# ----------------------------------------------------------------------------------------------------------------------------------
# Going on


@functools.cache
def undisturbed(**changes):
    if tiny(**changes) == tiny():
        return finished(), summary_of(finished())
    folder = finished().parent / f"undisturbed-{'-'.join(map(str, changes.values()))}"
    summary = train(tiny(**changes), folder)
    return shared(folder), summary


@contextlib.contextmanager
def killed_after_line(epoch):
    """Before the epoch's checkpoint."""
    sound = Logbook.epoch

    def patched(self, record):
        written = sound(self, record)
        if record["epoch"] == epoch:
            raise Killed
        return written

    with mock.patch.object(Logbook, "epoch", patched), pytest.raises(Killed):
        yield


@contextlib.contextmanager
def killed_in_save(epoch):
    """The arrays are on disk, their digests are not."""
    sound = checkpoint.write_json

    def patched(path, value):
        if path.name == f"{epoch}.sha256.json":
            raise Killed
        sound(path, value)

    with mock.patch.object(checkpoint, "write_json", patched), pytest.raises(Killed):
        yield


@contextlib.contextmanager
def killed_before_prune(epoch):
    """All is saved, and what is no longer needed is still there."""
    sound = checkpoint.Writer._prune

    def patched(self):
        if max(self._ranks, default=0) == epoch:
            raise Killed
        sound(self)

    with mock.patch.object(checkpoint.Writer, "_prune", patched), pytest.raises(Killed):
        yield


@contextlib.contextmanager
def killed_in_prune(epoch):
    """A step that is no longer needed is half deleted."""
    sound = checkpoint.ocp.CheckpointManager.delete

    def patched(self, step):
        if max(self.all_steps()) == epoch:
            shutil.rmtree(pathlib.Path(self.directory) / str(step) / "group0")
            raise Killed
        sound(self, step)

    with mock.patch.object(checkpoint.ocp.CheckpointManager, "delete", patched), pytest.raises(Killed):
        yield


@contextlib.contextmanager
def killed_at_the_summary(epoch):
    with mock.patch.object(experiment, "conclude", mock.Mock(side_effect=Killed)), pytest.raises(Killed):
        yield


@contextlib.contextmanager
def killed_after_save(epoch):
    """Before the next epoch."""
    sound = checkpoint.Writer.save

    def patched(self, number, *rest):
        sound(self, number, *rest)
        if number == epoch:
            raise Killed

    with mock.patch.object(checkpoint.Writer, "save", patched), pytest.raises(Killed):
        yield


JOINT = {"epochs": 3}
FOUR = {"epochs": 4}  # of which one is deleted: two and four are needed to the end
SEQUENTIAL = {"schedule": "sequential", "epochs": 2}
INTERRUPTED = [
    (JOINT | {"rule": "vff"}, [(killed_after_line, 1)]),
    (JOINT | {"rule": "vff"}, [(killed_in_save, 2), (killed_after_save, 2)]),
    (FOUR | {"rule": "vff"}, [(killed_before_prune, 3), (killed_in_prune, 4)]),
    (FOUR | {"rule": "vff"}, [(killed_before_prune, 4), (killed_at_the_summary, 4)]),
    (JOINT | {"rule": "vff", "labelling": "triplet", "negatives": "hard", "checkpoint_every": 2}, [(killed_after_line, 3)]),
    (JOINT | {"rule": "ff"}, [(killed_in_save, 1), (killed_after_line, 3)]),
    (SEQUENTIAL | {"rule": "vff"}, [(killed_after_save, 1), (killed_after_save, 2)]),
    (SEQUENTIAL | {"rule": "head", "optimizer": "sgd", "warmup_epochs": 1.5}, [(killed_in_save, 3)]),
]


INTERRUPTED = slow_but(INTERRUPTED, INTERRUPTED[0], several=True)
INTERRUPTED.append(pytest.param(*INTERRUPTED[0].values, marks=pytest.mark.full_optimisation))


@pytest.mark.parametrize(("changes", "kills"), INTERRUPTED, ids=lambda v: "-".join(map(str, v.values())) if isinstance(v, dict) else "")
def test_an_interrupted_run_ends_with_the_bits_of_an_undisturbed_one(changes, kills, tmp_path):
    config = tiny(**changes)
    wanted_dir, wanted = undisturbed(**changes)
    for kill, epoch in kills:
        with kill(epoch):
            train(config, tmp_path)
        assert not (tmp_path / "summary.json").exists()
    found = train(config, tmp_path)

    assert untimed(found) == untimed(wanted)
    assert found["peak_bytes"] == wanted["peak_bytes"]
    assert_same_run(tmp_path, wanted_dir, config)


def assert_same_run(workdir, other, config):
    """Equal records, and equal bits in every saved epoch."""
    assert list(map(untimed, read_metrics(workdir))) == list(map(untimed, read_metrics(other)))
    epochs = Checkpoints(workdir).epochs()
    assert epochs == Checkpoints(other).epochs()
    for epoch in epochs:
        assert_same_bits(saved_states(config, workdir, epoch), saved_states(config, other, epoch))


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["joint", "sequential"])
def test_sigterm_saves_the_epoch_and_leaves_and_the_run_ends_as_if_undisturbed(schedule, tmp_path):
    # Epoch 3 is not to be saved by the schedule, and is the best of all: no undisturbed run could choose it.
    config = tiny(epochs=4, checkpoint_every=2, schedule=schedule)
    sound, validate = Logbook.epoch, loop.validate

    def signalled(self, record):
        if record["epoch"] == 3:
            tell_to_leave()
        return sound(self, record)

    def scripted(*args):
        return validate(*args) | {"val_error": next(errors)}

    runs: dict = {}
    for name in ("disturbed", "undisturbed"):
        errors = iter([50.0, 40.0, 1.0, 30.0, 45.0, 20.0, 35.0, 25.0])
        with mock.patch.object(loop, "validate", scripted):
            if name == "disturbed":
                total = 4 if schedule == "joint" else 8
                with mock.patch.object(Logbook, "epoch", signalled), pytest.raises(Terminated, match=f"epoch 3 of {total} is saved"):
                    train(config, tmp_path / name)
                assert Checkpoints(tmp_path / name).epochs() == [2, 3]
                assert not (tmp_path / name / "summary.json").exists()
            runs[name] = train(config, tmp_path / name)
    assert untimed(runs["disturbed"]) == untimed(runs["undisturbed"])
    assert runs["disturbed"]["best_epoch"] == (4 if schedule == "joint" else 6)
    assert_same_run(tmp_path / "disturbed", tmp_path / "undisturbed", config)
    # The signal has its old meaning again.
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_sigterm_during_a_save_leaves_after_it(tmp_path):
    sound = checkpoint.Writer.save

    def signalled(self, *arguments):
        tell_to_leave()
        sound(self, *arguments)

    with mock.patch.object(checkpoint.Writer, "save", signalled), pytest.raises(Terminated, match="epoch 1 of 3 is saved"):
        train(tiny(), tmp_path)
    assert [r["epoch"] for r in read_metrics(tmp_path)] == [1]


def test_runs_of_other_seeds_differ(tmp_path):
    # Else the comparisons above would say nothing.
    train(tiny(epochs=1, seed=1), tmp_path)
    first = read_metrics(tmp_path)[0]
    assert untimed(first) != untimed(read_metrics(finished())[0])


def test_training_a_finished_run_again_changes_nothing(tmp_path):
    workdir = copy_of(finished(), tmp_path).rename(tmp_path / finished().name)  # which stands in curves.png
    before = contents(workdir)
    train(tiny(), workdir, plots=True)
    after = contents(workdir)
    assert {name: content for name, (content, _) in before.items()} == {name: content for name, (content, _) in after.items()}
    # The checkpoints and the record were not even written again.
    for name in before:
        if name.startswith("checkpoints/") or name in ("config.json", "metrics.jsonl"):
            assert before[name][1] == after[name][1], name


# ----------------------------------------------------------------------------------------------------------------------------------
# Refusals


def test_input_that_does_not_fit_leaves_no_workdir(tmp_path):
    with pytest.raises(UserError, match=r"config\.batch_size=361: larger than the 360 training images"):
        train(tiny(batch_size=361), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def damage(workdir, *epochs):
    for epoch in epochs:
        (workdir / "checkpoints" / str(epoch) / "group1" / "manifest.ocdbt").write_bytes(b"")


@pytest.mark.slow
def test_from_a_damaged_latest_checkpoint_a_run_goes_back_to_the_one_before_and_says_so(tmp_path, capsys):
    workdir = copy_of(finished(), tmp_path)
    assert Checkpoints(workdir).epochs() == [2, 3]
    damage(workdir, 3)
    (workdir / "metrics.jsonl").write_text('{"epoch": 1}\n')
    (workdir / "summary.json").unlink()
    assert untimed(train(tiny(), workdir)) == untimed(summary_of(finished()))
    assert_same_run(workdir, finished(), tiny())
    err = capsys.readouterr().err
    assert "checkpoints/3/group1/manifest.ocdbt: damaged checkpoint (SHA-256 differs); now " in err
    assert "going on from epoch 2" in err
    assert "epoch 3/3" in err
    # What was set aside went when its epoch had been saved again.
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["2", "2.sha256.json", "3", "3.sha256.json"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["damaged", "its folder gone", "its digests gone"])
def test_without_the_best_epoch_the_run_stops_since_it_would_take_another_for_it(how, tmp_path):
    workdir = copy_of(finished(), tmp_path)
    assert summary_of(workdir)["best_epoch"] == 2
    if how == "damaged":
        damage(workdir, 2)
    elif how == "its folder gone":
        shutil.rmtree(workdir / "checkpoints" / "2")
    else:
        (workdir / "checkpoints" / "2.sha256.json").unlink()
    before = contents(workdir)
    with pytest.raises(
        UserError, match=r"checkpoints/2.*it is the best epoch; restore it from a copy, or move .*checkpoints away to train again"
    ):
        train(tiny(), workdir)
    assert contents(workdir) == before

    # The fix goes on.
    (workdir / "checkpoints").rename(tmp_path / "moved")
    assert untimed(train(tiny(), workdir)) == untimed(summary_of(finished()))


def test_where_every_checkpoint_is_damaged_the_run_stops(tmp_path):
    workdir = copy_of(finished(), tmp_path)
    damage(workdir, 2, 3)
    before = contents(workdir)
    with pytest.raises(UserError, match=r"3/group1/manifest\.ocdbt: damaged .*; restore it from a copy, or move .* from the start$"):
        train(tiny(), workdir)
    assert contents(workdir) == before


@pytest.mark.slow
def test_an_older_checkpoint_that_is_not_the_best_may_be_damaged(tmp_path, capsys):
    # The first of three is the best.
    sound, errors = loop.validate, iter([10.0, 30.0, 20.0])
    with mock.patch.object(loop, "validate", lambda *a: sound(*a) | {"val_error": next(errors)}):
        summary = train(tiny(), tmp_path)
    assert Checkpoints(tmp_path).epochs() == [1, 2, 3]
    damage(tmp_path, 2)
    capsys.readouterr()
    assert untimed(train(tiny(), tmp_path)) == untimed(summary)
    assert re.search(r"checkpoints/2/group1/manifest.ocdbt: damaged .*; now .*2\.aside\n", capsys.readouterr().err)
    assert (tmp_path / "checkpoints" / "2.aside").is_dir()


def test_a_checkpoint_that_is_gone_is_missed(tmp_path, capsys):
    workdir = copy_of(finished(), tmp_path)
    shutil.rmtree(workdir / "checkpoints" / "3")
    assert untimed(train(tiny(), workdir)) == untimed(summary_of(finished()))
    assert re.search(r"checkpoints/3: missing, .*\ngoing on from epoch 2\n", capsys.readouterr().err)


def test_other_data_than_the_run_began_with_are_refused(tmp_path):
    workdir = copy_of(finished(), tmp_path)
    before, sound = contents(workdir), data.load

    def one_pixel_apart(config):
        dataset = sound(config)
        dataset.train.images[0, 0, 0] ^= 1
        return dataset

    with mock.patch.object(data, "load", one_pixel_apart), pytest.raises(UserError, match=r"config\.dataset='digits': other images"):
        train(tiny(), workdir)
    assert contents(workdir) == before


@pytest.mark.slow
def test_a_run_that_goes_on_elsewhere_says_so(tmp_path):
    config = tiny(epochs=2)
    with killed_after_save(1):
        train(config, tmp_path)
    here = experiment.origin(config)
    with mock.patch.object(experiment, "origin", lambda config: here | {"device": "another"}):
        summary = train(config, tmp_path)
    assert summary["device"] == "another"
    assert [origin["device"] for origin in summary["earlier_origins"]] == [here["device"]]
    # Nothing is trained when a finished run is started again: what trained it stays.
    assert untimed(train(config, tmp_path)) == untimed(summary)


@pytest.mark.slow
def test_divergence_names_step_and_group_and_leaves_earlier_checkpoints_intact(tmp_path):
    def explodes_at_step_5(config, *_):
        group1 = config.optimizer == "sgd"
        return optax.sgd(lambda count: jnp.where(group1 & (count == 4), jnp.inf, 1e-2))

    config = tiny(schedule="sequential", epochs=1, rule="head", norm="none", overrides={"group1": {"optimizer": "sgd"}})
    # The loss of step 6 is the first to see what step 5 has done.
    found = r"epoch 2, step 6 of 11: the loss of group1 is not finite; the checkpoint of epoch 1 is kept; lower config\.lea"
    with runs.optimizer(explodes_at_step_5):
        with pytest.raises(UserError, match=found):
            train(config, tmp_path)
        states, _ = saved_states(config, tmp_path, 1)
    assert Checkpoints(tmp_path).epochs() == [1]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(states))
    assert [r["epoch"] for r in read_metrics(tmp_path)] == [1]
    assert not (tmp_path / "summary.json").exists()


def explosive(*_):
    return optax.chain(optax.add_decayed_weights(1e10), optax.sgd(1e38))


@pytest.mark.slow
def test_a_step_that_diverges_after_the_last_loss_is_not_saved(tmp_path):
    # One step: the loss is that of the initial parameters, and finite; the update is not.
    with runs.optimizer(explosive):
        found = r"epoch 1, after its last step a number of group0's state is not finite; there is no checkpoint yet"
        with pytest.raises(UserError, match=found):
            train(tiny(epochs=1, rule="head", batch_size=360), tmp_path)
    assert Checkpoints(tmp_path).epochs() == []


@pytest.mark.slow
def test_steps_that_are_not_finite_can_be_skipped(tmp_path):
    """One image in the training data makes every network overflow: the steps without it train as ever."""
    config = tiny(epochs=2, on_nonfinite="skip")
    poisoned, sound = [], augment.normalised

    def overflowing(task, images):
        # No byte image does this by itself; a pixel of value 77 at the corner is the mark.
        marked = images[:, :1, :1] == 77
        return jnp.where(marked, jnp.inf, sound(task, images))

    def marked(config):
        dataset = load(config)
        for split in (dataset.train, dataset.validation, dataset.test):
            split.images[:, 0, 0] = 0
        dataset.train.images[:1, 0, 0] = 77
        poisoned.append(1)
        return dataset

    load = data.load
    patches = mock.patch.object(augment, "normalised", overflowing), mock.patch.object(data, "load", marked)
    with traced_afresh(), patches[0], patches[1]:
        train(config, tmp_path)
        with pytest.raises(UserError, match=r"epoch 1, step \d+ of 11: the loss of group0 is not finite"):
            train(tiny(epochs=2), tmp_path / "stops")
    assert poisoned
    records = read_metrics(tmp_path)
    # The image is in one step of each epoch, or in the rows that are left over.
    assert all(r["skipped_steps_per_group"] in ([1, 1], [0, 0]) for r in records)
    assert any(r["skipped_steps_per_group"] == [1, 1] for r in records)
    assert all(np.isfinite([*r["loss_per_group"], r["train_accuracy"]]).all() for r in records)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(saved_states(config, tmp_path, 2)))


@pytest.mark.slow
def test_an_epoch_in_which_every_step_is_skipped_ends_the_run(tmp_path):
    found = r"epoch 1, no step of group0 was finite; there is no checkpoint yet"
    with runs.optimizer(explosive), pytest.raises(UserError, match=found):
        train(tiny(epochs=1, rule="head", on_nonfinite="skip"), tmp_path)


# ----------------------------------------------------------------------------------------------------------------------------------
# Choices


@pytest.mark.slow
def test_the_test_set_decides_nothing(tmp_path):
    sound = data.load

    def other_test_set(config):
        dataset = sound(config)
        test = data.Split(255 - dataset.test.images[::-1], (dataset.test.labels + 3) % 10)
        return dataclasses.replace(dataset, test=test)

    config = tiny()
    with mock.patch.object(data, "load", other_test_set):
        found = train(config, tmp_path)
    wanted = summary_of(finished())
    assert found["test_error"] != wanted["test_error"]
    others = set(wanted) - {"test_error", "test_error_per_group", "data_sha256", *TIMES}
    assert {key: found[key] for key in others} == {key: wanted[key] for key in others}
    assert list(map(untimed, read_metrics(tmp_path))) == list(map(untimed, read_metrics(finished())))
    for epoch in Checkpoints(finished()).epochs():
        assert_same_bits(saved_states(config, tmp_path, epoch), saved_states(config, finished(), epoch))


# ----------------------------------------------------------------------------------------------------------------------------------
# The sequential schedule


@pytest.mark.slow
def test_the_sequential_schedule_trains_every_group_once_in_turn():
    changes = SEQUENTIAL | {"rule": "vff"}
    config = tiny(**changes)
    workdir, summary = undisturbed(**changes)
    records = read_metrics(workdir)
    assert [r["group"] for r in records] == [0, 0, 1, 1]
    assert [len(r["val_error_per_group"]) for r in records] == [1, 1, 2, 2]
    assert [[x is not None for x in r["loss_per_group"]] for r in records] == [[True, False]] * 2 + [[False, True]] * 2
    assert summary["best_epoch"] > 2

    plan, _, _, run = load_run(workdir, "latest")
    fresh = init_states(plan, tuple(run["image_shape"]))
    final = saved_states(config, workdir, 4)[0]
    third = saved_states(config, workdir, 3)[0]
    # The first group does not change any more; the second has left its initialisation.
    assert_same_bits(final[0], third[0])
    for i in range(2):
        for a, b in zip(jax.tree.leaves(fresh[i].params), jax.tree.leaves(final[i].params), strict=True):
            assert not np.array_equal(a, b)


def test_an_untrained_group_is_not_evaluated(tmp_path):
    config = tiny(schedule="sequential", epochs=1)
    with killed_after_save(1):
        train(config, tmp_path)
    found = evaluation.evaluate(tmp_path)
    assert found["epoch"] == 1
    assert len(found["test_error_per_group"]) == len(found["val_error_per_group"]) == 1


@pytest.mark.parametrize(
    ("backend", "told", "expected"), [("tpu", None, "kept"), ("gpu", "elsewhere", "elsewhere"), ("cpu", None, None)], ids=str
)
def test_compiled_programs_are_kept_on_accelerators_unless_jax_was_told_where(backend, told, expected, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "kept"))
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", told)
        experiment.keep_compiled_programs()
        found = jax.config.jax_compilation_cache_dir
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert found == (str(tmp_path / "kept" / "vffjax") if expected == "kept" else expected)
