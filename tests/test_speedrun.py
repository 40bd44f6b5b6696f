"""The speed board: a race on digits, what it refuses, and what its line says."""

import pathlib
import sys

import jax
import numpy as np
import pytest
import runs

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "benchmarks"))
import speedrun

from vffjax.errors import UserError
from vffjax.trainer import make_plan


@pytest.fixture
def raced(monkeypatch):
    """`raced(target)` on tiny digits; also the labels of every epoch that ran, with the sum of the parameters it started from."""
    seen = []
    original = speedrun.make_epoch

    class Watched:
        def __init__(self, plan):
            self.jitted = original(plan)

        def lower(self, *arguments):
            self.compiled = self.jitted.lower(*arguments).compile()
            return self

        def compile(self):
            def epoch(task, states, data, number):
                seen.append((np.asarray(data.labels), float(sum(np.abs(leaf).sum() for leaf in jax.tree.leaves(states)))))
                return self.compiled(task, states, data, number)

            return epoch

    monkeypatch.setattr(speedrun, "make_epoch", Watched)

    def run(target):
        with runs.compiled_once():
            return speedrun.race(runs.tiny(), target), seen

    return run


def test_the_clock_stops_at_the_first_epoch_that_reaches_the_target(raced):
    result, seen = raced(0.3)
    curve = result["curve"]
    assert [point["val_accuracy"] >= 0.3 for point in curve] == [False] * (len(curve) - 1) + [True]
    assert result["seconds_to_target"] == curve[-1]["seconds"] > 0
    assert 0.2 < result["test_accuracy"] <= 1
    # One warm-up on labels that are not the images', and a fresh start after it.
    (warm_labels, warm_start), (labels, start), *_ = seen
    assert len(seen) == 1 + result["epochs"]
    assert (warm_labels != labels).mean() > 0.8
    assert warm_start == start


def test_a_target_out_of_reach_is_said(raced):
    result, _ = raced(0.999)
    assert result["seconds_to_target"] is None
    assert result["epochs"] == runs.TINY["epochs"]
    found = speedrun.summarise([result, result | {"seconds_to_target": 2.0, "test_accuracy": 0.5}])
    assert (found["reached"], found["n"], found["seconds_mean"], found["seconds_sd"]) == (1, 2, 2.0, None)
    assert "2.0 s (1 of 2 seeds)" in speedrun.line(found, 0.999)
    assert "never (0 of 1 seeds)" in speedrun.line(speedrun.summarise([result]), 0.999)


@pytest.mark.parametrize("changes", [{"grouping": "all"}, {"schedule": "sequential"}, {"val_fraction": 0.0}], ids=str)
def test_what_the_board_does_not_admit(changes):
    with pytest.raises(UserError, match=f"config.{next(iter(changes))}="):
        speedrun.check_rules(make_plan(runs.tiny(**changes), 100, 10))


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--target", "80"], "--target=80"),
        (["--target", "0.8", "--seeds", "a"], "--seeds=a"),
        (["--target", "0.8", "--out", "no/x"], "--out=no/x"),
    ],
)
def test_bad_flags_end_with_status_2_and_one_line(arguments, part, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["speedrun.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        speedrun.main()
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert error.count("\n") == 1
    assert part in error
