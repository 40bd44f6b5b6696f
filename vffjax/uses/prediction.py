"""Image files in, ranked classes out."""

import contextlib
import io
import pathlib
import warnings
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8
from PIL import ExifTags, Image

from vffjax.errors import UserError
from vffjax.files import read_bytes
from vffjax.runs.workdir import load_run
from vffjax.training.scores import ensemble, make_scores

# A file that claims more pixels than this is refused before it is decoded: 64 Mi pixels take 530 MB to decode and convert.
MAX_PIXELS = 2**26
MAX_BYTES = 2**28


# How a picture is turned upright, by the EXIF orientation that it was stored with; from 5 on its sides change places.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R 601, which Pillow uses too


def read_image(path: pathlib.Path, shape: tuple[int, int, int]) -> UInt8[np.ndarray, "h w c"]:
    """One PNG or JPEG as a person sees it, in grey or colour as the network wants it. Raises `UserError` naming the file.

    It is turned upright by its EXIF orientation. Its short side is resized to that of (h, w), and the middle is cut out, as is usual
    when image classifiers are evaluated; nothing is squashed. What is transparent shows a background: black, or white where less than a
    tenth of what is visible is brighter than middle grey, so that dark ink stays visible too. Of an animation the first frame is read.
    """
    h, w, c = shape
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own limit warns; ours refuses
            image = _decoded(path)
            orientation = _orientation(image)
            size = (h, w) if orientation >= 5 else (w, h)  # before the turn, which costs least memory on the small picture
            box = _middle(image.size, size)
            if image.mode.startswith("I"):
                image = _eight_bit(image)
            if image.has_transparency_data:
                # Each name replaces the last: three copies of a large image would take more memory than it may.
                image = image.convert("RGBA")
                image = image.convert("RGBa")  # multiplied by alpha, so that the colour of invisible pixels does not shine through
                image = _on_background(image.resize(size, Image.Resampling.BILINEAR, box)).convert("L" if c == 1 else "RGB")
            else:
                image = image.convert("L" if c == 1 else "RGB")
                image = image.resize(size, Image.Resampling.BILINEAR, box)
            if orientation in _TURNS:
                image = image.transpose(_TURNS[orientation])
    except UserError:
        raise
    except Image.DecompressionBombError:  # beyond Pillow's own limit
        raise UserError(f"{path}: far too many pixels; give an image of at most {MAX_PIXELS} pixels") from None
    except Exception as error:  # Pillow raises many kinds on damaged files
        raise UserError(f"{path}: not a readable PNG or JPEG image ({type(error).__name__}); convert or replace it") from None
    return np.asarray(image, np.uint8).reshape(h, w, c)


def _decoded(path: pathlib.Path) -> Image.Image:
    """The pixels of a file that is small enough, as they are stored."""
    try:
        content = read_bytes(path, MAX_BYTES)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a PNG or JPEG image") from None
    # From memory: from a file, Pillow would set aside as many bytes as a chunk claims to have, up to 4 GB.
    image = Image.open(io.BytesIO(content), formats=("PNG", "JPEG"))
    if image.width * image.height > MAX_PIXELS:
        raise UserError(f"{path}: {image.width}x{image.height} pixels; give an image of at most {MAX_PIXELS} pixels")
    image.load()
    return image


def _orientation(image: Image.Image) -> int:
    """EXIF's, from 1 to 8. Where the EXIF block is damaged, or says something else, viewers show the picture as it is stored: 1."""
    with contextlib.suppress(Exception):
        found = image.getexif().get(ExifTags.Base.Orientation)
        if found in _TURNS:
            return int(found)
    return 1


def _middle(size: tuple[int, int], wanted: tuple[int, int]) -> tuple[float, float, float, float]:
    """The largest box in the middle of an image whose sides have the ratio of those that are wanted: left, top, right, bottom."""
    scale = min(side / to for side, to in zip(size, wanted, strict=True))
    inner = [min(scale * to, side) for side, to in zip(size, wanted, strict=True)]
    left, top = ((side - part) / 2 for side, part in zip(size, inner, strict=True))
    return left, top, min(left + inner[0], size[0]), min(top + inner[1], size[1])


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit grey, which Pillow would clip at 255, with the one value that may stand for transparent."""
    deep = np.asarray(image)
    grey, clear = Image.fromarray((deep // 257).astype(np.uint8)), image.info.get("transparency")
    return grey if clear is None else Image.merge("LA", (grey, Image.fromarray((deep != clear) * np.uint8(255))))


def _on_background(image: Image.Image) -> Image.Image:
    """A picture that was multiplied by its alpha, on black or, if hardly any of it is bright, on white."""
    pixels = np.asarray(image).astype(np.float32)
    colour, alpha = pixels[..., :3], pixels[..., 3]
    bright = alpha[colour @ _LUMINANCE > alpha / 2].sum()
    ground = 255.0 if bright < alpha.sum() / 10 else 0.0
    seen = colour + (1 - alpha[..., None] / 255) * ground
    return Image.fromarray(np.clip(np.rint(seen), 0, 255).astype(np.uint8))


def oddity(image: UInt8[np.ndarray, "h w c"], mean: Float[np.ndarray, " c"], std: Float[np.ndarray, " c"]) -> str:
    """In what an image differs from those of the training so much that its answer means little; empty if in nothing.

    `mean` and `std` are those by which the run normalises pixels, per channel, on the scale where 255 is 1: of its training images, or with
    config.pixel_statistics=imagenet of ImageNet's.
    """
    found = image.mean((0, 1)) / 255
    here, there = f"{100 * found.mean():.0f} %", f"{100 * mean.mean():.0f} %"
    if (image == image[0, 0]).all():
        return "what the network sees of it has one colour everywhere, so that there is nothing to recognise"
    if (np.abs(found - mean) > 3 * std).any():
        return (
            f"its pixels are {here} of white on average, far from the {there} that the run expects; the network has hardly seen one like it"
        )
    # Deviations of pixels say little where most are black or white. But where the training images are mostly dark, or mostly bright, a
    # negative gives itself away: its mean is that of a training image, mirrored.
    if np.abs(mean.mean() - 0.5) > 0.15 and np.abs(found.mean() - mean.mean()) > 2 * np.abs(1 - found.mean() - mean.mean()):
        return f"it looks like a negative: its pixels are {here} of white on average, those that the run expects {there}; try it inverted"
    return ""


def rank(log_p: Float[np.ndarray, " classes"], class_names: list[str], top: int) -> list[dict[str, Any]]:
    """The likeliest classes with their probabilities; `log_p` need not be normalised."""
    p = np.exp(log_p - log_p.max())
    p /= p.sum()
    return [{"class": class_names[i], "probability": float(p[i])} for i in np.argsort(-p, kind="stable")[:top]]


def predict(workdir: pathlib.Path | str, paths: Sequence[pathlib.Path | str], epoch: str = "best", top: int = 3) -> list[dict[str, Any]]:
    """For each file the top classes of every group's head, and of the ensemble of the groups that vote; and a `note` if it looks unlike
    the training images. How a file becomes an image of the network's size: see `read_image`."""
    plan, states, task, run = load_run(workdir, epoch)
    images = np.stack([read_image(pathlib.Path(path), tuple(run["image_shape"])) for path in paths])
    scores = np.asarray(make_scores(plan, "heads")(task, states, jnp.asarray(images)))
    names = run["class_names"]
    found = []
    trained = range(run["trained_groups"])
    # The voting groups were chosen for the configured inference; a sweep's choice says nothing of the heads.
    voting = tuple(run["voting"]) if plan.config.inference == "heads" else tuple(trained)
    for i, path in enumerate(paths):
        by = {plan.groups[g].name: rank(scores[g, i], names, top) for g in trained}
        by["ensemble"] = rank(ensemble(scores[:, i : i + 1], voting)[0], names, top)
        note = oddity(images[i], np.asarray(task.mean), np.asarray(task.std))
        found.append({"image": str(path), "by": by} | ({"note": note} if note else {}))
    return found
