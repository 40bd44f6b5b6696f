"""Paths as people write them: home folders, addresses, colons, and characters under which checkpoints are not found again."""

import os
import pathlib

import pytest

from command_lines import CONFIG, ROOT, TINY_FLAGS
from image_sets import fake_cifar
from oracles import slow_but
from runs import copy_of, finished, tiny, train
from vffjax.cli.config_file import load_config_file, split_variant
from vffjax.cli.flags import parse_train
from vffjax.cli.options import json_file
from vffjax.config import Config
from vffjax.data import load as data
from vffjax.data import tfds_files
from vffjax.errors import UserError
from vffjax.files import replace_file
from vffjax.paths import check_run_folder, local
from vffjax.runs import experiment
from vffjax.runs.usual_folder import usual_folder
from vffjax.runs.workdir import claim_workdir, load_run
from vffjax.training.checks import make_config

ADDRESSES = ["gs://bucket/run", "s3://bucket/run", "hdfs://host/run", "file:///tmp/run", "https://x/y", "gs:/bucket/run"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    (tmp_path / "cwd").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "cwd")
    yield tmp_path / "home"
    assert list((tmp_path / "cwd").iterdir()) == []  # no folder of the name ~ or gs:


# --- home folders


def test_a_workdir_and_a_configuration_in_the_home_folder(home):
    (home / "mine.py").write_text((ROOT / "configs" / "digits.py").read_text())
    config, name, workdir = parse_train(["--config=~/mine.py", "--workdir=~/runs/a"])
    assert (config.dataset, name, workdir) == ("digits", "mine", str(home / "runs" / "a"))


def test_files_of_the_commands_in_the_home_folder(home, call):
    run = copy_of(finished(), home)
    status, _, err = call("evaluate", "--workdir=~/run", "--json")
    assert (status, err) == (0, "")
    assert call("export", "--workdir=~/run", "--out=~/w.safetensors")[0] == 0
    assert (home / "w.safetensors").exists()
    assert json_file("~/found.json") == home / "found.json"
    (home / "seven.png").write_bytes(b"no picture")
    assert f"{home / 'seven.png'}: not a readable" in call("predict", "--workdir=~/run", "~/seven.png")[2]
    assert run.exists()


@pytest.mark.slow
def test_python_calls_with_the_home_folder(home):
    copy_of(finished(), home)
    assert load_run("~/run")[3]["epoch"] == load_run(finished())[3]["epoch"]
    train(tiny(), "~/run")
    assert (home / "run" / "summary.json").exists()


def test_weights_and_data_in_the_home_folder(home, call, monkeypatch):
    call("export", f"--workdir={finished()}", f"--out={home / 'w.safetensors'}")
    status, out, err = call("evaluate", *TINY_FLAGS, "--config.init_from=~/w.safetensors", "--json")
    assert (status, err) == (0, ""), err
    with fake_cifar(home / "data"):
        data.prepare("cifar10", "~/data")
    config = {"dataset": "cifar10", "val_fraction": 0.0, "batch_size": 4}
    named = data.load(make_config(config | {"data_dir": "~/data"}))
    monkeypatch.setenv("TFDS_DATA_DIR", "~/data")
    assert tfds_files.data_root("") == tfds_files.data_root("~/data") == home / "data"
    assert data.load(make_config(config)).sha256() == named.sha256()
    assert '"epoch": 0' in out


def test_a_home_folder_that_nobody_has_is_no_folder(home, fails):
    fails("train", *TINY_FLAGS, "--workdir=~nobody-of-this-name/run", parts=["~nobody-of-this-name/run", "there is no user"])


def test_a_workdir_that_is_not_utf_8_is_refused_before_training(home):
    with pytest.raises(UserError, match="not valid UTF-8"):
        train(tiny(), home / "run\udcff")
    assert list(home.iterdir()) == []


# --- addresses


@pytest.mark.parametrize("address", slow_but(ADDRESSES, ADDRESSES[0]))
def test_an_address_is_refused_in_one_line_everywhere(address, home, fails, monkeypatch):
    says = ["is an address", "only local files and folders are supported", "mount"]
    fails("train", *TINY_FLAGS, f"--workdir={address}", parts=["--workdir=", address, *says])
    fails("train", f"--config={address}.py", parts=[f"--config={address}.py", *says])
    fails("train", CONFIG, "--config.dataset=cifar10", f"--config.data_dir={address}", parts=[f"config.data_dir={address}", *says])
    fails("train", *TINY_FLAGS, f"--config.init_from={address}.safetensors", parts=[f"config.init_from={address}.safetensors", *says])
    fails("evaluate", f"--workdir={address}", parts=["--workdir", address, *says])
    fails("predict", f"--workdir={finished()}", f"{address}.png", parts=[f"IMAGE={address}.png", *says])
    fails("export", f"--workdir={finished()}", f"--out={address}.safetensors", parts=["--out", address, *says])
    fails("reproduce", finished(), f"--into={address}", parts=["--into", address, *says])
    fails("prepare", "cifar10", f"--data_dir={address}", parts=["--data_dir", address, *says])
    monkeypatch.setenv("TFDS_DATA_DIR", address)
    fails("train", CONFIG, "--config.dataset=cifar10", parts=[f"TFDS_DATA_DIR={address}", *says])
    with pytest.raises(UserError, match="only local files and folders"):
        experiment.train(tiny(), pathlib.Path(address))


@pytest.mark.parametrize("path", ["C:/runs/a", "a:b", "runs/12:30", "/data/x:/y"])
def test_a_colon_alone_makes_no_address(path):
    assert local(path, "--workdir") == pathlib.Path(path)


# --- characters of patterns


BAD = ["runs/x_fc=[256, 256]", "a]", "b*", "c?", "d\\e", "[deep]/run"]


@pytest.mark.parametrize("name", BAD)
def test_a_workdir_under_which_nothing_is_found_again_is_refused_before_training(name, tmp_path, fails, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (character,) = {c for c in name if c in "[]*?\\"} - set("]" if "[" in name else "")
    fails("train", *TINY_FLAGS, f"--workdir={name}", parts=[f"--workdir={name}", repr(character)[1:-1], "give a path without any of"])
    fails("reproduce", finished(), f"--into={name}", parts=[f"--into={name}", "give a path without any of"])
    with pytest.raises(UserError, match="give a path without any of"):
        experiment.train(tiny(), name)
    assert list(tmp_path.iterdir()) == []


def test_what_a_relative_path_and_a_link_lead_to_counts(tmp_path, monkeypatch):
    inner = tmp_path / "my [runs]"
    inner.mkdir()
    os.symlink(inner, tmp_path / "link")
    with pytest.raises(UserError, match=r"link.*that is .*my \[runs\]"):
        claim_workdir(tmp_path / "link" / "a", tiny())
    monkeypatch.chdir(inner)
    with pytest.raises(UserError, match=r"--workdir=a \(that is .*my \[runs\]/a\): the path holds"):
        claim_workdir(pathlib.Path("a"), tiny())
    with pytest.raises(UserError, match="the path holds"):
        load_run("a")


@pytest.mark.parametrize("name", ["a b", "größe", "x{1,2}", "50%", "a'b", "a:b"])
def test_other_characters_are_allowed(name, tmp_path):
    check_run_folder(tmp_path / name)


# --- FILE:VARIANT


@pytest.mark.slow
def test_colons_in_files_and_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs:2026").mkdir()
    text = "from vffjax.config import default_config\nVARIANTS =('a', 'b')\n"
    text += "def get_config(variant='a'):\n    c = default_config()\n    c.epochs = len(variant) + ord(variant)\n    return c\n"
    for file in ("c.py", "c.py:d.py", "runs:2026/c.py", "runs:2026/c:d.py"):
        (tmp_path / file).write_text(text)
        for given in (file, str(tmp_path / file)):
            assert load_config_file(given)[0]["epochs"] == 98
            assert load_config_file(f"{given}:b")[0]["epochs"] == 99
    assert load_config_file("runs:2026/c:d.py:b")[1] == "c:d-b"


CASES = {
    "C:\\configs\\mine.py": ("C:\\configs\\mine.py", None),
    "C:/configs/mine.py:small": ("C:/configs/mine.py", "small"),
    "no.py": ("no.py", None),
    "no.py:small": ("no.py", "small"),
    "no.py:": ("no.py", ""),
}


@pytest.mark.parametrize("given", CASES)
def test_files_that_are_not_there_are_named_whole(given):
    assert split_variant(given) == CASES[given]


def test_a_file_is_not_written_through_a_link_that_lies_in_its_way(tmp_path):
    (tmp_path / "diary").write_text("mine")
    for name in ("a.json", "a.json.tmp"):
        (tmp_path / name).symlink_to(tmp_path / "diary")
    replace_file(tmp_path / "a.json", b"new")
    assert ((tmp_path / "diary").read_text(), (tmp_path / "a.json").read_text()) == ("mine", "new")
    assert sorted(path.name for path in tmp_path.iterdir() if not path.is_symlink()) == ["a.json", "diary"]


def test_runs_on_other_images_of_ones_own_have_other_folders():
    def folder(dataset, data_dir):
        return usual_folder(make_config({"dataset": dataset, "data_dir": data_dir}), dataset)

    assert folder("npz", "a.npz") != folder("npz", "b.npz")
    assert folder("npz", "a.npz") == folder("npz", "./a.npz")
    assert folder("npz", "photos") == folder("npz", "photos/")
    assert folder("cifar10", "here") == folder("cifar10", "there")  # the same images, wherever they lie
    assert usual_folder(Config(dataset="mine:SOURCE"), "x").parts[0] == "runs"  # code that may not be run is told later


def test_a_home_folder_that_is_not_there_is_told_with_its_flag(fails):
    fails("evaluate", "--workdir=~nobody-of-this-name/x", parts=["--workdir", "~nobody-of-this-name", "no user"])
