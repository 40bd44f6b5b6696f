"""Tiny runs for the tests of the outer layers. Nothing here is a test."""

import atexit
import contextlib
import functools
import json
import os
import pathlib
import shutil
import signal
import tempfile
import time
from unittest import mock

import jax
import numpy as np

import oracles
from vffjax.runs import experiment, origin, summary, termination
from vffjax.runs.logbook import Logbook, read_metrics
from vffjax.runs.workdir import load_run
from vffjax.training import plan, trainer
from vffjax.training.checks import make_config
from vffjax.uses import evaluation

# Two groups, eleven steps an epoch, learnt well above chance in three epochs.
TINY = {
    "dataset": "digits",
    "train_examples": 400,
    "network": "mlp",
    "widths": (16, 12),
    "epochs": 3,
    "batch_size": 32,
    "learning_rate": 1e-2,
}
TIMES = ("seconds", "images_per_second", "compile_seconds", "peak_bytes")


def tiny(**changes):
    return make_config(TINY | changes)


@functools.cache
def scratch():
    folder = tempfile.mkdtemp(prefix="vffjax-tests-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return pathlib.Path(folder)


_SHARED = {}  # folders of runs that tests of several files read, and when each of their files was last written


def shared(workdir):
    """Returns the folder of a run that tests share. A test that writes to it fails from now on."""
    _SHARED[workdir] = _last_written(workdir)
    return workdir


def written_in_shared_runs():
    """The files that have been written, made or removed in shared runs since the last call. conftest.py asks after each test."""
    changed = []
    for workdir, before in _SHARED.items():
        _SHARED[workdir] = now = _last_written(workdir)
        changed += [str(workdir / name) for name in sorted(before.keys() | now) if before.get(name) != now.get(name)]
    return changed


def _last_written(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in files}


@contextlib.contextmanager
def optimizer(make):
    """Within, `make(config, hyper, frozen)` stands for `make_optimizer`, for first states and for updates."""
    with oracles.traced_afresh(), mock.patch.object(plan, "make_optimizer", make), mock.patch.object(trainer, "make_optimizer", make):
        yield


def train(config, workdir, plots=False):
    """`experiment.train`, by default without its plots, which take longer than the training."""
    with contextlib.ExitStack() as stack:
        # The checkout may be changed or committed while the tests run.
        stack.enter_context(mock.patch.object(origin, "_commit", lambda: "0" * 40))
        if not plots:
            stack.enter_context(mock.patch.object(summary, "draw_features"))
            stack.enter_context(mock.patch.object(summary, "plot_curves"))
        return experiment.train(config, workdir)


@functools.cache
def finished():
    """A finished run of `tiny()`, plots and all. Not to be written to: see `copy_of`."""
    workdir = scratch() / "finished"
    train(tiny(), workdir, plots=True)
    return shared(workdir)


def assert_same_runs(first, second):
    """Two runs have equal states, validation errors and evaluations, wherever their images lay."""
    assert_same_bits(*(load_run(workdir, "latest").states for workdir in (first, second)))
    errors = [[record["val_error"] for record in read_metrics(workdir)] for workdir in (first, second)]
    assert errors[0] == errors[1]
    found = [{k: v for k, v in evaluation.evaluate(workdir).items() if k != "workdir"} for workdir in (first, second)]
    assert found[0] == found[1]


def copy_of(workdir, folder):
    """A copy to damage or to go on with, in the empty folder `folder`."""
    return pathlib.Path(shutil.copytree(workdir, folder / "run"))


def contents(folder):
    """Every file's path, bytes and time of change."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def tell_to_leave():
    """SIGTERM to this process; returns when every run in it knows."""
    os.kill(os.getpid(), signal.SIGTERM)
    while not all(request.made for request in termination._running):
        time.sleep(0.001)


def leave_at(epoch, step):
    """Runs in here are told to leave, by SIGTERM, when so many steps of an epoch (from 0) have been dispatched."""
    sound = Logbook.step

    def told(self, now, done, steps):
        sound(self, now, done, steps)
        if (now, done >= step) == (epoch, True):
            tell_to_leave()

    return mock.patch.object(Logbook, "step", told)


def summary_of(workdir):
    return json.loads((workdir / "summary.json").read_text())


def untimed(record):
    return {key: value for key, value in record.items() if key not in (*TIMES, "commit")}


def assert_same_bits(one, other):
    """Equal trees, down to node types, dtypes and bits."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for (path, a), (_, b) in zip(jax.tree.leaves_with_path(one), jax.tree.leaves_with_path(other), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), jax.tree_util.keystr(path)
        assert a.tobytes() == b.tobytes(), jax.tree_util.keystr(path)
