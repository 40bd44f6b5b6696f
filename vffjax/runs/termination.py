"""Handles SIGTERM, which a cluster sends before it takes a machine away, and Ctrl-C.

The work runs in a thread of its own, so that the main thread can answer a signal at any instant. Python handles signals in the main thread
only, between two of its instructions. If the main thread were compiling, or waiting for the device, the answer would have to wait as well.
"""

import concurrent.futures
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from vffjax.errors import notice

T = TypeVar("T")
# JAX's settings that a `with` statement changes for the current thread only. The thread that does the work takes them over.
_OF_THREAD = (
    *("default_device", "default_matmul_precision", "debug_nans", "debug_infs", "enable_x64", "numpy_dtype_promotion"),
    *("numpy_rank_promotion", "enable_custom_prng", "transfer_guard", "disable_jit"),
)


class Terminated(Exception):
    """A run was told to leave and has done so. The message says what is saved."""


NOTHING = "nothing of this run is saved yet; the same command begins it anew"
KEPT = "what was saved before is kept; the same command goes on from there"


class Request:
    """What the signals ask of one run, and what the run reports about itself."""

    def __init__(self) -> None:
        self.made = False  # SIGTERM has come: the run shall save and leave
        self.abandoned = False  # Ctrl-C has come: nobody waits for the run any more, and it shall end as soon as it can
        self.idle = True  # nothing would be lost if the run ended now
        self.alone = True  # no other process trains this run; else all end together, when the run itself looks at the request
        self.saved = NOTHING  # what is saved, in words
        self.thread = threading.current_thread()

    @property
    def leave(self) -> bool:
        return self.made or self.abandoned


_running: list[Request] = []
_abandoned: list[threading.Thread] = []


@contextlib.contextmanager
def deferred() -> Iterator[Request]:
    """Within, SIGTERM ends nothing but sets the request's `made`, which the run reads between two segments."""
    request = Request()
    request.made = any(other.made for other in _running if other.thread is request.thread)  # that of the sweep whose run this is
    _running.append(request)
    request.abandoned = abandoned()  # Ctrl-C may have come before
    try:
        yield request
    finally:
        _running.remove(request)


def saved() -> str:
    """What the runs of this process have saved, in words; empty if none is running."""
    return "; ".join(request.saved for request in _running)


def interruptible(work: Callable[[], T]) -> T:
    """Runs `work` in a thread of its own, while this thread answers signals; returns or raises what `work` does.

    In another thread than the main one, `work` is simply called. Ctrl-C raises `KeyboardInterrupt` here at once. The work itself ends when
    it next looks at its request, and a later call of this function waits for that.
    """
    if threading.current_thread() is not threading.main_thread():
        return work()
    for thread in list(_abandoned):
        if thread.is_alive():
            notice("the run that was interrupted is ending; waiting for it")
            thread.join()
        _abandoned.remove(thread)
    found: concurrent.futures.Future[T] = concurrent.futures.Future()
    done = threading.Event()
    settings = _settings_of_this_thread()

    def target() -> None:
        try:
            with _with_settings(settings):
                found.set_result(work())
        except BaseException as error:
            found.set_exception(error)
        finally:
            done.set()

    thread = threading.Thread(target=target, name="vffjax")
    with _answering_sigterm():
        try:  # around the start too, because Ctrl-C may come during it
            thread.start()
            while not done.wait(0.1):  # with a timeout, because on Windows no signal would end the wait
                if any(request.made and request.idle and request.alone for request in _running):
                    raise Terminated(saved())  # it compiles or reads data, and may not look at its request for a long time
        except BaseException:
            _abandoned.append(thread)  # first, so that a run which begins in it just now knows
            for request in _running:
                request.abandoned = True
            raise
    thread.join()
    return found.result()


def abandoned() -> bool:
    """Whether the work of this thread was interrupted, so that another thread says what is saved."""
    return threading.current_thread() in _abandoned


def settle(seconds: float) -> str:
    """Waits at most so many seconds for interrupted work to end by itself; returns what is saved then, in words, as `saved`.

    In this time a run between two segments can clean up, and one that is saving may finish.
    """
    until, words = time.monotonic() + seconds, saved()
    while working() and time.monotonic() < until:
        time.sleep(0.01)
        words = saved() or words
    return words


def working() -> bool:
    """Whether interrupted work is still going on."""
    # A thread that was interrupted while it was being started has no number yet, and may begin at any moment.
    return any(thread.is_alive() or thread.ident is None for thread in _abandoned)


@contextlib.contextmanager
def _answering_sigterm() -> Iterator[None]:
    """Within, SIGTERM asks every run to save and leave. If none is running it has its usual effect."""
    before = signal.getsignal(signal.SIGTERM)

    def answer(number: int, frame: Any) -> None:
        for request in _running:
            request.made = True
        if not _running:
            if callable(before):
                before(number, frame)
            elif before != signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, answer)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)  # None stands for a handler that Python did not install


def _settings_of_this_thread() -> dict[str, Any]:
    """JAX's settings that hold in this thread, by name; none if JAX has not been imported."""
    jax: Any = sys.modules.get("jax")
    if not hasattr(jax, "config"):
        return {}
    return {name: getattr(jax.config, f"jax_{name}") for name in _OF_THREAD if hasattr(jax, name) and hasattr(jax.config, f"jax_{name}")}


@contextlib.contextmanager
def _with_settings(settings: dict[str, Any]) -> Iterator[None]:
    """Within, the settings of another thread hold in this one."""
    here = _settings_of_this_thread()
    with contextlib.ExitStack() as stack:
        for name, value in settings.items():
            if value != here[name]:
                stack.enter_context(getattr(sys.modules["jax"], name)(value))
        yield
