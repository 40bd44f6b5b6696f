"""Prediction for image files: their scores, the kinds and sizes that are taken, and those that are refused."""

import json
import struct
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from runs import compiled_once, finished, tiny

from vffjax import data, trainer
from vffjax.augment import normalise
from vffjax.workdir import load_run


@pytest.fixture
def digit(tmp_path):
    """A grey 8x8 PNG of a test image."""
    path = tmp_path / "digit.png"
    Image.fromarray(data.load(tiny()).test.images[0, :, :, 0]).save(path)
    return path


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


def png(width, height):
    """A PNG that claims a size and holds no such pixels."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    framed = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


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
