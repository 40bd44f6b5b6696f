"""The record of a run on disk and on the terminal, and its figures."""

import io
import json
import os
import struct
import sys

import numpy as np
import pytest
from matplotlib.image import imread

from vffjax import logbook, plots
from vffjax.logbook import Logbook, read_metrics, write_json

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
def no_tensorboard(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)  # makes the import raise ImportError


@pytest.fixture
def write(tmp_path, no_tensorboard):
    """Records epochs `first + 1` to `last` and returns what was printed."""

    def run(first, last, total=10, **fields):
        stream = io.StringIO()
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
    monkeypatch.setattr(logbook.os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size))
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

    monkeypatch.setattr(logbook.os, "replace", fail)
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
        monkeypatch.setattr(logbook.os, "fsync", full)
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
        "epoch  3/10  loss 1.234  train 92.1 %  val error 4.20 % (groups 5.00 4.30)  2,346 images/s  1.9 s",
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
    with Logbook(tmp_path, 10, 2, stream) as book:
        assert "2/10" in stream.getvalue()
        book.epoch(RECORD)
        assert "3/10" in stream.getvalue()
        shown = stream.getvalue().split("\r")[-1]
        assert "loss 1.234, val error 4.20 %, 2,346 images/s" in shown
        book.epoch({"epoch": 4, "loss": 1.0, "train_accuracy": 0.5})
        shown = stream.getvalue().split("\r")[-1]
        assert "4/10" in shown and "loss 1.000, train 50.0 %" in shown
        assert "val error" not in shown
    assert stream.getvalue().endswith("\n")
    assert epochs(tmp_path) == [3, 4]


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


# --- curves.png


def pixels(path, least=(300, 600), most=(3000, 2000)):
    """The picture's RGB values, its size checked."""
    picture = imread(path)[..., :3]
    assert least[0] <= picture.shape[0] <= most[0] and least[1] <= picture.shape[1] <= most[1]
    return picture


def coloured(picture):
    """Share of pixels that are neither grey nor white: curves or maps, but no frame or text."""
    return float(np.mean(np.ptp(picture, axis=-1) > 0.2))


def curve_records(groups, count, sequential=False):
    records = []
    for epoch in range(1, count * (groups if sequential else 1) + 1):
        training = (epoch - 1) // count
        losses = [None if sequential and g != training else 2.0 / epoch + g for g in range(groups)]
        errors = [20.0 / epoch + g for g in range(groups)]
        record = {"epoch": epoch, "loss": 1.5, "loss_per_group": losses, "val_error": 19.0 / epoch, "val_error_per_group": errors}
        records.append(record | ({"group": training} if sequential else {}))
    return records


def curves(axes):
    """Label up to the bracket -> epochs; leaves out the lines that mark stages."""
    return {line.get_label().split(" (")[0]: list(line.get_xdata()) for line in axes.lines if "(last" in line.get_label()}


@pytest.mark.parametrize("groups", [1, 8])
@pytest.mark.parametrize("count", [1, 12])
def test_curves_file(tmp_path, no_tensorboard, groups, count):
    with Logbook(tmp_path, count, 0, io.StringIO()) as book:
        for record in curve_records(groups, count):
            book.epoch(record)
    path = plots.plot_curves(tmp_path)
    assert path == tmp_path / "curves.png"
    assert coloured(pixels(path)) > (1e-4 if count == 1 else 1e-3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_curves_content():
    left, right = plots.curves_figure(curve_records(2, 4)).axes
    assert curves(left) == {"group 0": [1, 2, 3, 4], "group 1": [1, 2, 3, 4]}
    assert curves(right) == {"group 0": [1, 2, 3, 4], "group 1": [1, 2, 3, 4], "ensemble": [1, 2, 3, 4]}
    ensemble = next(line for line in right.lines if line.get_label().startswith("ensemble"))
    np.testing.assert_allclose(ensemble.get_ydata(), [19.0, 19.0 / 2, 19.0 / 3, 19.0 / 4])
    assert (left.get_xlabel(), right.get_xlabel(), right.get_ylabel()) == ("epoch", "epoch", "error (%)")
    assert "ensemble (last: 4.75 %)" in [text.get_text() for text in right.get_legend().get_texts()]
    assert right.get_ylim()[0] == 0 and right.get_ylim()[1] > 21.0


def test_curves_sequential():
    left, right = plots.curves_figure(curve_records(3, 2, sequential=True)).axes
    assert curves(left) == {"group 0": [1, 2], "group 1": [3, 4], "group 2": [5, 6]}
    assert curves(right)["ensemble"] == [1, 2, 3, 4, 5, 6]
    marks = [line.get_xdata()[0] for line in left.lines if "(last" not in line.get_label()]
    assert marks == [2.5, 4.5]


def test_curves_without_validation():
    records = [{"epoch": 1, "loss": None, "loss_per_group": [None], "train_accuracy": 0.75, "val_error": None, "val_error_per_group": None}]
    left, right = plots.curves_figure(records).axes
    assert [text.get_text() for text in left.texts] == ["nothing recorded"]
    assert list(right.lines[0].get_ydata()) == [25.0]
    assert "training" in right.get_title()


def test_curves_loss_scale():
    records = [{"epoch": e, "loss_per_group": [10.0**-e]} for e in range(1, 5)]
    assert plots.curves_figure(records).axes[0].get_yscale() == "log"
    records[0]["loss_per_group"] = [-1.0]
    assert plots.curves_figure(records).axes[0].get_yscale() == "linear"


def test_curves_of_no_epoch(tmp_path):
    assert pixels(plots.plot_curves(tmp_path)).min() < 0.5


# --- features.png


def features(path, shape, classes=10, maps=((4, 4, 6), (2, 2, 6)), filters=(3, 3, None, 16), count=2, codebook=True):
    rng = np.random.default_rng(0)
    filters = tuple(shape[2] if size is None else size for size in filters)
    return plots.plot_features(
        path,
        images=rng.uniform(size=(count, *shape)).astype(np.float32),
        class_names=[f"a rather long $name_{i}" for i in range(classes)],
        labels=np.arange(count) % classes,
        wrong_labels=(np.arange(count) + 1) % classes,
        codebook=rng.normal(size=(classes, *shape)) if codebook else None,
        streams=[rng.uniform(size=(3, count, *size)) for size in maps],
        filters=rng.normal(size=filters),
    )


@pytest.mark.parametrize(
    "arguments",
    [
        {"shape": (32, 32, 3)},
        {"shape": (8, 8, 1), "classes": 2, "count": 1, "maps": ((3, 3, 2),)},
        {"shape": (224, 224, 3), "classes": 100, "count": 3, "maps": ((56, 56, 2),) * 8},
        {"shape": (28, 28, 1), "count": 3, "maps": ((30,), (31,), (1,)), "filters": (784, 20)},
        {"shape": (8, 8, 3), "codebook": False},
    ],
    ids=["conv", "smallest", "largest", "dense", "no codebook"],
)
def test_features_file(tmp_path, arguments):
    path = features(tmp_path / "features.png", **arguments)
    assert [path] == list(tmp_path.iterdir())
    assert coloured(pixels(path)) > 0.02  # the maps are drawn in colour


def test_filters_are_skipped_when_they_cannot_be_shown(tmp_path):
    tall = pixels(features(tmp_path / "a.png", (8, 8, 1)))
    for filters in ((3, 3, 5, 16), (65, 16), (16,)):
        assert len(pixels(features(tmp_path / "b.png", (8, 8, 1), filters=filters))) < len(tall) - 100
    assert len(pixels(features(tmp_path / "c.png", (8, 8, 1), filters=(64, 16)))) == len(tall)


def test_filter_tiles():
    weights = np.arange(-12.0, 12.0).reshape(12, 2)  # a 2x2 RGB image, two units
    tiles = plots._filter_tiles(weights, (2, 2, 3))
    assert [tile.shape for tile in tiles] == [(2, 2, 3)] * 2
    np.testing.assert_allclose(tiles[0].ravel(), 0.5 + weights[:, 0] / 24)
    assert len(plots._filter_tiles(np.zeros((3, 3, 1, 30)), (8, 8, 1))) == 24


def test_features_that_diverged(tmp_path):
    stream = np.full((3, 1, 2, 2, 1), np.nan)
    path = plots.plot_features(
        tmp_path / "x.png",
        images=np.zeros((1, 8, 8, 1)),
        class_names=["a", "b"],
        labels=[0],
        wrong_labels=[1],
        codebook=np.zeros((2, 8, 8, 1)),
        streams=[stream, np.tile([np.nan, np.inf, 1.0, 2.0], (3, 1, 1))],
        filters=np.full((3, 3, 1, 4), np.nan),
    )
    assert coloured(pixels(path)) > 1e-3  # the two finite units


def test_fold_and_scale():
    folded = plots._fold(np.arange(5.0))
    np.testing.assert_array_equal(folded, [[0, 1, 2], [3, 4, np.nan]])
    np.testing.assert_array_equal(plots._fold(np.arange(8.0).reshape(2, 2, 2)), [[0.5, 2.5], [4.5, 6.5]])
    np.testing.assert_allclose(plots._unit(np.array([-1.0, 1.0, 3.0, np.nan])), [0, 0.5, 1, np.nan])
    np.testing.assert_array_equal(plots._unit(np.full(3, 7.0)), [0.5] * 3)
