"""What compilers for GPUs and TPUs that are not here make of a training step, and what has to hold for every such program."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
# The bounds of the tests are about the compilers of these versions. Those of .ci/constraints-newest.txt must not be raised without a look
# at them.
PINNED = "0.12.0.1"
PARAMETERS = 4 * 9 * (3 * 128 + 128 * 128 + 128 * 256 + 256 * 256)  # bytes of the kernels of the yardstick in float32
newest = pytest.mark.skipif(jax.__version__ != PINNED, reason=f"the bounds are those of jax {PINNED}")

# In a process of its own: libtpu reads its environment once, and must not meet the backend of the other tests.
SCRIPT = """
import json, sys
sys.path.insert(0, "benchmarks")
import compile_report
from vffjax.cli.flags import parse_train
target, method, *arguments = sys.argv[1:]
(config,) = compile_report.configs_of(parse_train(arguments)[0], [method]).values()
job = compile_report.Job(config, target)
found = job.of_segment()
print(json.dumps(found if job.target.mesh else found | job.of_gather()))
"""


@functools.cache
def found(target, config="configs/cifar10.py:yardstick", method="rule"):
    """What the compiler of a target makes of a configuration in bf16."""
    arguments = [target, method, "--config", config, "--config.precision=bf16"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def check_sound(step, batch):
    """No call of the host, no sort but the one that draws a random order of the batch, and no copy of the data set."""
    assert step["host_calls"] == []
    # `vff` draws the images that its copies are made of by a random order of the batch: so many numbers are sorted, and no feature map is.
    assert [size for size in step["sorts"] if size > batch] == []
    assert len(step["sorts"]) <= 1
    assert (step["copies_of_the_data_set"], step["gather_temp_bytes"]) == (0, 0)
    # The states are donated: nearly all of the output lives where they were.
    assert step["alias_bytes"] > 0.9 * step["output_bytes"]


def check_bytes(several, one, number):
    assert several["total_bytes"] <= 1.2 * one["total_bytes"] / number + several["state_bytes"]


def check_divided(several, one):
    assert several["devices"] == 4
    assert sum(several["convolutions"].values()) == sum(one["convolutions"].values())
    assert several["host_calls"] == []
    # Devices must tell each other the gradients of the kernels, and little more for statistics, metrics, cosines and the rows of copies. A
    # feature map that had to be gathered, because something was divided badly, would be many megabytes more.
    sums = {kind for kind in several["collectives"] if "all-reduce" in kind}
    assert sums - {"all-reduce s32"} == {"all-reduce f32"}  # and so none is rounded to bf16
    told = sum(entry["bytes"] for entry in several["collectives"].values())
    assert PARAMETERS <= told <= 4 * PARAMETERS
