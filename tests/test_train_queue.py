"""The queue of training runs: its list, its ledger, and that it goes on where it was stopped."""

import contextlib
import json
import os
import shutil
import signal
import sys
import time
from unittest import mock

import pytest

import records
import train_queue
from command_lines import ROOT
from runs import TINY
from vffjax import backend
from vffjax.errors import UserError
from vffjax.runs import experiment, lock
from vffjax.runs.logbook import Logbook
from vffjax.runs.termination import Terminated, interruptible
from vffjax.training import checks

DIGITS = str(ROOT / "configs" / "digits.py")
SET = {key: list(value) if isinstance(value, tuple) else value for key, value in TINY.items() if key != "dataset"}


def write_list(path, *runs, **common):
    """A list in TOML; values are JSON, which TOML reads but for its objects and truth values."""

    def inline(value):
        if isinstance(value, dict):
            return "{" + ", ".join(f"{key} = {inline(inner)}" for key, inner in value.items()) + "}"
        return json.dumps(value)

    tables = [("[common]", common)] if common else []
    tables += [("[[run]]", run) for run in runs]
    path.write_text("\n".join("\n".join([head, *(f"{key} = {inline(value)}" for key, value in body.items())]) for head, body in tables))
    return path


def work(path, folder):
    train_queue.work(path, folder / "runs", folder / "results", False)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The records of a list of two names, one of which diverges, and the folder they lie in."""
    folder = tmp_path_factory.mktemp("queue")
    lost = {"rule": "head", "norm": "none", "optimizer": "sgd", "learning_rate": 1e6, "weight_decay": 1e6}
    path = write_list(
        folder / "list.toml",
        {"name": "tiny", "seeds": [0, 3]},
        {"name": "lost", "set": lost},
        config=DIGITS,
        set=SET | {"network": "mlp"},
    )
    with (folder / "log").open("w") as log, contextlib.redirect_stderr(log):
        work(path, folder)
    return folder, path, records.read_all(folder / "results")


@pytest.mark.slow
def test_each_seed_has_a_record_of_what_its_run_found(done):
    folder, _, found = done
    assert set(found) == {"tiny-s0", "tiny-s3", "lost-s0"}
    for seed in (0, 3):
        one = found[f"tiny-s{seed}"]
        summary = json.loads((folder / "runs" / f"tiny-s{seed}" / "summary.json").read_text())
        same = ("test_error", "test_error_per_group", "val_error", "best_epoch", "seed", "commit", "device", "data_sha256")
        assert {key: one[key] for key in same} == {key: summary[key] for key in same}
        assert one["seed"] == one["config"]["seed"] == seed
        assert (one["quiet"], one["config_name"], one["config"]["data_dir"]) == (False, DIGITS, "")
        lines = [json.loads(line) for line in (folder / "runs" / f"tiny-s{seed}" / "metrics.jsonl").read_text().splitlines()]
        assert one["curves"]["val_error"] == pytest.approx([line["val_error"] for line in lines], rel=1e-4)
        assert len(one["curves"]["loss"]) == 3
        assert f"tiny-s{seed}: test_error {one['test_error']:.2f} %, val_error {one['val_error']:.2f} %" in (folder / "log").read_text()
    assert found["tiny-s0"]["test_error"] != found["tiny-s3"]["test_error"]
    assert max((folder / "results" / f"{name}.json").stat().st_size for name in found) < 6_000


@pytest.mark.slow
def test_parameters_and_arithmetic_are_those_of_the_network(done):
    """64 inputs, layers of 16 and 12 with a scale and a bias for each unit, two heads of 10 classes; 11 steps of 32 + 20 rows."""
    one = done[2]["tiny-s0"]
    assert one["parameters"] == {"layers": 64 * 16 + 2 * 16 + 16 * 12 + 2 * 12, "heads": 17 * 10 + 13 * 10}
    rows, layers, heads = 32 + 2 * 10, 64 * 16 + 16 * 12, 16 * 10 + 12 * 10
    # Forward and kernel gradient of each layer; there is no input gradient of a group's first layer. head_weight is 0: heads only read.
    assert one["model_flop"] == 2 * (rows * 2 * layers + 32 * 2 * heads) * 11 * 3


def test_a_run_that_diverges_is_recorded_as_lost(done):
    one = done[2]["lost-s0"]
    assert "is not finite" in one["problem"] and "test_error" not in one
    assert one["changes"]["learning_rate"] == 1e6


def test_runs_that_have_a_record_are_passed_over(done):
    folder, path, _ = done
    with mock.patch.object(train_queue, "train") as train:
        work(path, folder)
    assert not train.called


def test_processes_share_a_list_and_pass_over_the_runs_of_others(tmp_path):
    path = write_list(tmp_path / "list.toml", {"name": "tiny", "seeds": [0, 1, 2]}, config=DIGITS, set=SET | {"network": "mlp"})
    (tmp_path / "runs").mkdir()
    trained = []
    with mock.patch.object(train_queue, "train", lambda run, *rest: finish(run)), (tmp_path / "runs/tiny-s1.lock").open("ab") as other:

        def finish(run):
            trained.append(run.name)
            assert not lock.take(held.enter_context((tmp_path / f"runs/{run.name}.lock").open("ab")))  # nobody else can take it
            records.write(tmp_path / "results", {"name": run.name})
            if run.name == "tiny-s0":  # meanwhile, the other process finishes its run
                records.write(tmp_path / "results", {"name": "tiny-s1"})

        with contextlib.ExitStack() as held:
            assert lock.take(other)
            work(path, tmp_path)
            assert trained == ["tiny-s0", "tiny-s2"]
            (tmp_path / "results/tiny-s1.json").unlink()
            work(path, tmp_path)  # the other process has it again, and there is nothing to do
            assert trained == ["tiny-s0", "tiny-s2"]
    with mock.patch.object(
        train_queue, "train", lambda run, *rest: records.write(tmp_path / "results", {"name": trained.append(run.name) or run.name})
    ):
        work(path, tmp_path)  # its lock ended with it
    assert trained[2:] == ["tiny-s1"]


def test_by_name_a_process_trains_the_names_that_no_other_process_trains_first(tmp_path, monkeypatch):
    names = [{"name": name, "seeds": [seed]} for seed in (0, 1) for name in ("a", "b", "c")]  # seed by seed
    path, trained = write_list(tmp_path / "list.toml", *names, config=DIGITS, set=SET | {"network": "mlp"}), []

    def train(run, *rest):
        trained.append(run.name)
        with (tmp_path / f"runs/{run.name[:1]}.name.lock").open("ab") as file:
            assert run.name[0] == "a" or not lock.take(file)  # it holds the name while it trains
        records.write(tmp_path / "results", {"name": run.name})

    monkeypatch.setattr(train_queue, "train", train)
    (tmp_path / "runs").mkdir()
    with (tmp_path / "runs/a.name.lock").open("ab") as other:
        assert lock.take(other)
        train_queue.work(path, tmp_path / "runs", tmp_path / "results", False, by_name=True)
        assert trained == ["b-s0", "b-s1", "c-s0", "c-s1", "a-s0", "a-s1"]  # then it helps the other process
    with (tmp_path / "runs/c.name.lock").open("ab") as file:
        assert lock.take(file)  # it is free again


def test_a_run_that_another_process_has_just_finished_is_not_trained_again(tmp_path):
    path = write_list(tmp_path / "list.toml", {"name": "tiny", "seeds": [0, 1]}, config=DIGITS, set=SET | {"network": "mlp"})
    taken, trained = train_queue._taken, []

    def after_the_other(lock_file, held):
        if lock_file.stem == "tiny-s0":
            records.write(tmp_path / "results", {"name": "tiny-s0"})
        return taken(lock_file, held)

    def finish(run, *rest):
        trained.append(run.name)
        records.write(tmp_path / "results", {"name": run.name})

    with mock.patch.object(train_queue, "_taken", after_the_other), mock.patch.object(train_queue, "train", finish):
        work(path, tmp_path)
    assert trained == ["tiny-s1"]


def test_the_list_is_read_again_before_each_run(tmp_path):
    path = write_list(tmp_path / "list.toml", {"name": "one", "config": DIGITS})
    seen = []

    def train(run, runs, results, quiet):
        seen.append(run.name)
        records.write(results, {"format": 1, "name": run.name})
        if len(seen) == 1:
            write_list(path, {"name": "zero", "config": DIGITS}, {"name": "one", "config": DIGITS})

    with mock.patch.object(train_queue, "train", train):
        work(path, tmp_path)
    assert seen == ["one-s0", "zero-s0"]


@pytest.mark.slow
def test_a_queue_that_is_told_to_leave_goes_on_inside_of_the_epoch(done, tmp_path):
    """To the same record, but for seconds and what stands there of the interruption."""
    path = write_list(tmp_path / "list.toml", {"name": "tiny"}, config=DIGITS, set=SET | {"network": "mlp", "segment_steps": 3})
    step, told = Logbook.step, []

    def telling(self, epoch, finished, steps):
        step(self, epoch, finished, steps)
        if epoch == 1 and not told:
            told.append(1)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)

    with mock.patch.object(Logbook, "step", telling), pytest.raises(Terminated, match="epoch 2 of 3, step"):
        interruptible(lambda: work(path, tmp_path))
    assert not (tmp_path / "results").exists()
    work(path, tmp_path)
    one, undisturbed = records.read_all(tmp_path / "results")["tiny-s0"], done[2]["tiny-s0"]
    assert one["curves"]["loss"] == undisturbed["curves"]["loss"]
    assert one["test_error_per_group"] == undisturbed["test_error_per_group"]


BAD = {
    "no file": (None, "cannot be read as TOML (No such file or directory)"),
    "no TOML": ("[[run", "cannot be read as TOML"),
    "another table": ("[other]\nx = 1", "holds other"),
    "no name": (f'[[run]]\nconfig = "{DIGITS}"', "it needs name and config"),
    "a key too many": (f'[[run]]\nname = "a"\nconfig = "{DIGITS}"\nrate = 1', "it needs name and config"),
    "a path for a name": (f'[[run]]\nname = "../a"\nconfig = "{DIGITS}"', "not a file's name"),
    "no seeds": (f'[[run]]\nname = "a"\nconfig = "{DIGITS}"\nseeds = []', "not a list of whole numbers"),
    "a seed that is set": (f'[[run]]\nname = "a"\nconfig = "{DIGITS}"\nset = {{seed = 1}}', "no set.seed"),
    "a bad value": (f'[[run]]\nname = "a"\nconfig = "{DIGITS}"\nset = {{epochs = 0}}', "a: config.epochs=0"),
    "a key that does not exist": (f'[[run]]\nname = "a"\nconfig = "{DIGITS}"\nset = {{epoch = 1}}', "did you mean config.epochs"),
    "a set that is no table": (f'[[run]]\nname = "a"\nconfig = "{DIGITS}"\nset = "x"', "no table"),
    "a run that is no table": ("run = [1]", "no table"),
    "the same name twice": (f'[[run]]\nname = "a"\nconfig = "{DIGITS}"\n[[run]]\nname = "a"\nconfig = "{DIGITS}"', "more than once"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_list_with_a_mistake_is_refused_in_one_line(name, tmp_path, monkeypatch, capsys):
    content, part = BAD[name]
    path = tmp_path / "list.toml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError) as refused:
        train_queue.read_list(path)
    assert part in str(refused.value) and "\n" not in str(refused.value)
    monkeypatch.setattr(sys, "argv", ["train_queue.py", str(path), "--quiet"])
    with pytest.raises(SystemExit) as ended:
        train_queue.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_several_lists_are_worked_on_in_their_order_and_checked_before_the_first(tmp_path, monkeypatch):
    trained = []

    def train(run, runs, results, quiet):
        trained.append(run.name)
        (results / f"{run.name}.json").write_text("{}")

    monkeypatch.setattr(train_queue, "train", train)
    monkeypatch.setattr(train_queue.signal, "signal", lambda *_: None)
    monkeypatch.setattr(train_queue.os, "nice", lambda _: None)
    for name in ("b", "a"):
        (tmp_path / f"{name}.toml").write_text(f'[[run]]\nname = "{name}"\nconfig = "{DIGITS}"\nseeds = [0, 1]')
    (tmp_path / "bad.toml").write_text("run = [1]")
    (tmp_path / "results").mkdir()
    folders = ["--results", str(tmp_path / "results"), "--runs", str(tmp_path / "runs")]
    lists = {name: str(tmp_path / f"{name}.toml") for name in ("a", "b", "bad")}
    monkeypatch.setattr(sys, "argv", ["train_queue.py", lists["b"], lists["bad"], *folders])
    with pytest.raises(SystemExit):
        train_queue.main()
    assert not trained
    monkeypatch.setattr(sys, "argv", ["train_queue.py", lists["b"], lists["a"], *folders])
    train_queue.main()
    assert trained == ["b-s0", "b-s1", "a-s0", "a-s1"]


def test_a_run_that_is_refused_keeps_no_other_from_training(tmp_path, monkeypatch, capsys):
    trained = []

    def train(run, runs, results, quiet):
        if run.name == "b-s0":
            raise UserError("config.seed=0: the workdir holds a run with 1")
        trained.append(run.name)
        (results / f"{run.name}.json").write_text("{}")

    monkeypatch.setattr(train_queue, "train", train)
    monkeypatch.setattr(train_queue.signal, "signal", lambda *_: None)
    monkeypatch.setattr(train_queue.os, "nice", lambda _: None)
    (tmp_path / "b.toml").write_text(f'[[run]]\nname = "b"\nconfig = "{DIGITS}"\nseeds = [0, 1]')
    (tmp_path / "a.toml").write_text(f'[[run]]\nname = "a"\nconfig = "{DIGITS}"\nseeds = [0]')
    (tmp_path / "results").mkdir()
    folders = ["--results", str(tmp_path / "results"), "--runs", str(tmp_path / "runs")]
    monkeypatch.setattr(sys, "argv", ["train_queue.py", str(tmp_path / "b.toml"), str(tmp_path / "a.toml"), *folders])
    with pytest.raises(SystemExit) as ended:
        train_queue.main()
    assert (trained, ended.value.code) == (["b-s1", "a-s0"], 2)
    said = capsys.readouterr().err
    assert "b-s0: config.seed=0: the workdir holds a run with 1; the other runs go on" in said
    assert "1 runs were refused, as said above: b-s0" in said


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks/queues").glob("*.toml")), ids=lambda path: path.stem)
def test_every_list_of_the_repository_can_be_trained(path):
    for run in train_queue.read_list(path):
        checks.plan_before_data(run.config)


def test_a_list_that_is_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "list.toml")
    with pytest.raises(UserError, match=r"cannot be read as TOML \(not a file\); correct it"):
        train_queue.read_list(tmp_path / "list.toml")


# The tests themselves may be bound to some of the cores.
QUIET = {"claimed": True, "load": 0.1, "stopped": False, "resumed": False, "cores": os.cpu_count()}
MACHINES = {
    "a quiet machine": {},
    "a busy machine": {"load": 99.0},
    "nobody said so": {"claimed": False},
    "it was stopped meanwhile": {"stopped": True},
    "it goes on with a run of another time": {"resumed": True},
    "it is bound to some of the cores": {"cores": (os.cpu_count() or 1) - 1},
}


@pytest.mark.parametrize("name", MACHINES)
def test_seconds_are_trusted_only_on_a_machine_that_is_quiet(name, done, tmp_path):
    machine = QUIET | MACHINES[name]
    load = machine["load"]
    folder, path, _ = done
    run = train_queue.read_list(path)[0]

    def train(config, workdir):
        shutil.copytree(folder / "runs" / run.name, workdir, dirs_exist_ok=True)
        train_queue._stopped.extend([1] if machine["stopped"] else [])

    if machine["resumed"]:
        (tmp_path / "runs" / run.name).mkdir(parents=True)
    with (
        mock.patch.object(os, "getloadavg", lambda: (load, load, load)),
        mock.patch.object(backend, "cores", lambda: machine["cores"]),
        mock.patch.object(experiment, "train", train),
    ):
        train_queue.train(run, tmp_path / "runs", tmp_path / "results", machine["claimed"])
    assert records.read_all(tmp_path / "results")["tiny-s0"]["quiet"] is (machine == QUIET)


def test_a_file_that_is_no_record_is_named(tmp_path):
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(UserError, match=r"x\.json: not a record of a run"):
        records.read_all(tmp_path)
    (tmp_path / "x.json").write_text(json.dumps({"format": 0, "name": "x"}))
    with pytest.raises(UserError, match="a record of format 0"):
        records.read_all(tmp_path)
