"""A run that was saved with one device goes on in a process that has eight. The fake devices are in processes of this file only."""

import os
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest

from command_lines import ROOT
from runs import summary_of, tell_to_leave, tiny, train
from vffjax.runs.logbook import Logbook, read_metrics
from vffjax.runs.termination import Terminated

# Said in docs/runs.md: the two epochs that follow, of losses, relative. Rounding grows as training goes on.
TOLERANCE = 1e-3
CONV = {"network": "conv4", "widths": (4, 4, 6, 6), "pools": (1, 2, 1, 2)}


@pytest.mark.slow
def test_a_run_that_goes_on_with_other_devices_stays_within_the_tolerance(tmp_path):
    sound = Logbook.epoch

    def signalled(self, record):
        tell_to_leave()
        return sound(self, record)

    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    train(tiny(**CONV), here)
    with mock.patch.object(Logbook, "epoch", signalled), pytest.raises(Terminated, match="epoch 1 of 3"):
        train(tiny(**CONV), elsewhere)

    flags = "--xla_force_host_platform_device_count=8"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}"}
    own = ("widths", "pools", "overrides", "devices")
    keys = [f"--config.{key}={value}" for key, value in tiny(**CONV).to_dict().items() if key not in own] + ["--config.devices=8"]
    command = [sys.executable, "train.py", "--config=configs/digits.py", *keys, "--config.widths=(4,4,6,6)", f"--workdir={elsewhere}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "epoch 1/3" not in done.stderr
    assert "epoch 2/3" in done.stderr

    summary = summary_of(elsewhere)
    assert flags in summary["flags"]["XLA_FLAGS"]
    assert summary["devices"] == 8
    assert [origin["cores"] for origin in summary["earlier_origins"]] == [summary["cores"]]
    found, wanted = read_metrics(elsewhere), read_metrics(here)
    assert [r["epoch"] for r in found] == [1, 2, 3]
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a["loss_per_group"], b["loss_per_group"], rtol=TOLERANCE)
