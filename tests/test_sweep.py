"""`vffjax sweep`: the runs of many seeds and values, in one process, to the same figures as single runs."""

import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from unittest import mock

import numpy as np
import pytest

from command_lines import ROOT, TINY_FLAGS
from runs import TINY, summary_of, tell_to_leave, tiny, train, untimed
from test_epochs import compilations
from vffjax.cli.commands.sweep import split
from vffjax.errors import UserError
from vffjax.many import figures, members, sweep
from vffjax.runs import drawing, experiment, summary
from vffjax.runs.logbook import read_metrics
from vffjax.runs.loop import Diverged
from vffjax.runs.termination import Terminated, interruptible

FLAGS = [*TINY_FLAGS, "--config.epochs=1", "--config.train_examples=200", "--config.widths=(8,6)"]
SMALL = {"epochs": 1, "train_examples": 200, "widths": (8, 6), "checkpoint_every": 1}


@pytest.fixture(autouse=True)
def no_pictures_of_the_runs(monkeypatch):
    monkeypatch.setattr(summary, "draw_features", lambda *_: None)
    monkeypatch.setattr(summary, "plot_curves", lambda *_: None)


def found_in(out):
    return json.loads((out / "sweep.json").read_text())


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A sweep over two seeds and three rates, and what was compiled in each of its runs."""
    out, counts, real = tmp_path_factory.mktemp("sweep") / "out", [], experiment.train

    def counted(*arguments):
        with compilations() as compiled:
            found = real(*arguments)
        counts.append(len(compiled))
        return found

    with (
        mock.patch.object(experiment, "train", counted),
        mock.patch.object(summary, "draw_features"),
        mock.patch.object(summary, "plot_curves"),
    ):
        rates = [tiny(**SMALL, learning_rate=rate) for rate in (1e-3, 1e-2, 3e-2)]
        runs = sweep.ready(members.members(rates, ["learning_rate"], [0, 1]), out)
        found = sweep.run(runs, out, {"config": "tiny"})
    return out, found, counts


def test_only_the_first_run_compiles(done):
    _, _, counts = done
    assert counts[0] > 0
    assert counts[1:] == [0] * 5


def test_the_table_holds_the_figures_of_single_runs(done, tmp_path):
    out, found, _ = done
    assert found == found_in(out)
    assert [row["values"] for row in found["rows"]] == [{"learning_rate": rate} for rate in (1e-3, 1e-2, 3e-2)]
    for i, row in enumerate(found["rows"]):
        runs = found["runs"][2 * i : 2 * i + 2]
        assert [one["seed"] for one in runs] == [0, 1]
        assert (row["n"], row["diverged"]) == (2, 0)
        for key in ("val_error", "test_error", "seconds"):
            values = [one[key] for one in runs]
            assert row[key] == pytest.approx(statistics.mean(values))
            assert row[f"{key}_sd"] == pytest.approx(statistics.stdev(values))
    single = train(tiny(**SMALL, learning_rate=1e-2, seed=1), tmp_path / "single")
    member = out / "runs" / "learning_rate=0.01,seed=1"
    assert untimed(summary_of(member))["test_error"] == single["test_error"] == found["runs"][3]["test_error"]
    assert [untimed(one) for one in read_metrics(member)] == [untimed(one) for one in read_metrics(tmp_path / "single")]
    text = (out / "sweep.md").read_text()
    assert f"{found['rows'][2]['test_error']:.2f} ± {found['rows'][2]['test_error_sd']:.2f}" in text
    best = min(found["rows"], key=lambda row: row["val_error"])["values"]["learning_rate"]
    assert text.endswith(f"\nLowest validation error: learning_rate={best}.\n")
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_call_trains_only_what_is_new(done, call, monkeypatch):
    out, found, _ = done
    given = [f"--config={ROOT / 'configs' / 'digits.py'}", *(f"--config.{key}={value}" for key, value in (TINY | SMALL).items())]
    monkeypatch.setattr(experiment, "train", mock.Mock(side_effect=AssertionError("a finished run was trained again")))
    arguments = ["--seeds=0-1", "--vary=learning_rate=1e-3,0.001,1e-2,3e-2", f"--out={out}"]  # 1e-3 is 0.001
    status, text, _ = call("sweep", *given, *arguments)
    again = found_in(out)
    assert (status, again["runs"], again["rows"]) == (0, found["runs"], found["rows"])
    assert text == (out / "sweep.md").read_text()
    status, text, _ = call("sweep", *given, *arguments, "--json")
    assert json.loads(text)["rows"] == found["rows"]


def test_a_run_that_diverges_is_told_and_counted_and_the_others_go_on(call, tmp_path, monkeypatch):
    real = experiment.train

    def diverges(config, folder):
        if config.learning_rate > 1:
            raise Diverged("group0: the loss is NaN")
        return real(config, folder)

    monkeypatch.setattr(experiment, "train", diverges)
    status, text, err = call("sweep", *FLAGS, "--vary=learning_rate=1e3,1e-2", f"--out={tmp_path}")
    found = found_in(tmp_path)
    assert status == 0, err
    assert [(row["n"], row["diverged"]) for row in found["rows"]] == [(0, 1), (1, 0)]
    assert "learning_rate=1000.0,seed=0: group0: the loss is NaN; " in err and "the others go on" in err
    assert "diverged" in text and text.endswith("Lowest validation error: learning_rate=0.01.\n")
    assert found["runs"][0]["test_error"] is None


def test_keys_that_are_dictionaries_tuples_and_words_can_vary(call, tmp_path):
    varied = ["--vary=widths=(8,6), (4,)", "--vary=overrides.group0.learning_rate=1e-3,1e-2", "--vary=config.rule=vff,head"]
    with mock.patch.object(experiment, "train", lambda config, folder: {"test_error": 1.0, "val_error": 2.0, "seconds": 0.1}):
        assert call("sweep", *FLAGS, *varied, f"--out={tmp_path}")[0] == 0
    rows = found_in(tmp_path)["rows"]
    assert len(rows) == 8
    assert rows[0]["values"] == {"widths": [8, 6], "overrides.group0.learning_rate": 1e-3, "rule": "vff"}
    assert rows[-1]["values"] == {"widths": [4], "overrides.group0.learning_rate": 1e-2, "rule": "head"}


def test_without_varied_keys_and_seeds_it_is_one_run_and_without_validation_images_there_is_no_choice(call, tmp_path):
    status, text, _ = call("sweep", *FLAGS, "--config.val_fraction=0", "--config.seed=3", f"--out={tmp_path}")
    found = found_in(tmp_path)
    assert status == 0
    assert [one["name"] for one in found["runs"]] == ["seed=3"]
    assert found["rows"][0]["val_error"] is None and "Lowest" not in text
    assert sweep.best_of([{"val_error": None, "diverged": 0}]) is None


def test_values_are_split_at_commas_that_stand_alone():
    assert split("1,2") == ["1", "2"]
    assert split("(1, (2, 3)), [4,5]") == ["(1, (2, 3))", "[4,5]"]
    assert split("{'a,b': 1}, {}") == ["{'a,b': 1}", "{}"]
    assert split("'a,b',\"c,d\"") == ["a,b", "c,d"]
    assert split("it's,that's") == ["it's", "that's"]


def test_runs_of_one_program_follow_each_other_and_the_table_keeps_the_order_given(tmp_path, monkeypatch):
    trained = []

    def train(config, folder):
        trained.append((config.widths, config.learning_rate))
        return {"test_error": 1.0, "val_error": 2.0, "seconds": 0.1}

    monkeypatch.setattr(experiment, "train", train)
    rows = [tiny(**SMALL | {"widths": widths}, learning_rate=rate) for rate in (1e-3, 1e-2) for widths in ((8, 6), (4,))]
    found = sweep.run(sweep.ready(members.members(rows, ["learning_rate", "widths"], [0]), tmp_path), tmp_path, {})
    assert trained == [(widths, rate) for widths in ((8, 6), (4,)) for rate in (1e-3, 1e-2)]
    given = [(rate, widths) for rate in (1e-3, 1e-2) for widths in ((8, 6), (4,))]
    assert [tuple(row["values"].values()) for row in found["rows"]] == given


def test_other_runs_in_the_folder_of_a_sweep_are_told(call, tmp_path):
    assert "other runs" not in call("sweep", *FLAGS, "--seeds=0-1", f"--out={tmp_path}")[2]
    assert f"{tmp_path}: other runs lie here too (1)" in call("sweep", *FLAGS, "--seeds=0", f"--out={tmp_path}")[2]


def test_runs_of_an_earlier_call_count_as_kept(call, tmp_path, monkeypatch):
    assert call("sweep", *FLAGS, "--seeds=0-1", f"--out={tmp_path}")[0] == 0
    monkeypatch.setattr(sweep, "trained", mock.Mock(side_effect=UserError("other images")))
    assert call("sweep", *FLAGS, "--seeds=0-2", f"--out={tmp_path}")[2].endswith("other images; 2 of 3 runs have ended and are kept\n")


def test_a_finished_run_of_other_images_or_code_is_not_taken(tmp_path):
    arrays = [np.random.default_rng(seed).integers(0, 255, (60, 4, 4, 1), np.uint8) for seed in (0, 1)]
    for name, images in zip("ab", arrays, strict=True):
        np.savez(tmp_path / f"{name}.npz", images=images, labels=np.arange(60) % 3)
    config = tiny(**SMALL | {"dataset": "npz", "data_dir": str(tmp_path / "a.npz"), "train_examples": 0, "batch_size": 8})
    other = dataclasses.replace(config, data_dir=str(tmp_path / "b.npz"))
    first = sweep.trained(config, tmp_path / "run")
    assert sweep.trained(config, tmp_path / "run") == first | {"earlier_origins": first["earlier_origins"]}
    with pytest.raises(UserError, match="data_dir"):
        sweep.trained(other, tmp_path / "run")


def test_a_problem_of_one_run_names_out_and_says_what_is_kept(call, tmp_path, monkeypatch):
    def fails(config, folder):
        if config.seed:
            raise UserError(f"--workdir={folder}: another run is writing here; wait for it, or give another --workdir")
        return {"test_error": 1.0, "val_error": 2.0, "seconds": 0.1}

    monkeypatch.setattr(experiment, "train", fails)
    status, _, err = call("sweep", *FLAGS, "--seeds=0-1", f"--out={tmp_path}")
    assert status == 2
    assert f"vffjax: error: --out={tmp_path / 'runs' / 'seed=1'}: another run" in err
    assert "--workdir" not in err and err.endswith("; 1 of 2 runs have ended and are kept\n")


def test_a_rule_of_ones_own_beside_the_configuration_can_vary(call, tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text("from vffjax.rules.head import RULE as MINE\n")
    (tmp_path / "mine.py").write_text((ROOT / "configs" / "digits.py").read_text())
    monkeypatch.setattr(experiment, "train", lambda config, folder: {"test_error": 1.0, "val_error": 2.0, "seconds": 0.1})
    status, text, err = call("sweep", f"--config={tmp_path / 'mine.py'}", "--vary=rule=vff,own:MINE", f"--out={tmp_path / 'out'}")
    assert status == 0, err
    assert "own:MINE" in text


def test_names_of_folders_are_safe_and_tell_all_runs_apart():
    values = [(64, 64), (64, 65), "a/b", "a:b", "[x]*?", "x" * 300, "x" * 301]
    names = [members.Member({"key": value}, tiny()).name for value in values]
    assert len(set(names)) == len(values)
    assert all(len(name) < 160 and not set(name) & set("/[]*?\\: ") for name in names)
    assert members.Member({"learning_rate": 1e-3}, tiny(seed=2)).name == "learning_rate=0.001,seed=2"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--vary=seed=1,2"], ["seed=1,2", "--seeds"]),
        (["--vary=learning_rat=1"], ["config.learning_rat", "config.learning_rate"]),
        (["--vary=learning_rate"], ["KEY=VALUE"]),
        (["--vary=learning_rate=1,,2"], ["empty value"]),
        (["--vary=learning_rate=1", "--vary=learning_rate=2"], ["learning_rate", "twice"]),
        (["--vary=epochs=1,0"], ["config.epochs=0"]),
        (["--vary=rule=vff,nonsense"], ["config.rule='nonsense'"]),
        (["--vary=margin=0,5"], ["config.margin=5"]),
        (["--seeds=3-1"], ["--seeds=3-1", "goes down"]),
        (["--seeds=0-2,9-7"], ["9-7", "goes down"]),
        (["--seeds=0-"], ["--seeds=0-", "0-4"]),
        (["--seeds=-1"], ["--seeds=-1"]),
        (["--seeds=0-100000"], ["1000"]),
        (["--seeds=0-900", "--vary=learning_rate=1,2"], ["1802", "1000"]),
        (["--vary=overrides.group0.learning_rate=1e-3,1e-2", "--vary=overrides={}"], ["overrides.group0.learning_rate", "holds the other"]),
        (["--vary=learning_rate=1e-3,(2"], ["learning_rate=1e-3,(2", "not closed"]),
        (["--vary=data_dir='a,b"], ["not closed"]),
        (["--vary=margin=0)"], ["not closed"]),
        (["--workdir=x"], ["--workdir=x", "--out"]),
        (["--nonsense=1"], ["--nonsense"]),
    ],
)
def test_bad_input_is_one_line_before_anything_is_trained(arguments, parts, fails, tmp_path):
    fails("sweep", *FLAGS, *arguments, f"--out={tmp_path / 'out'}", parts=parts)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_sweep_or_that_is_a_file_is_refused(done, fails, tmp_path):
    out, _, _ = done
    (tmp_path / "file").write_text("")
    fails("sweep", *FLAGS, f"--out={tmp_path / 'file'}", parts=["--out=", "no folder"])
    fails("sweep", *FLAGS, f"--out={'x' * 300}", parts=["x" * 100, "name too long"])
    other = [*FLAGS, "--config.batch_size=16", "--seeds=0", "--vary=learning_rate=1e-3", f"--out={out}"]
    fails("sweep", *other, parts=["config.batch_size=16", "--out"])


def test_sigterm_ends_the_sweep_and_the_same_command_goes_on(done, tmp_path, monkeypatch):
    _, found, _ = done
    real, told = experiment.train, []

    def left(*arguments):
        if len(told) < 2:
            told.append(arguments)
        if len(told) == 2:
            told.append(None)
            tell_to_leave()  # before the run knows of it
        return real(*arguments)

    monkeypatch.setattr(experiment, "train", left)
    runs = sweep.ready(members.members([tiny(**SMALL, learning_rate=rate) for rate in (1e-3, 1e-2)], ["learning_rate"], [0, 1]), tmp_path)
    with pytest.raises(Terminated, match="1 of 4 runs have ended and are kept"):
        interruptible(lambda: sweep.run(runs, tmp_path, {}))
    assert len(found_in(tmp_path)["runs"]) == 1
    again = sweep.run(runs, tmp_path, {})
    wanted = [{key: one[key] for key in ("name", "test_error", "val_error")} for one in found["runs"][:4]]
    assert [{key: one[key] for key in ("name", "test_error", "val_error")} for one in again["runs"]] == wanted


@pytest.mark.slow
def test_a_sweep_that_is_killed_by_sigterm_goes_on_to_the_same_table(tmp_path):
    flags = [*TINY_FLAGS, "--config.epochs=60", "--config.checkpoint_every=10", "--seeds=0-1", "--vary=learning_rate=1e-3,1e-2"]
    command = [sys.executable, "-m", "vffjax", "sweep", *flags]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen([*command, f"--out={tmp_path / 'killed'}"], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 200
    while not (tmp_path / "killed" / "sweep.json").exists():  # the first run has ended
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "of 4 runs have ended and are kept; " in err
    left = [folder for folder in (tmp_path / "killed" / "runs").iterdir() if not (folder / "summary.json").exists()]
    if left:  # SIGTERM may have come between two runs, or while one compiled
        assert len(left) == 1
    if left:  # what the line says of the run that was told to leave is so
        assert any((left[0] / "checkpoints").rglob("*.sha256.json")) == ("is saved; the same command goes on from there" in err), err
    assert len(found_in(tmp_path / "killed")["runs"]) < 4
    tables = []
    for name in ("killed", "whole"):
        done = subprocess.run(
            [*command, f"--out={tmp_path / name}"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        tables.append([{key: one[key] for key in ("name", *sweep.ERRORS)} for one in found_in(tmp_path / name)["runs"]])
    assert tables[0] == tables[1]


def test_the_picture_has_an_axis_for_one_number_and_lines_for_all_else(tmp_path):
    def row(values, val=2.0):
        return {"values": values, "n": 3, "diverged": 0, "val_error": val, "val_error_sd": 0.1, "test_error": 3.0, "test_error_sd": None}

    numbers = {"keys": ["learning_rate"], "rows": [row({"learning_rate": rate}) for rate in (1e-2, 1e-3)]}
    (axes,) = figures.sweep_figure(numbers).axes
    assert (axes.get_xlabel(), axes.get_xscale()) == ("learning_rate", "log")
    assert axes.lines[0].get_xdata().tolist() == [1e-3, 1e-2]
    words = {"keys": ["rule", "norm_scale"], "rows": [row({"rule": rule, "norm_scale": True}, None) for rule in ("vff", "he$d")]}
    (axes,) = figures.sweep_figure(words).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["rule=vff, norm_scale=True", "rule=he$d, norm_scale=True"]
    truths = {"keys": ["flip"], "rows": [row({"flip": flip}) for flip in (True, False)]}
    assert figures.sweep_figure(truths).axes[0].get_xlabel() == "error (%)"
    for i, found in enumerate((numbers, words, truths, {"keys": [], "rows": []})):
        assert drawing.draw(tmp_path / f"{i}.png", lambda found=found: figures.sweep_figure(found)) is not None
