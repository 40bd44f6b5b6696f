"""What only helps people, or cannot be had: pictures, TensorBoard, bars, locks, flushes, streams. A run goes on without it."""

import contextlib
import errno
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import types
from unittest import mock

import matplotlib
import pytest
from orbax.checkpoint._src.serialization import tensorstore_utils
from PIL import Image

from command_lines import ROOT, TINY_FLAGS
from runs import copy_of, finished, summary_of, tiny, train, untimed
from vffjax import errors, files
from vffjax.files import write_json
from vffjax.runs import drawing, lock, plots, summary, tensorboard, workdir
from vffjax.runs.checkpoint import Checkpoints
from vffjax.runs.logbook import Logbook, read_metrics

RECORDS = [{"epoch": 1, "loss": 1.0, "val_error": 10.0}, {"epoch": 2, "loss": 0.5, "val_error": 5.0}]


def lines(capsys):
    return capsys.readouterr().err.splitlines()


# --- pictures


@pytest.mark.slow
def test_importing_the_commands_imports_nothing_that_few_of_them_need():
    code = "import sys; from vffjax.cli import main; from vffjax.runs import experiment, plots, summary\n"
    code += "print([m for m in ('matplotlib', 'scipy', 'tqdm') if m in sys.modules])"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.slow
def test_a_notebooks_backend_and_a_matplotlibrc_with_usetex_change_no_picture(tmp_path):
    # In a process of its own: matplotlib reads both once.
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfigure.facecolor: red\nsavefig.dpi: 20\n")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    code = "import os, sys, pathlib; from vffjax.runs import plots\n"
    code += "print(plots.plot_curves(pathlib.Path(sys.argv[1])), os.environ['MPLBACKEND'])"
    environment = os.environ | {"MPLBACKEND": "no_such_backend", "MATPLOTLIBRC": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == (f"{tmp_path / 'curves.png'} no_such_backend\n", "")
    with mock.patch.object(plots, "read_metrics", lambda _: RECORDS):
        plots.plot_curves(tmp_path / "..")
    assert (tmp_path / "curves.png").read_bytes() == (tmp_path / ".." / "curves.png").read_bytes()
    (tmp_path / ".." / "curves.png").unlink()


def test_the_users_own_settings_of_matplotlib_stay(tmp_path):
    with matplotlib.rc_context({"lines.linewidth": 7.5}):
        assert drawing.draw(tmp_path / "a.png", lambda: plots.curves_figure(RECORDS)) == tmp_path / "a.png"
        assert matplotlib.rcParams["lines.linewidth"] == 7.5


def test_a_picture_that_fails_is_one_line_and_the_summary_stands(tmp_path, monkeypatch, capsys, no_tensorboard):
    def fail(*_, **__):
        raise RuntimeError("no\nfont")

    workdir = copy_of(finished(), tmp_path)
    for name in ("summary.json", "curves.png", "features.png"):
        (workdir / name).unlink()
    monkeypatch.setattr(plots, "curves_figure", fail)
    monkeypatch.setattr(summary, "plot_features", fail)
    capsys.readouterr()
    train(tiny(), workdir, plots=True)
    assert untimed(summary_of(workdir)) == untimed(summary_of(finished()))
    told = [line for line in lines(capsys) if "left out" in line]
    why = "is left out (RuntimeError: no font); the result stands"
    assert told == [f"{workdir / name} {why}" for name in ("curves.png", "features.png")]
    assert not list(workdir.glob("*.png"))


def test_a_library_that_ends_python_ends_no_run(tmp_path, monkeypatch, capsys, no_tensorboard):
    def leave(*_):
        raise SystemExit("boom")

    monkeypatch.setattr(drawing, "_import_matplotlib", leave)
    summary = train(tiny(epochs=1), tmp_path, plots=True)
    assert summary_of(tmp_path)["test_error"] == summary["test_error"]
    assert capsys.readouterr().err.count("SystemExit: boom") == 2


def test_what_ends_python_with_words_is_status_1(call, monkeypatch):
    monkeypatch.setattr("vffjax.cli.commands.evaluate.run", lambda arguments: sys.exit("no protobuf"))
    assert call("evaluate") == (1, "", "vffjax: error: no protobuf\n")


def test_an_interrupt_while_a_picture_is_drawn_is_an_interrupt(tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        drawing.draw(tmp_path / "a.png", interrupt)


# --- TensorBoard and the bar


class Writer:
    """A SummaryWriter that fails where it is told to."""

    fails: str

    def __init__(self, folder, **_):
        self.closed, self.tags = 0, []
        self._at("creation")
        if self.fails == "its own thread":
            threading.Thread(target=self._die, daemon=True).start()

    def _die(self):
        raise OSError(errno.ENOSPC, "No space left on device")

    def _at(self, moment):
        if self.fails == moment:
            raise ValueError(f"broken at {moment}")

    def add_scalar(self, tag, value, step):
        self._at("writing")
        if self.fails == "never answers":
            threading.Event().wait(5)
        self.tags.append(tag)

    def flush(self):
        self._at("flushing")

    def close(self):
        self.closed += 1
        self._at("closing")


@pytest.fixture
def tensorboard_fails(monkeypatch):
    def prepare(moment):
        module = types.ModuleType("tensorboardX")
        module.SummaryWriter = type("Failing", (Writer,), {"fails": moment})
        monkeypatch.setitem(sys.modules, "tensorboardX", module)
        monkeypatch.setattr(tensorboard, "SECONDS", 0.2 if moment == "never answers" else 20.0)

    return prepare


MOMENTS = {
    "creation": "ValueError: broken at creation",
    "writing": "ValueError: broken at writing",
    "flushing": "ValueError: broken at flushing",
    "closing": "ValueError: broken at closing",
    "never answers": "TimeoutError: no answer within 0.2 s",
    "its own thread": "OSError: [Errno 28] No space left on device",
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_failure_of_tensorboard_is_one_line_and_every_epoch_is_recorded(moment, tensorboard_fails, tmp_path, capsys):
    tensorboard_fails(moment)
    hook, printed = threading.excepthook, io.StringIO()
    with Logbook(tmp_path, 3, 0, printed) as book:
        for epoch in (1, 2, 3):
            book.epoch({"epoch": epoch, "loss": 1.0 / epoch})
    assert [record["epoch"] for record in read_metrics(tmp_path)] == [1, 2, 3]
    assert printed.getvalue().count("\n") == 3
    assert lines(capsys) == [f"TensorBoard fails ({MOMENTS[moment]}); the training goes on without its events"]
    assert threading.excepthook == hook


def test_tensorboard_gets_the_configuration_the_results_and_the_pictures(tmp_path, monkeypatch):
    class Recorder(Writer):
        fails, written, file_writer = "", [], mock.Mock()

        def add_text(self, tag, text):
            self.written.append((tag, text))

        def add_image(self, tag, pixels, step, dataformats):
            self.written.append((tag, pixels.shape, step, dataformats))

        def add_scalar(self, tag, value, step):
            self.written.append((tag, value, step))

    module, plugin = types.ModuleType("tensorboardX"), types.ModuleType("tensorboardX.summary")
    module.SummaryWriter = Recorder
    plugin.hparams = lambda values, metrics: (("defined", values, list(metrics)), "started", "ended")
    monkeypatch.setitem(sys.modules, "tensorboardX", module)
    monkeypatch.setitem(sys.modules, "tensorboardX.summary", plugin)
    Image.new("L", (4, 3)).save(tmp_path / "curves.png")
    events = tensorboard.Events(tmp_path, 0)
    events.describe({"epochs": 2, "rule": "a|b", "widths": [3]})
    events.finish({"test_error": 1.5}, [tmp_path / "curves.png", tmp_path / "missing.png"], 2)
    events.close()
    text = "    epochs = 2\n    rule = 'a|b'\n    widths = [3]"
    assert Recorder.written == [("config", text), ("test_error", 1.5, 2), ("curves", (3, 4, 3), 2, "HWC")]
    values = {"epochs": 2, "rule": "a|b", "widths": "[3]"}
    told = [call.args[0] for call in Recorder.file_writer.add_summary.call_args_list]
    assert told == [("defined", values, ["val_error", "test_error", "loss"]), "started", "ended"]


@pytest.mark.parametrize(
    "error", [TypeError("Descriptors cannot be created directly"), OSError("libz"), ImportError("protobuf"), SystemExit("no")], ids=repr
)
def test_a_tensorboard_that_cannot_be_imported_is_one_line(error, tmp_path, capsys, monkeypatch):
    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name == "tensorboardX":
                raise error

    monkeypatch.delitem(sys.modules, "tensorboardX", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    with Logbook(tmp_path, 1, 0, io.StringIO()) as book:
        book.epoch({"epoch": 1})
    (line,) = lines(capsys)
    assert line == f"TensorBoard fails ({type(error).__name__}: {error}); the training goes on without its events"


def test_other_threads_keep_their_traceback(tensorboard_fails, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(threading, "excepthook", seen.append)
    tensorboard_fails("nowhere")
    with Logbook(tmp_path, 1, 0, io.StringIO()):
        thread = threading.Thread(target=lambda: 1 / 0)
        thread.start()
        thread.join()
    assert [failure.exc_type for failure in seen] == [ZeroDivisionError]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("moment", ["__init__", "refresh", "close"])
def test_a_bar_that_fails_is_one_line_and_epochs_become_lines(moment, tmp_path, monkeypatch, capsys, no_tensorboard):
    import tqdm

    sound, calls = getattr(tqdm.tqdm, moment), []

    def fail(*arguments, **named):
        calls.append(moment)
        if len(calls) == 1:
            raise RuntimeError("no bar")
        sound(*arguments, **named)  # for tqdm's own end of an object

    terminal = Terminal()
    if moment == "__init__":
        monkeypatch.setattr(tqdm, "tqdm", fail)
    else:
        monkeypatch.setattr(tqdm.tqdm, moment, fail)
    with Logbook(tmp_path, 2, 0, terminal) as book:
        book.epoch({"epoch": 1, "loss": 1.0})
        book.epoch({"epoch": 2, "loss": 0.5})
    monkeypatch.undo()
    assert lines(capsys) == ["the progress bar fails (RuntimeError: no bar); epochs are printed as lines"]
    assert ("epoch 1/2  loss 1.000\nepoch 2/2  loss 0.500\n" in terminal.getvalue()) == (moment != "close")
    assert len(read_metrics(tmp_path)) == 2


# --- locks and flushes


UNSUPPORTED = [errno.ENOSYS, errno.ENOLCK, errno.EBADF, errno.EOPNOTSUPP, errno.EINVAL]


def name_of(code):
    return errno.errorcode[code]


@pytest.mark.parametrize("code", UNSUPPORTED, ids=name_of)
def test_a_file_system_without_locks_is_one_line(code, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    with workdir.locked(tmp_path):
        pass
    (line,) = lines(capsys)
    assert line.startswith(f"{tmp_path / '.lock'}: this file system cannot lock ({os.strerror(code)}); ")


def test_where_there_is_no_flock_the_byte_lock_of_windows_is_taken(tmp_path, monkeypatch):
    held = set()

    def locking(descriptor, mode, count):
        key = (os.fstat(descriptor).st_ino, os.lseek(descriptor, 0, os.SEEK_CUR))
        if key in held:
            raise PermissionError(errno.EACCES, "Permission denied")
        held.add(key)

    monkeypatch.setattr(lock, "fcntl", None)
    monkeypatch.setattr(lock, "msvcrt", types.SimpleNamespace(locking=locking, LK_NBLCK=2))
    with workdir.locked(tmp_path):
        pass
    with pytest.raises(errors.UserError, match="another run is writing here"), workdir.locked(tmp_path):
        pass


@pytest.fixture
def no_flush(monkeypatch):
    """Makes `os.fsync` refuse: folders, or everything, with an error."""
    monkeypatch.setattr(files, "_warned", set())
    sound = os.fsync

    def prepare(code, files_too=False):
        def fsync(descriptor):
            if files_too or os.path.isdir(f"/proc/self/fd/{descriptor}"):
                raise OSError(code, os.strerror(code))
            sound(descriptor)

        monkeypatch.setattr(files.os, "fsync", fsync)

    return prepare


def test_tensorstore_flushes_again_when_a_writer_that_cannot_flush_is_closed(no_flush, tmp_path):
    contexts = (tensorstore_utils._BASE_TS_CONTEXT, tensorstore_utils._DEFAULT_OCDBT_TS_CONTEXT)
    before = [dict(context) for context in contexts]
    no_flush(errno.EINVAL)
    with contextlib.closing(Checkpoints(tmp_path).writer({})):
        assert [context["file_io_sync"] for context in contexts] == [False, False]
    assert [dict(context) for context in contexts] == before


@pytest.mark.parametrize("files_too", [False, True], ids=["folders", "files too"])
@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.ENOSYS], ids=name_of)
def test_what_cannot_be_flushed_is_one_line_for_many_files(code, files_too, no_flush, tmp_path, capsys):
    no_flush(code, files_too)
    for number in range(3):
        write_json(tmp_path / f"{number}.json", number)
        files.sync(tmp_path)
    assert [json.loads((tmp_path / f"{number}.json").read_text()) for number in range(3)] == [0, 1, 2]
    (line,) = lines(capsys)
    assert "this file system cannot flush it to disk" in line and os.strerror(code) in line


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT], ids=name_of)
def test_a_flush_that_lost_data_is_an_error(code, no_flush, tmp_path):
    no_flush(code)
    with pytest.raises(OSError) as raised:
        write_json(tmp_path / "a.json", 1)
    assert raised.value.errno == code


def test_a_folder_that_may_be_written_and_not_opened_is_one_line(tmp_path, monkeypatch, capsys):
    def refuse(path, *rest):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(files, "_warned", set())
    monkeypatch.setattr(files.os, "open", refuse)
    files.sync(tmp_path)
    assert len(lines(capsys)) == 1


@pytest.mark.slow
def test_a_run_on_a_file_system_that_neither_locks_nor_flushes_ends_as_any_other(tmp_path):
    source, compiler = ROOT.parent / "shared" / "cases" / "unsupported.c", shutil.which("gcc") or shutil.which("cc")
    if not source.exists() or not compiler:
        pytest.skip("no C compiler, or no shared/cases/unsupported.c beside the checkout")
    shim = tmp_path / "unsupported.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", shim, source, "-ldl"], check=True)
    environment = os.environ | {"LD_PRELOAD": str(shim), "FAIL_FLOCK": "ENOSYS", "FAIL_FSYNC_DIR": "EINVAL", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "vffjax", "train", *TINY_FLAGS, "--config.epochs=1", f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    told = done.stderr.splitlines()
    assert len(told) == 4
    assert sum("this file system cannot lock" in line for line in told) == 1
    assert sum("this file system cannot flush" in line for line in told) == 1
    assert summary_of(tmp_path / "run")["epochs"] == 1


# --- streams


class Bare:
    """A notebook's stream: it can write, and nothing else."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text


class Narrow(io.TextIOWrapper):
    def __init__(self):
        super().__init__(io.BytesIO(), encoding="ascii")

    def bytes(self):
        self.flush()
        return self.buffer.getvalue()


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("stream", [None, Bare(), closed(), Narrow()], ids=["none", "bare", "closed", "narrow"])
def test_no_stream_ends_a_run(stream, tmp_path, monkeypatch, no_tensorboard):
    monkeypatch.setattr(sys, "stderr", stream)
    errors.notice("größe \ud800 \x1b")
    with Logbook(tmp_path / "größe", 1) as book:
        book.epoch({"epoch": 1, "loss": 2.0})
    monkeypatch.undo()
    assert len(read_metrics(tmp_path / "größe")) == 1
    if isinstance(stream, Bare):
        assert stream.text == "größe \\ud800 \\x1b\nepoch 1/1  loss 2.000\n"
    if isinstance(stream, Narrow):
        assert stream.bytes() == b"gr\\xf6\\xdfe \\ud800 \\x1b\nepoch 1/1  loss 2.000\n"


def test_without_stderr_nothing_is_said_on_stdout(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", None)
    errors.notice("lost")
    monkeypatch.undo()
    assert capsys.readouterr().out == ""


def test_a_command_prints_what_a_stream_cannot_encode_as_escapes(tmp_path):
    out = Narrow()
    code = "import sys; from vffjax.cli import main; main.main(['memory', '--config=größe.py'])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(b"vffjax: error: --config=gr\\xf6\\xdfe.py: No such file") and done.stderr.count(b"\n") == 1
    stream = errors.SafeStream(out)
    print("größe", file=stream)
    assert (out.bytes(), stream.failure) == (b"gr\\xf6\\xdfe\n", None)


@pytest.mark.parametrize("target", ["a full device", "nobody"])
def test_output_that_cannot_be_written_is_status_1_and_no_traceback(target):
    code = "from vffjax.cli import main; main.main(['train', '--help'])"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    if target == "nobody":
        read, out = os.pipe()
        os.close(read)
    else:
        out = os.open("/dev/full", os.O_WRONLY)
    done = subprocess.run([sys.executable, "-c", code], env=environment, stdout=out, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(out)
    told = "" if target == "nobody" else "vffjax: error: standard output cannot be written ([Errno 28] No space left on device)\n"
    assert (done.returncode, done.stderr) == (1, told)


def test_closed_descriptors_are_not_given_to_files_of_the_run(tmp_path):
    code = "from vffjax.cli import main; import os, sys\n"
    code += "main._run = lambda *_: os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY)\nmain.main(['train'])"
    command = f'exec "{sys.executable}" -c "$CODE" "{tmp_path / "file"}" >&- 2>&- <&-'
    done = subprocess.run(["sh", "-c", command], env=os.environ | {"CODE": code, "PYTHONPATH": str(ROOT)}, timeout=120)
    assert done.returncode > 2  # the file's descriptor


def test_a_command_in_a_process_without_streams_does_its_work(monkeypatch, tmp_path):
    from vffjax.cli import main as cli

    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with pytest.raises(SystemExit) as ended:
        cli.main(["evaluate", f"--workdir={finished()}"])
    assert ended.value.code == 0
    with pytest.raises(SystemExit) as ended:
        cli.main(["evaluate", f"--workdir={tmp_path}"])
    assert ended.value.code == 2
    assert sys.stdout is None


@pytest.mark.slow
def test_experiment_says_what_it_does_where_stderr_is_no_terminal_file(monkeypatch, tmp_path, no_tensorboard):
    stream = Bare()
    monkeypatch.setattr(sys, "stderr", stream)
    train(tiny(), tmp_path / "run")
    monkeypatch.undo()
    assert stream.text.startswith(f"workdir {tmp_path / 'run'}; ") and stream.text.count("\n") == 4
