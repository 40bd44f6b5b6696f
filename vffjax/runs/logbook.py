"""The record that a run writes while it trains: metrics.jsonl, TensorBoard events, and progress on the terminal.

If metrics.jsonl cannot be written, that is an `OSError`. If TensorBoard, the progress bar or the terminal fails, the training goes on
without it.
"""

import contextlib
import io
import json
import math
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

from vffjax.errors import SafeStream, notice
from vffjax.files import as_json, dumps, flush_to_disk, nulls, replace_file
from vffjax.runs.tensorboard import Events

METRICS = "metrics.jsonl"
SECONDS = 60.0  # between two lines about the progress within an epoch, if there is no terminal


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

        self._bar = tqdm.tqdm(total=self._total, initial=first_epoch, file=self._stream, unit="epoch", dynamic_ncols=True)

    def _move_bar(self, epochs: float, *parts: str) -> None:
        if parts:
            self._bar.set_postfix_str(", ".join(parts), refresh=False)
        self._bar.n = epochs
        self._bar.refresh()

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._with_bar(self._bar.close)

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
            self._with_bar(lambda: self._move_bar(record["epoch"], *_bar_parts(record)))
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
            self._with_bar(lambda: self._move_bar(round(epoch + done / steps, 2)))
        elif time.monotonic() - self._told > SECONDS and done < steps:
            self._told = time.monotonic()
            print(f"epoch {epoch + 1:{len(str(self._total))}d}/{self._total}  step {done}/{steps}", file=self._stream, flush=True)

    def phase(self, name: str) -> None:
        """Shows on a terminal what the run is doing now, such as compiling."""
        if self._bar is not None:
            self._with_bar(lambda: self._bar.set_description_str(name))


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
    """What the progress bar says of an epoch. It is narrow, so it shows the training accuracy only if there is no validation error."""
    return _parts(record, record.get("val_error") is None)


def _parts(record: dict[str, Any], with_train: bool, groups: str = "") -> list[str]:
    train = _shown(record, "train_accuracy", "train {:.1f} %", 100) if with_train else []
    errors = [error + groups for error in _shown(record, "val_error", "val error {:.2f} %")]
    first = [*_shown(record, "group", "group {}"), *_shown(record, "loss", "loss {:.3f}")]
    return [*first, *train, *errors, *_shown(record, "images_per_second", "{:,.0f} images/s")]


def _shown(record: dict[str, Any], key: str, form: str, scale: int = 1) -> list[str]:
    """One entry of a record in words; none if it is missing or None."""
    return [] if record.get(key) is None else [form.format(scale * record[key])]
