"""Two processes over 127.0.0.1, each with two fake devices, train one run together."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from command_lines import CONFIG, ROOT, in_a_process
from runs import TINY, assert_same_bits, summary_of, tiny, train, untimed
from vffjax import hosts
from vffjax.cli import processes
from vffjax.errors import UserError
from vffjax.runs import experiment
from vffjax.runs.logbook import read_metrics
from vffjax.runs.workdir import load_run

CHANGES = TINY | {"checkpoint_every": 1, "segment_steps": 3}
LONG = TINY | {"epochs": 20, "checkpoint_every": 20, "segment_steps": 3}  # no process reaches its end before a signal comes
HEARTBEAT = 10
# Losses of each epoch, relative: two processes with two devices each against one process with four. The sums over devices go another way.
TOLERANCE = 1e-5
# On two cores the devices wait for each other.
DEVICES = (
    "--xla_force_host_platform_device_count={} --xla_cpu_collective_call_warn_stuck_timeout_seconds=300 "
    "--xla_cpu_collective_call_terminate_timeout_seconds=600"
)


def environment(devices):
    flags = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES.format(devices)}"
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}


def keys(changes):
    return [f"--config.{key}={value}" for key, value in changes.items()]


def without(pattern, text):
    """The text without all that fits the pattern, also where one piece was written into the middle of another."""
    while (left := re.sub(pattern, "", text)) != text:
        text = left
    return text


class Pair:
    """Two processes of one run. `own` are keys of process 1 alone; it runs `code` first."""

    def __init__(self, changes, workdir, own=None, code=""):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        self.workdir, self.each = workdir, []
        for index in range(2):
            here = [CONFIG, *keys(changes | (own or {} if index else {})), f"--workdir={workdir}"]
            joining = [f"--coordinator={address}", "--processes=2", f"--process={index}", f"--heartbeat={HEARTBEAT}"]
            main = ["-c", f"{code}; from vffjax.cli.main import main; import sys; main(['train', *sys.argv[1:]])"]
            command = [sys.executable, *(main if index and code else ["train.py"]), *here, *joining]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            self.each.append(subprocess.Popen(command, cwd=ROOT, env=environment(2), **pipes))

    def wait_for_lines(self, count):
        until = time.monotonic() + 120
        while len(read_metrics(self.workdir)) < count:
            assert time.monotonic() < until
            assert [process.poll() for process in self.each] == [None, None], self.end()
            time.sleep(0.02)

    def end(self):
        """The status, stdout and stderr of each, without what Gloo says of itself."""
        found = [process.communicate(timeout=200) for process in self.each]
        # Several threads write those lines, sometimes one into the line of another.
        gloo = r"\[Gloo\] Rank |\d* is connected to \d+ peer ranks\. |Expected number of connected peer ranks is : \d+\n"
        plain = [[without(gloo, text) for text in texts] for texts in found]
        return [(process.returncode, *texts) for process, texts in zip(self.each, plain, strict=True)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    pair = Pair(CHANGES, tmp_path_factory.mktemp("hosts") / "run")
    (status, out, err), other = pair.end()
    assert status == 0, err
    assert other == (0, "", "")  # only process 0 says anything
    assert "; cpu, 4 of 4 devices in 2 processes\n" in err
    assert out.startswith("test error ")
    return pair.workdir


def records(workdir):
    return [untimed(record) for record in read_metrics(workdir)]


def assert_same_run(one, other):
    assert records(one) == records(other)
    for epoch in ("latest", "best"):
        assert_same_bits(load_run(one, epoch).states, load_run(other, epoch).states)
    left_out = ("flags", "earlier_origins", "settings")
    a, b = ({key: value for key, value in untimed(summary_of(folder)).items() if key not in left_out} for folder in (one, other))
    assert a == b


@pytest.mark.slow
def test_two_processes_learn_what_one_does_with_as_many_devices(undisturbed, tmp_path):
    command = [sys.executable, "train.py", CONFIG, *keys(CHANGES), f"--workdir={tmp_path / 'one'}"]
    done = subprocess.run(command, cwd=ROOT, env=environment(4), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    one, two = read_metrics(tmp_path / "one"), read_metrics(undisturbed)
    assert [record["epoch"] for record in two] == [1, 2, 3]
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a["loss_per_group"], b["loss_per_group"], rtol=TOLERANCE)
    assert summary_of(undisturbed)["devices"] == summary_of(tmp_path / "one")["devices"] == 4


@pytest.mark.slow
def test_images_that_stay_on_the_hosts_give_the_same_bits(undisturbed, tmp_path):
    pair = Pair(CHANGES | {"data_on": "host"}, tmp_path / "run")
    assert [status for status, *_ in pair.end()] == [0, 0]
    assert records(pair.workdir) == records(undisturbed)
    assert_same_bits(load_run(pair.workdir, "latest").states, load_run(undisturbed, "latest").states)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_process_ends_the_other_and_the_same_command_goes_on_to_the_same_bits(victim, undisturbed, tmp_path):
    pair = Pair(CHANGES, tmp_path / "run")
    pair.wait_for_lines(2)
    pair.each[victim].kill()
    began = time.monotonic()
    found = pair.end()
    assert time.monotonic() - began < 2 * HEARTBEAT
    assert found[victim][0] == -signal.SIGKILL
    status, out, err = found[1 - victim]
    # JAX aborts what has lost process 0, unless its devices notice that first.
    assert status == hosts.LOST or (victim == 0 and status == -signal.SIGABRT), err
    assert out == ""
    assert f"; {hosts.AGAIN}\n" in err
    assert not (pair.workdir / "summary.json").exists()

    again = Pair(CHANGES, tmp_path / "run")
    (status, _, err), other = again.end()
    assert (status, other) == (0, (0, "", "")), err
    assert "epoch 1/3" not in err
    assert "until here" not in err
    assert_same_run(again.workdir, undisturbed)
    done = in_a_process("-m", "vffjax", "evaluate", f"--workdir={again.workdir}", "--json")
    assert json.loads(done.stdout)["test_error"] == summary_of(undisturbed)["test_error"]


@pytest.mark.slow
def test_sigterm_to_one_saves_both_at_the_same_step_and_one_process_can_go_on(tmp_path):
    pair = Pair(LONG, tmp_path / "run")
    pair.wait_for_lines(2)
    pair.each[1].send_signal(signal.SIGTERM)
    (first, _, err), (second, _, other) = pair.end()
    assert (first, second) == (143, 143), err + other
    words = re.search(r"vffjax: told to leave \(SIGTERM\): epoch \d+ of 20(, step \d+ of 11,)? is saved; the same command .*\n", err)
    assert words
    assert other == words[0]
    before = records(pair.workdir)
    assert 2 <= len(before) < 20

    train(tiny(**LONG), pair.workdir)
    assert records(pair.workdir)[: len(before)] == before
    assert len(read_metrics(pair.workdir)) == 20
    summary = summary_of(pair.workdir)
    assert summary["test_error"] < 20  # chance is 90
    origins = [(origin["devices"], origin["processes"]) for origin in (*summary["earlier_origins"], summary)]
    assert origins == [(4, 2), (len(jax.devices()), 1)]


@pytest.mark.slow
def test_what_differs_between_the_processes_is_named_on_both(tmp_path):
    pair = Pair(CHANGES, tmp_path / "run", {"learning_rate": 2e-2})
    line = "vffjax: error: config.learning_rate: 0.01 in process 0, and 0.02 in process 1; give all processes the same command"
    for status, out, err in pair.end():
        assert (status, out) == (2, ""), err
        assert err.startswith(line)
        assert err.count("\n") == 1
    assert not pair.workdir.exists()


@pytest.mark.slow
def test_bad_input_of_one_process_ends_the_other_with_its_words(tmp_path):
    pair = Pair(CHANGES, tmp_path / "run", {"data_dir": "/nowhere", "dataset": "npz"})
    (first, _, err), (second, _, other) = pair.end()
    assert (first, second) == (hosts.LOST, 2), err + other
    words = other.removeprefix("vffjax: error: ").strip()
    assert "process 1 of this run has ended (" in err
    assert words[:100] in err
    assert f"; {hosts.CORRECT}\n" in err


@pytest.mark.slow
def test_an_error_that_nobody_foresaw_ends_the_other_with_its_words(tmp_path):
    broken = "from vffjax.runs import experiment; experiment.start = lambda *_: 1 / 0"
    pair = Pair(CHANGES, tmp_path / "run", code=broken)
    (first, _, err), (second, _, other) = pair.end()
    assert (first, second) == (hosts.LOST, 1), err + other
    assert "Traceback" in other
    assert "ZeroDivisionError: division by zero" in other
    assert f"process 1 of this run has ended (division by zero); {hosts.AGAIN}\n" in err


@pytest.mark.slow
def test_features_of_frozen_groups_are_kept_in_two_processes_too(tmp_path):
    changes = CHANGES | {"schedule": "sequential", "feature_cache": "host", "epochs": 1}
    pair = Pair(changes, tmp_path / "two")
    assert [status for status, *_ in pair.end()] == [0, 0]
    train(tiny(**changes), tmp_path / "one")
    for stage, (one, two) in enumerate(zip(read_metrics(tmp_path / "one"), read_metrics(pair.workdir), strict=True)):
        np.testing.assert_allclose(two["loss_per_group"][stage], one["loss_per_group"][stage], rtol=10 * TOLERANCE)


def test_folders_of_their_own_are_no_shared_one(tmp_path, monkeypatch):
    (tmp_path / ".lock").touch()  # of an earlier run, which says nothing
    experiment._check_shared(tmp_path)
    monkeypatch.setattr(pathlib.Path, "touch", lambda path: None)  # process 0 writes elsewhere
    with pytest.raises(UserError, match="not all processes see there what process 0 has written; give all processes the same folder"):
        experiment._check_shared(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_run_of_one_process_waits_for_nobody():
    assert (hosts.count(), hosts.is_first(), hosts.gathered(("a", 1)), hosts.of_first({1: 2}), hosts.any_of(True)) == (
        *(1, True),
        *([("a", 1)], {1: 2}, True),
    )
    hosts.barrier()
    with hosts.together(), hosts.first_only() as first:
        assert first
    with pytest.raises(OSError, match="full"), hosts.first_only():
        raise OSError("full")
    hosts.leave(3)  # only a process that was joined to others ends here


def test_the_options_of_processes_are_taken_from_the_command_line():
    rest = ["--config", "--process", "--config.epochs=3", "--workdir", "w"]
    given, left = processes.split([*rest, "--coordinator", "host:80", "--processes=4", "--process", "3"])
    assert (given, left) == (hosts.Processes("host:80", 4, 3), rest)
    assert processes.split(["--coordinator=auto", "--heartbeat=30"]) == (hosts.Processes("auto", heartbeat=30), [])
    assert processes.split(rest) == (None, rest)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--coordinator=here", "--coordinator=here: no address; give the address of process 0 as HOST:PORT"),
        ("--coordinator=here:99999", "--coordinator=here:99999: no address"),
        ("--processes=2 --process=0", "--coordinator=: missing; give the address"),
        ("--coordinator=h:1 --processes=2", "--process: missing; --coordinator h:1 needs"),
        ("--coordinator=h:1 --process=2", "--processes: missing; --coordinator h:1 needs"),
        ("--coordinator=h:1 --processes=2 --process=2", "--process=2: there are --processes=2, numbered from 0"),
        ("--coordinator=h:1 --processes=two --process=2", "--processes=two: 'two' is too small or no whole number"),
        ("--coordinator=auto --process=1", "--process=1: --coordinator=auto finds it out itself"),
        ("--coordinator=auto --heartbeat=1", "--heartbeat=1: '1' is too small"),
    ],
)
def test_wrong_options_of_processes_are_refused(arguments, message):
    with pytest.raises(UserError) as raised:
        processes.split(arguments.split())
    assert str(raised.value).startswith(message)


def test_where_jax_knows_no_cluster_auto_is_refused():
    done = in_a_process("train.py", CONFIG, "--coordinator=auto")
    assert (done.returncode, done.stdout) == (2, "")
    assert "vffjax: error: --coordinator=auto: JAX does not find the processes of this run" in done.stderr
