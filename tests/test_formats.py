"""Workdirs of other versions: they are read and trained on, or refused in one line that names both versions."""

import json
import pathlib
import re
import tarfile

import pytest

from runs import copy_of, finished, tiny, train
from vffjax import versions
from vffjax.errors import UserError
from vffjax.files import sha256_of
from vffjax.runs import state as run_state
from vffjax.runs.checkpoint import Checkpoints
from vffjax.runs.workdir import load_run, read_config
from vffjax.training.checks import from_json
from vffjax.uses import evaluation

FIXTURES = sorted((pathlib.Path(__file__).parent / "fixtures").glob("run-*.tar.gz"))


@pytest.fixture(params=FIXTURES, ids=lambda path: path.name)
def kept(request, tmp_path):
    """The workdir of a run that a version left inside of its second epoch."""
    with tarfile.open(request.param) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "run"


def test_there_is_a_run_of_every_format():
    """A new format needs a new fixture: python tests/fixtures/make.py."""
    formats = set()
    for path in FIXTURES:
        with tarfile.open(path) as archive:
            formats.add(json.load(archive.extractfile("run/checkpoints/1/run/metadata"))["format"])
    assert run_state.FORMAT in formats


def test_a_kept_run_is_evaluated_as_it_was(kept):
    recorded = Checkpoints(kept).opened(1).run
    found = evaluation.evaluate(kept)
    # Other versions of JAX round otherwise; an image of forty is 2.5 %.
    assert found["val_error"] == pytest.approx(recorded["val_error"], abs=2.6)
    _, states, _, _ = load_run(kept)
    assert len(states) == 2


@pytest.mark.slow
def test_a_kept_run_goes_on_inside_of_its_epoch(kept):
    (number,) = Checkpoints(kept).inside.epochs()
    step = Checkpoints(kept).inside.opened(number).run["inside"]["step"]
    assert (number, 0 < step < 11) == (11 + step, True)
    summary = train(read_config(kept), kept)
    assert (summary["epochs"], len(summary["earlier_origins"])) == (2, 1)
    assert summary["val_error"] <= Checkpoints(kept).opened(1).run["val_error"]
    assert not Checkpoints(kept).inside.epochs()


def older(workdir, epoch, **changes):
    """Writes other values into a saved state, with digests that fit, as another version would have."""
    path = workdir / "checkpoints" / str(epoch) / "run" / "metadata"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    digests = workdir / "checkpoints" / f"{epoch}.sha256.json"
    digests.write_text(json.dumps(json.loads(digests.read_text()) | {"run/metadata": sha256_of(path)}))


@pytest.mark.parametrize("written", [1, 2, run_state.FORMAT + 1])
def test_another_format_is_refused_in_a_line_that_names_both_versions(written, tmp_path):
    workdir = copy_of(finished(), tmp_path)
    origins = Checkpoints(workdir).opened(3).run["origins"]
    origins[-1]["versions"]["vffjax"] = "7.6.5"
    for epoch in Checkpoints(workdir).epochs():
        older(workdir, epoch, format=written, origins=origins)
    for act in (lambda: train(tiny(), workdir), lambda: load_run(workdir)):
        with pytest.raises(UserError) as refused:
            act()
        text = str(refused.value)
        assert "\n" not in text
        assert f"saved by vffjax 7.6.5 in format {written}" in text
        assert f"this is vffjax {versions.own()}, which reads format {run_state.FORMAT}" in text


def test_a_state_of_which_nothing_is_known_is_refused_too(tmp_path):
    workdir = copy_of(finished(), tmp_path)
    for epoch in Checkpoints(workdir).epochs():
        older(workdir, epoch, format="x", origins=[])
    with pytest.raises(UserError, match=f"saved by another version of vffjax; this is vffjax {re.escape(versions.own())}"):
        load_run(workdir)


def test_a_configuration_that_lacks_newer_keys_has_their_defaults():
    plain = tiny().to_dict()
    for key in ("segment_steps", "checkpoint_seconds", "alternating_flip", "random_erasing", "trivial_augment", "mixup", "votes"):
        del plain[key]
    assert from_json(plain, "config.json") == tiny()


def test_a_configuration_of_a_newer_version_is_refused_by_both_names(tmp_path):
    workdir = copy_of(finished(), tmp_path)
    path = workdir / "config.json"
    plain = json.loads(path.read_text())
    assert plain["vffjax"] == versions.own()
    path.write_text(json.dumps(plain | {"vffjax": "9.0.0", "brand_new": 1}))
    with pytest.raises(UserError) as refused:
        read_config(workdir)
    text = str(refused.value)
    assert "config.brand_new=1: no such key" in text and f"written by vffjax 9.0.0; this is {versions.own()}" in text
    # The version alone is no reason to refuse.
    path.write_text(json.dumps(plain | {"vffjax": "9.0.0"}))
    assert read_config(workdir) == tiny()
