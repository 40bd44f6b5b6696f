"""config.data_on=disk: images stay in the file of decoded pictures, and every bit of a run is that of the same run with them in memory."""

import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from image_sets import fails
from oracles import CONV, MLP
from oracles import config_of as configured
from runs import assert_same_bits, assert_same_runs, train
from vffjax.data import decoding
from vffjax.data import load as data
from vffjax.data.on_disk import OnDisk
from vffjax.networks import layers
from vffjax.ops import spectrum
from vffjax.runs import loop
from vffjax.training import epochs, plan, scores
from vffjax.training.checks import make_config


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(decoding, "_known", {})


def photos(folder, count, side):
    """A folder of `count` pictures of each of two classes, without parts."""
    rng = np.random.default_rng(0)
    for name in ("ant", "bee"):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(folder / name / f"{i}.bmp")
    return folder


def config_of(folder, **changes):
    given = {
        "dataset": "folder",
        "data_dir": str(folder),
        "network": "mlp",
        "widths": (8, 6),
        "epochs": 2,
        "batch_size": 8,
        "data_on": "disk",
    }
    return make_config(given | changes)


def mapped(tmp_path, shape=(40, 5, 4, 3)):
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    images.tofile(tmp_path / "images.bin")
    return images, np.memmap(tmp_path / "images.bin", np.uint8, "r", shape=shape)


def test_images_on_disk_are_indexed_like_an_array(tmp_path, monkeypatch):
    monkeypatch.setattr("vffjax.data.on_disk._PIECE_BYTES", 200)  # so that a few images make several pieces, the last of them shorter
    whole, file = mapped(tmp_path)
    order = np.random.default_rng(1).permutation(40)[:31]
    images, expected = OnDisk(file, np.arange(40)).only(order), whole[order]
    assert (images.shape, len(images), images.dtype) == ((31, 5, 4, 3), 31, np.uint8)
    for chosen in (3, -1, slice(2, 9), slice(None), slice(4, 4), np.arange(30)[::-1].reshape(2, 15), np.arange(31) % 3 == 0):
        np.testing.assert_array_equal(images[chosen], expected[chosen])
    np.testing.assert_array_equal(images.only(np.array([4, 2]))[:], expected[[4, 2]])
    np.testing.assert_array_equal(images.reshape(31, -1)[5:7], expected.reshape(31, -1)[5:7])
    np.testing.assert_array_equal(images.reshape(-1, 4, 5, 3)[5:7], expected.reshape(-1, 4, 5, 3)[5:7])
    np.testing.assert_array_equal(np.asarray(images), expected)
    with pytest.raises(ValueError, match="31 images are not 30"):
        images.reshape(30, -1)
    with pytest.raises(IndexError):
        images[31]


@pytest.mark.parametrize("changes", [{"whitening": 2, "image_size": 6}, {"noise_spectrum": "images"}], ids=lambda c: [*c][-1])
def test_what_is_computed_from_the_first_images_reads_a_block_of_them_at_once(monkeypatch, changes):
    monkeypatch.setattr(plan, "MEASURED", 300)
    config = configured(**(CONV if "whitening" in changes else MLP) | changes)
    whole, asked = np.random.default_rng(0).integers(0, 256, (400, 8, 8, 3), np.uint8), []
    the_plan = plan.make_plan(config, 400, 10)
    task = plan.blank_task(the_plan, (8, 8, 3))

    def computed(images):
        if config.whitening:
            return plan.whitened(the_plan, plan.init_states(the_plan, (8, 8, 3)), images, task)[0].params["layers_0"]
        return plan.noise_root(config, images, task.mean, task.std)

    read = OnDisk.__getitem__
    monkeypatch.setattr(OnDisk, "__getitem__", lambda self, chosen: asked.append(read(self, chosen)) or asked[-1])
    assert_same_bits(computed(OnDisk(whole, np.arange(400))), computed(whole))
    assert sum(map(len, asked)) == 300
    assert max(map(len, asked)) == (layers.BLOCK if config.whitening else spectrum.BLOCK)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"schedule": "sequential", "feature_cache": "host"}], ids=str)
def test_a_run_with_its_images_on_disk_has_the_same_bits(tmp_path, monkeypatch, changes):
    monkeypatch.setattr(scores, "PIECE_BYTES", 1)  # so that even the few images here are scored in pieces, the last of them padded
    folder = photos(tmp_path / "photos", 40, 6)
    for where in ("host", "disk"):
        train(config_of(folder, data_on=where, eval_batch_size=5, **changes), tmp_path / where)
    assert_same_runs(tmp_path / "host", tmp_path / "disk")


def test_a_set_on_disk_is_never_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("vffjax.data.sets._PIECE_BYTES", 2**18)
    config = config_of(photos(tmp_path / "photos", 150, 100), batch_size=10)
    data.load(config)  # decodes the pictures and imports what is needed
    decoding._known.clear()
    tracemalloc.start()
    try:
        dataset = data.load(config)
        assert dataset.sha256()
        given = loop.training_images(dataset.train, "disk")
        for step in jnp.arange(200).reshape(20, 1, 10):
            epochs._take(None, step, np.asarray(step), given.images)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    whole = 300 * 100 * 100 * 3
    assert peak < whole / 2, f"{peak / whole:.2f} of the set were in memory at once"


@pytest.mark.parametrize("own", [False, True], ids=["a set of the package", "a folder without a place for the file"])
def test_a_set_that_is_in_no_file_is_refused(tmp_path, monkeypatch, own):
    if not own:
        config = make_config({"dataset": "digits", "data_on": "disk"})
    else:
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        config = config_of(photos(tmp_path / "photos", 10, 6))
    fails(lambda: data.load(config), "config.data_on", "'disk'", "in no file", "use host")
