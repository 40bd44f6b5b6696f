"""The record of a run on disk and on the terminal."""

import fcntl
import io
import json
import os
import pty
import re
import select
import struct
import sys
import termios

import numpy as np
import pytest

from vffjax import files
from vffjax.files import write_json
from vffjax.runs.logbook import Logbook, read_metrics, restore_metrics

RECORD = {
    "epoch": 3,
    "loss": 1.234,
    "loss_per_group": [0.6, 0.634],
    "train_accuracy": 0.921,
    "train_accuracy_per_group": [0.9, 0.92],
    "val_error": 4.2,
    "val_error_per_group": [5.0, 4.3],
    "images_per_second": 2345.6,
    "seconds": 1.9,
}


class FakeTerminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def write(tmp_path, no_tensorboard):
    """Records epochs `first + 1` to `last` and returns what was printed."""

    def run(first, last, total=10, **fields):
        stream = io.StringIO()
        restore_metrics(tmp_path, [record for record in read_metrics(tmp_path) if record["epoch"] <= first])
        with Logbook(tmp_path, total, first, stream) as book:
            for epoch in range(first + 1, last + 1):
                book.epoch({"epoch": epoch, "loss": 1.0 / epoch, **fields})
        return stream.getvalue()

    return run


def epochs(workdir):
    return [record["epoch"] for record in read_metrics(workdir)]


def no_constants(name):
    raise AssertionError(f"{name} is no strict JSON")


# --- metrics.jsonl


def test_one_line_per_epoch_reads_back(tmp_path, no_tensorboard):
    with Logbook(tmp_path / "new" / "workdir", 10, 2, io.StringIO()) as book:
        book.epoch(RECORD)
        # On disk before the next epoch starts, not only at close.
        assert read_metrics(tmp_path / "new" / "workdir") == [RECORD]
    assert (tmp_path / "new" / "workdir" / "metrics.jsonl").read_bytes().count(b"\n") == 1


def test_each_line_is_synced(tmp_path, no_tensorboard, monkeypatch):
    synced = []
    monkeypatch.setattr(files.os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size))
    with Logbook(tmp_path, 2, 0, io.StringIO()) as book:
        book.epoch({"epoch": 1})
        book.epoch({"epoch": 2})
    # The whole line had reached the file when it was synced.
    assert synced == [len(b'{"epoch": 1}\n'), 2 * len(b'{"epoch": 1}\n')]


def test_resume_drops_epochs_that_run_again(tmp_path, write):
    write(0, 5)
    write(3, 4, seconds=7.0)
    records = read_metrics(tmp_path)
    assert [r["epoch"] for r in records] == [1, 2, 3, 4]
    assert ["seconds" in r for r in records] == [False, False, False, True]


def test_fresh_start_drops_everything(tmp_path, write):
    write(0, 5)
    write(0, 1)
    assert epochs(tmp_path) == [1]


DAMAGE = {
    "a line is gone": lambda lines: lines[:1] + lines[2:],
    "a line is there twice": lambda lines: lines[:2] + lines[1:],
    "a figure is another": lambda lines: [lines[0].replace(b"1.0", b"9.0"), *lines[1:]],
    "lines have changed places": lambda lines: lines[::-1],
    "nothing is left": lambda lines: [],
}


@pytest.mark.parametrize("damage", [*DAMAGE.values(), None], ids=[*DAMAGE, "no file is left"])
def test_the_record_is_restored_to_what_was_written(damage, tmp_path, no_tensorboard):
    with Logbook(tmp_path, 3, 0, io.StringIO()) as book:
        history = [book.epoch({"epoch": epoch, "loss": 1.0 / epoch, "seconds": np.float32(0.1)}) for epoch in (1, 2, 3)]
    path = tmp_path / "metrics.jsonl"
    before = path.read_bytes()
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(b"".join(damage(before.splitlines(keepends=True))))
        assert path.read_bytes() != before
    restore_metrics(tmp_path, history)
    assert path.read_bytes() == before


@pytest.mark.parametrize("torn", [b'{"epoch": 3, "lo', b'{"epoch": 3, "loss": 0.5}', b"\x00\x00\x00", b'{"epoch": 3, "loss": \xff'])
def test_torn_last_line(tmp_path, write, torn):
    write(0, 2)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + torn)
    assert epochs(tmp_path) == [1, 2]
    write(3, 4)
    assert epochs(tmp_path) == [1, 2, 4]
    assert path.read_bytes().count(b"\n") == 3
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_foreign_lines_are_dropped(tmp_path, write):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"epoch": 1}\nnot json\n[1]\n{"loss": 1}\n{"epoch": 2}\n')
    assert epochs(tmp_path) == [1, 2]
    write(2, 3)
    assert epochs(tmp_path) == [1, 2, 3]
    assert b"not json" not in (tmp_path / "metrics.jsonl").read_bytes()


def test_failed_rewrite_keeps_the_old_file(tmp_path, write, monkeypatch):
    write(0, 5)
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def fail(source, target):
        raise OSError("no")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OSError, match="no"):
        write(2, 3)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_no_metrics_yet(tmp_path):
    assert read_metrics(tmp_path) == []


def test_not_finite_becomes_null(tmp_path, no_tensorboard):
    stream = io.StringIO()
    with Logbook(tmp_path, 1, 0, stream) as book:
        book.epoch(
            {
                "epoch": np.int64(1),
                "loss": float("nan"),
                "loss_per_group": np.array([np.inf, 0.5], np.float32),
                "val_error": np.float32("-inf"),
            }
        )
    record = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=no_constants)
    assert record == {"epoch": 1, "loss": None, "loss_per_group": [None, 0.5], "val_error": None}
    assert "loss nan" in stream.getvalue()


# --- write_json


def test_write_json(tmp_path):
    value = {"b": np.float32(0.5), "a": [1, float("nan")], "c": {"x": np.arange(2), "y": True, "z": None}, "d": (1, "é")}
    write_json(tmp_path / "x.json", value)
    text = (tmp_path / "x.json").read_text()
    back = json.loads(text, parse_constant=no_constants)
    assert back == {"b": 0.5, "a": [1, None], "c": {"x": [0, 1], "y": True, "z": None}, "d": [1, "é"]}
    assert list(back) == ["b", "a", "c", "d"]
    assert text.startswith('{\n  "b": 0.5,\n') and text.endswith("}\n")


@pytest.mark.parametrize("broken", ["value", "disk"])
def test_write_json_is_atomic(tmp_path, monkeypatch, broken):
    path = tmp_path / "x.json"
    write_json(path, {"old": 1})

    def full(fd):
        raise OSError("disk full")

    if broken == "disk":
        monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises((TypeError, OSError)):
        write_json(path, {"new": object() if broken == "value" else 2})
    assert json.loads(path.read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


# --- the terminal


def test_line(tmp_path, no_tensorboard):
    stream = io.StringIO()
    with Logbook(tmp_path, 10, 2, stream) as book:
        book.epoch(RECORD)
        book.epoch(
            {"epoch": 10, "group": 1, "loss": 0.5, "val_error": None, "val_error_per_group": None, "images_per_second": np.float32(999)}
        )
        book.epoch({"epoch": 10, "val_error": 1.0, "val_error_per_group": [1.0]})
        book.epoch({"epoch": 10, "val_error": 1.0, "val_error_per_group": [1.0, None]})
    assert stream.getvalue().splitlines() == [
        "epoch  3/10  loss 1.234  train error 7.9 %  val error 4.20 % (groups 5.00 4.30)  2,346 images/s  1.9 s",
        "epoch 10/10  group 1  loss 0.500  999 images/s",
        "epoch 10/10  val error 1.00 %",
        "epoch 10/10  val error 1.00 % (groups 1.00 -)",
    ]


def test_default_stream_is_the_present_stderr(tmp_path, no_tensorboard, capsys):
    with Logbook(tmp_path, 1) as book:
        book.epoch({"epoch": 1, "loss": 2.0})
    captured = capsys.readouterr()
    assert captured.err == "epoch 1/1  loss 2.000\n"
    assert captured.out == ""


def test_bar(tmp_path, no_tensorboard):
    stream = FakeTerminal()

    def shown():
        return stream.getvalue().split("\r")[-1].rstrip()

    with Logbook(tmp_path, 10, 2, stream) as book:
        book.phase("compiling")
        assert shown().startswith("compiling   2/10 |") and shown().endswith("| ? left")
        book.phase("training")
        book.step(2, 1, 2)
        assert shown().startswith("training    3/10 |") and shown().endswith(" left")
        book.epoch(RECORD)
        assert re.fullmatch(r"training    3/10 \|.{10,}\| loss 1.234, val error 4.20 %, \d\d:\d\d left", shown())
        book.phase("training")
        assert shown().startswith("training    4/10 |")
        book.epoch({"epoch": 4, "loss": 1.0, "train_accuracy": 0.5})
        assert "loss 1.000, train error 50.0 %" in shown()
        assert "val error" not in shown()
        book.epoch({"epoch": 10, "loss": 0.5})
    assert re.fullmatch(r"trained    10/10 \|#+\| loss 0.500, \d\d:\d\d in all", shown())
    assert stream.getvalue().endswith("\n")
    assert {len(line) for line in stream.getvalue().split("\r") if line.strip()} <= {79, 80}  # the last has a line feed
    assert epochs(tmp_path) == [3, 4, 10]


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_the_bar_fits_the_terminal_and_cuts_nothing_in_the_middle(columns, tmp_path, no_tensorboard):
    reader, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    shown = b""
    with open(terminal, "w") as stream:
        with Logbook(tmp_path, 1000, 0, stream) as book:
            book.epoch(RECORD | {"group": 3})
        while b"\n" not in shown and select.select([reader], [], [], 10)[0]:  # the kernel hands it on in its own time
            shown += os.read(reader, 65536)
    os.close(reader)
    lines = shown.decode().split("\r")
    assert max(map(len, lines)) < columns
    said = {40: "", 80: "group 3, loss 1.234, ", 120: "group 3, loss 1.234, val error 4.20 %, 2,346 images/s, "}[columns]
    line = next(line for line in lines if "3/1000" in line)
    assert re.fullmatch(rf"starting      3/1000 \|.{{5,}}\| {said}\d\d:\d\d left *", line)


def test_close_twice_and_on_error(tmp_path, no_tensorboard):
    stream = FakeTerminal()
    with pytest.raises(RuntimeError, match="training failed"), Logbook(tmp_path, 2, 0, stream) as book:
        raise RuntimeError("training failed")
    printed = stream.getvalue()
    assert printed.endswith("\n")
    book.close()
    assert stream.getvalue() == printed
    with pytest.raises(ValueError, match="closed"):
        book.epoch({"epoch": 1})


# --- TensorBoard


def test_tensorboard_absent(tmp_path, write):
    assert write(0, 1) == "epoch  1/10  loss 1.000\n"
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


class FakeWriter:
    made: list["FakeWriter"]

    def __init__(self, folder, purge_step, filename_suffix):
        self.folder, self.purge_step, self.scalars, self.closed = folder, purge_step, {}, False
        self.made.append(self)

    def add_scalar(self, tag, value, step):
        self.scalars[tag] = (value, step)

    def flush(self):
        pass

    def close(self):
        self.closed = True


def test_tensorboard_scalars(tmp_path, monkeypatch):
    module = type(sys)("tensorboardX")
    module.SummaryWriter = FakeWriter
    FakeWriter.made = []
    monkeypatch.setitem(sys.modules, "tensorboardX", module)
    with Logbook(tmp_path, 10, 2, io.StringIO()) as book:
        book.epoch(
            {"epoch": 3, "group": 1, "loss": float("nan"), "loss_per_group": [None, 0.5], "val_error": 4.0, "images_per_second": None}
        )
    (writer,) = FakeWriter.made
    assert (writer.folder, writer.purge_step, writer.closed) == (str(tmp_path / "tensorboard"), 3, True)
    assert writer.scalars == {"loss/group1": (0.5, 3), "val_error": (4.0, 3)}


def test_tensorboard_present(tmp_path):
    pytest.importorskip("tensorboardX", exc_type=ImportError)
    from tensorboardX.proto.event_pb2 import Event

    for first in (0, 1):
        with Logbook(tmp_path, 10, first, io.StringIO()) as book:
            book.epoch(RECORD | {"epoch": first + 1})
    found, purged = set(), []
    for path in (tmp_path / "tensorboard").iterdir():
        content, at = path.read_bytes(), 0
        while at < len(content):
            # A record: length (8 bytes), its checksum (4), the event, its checksum (4).
            (length,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + length])
            found |= {(value.tag, event.step, round(value.simple_value, 3)) for value in event.summary.value}
            if event.HasField("session_log"):
                purged.append(event.step)
            at += 16 + length
    assert {("loss", 1, 1.234), ("loss", 2, 1.234), ("val_error/group1", 2, 4.3), ("loss/group0", 1, 0.6)} <= found
    assert sorted(purged) == [1, 2]
