"""Processes killed from outside: the short form of faults/kill.py, which does the same for as many trials as one likes."""

import os
import random
import signal
import time

import pytest

from command_lines import CONFIG, in_a_process
from faults import kill
from runs import TINY, tiny, train

JOINT = TINY | {"epochs": 8, "checkpoint_every": 1}
SEQUENTIAL = TINY | {"epochs": 4, "checkpoint_every": 2, "schedule": "sequential"}
CASES = {
    "joint": (JOINT, [("in a save", signal.SIGKILL), ("at a line", signal.SIGKILL)]),
    "sequential": (SEQUENTIAL, [("between groups", signal.SIGKILL), ("at a line", signal.SIGTERM)]),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "signals"),
    [
        pytest.param(*CASES["sequential"], id="sequential"),
        pytest.param(*CASES["joint"], id="joint, as a run compiles", marks=pytest.mark.full_optimisation),
    ],
)
def test_a_process_that_is_killed_goes_on_to_the_bits_of_an_undisturbed_one(changes, signals, tmp_path):
    train(tiny(**changes), tmp_path / "reference")
    workdir, draw, signalled = tmp_path / "run", random.Random(0), 0
    for instant, how in signals:
        run = kill.Run(changes, workdir, dict(os.environ))
        where = kill.wait_for(run, instant, 0.0, draw)
        run.process.send_signal(how)
        status = run.end()
        assert status in (-9, 143, -15, 0), where
        signalled += status != 0
    assert signalled, "no signal came in time"
    status = kill.Run(changes, workdir, dict(os.environ)).end()
    assert kill.judge({"status": status, "signals": []}, tmp_path / "reference", workdir, signal.SIGKILL) == []


@pytest.mark.slow
def test_a_second_process_is_refused_and_the_first_goes_on(tmp_path):
    changes = TINY | {"epochs": 20_000, "checkpoint_every": 10_000}
    run = kill.Run(changes, tmp_path / "run", dict(os.environ))
    try:
        while run.alive() and run.lines() < 1:
            time.sleep(0.01)
        assert run.alive()
        flags = [f"--config.{key}={value}" for key, value in changes.items()]
        done = in_a_process("train.py", CONFIG, *flags, f"--workdir={tmp_path / 'run'}")
        assert run.alive()
    finally:
        run.process.send_signal(signal.SIGTERM)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"--workdir={tmp_path / 'run'}: another run is writing here; wait for it" in done.stderr
    assert run.end() == 143


@pytest.mark.slow
def test_the_judge_sees_what_is_wrong(tmp_path):
    train(tiny(), tmp_path / "reference")
    train(tiny(seed=1), tmp_path / "run")
    sound = {"status": 0, "signals": [{"status": -9}]}
    assert kill.judge(sound, tmp_path / "reference", tmp_path / "reference", signal.SIGKILL) == []
    assert kill.judge(sound, tmp_path / "reference", tmp_path / "run", signal.SIGKILL)
    assert kill.judge(sound | {"signals": [{"status": 1}]}, tmp_path / "reference", tmp_path / "reference", signal.SIGKILL)
    metrics = tmp_path / "reference" / "metrics.jsonl"
    for text in (metrics.read_text() + metrics.read_text().splitlines()[-1] + "\n", metrics.read_text()[:-1]):
        (tmp_path / "run" / "metrics.jsonl").write_text(text)
        found = kill.judge(sound, tmp_path / "reference", tmp_path / "run", signal.SIGKILL)
        assert any(line.startswith("metrics.jsonl: epochs") for line in found)
