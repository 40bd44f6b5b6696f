"""Picture files as arrays: decoded safely, turned upright, and at the size that a network takes."""

import contextlib
import io
import os
import pathlib
import warnings
from collections.abc import Iterator

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image

from vffjax.errors import UserError
from vffjax.files import read_bytes

# Larger files, and files that claim more pixels, are refused before they are decoded: 64 Mi pixels take 530 MB to decode and convert.
MAX_PIXELS = 2**26
MAX_BYTES = 2**28

# The formats that are read, by Pillow's names, and the endings of their files.
FORMATS = {"PNG": (".png",), "JPEG": (".jpg", ".jpeg"), "WEBP": (".webp",), "BMP": (".bmp",)}
KINDS = "PNG, JPEG, WebP or BMP"  # as messages call them
SUFFIXES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)

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
_GREY = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L")  # modes of pictures without colour
_LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as in Pillow


def read_image(path: pathlib.Path, shape: tuple[int, int, int]) -> UInt8[np.ndarray, "h w c"]:
    """Reads one PNG, JPEG, WebP or BMP file as a person would see it, at the network's size and in grey or colour as the network takes it.

    The image is turned upright by its EXIF orientation. Its short side is resized to that of (h, w), and the middle is cut out, as is
    usual when image classifiers are evaluated; nothing is squashed. Transparent parts show a background: black, or white where less than
    a tenth of what is visible is brighter than middle grey, so that dark ink stays visible too. Of an animation the first frame is read.

    Raises:
        UserError: the file is missing, too large, or not a readable image; the message names it.
    """
    try:
        content = read_bytes(path, MAX_BYTES)
    except (OSError, ValueError) as error:  # a null byte in the path is a ValueError
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}; give a {KINDS} image") from None
    with without_warnings():
        return decoded(content, shape[:2], "L" if shape[2] == 1 else "RGB", str(path))[0]


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Hides the warnings of Pillow, which warns above a limit of its own; `decoded` refuses above ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def decoded(content: bytes, sides: tuple[int, int] | None, mode: str, named: str) -> tuple[UInt8[np.ndarray, "h w c"], bool]:
    """Decodes a picture as `read_image` says.

    Args:
        content: of a file.
        sides: height and width to which the picture is brought; None: it keeps its own.
        mode: L for grey, RGB for colour.
        named: what messages call it.

    Returns:
        The pixels; and whether the file holds a grey picture.

    Raises:
        UserError: as `read_image`.
    """
    try:
        image = _as_stored(content, named)
        grey, orientation = image.mode in _GREY, _orientation(image)
        if image.mode.startswith("I"):
            image = _eight_bit(image)
        # Of the picture before it is turned, because turning the small one takes less memory.
        size = image.size if sides is None else sides if orientation >= 5 else sides[::-1]
        box = _middle(image.size, size)
        if image.has_transparency_data:
            # One name for all steps, so that a large image is not kept in three versions at once.
            image = image.convert("RGBA")
            image = image.convert("RGBa")  # premultiplied by alpha, so that resizing does not mix in the colour of invisible pixels
            image = _on_background(image.resize(size, Image.Resampling.BILINEAR, box)).convert(mode)
        else:
            image = image.convert(mode)
            image = image.resize(size, Image.Resampling.BILINEAR, box)
        if orientation in _TURNS:
            image = image.transpose(_TURNS[orientation])
    except UserError:
        raise
    except Image.DecompressionBombError:  # Pillow refuses twice as many pixels as it warns of
        raise UserError(f"{named}: far too many pixels; give an image of at most {MAX_PIXELS} pixels") from None
    except Exception as error:  # Pillow raises many kinds on damaged files
        raise UserError(f"{named}: not a readable {KINDS} image ({type(error).__name__}); convert or replace it") from None
    pixels = np.asarray(image, np.uint8)
    return pixels.reshape(*pixels.shape[:2], len(mode)), grey


def _as_stored(content: bytes, named: str) -> Image.Image:
    """The decoded picture as it is stored in a file of this content. Raises `UserError` if it is too large."""
    # From memory: from a file, Pillow would allocate as many bytes as a chunk claims to have, up to 4 GB.
    image = Image.open(io.BytesIO(content), formats=tuple(FORMATS))
    most = MAX_PIXELS // 2 if image.format == "WEBP" else MAX_PIXELS  # whose decoder keeps more copies
    if image.width * image.height > most:
        raise UserError(f"{named}: {image.width}x{image.height} pixels; give an image of at most {most} pixels")
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


def pictures_in(folder: pathlib.Path | str) -> tuple[list[pathlib.Path], list[UserError], list[pathlib.Path]]:
    """The picture files of a folder and of the folders in it, by their endings, in the order of their paths.

    Hidden files and folders are passed over, such as the `._name` beside a file that a Mac has copied. Links to folders are not followed.

    Returns:
        The files; an error for each folder that cannot be read, or for the whole if it has no such file; and what is passed over but not
        hidden: other files, and links to folders.
    """
    found, problems, others = list[pathlib.Path](), list[UserError](), list[pathlib.Path]()

    def refuse(error: OSError) -> None:
        problems.append(UserError(f"{error.filename}: {error.strerror}; make the folder readable"))

    for place, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        others += [pathlib.Path(place, name) for name in folders if os.path.islink(os.path.join(place, name))]
        for path in (pathlib.Path(place, name) for name in files if not name.startswith(".")):
            (found if path.name.lower().endswith(SUFFIXES) else others).append(path)
    if not found and not problems:
        problems.append(UserError(f"{folder}: no {KINDS} file in this folder; give another"))
    return sorted(found), problems, sorted(others)
