"""A run is judged by its own data: others are refused, or judged by on request."""

import dataclasses
from unittest import mock

import numpy as np
import pytest

import vffjax
from runs import contents, copy_of, finished, summary_of
from vffjax.data import digits
from vffjax.data import load as data
from vffjax.data.sets import Split
from vffjax.errors import UserError
from vffjax.runs.workdir import read_config
from vffjax.training import scores as inference
from vffjax.uses import evaluation, reproduction


@pytest.fixture(scope="module", autouse=True)
def trained():
    """The shared run is trained before any test changes the data."""
    finished()


def changed(change):
    """`data.load`, its result changed."""
    sound = data.load
    return mock.patch.object(data, "load", lambda config: change(sound(config)))


def inverted(found):
    return dataclasses.replace(
        found, **{name: Split(255 - getattr(found, name).images, getattr(found, name).labels) for name in ("train", "validation", "test")}
    )


def other_test_labels(found):
    return dataclasses.replace(found, test=Split(found.test.images, np.roll(found.test.labels, 1)))


def three_classes(found):
    return dataclasses.replace(found, class_names=("cat", "dog", "frog"))


def renamed(found):
    return dataclasses.replace(found, class_names=found.class_names[::-1])


def cropped(found):
    return dataclasses.replace(
        found, **{name: Split(getattr(found, name).images[:, :6], getattr(found, name).labels) for name in ("train", "validation", "test")}
    )


def test_a_run_is_judged_by_its_own_data():
    found = evaluation.evaluate(finished())
    assert found["own_data"] is True
    assert found["test_error"] == summary_of(finished())["test_error"]


@pytest.mark.parametrize("change", [inverted, other_test_labels])
def test_other_data_are_refused_and_judged_by_only_on_request(change, call, fails):
    with changed(change):
        fails("evaluate", "--workdir", finished(), parts=["config.dataset='digits'", "other images or labels", "--other_data"])
        status, out, _ = call("evaluate", "--workdir", finished(), "--other_data")
        assert status == 0
        assert "other data than the run's own" in out
        assert evaluation.evaluate(finished(), other_data=True)["own_data"] is False


@pytest.mark.parametrize("views", ["", "mirror"])
def test_on_other_data_the_groups_vote_that_the_run_has_chosen(views, monkeypatch):
    asked = []
    validate = inference.validate
    monkeypatch.setattr(evaluation.inference, "validate", lambda *rest: asked.append(1) or validate(*rest))
    with changed(inverted):
        found = evaluation.evaluate(finished(), other_data=True, views=views)
    assert bool(asked) == bool(views)  # by other views other groups may have to vote
    assert views or found["voting"] == summary_of(finished())["voting"]
    if not views:  # so the command and `vffjax.evaluate` say the same of the same images
        test = inverted(data.load(read_config(finished()))).test
        assert found["test_error"] == vffjax.evaluate(vffjax.load(finished()), (test.images, test.labels))["error"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (three_classes, r"its classes are 3 \(cat, dog, frog\).* 10 \(0, 1, 2, 3, 4, \.\.\.\)"),
        (renamed, r"its classes are 10 \(9, 8"),
        (cropped, "6x8x1"),
    ],
)
@pytest.mark.parametrize("other_data", [False, True])
def test_data_that_do_not_fit_are_refused_in_any_case(change, said, other_data):
    with changed(change), pytest.raises(UserError, match=said):
        evaluation.evaluate(finished(), other_data=other_data)


def test_a_data_dir_is_refused_where_the_images_lie_in_no_folder(fails, tmp_path):
    fails("evaluate", "--workdir", finished(), "--data_dir", tmp_path, parts=[f"--data_dir={tmp_path}", "dataset=digits reads no folder"])
    fails("train", "--config=digits", f"--config.data_dir={tmp_path}", parts=["config.data_dir=", "means nothing to dataset=digits"])


def test_a_data_dir_is_named_where_its_data_are_others(fails, tmp_path, monkeypatch):
    monkeypatch.setattr(digits, "SOURCE", dataclasses.replace(digits.SOURCE, reads_data_dir=True))
    with changed(inverted):
        fails("evaluate", "--workdir", finished(), "--data_dir", tmp_path, parts=[f"--data_dir={tmp_path}", "--other_data"])


def test_other_data_belong_to_a_run(fails):
    given = ["--config=configs/digits.py", "--other_data"]
    fails("evaluate", *given, parts=["--other_data", "--workdir"])


def test_a_run_is_not_reproduced_on_other_data(tmp_path):
    workdir = copy_of(finished(), tmp_path)
    before = contents(workdir)
    with changed(inverted), pytest.raises(UserError, match=r"config\.dataset='digits': other images"):
        reproduction.reproduce(workdir, tmp_path / "again")
    assert contents(workdir) == before
    assert not (tmp_path / "again").exists()
