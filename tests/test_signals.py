"""Ctrl-C and SIGTERM: answered at once whatever the process is doing, with the status and the words that say what is saved."""

import os
import signal
import subprocess
import sys
import threading
import time

import jax
import pytest

from command_lines import ROOT, TINY_FLAGS
from runs import finished, summary_of, tiny, untimed
from vffjax.data import load as data
from vffjax.runs import experiment, termination
from vffjax.runs.logbook import read_metrics
from vffjax.runs.termination import Terminated, deferred, interruptible

MOST_SECONDS = 5.0


@pytest.fixture(autouse=True)
def ctrl_c_is_not_ignored():
    """A shell lets what it starts behind itself ignore Ctrl-C, and so would its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupted_once(begun, work):
    """Runs `work`, sends Ctrl-C to this process when `begun` is set, and expects that to be raised here."""

    def interrupt():
        begun.wait(30)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        work()


def wait_until(condition, seconds=100.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.005)


# ----------------------------------------------------------------------------------------------------------------------------------
# Work in a thread of its own


def test_the_work_s_result_and_its_error_come_back():
    main = threading.current_thread()
    assert interruptible(lambda: (threading.current_thread() is main, 7)) == (False, 7)
    with pytest.raises(ZeroDivisionError):
        interruptible(lambda: 1 / 0)
    inner = interruptible(lambda: interruptible(threading.current_thread))
    assert inner.name == "vffjax"  # no thread within a thread


def test_settings_of_jax_that_hold_for_the_caller_hold_for_the_work():
    def settings():
        return jax.numpy.zeros(()).dtype.name, jax.config.jax_default_matmul_precision, jax.config.jax_debug_nans

    before = settings()
    with jax.enable_x64(True), jax.default_matmul_precision("highest"), jax.debug_nans(True):
        assert interruptible(settings) == ("float64", "highest", True)
    assert interruptible(settings) == before


def test_an_interrupt_is_raised_at_once_and_the_next_work_waits_for_the_last(capsys):
    begun, ended, order = threading.Event(), threading.Event(), []

    def work():
        with deferred() as request:
            begun.set()
            wait_until(lambda: request.abandoned)
            ended.wait(30)
            order.append("first")

    interrupted_once(begun, lambda: interruptible(work))
    assert termination.working()
    threading.Timer(0.3, ended.set).start()
    interruptible(lambda: order.append("second"))
    assert order == ["first", "second"]
    assert "the run that was interrupted is ending; waiting for it" in capsys.readouterr().err
    assert not termination.working()


@pytest.mark.slow
def test_an_interrupt_while_data_are_read_trains_nothing(tmp_path, monkeypatch):
    reading, interrupted, sound = threading.Event(), threading.Event(), data.load

    def load(config):
        reading.set()
        interrupted.wait(30)
        return sound(config)

    monkeypatch.setattr(data, "load", load)
    interrupted_once(reading, lambda: experiment.train(tiny(), tmp_path / "run"))
    interrupted.set()
    termination.settle(60)
    assert not termination.working()
    assert read_metrics(tmp_path / "run") == []


def test_work_that_begins_a_run_after_the_interrupt_is_abandoned_from_the_start():
    begun, interrupted, seen = threading.Event(), threading.Event(), []

    def work():
        begun.set()
        interrupted.wait(30)
        with deferred() as request:
            seen.append(request.abandoned)

    interrupted_once(begun, lambda: interruptible(work))
    interrupted.set()
    termination.settle(30)
    assert seen == [True]


def test_sigterm_while_nothing_could_be_lost_ends_the_wait():
    released = threading.Event()

    def work():
        with deferred() as request:
            request.saved = "nothing is saved yet"
            os.kill(os.getpid(), signal.SIGTERM)
            released.wait(30)

    with pytest.raises(Terminated, match="nothing is saved yet"):
        interruptible(work)
    released.set()
    termination.settle(30)


def test_sigterm_is_as_it_was_before_where_no_run_is():
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append("mine"))
    try:
        interruptible(lambda: (os.kill(os.getpid(), signal.SIGTERM), wait_until(lambda: seen)))
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: len(seen) == 2)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == ["mine", "mine"]


# ----------------------------------------------------------------------------------------------------------------------------------
# Processes


def start(*flags, code="from vffjax.cli.main import main; main()"):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # it compiles, in every process
    command = [sys.executable, "-c", code, *flags]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process, how):
    """Status, what stderr said, and seconds from the signal to the end."""
    began = time.monotonic()
    process.send_signal(how)
    _, err = process.communicate(timeout=60)
    return process.returncode, err, time.monotonic() - began


# Compiles for some seconds.
WIDE = [flag for flag in TINY_FLAGS if "widths" not in flag]
WIDE += ["--config.widths=(256, 256, 192, 192, 128, 128)", "--config.grouping=layer", "--config.epochs=1000"]


@pytest.mark.slow
@pytest.mark.parametrize(("how", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_it_compiles_is_answered_at_once(how, status, tmp_path):
    process = start("train", *WIDE, f"--workdir={tmp_path / 'run'}")
    wait_until(lambda: (tmp_path / "run" / "config.json").exists())
    time.sleep(1.0)
    found, err, seconds = ended(process, how)
    assert (found, (tmp_path / "run" / "checkpoints" / "1").exists()) == (status, False)
    assert seconds < MOST_SECONDS
    words = "interrupted; " if how == signal.SIGINT else "told to leave (SIGTERM): "
    assert err.splitlines()[-1] == f"vffjax: {words}nothing of this run is saved yet; the same command begins it anew"


@pytest.mark.slow
def test_ctrl_c_while_it_trains_says_what_is_saved(tmp_path):
    process = start("train", *TINY_FLAGS, "--config.epochs=100000", "--config.checkpoint_every=1", f"--workdir={tmp_path / 'run'}")
    wait_until(lambda: (tmp_path / "run" / "checkpoints" / "2.sha256.json").exists())
    found, err, seconds = ended(process, signal.SIGINT)
    assert (found, seconds < MOST_SECONDS) == (130, True)
    last = err.splitlines()[-1]
    assert "SIGTERM" not in err  # what ends in the background keeps quiet
    assert last.startswith("vffjax: interrupted; epoch ") and last.endswith(" of 100000 is saved; the same command goes on from there")


@pytest.mark.slow
def test_ctrl_c_before_it_trains_is_answered_too():
    process = start("locality", *TINY_FLAGS)
    time.sleep(1.5)
    found, err, seconds = ended(process, signal.SIGINT)
    assert (found, err, seconds < MOST_SECONDS) == (130, "vffjax: interrupted\n", True), err


KERNEL = """
import os, signal, sys, threading
from vffjax.runs import experiment
from vffjax.runs import logbook
from vffjax.training.checks import make_config
from vffjax.cli.flags import parse_train
config, _, workdir = parse_train(sys.argv[1:])
sound = logbook.Logbook.step
def step(self, epoch, done, steps):
    sound(self, epoch, done, steps)
    if epoch == 1 and not told:
        told.append(1)
        os.kill(os.getpid(), signal.SIGINT)
logbook.Logbook.step, told = step, []
try:
    experiment.train(config, workdir)
except KeyboardInterrupt:
    print("the kernel lives")
print(experiment.train(config, workdir)["test_error"])
"""


@pytest.mark.slow
def test_in_python_an_interrupt_is_an_exception_and_the_next_call_goes_on(tmp_path):
    keys = [f"--config.{key}={value}" for key, value in tiny().to_dict().items() if key not in ("pools", "overrides", "widths")]
    process = start("--config=configs/digits.py", *keys, "--config.widths=(16, 12)", f"--workdir={tmp_path / 'run'}", code=KERNEL)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.splitlines() == ["the kernel lives", str(summary_of(finished())["test_error"])]
    ignored = ("flags", "earlier_origins", "commit")
    same = [{k: v for k, v in untimed(summary_of(folder)).items() if k not in ignored} for folder in (tmp_path / "run", finished())]
    assert same[0] == same[1]
