"""Files written in one step and flushed to disk, JSON in and out, and digests."""

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import pathlib
from typing import Any

from vffjax.errors import notice


def write_json(path: pathlib.Path, value: Any) -> None:
    """Strict JSON (NaN and infinity become null), keys in their order. A reader sees the old file or the new one."""
    replace_file(path, dumps(value, indent=2).encode() + b"\n")


def read_json(path: pathlib.Path) -> Any:
    """The content of a JSON file. Raises `OSError` as `opened` does, or `ValueError`."""
    try:
        return json.loads(read_bytes(path))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def opened(path: pathlib.Path | str) -> io.BufferedReader:
    """Opens a file for reading. Raises `OSError`, also for a folder, a pipe or a device: reading a pipe can wait for ever."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(errno.EINVAL, "not a file", str(path))
    return open(path, "rb")


def read_bytes(path: pathlib.Path | str, most: int | None = None) -> bytes:
    """The content of a file. Raises `OSError` as `opened` does, and for a file of more than `most` bytes."""
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        if most is not None and size > most:
            raise OSError(errno.EFBIG, f"{size} bytes, where at most {most} are read", str(path))
        return file.read()


def replace_file(path: pathlib.Path, content: bytes) -> None:
    """Writes a temporary file in the same folder, then moves it over `path`."""
    path = pathlib.Path(path)
    # A fixed name, so that a killed run leaves one stray file at most.
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            flush_to_disk(file.fileno(), path)
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException:
        # The first error is the one to report.
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


# How file systems say that they cannot do this at all. Others, such as EIO or ENOSPC, say that something has been lost.
_CANNOT = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTTY}


def sync(path: pathlib.Path) -> bool:
    """Returns when a file, or a folder's list of names, is on disk: True; False if the file system cannot say so, of which one line on
    stderr tells. Raises `OSError` if something has been lost."""
    folder = path.is_dir()
    if folder and os.name == "nt":  # Windows opens no folders
        return True
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        if not folder or error.errno not in _CANNOT:
            raise
        _cannot_flush(path, error)
        return False
    try:
        return flush_to_disk(descriptor, path)
    finally:
        os.close(descriptor)


def flush_to_disk(descriptor: int, path: pathlib.Path | str) -> bool:
    """`os.fsync`, for an open file of this path; returns and raises as `sync`."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
        _cannot_flush(path, error)
        return False
    return True


_warned: set[str] = set()  # of what one line in a process is enough


def _cannot_flush(path: pathlib.Path | str, error: OSError) -> None:
    if "flush" not in _warned:
        _warned.add("flush")
        notice(f"{path}: this file system cannot flush it to disk ({error.strerror}); a power cut may cost the last epochs")


def as_json(value: Any) -> Any:
    """NumPy (and JAX) scalars and arrays as Python numbers and lists; NaN stays."""
    if isinstance(value, dict):
        return {str(k): as_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(v) for v in value]
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    if isinstance(value, float):
        return float(value)  # np.float64 is a float whose repr json does not use, but f-strings might
    if hasattr(value, "tolist"):
        plain = value.tolist()
        # A type NumPy does not know, such as bfloat16, may come back as itself.
        return as_json(plain) if type(plain) is not type(value) else float(plain)
    return value


def _nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _nulls(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_nulls(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def dumps(value: Any, indent: int | None = None) -> str:
    return json.dumps(_nulls(as_json(value)), indent=indent, allow_nan=False)


def sha256(content: bytes) -> str:
    """The SHA-256 of some bytes, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def sha256_of(path: pathlib.Path | str) -> str:
    """The SHA-256 of a file, in hexadecimal. Raises `OSError` as `opened` does."""
    with opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
