"""A workdir: its configuration restored, and refused and left as it was where it belongs to another run."""

import os

import pytest

from runs import contents, copy_of, finished, tiny, train
from vffjax.errors import UserError
from vffjax.runs.workdir import claim_workdir, locked, read_config


def test_config_json_restores_the_configuration():
    assert read_config(finished()) == tiny()


OTHERS = [("seed", 1), ("epochs", 4), ("widths", (16, 13)), ("overrides", {"group1": {"clip_norm": 1.0}})]


@pytest.mark.parametrize(("key", "value"), OTHERS)
def test_the_workdir_of_another_configuration_is_refused_and_left_as_it_was(key, value):
    before = contents(finished())
    with pytest.raises(UserError, match=rf"config\.{key}=.*another --workdir"):
        train(tiny(**{key: value}), finished())
    assert contents(finished()) == before


def test_a_workdir_that_another_run_is_writing_is_refused(tmp_path):
    workdir = copy_of(finished(), tmp_path)
    with locked(workdir):
        before = contents(workdir)
        with pytest.raises(UserError, match=r"another run is writing here; wait for it"):
            train(tiny(), workdir)
        assert contents(workdir) == before
    # The lock goes with its holder.
    train(tiny(), workdir)


def test_data_that_have_moved_are_no_other_configuration(tmp_path):
    claim_workdir(finished(), tiny(data_dir=str(tmp_path)))


def test_checkpoints_without_their_configuration_are_refused(tmp_path):
    workdir = copy_of(finished(), tmp_path)
    (workdir / "config.json").unlink()
    before = contents(workdir)
    with pytest.raises(UserError, match=r"no config\.json"):
        train(tiny(seed=1), workdir)
    assert contents(workdir) == before


@pytest.mark.parametrize("text", ["", "{", "[]", '{"epochs": "many"}', '{"epoch": 3}', "[" * 100_000], ids=lambda text: text[:20])
def test_a_damaged_config_json_is_refused_and_named(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        train(tiny(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_a_pipe_for_config_json_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(UserError, match=r"config\.json: cannot be read \(.*not a file"):
        read_config(tmp_path)
