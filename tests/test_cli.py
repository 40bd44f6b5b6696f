"""The command line: help, keys on it, and what train and evaluate print."""

import json
import os
import pathlib
import re

import pytest

from command_lines import CONFIG, ROOT, TINY_FLAGS, in_a_process
from oracles import slow_but
from runs import finished, untimed
from vffjax.cli import flags
from vffjax.cli import main as cli
from vffjax.cli.flags import parse_train
from vffjax.cli.key_help import every_key_as_markdown
from vffjax.config import FIELDS
from vffjax.errors import UserError
from vffjax.runs import experiment

# ----------------------------------------------------------------------------------------------------------------------------------
# Help


def longest(text):
    return max(map(len, text.splitlines()))


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_the_commands(arguments, call):
    status, out, err = call(*arguments)
    assert (status, err) == (0, "")
    assert {"train", "evaluate", "predict", "export", "prepare", "memory", "locality", "reproduce", "version"} <= set(cli.names())
    for command in cli.names():
        assert re.search(rf"^  {command}  +\w+[^.]*", out, re.MULTILINE)
    assert longest(out) <= 80


def test_the_documentation_lists_every_command():
    listed = re.findall(r"^\| `vffjax (\w+)` \| \w+.* \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == cli.names()


def test_no_module_of_a_command_imports_jax_or_a_library_that_draws():
    # Bad input is then refused at once, and what is wrong with JAX is explained by `backend.start`.
    code = "import sys; from vffjax.cli import main; main.usage()\n"
    done = in_a_process("-c", code + "print([name for name in ('jax', 'matplotlib', 'tqdm') if name in sys.modules])")
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.parametrize("arguments", [[], ["--help"], [CONFIG, "--help"]])
def test_help_of_train_explains_every_key(arguments, call):
    status, out, err = call("train", *arguments)
    assert (status, err) == (0, "")
    assert "--config NAME" in out
    assert "--workdir DIR" in out
    for key, field in FIELDS.items():
        assert re.search(rf"^  {key} = ", out, re.MULTILINE)
        assert all(choice in out for choice in field.metadata["choices"])
    assert longest(out) <= 80
    sections = {part.partition(":\n")[0]: part for part in out.partition("their defaults:\n\n")[2].split("\n\n")}
    assert list(sections) == ["data", "network", "rule", "training", "output"]
    first = {"data": "seed", "network": "network", "rule": "rule", "training": "schedule", "output": "inference"}
    assert all(sections[name].startswith(f"{name}:\n  {key} = ") for name, key in first.items())


def test_the_page_of_keys_is_written_from_their_fields():
    page = (ROOT / "docs" / "keys.md").read_text(encoding="utf-8")
    assert page.partition("<!-- keys -->\n")[2].partition("\n<!-- end of keys -->")[0] == every_key_as_markdown()
    for key in FIELDS:
        assert len(re.findall(rf"^\| `{key}` \| ", page, re.MULTILINE)) == 1


KEYS = {
    "epochs": ["section  training", "meaning  passes over", "type     whole number", "default  10", "range    1 to 1,000,000"],
    "config.decay": ["type     text", "default  'cosine'", "choices  cosine, linear"],
    "--config.rule": ["default  'vff'", "deeper_forward", "vffjax list says what each is"],
    "learning_rate": ["section  training", "default  0.001", "range    0 to 1,000,000"],
    "dataset": ["section  data", "names    cifar10, "],
    "network": ["section  network", "vgg8b"],
    "flip": ["--noconfig.flip clears it", "default  False"],
    "overrides": ["type     dictionary", "--config.overrides.NAME=VALUE"],
}


@pytest.mark.parametrize("key", KEYS)
def test_help_of_one_key_is_all_about_it(key, call):
    for arguments in (["--help", key], [CONFIG, "-h", key], [f"--help={key}"]):
        status, out, err = call("train", *arguments)
        assert (status, err) == (0, "")
        assert out.startswith(f"config.{key.rpartition('.')[2]}\n  section  ")
        assert all(part in out for part in KEYS[key]), out
        assert longest(out) <= 80


OPTIONS = {
    "compare": ["DIR", "--plot", "--json", "--out"],
    "configs": ["--json"],
    "list": ["--json"],
    "evaluate": ["--workdir", "--inference", "--epoch", "--data_dir", "--json"],
    "predict": ["--workdir", "--epoch", "--top", "--json", "IMAGE"],
    "export": ["--workdir", "--out", "--epoch", "--group"],
    "locality": ["--config NAME|FILE", "--config.KEY=VALUE", "--structure", "--json", "--out"],
    "report": ["--workdir", "--epoch", "--data_dir", "--code", "--live"],
    "reproduce": ["WORKDIR", "--into", "--data_dir", "--json"],
    "prepare": ["DATASET", "--data_dir", "cifar10"],
    "memory": ["--config NAME|FILE", "--config.KEY=VALUE", "--depths", "--batches", "--target", "here", "cpu", "tpu", "--json", "--out"],
    "sweep": ["--config NAME|FILE", "--config.KEY=VALUE", "--seeds", "--vary", "--out", "--code", "--json"],
}


def test_no_command_is_forgotten_here():
    assert {*OPTIONS, "train", "version"} == set(cli.names())


@pytest.mark.parametrize("command", OPTIONS)
def test_help_of_the_other_commands_explains_their_options(command, call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, err = call(command, "--help")
    assert (status, err) == (0, "")
    assert out.startswith(f"usage: vffjax {command}")
    assert all(option in out for option in OPTIONS[command])
    assert longest(out) <= 80


def test_train_py_is_the_train_command_and_help_needs_no_jax():
    run = "import runpy, sys; sys.argv = ['train.py', '--help']\ntry: runpy.run_path('train.py', run_name='__main__')"
    done = in_a_process("-c", f"{run}\nexcept SystemExit as e: print('jax' in sys.modules, e.code)")
    assert done.stdout.startswith("usage: vffjax train --config NAME|FILE")
    assert done.stdout.endswith("False 0\n")
    assert done.stderr == ""


# ----------------------------------------------------------------------------------------------------------------------------------
# Training


def test_an_unset_key_of_the_file_keeps_its_default_and_the_command_line_wins():
    flags = ["--config.epochs=7", "--config.learning_rate", "1", "--noconfig.flip", "--workdir", "w"]
    config, name, workdir = parse_train([CONFIG, *flags])
    assert (config.epochs, config.learning_rate, config.flip, config.dataset) == (7, 1.0, False, "digits")
    assert (name, workdir) == ("digits", "w")


def test_overrides_of_groups_can_be_given_on_the_command_line():
    whole = "--config.overrides={'group1': {'learning_rate': 1e-4}}"
    assert parse_train([CONFIG, whole])[0].overrides == {"group1": {"learning_rate": 1e-4}}
    entries = ["--config.overrides.group1.momentum=0", "--config.overrides.group0.optimizer", "sgd"]
    expected = {"group1": {"learning_rate": 1e-4, "momentum": 0.0}, "group0": {"optimizer": "sgd"}}
    assert parse_train([CONFIG, whole, *entries])[0].overrides == expected
    assert parse_train([CONFIG, *entries, whole])[0].overrides == {"group1": {"learning_rate": 1e-4}}  # the last flag wins


def test_an_entry_on_the_command_line_is_added_to_those_of_the_file_and_wins(tmp_path):
    lines = "    c = default_config().unlock()\n    c.overrides = {'group0': {'momentum': 0.5, 'margin': 1.0}}\n    return c\n"
    (tmp_path / "c.py").write_text("from vffjax.config import default_config\ndef get_config():\n" + lines)
    config, _, _ = parse_train(["--config", str(tmp_path / "c.py"), "--config.overrides.group0.momentum=0.25"])
    assert config.overrides == {"group0": {"momentum": 0.25, "margin": 1.0}}


VALUES = {
    "4": 4,
    "-1e-3": -1e-3,
    "true": True,
    "False": False,
    "None": None,
    "(1, 2)": (1, 2),
    "'4'": "4",
    "cosine": "cosine",
    "a.b=c": "a.b=c",
    "": "",
    "007": "007",
    "'\\d'": "\\d",
    "(" * 10**5: "(" * 10**5,
}


@pytest.mark.parametrize("text", VALUES, ids=lambda text: repr(text[:9]))
def test_an_entry_is_a_python_literal_or_else_a_text(text):
    plain = {"overrides": {}}
    flags._set(plain, "overrides.group0.a", text)
    value = plain["overrides"]["group0"]["a"]
    assert (type(value), value) == (type(VALUES[text]), VALUES[text])


@pytest.mark.parametrize(("given", "value"), [("--config.flip", True), ("--config.flip=t", True), ("--config.flip=0", False)])
def test_truth_values(given, value):
    assert parse_train([CONFIG, given])[0].flip is value


def test_of_two_flags_that_set_the_same_key_the_last_wins():
    given = ["--config.widths=(4,4)", "--config.epochs=2", "--config.widths=(6,6)", "--config.epochs=3", "--workdir=a", "--workdir=b"]
    config, _, workdir = parse_train([CONFIG, *given])
    assert (config.widths, config.epochs, workdir) == ((6, 6), 3, "b")


def test_values_that_do_not_fit_together_are_found_once_jax_is_there():
    # Rules and networks check themselves, and need JAX for it: the first step leaves these checks out, the second has all.
    config, _, _ = parse_train([CONFIG, "--config.warmup_epochs=99"])
    assert config.warmup_epochs == 99.0
    with pytest.raises(UserError, match=r"config\.warmup_epochs=99\.0: longer than"):
        flags.ready(config)


@pytest.mark.slow
def test_a_run_in_a_process_prints_plain_lines_and_the_same_command_finds_it_done(tmp_path, call):
    given = [CONFIG, "--config.widths=(4,4,6,6)", "--config.batch_size=90", "--config.train_examples=400", "--config.epochs=2"]
    command = [*given, f"--workdir={tmp_path / 'run'}"]
    done = in_a_process("train.py", *command)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    # Not on a terminal: no bar, no colours, nothing of the libraries.
    assert lines[0] == f"workdir {tmp_path / 'run'}; 2 group(s) of widths 4 4 | 6 6; cpu"
    assert len(lines) == 3
    number = r"\d+\.\d+"
    for i, line in enumerate(lines[1:], 1):
        assert re.fullmatch(
            rf"epoch {i}/2  loss {number}  train error {number} %  val error {number} % .*  [\d,]+ images/s  {number} s", line
        )
    assert re.fullmatch(rf"test error {number} % \(groups {number}, {number}; voting \[.*\]\), best epoch \d\n", done.stdout)
    files = {"config.json", "metrics.jsonl", "summary.json", "checkpoints", "curves.png", "features.png"}
    assert files <= {path.name for path in (tmp_path / "run").iterdir()}

    summary = (tmp_path / "run" / "summary.json").read_text()
    status, out, err = call("train", *command)
    assert (status, out) == (0, done.stdout)
    assert err == lines[0] + "\n"
    assert untimed(json.loads((tmp_path / "run" / "summary.json").read_text())) == untimed(json.loads(summary))


def test_the_default_workdir_is_the_same_for_the_same_configuration_alone(monkeypatch, call):
    seen = []

    def record(config, workdir):
        seen.append(workdir)
        return {"test_error_per_group": [], "test_error": 0.0, "voting": [], "best_epoch": 1}

    monkeypatch.setattr(experiment, "train", record)
    for extra in ([], ["--config.data_dir=elsewhere"], ["--config.seed=1"]):
        call("train", *TINY_FLAGS, *extra)
    assert seen[0] == seen[1] != seen[2]
    assert re.fullmatch(r"runs/digits-[0-9a-f]{8}", seen[0].as_posix())


@pytest.mark.parametrize("moment", slow_but(["while it trains", "before"], "before"))
def test_sigterm_ends_a_process_that_trains_with_status_143_and_the_way_on(moment, tmp_path):
    code = "import os, signal, sys; from vffjax.cli.main import main; from vffjax.runs import experiment, logbook\n"
    code += "sound = logbook.Logbook.epoch\n"
    code += "def epoch(self, record):\n    os.kill(os.getpid(), signal.SIGTERM)\n    return sound(self, record)\n"
    code += "logbook.Logbook.epoch = epoch\n" if moment == "while it trains" else "os.kill(os.getpid(), signal.SIGTERM)\n"
    done = in_a_process("-c", code + "main(['train', *sys.argv[1:]])", *TINY_FLAGS, f"--workdir={tmp_path / 'run'}")
    if moment == "before":
        assert (done.returncode, done.stderr) == (-15, "")
        return
    assert done.returncode == 143, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last == "vffjax: told to leave (SIGTERM): epoch 1 of 3 is saved; the same command goes on from there"
    assert (tmp_path / "run" / "checkpoints" / "1.sha256.json").exists()


def test_an_interrupt_says_how_to_go_on(call, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "train", interrupt)
    status, out, err = call("train", *TINY_FLAGS, "--workdir=never-made")
    assert (status, out) == (130, "")
    assert err == "vffjax: interrupted\n"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorflow_datasets")
def test_an_epoch_on_cifar10_learns(tmp_path, call):
    folder = os.environ.get("TFDS_DATA_DIR", "")
    if not folder or not (pathlib.Path(folder) / "cifar10").is_dir():
        pytest.skip("no cifar10 in $TFDS_DATA_DIR")
    small = ["--config.train_examples=2000", "--config.widths=(12,12,16,16)", "--config.pools=(4,1,2,1)", "--config.epochs=1"]
    flags = [*small, "--config.batch_size=25", "--config.learning_rate=1e-2", "--config.warmup_epochs=0.0"]
    status, _, err = call("train", CONFIG.replace("digits", "cifar10") + ":small", *flags, f"--workdir={tmp_path / 'run'}")
    assert status == 0, err
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["test_error"] < 80  # chance is 90


# ----------------------------------------------------------------------------------------------------------------------------------
# Evaluation


def test_evaluate_agrees_with_the_summary(call):
    summary = json.loads((finished() / "summary.json").read_text())
    status, out, err = call("evaluate", f"--workdir={finished()}", "--json")
    text = call("evaluate", f"--workdir={finished()}")[1]
    assert (status, err) == (0, "")
    found = json.loads(out)
    for key in ("test_error", "test_error_per_group", "val_error", "voting"):
        assert found[key] == summary[key], key
    assert (found["epoch"], found["inference"]) == (summary["best_epoch"], "heads")
    assert f"test error {summary['test_error']:.2f} %" in text
    assert f"val  error {summary['val_error']:.2f} %" in text


@pytest.mark.slow
def test_evaluate_can_sweep_and_take_another_epoch(call):
    records = [json.loads(line) for line in (finished() / "metrics.jsonl").read_text().splitlines()]
    second = json.loads(call("evaluate", f"--workdir={finished()}", "--epoch=2", "--json")[1])
    swept = json.loads(call("evaluate", f"--workdir={finished()}", "--inference=sweep", "--json")[1])
    latest = json.loads(call("evaluate", f"--workdir={finished()}", "--epoch=latest", "--json")[1])
    assert (second["epoch"], second["val_error"]) == (2, records[1]["val_error"])
    assert (latest["epoch"], latest["val_error"]) == (3, records[2]["val_error"])
    assert swept["inference"] == "sweep"
    assert swept["test_error_per_group"] != latest["test_error_per_group"]
    assert swept["test_error"] < 80  # chance is 90
