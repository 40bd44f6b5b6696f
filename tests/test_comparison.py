"""`vffjax compare`: what runs were configured with, beside what came out."""

import json
import os
import shutil
import statistics
import subprocess
import sys

import pytest

from command_lines import ROOT
from runs import copy_of, summary_of, tiny, train
from vffjax.many import comparison, figures
from vffjax.runs import drawing


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A finished run, one of another seed, and one by another rule."""
    folder = tmp_path_factory.mktemp("three") / "runs"
    for name, changes in (("one", {}), ("seed", {"seed": 1}), ("head", {"rule": "head"})):
        train(tiny(**changes), folder / name)
    return [folder / name for name in ("one", "seed", "head")]


def test_the_table_has_the_keys_that_differ_and_the_runs_own_figures(three, call):
    status, text, _ = call("compare", *three)
    assert status == 0
    tables = [part for part in text.split("\n\n") if part.startswith("|")]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in tables[0].splitlines()]
    head = lines[0]
    assert head == ["run", "rule", "seed", "validation error %", "test error %", "epochs", "seconds", "images/s"]
    for folder, cells in zip(three, lines[2:], strict=True):
        summary, line = summary_of(folder), dict(zip(head, cells, strict=True))
        assert line["run"] == folder.name
        assert line["rule"] == ("head" if folder.name == "head" else "vff")
        assert line["seed"] == str(summary["seed"])
        assert line["test error %"] == f"{summary['test_error']:.2f}"
        assert line["validation error %"] == f"{summary['val_error']:.2f}"
        assert (line["epochs"], line["seconds"]) == ("3/3", f"{summary['seconds']:,.1f}")
    errors = [summary_of(folder)["test_error"] for folder in three[:2]]
    assert f"{statistics.mean(errors):.2f} ± {statistics.stdev(errors):.2f}" in tables[1]
    assert tables[1].splitlines()[2].endswith("| 2 |")
    assert tables[1].splitlines()[3].endswith("| 1 |")
    assert "same images" not in text


def test_the_folder_of_a_sweep_stands_for_its_runs_and_json_holds_no_records(three, call, tmp_path):
    status, text, _ = call("compare", three[0].parents[1], "--json", f"--out={tmp_path / 'found.json'}")
    found = json.loads(text)
    assert status == 0
    assert found == json.loads((tmp_path / "found.json").read_text())
    assert sorted(run["name"] for run in found["runs"]) == ["head", "one", "seed"]
    assert found["keys"] == ["rule"]
    assert not any("records" in run for run in found["runs"])
    assert comparison.folders_of([three[0], three[0].parents[1]])[0] == three[0]
    assert len(comparison.folders_of([three[0], three[0].parents[1]])) == 3  # a run that is given twice is one


def test_a_folder_of_runs_stands_for_them_and_files_beside_them_are_passed_over(three, fails, tmp_path, capsys):
    for run in three[:2]:
        shutil.copytree(run, tmp_path / "runs" / run.name)
    (tmp_path / "runs" / "zero.png").write_bytes(b"")
    every = sorted((tmp_path / "runs").iterdir())
    assert comparison.folders_of([tmp_path / "runs"]) == comparison.folders_of(every) == every[:2]
    assert capsys.readouterr().err == f"{every[2]}: passed over, since it is a file\n"
    fails("compare", every[2], parts=[str(every[2]), "give folders of runs"])


def test_a_run_that_is_still_training_shows_its_best_so_far(three, call, tmp_path):
    run = copy_of(three[0], tmp_path)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:2]))
    (run / "summary.json").unlink()
    status, text, _ = call("compare", run, three[2])
    best = min(json.loads(line)["val_error"] for line in lines[:2])
    cells = [cell.strip() for cell in text.splitlines()[2].strip("|").split("|")]
    assert status == 0
    assert cells[3:6] == [f"{best:.2f}", "-", "2/3"]


def test_other_images_are_told_if_the_seed_does_not_explain_them(three, call, tmp_path):
    run = copy_of(three[0], tmp_path)
    (run / "summary.json").write_text(json.dumps(summary_of(run) | {"data_sha256": "0" * 64}))
    assert "did not have the same images" in call("compare", run, three[0])[1]


def test_runs_that_differ_behind_the_end_of_a_long_value_are_two_rows(three, tmp_path):
    folders = []
    for name, rate in (("a", 1e-3), ("b", 1e-2)):
        folder = copy_of(three[0], tmp_path / name) if (tmp_path / name).mkdir() is None else None
        config = json.loads((folder / "config.json").read_text())
        config["overrides"] = {"group0": {"learning_rate": 1e-3, "weight_decay": 0.0}, "group1": {"learning_rate": rate}}
        (folder / "config.json").write_text(json.dumps(config))
        folders.append(folder)
    found = comparison.read(folders)
    assert len({run["row"] for run in found["runs"]}) == 2
    assert "Mean and standard deviation" not in comparison.text(found)
    assert len({line.get_color() for line in figures.curves_figure(found["runs"]).axes[0].lines}) == 2


def test_folders_of_images_are_compared_where_they_name_the_data(three, tmp_path):
    folders = []
    for name in "ab":
        (tmp_path / name).mkdir()
        folder = copy_of(three[0], tmp_path / name)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"dataset": "npz", "data_dir": f"{name}.npz"}))
        folders.append(folder)
    assert comparison.read(folders)["keys"] == ["data_dir"]
    for folder in folders:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"dataset": "mnist"}))
    assert comparison.read(folders)["keys"] == []


def test_a_copy_is_no_other_seed(three, tmp_path):
    assert "Mean and standard deviation" not in comparison.text(comparison.read([three[0], copy_of(three[0], tmp_path)]))


def test_an_unfinished_sequential_run_has_the_epochs_of_all_groups(three, tmp_path):
    run = copy_of(three[0], tmp_path)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"schedule": "sequential"}))
    (run / "summary.json").unlink()
    (found,) = comparison.read([run])["runs"]
    assert (found["epochs"], found["total_epochs"]) == (3, 6)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("metrics.jsonl", {"epoch": 1, "val_error": "x", "seconds": "1", "train_accuracy": []}),
        (
            "summary.json",
            {"epochs": 1, "test_error": "x", "val_error": [], "data_sha256": [], "device": {"a": 1}, "images_per_second": None},
        ),
        ("summary.json", ["x"]),
        ("summary.json", "{"),
    ],
)
def test_files_that_come_from_anyone_end_no_comparison(three, file, content, call, tmp_path):
    run = copy_of(three[0], tmp_path)
    (run / file).write_text((content if isinstance(content, str) else json.dumps(content)) + "\n")
    status, text, err = call("compare", run, three[2], f"--plot={tmp_path / 'x.png'}")
    assert status == 0 and "Traceback" not in err
    assert text.count("\n") >= 4


def test_a_setting_of_jax_that_is_wrong_is_one_line(three):
    command = [sys.executable, "-m", "vffjax", "compare", str(three[0])]
    done = subprocess.run(command, env=os.environ | {"JAX_ENABLE_X64": "nonsense"}, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "JAX_ENABLE_X64" in done.stderr


def test_equal_names_are_told_apart_by_their_folders(three, tmp_path):
    (tmp_path / "other").mkdir()
    copied = tmp_path / "other" / "one"
    shutil.copytree(three[0], copied)
    names = [run["name"] for run in comparison.read([three[0], copied])["runs"]]
    assert names == ["runs/one", "other/one"]


def test_bad_input_is_one_line(three, fails, tmp_path):
    fails("compare", tmp_path, parts=[str(tmp_path), "neither a run nor a sweep"])
    fails("compare", parts=["DIR"])
    fails("compare", three[0], "--plot=x.txt", parts=["--plot=x.txt", ".png"])
    run = copy_of(three[0], tmp_path)
    (run / "config.json").write_text("{")
    fails("compare", run, parts=["config.json", "cannot be read"])


def test_curves_lie_over_each_other_one_colour_for_a_row(three, call, tmp_path):
    assert call("compare", *three, f"--plot={tmp_path / 'curves.png'}")[0] == 0
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    runs = comparison.read(three)["runs"]
    (axes,) = figures.curves_figure(runs).axes
    colors = [line.get_color() for line in axes.lines]
    assert colors[0] == colors[1] != colors[2]
    for line, run in zip(axes.lines, runs, strict=True):
        assert line.get_ydata().tolist() == [record["val_error"] for record in run["records"]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["rule=vff", "rule=head"]
    blind = [run | {"records": [{"epoch": 1, "val_error": None, "train_accuracy": 0.75}]} for run in runs[:1]]
    (axes,) = figures.curves_figure(blind).axes
    assert axes.lines[0].get_ydata().tolist() == [25.0]
    assert "training images" in axes.get_title()
    assert drawing.draw(tmp_path / "none.png", lambda: figures.curves_figure([run | {"records": []} for run in runs]))
