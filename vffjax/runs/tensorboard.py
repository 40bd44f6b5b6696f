"""TensorBoard events of a run, if tensorboardX is installed. They are an aid: if they fail, one line on stderr is all that happens."""

import contextlib
import pathlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

from vffjax.errors import notice

# Writing an epoch's scalars takes far less. The limit is needed because tensorboardX waits for its thread, which may have died, for example
# of a full disk.
SECONDS = 30.0


class Events:
    """Writes scalars of each epoch into a folder. After the first failure it writes nothing more."""

    def __init__(self, folder: pathlib.Path, first_epoch: int):
        self._writer: Any = None
        self._is_own: Callable[[threading.Thread], bool] = lambda thread: False
        self._other_hook: Any = None
        self._failed = False
        try:
            self._open(folder, first_epoch)
        except (Exception, SystemExit) as error:
            self._fail(error)

    def _open(self, folder: pathlib.Path, first_epoch: int) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ModuleNotFoundError as error:
            if error.name != "tensorboardX":
                raise
            return
        others = set(threading.enumerate())
        self._is_own = lambda thread: thread not in others  # until all of its threads are known; one may die at once
        self._other_hook, threading.excepthook = threading.excepthook, self._thread_died
        # Later events are purged even if the run starts anew, because an earlier run may have died before its first checkpoint. The suffix
        # is needed because tensorboardX names files by the second: a run that goes on within one second would overwrite its own file.
        self._writer = SummaryWriter(str(folder), purge_step=first_epoch + 1, filename_suffix=f".from{first_epoch + 1}")
        own = set(threading.enumerate()) - others
        self._is_own = own.__contains__

    def _thread_died(self, failure: Any) -> None:
        """Reports a thread of tensorboardX that has died by one line, in place of Python's traceback."""
        if self._is_own(failure.thread):
            self._fail(failure.exc_value)
        else:
            self._other_hook(failure)

    def write(self, scalars: Sequence[tuple[str, float]], epoch: int) -> None:
        """Writes tagged scalars of an epoch, and flushes them."""
        writer = self._writer

        def add() -> None:
            for tag, value in scalars:
                writer.add_scalar(tag, value, epoch)
            writer.flush()

        if writer is not None:
            self._limited(add)

    def close(self) -> None:
        """Closes the file. May be called twice."""
        writer, self._writer = self._writer, None
        if writer is not None:
            self._limited(writer.close)
        if threading.excepthook == self._thread_died:
            threading.excepthook = self._other_hook

    def _limited(self, function: Callable[[], None]) -> None:
        """Calls a function in a thread, and waits at most `SECONDS` for it."""
        failures: list[BaseException] = []

        def attempt() -> None:
            try:
                function()
            except (Exception, SystemExit) as error:
                failures.append(error)

        thread = threading.Thread(target=attempt, daemon=True)
        thread.start()
        thread.join(SECONDS)
        if failures:
            self._fail(failures[0])
        elif thread.is_alive():
            self._fail(TimeoutError(f"no answer within {SECONDS:g} s"))

    def _fail(self, error: BaseException) -> None:
        if self._failed:
            return
        self._failed = True
        notice(f"TensorBoard fails ({type(error).__name__}: {error}); the training goes on without its events")
        writer, self._writer = self._writer, None
        if writer is not None:  # try to close the file, without waiting for that

            def give_up() -> None:
                with contextlib.suppress(Exception):
                    writer.close()

            threading.Thread(target=give_up, daemon=True).start()
