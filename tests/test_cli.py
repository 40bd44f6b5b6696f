"""The command line: help, good runs, and bad input that ends with status 2 and one line that names what is wrong and the fix."""

import json
import os
import pathlib
import re
import struct
import subprocess
import sys
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from runs import TINY, compiled_once, contents, copy_of, finished, tiny, untimed

from vffjax import cli, data, experiment, trainer
from vffjax.augment import normalise
from vffjax.workdir import load_run

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIG = f"--config={ROOT / 'configs' / 'digits.py'}"
TINY_FLAGS = [CONFIG, "--config.checkpoint_every=1", *(f"--config.{key}={value}" for key, value in TINY.items())]


@pytest.fixture
def call(capsys):
    """Runs a command in process; returns status, stdout, stderr."""

    def run(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main(list(map(str, arguments)))
        return ended.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def fails(call):
    """The command must end with status 2, nothing on stdout, and one line on stderr that holds all `parts`."""

    def run(*arguments, parts):
        status, out, err = call(*arguments)
        assert (status, out) == (2, ""), err
        assert err.count("\n") == 1, err
        assert err.startswith("vffjax: error: ")
        assert "Traceback" not in err
        missing = [part for part in parts if part not in err]
        assert not missing, f"{missing} not in {err}"

    return run


def in_a_process(*arguments):
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


# ----------------------------------------------------------------------------------------------------------------------------------
# Help


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_the_commands(arguments, call):
    status, out, err = call(*arguments)
    assert (status, err) == (0, "")
    for command in ("train", "evaluate", "predict", "prepare"):
        assert re.search(rf"^  {command}  +\w+", out, re.MULTILINE)


@pytest.mark.parametrize("arguments", [[], ["--help"], [CONFIG, "--help"]])
def test_help_of_train_explains_every_key(arguments, call):
    status, out, err = call("train", *arguments)
    assert (status, err) == (0, "")
    assert "--config FILE" in out
    assert "--workdir DIR" in out
    for key, field in cli.FIELDS.items():
        assert re.search(rf"^  {key} = ", out, re.MULTILINE)
        assert all(choice in out for choice in field.metadata["choices"])
    assert max(map(len, out.splitlines())) <= 140


OPTIONS = {
    "evaluate": ["--workdir", "--inference", "--epoch", "--data_dir", "--json"],
    "predict": ["--workdir", "--epoch", "--top", "--json", "IMAGE"],
    "prepare": ["DATASET", "--data_dir", "cifar10"],
}


@pytest.mark.parametrize("command", OPTIONS)
def test_help_of_the_other_commands_explains_their_options(command, call):
    status, out, err = call(command, "--help")
    assert (status, err) == (0, "")
    assert out.startswith(f"usage: vffjax {command}")
    assert all(option in out for option in OPTIONS[command])


def test_train_py_is_the_train_command_and_help_needs_no_jax():
    run = "import runpy, sys; sys.argv = ['train.py', '--help']\ntry: runpy.run_path('train.py', run_name='__main__')"
    done = in_a_process("-c", f"{run}\nexcept SystemExit as e: print('jax' in sys.modules, e.code)")
    assert done.stdout.startswith("usage: python train.py --config FILE")
    assert done.stdout.endswith("False 0\n")
    assert done.stderr == ""


# ----------------------------------------------------------------------------------------------------------------------------------
# Bad input to train

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


def test_an_unset_key_of_the_file_keeps_its_default_and_the_command_line_wins():
    flags = ["--config.epochs=7", "--config.learning_rate", "1", "--noconfig.flip", "--workdir", "w"]
    config, name, workdir = cli.parse_train([CONFIG, *flags])
    assert (config.epochs, config.learning_rate, config.flip, config.dataset) == (7, 1.0, False, "digits")
    assert (name, workdir) == ("digits", "w")


def test_overrides_of_groups_can_be_given_on_the_command_line():
    config, _, _ = cli.parse_train([CONFIG, "--config.overrides={'group1': {'learning_rate': 1e-4}}"])
    assert config.overrides == {"group1": {"learning_rate": 1e-4}}


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


def test_an_interrupt_says_how_to_go_on(call, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "train", interrupt)
    status, out, err = call("train", *TINY_FLAGS, "--workdir=never-made")
    assert (status, out) == (130, "")
    assert err == "vffjax: interrupted; the same command goes on from the latest checkpoint\n"


# ----------------------------------------------------------------------------------------------------------------------------------
# Bad input to evaluate and predict


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


def png(width, height):
    """A PNG that claims a size and holds no such pixels."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    framed = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


@pytest.fixture
def digit(tmp_path):
    """A grey 8x8 PNG of a test image."""
    path = tmp_path / "digit.png"
    Image.fromarray(data.load(tiny()).test.images[0, :, :, 0]).save(path)
    return path


def test_unreadable_images_are_named(fails, digit, tmp_path):
    bad = {
        "text.png": (b"not an image", ["not a readable PNG or JPEG image"]),
        "empty.png": (b"", ["not a readable"]),
        "truncated.png": (digit.read_bytes()[:60], ["not a readable"]),
        "huge.png": (png(100_000, 100_000), ["too many pixels", "at most"]),
        "large.png": (png(10_000, 10_000), ["10000x10000 pixels", "at most"]),
        "lies.png": (png(4_000, 4_000), ["not a readable"]),
        "other.png": (b"GIF89a\x01\0\x01\0\0\0\0;", ["not a readable"]),
    }
    for name, (content, parts) in bad.items():
        (tmp_path / name).write_bytes(content)
        # A good image before it does not matter.
        fails("predict", f"--workdir={finished()}", digit, tmp_path / name, parts=[str(tmp_path / name), *parts])
    fails("predict", f"--workdir={finished()}", tmp_path / "missing.png", parts=[f"{tmp_path}/missing.png: no such file"])
    fails("predict", f"--workdir={finished()}", tmp_path, parts=[f"{tmp_path}: "])


# ----------------------------------------------------------------------------------------------------------------------------------
# Good input


def test_a_run_in_a_process_prints_plain_lines_and_the_same_command_finds_it_done(tmp_path, call):
    flags = [CONFIG, "--config.widths=(4,4,6,6)", "--config.batch_size=90", "--config.train_examples=400", "--config.epochs=2"]
    command = [*flags, f"--workdir={tmp_path / 'run'}"]
    done = in_a_process("train.py", *command)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    # Not on a terminal: no bar, no colours, nothing of the libraries.
    assert lines[0] == f"workdir {tmp_path / 'run'}"
    assert len(lines) == 3
    number = r"\d+\.\d+"
    for i, line in enumerate(lines[1:], 1):
        assert re.fullmatch(rf"epoch {i}/2  loss {number}  train {number} %  val error {number} % .*  [\d,]+ images/s  {number} s", line)
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


def test_evaluate_agrees_with_the_summary(call):
    summary = json.loads((finished() / "summary.json").read_text())
    with compiled_once():
        status, out, err = call("evaluate", f"--workdir={finished()}", "--json")
        text = call("evaluate", f"--workdir={finished()}")[1]
    assert (status, err) == (0, "")
    found = json.loads(out)
    for key in ("test_error", "test_error_per_group", "val_error", "voting"):
        assert found[key] == summary[key], key
    assert (found["epoch"], found["inference"]) == (summary["best_epoch"], "heads")
    assert f"test error {summary['test_error']:.2f} %" in text
    assert f"val  error {summary['val_error']:.2f} %" in text


def test_evaluate_can_sweep_and_take_another_epoch(call):
    records = [json.loads(line) for line in (finished() / "metrics.jsonl").read_text().splitlines()]
    with compiled_once():
        second = json.loads(call("evaluate", f"--workdir={finished()}", "--epoch=2", "--json")[1])
        swept = json.loads(call("evaluate", f"--workdir={finished()}", "--inference=sweep", "--json")[1])
        latest = json.loads(call("evaluate", f"--workdir={finished()}", "--epoch=latest", "--json")[1])
    assert (second["epoch"], second["val_error"]) == (2, records[1]["val_error"])
    assert (latest["epoch"], latest["val_error"]) == (3, records[2]["val_error"])
    assert swept["inference"] == "sweep"
    assert swept["test_error_per_group"] != latest["test_error_per_group"]
    assert swept["test_error"] < 80  # chance is 90


def direct_scores(images):
    """Log-probabilities of every group by one pass, without any of the machinery of prediction."""
    plan, states, task, run = load_run(finished())
    return np.asarray(trainer.clean_log_p(plan, task, states, normalise(jnp.asarray(images), task.mean, task.std))), run


def test_predictions_agree_with_the_scores_of_the_test_images(call, tmp_path):
    images = data.load(tiny()).test.images[:6]
    paths = [tmp_path / f"{i}.png" for i in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image[:, :, 0]).save(path)
    with compiled_once():
        status, out, err = call("predict", f"--workdir={finished()}", "--top=10", "--json", *paths)
        text = call("predict", f"--workdir={finished()}", "--top=2", paths[0])[1]
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert [entry["image"] for entry in found] == list(map(str, paths))
    log_p, run = direct_scores(images)
    wanted = {"group0": log_p[0], "group1": log_p[1], "ensemble": log_p[run["voting"]].mean(axis=0)}
    for i, entry in enumerate(found):
        assert set(entry["by"]) == set(wanted)
        for name, ranking in entry["by"].items():
            p = np.exp(wanted[name][i]) / np.exp(wanted[name][i]).sum()
            assert [r["class"] for r in ranking] == [run["class_names"][k] for k in np.argsort(-p)]
            np.testing.assert_allclose([r["probability"] for r in ranking], np.sort(p)[::-1], rtol=1e-4, atol=1e-6)
    # Different images, different answers.
    assert len({entry["by"]["ensemble"][0]["class"] for entry in found}) > 1
    lines = text.splitlines()
    assert lines[0] == str(paths[0])
    assert [line.split()[0] for line in lines[1:]] == ["group0", "group1", "ensemble"]
    assert all(line.count("%") == 2 for line in lines[1:])


def test_images_of_other_kinds_and_sizes_are_taken(call, digit, tmp_path):
    pixels = np.asarray(Image.open(digit))
    colour, deep, large, photo = (tmp_path / name for name in ("colour.png", "deep.png", "large.png", "photo.jpg"))
    Image.fromarray(np.stack([pixels] * 3, axis=2)).save(colour)
    Image.fromarray(pixels.astype(np.uint16) * 257).save(deep)
    Image.fromarray(pixels.repeat(4, 0).repeat(4, 1)).save(large)
    Image.fromarray(pixels).save(photo, quality=100)
    with compiled_once():
        status, out, _ = call("predict", f"--workdir={finished()}", "--json", digit, colour, deep, large, photo)
    assert status == 0
    found = [entry["by"] for entry in json.loads(out)]
    # The same pixels give the same answer; the others nearly the same pixels, the likeliest class.
    assert found[0] == found[1] == found[2]
    assert all(by["ensemble"][0]["class"] == found[0]["ensemble"][0]["class"] for by in found[3:])


# ----------------------------------------------------------------------------------------------------------------------------------
# Real data


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
