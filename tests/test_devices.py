"""Several devices train one run, each on its part of every batch. The fake devices are in processes of their own (many_devices.py)."""

import json
import os
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
    "host": ("host", CONV | {"data_on": "host"}),
    "four": ("four", CONV | {"devices": 4}),
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
}


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
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests" / "many_devices.py"), str(out), json.dumps(CASES)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["number"] == 8
    return found["runs"]


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


def test_it_says_how_many_devices_train_and_why_not_all(runs):
    assert "\n8 of 8 devices\n" in runs["eight"]["err"]
    assert "\n4 of 8 devices\n" in runs["four"]["err"]
    assert "\n6 of 8 devices, because config.batch_size=30 cannot be divided by more\n" in runs["odd"]["err"]
    assert runs["odd"]["devices"] == 6


def test_a_run_keeps_the_number_that_it_began_with_unless_it_is_told_otherwise(runs):
    assert "\n1 of 8 devices, as the run began\n" in runs["goes on"]["err"]
    assert runs["goes on"]["devices"] == 1
    assert "8 of 8 devices, and 1 until here: " in runs["told"]["err"]
    assert runs["told"]["devices"] == 8


def test_a_number_that_cannot_be_is_refused(runs):
    assert "config.batch_size=36: cannot be divided by config.devices=8; use 32, or devices=0" in runs["not divided"]["error"]
    assert "config.devices=9: JAX sees 8 " in runs["too many"]["error"]
