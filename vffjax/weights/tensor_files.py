"""The tensors of a weight file, and how safetensors files are read. Nothing in them is executed.

A file may come from anyone. So the sizes that its header claims are compared with the file's length, and a tensor's content is read only on
request, after its shape has been compared with the network's. No claim in a file makes us allocate more memory than that.
"""

import contextlib
import functools
import json
import math
import os
import pathlib
from collections.abc import Callable
from typing import IO, Any, NamedTuple

import numpy as np

from vffjax import file_kinds, files
from vffjax.errors import UserError, printable, said

# A thousand layers need less than 1 MiB, and JSON of 2 MiB takes at most some 100 MB to parse.
MAX_HEADER = 2**21
# NumPy has no bfloat16, so its bits are read as whole numbers.
FLOATS: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
METADATA = "vffjax"  # the entry of a file's metadata that holds what it says of itself, as JSON
AGAIN = "download or export it again, or set config.init_from=''"


class Tensor(NamedTuple):
    """One tensor as a file's header describes it; `read` returns its content as float32, if its type is one of `FLOATS`."""

    dtype: str  # by safetensors' name, such as F32
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


def of_safetensors(path: pathlib.Path | str, file: IO[bytes]) -> dict[str, Tensor]:
    """The tensors of a safetensors file, by their names.

    Raises `UserError` unless the header is sound and the bytes of the tensors follow each other and fill the rest of the file exactly.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, MAX_HEADER):
        if (kind := file_kinds.by_content(file)) not in ("", "safetensors"):
            raise UserError(f"{path}: not safetensors, but {kind}; {AGAIN}")
        raise UserError(f"{path}: not safetensors, or truncated ({size} bytes, a header of {length}); {AGAIN}")
    try:
        plain = json.loads(file.read(length).decode(), object_pairs_hook=_distinct)
        if not isinstance(plain.pop("__metadata__", {}), dict):
            raise ValueError("metadata that are no dictionary")
        found, spans = {}, []
        for name, entry in plain.items():
            dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            # NumPy allows 64 axes, and the product of many long numbers would take minutes.
            sound = isinstance(dtype, str) and len(shape) <= 64 and all(type(n) is int and 0 <= n < 2**63 for n in (*shape, start, end))
            width = FLOATS[dtype].itemsize if sound and dtype in FLOATS else 0
            if not sound or start > end or (width and width * math.prod(shape) != end - start):
                raise ValueError(f"type, shape and bytes of tensor {printable(name, 100)} do not agree")
            found[name] = Tensor(dtype, tuple(shape), functools.partial(_content, path, file, 8 + length + start, dtype, tuple(shape)))
            spans.append((start, end))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: a damaged header ({said(error)}); {AGAIN}") from None
    total = sum(end - start for start, end in spans)
    if total != size - 8 - length:
        raise UserError(f"{path}: truncated or damaged: {size - 8 - length} bytes of tensors, not {total}; {AGAIN}")
    reached = 0
    for start, end in sorted(spans):
        if start != reached:
            raise UserError(f"{path}: damaged: bytes {min(start, reached)} to {max(start, reached)} belong to no tensor or to two; {AGAIN}")
        reached = end
    return found


def said_of(path: pathlib.Path | str) -> Any:
    """What a sound safetensors file says of itself under `METADATA`; None if it is no such file, or says nothing that is JSON."""
    if not str(path).endswith(".safetensors"):
        return None
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError), files.opened(path) as file:
        return json.loads(json.loads(file.read(int.from_bytes(file.read(8), "little")))["__metadata__"][METADATA])
    return None


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice")
    return found


def _content(path: pathlib.Path | str, file: IO[bytes], start: int, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    file.seek(start)
    count = math.prod(shape)
    raw = file.read(count * FLOATS[dtype].itemsize)
    if len(raw) != count * FLOATS[dtype].itemsize:  # the file has shrunk since it was opened
        raise UserError(f"{path}: truncated while it was read; {AGAIN}")
    array = np.frombuffer(raw, FLOATS[dtype]).reshape(shape)
    return (array.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else array.astype(np.float32)
