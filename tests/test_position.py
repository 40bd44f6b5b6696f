"""A position inside the epoch: saved when the run is told to leave or when it is due, gone on from to the same bits, never a candidate."""

import json
import re
import shutil
from unittest import mock

import numpy as np
import pytest

import runs
from runs import assert_same_bits, contents, finished, leave_at, summary_of, tiny, train, untimed
from vffjax.errors import UserError
from vffjax.files import sha256_of
from vffjax.runs import experiment, loop
from vffjax.runs import state as run_state
from vffjax.runs.checkpoint import Checkpoints, Writer
from vffjax.runs.logbook import read_metrics
from vffjax.runs.termination import Terminated
from vffjax.runs.workdir import load_run
from vffjax.training import epochs
from vffjax.training.plan import task_of_epoch
from vffjax.uses import evaluation


def assert_same_run(workdir, other, config):
    lines = [[untimed(record) for record in read_metrics(folder)] for folder in (workdir, other)]
    assert lines[0] == lines[1]
    summaries = [untimed(summary_of(folder)) for folder in (workdir, other)]
    for summary in summaries:  # how many steps the device runs in one call changes nothing else
        summary["settings"] = {key: summary["settings"][key] for key in ("eval_batch_size", "checkpoint_every", "rematerialise")}
    assert summaries[0] == summaries[1]
    whole = Checkpoints(workdir).epochs()
    assert whole == Checkpoints(other).epochs()
    plan = load_run(other)[0]
    for saved in whole:
        assert_same_bits(*(Checkpoints(folder).opened(saved).restore(plan) for folder in (workdir, other)))


RUNS = {
    "the first epoch": ({}, 0, 3),
    "a later epoch": ({}, 2, 6),
    "every other epoch saved": ({"epochs": 4, "checkpoint_every": 2}, 2, 4),
    "back-propagation by sgd, skipping": ({"grouping": "all", "rule": "head", "optimizer": "sgd", "on_nonfinite": "skip"}, 1, 7),
    "sequential": ({"schedule": "sequential", "epochs": 2, "labelling": "triplet", "negatives": "hard"}, 2, 5),
    "noise that is redrawn": ({"noise_redrawn": "epoch", "noise_spectrum": "images", "inference": "sweep"}, 1, 5),
    "averages of weights, by muon": ({"optimizer": "muon", "look_ahead": 3, "slow_share": 0.9, "mixup": 0.5}, 1, 5),
    "kept features": ({"schedule": "sequential", "epochs": 2, "feature_cache": "host"}, 3, 5),
}


OPTIMISED = pytest.param("a later epoch", id="a later epoch, as a run compiles", marks=pytest.mark.full_optimisation)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*RUNS, OPTIMISED])
def test_a_run_that_leaves_inside_of_an_epoch_goes_on_to_the_same_bits(name, tmp_path):
    changes, epoch, step = RUNS[name]
    config = tiny(**{"segment_steps": 2} | changes)
    with leave_at(epoch, step), pytest.raises(Terminated) as left:
        train(config, tmp_path / "left")
    (number,) = Checkpoints(tmp_path / "left").inside.epochs()
    state = Checkpoints(tmp_path / "left").inside.opened(number).run
    done = state["inside"]["step"]
    total = config.epochs * (2 if config.schedule == "sequential" else 1)
    assert str(left.value) == f"epoch {epoch + 1} of {total}, step {done} of 11, is saved; the same command goes on from there"
    assert (state["epoch"], number, step <= done < 11) == (epoch, 11 * epoch + done, True)
    assert len(read_metrics(tmp_path / "left")) == epoch
    assert Checkpoints(tmp_path / "left").epochs() == [e for e in range(1, epoch + 1) if config.checkpoint_due(e)][-2:]
    train(config, tmp_path / "left")
    train(config, tmp_path / "undisturbed")
    assert_same_run(tmp_path / "left", tmp_path / "undisturbed", config)
    assert not (tmp_path / "left" / "checkpoints" / "inside").exists()


@pytest.mark.slow
def test_each_checkpoint_keeps_the_noise_of_its_epoch_and_a_position_inside_that_of_the_epoch_that_goes_on(tmp_path):
    config = tiny(noise_redrawn="epoch", epochs=2, segment_steps=2)
    with leave_at(1, 4), pytest.raises(Terminated):
        train(config, tmp_path)
    plan, _, first, _ = load_run(tmp_path, "1")
    checkpoints = Checkpoints(tmp_path)
    (inside,) = checkpoints.inside.epochs()
    _, second = checkpoints.inside.opened(inside).restore(plan)
    for epoch, task in enumerate((first, second)):
        assert_same_bits(task, task_of_epoch(config, task, epoch, None))
    assert not np.array_equal(first.codebook, second.codebook)
    train(config, tmp_path)
    assert_same_bits(load_run(tmp_path, "2")[2], second)


@pytest.mark.slow
def test_a_save_inside_of_an_epoch_is_not_evaluated_and_not_chosen(tmp_path):
    workdir = tmp_path / "run"
    with leave_at(0, 2), pytest.raises(Terminated):
        train(tiny(segment_steps=2), workdir)
    with pytest.raises(UserError, match="no complete checkpoint"):
        load_run(workdir)
    with leave_at(1, 2), pytest.raises(Terminated):
        train(tiny(segment_steps=2), workdir)
    assert evaluation.evaluate(workdir, epoch="latest")["epoch"] == 1
    assert Checkpoints(workdir).chosen("best").epoch == 1


@pytest.mark.slow
def test_a_long_epoch_is_saved_inside_as_often_as_is_asked(tmp_path):
    """Then the run is killed: it goes on from the newest save, and from no other epoch's start."""
    config = tiny(segment_steps=2, checkpoint_seconds=1e-6)
    saved, sound = [], loop.Loop._save_inside

    def save(self, states, epoch, step, *rest):
        sound(self, states, epoch, step, *rest)
        saved.append((epoch, step))
        if len(saved) == 7:
            raise MemoryError  # as good as a kill: nothing is cleared up

    with mock.patch.object(loop.Loop, "_save_inside", save), pytest.raises(MemoryError):
        train(config, tmp_path)
    assert saved == [(0, 2), (0, 4), (0, 6), (0, 8), (1, 2), (1, 4), (1, 6)]
    assert Checkpoints(tmp_path).inside.epochs() == [11 + 6]
    began, segments = [], epochs.Epoch.segments
    with mock.patch.object(epochs.Epoch, "segments", lambda self, *given: began.append(given[3:]) or segments(self, *given)):
        train(config, tmp_path)
    assert began[-2:] == [(1, 6), (2, 0)]
    assert_same_run(tmp_path, finished(), config)


@pytest.mark.slow
@pytest.mark.parametrize("again", [False, True], ids=["trained to the end", "told to leave once more, at an earlier step"])
@pytest.mark.parametrize("hurt", ["group1/manifest.ocdbt", "run/metadata"])
def test_a_save_inside_that_is_damaged_is_passed_over_and_stands_in_nobody_s_way(hurt, again, tmp_path, capsys):
    with leave_at(1, 6), pytest.raises(Terminated):
        train(tiny(segment_steps=2), tmp_path)
    (number,) = Checkpoints(tmp_path).inside.epochs()
    path = tmp_path / "checkpoints" / "inside" / str(number) / hurt
    path.write_bytes(path.read_bytes()[:-1])
    capsys.readouterr()
    if again:
        with leave_at(1, 2), pytest.raises(Terminated, match=r"epoch 2 of 3, step [24] of 11, is saved"):
            train(tiny(segment_steps=2), tmp_path)
    train(tiny(segment_steps=2), tmp_path)
    said = rf"{hurt}: damaged .*; it was saved inside of an epoch, which is trained again from its start\n"
    assert re.search(said, capsys.readouterr().err)
    assert_same_run(tmp_path, finished(), tiny())


@pytest.mark.slow
def test_a_save_inside_behind_a_best_epoch_that_is_gone_is_given_up(tmp_path):
    """It was set aside by a start that was killed before it trained that epoch again."""
    with leave_at(2, 2), pytest.raises(Terminated):
        train(tiny(segment_steps=2), tmp_path)
    assert run_state.best_epoch(Checkpoints(tmp_path).opened(2).run) == 2
    Checkpoints(tmp_path).set_aside(2)
    train(tiny(segment_steps=2), tmp_path)
    assert_same_run(tmp_path, finished(), tiny())


@pytest.mark.slow
def test_an_epoch_that_is_trained_and_not_yet_validated_is_a_position_too(tmp_path):
    with leave_at(1, 11), pytest.raises(Terminated, match="epoch 2 of 3, step 11 of 11, is saved"):
        train(tiny(segment_steps=2), tmp_path)
    train(tiny(segment_steps=2), tmp_path)
    assert_same_run(tmp_path, finished(), tiny())


@pytest.mark.slow
def test_a_save_inside_that_a_whole_epoch_has_overtaken_is_not_used(tmp_path):
    with leave_at(0, 2), pytest.raises(Terminated):
        train(tiny(segment_steps=2), tmp_path)
    kept = tmp_path / "kept"
    shutil.copytree(tmp_path / "checkpoints" / "inside", kept)
    with leave_at(1, 2), pytest.raises(Terminated):
        train(tiny(segment_steps=2), tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "inside")
    kept.rename(tmp_path / "checkpoints" / "inside")
    train(tiny(segment_steps=2), tmp_path)
    assert_same_run(tmp_path, finished(), tiny())


@pytest.mark.slow
def test_where_a_whole_epoch_is_damaged_the_run_goes_back_to_a_whole_one(tmp_path, capsys):
    """Else it would go on behind an epoch of which nothing is left to be chosen."""
    with leave_at(2, 2), pytest.raises(Terminated):
        train(tiny(segment_steps=2), tmp_path)
    path = tmp_path / "checkpoints" / "2" / "task" / "_METADATA"
    path.write_text("")
    capsys.readouterr()
    train(tiny(segment_steps=2), tmp_path)
    assert "going on from epoch 1\n" in capsys.readouterr().err
    assert_same_run(tmp_path, finished(), tiny())


@pytest.mark.slow
def test_the_segments_of_a_run_have_the_length_for_the_machine_on_which_it_goes_on(tmp_path):
    with mock.patch.object(experiment, "segment_length", lambda *_: 3), leave_at(1, 3), pytest.raises(Terminated):
        train(tiny(), tmp_path)
    with mock.patch.object(experiment, "segment_length", lambda *_: 5):
        train(tiny(), tmp_path)
    assert Checkpoints(tmp_path).opened(3).run["segment_steps"] == 5
    assert_same_run(tmp_path, finished(), tiny())


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def validated(*errors):
    """The validation errors of the next epochs are these."""
    sound, left = loop.validate, iter(errors)
    return mock.patch.object(loop, "validate", lambda *given: sound(*given) | {"val_error": next(left)})


@pytest.mark.slow
@pytest.mark.parametrize("how", ["told to leave", "killed"])
def test_a_run_that_went_back_may_be_stopped_again_though_the_best_epoch_before_is_gone(how, tmp_path, capsys):
    config = tiny(epochs=5, segment_steps=2)
    with validated(10.0, 20.0, 15.0, 5.0), leave_at(4, 2), pytest.raises(Terminated):
        train(config, tmp_path)
    assert Checkpoints(tmp_path).epochs() == [3, 4]
    shutil.rmtree(tmp_path / "checkpoints" / "inside")
    (tmp_path / "checkpoints" / "4" / "task" / "_METADATA").write_text("")
    if how == "killed":
        with mock.patch.object(loop.Loop, "_train_epoch", mock.Mock(side_effect=Killed)), pytest.raises(Killed):
            train(config, tmp_path)
    else:
        with leave_at(3, 4), pytest.raises(Terminated, match="epoch 4 of 5, step 4 of 11, is saved"):
            train(config, tmp_path)
    assert "4.aside" in [path.name for path in (tmp_path / "checkpoints").iterdir()]
    with validated(5.0, 30.0):
        summary = train(config, tmp_path)
    assert summary["best_epoch"] == 4
    assert Checkpoints(tmp_path).epochs() == [4, 5] and Checkpoints(tmp_path).aside() == []


@pytest.mark.slow
def test_a_kill_before_the_digests_of_an_epoch_loses_no_more_than_since_the_last_save(tmp_path, capsys):
    config = tiny(epochs=3, checkpoint_every=3, segment_steps=2, checkpoint_seconds=1e-6)
    complete = Writer._complete

    def killed(self, epoch, step, *given):
        if step.parent.name != "inside":
            raise Killed
        complete(self, epoch, step, *given)

    with mock.patch.object(Writer, "_complete", killed), pytest.raises(Killed):
        train(config, tmp_path)
    assert (Checkpoints(tmp_path).incomplete(), Checkpoints(tmp_path).inside.epochs()) == ([3], [2 * 11 + 8])
    begun, segments = [], epochs.Epoch.segments
    with mock.patch.object(epochs.Epoch, "segments", lambda *given: begun.append(given[4:]) or segments(*given)):
        train(config, tmp_path)
    assert begun[-1] == (2, 8)  # a short epoch is run once before it is timed
    assert "checkpoints/3: not completely saved, or its digests are lost\ngoing on inside of epoch 3\n" in capsys.readouterr().err


@pytest.mark.slow
def test_epochs_of_one_segment_are_saved_where_that_is_due(tmp_path):
    saved, save = [], loop.Loop._save_inside

    def note(self, states, epoch, step, *given):
        saved.append((epoch, step))
        save(self, states, epoch, step, *given)

    with mock.patch.object(loop.Loop, "_save_inside", note):
        train(tiny(checkpoint_every=3, segment_steps=11, checkpoint_seconds=1e-6), tmp_path)
    assert saved == [(0, 11), (1, 11)]  # the third epoch is saved whole


@pytest.mark.slow
def test_other_segments_from_a_position_inside_give_the_same_bits(tmp_path):
    """A position at which no segment of the new length ends: the rest of that epoch begins there all the same."""
    with leave_at(1, 3), pytest.raises(Terminated):
        train(tiny(segment_steps=3), tmp_path)
    train(tiny(segment_steps=4), tmp_path)
    assert Checkpoints(tmp_path).opened(3).run["segment_steps"] == 4
    differing = [[untimed(record) for record in read_metrics(folder)] for folder in (tmp_path, finished())]
    assert differing[0] == differing[1]


@pytest.mark.slow
def test_numbers_that_are_not_finite_are_not_saved_inside_of_an_epoch(tmp_path):
    config = tiny(segment_steps=2, checkpoint_seconds=1e-6, rule="head", norm="none", optimizer="sgd", learning_rate=1e6, weight_decay=1e6)
    with pytest.raises(UserError, match=r"epoch 1, step \d+ of 11: the loss of group\d is not finite; there is no checkpoint yet"):
        train(config, tmp_path)
    for number in Checkpoints(tmp_path).inside.epochs():
        metrics = run_state.metrics_of(Checkpoints(tmp_path).inside.opened(number).run["inside"])
        assert metrics["finite"].all()


STATE = {"finite": np.ones((2, 1), bool), "loss": np.array([[np.nan], [0.1]], np.float32)}


def test_metrics_inside_are_kept_to_the_bit():
    state = json.loads(json.dumps(run_state.inside({"epoch": 9}, 1, 2, 11, 0.5, STATE)))
    found = run_state.metrics_of(state["inside"])
    assert {name: values.tobytes() for name, values in found.items()} == {name: values.tobytes() for name, values in STATE.items()}
    assert (state["epoch"], run_state.number(state), state["inside"]["seconds"]) == (1, 13, 0.5)


WRONG_VALUES = {
    "step": [0, 3, "2", None],
    "number": [0, "13", None],
    "seconds": [-1, "x", None],
    "metrics": [None, {}, {"finite": "x"}, {"loss": ""}],
}
WRONG = [(key, value) for key, values in WRONG_VALUES.items() for value in values]


@pytest.mark.slow
@pytest.mark.parametrize(("key", "value"), WRONG)
def test_a_position_that_cannot_be_relied_on_is_a_fault(key, value, tmp_path, capsys):
    with leave_at(1, 2), pytest.raises(Terminated):
        train(tiny(segment_steps=2), tmp_path)
    (number,) = Checkpoints(tmp_path).inside.epochs()
    folder = tmp_path / "checkpoints" / "inside"
    path = folder / str(number) / "run" / "metadata"
    state = json.loads(path.read_text())
    path.write_text(json.dumps(state | {"inside": state["inside"] | {key: value}}))
    digests = folder / f"{number}.sha256.json"
    digests.write_text(json.dumps(json.loads(digests.read_text()) | {"run/metadata": sha256_of(path)}))
    before = contents(folder)
    assert "not the state of a run (inside)" in str(Checkpoints(tmp_path).inside.opened(number).fault(tiny(segment_steps=2)))
    assert contents(folder) == before


@pytest.mark.slow
def test_runs_by_one_process_share_their_programs(tmp_path):
    """Two seeds and three rates of one shape, as whole runs: what the second and third compile is nothing of the training."""
    import jax

    events = []

    def note(event, *_, **__):
        events.extend([event] if "backend_compile" in event else [])

    runs.train(tiny(), tmp_path / "0")
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        for number, changes in enumerate(({"seed": 1}, {"learning_rate": 3e-3}, {"learning_rate": 3e-2, "temperature": 0.1})):
            train(tiny(**changes), tmp_path / f"other{number}")
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert events == []
