"""CIFAR-10's training compiles for GPUs that are not here, and their programs do nothing that would make a real one slow.

This needs jax >= 0.11, so these tests run in the leg of CI with the newest Python.
"""

import pytest

from compiled import check_bytes, check_divided, check_sound, found, newest
from vffjax.costs import targets

without_compiler = not targets.has_gpu_compiler()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.full_optimisation,
    pytest.mark.skipif(without_compiler, reason="no compiler for GPUs; Python >= 3.12 and pip install -e .[cuda-compiler]"),
]


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


@newest
def test_the_program_of_the_yardstick_on_an_h100_stays_within_its_bounds():
    step = found("h100")
    assert step["launches"]["all"] <= 119  # 117
    assert step["launches"]["copies"] == 0
    assert step["temp_bytes"] < 243e6  # 239 MB
    assert step["sorts"] == []  # the random order of a batch is drawn before the loop


@newest
def test_a_step_on_an_h100_launches_little_more_than_one_of_back_propagation_and_takes_less_memory():
    step, back_propagation = found("h100"), found("h100", method="bp")
    assert step["launches"]["all"] <= 1.2 * back_propagation["launches"]["all"]  # 117 and 98
    assert step["temp_bytes"] <= back_propagation["temp_bytes"]  # 239 and 277 MB


def test_data_parallel_training_compiles_for_four_gpus():
    check_divided(found("h100:4"), found("h100"))


@pytest.mark.parametrize(("cards", "number"), [("4", 4), ("2x4", 8)])
def test_a_gpu_of_several_holds_its_part_beside_the_states(cards, number):
    check_bytes(found(f"h100:{cards}"), found("h100"), number)
