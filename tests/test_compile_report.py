"""CIFAR-10's training compiles for GPUs and TPUs that are not here, and their programs do nothing that would make a real one slow.

GPUs need jax >= 0.11, so these tests run in the leg of CI with the newest Python.
"""

import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from vffjax.costs import targets

ROOT = pathlib.Path(__file__).resolve().parents[1]
# The bounds below are about the compilers of these versions. Those of .ci/constraints-newest.txt must not be raised without a look here.
PINNED = "0.12.0.1"

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

for_tpus = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed; pip install -e .[tpu-compiler]")
for_gpus = pytest.mark.skipif(
    not targets.has_gpu_compiler(), reason="no compiler for GPUs; Python >= 3.12 and pip install -e .[cuda-compiler]"
)
newest = pytest.mark.skipif(jax.__version__ != PINNED, reason=f"the bounds are those of jax {PINNED}")
pytestmark = [pytest.mark.slow, pytest.mark.full_optimisation]


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


@for_tpus
def test_the_yardstick_compiles_for_tpu_v5e_and_nothing_copies_its_data_set():
    step = found("v5e")
    assert "TPU v5" in step["device"]
    assert step["steps_per_epoch"] == 45_000 // 128
    check_sound(step, 128)
    # A v5e chip has 16 GiB.
    assert step["argument_bytes"] + step["temp_bytes"] < 16 * 2**30
    # A segment is given its batches alone, and not the data set.
    assert step["argument_bytes"] < 2**26 + 2 * 13.7e6
    # Four layers: values, gradients of kernels, and gradients of inputs but those of the first layer of each group. No step comes twice.
    assert sum(step["convolutions"].values()) == 4 + 4 + 2
    assert {kind.split()[0] for kind in step["convolutions"]} == {"bf16"}


@for_tpus
@newest
def test_the_program_of_the_yardstick_on_tpu_v5e_stays_within_its_bounds():
    step = found("v5e")
    assert step["temp_bytes"] < 115e6  # 108 MB
    assert step["launches"]["all"] <= 825  # 811
    assert step["sorts"] == []  # the random order of a batch is drawn before the loop


@for_gpus
@pytest.mark.parametrize(
    ("config", "convolutions", "batch"), [("configs/cifar10.py:yardstick", 10, 128), ("configs/cifar10.py", None, 256)]
)
def test_on_an_h100_all_convolutions_are_bf16_and_nhwc_and_a_step_is_a_round_of_the_loop(config, convolutions, batch):
    step = found("h100", config)
    assert "H100" in step["device"]
    check_sound(step, batch)
    assert step["rounds_of_the_loop"] == step["steps_per_segment"]
    assert {tuple(kind.split()) for kind in step["convolutions"]} == {("bf16", "b01f_o01i->b01f", "{3,2,1,0}")}
    if convolutions:
        assert sum(step["convolutions"].values()) == convolutions
    assert step["argument_bytes"] < 2**26 + 8 * step["state_bytes"]


@for_gpus
@newest
def test_the_program_of_the_yardstick_on_an_h100_stays_within_its_bounds():
    step = found("h100")
    assert step["launches"]["all"] <= 119  # 117
    assert step["launches"]["copies"] == 0
    assert step["temp_bytes"] < 243e6  # 239 MB
    assert step["sorts"] == []  # the random order of a batch is drawn before the loop


@for_gpus
@newest
def test_a_step_on_an_h100_launches_little_more_than_one_of_back_propagation_and_takes_less_memory():
    step, back_propagation = found("h100"), found("h100", method="bp")
    assert step["launches"]["all"] <= 1.2 * back_propagation["launches"]["all"]  # 117 and 98
    assert step["temp_bytes"] <= back_propagation["temp_bytes"]  # 239 and 277 MB


@for_tpus
@newest
def test_data_parallel_training_compiles_for_four_tpus():
    check_divided(found("v5e:2x2"), found("v5e"))


@for_gpus
def test_data_parallel_training_compiles_for_four_gpus():
    check_divided(found("h100:4"), found("h100"))


@for_tpus
@newest
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_a_tpu_of_four_holds_a_quarter_beside_the_states(chip):
    check_bytes(found(f"{chip}:2x2"), found(chip), 4)


@for_gpus
@pytest.mark.parametrize(("cards", "number"), [("4", 4), ("2x4", 8)])
def test_a_gpu_of_several_holds_its_part_beside_the_states(cards, number):
    check_bytes(found(f"h100:{cards}"), found("h100"), number)


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


# Bytes of the yardstick's kernels in float32.
PARAMETERS = 4 * 9 * (3 * 128 + 128 * 128 + 128 * 256 + 256 * 256)
