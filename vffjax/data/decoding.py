"""Many encoded pictures as one array: decoded once, by all cores, into a file that a digest guards.

The files lie in `$XDG_CACHE_HOME/vffjax/images`, or `~/.cache/vffjax/images`. They can be deleted at any time.
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import math
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt8
from tqdm import tqdm

from vffjax import backend, files, paths
from vffjax.data.pictures import decoded, without_warnings
from vffjax.errors import SafeStream, UserError, bad_key, notice, printable

_FORMAT = 1  # of the cache, to be raised when decoding changes
_AT_ONCE = 256  # pictures whose content is in memory at once
_PIXELS, _ABOUT = "images.bin", "about.json"


class Encoded(NamedTuple):
    """Pictures that are not decoded yet.

    Attributes:
        where: what they are called as a whole, for messages.
        names: of each picture, for messages.
        content: the content of a picture's file by its number. May raise `OSError` or `UserError`.
        key: a text that changes when the content of any picture does.
    """

    where: str
    names: Sequence[str]
    content: Callable[[int], bytes]
    key: str


class Decoded(NamedTuple):
    """Pictures of one size: bytes, in the order in which they were given, and the numbers of those that could be read."""

    images: UInt8[np.ndarray, "n h w c"]
    kept: Int[np.ndarray, " n"]


def decode(encoded: Encoded, image_size: int) -> Decoded:
    """Decodes pictures, or reads what has been decoded before.

    If every picture is grey, the images have one channel, else three. A picture that cannot be read is left out, and a line on stderr says
    how many are.

    Args:
        encoded: the pictures.
        image_size: the side in pixels to which all are brought: the short side is resized, and the middle is cut out. 0: they keep their
            own size, which then has to be the same for all.

    Raises:
        UserError: no picture can be read, or `image_size` is 0 and the pictures have different sizes.
    """
    key = hashlib.sha256(repr((_FORMAT, encoded.key, image_size)).encode()).hexdigest()
    if key not in _known:
        _known.clear()  # a process works on one set
        _known[key] = _from_cache(encoded, image_size, paths.cache_folder("images") / key[:32])
    return _known[key]


_known: dict[str, Decoded] = {}


def _from_cache(encoded: Encoded, image_size: int, folder: pathlib.Path) -> Decoded:
    found = _read(folder)
    if found is not None and found[1].get("may_pass"):  # such as a network drive that failed once
        shutil.rmtree(folder, ignore_errors=True)
        found = None
    if found is None:
        try:
            with _new_folder(folder) as temporary:
                with open(temporary / _PIXELS, "w+b") as file:
                    about = _decode_all(encoded, image_size, file)
                about["sha256"] = files.sha256_of(temporary / _PIXELS)
                files.write_json(temporary / _ABOUT, about)
            found = _read(folder)
        except OSError as error:
            notice(f"{folder}: the decoded images cannot be kept there ({error.strerror or error}); each run decodes them anew")
    if found is None:
        with tempfile.TemporaryFile() as file:
            about = _decode_all(encoded, image_size, file)
            file.seek(0)
            found = np.frombuffer(file.read(), np.uint8).reshape(about["shape"]), about
    images, about = found
    left_out = {int(number): problem for number, problem in about["left_out"].items()}
    if left_out:
        first = next(iter(left_out.values()))
        notice(f"{encoded.where}: {len(left_out)} of {len(encoded.names)} pictures cannot be read and are left out; the first: {first}")
    return Decoded(images, np.array([i for i in range(len(encoded.names)) if i not in left_out], np.int64))


def _read(folder: pathlib.Path) -> tuple[np.ndarray, dict[str, Any]] | None:
    """The images of a folder of the cache, not in memory but mapped, and what is known of them. None if there are none, or damaged ones."""
    try:
        about = files.read_json(folder / _ABOUT)
        if files.sha256_of(folder / _PIXELS) == about["sha256"]:
            return np.memmap(folder / _PIXELS, np.uint8, "r", shape=tuple(about["shape"])), about
        notice(f"{folder}: the decoded images are damaged; they are decoded anew")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        notice(f"{folder}: the decoded images cannot be read ({printable(str(error), 200)}); they are decoded anew")
    shutil.rmtree(folder, ignore_errors=True)
    return None


@contextlib.contextmanager
def _new_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary folder that becomes `folder` at the end. If another process was faster, its folder stays."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=".new-", dir=folder.parent))
    try:
        yield temporary
        with contextlib.suppress(FileExistsError, OSError):
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _decode_all(encoded: Encoded, image_size: int, file: IO[bytes]) -> dict[str, Any]:
    """Writes all pictures that can be read to a file, as bytes, one after the other. Returns their shape, the problems of the others, and
    whether one of these may pass, because the disk refused a file and not its content.

    `backend.cores()` threads decode, because Pillow does not hold Python's lock meanwhile.
    """
    first, left_out, greys, count, may_pass = "", dict[int, str](), True, 0, False
    shape: tuple[int, ...] = (image_size, image_size, 3) if image_size else ()
    stream = SafeStream(sys.stderr)
    with (
        without_warnings(),
        concurrent.futures.ThreadPoolExecutor(backend.cores()) as pool,
        tqdm(total=len(encoded.names), desc="decoding", unit=" images", leave=False, file=stream, disable=not stream.isatty()) as bar,
    ):
        one = functools.partial(_decode_one, encoded, (image_size, image_size) if image_size else None)
        for start in range(0, len(encoded.names), _AT_ONCE):
            numbers = range(start, min(start + _AT_ONCE, len(encoded.names)))
            for number, (pixels, grey, refused) in zip(numbers, pool.map(one, numbers), strict=True):
                if pixels is None:
                    left_out[number] = printable(str(refused), 300)
                    may_pass = may_pass or isinstance(refused, OSError)
                    continue
                if not shape:
                    first, shape = encoded.names[number], pixels.shape
                if pixels.shape != shape:
                    sizes = (f"{name} has {w}x{h} pixels" for name, (h, w, _) in ((first, shape), (encoded.names[number], pixels.shape)))
                    problem = f"{encoded.where} has pictures of different sizes: {' and '.join(sizes)}"
                    raise bad_key("image_size", 0, printable(problem), "set it to the side that all shall have, such as 64")
                file.write(pixels.data)
                greys, count = greys and grey, count + 1
            bar.update(len(numbers))
    if not count:
        raise UserError(f"{encoded.where}: no picture can be read; the first: {next(iter(left_out.values()), 'there is none')}")
    if greys:
        _keep_one_channel(file, count, math.prod(shape))
    return {"shape": [count, *shape[:2], 1 if greys else 3], "left_out": left_out, "may_pass": may_pass}


def _decode_one(
    encoded: Encoded, sides: tuple[int, int] | None, number: int
) -> tuple[UInt8[np.ndarray, "h w 3"] | None, bool, Exception | None]:
    """A picture's pixels in colour and whether it is grey; or None and the problem: an `OSError` if the file cannot be read."""
    name = encoded.names[number]
    try:
        content = encoded.content(number)
        if not content:
            return None, False, UserError(f"{name} is empty")
        return *decoded(content, sides, "RGB", name), None
    except OSError as error:
        return None, False, OSError(f"{name}: {error.strerror or error}")
    except UserError as error:
        return None, False, error


def _keep_one_channel(file: IO[bytes], count: int, size: int) -> None:
    """Of a file of `count` colour images of `size` bytes each, whose three channels are equal, keeps one channel."""
    for number in range(count):
        file.seek(number * size)
        pixels = file.read(size)
        file.seek(number * size // 3)
        file.write(pixels[::3])
    file.truncate(count * size // 3)
    file.flush()
