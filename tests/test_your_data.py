"""docs/your_data.md: every command and the program on the page, run as they stand there, on pictures, arrays and sets of three classes."""

import json
import re
import shlex

import numpy as np
import pytest

from command_lines import ROOT
from test_own_images import CLASSES, encoded, picture, prepared

PAGE = (ROOT / "docs" / "your_data.md").read_text()
COMMANDS = [line for block in re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL) for line in block.splitlines()]
(PROGRAM,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
ANIMALS = ("cat", "dog", "fox")


def coloured(label, seed):
    """A picture of a size of its own, whose colour tells its class."""
    rng = np.random.default_rng(seed)
    image = picture(seed, *rng.integers(40, 120, 2))
    return image.point([min(255, value // 3 + 100 * (channel == label)) for channel in range(3) for value in range(256)])


@pytest.fixture
def page(tmp_path, monkeypatch):
    """The folder in which the page's commands are run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for label, name in enumerate(ANIMALS):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(40):
            stem = "one" if i == 0 else f"{i}"
            coloured(label, 100 * label + i).save(tmp_path / "photos" / name / f"{stem}.jpg")
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 90), ("test", 30)):
        labels = np.arange(count) % 3
        pixels = rng.normal(80 * labels[:, None, None] + 40, 20, (count, 32, 32))
        arrays |= {f"x_{part}": np.clip(pixels, 0, 255).astype(np.uint8), f"y_{part}": labels}
    np.savez(tmp_path / "mine.npz", **arrays)
    return tmp_path


def test_no_block_of_the_page_is_passed_over():
    assert PAGE.count("```") == 2 * (PAGE.count("```bash") + PAGE.count("```python")) and PAGE.count("```bash") == 3
    assert len(COMMANDS) == 8 and all(command.startswith("vffjax ") for command in COMMANDS)


@pytest.mark.slow
def test_the_commands_of_the_page(page, call):
    for command in COMMANDS[:6]:
        status, out, err = call(*shlex.split(command)[1:])
        assert status == 0, (command, out, err)
    for run in ("photos", "arrays"):
        assert json.loads((page / "runs" / run / "summary.json").read_text())["test_error"] < 30, run
        status, out, _ = call("evaluate", "--workdir", f"runs/{run}", "--json")
        assert status == 0 and json.loads(out)["own_data"]
    status, out, _ = call("predict", "--workdir", "runs/photos", "photos/fox/one.jpg", "--json")
    assert status == 0 and json.loads(out)[0]["by"]["ensemble"][0]["class"] in ANIMALS
    status, _, err = call("reproduce", "runs/photos")
    assert status == 0, err
    (page / "photos" / "cat" / "1.jpg").unlink()  # now these are other images
    assert call("evaluate", "--workdir", "runs/photos")[0] == 2
    found = json.loads(call("evaluate", "--workdir", "runs/photos", "--other_data", "--json")[1])
    assert (found["test_images"], found["val_images"], found["own_data"]) == (
        119,
        0,
        False,
    )  # the groups of the run vote, so all are judged
    found = json.loads(call("evaluate", "--workdir", "runs/photos", "--other_data", "--views=mirror", "--json")[1])
    assert (found["test_images"] + found["val_images"], found["val_images"] > 0) == (119, True)  # who votes is chosen anew
    assert call("predict", "--workdir", "runs/photos", "photos/cat/one.jpg")[0] == 0  # a run is used without its data


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of tensorflow-datasets and datasets
def test_the_commands_for_other_collections(page, call, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="the library datasets is not installed")
    monkeypatch.setenv("HF_HOME", str(page / "hub"))
    prepared(page / "prepared", {"train": range(60), "test": range(60, 72)})
    (page / "copy").mkdir()
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    rows = {"image": [{"bytes": encoded(coloured(i % 3, i)), "path": None} for i in range(60)], "label": [i % 3 for i in range(60)]}
    datasets.Dataset.from_dict(rows, features=kinds).to_parquet(page / "copy" / "train.parquet")
    for command in COMMANDS[6:]:
        status, out, err = call(*shlex.split(command)[1:])
        assert status == 0, (command, out, err)
    for name in ("tfds", "hub"):
        assert call("evaluate", "--workdir", f"runs/{name}")[0] == 0
        assert call("predict", "--workdir", f"runs/{name}", "photos/cat/one.jpg")[0] == 0


@pytest.mark.slow
def test_the_program_of_the_page(page, capsys):
    exec(compile(PROGRAM, "your_data.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["1", "2", "3"]
    assert "('cat', 'dog', 'fox')" in lines[3]
    assert lines[5] == "(1, 16, 16, 32)"
    assert float(lines[-1]) < 30
