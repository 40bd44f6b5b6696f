"""The pipeline of groups has the bits of the joint schedule on any number of devices. Fake devices are in a process of their own."""

import importlib.util
import itertools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from command_lines import ROOT, in_a_process
from oracles import CONV, MLP, assert_same, config_of, small_run
from runs import untimed
from vffjax.errors import UserError
from vffjax.proofs import locality
from vffjax.training import checks, pipeline, stages
from vffjax.training.pipeline import PipelinedEpoch
from vffjax.training.stages import Work, balanced

# ----------------------------------------------------------------------------------------------------------------------------------
# Whole runs


# Ten steps in an epoch, in chunks of one length, so that every stage is compiled once.
SHORT = {"train_examples": 360, "segment_steps": 2, "epochs": 2}
FOUR = SHORT | {"network": "conv4", "widths": (4, 4, 6, 6), "pools": (1, 2, 1, 2), "grouping": "layer", "epochs": 1}
MANY = SHORT | {"widths": (16, 12, 10, 8), "grouping": "layer"}
TWO = {"widths": (16, 12, 12), "data_on": "host", "optimizer": "sgd", "mixup": 0.5, "noise_redrawn": "epoch", "on_nonfinite": "skip"}
TWO = SHORT | TWO | {"epochs": 1}
ODD = SHORT | {"rule": "ff", "grouping": "layer", "frozen_groups": 1, "widths": (16, 12, 8), "batch_size": 30, "epochs": 1}
PIPE = {"schedule": "pipeline"}
CASES = {
    "joint": ("joint", FOUR | {"devices": 1}),
    "2": ("2", FOUR | PIPE | {"devices": 2}),
    "3": ("3", FOUR | PIPE | {"devices": 3, "segment_steps": 5}),
    "4": ("4", FOUR | PIPE),
    "dense, joint": ("dense", MANY | {"devices": 1}),
    "killed": ("killed", MANY | PIPE | {"devices": 3}, 1, 5),
    "resumed on others": ("killed", MANY | PIPE | {"devices": 2}),
    "joint, killed": ("both", MANY | {"devices": 1}, 0, 4),
    "piped, killed": ("both", MANY | PIPE, 1, 3),
    "joint again": ("both", MANY),
    "divided, killed": ("divided", SHORT | {"devices": 2}, 0, 4),
    "divided, then piped": ("divided", SHORT | PIPE | {"devices": 1}),
    "two, joint": ("two-joint", TWO | {"devices": 1}),
    "two": ("two", TWO | PIPE),
    "odd, joint": ("odd-joint", ODD | {"devices": 1}),
    "odd": ("odd", ODD | PIPE),
    "odd, one device": ("odd-one", ODD | PIPE | {"devices": 1}),
    "too many": ("x", FOUR | PIPE | {"devices": 5}),
    "not there": ("x", FOUR | PIPE | {"devices": 9}),
}
# At level 0 the compiler rounds otherwise where a program is cut elsewhere. So these runs compile as a user's do.
AS_A_RUN_COMPILES = pytest.mark.full_optimisation


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What came out of each case, in one process with eight fake devices."""
    flags = "--xla_force_host_platform_device_count=8 --xla_cpu_collective_call_terminate_timeout_seconds=600"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests" / "many_devices.py"), str(tmp_path_factory.mktemp("pipeline")), json.dumps(CASES)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["runs"]


SAME = [
    *(("joint", other) for other in ("2", "3", "4")),
    *(("dense, joint", other) for other in ("resumed on others", "joint again")),
    *(("two, joint", "two"), ("odd, joint", "odd"), ("odd, joint", "odd, one device")),
]


@AS_A_RUN_COMPILES
@pytest.mark.parametrize(("joint", "piped"), SAME)
def test_the_pipeline_has_the_bits_of_the_joint_schedule(joint, piped, runs):
    one, other = runs[joint], runs[piped]
    assert one["states"] == other["states"]
    assert [untimed(record) for record in one["records"]] == [untimed(record) for record in other["records"]]
    assert one["errors"] == other["errors"]


@AS_A_RUN_COMPILES
def test_the_runs_that_were_killed_left_inside_of_an_epoch(runs):
    for name, epoch in (("killed", 2), ("joint, killed", 1), ("piped, killed", 2)):
        assert f"epoch {epoch} of 2, step " in runs[name]["left"], runs[name]


@AS_A_RUN_COMPILES
def test_it_says_which_groups_lie_where_and_how_far_the_balance_goes(runs):
    assert "; cpu, 2 of 8 devices: groups 0 1 | 2 3; the largest does " in runs["2"]["err"]
    assert "; cpu, 4 of 8 devices: groups 0 | 1 | 2 | 3; the largest does " in runs["4"]["err"]
    assert [runs[name]["devices"] for name in ("2", "3", "4", "two", "odd, one device")] == [2, 3, 4, 2, 1]


@AS_A_RUN_COMPILES
def test_a_change_to_the_pipeline_and_back_is_said_and_warns_only_if_bits_change(runs):
    said = runs["piped, killed"]["err"] + runs["joint again"]["err"]
    assert "config.schedule: 'joint' until here, 'pipeline' from here on\n" in said
    assert "config.schedule: 'pipeline' until here, 'joint' from here on\n" in said
    for quiet in (said, runs["resumed on others"]["err"]):
        assert "no longer" not in quiet and "need not have the bits" not in quiet
    assert "batches were divided over 2 devices until here: the bits are no longer those" in runs["divided, then piped"]["err"]


@AS_A_RUN_COMPILES
def test_a_number_of_devices_that_cannot_be_is_refused(runs):
    assert "config.devices=5: a pipeline has at most one device for each group, and there are 4" in runs["too many"]["error"]
    assert "config.devices=9: JAX sees 8 " in runs["not there"]["error"]


REFUSED = {
    "hard negatives": ({"labelling": "triplet", "negatives": "hard"}, r"config\.schedule='pipeline': .*heads of all groups"),
    "hard negatives of ff": ({"rule": "ff", "negatives": "hard"}, r"config\.schedule='pipeline': .*heads of all groups"),
    "kept features": ({"feature_cache": "device"}, r"config\.feature_cache='device': no group is frozen"),
}


@pytest.mark.parametrize("changes", REFUSED)
def test_what_cannot_be_a_pipeline_is_refused_before_anything_is_compiled(changes):
    keys, said = REFUSED[changes]
    with pytest.raises(UserError, match=said):
        config_of(**MLP, **PIPE, **keys)


# ----------------------------------------------------------------------------------------------------------------------------------
# Memory: what is donated, and how much is in flight. Here the stages share one device, on which `device_put` copies nothing.


def on_one_device(run, number=3):
    """A pipeline whose stages all lie on the one device of this process."""
    epoch = PipelinedEpoch(run.plan, 2, 1, (8, 8, 2))
    epoch.devices = jax.devices()[:1] * number
    epoch.spans = stages.spans_of(run.plan, (8, 8, 2), number)
    return epoch


@pytest.fixture(scope="module")
def three():
    """A run of three groups in the pipeline, and what an undisturbed epoch makes of it."""
    run = small_run(config_of(**MLP, **PIPE, batch_size=8, segment_steps=2), examples=8 * 10)
    return run, jax.device_get(on_one_device(run)(run.task, jax.tree.map(jnp.copy, run.states), run.data, 0))


def test_only_states_are_ever_donated(three, monkeypatch):
    run, wanted = three
    moved, sound = [], pipeline.on
    monkeypatch.setattr(pipeline, "on", lambda device, tree: moved.extend(jax.tree.leaves(tree)) or sound(device, tree))
    states = jax.tree.map(jnp.copy, run.states)
    assert_same(on_one_device(run)(run.task, states, run.data, 0), wanted)
    assert len(moved) > 100
    kept = [*moved, *jax.tree.leaves((run.task, run.data))]
    assert not any(leaf.is_deleted() for leaf in kept)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(states))  # as an `Epoch` takes them


def test_the_caller_s_own_memory_is_neither_written_nor_read_later(three):
    run, wanted = three
    given = jax.tree.map(np.array, run.states)
    before, parts = jax.tree.map(np.copy, given), []
    for part in on_one_device(run).segments(run.task, given, run.data, 0):
        if not parts:
            assert_same(given, before)
        for leaf in jax.tree.leaves(given):
            leaf.fill(77)
        parts.append(part)
    assert_same(parts[-1].states, wanted[0])
    assert all((leaf == 77).all() for leaf in jax.tree.leaves(given))


def test_as_many_chunks_are_in_flight_as_there_are_stages_and_one_more(three, monkeypatch):
    run, _ = three
    waited, sound = [], jax.block_until_ready
    epoch = on_one_device(run, 2)
    monkeypatch.setattr(pipeline.jax, "block_until_ready", lambda tree: waited.append(len(yielded)) or sound(tree))
    yielded = []
    yielded.extend(part.done for part in epoch.segments(run.task, jax.tree.map(jnp.copy, run.states), run.data, 0))
    # The third chunk is dispatched while two are in flight, and then the host waits for the first of them.
    assert len(yielded) == len(epoch.pieces) == 5
    assert waited == [2, 3, 4]


def test_chunks_are_so_short_that_filling_the_pipeline_costs_little():
    plan = checks.plan_of(config_of(**MLP, **PIPE, batch_size=8), 8 * 1000, (8, 8, 2), 3)
    assert pipeline.chunk_length(plan, (8, 8, 2), 4, 500) == 1000 // 32
    assert pipeline.chunk_length(plan, (8, 8, 2), 4, 5) == 5
    large = pipeline.LARGEST_BYTES // (4 * plan.rows_of_a_step * 1000 * 1000 * 2)
    assert pipeline.chunk_length(plan, (1000, 1000, 2), 4, 500) == max(2, large)
    assert pipeline.chunk_length(checks.plan_of(config_of(**MLP, **PIPE, segment_steps=77), 8000, (8, 8, 2), 3), (8, 8, 2), 4, 5) == 77


def test_states_that_move_to_the_device_of_their_stage_leave_the_first_one():
    code = """
import jax, numpy as np
from vffjax.training.pipeline import owned
first, second = jax.devices()
x = jax.device_put(np.arange(3.0), first)
y = owned(second, x)
print(x.is_deleted(), y.devices() == {second}, np.asarray(y).tolist())
"""
    done = in_a_process("-c", code, XLA_FLAGS="--xla_force_host_platform_device_count=2")
    assert done.stdout == "True True [0.0, 1.0, 2.0]\n"


# ----------------------------------------------------------------------------------------------------------------------------------
# The balance


def test_groups_are_dealt_out_as_evenly_as_any_cut_does():
    rng = np.random.default_rng(0)
    for _ in range(60):
        work = [Work(*map(int, rng.integers(0, 9, 3))) for _ in range(rng.integers(1, 9))]
        for number in range(1, len(work) + 1):
            cuts = itertools.combinations(range(1, len(work)), number - 1)
            every = [list(itertools.pairwise([0, *cut, len(work)])) for cut in cuts]
            assert judged(work, balanced(work, number)) == min(judged(work, spans) for spans in every)
            assert balanced(work, number) in every


def judged(work, spans):
    """The largest FLOP of a stage, then the largest bytes."""
    return tuple(max(sum(of(w) for w in work[first:last]) for first, last in spans) for of in (lambda w: w.flop, lambda w: w.bytes))


def test_the_work_of_a_group_is_that_of_its_layers_without_the_gradient_of_its_input():
    plan = checks.plan_of(config_of(**CONV, rule="head", frozen_groups=1, batch_size=10), 100, (8, 8, 3), 3)
    forward = [2 * 10 * k * p for k, p in ((27 * 4, 64), (36 * 4, 64), (36 * 6, 16), (54 * 6, 16))]
    work = stages.group_work(plan, (8, 8, 3))
    assert [w.flop for w in work] == [forward[0] + forward[1], 2 * forward[2] + 3 * forward[3]]
    # Of each kernel three copies of 4 bytes; the map of the first layer of each group, before it is pooled, is its largest.
    assert [w.bytes for w in work] == [12 * 4 * (27 + 36) + 4 * 10 * 4 * 64, 12 * 6 * (36 + 54) + 4 * 10 * 6 * 16]


def test_a_stage_that_dominates_says_where_to_cut():
    uneven = {"network": "conv4", "widths": (4, 4, 4, 64), "pools": (1, 1, 1, 1), "batch_size": 8}

    def said(number, **changes):
        return stages.balance(checks.plan_of(config_of(**PIPE, **uneven | changes), 100, (8, 8, 3), 3), (8, 8, 3), number)

    assert said(2).startswith("groups 0 | 1; the largest does ") and "cut" in said(2)
    assert "another config.grouping could cut group 0, best before its layer 2" in said(2, widths=(32, 32, 32, 4))
    assert "the largest does 65% of the work; on 3 devices it would be 37%" in said(2, **CONV, grouping="layer")
    assert said(1) == "2 groups on one device"


# ----------------------------------------------------------------------------------------------------------------------------------
# The proof, and programs for devices that are not there


def test_the_certificate_examines_the_stages():
    found = locality.certify(config_of(**MLP, **PIPE), numeric=False)
    assert found["local"]
    assert [program["program"] for program in found["programs"]] == ["step", "segment", "losses"]


def test_a_gradient_from_one_stage_to_the_next_is_found(monkeypatch):
    sound = pipeline.run_stage

    def leaking(plan, first, task, states, *given):
        new, streams, metrics = sound(plan, first, task, states, *given)
        return new, streams._replace(rows=streams.rows + jax.tree.leaves(states[0].params)[0].sum()), metrics

    monkeypatch.setattr(pipeline, "stage", leaking)
    found = locality.certify(config_of(**MLP, **PIPE), numeric=False)
    assert not found["local"]
    assert {(v["kind"], v["program"]) for v in found["violations"]} == {("forward", "segment")}


# In a process of its own: libtpu reads its environment once, and must not meet the backend of the other tests.
FOR_TPU = ["--config", "configs/digits.py", "--config.grouping=layer", "--config.precision=bf16", "--target", "tpu", "--steps", "4"]


def scaled(*arguments):
    """What benchmarks/scaling.py finds."""
    command = [sys.executable, str(ROOT / "benchmarks" / "scaling.py"), *arguments]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.full_optimisation
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed; pip install -e .[tpu-compiler]")
def test_each_stage_compiles_for_its_own_device_of_a_tpu():
    rows = scaled(*FOR_TPU)["rows"]
    assert [row["stage"] for row in rows] == [0, 1, 2, 3]
    assert len({row["device"] for row in rows}) == 4
    for row in rows:
        assert 0 < row["alias_bytes"] < row["argument_bytes"]  # the states are donated, and the streams are not


@pytest.mark.slow
def test_the_bytes_between_devices_are_those_of_what_crosses():
    mlp = ["--config", "configs/digits.py", "--config.network=mlp", "--config.widths=(6,5)", "--config.batch_size=16"]
    found = scaled(*mlp, "--devices", "1,2,4", "--steps", "8")["rows"]
    rows = {(row["form"], row["devices"]): row for row in found}
    assert len(rows) == 9
    assert "there are 2 groups" in rows["pipeline", 4]["problem"]
    bp = "back-propagation, data parallel"
    for form in ("pipeline", "data parallel", bp):
        assert rows[form, 1]["bytes_between_devices"] == 0
        assert rows[form, 2]["seconds"] > 0 and rows[form, 2]["expected_seconds"] > 0
    # 16 images and 20 copies: 6 numbers of each, and their labels.
    assert rows["pipeline", 2]["most_bytes_out_of_a_device"] == 4 * (36 * 6 + 36)
    gradients = 4 * (64 * 6 + 6 * 5 + 2 * (6 + 5) + 5 * 10 + 10)
    assert gradients <= rows[bp, 2]["most_bytes_out_of_a_device"] < 2 * gradients
    assert rows[bp, 4]["bytes_between_devices"] == 3 * rows[bp, 2]["bytes_between_devices"]
