"""Files: read safely, replaced in one step, flushed to disk; JSON in and out; SHA-256 digests."""

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
    """Writes strict JSON: NaN and infinity become null, and keys keep their order. A reader sees the old file or the new one, whole."""
    replace_file(path, dumps(value, indent=2).encode() + b"\n")


def read_json(path: pathlib.Path, most: int | None = None) -> dict[str, Any]:
    """The object in a JSON file. Raises `OSError` as `read_bytes`, and `ValueError` if the content is not JSON, or no object."""
    try:
        found = json.loads(read_bytes(path, most))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    return found


def holds(path: pathlib.Path, key: str, value: Any = None, most: int | None = None) -> bool:
    """Whether a file is a JSON object with this key, and with this value of it, if one is given. At most `most` bytes are read."""
    with contextlib.suppress(OSError, ValueError):
        found = read_json(path, most)
        return key in found and value in (None, found[key])
    return False


def opened(path: pathlib.Path | str) -> io.BufferedReader:
    """Opens a regular file for reading its bytes.

    Raises:
        OSError: the file cannot be opened, or is a folder, a device or a named pipe, which would block until somebody writes to it.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(errno.EINVAL, "not a file", str(path))
    return open(path, "rb")


def read_bytes(path: pathlib.Path | str, most: int | None = None) -> bytes:
    """The content of a file. Raises `OSError` as `opened`, and also if the file has more than `most` bytes."""
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        if most is not None and size > most:
            raise OSError(errno.EFBIG, f"{size} bytes, where at most {most} are read", str(path))
        return file.read()


def replace_file(path: pathlib.Path, content: bytes) -> None:
    """Writes a file in one step: to a temporary file in the same folder, which is flushed to disk and then renamed to `path`."""
    path = pathlib.Path(path)
    # A fixed name, so that a run which is killed here leaves at most one stray file.
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.unlink(missing_ok=True)  # it may be a link that somebody planted, and what that leads to is not ours
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            flush_to_disk(file.fileno(), path)
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException:
        # The error that is already being raised is the one to report.
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


# The errors by which a file system says that it cannot flush at all. Any other, such as EIO or ENOSPC, means that data have been lost.
_CANNOT = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTTY}


def sync(path: pathlib.Path) -> bool:
    """Flushes a file, or a folder's list of names, to disk.

    Returns:
        True once it is on disk. False if the file system cannot flush; the first time this happens, one line on stderr says so.

    Raises:
        OSError: the flush failed, and data may have been lost.
    """
    folder = path.is_dir()
    if folder and os.name == "nt":  # Windows cannot open folders
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
    """Flushes an open file to disk by `os.fsync`; `path` is its name for messages. Returns and raises as `sync`."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
        _cannot_flush(path, error)
        return False
    return True


_warned: set[str] = set()  # warnings that this process has given already


def _cannot_flush(path: pathlib.Path | str, error: OSError) -> None:
    if "flush" not in _warned:
        _warned.add("flush")
        notice(f"{path}: this file system cannot flush it to disk ({error.strerror}); a power cut may cost the last epochs")


def as_json(value: Any) -> Any:
    """`value` in JSON's types: NumPy and JAX scalars and arrays become Python numbers and lists. NaN and infinity stay as they are."""
    if isinstance(value, dict):
        return {str(k): as_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(v) for v in value]
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    if isinstance(value, float):
        return float(value)  # np.float64 is a subclass of float that prints differently in f-strings
    if hasattr(value, "tolist"):
        plain = value.tolist()
        # An extension type such as bfloat16 may return itself.
        return as_json(plain) if type(plain) is not type(value) else float(plain)
    return value


def nulls(value: Any) -> Any:
    """`value`, which is in JSON's types, with None in place of every NaN and infinity, which strict JSON cannot hold."""
    if isinstance(value, dict):
        return {k: nulls(v) for k, v in value.items()}
    if isinstance(value, list):
        return [nulls(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def dumps(value: Any, indent: int | None = None) -> str:
    """Strict JSON of any value that `as_json` converts; NaN and infinity become null."""
    return json.dumps(nulls(as_json(value)), indent=indent, allow_nan=False)


def sha256(content: bytes) -> str:
    """The SHA-256 of some bytes, as 64 hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def sha256_of(path: pathlib.Path | str) -> str:
    """The SHA-256 of a file, as 64 hexadecimal digits. Raises `OSError` as `opened`."""
    with opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
