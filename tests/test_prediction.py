"""Prediction for image files: their scores, the kinds and sizes that are taken, and those that are refused."""

import csv
import json
import struct
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from command_lines import ROOT
from runs import finished, tiny, train
from vffjax.data import load as data
from vffjax.data import pictures
from vffjax.runs.workdir import load_run
from vffjax.training import trainer
from vffjax.training.augment import normalise
from vffjax.training.scores import make_scores
from vffjax.uses import prediction


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


@pytest.mark.slow
def test_a_run_that_the_rule_scores_is_predicted_by_these_scores_and_their_voters(call, digit, tmp_path):
    train(tiny(rule="mono_forward", inference="rule", epochs=1, grouping="layer"), tmp_path / "run")
    status, out, err = call("predict", f"--workdir={tmp_path / 'run'}", "--top=10", "--json", digit)
    assert (status, err) == (0, "")
    plan, states, task, run = load_run(tmp_path / "run")
    image = jnp.asarray(np.asarray(Image.open(digit)).reshape(1, 8, 8, 1))
    scores = np.asarray(make_scores(plan, "rule")(task, states, image))[run["voting"]].mean(axis=0)[0]
    p = np.exp(scores) / np.exp(scores).sum()
    ranking = json.loads(out)[0]["by"]["ensemble"]
    assert [r["class"] for r in ranking] == [run["class_names"][k] for k in np.argsort(-p)]
    np.testing.assert_allclose([r["probability"] for r in ranking], np.sort(p)[::-1], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_run_that_a_sweep_scores_is_predicted_by_its_heads_and_says_so(call, digit, tmp_path):
    train(tiny(inference="sweep", epochs=1), tmp_path / "run")
    status, out, err = call("predict", f"--workdir={tmp_path / 'run'}", "--top=10", "--json", digit)
    assert status == 0 and err.startswith("config.inference=sweep: ") and err.count("\n") == 1
    plan, states, task, run = load_run(tmp_path / "run")
    image = jnp.asarray(np.asarray(Image.open(digit)).reshape(1, 8, 8, 1))
    scores = np.asarray(make_scores(plan, "heads")(task, states, image)).mean(axis=0)[0]
    ranking = json.loads(out)[0]["by"]["ensemble"]
    assert [r["class"] for r in ranking] == [run["class_names"][k] for k in np.argsort(-scores)]


def test_images_of_other_kinds_and_sizes_are_taken(call, digit, tmp_path):
    pixels = np.asarray(Image.open(digit))
    colour, deep, large, photo = (tmp_path / name for name in ("colour.png", "deep.png", "large.png", "photo.jpg"))
    Image.fromarray(np.stack([pixels] * 3, axis=2)).save(colour)
    Image.fromarray(pixels.astype(np.uint16) * 257).save(deep)
    Image.fromarray(pixels.repeat(4, 0).repeat(4, 1)).save(large)
    Image.fromarray(pixels).save(photo, quality=100)
    status, out, _ = call("predict", f"--workdir={finished()}", "--json", digit, colour, deep, large, photo)
    assert status == 0
    found = [entry["by"] for entry in json.loads(out)]
    # The same pixels give the same answer; the others nearly the same pixels, the likeliest class.
    assert found[0] == found[1] == found[2]
    assert all(by["ensemble"][0]["class"] == found[0]["ensemble"][0]["class"] for by in found[3:])


# ----------------------------------------------------------------------------------------------------------------------------------
# As a person sees it

RNG = np.random.default_rng(3)
SEEN = RNG.integers(0, 256, (6, 8), dtype=np.uint8)  # of different sides, so that those which change places tell
SQUARE = RNG.integers(0, 256, (8, 8), dtype=np.uint8)
# How a camera stores what is seen, by the definition of each orientation: which side of the picture the first row is, and the first column.
STORED = {
    1: SEEN,  # top, left
    2: SEEN[:, ::-1],  # top, right
    3: SEEN[::-1, ::-1],  # bottom, right
    4: SEEN[::-1],  # bottom, left
    5: SEEN.T,  # left, top
    6: SEEN[:, ::-1].T,  # right, top
    7: SEEN[::-1, ::-1].T,  # right, bottom
    8: SEEN[::-1].T,  # left, bottom
}


def read_back(image, folder, shape=(8, 8, 1), suffix=".png", **options):
    path = folder / f"picture{suffix}"
    (image if isinstance(image, Image.Image) else Image.fromarray(np.ascontiguousarray(image))).save(path, **options)
    return pictures.read_image(path, shape)


def exif_of(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize(("orientation", "stored"), STORED.items())
def test_a_picture_is_turned_upright_by_its_exif(orientation, stored, tmp_path):
    found = read_back(stored, tmp_path, (6, 8, 1), exif=exif_of(orientation))
    np.testing.assert_array_equal(found[:, :, 0], SEEN)
    colour = read_back(np.stack([stored] * 3, axis=2), tmp_path, (6, 8, 3), exif=exif_of(orientation))
    np.testing.assert_array_equal(colour, np.stack([SEEN] * 3, axis=2))
    large = stored.repeat(8, 0).repeat(8, 1)
    photo = read_back(large, tmp_path, (48, 64, 1), ".jpg", quality=100, exif=exif_of(orientation))
    assert np.abs(photo[:, :, 0].astype(int) - SEEN.repeat(8, 0).repeat(8, 1)).max() < 8


@pytest.mark.parametrize(
    "exif", [b"nothing of the kind", b"Exif\0\0MM\0*\xff\xff\xff\xff", exif_of(9).tobytes(), exif_of(0).tobytes()], ids=repr
)
def test_an_orientation_that_means_nothing_is_passed_over(exif, tmp_path):
    np.testing.assert_array_equal(read_back(SEEN, tmp_path, (6, 8, 1), exif=exif)[:, :, 0], SEEN)


def inked(mode, ink):
    """A picture all of one brightness `ink`, whose shape `SQUARE` is in its alpha channel."""
    flat = Image.new("L", (8, 8), ink)
    channels = [flat] * (3 if mode == "RGBA" else 1)
    return Image.merge(mode, (*channels, Image.fromarray(SQUARE)))


def of_palette(ink):
    """The same by a palette of 256 equal colours and an alpha for each."""
    image = Image.frombytes("P", (8, 8), SQUARE.tobytes())
    image.putpalette([ink] * 768)
    image.info["transparency"] = bytes(range(256))
    return image


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("make", [lambda ink: inked("LA", ink), lambda ink: inked("RGBA", ink), of_palette], ids=["LA", "RGBA", "P"])
def test_a_shape_of_alpha_alone_is_seen_bright_on_black_and_dark_on_white(make, channels, tmp_path):
    for ink, expected in ((255, SQUARE), (0, 255 - SQUARE), (255, SQUARE)):
        found = read_back(make(ink), tmp_path, (8, 8, channels)).astype(int)
        assert np.abs(found - expected[:, :, None]).max() <= 1


def test_the_colour_of_invisible_pixels_does_not_shine_through(tmp_path):
    # Grey ink in the left half; the right half is invisible, and white underneath.
    pixels = np.full((16, 16, 4), 255, np.uint8)
    pixels[:, :8], pixels[:, 8:, 3] = (150, 150, 150, 255), 0
    found = read_back(pixels, tmp_path)[:, :, 0]
    np.testing.assert_array_equal(found[:, :3], 150)
    np.testing.assert_array_equal(found[:, 5:], 0)
    assert found[:, 4].max() < 75 < found[:, 3].max() < 150  # where both are mixed, nothing of the white


def test_a_picture_with_a_background_of_its_own_keeps_it(tmp_path):
    # A bright shape on black, with an invisible margin: on white, a frame would be seen.
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[2:6, 2:6, 3] = 255
    pixels[3:5, 3:5, :3] = 255
    found = read_back(pixels, tmp_path)[:, :, 0]
    assert (found[:2] == 0).all()
    assert (found[3:5, 3:5] == 255).all()


def test_one_value_may_stand_for_transparent(tmp_path):
    # Bright ink on what is declared transparent, though it is white: on black. 16-bit grey too.
    shape = SQUARE > 128
    grey = np.where(shape, 200, 255).astype(np.uint8)
    expected = np.where(shape, 200, 0)
    assert np.abs(read_back(grey, tmp_path, transparency=255)[:, :, 0] - expected).max() <= 1
    colour = read_back(np.stack([grey] * 3, axis=2), tmp_path, (8, 8, 3), transparency=(255, 255, 255))
    assert np.abs(colour - expected[:, :, None]).max() <= 1
    deep = read_back(grey.astype(np.uint16) * 257, tmp_path, transparency=65535)[:, :, 0]
    assert np.abs(deep - expected).max() <= 1


def test_a_wide_or_tall_picture_is_seen_in_its_middle_and_not_squashed(tmp_path):
    beside = RNG.integers(0, 256, (8, 12), dtype=np.uint8)
    wide = np.concatenate([beside, SQUARE, beside], axis=1)
    np.testing.assert_array_equal(read_back(wide, tmp_path)[:, :, 0], SQUARE)
    np.testing.assert_array_equal(read_back(wide.T, tmp_path)[:, :, 0], SQUARE.T)
    # By the definition: the short side is resized, then the middle is cut out.
    large = wide.repeat(5, 0).repeat(5, 1)
    whole = np.asarray(Image.fromarray(large).resize((32, 8), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(read_back(large, tmp_path)[:, :, 0], whole[:, 12:20])
    # The middle is cut from what is seen, whichever way the picture was stored.
    np.testing.assert_array_equal(read_back(wide[:, ::-1].T, tmp_path, exif=exif_of(6))[:, :, 0], SQUARE)
    clear = np.stack([np.full_like(wide, 255), wide], axis=2)  # the shape in the alpha channel
    assert np.abs(read_back(clear, tmp_path)[:, :, 0].astype(int) - SQUARE).max() <= 1
    # And for a network that wants other sides.
    np.testing.assert_array_equal(read_back(wide, tmp_path, (8, 16, 1))[:, :, 0], wide[:, 8:24])


@pytest.mark.parametrize("size", [(1, 1), (1, 100), (100, 1), (3, 1), (1000, 7)])
def test_a_picture_a_pixel_high_is_read(size, tmp_path):
    assert read_back(np.full(size, 77, np.uint8), tmp_path, (5, 8, 3)).tolist() == np.full((5, 8, 3), 77).tolist()


def test_of_an_animation_the_first_frame_is_seen_and_print_colours_are_converted(tmp_path):
    frames = [Image.fromarray(np.full((8, 8), value, np.uint8)) for value in (10, 200)]
    assert (read_back(frames[0], tmp_path, save_all=True, append_images=frames[1:]) == 10).all()
    cmyk = Image.merge("CMYK", [Image.new("L", (8, 8), ink) for ink in (0, 255, 255, 0)])  # red
    red = read_back(cmyk, tmp_path, (8, 8, 3), ".jpg", quality=100)
    assert np.abs(red.astype(int) - [255, 0, 0]).max() < 8
    assert np.abs(read_back(cmyk, tmp_path, (8, 8, 1), ".jpg", quality=100).astype(int) - 0.299 * 255).max() < 8


@pytest.mark.parametrize(("suffix", "options"), [(".webp", {"lossless": True}), (".bmp", {})])
def test_webp_and_bmp_are_seen_as_png_is(suffix, options, tmp_path):
    colour = RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    np.testing.assert_array_equal(read_back(colour, tmp_path, (8, 8, 3), suffix, **options), colour)
    np.testing.assert_array_equal(read_back(colour, tmp_path, (8, 8, 1), suffix, **options), read_back(colour, tmp_path))
    if suffix == ".webp":
        frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (10, 200)]
        assert (read_back(frames[0], tmp_path, (8, 8, 3), suffix, save_all=True, append_images=frames[1:], **options) == 10).all()
        clear = np.concatenate([colour, np.full((8, 8, 1), 99, np.uint8)], axis=2)
        np.testing.assert_array_equal(
            read_back(clear, tmp_path, (8, 8, 3), suffix, exact=True, **options), read_back(clear, tmp_path, (8, 8, 3))
        )


CASES = ROOT.parent / "shared" / "cases"


@pytest.mark.skipif(not (CASES / "up.png").exists(), reason=f"no {CASES}")
@pytest.mark.parametrize(
    "name", ["exif3.jpg", "exif6.jpg", "exif6.png", "rgba_white_ink.png", "la_white_ink.png", "p_trns.png", "wide.png"]
)
def test_pictures_that_were_misread_are_seen_as_the_upright_one(name):
    found, upright = (pictures.read_image(CASES / each, (8, 8, 1)).astype(int) for each in (name, "up.png"))
    assert np.abs(found - upright).max() <= 6


def test_a_negative_gets_a_note_and_other_pictures_none(call, digit, tmp_path):
    negative = tmp_path / "negative.png"
    Image.fromarray(255 - np.asarray(Image.open(digit))).save(negative)
    status, out, err = call("predict", f"--workdir={finished()}", "--json", digit, negative)
    assert status == 0
    assert err.startswith(f"{negative}: it looks like a negative: its pixels are ")
    assert err.count("\n") == 1
    first, second = json.loads(out)
    assert "note" not in first
    assert err == f"{negative}: {second['note']}\n"
    # None of the images that it was trained or tested on gets one; every negative does.
    mean, std = (np.asarray(a) for a in load_run(finished())[2][1:])
    dataset = data.load(tiny())
    for images in (dataset.train.images, dataset.test.images):
        assert {prediction.oddity(image, mean, std) for image in images} == {""}
        assert all("negative" in prediction.oddity(255 - image, mean, std) for image in images)


def plain(*values):
    """An image of two pixels a channel, which differ a little."""
    return np.stack([np.array(values, np.uint8), np.array(values, np.uint8) + 2])[None]


def test_a_picture_beyond_three_deviations_of_the_training_pixels_gets_a_note():
    mean, std = np.array([0.5, 0.4, 0.5]), np.array([0.05, 0.1, 0.1])
    assert prediction.oddity(plain(127, 101, 127), mean, std) == ""
    assert prediction.oddity(plain(127 + 35, 101, 127), mean, std) == ""
    # One channel is enough, on either side.
    for value in (127 + 42, 127 - 42):
        assert "far from the 47 % that the run expects" in prediction.oddity(plain(value, 101, 127), mean, std)
    assert "one colour everywhere" in prediction.oddity(np.full((2, 2, 3), 127, np.uint8), mean, std)
    # Natural images are neither dark nor bright: a bright one is no negative.
    natural = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    assert {prediction.oddity(plain(v, v, v), *natural) for v in range(0, 250, 10)} == {""}


def png(width, height):
    """A PNG that claims a size and holds no such pixels."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    framed = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


@pytest.mark.slow
def test_unreadable_images_are_named_and_the_others_answered(call, digit, tmp_path):
    bad = {
        "text.png": (b"not an image", ["not a readable PNG, JPEG, WebP or BMP image"]),
        "empty.png": (b"", ["not a readable"]),
        "truncated.png": (digit.read_bytes()[:60], ["not a readable"]),
        "huge.png": (png(100_000, 100_000), ["too many pixels", "at most"]),
        "large.png": (png(10_000, 10_000), ["10000x10000 pixels", "at most"]),
        "lies.png": (png(4_000, 4_000), ["not a readable"]),
        "other.png": (b"GIF89a\x01\0\x01\0\0\0\0;", ["not a readable"]),
    }
    alone = call("predict", f"--workdir={finished()}", digit)[1]
    for name, (content, parts) in bad.items():
        (tmp_path / name).write_bytes(content)
        status, out, err = call("predict", f"--workdir={finished()}", tmp_path / name, digit)
        assert (status, out, err.count("\n")) == (1, alone, 1)
        assert all(part in err for part in [f"vffjax: error: {tmp_path / name}: ", *parts]), err


@pytest.fixture
def folder(tmp_path):
    """Seven pictures of a test image each, of all kinds and in two folders; a broken one; and files that are passed over."""
    images, folder = data.load(tiny()).test.images[:7, :, :, 0], tmp_path / "pictures"
    names = ["0.png", "1.BMP", "2.webp", "3.jpeg", "inner/4.PNG", "inner/a, b\n.png", "z.jpg"]
    for image, name in zip(images, names, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / name, quality=100, lossless=True)
    (folder / "broken.png").write_bytes(b"no picture")
    for name in ("notes.txt", "._0.png", ".hidden/0.png", "inner/.a.jpg"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"passed over")
    return folder, images, [str(folder / name) for name in sorted([*names, "broken.png"])]


def test_a_folder_becomes_a_table(call, folder, tmp_path, monkeypatch):
    folder, images, names = folder
    monkeypatch.setattr(prediction, "MOST_AT_ONCE", 3)  # pictures, so that there are three batches
    table = tmp_path / "out.csv"
    table.write_text("an older file")
    status, out, err = call("predict", f"--workdir={finished()}", folder, tmp_path / "missing.png", f"--csv={table}", "--top=2")
    assert (status, out) == (1, f"{table}: 7 images, and 2 that could not be read\n")
    passed, *refused = err.splitlines()
    assert passed.startswith(f"{folder}: 1 passed over, ") and "such as notes.txt" in passed
    assert [line.split(": ")[2] for line in refused] == [str(folder / "broken.png"), str(tmp_path / "missing.png")]
    with open(table, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["file", "class", "probability", "class_2", "probability_2", "note", "error"]
    assert [row["file"] for row in rows] == [*names, str(tmp_path / "missing.png")]
    assert [row["error"].partition(" (")[0].partition(";")[0] for row in rows if not row["class"]] == [
        "not a readable PNG, JPEG, WebP or BMP image",
        "No such file or directory",
    ]
    log_p, run = direct_scores(images[..., None])
    p = np.exp(log_p[run["voting"]].mean(axis=0))
    p /= p.sum(axis=1, keepdims=True)
    found = {row["file"]: row for row in rows}
    for i, name in {0: "0.png", 1: "1.BMP", 4: "inner/4.PNG", 5: "inner/a, b\n.png"}.items():  # the others are rounded by their format
        row = found[str(folder / name)]
        best = np.argsort(-p[i])[:2]
        assert [row["class"], row["class_2"]] == [run["class_names"][k] for k in best]
        np.testing.assert_allclose([float(row["probability"]), float(row["probability_2"])], p[i][best], atol=1e-5)
    listed = call("predict", f"--workdir={finished()}", folder, "--json")
    assert listed[0] == 1 and [entry["image"] for entry in json.loads(listed[1])] == names
    assert "not a readable" in next(entry["error"] for entry in json.loads(listed[1]) if "by" not in entry)
    before = table.read_bytes()
    assert call("predict", f"--workdir={finished()}", folder / "broken.png", f"--csv={table}")[0] == 2
    assert table.read_bytes() == before
