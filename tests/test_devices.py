"""Several devices train one run, each on its part of every batch. The fake devices are in processes of their own (many_devices.py)."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from command_lines import ROOT
from runs import tiny, train

FLAGS = (
    "--xla_force_host_platform_device_count=8 --xla_cpu_collective_call_warn_stuck_timeout_seconds=300 "
    "--xla_cpu_collective_call_terminate_timeout_seconds=600"  # on two cores the devices wait for each other
)
CONV = {"network": "conv4", "widths": (4, 4, 6, 6), "pools": (1, 2, 1, 2), "epochs": 2}
SEQUENTIAL = {"schedule": "sequential", "feature_cache": "device", "epochs": 1}
CASES = {
    "one": ("one", CONV | {"devices": 1}),
    "eight": ("eight", CONV),
    "eight again": ("again", CONV | {"devices": 8}),
    "eight, stopped": ("stopped", CONV | {"devices": 8, "segment_steps": 4}, 1, 4),
    "eight, went on": ("stopped", CONV | {"devices": 8, "segment_steps": 4}),
    "host": ("host", CONV | {"data_on": "host"}),
    "four": ("four", CONV | {"devices": 4}),
    "four, finished": ("four", CONV | {"devices": 1}),
    "odd": ("odd", {"batch_size": 30, "epochs": 1}),
    "head, one": ("head-one", {"rule": "head", "grouping": "all", "epochs": 1, "devices": 1}),
    "head": ("head", {"rule": "head", "grouping": "all", "epochs": 1}),
    "sequential, one": ("sequential-one", SEQUENTIAL | {"devices": 1}),
    "sequential": ("sequential", SEQUENTIAL | {"noise_redrawn": "epoch"}),
    "sequential, host": ("sequential-host", SEQUENTIAL | {"noise_redrawn": "epoch", "feature_cache": "host"}),
    "triplet, one": ("triplet-one", {"labelling": "triplet", "epochs": 1, "devices": 1}),
    "triplet": ("triplet", {"labelling": "triplet", "epochs": 1}),
    "goes on": ("here", {}),
    "told": ("told", {"devices": 8}),
    "not divided": ("x", {"batch_size": 36, "devices": 8}),
    "too many": ("x", {"devices": 9}),
    "eight, one, four": ("elastic", CONV | {"epochs": 3, "numbers": [8, 1, 4]}),
    "one, three epochs": ("elastic-one", CONV | {"epochs": 3, "devices": 1}),
}
# Winograd's loops over a few images run for 16 and more channels.
WIDE = {"network": "conv4", "widths": (16, 16, 6, 6), "pools": (1, 2, 1, 2), "train_examples": 720}
RESNET = {"network": "resnet18", "width_factor": 0.0625, "grouping": "block", "train_examples": 720}
APART = {"conv, vff": WIDE, "conv, head": WIDE | {"rule": "head"}, "resnet by block, vff": RESNET}
APART |= {"resnet by block, head": RESNET | {"rule": "head"}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What came out of each case. "goes on" and "told" go on with runs that began here, on one device."""
    out = tmp_path_factory.mktemp("devices")
    for folder in ("here", "told"):
        work = out / folder
        train(tiny(), work)
        for path in (work / "checkpoints").glob("3*"):
            subprocess.run(["rm", "-r", path], check=True)
        (work / "summary.json").unlink()
    found = on_eight_devices("many_devices.py", str(out), json.dumps(CASES))
    assert found["number"] == 8
    return found["runs"] | {name: found[name] for name in ("proofs", "collectives")}


def on_eight_devices(script, *arguments):
    """What a script of this folder prints, in JSON, in a process with eight fake devices."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests" / script), *arguments]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# Measured: losses 5e-14, states 2e-11 apart in float64.
@pytest.mark.slow
def test_in_float64_eight_devices_are_one_after_twenty_steps():
    for name, apart in on_eight_devices("devices_apart.py", "float64", json.dumps(APART)).items():
        assert apart["devices"] == 8
        assert 0 < apart["states"] < 1e-9, name
        assert apart["losses"] < 1e-9, name


def test_in_float32_the_first_step_is_that_of_one_device():
    for name, apart in on_eight_devices("devices_apart.py", "float32", json.dumps({"conv, vff": WIDE})).items():
        assert apart["losses"] < 1e-5, name
        assert 0 < apart["states"] < 1e-5, name


@pytest.mark.parametrize(("many", "one"), [("eight", "one"), ("four", "one"), ("head", "head, one"), ("triplet", "triplet, one")])
def test_several_devices_learn_what_one_does_up_to_rounding(many, one, runs):
    assert runs[one]["devices"] == 1 < runs[many]["devices"]
    for a, b in zip(runs[many]["records"], runs[one]["records"], strict=True):
        np.testing.assert_allclose(a["loss_per_group"], b["loss_per_group"], rtol=1e-4)
        assert a["val_error"] == pytest.approx(b["val_error"], abs=5)


def test_the_same_number_of_devices_gives_the_same_bits_wherever_the_images_lie(runs):
    assert runs["eight"]["states"] == runs["eight again"]["states"] == runs["host"]["states"]
    assert runs["sequential"]["states"] == runs["sequential, host"]["states"]
    assert runs["eight"]["states"] != runs["one"]["states"]  # other sums, so other bits: else one device would have done it all


def test_a_run_on_eight_devices_that_was_stopped_within_an_epoch_goes_on_to_the_same_bits(runs):
    assert re.match(r"epoch 2 of 2, step \d of 11, is saved", runs["eight, stopped"]["left"])
    assert runs["eight, went on"]["states"] == runs["eight"]["states"]
    assert runs["eight, went on"]["errors"] == runs["eight"]["errors"]


def test_it_says_how_many_devices_train_and_why_not_all(runs):
    assert first_line(runs["eight"]).endswith("; cpu, 8 of 8 devices")
    assert first_line(runs["four"]).endswith("; cpu, 4 of 8 devices")
    assert first_line(runs["odd"]).endswith("; cpu, 6 of 8 devices, because config.batch_size=30 cannot be divided by more")
    assert runs["odd"]["devices"] == 6


def test_a_run_keeps_the_number_that_it_began_with_unless_it_is_told_otherwise(runs):
    assert first_line(runs["goes on"]).endswith("; cpu, 1 of 8 devices, as the run began")
    assert runs["goes on"]["devices"] == 1
    assert "; cpu, 8 of 8 devices, and 1 until here: " in first_line(runs["told"])
    assert runs["told"]["devices"] == 8


def test_a_finished_run_that_is_started_on_another_number_warns_of_no_bits(runs):
    again = runs["four, finished"]
    assert (again["devices"], again["states"], again["errors"]) == (4, runs["four"]["states"], runs["four"]["errors"])
    assert first_line(again).endswith("; cpu") and "bits" not in again["err"]


def first_line(run):
    return next(line for line in run["err"].splitlines() if line.startswith("workdir "))


def test_a_run_that_goes_on_with_other_numbers_learns_what_one_device_does(runs):
    changed = runs["eight, one, four"]
    assert changed["devices"] == 4
    assert len(changed["records"]) == 3
    for a, b in zip(changed["records"], runs["one, three epochs"]["records"], strict=True):
        np.testing.assert_allclose(a["loss_per_group"], b["loss_per_group"], rtol=1e-4)


def test_a_convolution_divided_over_devices_needs_one_sum_and_nothing_else(runs):
    assert runs["collectives"] == {"all-reduce": 1}  # of the kernel's gradient; the loops over a few rows need none


def test_evaluate_finds_the_errors_of_the_run_again(runs):
    for name in ("eight", "four", "head", "sequential", "goes on"):
        assert runs[name]["evaluated"] == runs[name]["errors"], name


def test_the_certificate_is_of_the_program_for_these_devices(runs):
    local, whole = runs["proofs"]["layer"], runs["proofs"]["all"]
    assert local["local"] and not whole["local"]
    assert local["devices"] == whole["devices"] == 8


def test_a_number_that_cannot_be_is_refused(runs):
    assert "config.batch_size=36: cannot be divided by config.devices=8; use 32, or devices=0" in runs["not divided"]["error"]
    assert "config.devices=9: JAX sees 8 " in runs["too many"]["error"]
