"""What `import vffjax` offers to programs and notebooks: train, load, evaluate, and runs as values."""

import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import vffjax
from command_lines import ROOT
from image_sets import fails
from runs import TINY, assert_same_bits, copy_of, finished, summary_of
from vffjax.data import load as data
from vffjax.runs.checkpoint import Checkpoints
from vffjax.training.scores import make_scores
from vffjax.uses import evaluation, prediction

CONFIG = TINY | {"epochs": 2}


@pytest.fixture(scope="module")
def run():
    return vffjax.load(finished())


@pytest.fixture(scope="module")
def digits(run):
    return run.data.test


def trained(workdir, config=CONFIG, **keys):
    """A run that is trained from Python, without its progress."""
    return vffjax.train(config, workdir, quiet=True, **keys)


def test_import_vffjax_loads_neither_jax_nor_the_modules_of_its_names():
    code = "import sys, vffjax; dir(vffjax); print(sorted({'jax', 'vffjax.api', 'vffjax.run', 'numpy', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert all(getattr(vffjax, name) is not None for name in vffjax.__all__)


# --- a run as a value


def test_a_run_predicts_as_the_command_does(run, digits, tmp_path):
    files = [tmp_path / f"{i}.png" for i in range(3)]
    for file, image in zip(files, digits.images, strict=False):
        Image.fromarray(image[..., 0]).save(file)
    wanted = list(prediction.predict(finished(), files, top=10))
    arrays = digits.images[:3]
    pictures = [Image.fromarray(image[..., 0]) for image in arrays]
    given = (
        files,
        list(map(str, files)),
        pictures,
        [p.convert("RGBA") for p in pictures],
        arrays,
        arrays[..., 0],
        arrays / 255,
        arrays * 1.0,
    )
    for images in given:
        found = run.predict(images)
        for entry, name, p in zip(wanted, found.classes, found.probabilities, strict=True):
            ranking = {one["class"]: one["probability"] for one in entry["by"]["ensemble"]}
            assert name == entry["by"]["ensemble"][0]["class"]
            np.testing.assert_allclose(p, [ranking[c] for c in run.class_names], rtol=1e-5, atol=1e-7)
            assert abs(p.sum() - 1) < 1e-6
    assert run.predict(files[0]).classes.shape == (1,)


def test_features_are_what_the_heads_see(run, digits):
    first, last = run.features(digits.images[:5], 0), run.features(digits.images[:5])
    trained = run.trained
    assert_same_bits(last, run.features(digits.images[:5], len(trained.plan.groups) - 1))
    log_p = np.asarray(make_scores(trained.plan, "heads")(trained.task, trained.states, digits.images[:5]))
    for group, features in ((0, first), (len(log_p) - 1, last)):
        logits = np.asarray(
            trained.plan.groups[group].module.apply({"params": trained.states[group].params}, jnp.asarray(features), method="logits")
        )
        shifted = logits - logits.max(-1, keepdims=True)
        np.testing.assert_allclose(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)), log_p[group], rtol=1e-4, atol=1e-5)


def test_a_run_shows_its_record_summary_and_curves(run):
    records = [json.loads(line) for line in (finished() / "metrics.jsonl").read_text().splitlines()]
    shown = run.metrics.to_dict("records") if hasattr(run.metrics, "to_dict") else run.metrics  # with pandas or without
    assert [record["epoch"] for record in shown] == [record["epoch"] for record in records]
    assert run.summary == summary_of(finished())
    assert repr(run) == f"vffjax.load({str(finished())!r})"
    assert (run.config, run.class_names) == (run.trained.plan.config, tuple("0123456789"))


def test_curves_are_drawn_as_the_run_drew_them_at_its_end(tmp_path):
    workdir = copy_of(finished(), tmp_path).rename(tmp_path / finished().name)  # which stands in the picture
    (workdir / "curves.png").unlink()
    assert vffjax.load(workdir).plot().size > (300, 200)
    assert (workdir / "curves.png").read_bytes() == (finished() / "curves.png").read_bytes()
    (workdir / "summary.json").unlink()
    assert vffjax.load(workdir).plot().size > (300, 200)  # as while it trains, without its test error
    assert (workdir / "curves.png").read_bytes() != (finished() / "curves.png").read_bytes()


def test_paths_that_a_glob_finds_are_predicted(run, digits, tmp_path):
    for i in range(2):
        Image.fromarray(digits.images[i, ..., 0]).save(tmp_path / f"{i}.png")
    found = run.predict(path for path in sorted(tmp_path.glob("*.png")))
    assert found.classes.tolist() == run.predict(digits.images[:2]).classes.tolist()


def test_without_pandas_the_record_is_a_list(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    assert [record["epoch"] for record in run.metrics] == list(range(1, TINY["epochs"] + 1))


def test_images_that_do_not_fit_are_refused_in_words_of_arguments(run, digits):
    fails(lambda: run.predict(np.zeros((2, 9, 9), np.uint8)), "images: are 9x9x1, and those of the run are 8x8x1")
    fails(lambda: run.predict(np.zeros((0, 8, 8), np.uint8)), "images: there is none")
    fails(lambda: run.predict("nowhere.png"), "nowhere.png")
    fails(lambda: run.predict(np.zeros((8, 8, 1), np.uint8)), "images: is one image", "image[None]")
    fails(lambda: run.features(digits.images, 9), "group=9", "give one from 0 to")
    for call in (lambda: vffjax.load("nowhere"), lambda: vffjax.load(finished(), epoch=77)):
        assert "--" not in fails(call)


# --- errors on images of one's own


def test_evaluate_measures_the_runs_own_data_and_others(run, digits):
    own = vffjax.evaluate(run)
    assert own == evaluation.evaluate(finished()) == vffjax.evaluate(finished())
    for labels in (digits.labels, digits.labels.astype(str), np.eye(10)[digits.labels]):
        found = vffjax.evaluate(run, (digits.images, labels))
        assert (found["error"], found["error_per_group"], found["n"]) == (own["test_error"], own["test_error_per_group"], len(digits))
    swept = vffjax.evaluate(run, {"images": digits.images, "labels": digits.labels}, inference="sweep", views="mirror")
    assert swept["error_per_group"] == vffjax.evaluate(run, inference="sweep", views="mirror")["test_error_per_group"]
    fails(lambda: vffjax.evaluate(run, (digits.images, digits.labels[:3])), "labels: are 3 for 360 images")
    fails(lambda: vffjax.evaluate(run, (digits.images, digits.labels + 1)), "labels: from 1 to 10")
    fails(lambda: vffjax.evaluate(run, (digits.images[:1], ["ten"])), "labels: 'ten' is no class")
    fails(lambda: vffjax.evaluate(run, (digits.images, digits.labels), "early_exit"), "inference=early_exit")


# --- training


@pytest.mark.slow
def test_a_callback_stops_a_run_by_true_alone(tmp_path):
    answers = iter([1, "yes", np.ones(3)])
    assert trained(tmp_path / "run", config=CONFIG | {"epochs": 3}, callbacks=[lambda record: next(answers)]).summary["best_epoch"]
    stopped = trained(tmp_path / "stopped", callbacks=[lambda record: np.float32(1) > 0])
    fails(lambda: stopped.summary, "has not finished (1 epochs are trained")


@pytest.mark.slow
def test_an_epoch_whose_checkpoint_is_due_is_saved_before_a_callback_can_fail(tmp_path):
    def failing(record):
        if record["epoch"] == 2:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        trained(tmp_path / "run", callbacks=[failing])
    assert Checkpoints(tmp_path / "run").epochs()[-1] == 2


@pytest.mark.slow
def test_callbacks_see_each_record_and_may_stop_the_run_which_then_goes_on_to_the_same_bits(tmp_path, capsys):
    whole = trained(tmp_path / "whole")
    seen, count = [], []
    stopping = [lambda record: seen.append(record), lambda record: record["epoch"] == 1, lambda record: count.append(1)]
    stopped = trained(tmp_path / "run", callbacks=stopping)
    assert ([record["epoch"] for record in seen], len(count)) == ([1], 1)
    assert seen[0] == json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    fails(lambda: stopped.summary, "has not finished (1 epochs are trained, and config.epochs=")
    assert stopped.predict(whole.data.test.images[:2]).classes.shape == (2,)
    assert capsys.readouterr().err == ""
    finished_run = trained(tmp_path / "run", callbacks=[lambda record: True])  # at the last epoch there is nothing to stop
    assert_same_bits(finished_run.trained.states, whole.trained.states)
    assert finished_run.summary["test_error"] == whole.summary["test_error"]


@pytest.mark.slow
def test_two_runs_in_one_process_a_changed_value_and_one_begun_anew(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, again = vffjax.train(CONFIG, quiet=True), vffjax.train(CONFIG, quiet=True)
    assert first.workdir == again.workdir and first.workdir.parent.name == "runs"
    other = vffjax.train(CONFIG | {"seed": 1}, quiet=True)
    assert other.workdir != first.workdir
    assert other.summary["val_error"] != first.summary["val_error"]
    fails(lambda: vffjax.train(CONFIG | {"seed": 2}, first.workdir), "config.seed=2", "give another workdir")
    anew = vffjax.train(CONFIG | {"seed": 2}, first.workdir, overwrite=True, quiet=True)
    assert (anew.summary["seed"], anew.workdir) == (2, first.workdir)
    for bad, part in (({"data_on": "disk"}, "config.data_on='disk'"), ({"devices": 7}, "config.devices=7")):  # which costs no run
        fails(lambda bad=bad: vffjax.train(CONFIG | bad, first.workdir, overwrite=True), part)
    assert vffjax.load(first.workdir).summary == anew.summary
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("three years")
    fails(lambda: vffjax.train(CONFIG, tmp_path / "mine", overwrite=True), "holds thesis.txt, which no run wrote, and is not deleted")
    assert (tmp_path / "mine" / "thesis.txt").exists()


@pytest.mark.slow
def test_arrays_are_trained_evaluated_and_bound_to_the_run(tmp_path):
    split = data.load(vffjax.make_config(CONFIG)).train
    x, y = split.images[:300, ..., 0], split.labels[:300]
    config = CONFIG | {"train_examples": 0}
    found = trained(tmp_path / "run", config, data=(x, y))
    assert found.summary["data_sha256"] == found.data.sha256()
    assert vffjax.evaluate(found)["test_error"] == found.summary["test_error"]
    assert len(found.data.test) == sum(max(1, round(0.2 * n)) for n in np.bincount(y))
    fails(lambda: trained(tmp_path / "run", config, data=(x, (y + 1) % 10)), "config.data_dir")
    fails(lambda: trained(tmp_path / "other", config, data=(x, y[:4])), "data: 300 images and 4 labels")


def test_problems_of_training_are_named_before_anything_is_written(tmp_path):
    fails(lambda: vffjax.train({"epoch": 1}, tmp_path / "run"), "config.epoch=1", "did you mean config.epochs?")
    fails(lambda: vffjax.train(CONFIG, tmp_path / "run", callbacks=print), "callbacks: is one function", "callbacks=[function]")
    (tmp_path / "file").write_text("")
    fails(lambda: vffjax.train(CONFIG, tmp_path / "file" / "run"), f"{tmp_path / 'file'}")
    fails(lambda: vffjax.train(CONFIG, tmp_path / "run*"), "workdir=", "give a path without")
    fails(lambda: vffjax.read("digit"), "config=digit", "did you mean digits?")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_configuration_is_read_by_its_name_to_be_changed():
    config = vffjax.read("cifar10:small")
    config.epochs = 7
    assert vffjax.make_config(config).epochs == 7 and config.dataset == "cifar10"
    with pytest.raises(AttributeError):
        config.epoch = 1


def test_a_damaged_summary_is_named(tmp_path):
    workdir = copy_of(finished(), tmp_path)
    (workdir / "summary.json").write_text("{")
    fails(lambda: vffjax.load(workdir).summary, "summary.json: cannot be read")
