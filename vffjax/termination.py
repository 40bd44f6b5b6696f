"""SIGTERM while a run trains: it is what a cluster sends before it takes a machine away."""

import contextlib
import signal
import threading
from collections.abc import Iterator


class Terminated(Exception):
    """The run was told to leave, and has: the message says what is saved."""


class Request:
    """Whether this process has been told to leave."""

    made = False


@contextlib.contextmanager
def deferred() -> Iterator[Request]:
    """SIGTERM ends nothing in here: it sets `made`, for the run to look at between two epochs. Outside the main thread nothing changes."""
    request = Request()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def note(*_: object) -> None:
        request.made = True

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield request
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)  # None: a handler that is not Python's
