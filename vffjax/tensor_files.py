"""Files of named tensors: safetensors, and PyTorch's by PyTorch. Nothing in them is executed.

They may come from anyone: the sizes that a header claims are compared with the file's length, and a tensor's content is read when it is
asked for, by when its shape has been compared with a network's. So nothing large is set aside by what a file claims.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

import numpy as np

from vffjax.config import WEIGHT_FILES
from vffjax.errors import UserError, printable

# A thousand layers need less than 1 MiB, and JSON of 2 MiB takes at most some 100 MB to parse.
MAX_HEADER = 2**21
# NumPy has no bfloat16: its bits.
FLOATS: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
AGAIN = "download or export it again, or set config.init_from=''"
# Before it, a file could make `torch.load` run code in spite of weights_only (CVE-2025-32434).
_SAFE_TORCH = (2, 6)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """What a file says of one tensor; `read` gives its content as float32, if its type is one of `FLOATS`."""

    dtype: str  # in the words of safetensors
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


@contextlib.contextmanager
def opened(path: pathlib.Path | str, most_bytes: int) -> Iterator[dict[str, Tensor]]:
    """The tensors of a file, by name, to be read while it is open. PyTorch reads a file whole, so it may have `most_bytes`.

    Raises `UserError` naming the file: none that can be read, not sound, or not of tensors alone.
    """
    if not str(path).endswith(WEIGHT_FILES):
        raise UserError(
            f"{path}: not a {WEIGHT_FILES[0]} file, nor PyTorch's; give one that vffjax export, torchvision or timm has written"
        )
    with _open(path) as file:
        yield _header(path, file) if str(path).endswith(WEIGHT_FILES[0]) else _of_torch(path, file, most_bytes)


def _open(path: pathlib.Path | str) -> IO[bytes]:
    try:
        if os.path.isfile(path) or not os.path.exists(path):  # to open a pipe would wait for ever
            return open(path, "rb")
        reason: Any = "not a file"
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
    raise UserError(f"{path}: cannot be read ({reason}); give a file that vffjax export, torchvision or timm has written")


def _header(path: pathlib.Path | str, file: IO[bytes]) -> dict[str, Tensor]:
    """The tensors of a safetensors file, whose bytes follow each other and are exactly those of the file behind the header."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, MAX_HEADER):
        raise UserError(f"{path}: not safetensors, or truncated ({size} bytes, a header of {length}); {AGAIN}")
    try:
        plain = json.loads(file.read(length).decode(), object_pairs_hook=_distinct)
        if not isinstance(plain.pop("__metadata__", {}), dict):
            raise ValueError("metadata that are no dictionary")
        found, spans = {}, []
        for name, entry in plain.items():
            dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            # NumPy has no more axes, and a product of many long numbers would take minutes.
            sound = isinstance(dtype, str) and len(shape) <= 64 and all(type(n) is int and 0 <= n < 2**63 for n in (*shape, start, end))
            width = FLOATS[dtype].itemsize if sound and dtype in FLOATS else 0
            if not sound or start > end or (width and width * math.prod(shape) != end - start):
                raise ValueError(f"type, shape and bytes of tensor {printable(name, 100)} do not agree")
            found[name] = Tensor(dtype, tuple(shape), functools.partial(_content, path, file, 8 + length + start, dtype, tuple(shape)))
            spans.append((start, end))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: a damaged header ({type(error).__name__}: {printable(str(error), 200)}); {AGAIN}") from None
    total = sum(end - start for start, end in spans)
    if total != size - 8 - length:
        raise UserError(f"{path}: truncated or damaged: {size - 8 - length} bytes of tensors, not {total}; {AGAIN}")
    reached = 0
    for start, end in sorted(spans):
        if start != reached:
            raise UserError(f"{path}: damaged: bytes {min(start, reached)} to {max(start, reached)} belong to no tensor or to two; {AGAIN}")
        reached = end
    return found


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice")
    return found


def _content(path: pathlib.Path | str, file: IO[bytes], start: int, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    file.seek(start)
    count = math.prod(shape)
    raw = file.read(count * FLOATS[dtype].itemsize)
    if len(raw) != count * FLOATS[dtype].itemsize:  # it was longer when it was opened
        raise UserError(f"{path}: truncated while it was read; {AGAIN}")
    array = np.frombuffer(raw, FLOATS[dtype]).reshape(shape)
    return (array.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else array.astype(np.float32)


def _of_torch(path: pathlib.Path | str, file: IO[bytes], most_bytes: int) -> dict[str, Tensor]:
    """The tensors of a state dict, which may lie under `state_dict` or `model`, and be named by DataParallel."""
    try:
        import torch
    except ImportError:
        raise UserError(f"{path}: only PyTorch can read it; pip install torch, or convert it to safetensors") from None
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < _SAFE_TORCH:
        raise UserError(f"{path}: PyTorch {torch.__version__} could run code in it; pip install -U torch, or convert it to safetensors")
    size = os.fstat(file.fileno()).st_size
    if size > most_bytes:
        raise UserError(f"{path}: {size} bytes, where this network and any classifier take less than {most_bytes}; {AGAIN}")
    try:
        records = _records(file)
        file.seek(0)
        loaded = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(loaded, Mapping):
            raise ValueError(f"{type(loaded).__name__} is no state dict")
        plain = next((loaded[key] for key in ("state_dict", "model") if isinstance(loaded.get(key), Mapping)), loaded)
        for name, value in plain.items():
            if not isinstance(name, str) or type(value) not in (torch.Tensor, torch.nn.Parameter) or value.layout != torch.strided:
                raise ValueError(f"{printable(str(name), 100)} is no plain tensor with a name ({type(value).__name__})")
        storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in plain.values()}
        if collections.Counter(size for size in storages.values() if size) - records:
            raise ValueError("tensors of other sizes than the file holds")
    except Exception as error:  # PyTorch's of many kinds
        asks, why = re.search(r"GLOBAL (\S+)", str(error)), type(error).__name__
        if asks:
            why = f"it asks for {printable(asks[1], 100)}"
        elif "weights_only" not in str(error):  # else it is advice, among it to load the file unsafely
            why = f"{why}: {printable(str(error), 200)}"
        raise UserError(
            f"{path}: not tensors alone, or damaged ({why}); save a plain state dict by torch.save, or use safetensors"
        ) from None
    prefix = "module." if all(name.startswith("module.") for name in plain) else ""
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.float64: "F64"}

    def tensor(value: Any) -> Tensor:
        # A copy with its own bytes: of an expanded tensor, the file holds fewer than it shows.
        return Tensor(
            names.get(value.dtype, str(value.dtype)), tuple(value.shape), lambda: np.array(value.to(torch.float32).numpy(force=True))
        )

    return {name.removeprefix(prefix): tensor(value) for name, value in plain.items()}


def _records(file: IO[bytes]) -> collections.Counter[int]:
    """Sizes of what a PyTorch file holds. An older format, or compressed, would claim more memory than the file has bytes; not these."""
    if file.read(4) != b"PK\x03\x04":
        raise ValueError("not a zip archive, as PyTorch writes since version 1.6")
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("compressed")
    return collections.Counter(entry.file_size for entry in entries)
