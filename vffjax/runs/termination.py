"""SIGTERM and Ctrl-C. The work runs in a thread of its own, so that the main thread can answer a signal at any instant.

Python serves signals in its main thread alone, and between two of its own instructions: a main thread that compiles, or waits for the
device, would answer after that. SIGTERM is what a cluster sends before it takes a machine away.
"""

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
# Settings of JAX that a `with` statement of the caller changes for its own thread.
_OF_THREAD = (
    *("default_device", "default_matmul_precision", "debug_nans", "debug_infs", "enable_x64", "numpy_dtype_promotion"),
    *("numpy_rank_promotion", "enable_custom_prng", "transfer_guard", "disable_jit"),
)


class Terminated(Exception):
    """The run was told to leave, and has: the message says what is saved."""


NOTHING = "nothing is saved yet; the same command begins anew"
KEPT = "what was saved before is kept; the same command goes on from there"


class Request:
    """What the signals ask of one run, and what the run says of itself."""

    def __init__(self) -> None:
        self.made = False  # SIGTERM: save and leave
        self.abandoned = False  # Ctrl-C: nobody waits for the run any more, so end where it can
        self.idle = True  # nothing would be lost if the run ended now
        self.saved = NOTHING  # what is saved already, in words

    @property
    def leave(self) -> bool:
        return self.made or self.abandoned


_running: list[Request] = []
_abandoned: list[threading.Thread] = []


@contextlib.contextmanager
def deferred() -> Iterator[Request]:
    """SIGTERM ends nothing in here: it sets `made`, for the run to look at between two segments."""
    request = Request()
    _running.append(request)
    request.abandoned = threading.current_thread() in _abandoned  # the interrupt came before
    try:
        yield request
    finally:
        _running.remove(request)


def saved() -> str:
    """What the runs of this process have saved, in words; empty if none is running."""
    return "; ".join(request.saved for request in _running)


def interruptible(work: Callable[[], T]) -> T:
    """What `work` returns or raises. It runs in a thread of its own, and this one waits for it and answers signals meanwhile.

    Called in another thread than the main one, it does nothing but call `work`. A `KeyboardInterrupt` is raised here at once; the work
    ends when it next looks at its request, and a later call waits for that.
    """
    if threading.current_thread() is not threading.main_thread():
        return work()
    for thread in list(_abandoned):
        if thread.is_alive():
            notice("the run that was interrupted is ending; waiting for it")
            thread.join()
        _abandoned.remove(thread)
    found: list[T] = []
    problems: list[BaseException] = []
    done = threading.Event()
    settings = _settings_of_this_thread()

    def target() -> None:
        try:
            with _with_settings(settings):
                found.append(work())
        except BaseException as error:
            problems.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=target, name="vffjax")
    with _answering_sigterm():
        try:  # from here on: an interrupt may come while the thread is being started
            thread.start()
            while not done.wait(0.1):  # not for ever at once: on Windows no signal would end that
                if any(request.made and request.idle for request in _running):
                    raise Terminated(saved())  # it compiles, or reads data, and would not look at its request for long
        except BaseException:
            _abandoned.append(thread)  # first: a run that begins in it now is to know
            for request in _running:
                request.abandoned = True
            raise
    thread.join()
    if problems:
        raise problems[0]
    return found[0]


def settle(seconds: float) -> str:
    """Waits for work that was interrupted to end by itself, for so many seconds at the most; returns what is saved then, as `saved`.

    A run that is between two segments clears up after itself meanwhile, and one that saves may come to its end.
    """
    until, words = time.monotonic() + seconds, saved()
    while working() and time.monotonic() < until:
        time.sleep(0.01)
        words = saved() or words
    return words


def working() -> bool:
    """Whether work that was interrupted still goes on."""
    # One that an interrupt met while it was being started has no number yet, and may begin at any moment.
    return any(thread.is_alive() or thread.ident is None for thread in _abandoned)


@contextlib.contextmanager
def _answering_sigterm() -> Iterator[None]:
    """In here SIGTERM asks every run to save and leave. Where none is running it does what it would do otherwise."""
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
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)  # None: a handler that is not Python's


def _settings_of_this_thread() -> dict[str, Any]:
    """JAX's settings as they hold in this thread, by name; none before JAX has been imported."""
    jax: Any = sys.modules.get("jax")
    if not hasattr(jax, "config"):
        return {}
    return {name: getattr(jax.config, f"jax_{name}") for name in _OF_THREAD if hasattr(jax, name) and hasattr(jax.config, f"jax_{name}")}


@contextlib.contextmanager
def _with_settings(settings: dict[str, Any]) -> Iterator[None]:
    """Puts settings of another thread in force in this one, where they differ."""
    here = _settings_of_this_thread()
    with contextlib.ExitStack() as stack:
        for name, value in settings.items():
            if value != here[name]:
                stack.enter_context(getattr(sys.modules["jax"], name)(value))
        yield
