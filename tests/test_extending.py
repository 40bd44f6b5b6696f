"""docs/extending.md: every file on the page works, every command on it is run, and what it says cannot be done is refused."""

import json
import re
import shlex
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from command_lines import ROOT
from oracles import slow_but
from vffjax import outside
from vffjax.data import load as data
from vffjax.errors import UserError
from vffjax.runs.checkpoint import Checkpoints
from vffjax.runs.workdir import load_run
from vffjax.training.checks import make_config
from vffjax.uses.reproduction import compare

PAGE = (ROOT / "docs" / "extending.md").read_text()
FILES = dict(re.findall(r"^`(\w+\.py)`[^\n]*:\n\n```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
COMMANDS = [line for block in re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL) for line in block.splitlines()]


@pytest.fixture(autouse=True)
def page(tmp_path, monkeypatch):
    """The files of the page in the current folder, and nothing allowed so far."""
    monkeypatch.setattr(outside, "_folders", {})
    monkeypatch.setattr(outside, "_loaded", {})
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def npy_files(folder):
    rng = np.random.default_rng(0)
    for part, count in (("train", 120), ("test", 30)):
        np.save(folder / f"{part}_images.npy", rng.integers(0, 256, (count, 8, 8, 3), np.uint8))
        np.save(folder / f"{part}_labels.npy", np.arange(count) % 2)


def test_no_block_of_the_page_is_passed_over():
    assert set(FILES) == {"my_rule.py", "my_config.py", "my_network.py", "my_network_config.py", "my_data.py", "my_files.py"}
    assert len(FILES) == PAGE.count("```python")
    assert len(COMMANDS) == sum(line.startswith("vffjax ") for line in PAGE.splitlines()) > 10


def test_your_rule_in_30_lines():
    assert sum(1 for line in FILES["my_rule.py"].splitlines() if line.strip()) <= 30


LOCAL = ["my_config.py", "my_network_config.py", "my_config.py --config.dataset=my_data:SOURCE"]


@pytest.mark.parametrize("config", slow_but(LOCAL, "my_config.py"))
def test_its_groups_are_local_by_structure(config, call):
    """A quick case of each kind; the slow test below trains them."""
    status, out, err = call("locality", "--structure", "--json", "--config", *config.split())
    assert (status, json.loads(out)["local"]) == (0, True), err


def test_a_set_is_read_from_files(page):
    npy_files(page)
    outside.allow(page)
    config = make_config({"dataset": "my_files:SOURCE", "data_dir": str(page), "val_fraction": 0.25})
    found = data.load(config)
    assert (len(found.train), len(found.validation), len(found.test), found.class_names) == (90, 30, 30, ("cat", "dog"))
    (page / "test_labels.npy").unlink()
    with pytest.raises(UserError, match=r"config\.data_dir=.*test_labels\.npy cannot be read"):
        data.load(config)


WRONG_ARRAYS = {
    "bytes as floats": ("train_images", lambda a: a / 255, "its training data have float64 images (120, 8, 8, 3)"),
    "another shape": ("test_images", lambda a: a[:, :7], "its test data have uint8 images (30, 7, 8, 3)"),
    "no channels": ("test_images", lambda a: a[..., 0], "its test data have uint8 images (30, 8, 8)"),
    "too few labels": ("train_labels", lambda a: a[1:], "its training data have int32 labels (119,) of 120 images"),
    "one more class": ("train_labels", lambda a: a + 1, "its training data have labels from 1 to 2"),
    "a negative label": ("test_labels", lambda a: a - 1, "its test data have labels from -1 to 0"),
}


@pytest.mark.parametrize("wrong", WRONG_ARRAYS)
def test_arrays_that_are_not_as_announced(wrong, page):
    name, change, problem = WRONG_ARRAYS[wrong]
    npy_files(page)
    np.save(page / f"{name}.npy", change(np.load(page / f"{name}.npy")))
    outside.allow(page)
    expected = f"{problem}; return uint8 images of (8, 8, 3), int32 labels and names of 2 classes"
    with pytest.raises(UserError, match=re.escape(f"config.dataset='my_files:SOURCE': {expected}")):
        data.load(make_config({"dataset": "my_files:SOURCE", "data_dir": str(page)}))


REFUSED = {
    "--config.rule_options.scael=5": "config.rule_options.scael=5: no such key; did you mean config.rule_options.scale?",
    "--config.rule_options.scale=1000": "config.rule_options.scale=1000.0: too large; the most is 100.0",
    "--config.rule_options.scale=wide": "config.rule_options.scale='wide': has type str; give a value of type float",
    "--config.inference=sweep": "config.inference='sweep': rule my_rule:RULE never sees a labelled image",
    "--config.rule=my_rule:SCORES": "config.rule='my_rule:SCORES': ",
    "--config.rule=their_rule:RULE": "config.rule='their_rule:RULE': there is no their_rule.py in ",
    "--config.network=my_network:NETWORK --config.norm=none": "config.widths=(24, 16)|config.norm='none': sums need a normalisation",
    "--config.network=my_network:NETWORK --config.widths=(1,2,3)": "config.widths=(1, 2, 3): this network has two blocks",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_validation_names_what_is_wrong(flags, fails):
    fails("locality", "--structure", "--config=my_config.py", *flags.split(), parts=[REFUSED[flags].rpartition("|")[2]])


@pytest.mark.slow
def test_every_command_of_the_page(call, page):
    """In the order of the page."""
    for command in COMMANDS:
        status, _, err = call(*shlex.split(command)[1:])
        assert status == 0, (command, err)
        assert "Traceback" not in err
    assert load_file(page / "mine.safetensors")["group1.params.rule.prototypes"].shape == (10, 16)
    assert sorted(path.name for path in (page / "runs").iterdir()) == ["mine", "network", "stripes"]
    assert call("export", "--workdir=runs/network", "--code=.", "--out=network.safetensors")[0] == 0


@pytest.mark.slow
def test_a_run_with_code_from_outside(call, fails, page):
    run = page / "run"
    assert call("train", "--config=my_config.py", f"--workdir={run}")[0] == 0
    summary = json.loads((run / "summary.json").read_text())
    assert summary["code_sha256"] == {"my_rule.py": outside._digest(page / "my_rule.py")}
    assert len(json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["mean_score_per_group"]) == 2
    assert (run / "curves.png").exists()
    assert (run / "features.png").exists()
    assert json.loads((run / "config.json").read_text())["rule_options"] == {"scale": 5.0}

    # Without the code a run is not used, and it says what to do.
    outside._folders.clear()
    for words in (["evaluate", f"--workdir={run}"], ["export", f"--workdir={run}"], ["reproduce", run]):
        fails(*words, parts=["config.rule='my_rule:RULE': my_rule.py is code from outside of vffjax", "give its folder by --code"])
    with pytest.raises(UserError, match=r"my_rule\.py is code from outside"):
        load_run(run)
    outside.allow(page)
    assert load_run(run)[3]["epoch"] in (1, 2)

    # It goes on to the same bits.
    half = shutil.copytree(run, page / "half")
    shutil.rmtree(half / "checkpoints" / "2")
    for path in (half / "checkpoints").glob("2.*"):
        path.unlink()
    assert Checkpoints(half).epochs() == [1]
    assert call("train", "--config=my_config.py", f"--workdir={half}")[0] == 0
    found = compare(run, half)
    assert (found["differences"], found["epochs"], found["arrays"] > 10) == ([], 2, True)

    # Other code is refused, here and before anything is trained; the code restored is taken.
    (page / "my_rule.py").write_text(FILES["my_rule.py"] + "# changed\n")
    problem = "my_rule.py: not the code by which the run began (other SHA-256); restore it, or start in a new --workdir"
    fails("evaluate", f"--workdir={run}", "--code=.", parts=[problem])
    fails("reproduce", run, "--code=.", f"--into={page / 'again'}", parts=[problem])
    assert not (page / "again").exists()
    status, _, err = call("train", "--config=my_config.py", f"--workdir={run}")
    assert (status, problem in err) == (2, True)
    (page / "my_rule.py").write_text(FILES["my_rule.py"])
    assert call("evaluate", f"--workdir={run}", "--code=.")[0] == 0
