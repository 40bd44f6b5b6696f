"""What a start of a run reads, what it may change, and that no epoch's time holds a compilation."""

import collections
import contextlib
import gc
import json
import re
import weakref
from unittest import mock

import jax
import numpy as np
import pytest

from runs import assert_same_bits, contents, copy_of, finished, summary_of, tiny, train, untimed
from vffjax.data import load as data
from vffjax.errors import UserError
from vffjax.runs import checkpoint, experiment, loop, saved_epoch, workdir
from vffjax.runs.checkpoint import Checkpoints
from vffjax.runs.termination import Terminated
from vffjax.runs.workdir import load_run, read_config
from vffjax.training import epochs, feature_cache
from vffjax.uses import evaluation

# ----------------------------------------------------------------------------------------------------------------------------------
# What is read


@contextlib.contextmanager
def counted_reads():
    """How often each file is hashed, and how often a run's state is read."""
    hashed, states = collections.Counter(), []
    sound, restore = saved_epoch.sha256_of, saved_epoch.SavedEpoch._restore

    def hashing(path):
        hashed[path] += 1
        return sound(path)

    def restoring(self, **items):
        states.extend([self.epoch] if "run" in items else [])
        return restore(self, **items)

    with mock.patch.object(saved_epoch, "sha256_of", hashing), mock.patch.object(saved_epoch.SavedEpoch, "_restore", restoring):
        yield hashed, states


def files_of(folder):
    return {path for path in (folder / "checkpoints").glob("*/**/*") if path.is_file()}


def test_a_finished_run_that_is_started_again_reads_each_file_once(tmp_path):
    folder = copy_of(finished(), tmp_path)
    with counted_reads() as (hashed, states):
        train(tiny(), folder)
    assert set(hashed) == files_of(folder.resolve())
    assert set(hashed.values()) == {1}
    assert sorted(states) == Checkpoints(folder).epochs()


@pytest.mark.slow
def test_a_resumed_run_reads_each_file_once_and_what_it_writes_itself_twice(tmp_path):
    """Twice: a step that was saved by this process is verified once more where it is the best, and read at the end."""
    config = tiny(epochs=2)
    with mock.patch.object(experiment, "conclude", mock.Mock(side_effect=KeyboardInterrupt)), pytest.raises(KeyboardInterrupt):
        train(config, tmp_path)
    newest = tmp_path.resolve() / "checkpoints" / "2"
    newest.with_name("2.sha256.json").unlink()
    found = files_of(tmp_path.resolve()) - {path for path in newest.rglob("*") if path.is_file()}
    with counted_reads() as (hashed, states):
        train(config, tmp_path)
    assert {path: hashed[path] for path in found} == dict.fromkeys(found, 1)
    assert set(hashed.values()) == {1}
    assert set(states) <= {1, 2}
    assert len(states) <= 2


def test_evaluate_reads_each_file_once():
    with counted_reads() as (hashed, states):
        load_run(finished())
    assert set(hashed.values()) == {1}
    assert sorted(states) == Checkpoints(finished()).epochs()


def test_an_epoch_that_a_training_run_deletes_meanwhile_is_chosen_again(tmp_path):
    folder, sound = copy_of(finished(), tmp_path), Checkpoints.chosen
    deleted = []

    def chosen(self, name):
        found = sound(self, name)
        if not deleted:  # as `Writer._prune` does
            deleted.append(found.epoch)
            (self.folder / f"{found.epoch}.sha256.json").rename(self.folder / f"{found.epoch}.deleted")
            (self.folder / str(found.epoch) / "run" / "metadata").unlink()
            del found.__dict__["run"]
        return found

    with mock.patch.object(Checkpoints, "chosen", chosen):
        *_, run = load_run(folder)
    assert deleted == [2]
    assert run["epoch"] == 3


def test_an_epoch_that_is_damaged_and_still_listed_is_not_tried_for_ever(tmp_path):
    folder = copy_of(finished(), tmp_path)
    (folder / "checkpoints" / "3" / "task" / "_METADATA").write_text("")
    with pytest.raises(UserError, match="task/_METADATA: damaged"):
        load_run(folder, "3")


# ----------------------------------------------------------------------------------------------------------------------------------
# What may change


def scripted(errors):
    """Validation errors as given, one epoch after the other."""
    sound, left = loop.validate, iter(errors)
    return mock.patch.object(loop, "validate", lambda *given: sound(*given) | {"val_error": next(left)})


@contextlib.contextmanager
def left_after(epoch):
    sound = checkpoint.Writer.save

    def saving(self, number, *rest):
        sound(self, number, *rest)
        if number == epoch:
            raise Terminated("")

    with mock.patch.object(checkpoint.Writer, "save", saving), pytest.raises(Terminated):
        yield


CHANGES = {
    "data_on": "host",
    "devices": 1,
    "eval_batch_size": 37,
    "checkpoint_every": 2,
    "rematerialise": True,
    "segment_steps": 4,
    "checkpoint_seconds": 1e3,
}


@pytest.mark.slow
def test_memory_and_disk_may_be_changed_when_a_run_goes_on_and_the_change_stands_in_its_origins(tmp_path, capsys):
    # Epoch 3 was due before the change, and is the best: a change of config.checkpoint_every does not unmake it.
    with scripted([30.0, 20.0, 10.0]), left_after(3):
        train(tiny(epochs=4), tmp_path)
    capsys.readouterr()
    with scripted([15.0]):
        summary = train(tiny(epochs=4, **CHANGES), tmp_path)
    said = capsys.readouterr().err
    for key, value in CHANGES.items():
        assert re.search(rf"config\.{key}: .* until here, {value!r} from here on\n", said), said
    assert "need not have the bits" in said
    assert summary["best_epoch"] == 3
    assert summary["settings"] == CHANGES
    assert [origin["settings"]["checkpoint_every"] for origin in summary["earlier_origins"]] == [1]
    assert read_config(tmp_path) == tiny(epochs=4, **CHANGES)
    # The changed configuration is the run's own from now on: it is read, evaluated, and started again without a word.
    assert evaluation.evaluate(tmp_path)["epoch"] == 3
    capsys.readouterr()
    assert untimed(train(tiny(epochs=4, **CHANGES), tmp_path)) == untimed(summary)
    assert "from here on" not in capsys.readouterr().err


@pytest.mark.slow
def test_a_change_of_which_no_result_depends_is_said_without_a_warning(tmp_path, capsys):
    with left_after(1):
        train(tiny(), tmp_path)
    capsys.readouterr()
    summary = train(tiny(segment_steps=4, checkpoint_every=1, checkpoint_seconds=1e3), tmp_path)
    said = capsys.readouterr().err
    assert "config.segment_steps: 0 until here, 4 from here on\n" in said and "need not have the bits" not in said
    ignored = ("settings", "earlier_origins")
    same = [{k: v for k, v in untimed(found).items() if k not in ignored} for found in (summary, summary_of(finished()))]
    assert same[0] == same[1]


@pytest.mark.slow
def test_an_epoch_that_is_no_longer_due_is_not_the_best(tmp_path):
    with scripted([30.0, 20.0]), left_after(2):
        train(tiny(epochs=5), tmp_path)
    with scripted([1.0, 25.0, 40.0]):
        assert train(tiny(epochs=5, checkpoint_every=2), tmp_path)["best_epoch"] == 2


def test_a_finished_run_that_is_judged_with_another_setting_says_by_which(tmp_path):
    # Memory ran out when the test images were scored, say.
    folder = copy_of(finished(), tmp_path)
    summary = train(tiny(eval_batch_size=37), folder)
    assert summary["settings"]["eval_batch_size"] == 37
    assert [origin["settings"]["eval_batch_size"] for origin in summary["earlier_origins"]] == [500]
    assert untimed(train(tiny(eval_batch_size=37), folder)) == untimed(summary)


@pytest.mark.parametrize("hurt", ["the best epoch", "the data"])
def test_a_start_that_is_refused_changes_no_setting(hurt, tmp_path):
    folder, sound = copy_of(finished(), tmp_path), data.load
    if hurt == "the best epoch":
        (folder / "checkpoints" / "2" / "task" / "_METADATA").write_text("")
    before = contents(folder)

    def load(config):
        found = sound(config)
        found.train.images[:] ^= 1 if hurt == "the data" else 0
        return found

    said = "best epoch" if hurt == "the best epoch" else "other images or labels than the run began with"
    with mock.patch.object(data, "load", load), pytest.raises(UserError, match=said):
        train(tiny(eval_batch_size=37), folder)
    assert contents(folder) == before


@pytest.mark.slow
def test_a_run_of_an_older_version_that_wrote_no_settings_has_not_moved(tmp_path):
    with left_after(1):
        train(tiny(), tmp_path)
    sound, saved = Checkpoints.opened, Checkpoints(tmp_path).opened(1)
    del saved.run["origins"][0]["settings"]
    with mock.patch.object(Checkpoints, "opened", lambda self, epoch: saved if epoch == 1 else sound(self, epoch)):
        assert train(tiny(), tmp_path)["earlier_origins"] == []


@pytest.mark.slow
def test_a_step_that_lost_its_digests_is_kept_until_it_is_trained_again(tmp_path, fails):
    folder = tmp_path / "run"
    with left_after(1):
        train(tiny(), folder)
    (folder / "checkpoints" / "1.sha256.json").unlink()
    fails("evaluate", "--workdir", folder, parts=["checkpoints/1: not completely saved, or 1.sha256.json is lost; restore that file"])
    with mock.patch.object(loop.Loop, "train", mock.Mock(side_effect=Terminated)), pytest.raises(Terminated):
        train(tiny(), folder)
    assert (folder / "checkpoints" / "1.aside" / "group0").is_dir()
    assert untimed(train(tiny(), folder)) == untimed(summary_of(finished()))
    assert not (folder / "checkpoints" / "1.aside").exists()


@pytest.mark.parametrize("key", ["epochs", "learning_rate", "batch_size"])
def test_all_else_makes_it_another_run(key):
    before = contents(finished())
    with pytest.raises(UserError, match=rf"config\.{key}=.*another --workdir"):
        train(tiny(**{key: 2 * getattr(tiny(), key)}), finished())
    assert contents(finished()) == before


# ----------------------------------------------------------------------------------------------------------------------------------
# What an epoch's time holds


TIMED = {
    "joint": {},
    "swept": {"inference": "sweep"},
    "without validation": {"val_fraction": 0.0},
    "sequential": {"schedule": "sequential", "epochs": 1},
    "device cache": {"schedule": "sequential", "epochs": 1, "feature_cache": "device"},
    "host cache": {"schedule": "sequential", "epochs": 1, "feature_cache": "host"},
}


@pytest.mark.slow
@pytest.mark.parametrize("changes", TIMED.values(), ids=TIMED.keys())
def test_nothing_is_traced_or_compiled_while_an_epoch_is_timed(changes, tmp_path, monkeypatch):
    began, events, sound = [], [], (loop.Loop._train_epoch, loop.Loop._check_finite)

    def note(event, *_, **__):
        if began and event.startswith("/jax/core/compile"):
            events.append(event)

    def train_epoch(self, *given):
        began.append(True)
        return sound[0](self, *given)

    def check(*given):  # follows as soon as the epoch's results are on the host
        began.clear()
        sound[1](*given)

    monkeypatch.setattr(loop, "_is_short", lambda *_: False)
    monkeypatch.setattr(loop.Loop, "_train_epoch", train_epoch)
    monkeypatch.setattr(loop.Loop, "_check_finite", check)
    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        train(tiny(segment_steps=4, **changes), tmp_path)
        began.append(True)
        jax.jit(lambda x: x + 1)(np.float32(1))
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    traced_by_the_line_above = [event for event in events if event.endswith("jaxpr_trace_duration")]
    assert len(traced_by_the_line_above) == 1, events


@pytest.mark.slow
@pytest.mark.parametrize(("limit", "warmed"), [(loop._SHORT_EPOCH, 1), (1.0, 0)], ids=["short", "long"])
def test_a_short_epoch_is_run_once_for_nothing_before_it_is_timed(limit, warmed, tmp_path, monkeypatch):
    """Its results are thrown away: the run's arrays are those of a run without it."""
    monkeypatch.setattr(loop, "_SHORT_EPOCH", limit)
    calls, sound = [], epochs.Epoch.segments
    monkeypatch.setattr(epochs.Epoch, "segments", lambda self, *given: calls.append(given[3]) or sound(self, *given))
    summary = train(tiny(), tmp_path)
    assert calls == [0] * warmed + [0, 1, 2]
    assert untimed(summary) == untimed(summary_of(finished()))


# ----------------------------------------------------------------------------------------------------------------------------------
# Feature caches


@pytest.mark.slow
def test_the_features_of_one_stage_go_before_those_of_the_next_are_made(tmp_path, monkeypatch):
    alive, sound = [], feature_cache.with_features

    def with_features(*given):
        gc.collect()
        assert [kept for kept in alive if kept() is not None] == []
        found = sound(*given)
        alive.append(weakref.ref(found.features))
        return found

    monkeypatch.setattr(feature_cache, "with_features", with_features)
    for cache in ("device", "host"):
        train(tiny(widths=(16, 12, 10), schedule="sequential", epochs=1, feature_cache=cache), tmp_path / cache)
    assert len(alive) == 4


# ----------------------------------------------------------------------------------------------------------------------------------
# What a disk, an operating system or a data set brings along


DROPPED = (
    *(".DS_Store", "group1/._manifest.ocdbt", "group0/.nfs000000001", "Thumbs.db", "task/desktop.ini", "@eaDir/run@SynoEAStream"),
    *(".AppleDouble/x", "Icon\r", ".fseventsd/x", ".Trash-1000/x", "$RECYCLE.BIN/x", "lost+found/x", ".~lock.run#"),
)


def test_what_an_operating_system_drops_into_a_checkpoint_is_no_damage(tmp_path, capsys):
    folder = copy_of(finished(), tmp_path)
    (folder / "summary.json").unlink()
    for step in (folder / "checkpoints" / "2", folder / "checkpoints" / "3"):
        for name in DROPPED:
            (step / name).parent.mkdir(exist_ok=True)
            (step / name).write_text("x")
    capsys.readouterr()
    assert untimed(train(tiny(), folder)) == untimed(summary_of(finished()))
    assert "foreign" not in capsys.readouterr().err
    assert evaluation.evaluate(folder)["epoch"] == 2


@pytest.mark.slow
def test_dropped_files_are_no_part_of_what_is_saved(tmp_path, monkeypatch):
    sound = checkpoint.check_readable

    def dropping(step, *rest):
        sound(step, *rest)
        (step / ".DS_Store").write_text("x")

    monkeypatch.setattr(checkpoint, "check_readable", dropping)
    train(tiny(epochs=1), tmp_path)
    digests = json.loads((tmp_path / "checkpoints" / "1.sha256.json").read_text())
    assert not [name for name in digests if ".DS_Store" in name]
    (tmp_path / "checkpoints" / "1" / ".DS_Store").unlink()
    assert load_run(tmp_path)[3]["epoch"] == 1


@pytest.mark.parametrize("epoch", ["2", "3"], ids=["best", "newest"])
def test_a_file_that_does_not_belong_into_an_epoch_is_to_be_moved_and_nothing_else(epoch, tmp_path):
    folder = copy_of(finished(), tmp_path)
    (folder / "checkpoints" / epoch / "notes.txt").write_text("mine")
    before = contents(folder)
    with pytest.raises(UserError, match=r"notes.txt: foreign file .*; move it out of there, and start again$"):
        train(tiny(), folder)
    assert contents(folder) == before
    (folder / "checkpoints" / epoch / "notes.txt").unlink()
    train(tiny(), folder)


def test_no_advice_deletes_the_checkpoints(tmp_path):
    folder = copy_of(finished(), tmp_path)
    (folder / "checkpoints" / "2" / "task" / "_METADATA").write_text("")
    with pytest.raises(UserError, match=r"restore it from a copy, or move .*checkpoints away") as caught:
        train(tiny(), folder)
    assert "delete " not in str(caught.value)


@pytest.mark.slow
def test_an_epoch_that_cannot_be_deleted_does_not_end_the_run(tmp_path, monkeypatch):
    def busy(*_):
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "delete", busy)
    train(tiny(epochs=4), tmp_path)
    monkeypatch.undo()
    assert len(list((tmp_path / "checkpoints").glob("*.deleted"))) > 0
    train(tiny(epochs=4), tmp_path)
    kept = {str(epoch) for epoch in Checkpoints(tmp_path).epochs()}
    assert {path.name.partition(".")[0] for path in (tmp_path / "checkpoints").iterdir()} == kept


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of Orbax's own threads, when it finds no array
def test_a_step_that_nobody_can_read_back_never_counts_as_saved(tmp_path):
    """Orbax takes `[1]` in a path for a pattern: it saves, and finds no array again."""
    _, states, task, run = load_run(finished())
    checkpoints = Checkpoints(tmp_path / "run[1]")
    with contextlib.closing(checkpoints.writer()) as writer, pytest.raises(UserError, match=r"cannot be restored .* another place"):
        writer.save(run["epoch"], states, task, run)
    assert list(checkpoints.folder.iterdir()) == []
    gc.collect()  # while warnings of what it frees are ignored; a later test would fail by them


def test_another_array_than_was_saved_is_noticed_before_the_digests(tmp_path, monkeypatch):
    _, states, task, run = load_run(finished())
    sound = saved_epoch.ocp.Checkpointer.restore

    def other(self, *given, **named):
        found = sound(self, *given, **named)
        return {name: jax.tree.map(lambda x: x + 1 if isinstance(x, jax.Array) else x, tree) for name, tree in found.items()}

    monkeypatch.setattr(saved_epoch.ocp.Checkpointer, "restore", other)
    checkpoints = Checkpoints(tmp_path)
    with contextlib.closing(checkpoints.writer()) as writer, pytest.raises(UserError, match="read back with other bits"):
        writer.save(run["epoch"], states, task, run)
    assert list(checkpoints.folder.iterdir()) == []


def test_another_state_than_was_saved_is_noticed_before_the_digests(tmp_path, monkeypatch):
    _, states, task, run = load_run(finished())
    sound = saved_epoch.ocp.Checkpointer.restore

    def other(self, *given, **named):
        found = sound(self, *given, **named)
        return {"run": found["run"] | {"train_size": 1}} if "run" in found else found

    monkeypatch.setattr(saved_epoch.ocp.Checkpointer, "restore", other)
    checkpoints = Checkpoints(tmp_path)
    with contextlib.closing(checkpoints.writer()) as writer, pytest.raises(UserError, match="read back with other values"):
        writer.save(run["epoch"], states, task, run)
    assert list(checkpoints.folder.iterdir()) == []


def with_classes(count):
    """The digits, all of the first `count` classes."""
    sound = data.load

    def load(config):
        found = sound(config)
        splits = (found.train, found.validation, found.test)
        train, validation, test = (data.Split(split.images, split.labels % count) for split in splits)
        return data.Dataset(found.name, train, validation, test, found.class_names[:count], found.mean, found.std)

    return mock.patch.object(data, "load", load)


def test_a_set_of_one_class_is_refused_before_anything_is_made(tmp_path):
    with with_classes(1), pytest.raises(UserError, match=r"config\.dataset='digits': has one class"):
        train(tiny(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_set_of_two_classes_trains_and_is_read_again(tmp_path):
    with with_classes(2):
        train(tiny(epochs=1), tmp_path)
        assert evaluation.evaluate(tmp_path)["epoch"] == 1


WRITTEN = [("class_names", ["one"]), ("image_shape", [8192, 8, 1]), ("val_error", float("inf")), ("voting", []), ("history", [])]


@pytest.mark.parametrize(("key", "value"), WRITTEN)
def test_the_writer_refuses_what_the_reader_would(key, value, tmp_path):
    _, states, task, run = load_run(finished())
    checkpoints = Checkpoints(tmp_path)
    with contextlib.closing(checkpoints.writer()) as writer, pytest.raises(UserError, match=rf"not saved, .*\({key} of the run's state"):
        writer.save(run["epoch"], states, task, run | {key: value})
    assert list(checkpoints.folder.iterdir()) == []


def test_a_run_is_loaded_as_it_was_saved(tmp_path):
    plan, states, task, run = load_run(finished(), "3")
    with contextlib.closing(Checkpoints(tmp_path).writer()) as writer:
        writer.save(3, states, task, run)
    assert_same_bits(Checkpoints(tmp_path).opened(3).restore(plan), (states, task))
    assert workdir.while_it_trains(Checkpoints(tmp_path), "3", lambda saved: saved.epoch) == 3
