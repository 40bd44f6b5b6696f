"""A finished run trained again: the same bits, in one process and in two; and what is said where they differ."""

import json
import os
import shutil
from unittest import mock

import pytest

from command_lines import TINY_FLAGS, in_a_process
from runs import contents, copy_of, finished, tell_to_leave, tiny, train
from vffjax.errors import UserError
from vffjax.runs import experiment, origin, summary
from vffjax.runs.logbook import Logbook
from vffjax.runs.termination import Terminated
from vffjax.runs.workdir import load_run
from vffjax.uses import reproduction
from vffjax.weights import weights


@pytest.fixture
def reproduce(call):
    def run(*arguments):
        quick = [mock.patch.object(summary, name) for name in ("draw_features", "plot_curves")]
        with quick[0], quick[1]:
            return call("reproduce", *arguments)

    return run


def test_a_run_is_reproduced_to_the_bit_and_left_as_it_was(reproduce, tmp_path):
    before = contents(finished())
    status, out, err = reproduce(finished(), f"--into={tmp_path / 'again'}")
    assert status == 0, err
    assert out.startswith("identical to the bit: 3 epochs' records, ")
    assert contents(finished()) == before
    assert (tmp_path / "again" / "summary.json").exists()
    # The record of one run is not that of the other: it was trained again.
    assert (tmp_path / "again" / "metrics.jsonl").read_bytes() != (finished() / "metrics.jsonl").read_bytes()


def test_a_run_from_before_devices_were_counted_is_reproduced(reproduce, tmp_path):
    work = copy_of(finished(), tmp_path)
    found = json.loads((work / "summary.json").read_text())
    (work / "summary.json").write_text(json.dumps({key: found[key] for key in found if key != "devices"}))
    status, out, err = reproduce(work, f"--into={tmp_path / 'again'}")
    assert (status, out.startswith("identical to the bit")) == (0, True), err
    assert "devices: " not in out


def test_a_run_that_asked_for_more_devices_is_trained_by_those_that_are_here(reproduce, tmp_path):
    work = copy_of(finished(), tmp_path)
    for name in ("config.json", "summary.json"):
        found = json.loads((work / name).read_text())
        (work / name).write_text(json.dumps(found | {"devices": 8}))
    status, out, err = reproduce(work, f"--into={tmp_path / 'again'}")
    assert (status, out.startswith("identical to the bit")) == (0, True), err
    assert "devices: " in out


@pytest.mark.slow
def test_without_a_folder_nothing_is_left(reproduce, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    status, out, _ = reproduce(finished(), "--json")
    assert status == 0
    found = json.loads(out)
    assert (found["identical"], found["differences"], found["epochs"]) == (True, [], 3)
    assert found["arrays"] > 50
    assert list(tmp_path.iterdir()) == []


@pytest.mark.full_optimisation
def test_two_processes_give_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "false")  # each by what it compiles itself
    done = in_a_process("train.py", *TINY_FLAGS, f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    found = reproduction.compare(finished(), tmp_path / "run")
    assert found["differences"] == []


@pytest.mark.slow
def test_an_interrupted_reproduction_goes_on(reproduce, tmp_path):
    sound = Logbook.epoch

    def signalled(self, record):
        tell_to_leave()
        return sound(self, record)

    with mock.patch.object(Logbook, "epoch", signalled), pytest.raises(Terminated):
        reproduction.reproduce(finished(), tmp_path / "again")
    status, out, err = reproduce(finished(), f"--into={tmp_path / 'again'}")
    assert (status, "epoch 1/3" in err, "epoch 2/3" in err) == (0, False, True)
    assert out.startswith("identical")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A run of another seed."""
    workdir = tmp_path_factory.mktemp("other") / "run"
    train(tiny(seed=1), workdir)
    return workdir


def test_what_differs_is_named(other):
    found = reproduction.compare(finished(), other)
    assert not found["identical"]
    lines = "\n".join(found["differences"])
    for part in (
        "summary.json test_error: ",
        "summary.json seed: 0 then, 1 now",
        "metrics.jsonl, line 1 loss: ",
        "group0.params.layers_0.kernel",
    ):
        assert part in lines
    shown = reproduction.text(found)
    assert shown.startswith("NOT identical")
    assert all(line in shown for line in found["differences"])


@pytest.mark.slow
def test_a_difference_of_one_bit_or_one_line_is_found(other, tmp_path):
    # The other run's last epoch in the place of the first's, but for its results.
    workdir = copy_of(finished(), tmp_path)
    text = (workdir / "metrics.jsonl").read_text()
    (workdir / "metrics.jsonl").write_text(text + text.splitlines()[-1] + "\n")
    assert [d.split(":")[0] for d in reproduction.compare(finished(), workdir)["differences"]][:1] == ["metrics.jsonl, line 4 epoch"]
    (workdir / "metrics.jsonl").write_text(text)
    assert reproduction.compare(finished(), workdir)["differences"] == []
    shutil.copy(other / "config.json", workdir)
    for name in ("3", "3.sha256.json"):
        path = workdir / "checkpoints" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        copy = shutil.copytree if (other / "checkpoints" / name).is_dir() else shutil.copy
        copy(other / "checkpoints" / name, path)
    shutil.rmtree(workdir / "checkpoints" / "2")
    found = reproduction.compare(finished(), workdir)["differences"]
    assert found[0] == "checkpoints: epochs [2, 3] then, [3] now"
    assert all(line.startswith("checkpoints/3: ") for line in found[1:])
    assert any("task.codebook" in line for line in found)


@pytest.mark.slow
def test_a_run_that_comes_out_differently_ends_with_status_1(reproduce, tmp_path):
    sound, workdir = experiment.make_task, finished()  # which the other codebook must not train

    def another_codebook(*arguments):
        task = sound(*arguments)
        return task._replace(codebook=task.codebook.at[0, 0, 0, 0].add(1e-6))

    with mock.patch.object(experiment, "make_task", another_codebook), mock.patch.object(origin, "_commit", lambda: "1" * 40):
        status, out, _ = reproduce(workdir)
    assert status == 1
    assert "task.codebook differs by up to " in out
    assert "ran under other conditions:\n  commit: 0000" in out


def test_what_cannot_be_reproduced_is_refused(fails, tmp_path):
    fails("reproduce", tmp_path, parts=[f"--workdir={tmp_path}", "no run here"])
    fails("reproduce", parts=["WORKDIR", "vffjax reproduce --help"])
    fails("reproduce", finished(), f"--into={finished()}", parts=[f"--into={finished()}", "give another"])
    workdir = copy_of(finished(), tmp_path)
    fails("reproduce", finished(), f"--into={workdir}", parts=[f"--into={workdir}", "a run that has ended", "give another"])
    for content, part in (("{", "cannot be read"), ("[]", "not a JSON object"), ("{}", "has no versions")):
        (workdir / "summary.json").write_text(content)
        fails("reproduce", workdir, parts=[str(workdir / "summary.json"), part])
    (workdir / "summary.json").unlink()
    fails("reproduce", workdir, parts=["not finished", "train it to the end first"])


UNFIT = {
    "a damaged checkpoint": (lambda w: (w / "checkpoints" / "2" / "task" / "_METADATA").write_text(""), "2/task/_METADATA: damaged"),
    "no checkpoint": (lambda w: shutil.rmtree(w / "checkpoints"), "has no saved epoch to compare with"),
    "another configuration": (lambda w: edit(w / "config.json", epochs=5), "foreign checkpoint"),
}


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("how", UNFIT)
def test_what_could_not_be_compared_is_not_trained(how, tmp_path):
    spoil, said = UNFIT[how]
    work = copy_of(finished(), tmp_path)
    spoil(work)
    with mock.patch.object(experiment, "train") as training, pytest.raises(UserError, match=said):
        reproduction.reproduce(work, tmp_path / "again")
    assert not training.called


@pytest.mark.slow
def test_a_run_from_weights_is_not_trained_again_from_others(tmp_path):
    file, work = tmp_path / "w.safetensors", tmp_path / "run"
    first = load_run(finished())
    weights.write_weights(file, first.plan, first.states, {})
    train(tiny(init_from=str(file), epochs=1), work)
    weights.write_weights(file, first.plan, load_run(work).states, {})
    for said in (r"config\.init_from=.*: other weights than the run began with; restore them", "w.safetensors: cannot be read"):
        with mock.patch.object(experiment, "train") as training, pytest.raises(UserError, match=said):
            reproduction.reproduce(work, tmp_path / "again")
        assert not training.called
        file.unlink(missing_ok=True)


def test_ctrl_c_without_a_folder_promises_nothing(reproduce, tmp_path):
    with mock.patch.object(reproduction, "reproduce", mock.Mock(side_effect=KeyboardInterrupt)):
        status, _, err = reproduce(finished())
        assert (status, err) == (130, "vffjax: interrupted; nothing is kept; with --into DIR the same command would continue\n")
        assert reproduce(finished(), f"--into={tmp_path / 'again'}")[::2] == (130, "vffjax: interrupted\n")


def test_a_process_names_the_commit_that_it_began_with():
    """Its modules are those of that commit, also if the checkout moves while it trains."""
    origin._commit.cache_clear()
    before = origin._commit()
    with mock.patch.object(origin.subprocess, "run", side_effect=AssertionError("asked again")):
        assert origin._commit() == before


def test_summary_names_the_flags_that_can_change_numbers():
    code = "from vffjax.config import Config; from vffjax.runs.origin import origin; print(origin(Config())['flags'])"
    found = in_a_process("-c", code)
    assert "'JAX_PLATFORMS': 'cpu'" in found.stdout
    with mock.patch.dict(os.environ, {"XLA_FLAGS": "--xla_cpu_enable_fast_math=false", "UNRELATED": "1"}):
        flags = origin.origin(tiny())["flags"]
    assert flags["XLA_FLAGS"] == "--xla_cpu_enable_fast_math=false"
    assert "UNRELATED" not in flags
