"""CIFAR-10's training compiles for TPUs that are not here, and their programs do nothing that would make a real one slow."""

import importlib.util

import pytest

from compiled import check_bytes, check_divided, check_sound, found, newest

without_compiler = importlib.util.find_spec("libtpu") is None
pytestmark = [
    pytest.mark.slow,
    pytest.mark.full_optimisation,
    pytest.mark.skipif(without_compiler, reason="libtpu is not installed; pip install -e .[tpu-compiler]"),
]


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


@newest
def test_the_program_of_the_yardstick_on_tpu_v5e_stays_within_its_bounds():
    step = found("v5e")
    assert step["temp_bytes"] < 115e6  # 108 MB
    assert step["launches"]["all"] <= 825  # 811
    assert step["sorts"] == []  # the random order of a batch is drawn before the loop


@newest
def test_data_parallel_training_compiles_for_four_tpus():
    check_divided(found("v5e:2x2"), found("v5e"))


@newest
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_a_tpu_of_four_holds_a_quarter_beside_the_states(chip):
    check_bytes(found(f"{chip}:2x2"), found(chip), 4)
