"""Picture files as arrays: decoded safely, turned upright, and at the size that a network takes."""

import contextlib
import io
import pathlib
import warnings

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image

from vffjax.errors import UserError
from vffjax.files import read_bytes

# Larger files, and files that claim more pixels, are refused before they are decoded: 64 Mi pixels take 530 MB to decode and convert.
MAX_PIXELS = 2**26
MAX_BYTES = 2**28

# How to turn a picture upright, by the EXIF orientation that it is stored with. From 5 on, width and height change places.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as in Pillow


def read_image(path: pathlib.Path, shape: tuple[int, int, int]) -> UInt8[np.ndarray, "h w c"]:
    """Reads one PNG or JPEG file as a person would see it, at the network's size and in grey or colour as the network takes it.

    The image is turned upright by its EXIF orientation. Its short side is resized to that of (h, w), and the middle is cut out, as is
    usual when image classifiers are evaluated; nothing is squashed. Transparent parts show a background: black, or white where less than
    a tenth of what is visible is brighter than middle grey, so that dark ink stays visible too. Of an animation the first frame is read.

    Raises:
        UserError: the file is missing, too large, or not a readable image; the message names it.
    """
    h, w, c = shape
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns above a limit of its own; `_decoded` refuses above ours
            image = _decoded(path)
            orientation = _orientation(image)
            size = (h, w) if orientation >= 5 else (w, h)  # of the picture before it is turned; turning the small one takes less memory
            box = _middle(image.size, size)
            if image.mode.startswith("I"):
                image = _eight_bit(image)
            if image.has_transparency_data:
                # One name for all steps, so that a large image is not kept in three versions at once.
                image = image.convert("RGBA")
                image = image.convert("RGBa")  # premultiplied by alpha, so that resizing does not mix in the colour of invisible pixels
                image = _on_background(image.resize(size, Image.Resampling.BILINEAR, box)).convert("L" if c == 1 else "RGB")
            else:
                image = image.convert("L" if c == 1 else "RGB")
                image = image.resize(size, Image.Resampling.BILINEAR, box)
            if orientation in _TURNS:
                image = image.transpose(_TURNS[orientation])
    except UserError:
        raise
    except Image.DecompressionBombError:  # Pillow refuses twice as many pixels as it warns of
        raise UserError(f"{path}: far too many pixels; give an image of at most {MAX_PIXELS} pixels") from None
    except Exception as error:  # Pillow raises many kinds on damaged files
        raise UserError(f"{path}: not a readable PNG or JPEG image ({type(error).__name__}); convert or replace it") from None
    return np.asarray(image, np.uint8).reshape(h, w, c)


def _decoded(path: pathlib.Path) -> Image.Image:
    """The decoded picture as it is stored in the file. Raises `UserError` if the file cannot be read, or is too large."""
    try:
        content = read_bytes(path, MAX_BYTES)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a PNG or JPEG image") from None
    # Read into memory first: from a file, Pillow would allocate as many bytes as a chunk claims to have, up to 4 GB.
    image = Image.open(io.BytesIO(content), formats=("PNG", "JPEG"))
    if image.width * image.height > MAX_PIXELS:
        raise UserError(f"{path}: {image.width}x{image.height} pixels; give an image of at most {MAX_PIXELS} pixels")
    image.load()
    return image


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, from 1 to 8. If the EXIF block is damaged or holds another value it is 1, upright, as viewers take it."""
    with contextlib.suppress(Exception):
        found = image.getexif().get(ExifTags.Base.Orientation)
        if found in _TURNS:
            return int(found)
    return 1


def _middle(size: tuple[int, int], wanted: tuple[int, int]) -> tuple[float, float, float, float]:
    """The largest centred box of an image of this size (width, height) with the wanted ratio of sides: left, top, right, bottom."""
    scale = min(side / to for side, to in zip(size, wanted, strict=True))
    inner = [min(scale * to, side) for side, to in zip(size, wanted, strict=True)]
    left, top = ((side - part) / 2 for side, part in zip(size, inner, strict=True))
    return left, top, min(left + inner[0], size[0]), min(top + inner[1], size[1])


def _eight_bit(image: Image.Image) -> Image.Image:
    """A 16-bit grey picture scaled to 8 bits; Pillow itself would clip it at 255. The value that stands for transparent becomes alpha."""
    deep = np.asarray(image)
    grey, clear = Image.fromarray((deep // 257).astype(np.uint8)), image.info.get("transparency")
    return grey if clear is None else Image.merge("LA", (grey, Image.fromarray((deep != clear) * np.uint8(255))))


def _on_background(image: Image.Image) -> Image.Image:
    """A picture that is premultiplied by its alpha, put on black or, if hardly any of it is bright, on white."""
    pixels = np.asarray(image).astype(np.float32)
    colour, alpha = pixels[..., :3], pixels[..., 3]
    bright = alpha[colour @ _LUMINANCE > alpha / 2].sum()
    ground = 255.0 if bright < alpha.sum() / 10 else 0.0
    seen = colour + (1 - alpha[..., None] / 255) * ground
    return Image.fromarray(np.clip(np.rint(seen), 0, 255).astype(np.uint8))
