"""TensorBoard events of a run, if tensorboardX is installed. They are an aid: if they fail, one line on stderr is all that happens."""

import contextlib
import pathlib
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vffjax.errors import notice

# Writing an epoch's scalars takes far less. The limit is needed because tensorboardX waits for its thread, which may have died, for example
# of a full disk.
SECONDS = 30.0
# What TensorBoard shows beside the hyper-parameters of a run. Each is the tag of a scalar that a run writes.
METRICS = ("val_error", "test_error", "loss")


class Events:
    """Writes the events of a run into a folder. After the first failure it writes nothing more."""

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

    def describe(self, config: Mapping[str, Any]) -> None:
        """Writes a configuration as text, and as the hyper-parameters by which TensorBoard compares runs."""
        writer = self._writer

        def add() -> None:
            from tensorboardX.summary import hparams

            values = {key: value if isinstance(value, (bool, int, float, str)) else str(value) for key, value in config.items()}
            definition, start, _ = hparams(values, dict.fromkeys(METRICS, 0.0))
            writer.file_writer.add_summary(definition)
            writer.file_writer.add_summary(start)
            # Four spaces begin a block of code in Markdown, in which nothing is markup.
            writer.add_text("config", "\n".join(f"    {key} = {value!r}" for key, value in config.items()))
            writer.flush()

        if writer is not None:
            self._limited(add)

    def finish(self, scalars: Mapping[str, float], pictures: Sequence[pathlib.Path], epoch: int) -> None:
        """Writes the results of a run that has ended after `epoch` epochs: scalars, and those of the PNG files that exist."""
        writer = self._writer

        def add() -> None:
            import numpy as np
            from PIL import Image
            from tensorboardX.summary import hparams

            for tag, value in scalars.items():
                writer.add_scalar(tag, value, epoch)
            for path in filter(pathlib.Path.exists, pictures):
                with Image.open(path) as picture:
                    writer.add_image(path.stem, np.asarray(picture.convert("RGB")), epoch, dataformats="HWC")
            writer.file_writer.add_summary(hparams({}, {})[2])  # that the run has ended
            writer.flush()

        if writer is not None:
            self._limited(add)

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
