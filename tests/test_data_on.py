"""config.data_on=host: images stay in the memory of the host, and every bit of a run is that of the same run with them on the device."""

import jax
import numpy as np
import pytest

from oracles import config_of, small_run
from runs import assert_same_runs, tiny, train, untimed
from vffjax.data import load as data
from vffjax.runs import loop
from vffjax.training import scores


def test_images_are_where_the_configuration_says():
    split = data.load(tiny()).train
    for where, kind in (("device", jax.Array), ("host", np.ndarray)):
        for images in (loop.placed(split, where), loop.training_images(split, where)):
            assert isinstance(images.images, kind) and isinstance(images.labels, kind)
            assert images.image_shape == (8, 8, 1)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"schedule": "sequential", "feature_cache": "device"}, {"inference": "sweep"}], ids=str)
def test_a_run_with_its_images_on_the_host_has_the_same_bits(tmp_path, monkeypatch, changes):
    monkeypatch.setattr(scores, "PIECE_BYTES", 1)  # so that even the few images here are scored in pieces, the last of them padded
    summaries = {}
    for where in ("device", "host"):
        config = tiny(data_on=where, eval_batch_size=20, **changes)
        summaries[where] = untimed(train(config, tmp_path / where)) | {"settings": {}}
    assert summaries["host"] == summaries["device"]
    assert_same_runs(tmp_path / "device", tmp_path / "host")


def test_scores_of_images_on_the_host_are_made_in_pieces_of_whole_batches(monkeypatch):
    monkeypatch.setattr(scores, "PIECE_BYTES", 1)
    run = small_run(config_of())
    images, seen = np.arange(23, dtype=np.uint8).reshape(23, 1, 1, 1), []

    def program(task, states, part):
        seen.append(part.shape[0])
        return part[:, 0, 0, 0][None, :, None] * np.ones((2, 1, 3), np.uint8)

    found = scores._scored(program, 5, run.task, run.states, images)
    np.testing.assert_array_equal(found[1, :, 2], np.arange(23))
    assert (found.shape, seen) == ((2, 23, 3), [10, 10, 10])
