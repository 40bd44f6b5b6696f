"""The summary of a finished run: its fields, its figures, and the epoch, voters and test error that it chooses."""

from unittest import mock

import numpy as np
import pytest
from PIL import Image

from runs import TIMES, finished, summary_of, tiny, train
from vffjax.runs import loop
from vffjax.runs.checkpoint import Checkpoints
from vffjax.runs.logbook import read_metrics
from vffjax.runs.workdir import load_run
from vffjax.uses import evaluation, prediction


def test_summary_holds_the_documented_fields():
    summary, config = summary_of(finished()), tiny()
    assert set(summary) == {
        *("test_error", "test_error_per_group", "val_error", "voting", "epochs", "best_epoch", "images_per_second", "seconds"),
        *("compile_seconds", "peak_bytes", "versions", "commit", "device", "cores", "flags", "earlier_origins", "data_sha256"),
        *("init_from_sha256", "code_sha256", "seed", "settings", "devices", "processes"),
    }
    assert summary["epochs"] == config.epochs
    assert summary["seed"] == config.seed
    assert len(summary["test_error_per_group"]) == 2
    assert {"jax", "flax", "optax", "numpy", "python", "vffjax"} <= set(summary["versions"])
    for error in (summary["test_error"], summary["val_error"], *summary["test_error_per_group"]):
        assert 0 <= error <= 100
    # A network of ten classes that has learnt, in percent: not a fraction, and not an accuracy.
    assert 1 < summary["test_error"] < 50
    assert all(summary[key] > 0 for key in TIMES)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["curves.png", "features.png"])
def test_plots_are_not_blank(name):
    with Image.open(finished() / name) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert min(pixels.shape[:2]) >= 200
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    # No half of it is empty.
    height, width = pixels.shape[:2]
    for part in (pixels[: height // 2], pixels[height // 2 :], pixels[:, : width // 2], pixels[:, width // 2 :]):
        assert part.std() > 5


def test_the_best_epoch_is_the_one_of_least_validation_error():
    records, summary = read_metrics(finished()), summary_of(finished())
    least = min(r["val_error"] for r in records)
    assert summary["val_error"] == least
    assert summary["best_epoch"] == max(r["epoch"] for r in records if r["val_error"] == least)
    assert summary["voting"] == records[summary["best_epoch"] - 1]["voting"]


@pytest.mark.slow
def test_the_test_error_is_that_of_the_best_epoch_and_not_of_the_last(tmp_path):
    # The second of four epochs is made the best.
    errors, sound = iter([30.0, 10.0, 20.0, 25.0]), loop.validate

    def scripted(*args):
        return sound(*args) | {"val_error": next(errors)}

    config = tiny(epochs=4)
    with mock.patch.object(loop, "validate", scripted):
        summary = train(config, tmp_path)
    assert (summary["best_epoch"], summary["val_error"]) == (2, 10.0)
    assert Checkpoints(tmp_path).epochs() == [2, 3, 4]
    by_epoch = {e: evaluation.evaluate(tmp_path, epoch=str(e))["test_error_per_group"] for e in (2, 4)}
    assert summary["test_error_per_group"] == by_epoch[2] != by_epoch[4]


def test_weights_of_votes_are_kept_and_used_by_what_comes_after(tmp_path):
    summary = train(tiny(votes="weighted"), tmp_path)
    line = read_metrics(tmp_path)[summary["best_epoch"] - 1]
    assert (summary["voting"], summary["vote_weights"]) == (line["voting"], line["vote_weights"])
    assert len(summary["vote_weights"]) == len(summary["voting"]) and min(summary["vote_weights"]) > 0
    trained = load_run(tmp_path)
    assert trained.vote_weights == tuple(summary["vote_weights"])
    found = evaluation.evaluate(tmp_path)
    for key in ("val_error", "test_error", "voting", "vote_weights"):
        assert found[key] == summary[key]
    assert "vote_weights" not in evaluation.evaluate(tmp_path, "early_exit")
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4).save(tmp_path / "x.png")
    (said,) = prediction.predict(tmp_path, [tmp_path / "x.png"], top=10)
    log_p = np.zeros(10)
    for group, weight in zip(summary["voting"], summary["vote_weights"], strict=True):
        p = {entry["class"]: entry["probability"] for entry in said["by"][f"group{group}"]}
        log_p += weight * np.log([p[name] for name in trained.run["class_names"]])
    p = np.exp(log_p) / np.exp(log_p).sum()
    wanted = dict(zip(trained.run["class_names"], p, strict=True))
    assert {entry["class"]: pytest.approx(entry["probability"], rel=1e-4) for entry in said["by"]["ensemble"]} == wanted


@pytest.mark.slow
def test_without_validation_data_all_groups_vote_at_the_last_epoch(tmp_path):
    summary = train(tiny(val_fraction=0.0, epochs=2), tmp_path)
    assert summary["val_error"] is None
    assert (summary["best_epoch"], summary["voting"]) == (2, [0, 1])
    assert [r["val_error"] for r in read_metrics(tmp_path)] == [None, None]
    found = evaluation.evaluate(tmp_path)
    assert (found["val_error"], found["test_error"]) == (None, summary["test_error"])
