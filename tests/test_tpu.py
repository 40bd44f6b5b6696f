"""The training of the CIFAR-10 yardstick compiles for a TPU, by libtpu's compiler, on a machine without one."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

# In a process of its own: libtpu reads its environment once, and must not meet the backend of the other tests.
SCRIPT = """
import json, sys
sys.path.insert(0, "benchmarks")
import tpu_compile
from vffjax.cli.flags import parse_train
target = tpu_compile.Target(parse_train(sys.argv[1:])[0])
print(json.dumps(target.compile_segment() | target.compile_gather()))
"""


@pytest.mark.slow
@pytest.mark.full_optimisation
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed; pip install -e .[tpu-compiler]")
def test_the_yardstick_compiles_for_tpu_v5e_and_nothing_copies_its_data_set():
    arguments = ["--config", "configs/cifar10.py:yardstick", "--config.precision=bf16"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert "TPU v5" in found["device"]
    assert found["steps_per_epoch"] == 45_000 // 128
    # The states are donated: nearly all of the output lives where they were. A v5e chip has 16 GiB.
    assert found["alias_bytes"] > 0.9 * found["output_bytes"]
    assert found["argument_bytes"] + found["temp_bytes"] < 16 * 2**30
    # An epoch's images are gathered as they lie: no other layout of the set, and no temporaries. A segment is given its batches alone.
    assert (found["copies_of_the_data_set"], found["gather_temp_bytes"]) == (0, 0)
    assert found["argument_bytes"] < 2**26 + 2 * 13.7e6
