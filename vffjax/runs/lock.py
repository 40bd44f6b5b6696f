"""A lock on an open file that is the kernel's: it goes with its process, however that ends."""

from typing import Any

try:
    import fcntl
except ImportError:  # Windows, whose kernel locks bytes of a file
    fcntl = None  # type: ignore[assignment]
    import msvcrt
else:
    msvcrt: Any = None  # type: ignore[no-redef]


def take(file: Any) -> bool:
    """Takes the lock for as long as the file is open; False if another process, or another opening of the file, has it.

    Raises `OSError` where the file system cannot lock.
    """
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            file.seek(0)  # all lock the same byte, which need not exist
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError):  # EAGAIN or EWOULDBLOCK; EACCES is what Windows and some network file systems say
        return False
    return True
