"""A lock on an open file. The kernel holds it, and releases it when the process ends, however it ends."""

from typing import Any

try:
    import fcntl
except ImportError:  # Windows, where the kernel locks ranges of bytes
    fcntl = None  # type: ignore[assignment]
    import msvcrt
else:
    msvcrt: Any = None  # type: ignore[no-redef]


def take(file: Any) -> bool:
    """Takes the lock of an open file, which is held until the file is closed.

    Returns:
        Whether it was taken. It is not if another process holds it, or if this process does through another open file.

    Raises:
        OSError: the file system has no locks.
    """
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            file.seek(0)  # everybody locks the first byte, even of an empty file
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError):  # EAGAIN and EWOULDBLOCK; EACCES on Windows and some network file systems
        return False
    return True
