"""Bad input to the command line: it ends with status 2 and one line that names what is wrong and the fix."""

import json
import os
import re

import pytest
from command_lines import CONFIG, ROOT, TINY_FLAGS, in_a_process
from runs import contents, copy_of, finished, tiny

from vffjax import experiment

# ----------------------------------------------------------------------------------------------------------------------------------
# To train

BAD_FLAGS = {
    "no --config": (["--workdir=runs/x"], ["--config: missing", "configs/digits.py"]),
    "--config without a value": (["--config"], ["--config: missing"]),
    "a stray argument": ([CONFIG, "stray"], ["'stray'", "--config.KEY=VALUE"]),
    "an unknown flag": ([CONFIG, "--wordir=x"], ["wordir", "workdir"]),
    "a missing file": (["--config=nothing.py"], ["--config=nothing.py", "No such file", "configs/digits.py"]),
    "a folder for a file": ([f"--config={ROOT}"], [f"--config={ROOT}", "directory"]),
    "a file without variants": ([CONFIG + ":small"], ["digits.py:small", "no variants"]),
    "an unknown variant": ([CONFIG.replace("digits", "cifar10") + ":smal"], ["'smal'", "full, small"]),
    "an unknown key": ([CONFIG, "--config.epoch=3"], ["config.epoch='3'", "did you mean config.epochs?"]),
    "an unknown key, apart": ([CONFIG, "--config.epoch", "3"], ["config.epoch='3'", "did you mean config.epochs?"]),
    "a word for a number": ([CONFIG, "--config.epochs=many"], ["config.epochs='many'", "such as 10"]),
    "a fraction for a number": ([CONFIG, "--config.seed=1.5"], ["config.seed='1.5'", "such as 0"]),
    "no value": ([CONFIG, "--config.epochs"], ["config.epochs=''"]),
    "a word for a truth": ([CONFIG, "--config.flip=maybe"], ["config.flip='maybe'", "such as False"]),
    "a key of a key": ([CONFIG, "--config.overrides.group0.momentum=1"], ["config.overrides.group0.momentum='1'", "the whole of"]),
    "an unknown data set": ([CONFIG, "--config.dataset=digit"], ["config.dataset='digit'", "did you mean 'digits'?", "cifar10"]),
    "a negative temperature": ([CONFIG, "--config.temperature=-1"], ["config.temperature=-1.0", "the least is 0.0001"]),
    "a width of 0": ([CONFIG, "--config.widths=(0,4,4,4)"], ["config.widths=(0, 4, 4, 4)", "at least one"]),
    "too few widths": ([CONFIG, "--config.widths=(4,4,4)"], ["config.widths=(4, 4, 4)", "give 4 widths"]),
    "a width for widths": ([CONFIG, "--config.widths=16"], ["config.widths=(16,)", "give 4 widths"]),
    "a word for widths": ([CONFIG, "--config.widths=wide"], ["config.widths=('wide',)", "give for example"]),
    "no widths": ([CONFIG, "--config.widths=()"], ["config.widths=()", "give for example"]),
    "a sweep for rule head": ([CONFIG, "--config.inference=sweep", "--config.rule=head"], ["config.inference='sweep'", "inference=heads"]),
    "a batch larger than the data": ([CONFIG, "--config.batch_size=9999"], ["config.batch_size=9999", "use at most 1293"]),
    "more images than there are": ([CONFIG, "--config.train_examples=9999"], ["config.train_examples=9999", "1437"]),
    "pools that leave nothing": ([CONFIG, "--config.pools=(4,4,1,1)"], ["config.pools=(4, 4, 1, 1)", "smaller"]),
    "a group that is not there": ([CONFIG, "--config.overrides={'group2':{}}"], ["config.overrides.group2={}", "group0 to group1"]),
    "a misspelt folder of data": ([CONFIG, "--config.dataset=mnist", "--config.data_dir=no"], ["config.data_dir='no'", "create it"]),
    "a file for a folder of data": ([CONFIG, "--config.dataset=mnist", "--config.data_dir=train.py"], ["'train.py'", "not a folder"]),
}


@pytest.mark.parametrize(("flags", "parts"), BAD_FLAGS.values(), ids=BAD_FLAGS.keys())
def test_bad_flags_are_refused_and_no_workdir_is_made(flags, parts, fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").touch()
    fails("train", *flags, parts=parts)
    assert [path.name for path in tmp_path.iterdir()] == ["train.py"]


BAD_FILES = {
    "syntax": ("def get_config(:\n", ["line 1: SyntaxError"]),
    "an exception": ("def get_config():\n    return 1 / 0\n", ["line 2: ZeroDivisionError: division by zero"]),
    "an import": ("import nothing_of_this_name\n", ["line 1: ModuleNotFoundError", "nothing_of_this_name"]),
    "no get_config": ("x = 1\n", ["no function get_config"]),
    "no return": ("def get_config():\n    pass\n", ["returns NoneType", "default_config()"]),
    "not Python": ("\0", ["SyntaxError"]),
    "an unknown key": (
        "from vffjax.config import default_config\ndef get_config():\n    c = default_config()\n    c.epoch = 3\n    return c\n",
        ["line 4", "config.epoch: no such key", "did you mean config.epochs?"],
    ),
    "a wrong type": (
        "from vffjax.config import default_config\ndef get_config():\n    c = default_config()\n    c.epochs = 'many'\n    return c\n",
        ["line 4", "'epochs'", "many"],
    ),
}


@pytest.mark.parametrize(("text", "parts"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_bad_configuration_file_is_named_with_the_line(text, parts, fails, tmp_path):
    file = tmp_path / "bad.py"
    file.write_text(text)
    fails("train", f"--config={file}", parts=[f"--config={file}: ", *parts])


def test_bad_flags_are_refused_before_jax_is_imported():
    # That is what makes the answer quick on any machine.
    code = "import sys; from vffjax.cli import main\ntry: main(['train', sys.argv[1], '--config.rule=vf'])\nexcept SystemExit as e: "
    done = in_a_process("-c", code + "print('jax' in sys.modules, e.code)", CONFIG)
    assert done.stdout == "False 2\n"
    assert done.stderr.count("\n") == 1
    assert "did you mean 'vff'" in done.stderr


@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorflow_datasets")
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of requests
def test_data_that_cannot_be_downloaded_are_refused_with_the_way_out(fails, tmp_path, monkeypatch):
    for key in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(key, "http://127.0.0.1:9")  # nobody listens there
    for key in ("no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    (tmp_path / "tfds").mkdir()
    fails("train", CONFIG, "--config.dataset=cifar10", f"--workdir={tmp_path / 'run'}", parts=["config.dataset='cifar10'", "prepare"])
    assert [path.name for path in tmp_path.rglob("*")] == ["tfds"]


def test_a_workdir_that_is_a_file_is_refused_and_left_alone(fails, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    fails("train", *TINY_FLAGS, f"--workdir={file}", parts=[f"--workdir={file}", "not a folder"])
    fails("train", *TINY_FLAGS, f"--workdir={file / 'deeper'}", parts=[str(file), "another --workdir"])
    assert file.read_text() == "mine"


def test_a_workdir_that_cannot_be_written_is_refused(fails, tmp_path):
    tmp_path.chmod(0o500)
    if os.access(tmp_path, os.W_OK):
        pytest.skip("this user may write everywhere")
    fails("train", *TINY_FLAGS, f"--workdir={tmp_path / 'run'}", parts=[str(tmp_path), "permissions"])


DISK = [OSError(28, "No space left on device", "checkpoints/3"), PermissionError(13, "Permission denied")]


@pytest.mark.parametrize("error", DISK, ids=repr)
def test_what_the_disk_refuses_is_one_line_with_the_way_out(error, fails, monkeypatch, tmp_path):
    def refuse(*_):
        raise error

    monkeypatch.setattr(experiment, "train", refuse)
    where = error.filename or str(tmp_path)
    fails("train", *TINY_FLAGS, f"--workdir={tmp_path}", parts=[f"{where}: {error.strerror}", "check space and permissions"])


def test_the_workdir_of_another_configuration_is_refused_and_left_as_it_was(fails):
    before = contents(finished())
    fails("train", *TINY_FLAGS, "--config.seed=5", f"--workdir={finished()}", parts=["config.seed=5", str(finished()), "another --workdir"])
    assert contents(finished()) == before


def test_an_unknown_command_is_refused(fails):
    fails("trian", parts=["trian", "train, evaluate, predict"])


@pytest.mark.parametrize("name", ["imagenet", "digits"])
def test_prepare_refuses_what_it_cannot_prepare(name, fails):
    fails("prepare", name, parts=[repr(name), "mnist, fashion_mnist, cifar10, cifar100"])


# ----------------------------------------------------------------------------------------------------------------------------------
# To evaluate and predict


@pytest.mark.parametrize("command", [["evaluate"], ["predict", "x.png"]])
def test_a_workdir_without_a_run_is_refused(command, fails, tmp_path):
    fails(*command, f"--workdir={tmp_path}", parts=[f"--workdir={tmp_path}", "no run here", "give the folder of a run"])
    fails(*command, parts=["--workdir", f"vffjax {command[0]} --help"])
    (tmp_path / "config.json").write_text(json.dumps(tiny().to_dict()))
    fails(*command, f"--workdir={tmp_path}", parts=["no complete checkpoint", "train first"])


@pytest.mark.parametrize("epoch", ["99", "last", "-1", "²", ""])
def test_an_epoch_that_is_not_saved_is_refused(epoch, fails):
    parts = [f"--epoch={epoch}: not saved", "best, latest, or one of 2, 3"]
    fails("evaluate", f"--workdir={finished()}", f"--epoch={epoch}", parts=parts)
    fails("predict", f"--workdir={finished()}", f"--epoch={epoch}", "x.png", parts=parts)


def test_bad_options_are_refused(fails):
    workdir = f"--workdir={finished()}"
    fails("predict", workdir, "--top=0", "x.png", parts=["--top=0", "at least 1"])
    fails("predict", workdir, "--top=two", "x.png", parts=["--top", "'two'", "--help"])
    fails("predict", workdir, parts=["IMAGE"])
    fails("evaluate", workdir, "--inference=guess", parts=["'guess'", "heads", "sweep"])
    fails("evaluate", workdir, "stray", parts=["stray"])


def test_a_sweep_for_rule_head_is_refused(fails, tmp_path):
    workdir = copy_of(finished(), tmp_path)  # the arrays of rule vff are those of rule head
    plain = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps(plain | {"rule": "head"}))
    fails("evaluate", f"--workdir={workdir}", "--inference=sweep", parts=["--inference=sweep", "rule head", "use --inference=heads"])


@pytest.mark.parametrize("command", [["train", *TINY_FLAGS], ["evaluate"], ["predict", "x.png"]], ids=lambda c: c[0])
def test_a_damaged_checkpoint_is_named_and_left_as_it_was(command, capsys, call, tmp_path):
    workdir = copy_of(finished(), tmp_path)
    for epoch in saved_epochs(workdir):
        path = workdir / "checkpoints" / epoch / "group1" / "manifest.ocdbt"
        path.write_bytes(path.read_bytes()[:-1])
    before = contents(workdir)
    status, out, err = call(*command, f"--workdir={workdir}")
    assert (status, out) == (2, "")
    last = err.splitlines()[-1]
    assert re.search(r"checkpoints/\d/group1/manifest\.ocdbt: damaged checkpoint .*; delete .*checkpoints/\d to go on", last)
    assert len(err.splitlines()) == (2 if command[0] == "train" else 1)  # train has said its workdir by then
    assert contents(workdir) == before


def saved_epochs(workdir):
    return [path.name for path in (workdir / "checkpoints").iterdir() if path.is_dir()]


def test_a_network_that_does_not_fit_its_checkpoint_is_refused(fails, tmp_path):
    workdir = copy_of(finished(), tmp_path)
    plain = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps(plain | {"widths": [16, 13]}))
    fails("evaluate", f"--workdir={workdir}", parts=["group1", "[2, 12], not float32[2, 13]", "config.json"])
