"""What a run leaves behind while it trains: metrics.jsonl, TensorBoard events, progress on the terminal.

All of it runs on the host and holds NumPy values only. An unwritable workdir raises `OSError`. A failure of TensorBoard, of the progress
bar or of the terminal costs nothing but itself.
"""

import contextlib
import json
import math
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from vffjax.errors import SafeStream, notice
from vffjax.files import _nulls, as_json, dumps, flush_to_disk, replace_file
from vffjax.runs.tensorboard import Events

METRICS = "metrics.jsonl"
SECONDS = 60.0  # between two lines that tell how far an epoch is, where there is no terminal


class Logbook:
    """Writes a workdir's record: metrics.jsonl, TensorBoard events if tensorboardX is installed, progress on the terminal.

    Records count epochs from 1; `first_epoch` is the number of epochs already finished, whose lines `restore_metrics` has left.
    """

    def __init__(self, workdir: pathlib.Path, total_epochs: int, first_epoch: int = 0, stream: TextIO | None = None):
        workdir = pathlib.Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        # Not a default argument: sys.stderr may have been replaced since the import.
        self._stream = SafeStream(sys.stderr if stream is None else stream)
        self._total = total_epochs
        self._bar: Any = None
        self._told = time.monotonic()
        with contextlib.ExitStack() as stack:
            self._metrics = stack.enter_context(open(workdir / METRICS, "ab"))
            self._tensorboard = Events(workdir / "tensorboard", first_epoch)
            stack.callback(self._tensorboard.close)
            if self._stream.isatty():
                self._with_bar(lambda: self._open_bar(first_epoch))
                stack.callback(self._close_bar)
            self._open = stack.pop_all()

    def _open_bar(self, first_epoch: int) -> None:
        import tqdm  # not earlier: it reads settings of its own from the environment, and fails where it cannot

        self._bar = tqdm.tqdm(total=self._total, initial=first_epoch, file=self._stream, unit="epoch", dynamic_ncols=True)

    def _move_bar(self, record: dict[str, Any]) -> None:
        self._bar.set_postfix_str(", ".join(_bar_parts(record)), refresh=False)
        self._bar.n = record["epoch"]
        self._bar.refresh()

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._with_bar(self._bar.close)

    def _with_bar(self, action: Callable[[], None]) -> None:
        """If the bar fails, there is none from then on, and epochs are lines."""
        try:
            action()
        except (Exception, SystemExit) as error:
            self._bar = None
            notice(f"the progress bar fails ({type(error).__name__}: {error}); epochs are printed as lines")

    def epoch(self, record: dict[str, Any]) -> dict[str, Any]:
        """Records one finished epoch, and returns what its line holds. `record["epoch"]` is needed, all else may be missing or None."""
        record = as_json(record)
        written = _nulls(record)
        # One write of a whole line: a killed run leaves at most one torn line, the last.
        self._metrics.write(_line(written))
        self._metrics.flush()
        flush_to_disk(self._metrics.fileno(), METRICS)
        self._tensorboard.write(_scalars(record), record["epoch"])
        if self._bar is not None:
            self._with_bar(lambda: self._move_bar(record))
        if self._bar is None:
            self._told = time.monotonic()
            head = f"epoch {record['epoch']:{len(str(self._total))}d}/{self._total}"
            print("  ".join([head, *_line_parts(record)]), file=self._stream, flush=True)
        return written

    def step(self, epoch: int, done: int, steps: int) -> None:
        """Shows how far the training is: `done` of the `steps` of an epoch (from 0), not all of which the device need have finished.

        On a terminal the bar moves. Elsewhere a line tells of long epochs, once in `SECONDS`.
        """
        if self._bar is not None:
            self._with_bar(lambda: self._move_within(epoch + done / steps))
        elif time.monotonic() - self._told > SECONDS and done < steps:
            self._told = time.monotonic()
            print(f"epoch {epoch + 1:{len(str(self._total))}d}/{self._total}  step {done}/{steps}", file=self._stream, flush=True)

    def _move_within(self, epochs: float) -> None:
        self._bar.n = round(epochs, 2)
        self._bar.refresh()

    def phase(self, name: str) -> None:
        """Shows on a terminal what the run is doing, such as compiling."""
        if self._bar is not None:
            self._with_bar(lambda: self._bar.set_description_str(name))

    def close(self) -> None:
        """May be called twice."""
        self._open.close()

    def __enter__(self) -> "Logbook":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl, whole lines only; none if there is no such file."""
    try:
        content = (pathlib.Path(workdir) / METRICS).read_bytes()
    except FileNotFoundError:
        return []
    found = []
    # Split on b"\n" alone; what follows the last one is torn or empty.
    for line in content.split(b"\n")[:-1]:
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("epoch"), int):
                found.append(record)
    return found


def restore_metrics(workdir: pathlib.Path, history: Sequence[dict[str, Any]]) -> None:
    """Makes metrics.jsonl hold exactly these records, as `Logbook.epoch` returned them: no torn, foreign or missing line survives."""
    path, wanted = pathlib.Path(workdir) / METRICS, b"".join(map(_line, history))
    if (path.read_bytes() if path.exists() else b"") != wanted:
        replace_file(path, wanted)


def _line(record: dict[str, Any]) -> bytes:
    return dumps(record).encode() + b"\n"


def _scalars(record: dict[str, Any]) -> list[tuple[str, float]]:
    """TensorBoard's tags: `loss`, and `loss/group0` for the first of `loss_per_group`."""
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
    parts = _parts(record, "group {}", "loss {:.3f}", "train {:.1f} %", "val error {:.2f} %", "{:,.0f} images/s", "{:.1f} s")
    groups = record.get("val_error_per_group") or []
    if len(groups) > 1:
        listed = " ".join("-" if v is None else f"{v:.2f}" for v in groups)
        at = next((i for i, part in enumerate(parts) if part.startswith("val error")), None)
        if at is not None:
            parts[at] += f" (groups {listed})"
    return parts


def _bar_parts(record: dict[str, Any]) -> list[str]:
    # A bar is narrow: the validation error where there is one, else the training accuracy.
    train = "" if record.get("val_error") is not None else "train {:.1f} %"
    return _parts(record, "group {}", "loss {:.3f}", train, "val error {:.2f} %", "{:,.0f} images/s", "")


def _parts(record: dict[str, Any], group: str, loss: str, train: str, val: str, speed: str, seconds: str) -> list[str]:
    accuracy = record.get("train_accuracy")
    shown = [
        (group, record.get("group")),
        (loss, record.get("loss")),
        (train, None if accuracy is None else 100 * accuracy),
        (val, record.get("val_error")),
        (speed, record.get("images_per_second")),
        (seconds, record.get("seconds")),
    ]
    return [form.format(value) for form, value in shown if form and value is not None]
