"""The record that a run writes while it trains: metrics.jsonl, TensorBoard events, and progress on the terminal.

If metrics.jsonl cannot be written, that is an `OSError`. If TensorBoard, the progress bar or the terminal fails, the training goes on
without it.
"""

import contextlib
import io
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

from vffjax.errors import SafeStream, notice
from vffjax.files import as_json, dumps, flush_to_disk, nulls, read_json, replace_file
from vffjax.runs.tensorboard import Events

METRICS = "metrics.jsonl"
SECONDS = 60.0  # between two lines about the progress within an epoch, if there is no terminal
COLUMNS = 80  # of a terminal that does not say how many it has
_NARROWEST = 10  # columns of the bar itself


class Logbook(contextlib.ExitStack):
    """Writes a workdir's record: metrics.jsonl, TensorBoard events if tensorboardX is installed, and progress on the terminal.

    Its context, or `close`, which may be called twice, closes everything.

    Args:
        workdir: the run's folder.
        total_epochs: the number of epochs of the whole run.
        first_epoch: the number of epochs that are finished already; `restore_metrics` has put their lines into metrics.jsonl.
        stream: where progress is shown; default: standard error.
        config: the run's configuration, for TensorBoard; None: it is not written.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        total_epochs: int,
        first_epoch: int = 0,
        stream: TextIO | io.TextIOBase | None = None,
        config: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        workdir = pathlib.Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        # sys.stderr is no default argument, because it may have been replaced since this module was imported.
        self._stream = SafeStream(sys.stderr if stream is None else stream)
        self._total = total_epochs
        self._bar: Any = None
        self._phase, self._now, self._parts = "starting", first_epoch, list[str]()  # what the bar's line says
        self._told = time.monotonic()
        self._metrics = self.enter_context(open(workdir / METRICS, "ab"))  # noqa: SIM115  # closed with the rest
        self._tensorboard = Events(workdir / "tensorboard", first_epoch)
        self.callback(self._tensorboard.close)
        if config is not None:
            self._tensorboard.describe(config)
        if self._stream.isatty():
            self._with_bar(lambda: self._open_bar(first_epoch))
            self.callback(self._close_bar)

    def _open_bar(self, first_epoch: int) -> None:
        import tqdm  # only now: it reads settings from the environment, and fails on import if they are wrong

        self._bar = tqdm.tqdm(total=self._total, initial=first_epoch, file=self._stream, bar_format=self._line(""), ncols=self._columns())

    def _draw(self, epochs: float) -> None:
        """Draws the bar's line anew. `epochs` are those that are done, with the share of the present one."""
        self._bar.n = epochs
        self._bar.ncols = self._columns()  # the window may have been resized
        self._bar.bar_format = self._line("{elapsed} in all" if epochs >= self._total else "{remaining} left")
        self._bar.refresh()

    def _line(self, end: str) -> str:
        """The bar's line as a format of tqdm. What does not fit into the terminal is left out, so that nothing is cut in the middle."""
        head = f"{self._phase:10s} {self._now:{len(str(self._total))}d}/{self._total} "
        room, shown = self._columns() - len(head) - _NARROWEST - len("|| 00:00 in all"), ""
        for part in self._parts:
            if len(shown) + len(part) + 2 > room:
                break
            shown += f"{part}, "
        return f"{head}|{{bar}}| {shown}{end}"

    def _columns(self) -> int:
        """The columns of the terminal but the last, where some terminals break the line."""
        found = 0
        with contextlib.suppress(Exception):  # the stream may be any object
            found = os.get_terminal_size(self._stream.fileno()).columns
        return (found or COLUMNS) - 1

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._with_bar(self._end_bar)

    def _end_bar(self) -> None:
        if self._bar.n >= self._total:
            self._phase = "trained"
            self._draw(self._bar.n)
        self._bar.close()

    def _with_bar(self, action: Callable[[], None]) -> None:
        """Does something with the progress bar. If that fails, there is no bar from then on, and epochs are printed as lines."""
        try:
            action()
        except (Exception, SystemExit) as error:
            self._bar = None
            notice(f"the progress bar fails ({type(error).__name__}: {error}); epochs are printed as lines")

    def epoch(self, record: dict[str, Any]) -> dict[str, Any]:
        """Records one finished epoch, and returns what its line in metrics.jsonl holds.

        `record["epoch"]`, which counts from 1, is needed. Everything else may be missing or None.
        """
        record = as_json(record)
        written = nulls(record)
        # A whole line is one write, so that only the last line of a killed run can be torn.
        self._metrics.write(_line(written))
        self._metrics.flush()
        flush_to_disk(self._metrics.fileno(), METRICS)
        self._tensorboard.write(_scalars(record), record["epoch"])
        if self._bar is not None:
            self._parts, self._now = _bar_parts(record), record["epoch"]
            self._with_bar(lambda: self._draw(record["epoch"]))
        if self._bar is None:
            self._told = time.monotonic()
            head = f"epoch {record['epoch']:{len(str(self._total))}d}/{self._total}"
            print("  ".join([head, *_line_parts(record)]), file=self._stream, flush=True)
        return written

    def step(self, epoch: int, done: int, steps: int) -> None:
        """Shows the progress within an epoch: on a terminal by the bar, elsewhere by a line every `SECONDS` seconds.

        Args:
            epoch: the epoch, from 0.
            done: how many of its steps are dispatched; the device may not have finished all of them.
            steps: how many steps it has.
        """
        if self._bar is not None:
            self._now = epoch + 1
            self._with_bar(lambda: self._draw(epoch + done / steps))
        elif time.monotonic() - self._told > SECONDS and done < steps:
            self._told = time.monotonic()
            print(f"epoch {epoch + 1:{len(str(self._total))}d}/{self._total}  step {done}/{steps}", file=self._stream, flush=True)

    def phase(self, name: str) -> None:
        """Shows on a terminal what the run is doing now, such as compiling. The time that is left is reckoned from when it first trains."""
        if self._bar is None:
            return
        if name == "training":
            self._now = int(self._bar.n) + 1
            if self._bar.n == self._bar.initial:
                self._bar.start_t = self._bar.last_print_t = time.time()
        self._phase = name
        self._with_bar(lambda: self._draw(self._bar.n))


class Silent(contextlib.ExitStack):
    """Stands for the `Logbook` where another process writes the record of the run. It writes and shows nothing."""

    def epoch(self, record: dict[str, Any]) -> dict[str, Any]:
        """What `Logbook.epoch` returns."""
        return nulls(as_json(record))

    def step(self, epoch: int, done: int, steps: int) -> None:
        """Nothing."""

    def phase(self, name: str) -> None:
        """Nothing."""


def read_metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The records of a workdir's metrics.jsonl; none if there is no such file. Torn and foreign lines are skipped."""
    try:
        content = (pathlib.Path(workdir) / METRICS).read_bytes()
    except FileNotFoundError:
        return []
    found = []
    # What follows the last newline is a torn line, or empty.
    for line in content.split(b"\n")[:-1]:
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("epoch"), int):
                found.append(record)
    return found


def finished(workdir: pathlib.Path) -> dict[str, Any] | None:
    """What summary.json of a run holds; None if the run has not ended. A run that lost epochs trains them again, and has not ended then."""
    with contextlib.suppress(OSError, ValueError):
        summary = read_json(workdir / "summary.json")
        total = summary.get("epochs")
        return summary if isinstance(total, int) and len(read_metrics(workdir)) >= total else None
    return None


def restore_metrics(workdir: pathlib.Path, history: Sequence[dict[str, Any]]) -> None:
    """Makes metrics.jsonl hold exactly these records, which `Logbook.epoch` has returned; torn, foreign and missing lines are repaired."""
    path, wanted = pathlib.Path(workdir) / METRICS, b"".join(map(_line, history))
    if (path.read_bytes() if path.exists() else b"") != wanted:
        replace_file(path, wanted)


def _line(record: dict[str, Any]) -> bytes:
    return dumps(record).encode() + b"\n"


def _scalars(record: dict[str, Any]) -> list[tuple[str, float]]:
    """The finite numbers of a record with their TensorBoard tags: `loss`, and `loss/group0` for the first of `loss_per_group`."""
    tagged = []
    for key, value in record.items():
        if key in ("epoch", "group"):
            continue
        if key.endswith("_per_group") and value is not None:
            tagged += [(f"{key.removesuffix('_per_group')}/group{i}", v) for i, v in enumerate(value)]
        else:
            tagged.append((key, value))
    return [(tag, float(v)) for tag, v in tagged if isinstance(v, (int, float)) and math.isfinite(v)]


def _line_parts(record: dict[str, Any]) -> list[str]:
    """What a line on the terminal says of an epoch."""
    groups = record.get("val_error_per_group") or []
    listed = " ".join("-" if v is None else f"{v:.2f}" for v in groups)
    return [*_parts(record, True, f" (groups {listed})" if len(groups) > 1 else ""), *_shown(record, "seconds", "{:.1f} s")]


def _bar_parts(record: dict[str, Any]) -> list[str]:
    """What the progress bar says of an epoch. It is narrow, so it shows the training error only if there is no validation error."""
    return _parts(record, record.get("val_error") is None)


def _parts(record: dict[str, Any], with_train: bool, groups: str = "") -> list[str]:
    accuracy = record.get("train_accuracy")
    train = [f"train error {100 * (1 - accuracy):.1f} %"] if with_train and accuracy is not None else []
    errors = [error + groups for error in _shown(record, "val_error", "val error {:.2f} %")]
    first = [*_shown(record, "group", "group {}"), *_shown(record, "loss", "loss {:.3f}")]
    return [*first, *train, *errors, *_shown(record, "images_per_second", "{:,.0f} images/s")]


def _shown(record: dict[str, Any], key: str, form: str) -> list[str]:
    """One entry of a record in words; none if it is missing or None."""
    return [] if record.get(key) is None else [form.format(record[key])]
