"""Checkpoints: what is saved comes back to the bit, damage is found and named, the right epochs are kept."""

import hashlib
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from runs import assert_same_bits, tiny
from vffjax.errors import UserError
from vffjax.runs import checkpoint, saved_epoch
from vffjax.runs import state as run_state
from vffjax.runs.checkpoint import Checkpoints
from vffjax.training.plan import init_states, make_plan, make_task

SHAPE, CLASSES = (4, 4, 1), 3


def make(seed=0, **changes):
    """A plan, and states and task in which no two numbers are equal and no counter is zero."""
    config = tiny(**{"widths": (4, 3), "seed": seed} | changes)
    plan = make_plan(config, 64, CLASSES)
    rng = np.random.default_rng(seed)

    def fill(x):
        if jnp.issubdtype(x.dtype, jnp.integer):
            return jnp.full_like(x, rng.integers(1, 100))
        return jnp.asarray(rng.normal(size=x.shape), x.dtype)

    return plan, jax.tree.map(fill, init_states(plan, SHAPE)), make_task(config, CLASSES, SHAPE, (0.25,), (0.5,))


def state_of(epoch, val_error=50.0, trained_groups=2, scheduled=True):
    ranked = {"epoch": epoch, "val_error": val_error, "trained_groups": trained_groups, "scheduled": scheduled}
    history = [{"epoch": e, "val_error": 1.5, "seconds": 1.0, "images_per_second": 2} for e in range(1, epoch + 1)]
    history[-1] |= {"val_error": val_error, "group": trained_groups - 1}
    made_by = {
        "history": history,
        "due": list(range(1, epoch + scheduled)),
        "origins": [{}],
        "compile_seconds": 0.5,
        "peak_bytes": 1,
        "segment_steps": 4,
        "data_sha256": "",
        "train_size": 64,
    }
    return ranked | made_by | {"voting": [0], "image_shape": list(SHAPE), "class_names": [f"c{i}" for i in range(CLASSES)]}


def save(workdir, made, *runs, config=None):
    plan, states, task = made
    checkpoints = Checkpoints(workdir)
    writer = checkpoints.writer()
    for run in runs:
        writer.save(run["epoch"], states, task, run | {"config": (config or plan.config).to_dict()})
    writer.close()
    return checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two saved epochs, the second the better. Tests that change files copy it."""
    workdir = tmp_path_factory.mktemp("saved")
    save(workdir, make(), state_of(1, 60.0), state_of(2, 40.0))
    return workdir


@pytest.mark.parametrize("changes", [{}, {"optimizer": "sgd", "clip_norm": 1.0}, {"norm": "none"}, {"grouping": "all"}], ids=str)
def test_restored_arrays_have_the_bits_types_and_trees_that_were_saved(changes, tmp_path):
    made = make(**changes)
    run = state_of(7, 12.5)
    checkpoints = save(tmp_path, made, run)
    states, task = checkpoints.opened(7).restore(made[0])
    assert_same_bits((states, task), made[1:])
    assert checkpoints.opened(7).run == run | {"config": made[0].config.to_dict(), "format": run_state.FORMAT}
    assert checkpoints.opened(7).fault(made[0].config) is None


def test_parameters_that_a_rule_owns_are_restored(tmp_path, monkeypatch):
    def planted(plan, shape):
        owned = {"projection": {"kernel": jnp.ones((4, 2))}, "scales": (jnp.zeros(2), jnp.ones(3))}
        return tuple(state._replace(params=state.params | {"rule": owned}) for state in init_states(plan, shape))

    monkeypatch.setattr("vffjax.training.plan.init_states", planted)
    plan, _, task = make()
    states = planted(plan, SHAPE)
    checkpoints = save(tmp_path, (plan, states, task), state_of(1))
    assert checkpoints.opened(1).fault(plan.config) is None
    assert_same_bits(checkpoints.opened(1).restore(plan), (states, task))
    assert_same_bits(checkpoints.opened(1).restore_group(plan, 1), states[1])
    # To a rule without such parameters, they are of another run.
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"saved by another network or optimizer \(params\.rule"):
        checkpoints.opened(1).restore(plan)


def test_one_group_is_restored_without_the_files_of_the_others(saved, tmp_path):
    workdir = shutil.copytree(saved, tmp_path / "run")
    plan, states, _ = make()
    for item in ("group0", "task"):
        shutil.rmtree(workdir / "checkpoints" / "2" / item)
    assert_same_bits(Checkpoints(workdir).opened(2).restore_group(plan, 1), states[1])
    with pytest.raises(UserError, match="group0"):
        Checkpoints(workdir).opened(2).restore(plan)


KEPT = {
    "the best is not among the latest": ([50, 20, 40, 60, 70], [2, 4, 5], 2),
    "the best is the latest": ([50, 40, 30], [2, 3], 3),
    "of equals the last": ([30, 10, 10, 20, 20], [3, 4, 5], 3),
    "without validation the last": ([None, None, None], [2, 3], 3),
}


@pytest.mark.slow
@pytest.mark.parametrize(("errors", "kept", "best"), KEPT.values(), ids=KEPT.keys())
def test_the_two_latest_epochs_and_the_best_are_kept(errors, kept, best, tmp_path):
    made = make(grouping="all", optimizer="sgd", widths=(2,))
    checkpoints = save(tmp_path, made, *(state_of(i, e, 1) for i, e in enumerate(errors, 1)))
    assert checkpoints.epochs() == kept
    assert (checkpoints.chosen("best").epoch, checkpoints.chosen("latest").epoch) == (best, len(errors))
    # Nothing of the others is left.
    assert sorted(p.name for p in checkpoints.folder.iterdir()) == sorted(f"{e}{end}" for e in kept for end in ("", ".sha256.json"))


def test_an_epoch_before_the_last_stage_is_never_the_best(tmp_path):
    # Its later groups are untrained, however well its first group does.
    made = make(grouping="all", optimizer="sgd", widths=(2,))
    runs = [state_of(1, 10.0, 1), state_of(2, 30.0, 2), state_of(3, 40.0, 2), state_of(4, 50.0, 2)]
    checkpoints = save(tmp_path, made, *runs)
    assert checkpoints.chosen("best").epoch == 2
    assert checkpoints.epochs() == [2, 3, 4]


def test_an_epoch_saved_only_to_leave_is_never_the_best_and_goes_when_the_next_is_saved(tmp_path):
    # A run that nobody disturbs has no such epoch to choose, nor would it have kept it in the place of another.
    made = make(grouping="all", optimizer="sgd", widths=(2,))
    runs = [state_of(2, 50.0), state_of(4, 40.0), state_of(5, 1.0, scheduled=False)]
    checkpoints = save(tmp_path, made, *runs)
    assert (checkpoints.epochs(), checkpoints.chosen("best").epoch, checkpoints.chosen("latest").epoch) == ([2, 4, 5], 4, 5)
    save(tmp_path, made, state_of(6, 60.0))
    assert (checkpoints.epochs(), checkpoints.chosen("best").epoch, checkpoints.chosen("latest").epoch) == ([4, 6], 4, 6)


def test_a_step_that_is_deleted_by_halves_is_no_step(tmp_path, monkeypatch):
    made = make(grouping="all", optimizer="sgd", widths=(2,))

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "delete", killed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, made, state_of(1, 50.0), state_of(2, 40.0), state_of(3, 30.0))
    assert (tmp_path / "checkpoints" / "1").is_dir()
    assert (Checkpoints(tmp_path).epochs(), Checkpoints(tmp_path).incomplete()) == ([2, 3], [])
    monkeypatch.undo()
    checkpoints = save(tmp_path, made, state_of(4, 20.0))
    assert sorted(p.name for p in checkpoints.folder.iterdir()) == ["3", "3.sha256.json", "4", "4.sha256.json"]


def test_an_interrupted_save_is_not_used_and_the_next_writer_replaces_it(saved, tmp_path):
    workdir = shutil.copytree(saved, tmp_path / "run")
    made = make(seed=1)
    (workdir / "checkpoints" / "2.sha256.json").unlink()
    (workdir / "checkpoints" / "3.orbax-checkpoint-tmp-0").mkdir()
    checkpoints = Checkpoints(workdir)
    assert (checkpoints.epochs(), checkpoints.incomplete()) == ([1], [2])
    assert (checkpoints.chosen("best").epoch, checkpoints.chosen("latest").epoch) == (1, 1)
    # Reading alone removes nothing.
    assert (workdir / "checkpoints" / "2").is_dir()
    plan, states, task = made
    writer = checkpoints.writer()
    writer.save(2, states, task, state_of(2, 30.0) | {"config": plan.config.to_dict()})
    writer.close()
    assert (checkpoints.epochs(), checkpoints.incomplete()) == ([1, 2], [])
    assert not list(checkpoints.folder.glob("*tmp*"))
    assert_same_bits(checkpoints.opened(2).restore(plan), (states, task))


def test_an_older_step_without_digests_is_kept_aside_and_nothing_foreign_is_touched(saved, tmp_path):
    workdir = shutil.copytree(saved, tmp_path / "run")
    folder = workdir / "checkpoints"
    (folder / "1.sha256.json").unlink()
    (folder / "old.aside").mkdir()
    checkpoints = save(workdir, make(), state_of(3), state_of(4))
    assert checkpoints.epochs() == [2, 3, 4]
    assert (folder / "1.aside" / "group0").is_dir()
    assert (folder / "old.aside").is_dir()


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def remove(path):
    path.unlink()


@pytest.mark.parametrize("damage", [flip, truncate, remove])
def test_damage_to_any_file_of_a_step_is_found_and_the_file_named(damage, saved, tmp_path):
    workdir = shutil.copytree(saved, tmp_path / "run")
    checkpoints, (plan, _, _) = Checkpoints(workdir), make()
    step = workdir / "checkpoints" / "2"
    files = [path for path in sorted(step.rglob("*")) if path.is_file() and path.stat().st_size]
    items = {path.relative_to(step).parts[0] for path in files}
    assert {"group0", "group1", "task", "run", "_CHECKPOINT_METADATA"} <= items
    for path in files:
        sound = path.read_bytes()
        damage(path)
        item = path.relative_to(step).parts[0]
        readers = [lambda: checkpoints.opened(2).restore(plan)]
        if item == "group1":
            readers.append(lambda: checkpoints.opened(2).restore_group(plan, 1))
        if item in ("run", "_CHECKPOINT_METADATA"):
            readers += [lambda: checkpoints.opened(2).run, lambda: checkpoints.chosen("best").epoch]
        for read in readers:
            with pytest.raises(UserError) as caught:
                read()
            assert str(path) in str(caught.value)
            assert "train with this --workdir again" in str(caught.value)
        path.write_bytes(sound)
    checkpoints.opened(2).restore(plan)


def test_the_fix_for_a_damaged_step_works(saved, tmp_path):
    workdir = shutil.copytree(saved, tmp_path / "run")
    checkpoints, made = Checkpoints(workdir), make()
    shutil.rmtree(workdir / "checkpoints" / "2")
    assert (checkpoints.epochs(), checkpoints.chosen("best").epoch) == ([1], 1)
    save(workdir, made, state_of(2, 30.0))
    assert checkpoints.chosen("best").epoch == 2
    assert_same_bits(checkpoints.opened(2).restore(made[0]), made[1:])


DIGESTS = {
    "truncated": lambda text: text[: len(text) // 2],
    "emptied": lambda text: "",
    "without entries": lambda text: "{}",
    "not an object": lambda text: "[1, 2]",
    "not text": lambda text: b"\xff\xfe",
}


@pytest.mark.parametrize("change", DIGESTS.values(), ids=DIGESTS.keys())
def test_damaged_digests_are_found_and_named(change, saved, tmp_path):
    workdir = shutil.copytree(saved, tmp_path / "run")
    path = workdir / "checkpoints" / "2.sha256.json"
    changed = change(path.read_text())
    path.write_bytes(changed if isinstance(changed, bytes) else changed.encode())
    plan, _, _ = make()
    for read in (lambda: Checkpoints(workdir).opened(2).restore(plan), lambda: Checkpoints(workdir).opened(2).run):
        with pytest.raises(UserError, match=r"2\.sha256\.json"):
            read()


def test_a_digest_that_differs_names_its_file(saved, tmp_path):
    workdir = shutil.copytree(saved, tmp_path / "run")
    path = workdir / "checkpoints" / "2.sha256.json"
    digests = json.loads(path.read_text())
    digests["group1/_METADATA"] = "0" * 64
    path.write_text(json.dumps(digests))
    with pytest.raises(UserError, match="group1/_METADATA"):
        Checkpoints(workdir).opened(2).restore(make()[0])


OTHERS = [{"widths": (5, 3)}, {"widths": (4, 4, 3)}, {"optimizer": "sgd"}, {"widths": (4, 3, 2)}, {"widths": (4,)}]


@pytest.mark.parametrize("changes", [*OTHERS, {"seed": 9}, {"temperature": 0.1}], ids=str)
def test_a_checkpoint_of_another_run_is_foreign_even_where_its_arrays_fit(changes, saved):
    key = next(iter(changes))
    said = rf"foreign checkpoint, saved by another run \(config\.{key} is .+, not .+\); restore the run's own"
    with pytest.raises(UserError, match=said):
        Checkpoints(saved).opened(2).restore(make(**changes)[0])
    assert f"config.{key}" in str(Checkpoints(saved).opened(2).fault(make(**changes)[0].config))


@pytest.mark.parametrize("changes", OTHERS, ids=str)
def test_arrays_of_another_network_or_optimizer_are_refused(changes, tmp_path):
    # By a configuration that says otherwise, as after a change of the code.
    other = make(**changes)
    checkpoints = save(tmp_path, make(), state_of(2), config=other[0].config)
    with pytest.raises(UserError, match=r"saved by another network.* \(.+ not .+\); restore the run's own config"):
        checkpoints.opened(2).restore(other[0])


def test_a_step_under_another_number_is_foreign(saved, tmp_path):
    workdir = shutil.copytree(saved, tmp_path / "run")
    for end in ("", ".sha256.json"):
        (workdir / "checkpoints" / f"2{end}").rename(workdir / "checkpoints" / f"5{end}")
    for read in (lambda: Checkpoints(workdir).opened(5).restore(make()[0]), lambda: Checkpoints(workdir).opened(5).run):
        with pytest.raises(UserError, match="checkpoints/5: foreign checkpoint, of epoch 2"):
            read()


def test_a_file_that_nobody_saved_is_foreign(saved, tmp_path):
    workdir = shutil.copytree(saved, tmp_path / "run")
    (workdir / "checkpoints" / "2" / "group0" / "more").write_text("")
    (workdir / "checkpoints" / "2" / "group9").mkdir()  # of which there are no files, and so no harm
    plan, states, _ = make()
    assert_same_bits(Checkpoints(workdir).opened(2).restore_group(plan, 1), states[1])
    with pytest.raises(UserError, match="group0/more: foreign file or folder"):
        Checkpoints(workdir).opened(2).restore(make()[0])


@pytest.mark.parametrize("name", ["../../outside", "{absolute}", "group0/../../../outside"])
def test_digests_that_point_out_of_the_step_are_refused(name, saved, tmp_path):
    workdir = shutil.copytree(saved, tmp_path / "run")
    path = workdir / "checkpoints" / "2.sha256.json"
    outside = workdir / "outside"  # which is there, and whose digest is right, so that only its place is wrong
    outside.write_bytes(b"outside")
    named = {name.format(absolute=outside): hashlib.sha256(b"outside").hexdigest()}
    assert (workdir / "checkpoints" / "2" / next(iter(named))).exists()
    path.write_text(json.dumps(json.loads(path.read_text()) | named))
    with pytest.raises(UserError, match=r"damaged checkpoint \(no such file\)"):
        Checkpoints(workdir).opened(2).restore(make()[0])


def test_a_step_of_another_format_is_refused(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(run_state, "FORMAT", run_state.FORMAT + 1)
    with pytest.raises(UserError, match="saved by another version of vffjax"):
        _ = Checkpoints(saved).opened(2).run


WRONG_STATES = {
    "no epoch": {"epoch": None},
    "segments of no step": {"segment_steps": 0},
    "half a step": {"segment_steps": 1.5},
    "a word for an error": {"val_error": "x"},
    "infinity for an error": {"val_error": float("inf")},
    "a word for a size": {"train_size": "x"},
    "a number for names": {"class_names": 5},
    "a word for a side": {"image_shape": ["a", 1, 1]},
    "a giant's side": {"image_shape": [10**9, 1, 1]},
    "two sides": {"image_shape": [1, 1]},
    "no history": {"history": []},
    "a number for history": {"history": 3},
    "an empty record": {"history": [{}, {}]},
    "no origin": {"origins": []},
    "a number for a configuration": {"config": 3},
    "voters that have not trained": {"voting": [7]},
    "nobody votes": {"voting": []},
    "a vote without a weight": {"vote_weights": []},
    "a weight below 0": {"vote_weights": [-1.0]},
    "a word for a weight": {"vote_weights": ["x"]},
    "a truth for a number": {"trained_groups": True},
}


@pytest.mark.parametrize("changes", WRONG_STATES.values(), ids=WRONG_STATES.keys())
def test_a_state_that_no_run_wrote_is_refused_though_its_digest_fits(changes, tmp_path):
    checkpoints = save(tmp_path, make(grouping="all", widths=(2,)), state_of(2))
    path = tmp_path / "checkpoints" / "2" / "run" / "metadata"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    digests = tmp_path / "checkpoints" / "2.sha256.json"
    digests.write_text(json.dumps(json.loads(digests.read_text()) | {"run/metadata": saved_epoch.sha256_of(path)}))
    for read in (lambda: checkpoints.opened(2).run, lambda: checkpoints.chosen("best").epoch):
        with pytest.raises(UserError, match=r"checkpoints/2/run: not the state of a run"):
            read()


@pytest.mark.parametrize("replace", [os.mkfifo, lambda path: os.symlink("/dev/zero", path)], ids=["a pipe", "an endless link"])
def test_what_is_no_file_is_refused_and_not_read(replace, saved, tmp_path):
    workdir = shutil.copytree(saved, tmp_path / "run")
    path = workdir / "checkpoints" / "2" / "run" / "metadata"
    path.unlink()
    replace(path)
    with pytest.raises(UserError, match=r"run/metadata: damaged checkpoint \(not a file\)"):
        _ = Checkpoints(workdir).opened(2).run


def test_two_writers_of_one_workdir_do_not_overwrite_each_other(tmp_path):
    made = make(grouping="all", widths=(2,))
    plan, states, task = made
    first, second = Checkpoints(tmp_path).writer(), Checkpoints(tmp_path).writer()
    first.save(1, states, task, state_of(1, 50.0) | {"config": plan.config.to_dict()})
    with pytest.raises(UserError, match="another run may be writing"):
        second.save(1, jax.tree.map(jnp.zeros_like, states), task, state_of(1, 1.0) | {"config": plan.config.to_dict()})
    first.close()
    second.close()
    assert_same_bits(Checkpoints(tmp_path).opened(1).restore(plan), (states, task))


def test_a_workdir_without_checkpoints_is_refused_with_the_way_out(tmp_path):
    assert Checkpoints(tmp_path).epochs() == []
    for read in (lambda: Checkpoints(tmp_path).chosen("best").epoch, lambda: Checkpoints(tmp_path).chosen("latest").epoch):
        with pytest.raises(UserError, match=f"{checkpoint.FOLDER}: no complete checkpoint; train first"):
            read()
    # Looking makes nothing.
    assert not list(tmp_path.iterdir())
