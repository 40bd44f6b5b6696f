"""The memory ledger: what the compiler plans for a step of each method, what is compared, its command and its benchmark."""

import functools
import importlib.util
import json
import os
import sys
import types

import jax
import numpy as np
import pytest
from PIL import Image

import memory as benchmark
from command_lines import CONFIG, in_a_process
from oracles import CONV, assert_close, config_of, differs, quick_jit, small_run
from vffjax.costs import ledger, memory, targets
from vffjax.training import trainer
from vffjax.training.checks import make_config

IMAGES = make_config({"dataset": "cifar10", "network": "conv4", "widths": (8,) * 4, "batch_size": 64})
DENSE = [CONFIG, "--config.network=mlp", "--config.widths=(6,5)", "--config.batch_size=8"]


def compile_one(method, depth):
    """The row of one method for small convolutions."""
    (case,) = (case for case in ledger.cases(IMAGES, [depth], []) if case.method == method)
    return memory.measure(case, targets.find("cpu"))


@functools.cache
def temporaries(method, depth):
    return compile_one(method, depth)["temp_bytes"]


# ----------------------------------------------------------------------------------------------------------------------------------
# What the compiler plans


@pytest.mark.slow
@pytest.mark.full_optimisation
def test_joint_training_holds_one_group_however_deep_the_network_is():
    assert temporaries("vff joint", 8) <= 1.1 * temporaries("vff joint", 4)
    assert temporaries("bp", 8) > 1.5 * temporaries("bp", 4)
    assert temporaries("vff joint", 8) <= 0.5 * temporaries("bp", 8)


@pytest.mark.slow
@pytest.mark.full_optimisation
def test_without_the_fence_joint_training_would_hold_as_much_as_back_propagation(monkeypatch):
    monkeypatch.setattr(trainer, "_as_branch_on_cpu", lambda function, labels: function)
    unfenced = compile_one("vff joint", 8)["temp_bytes"]
    assert unfenced > 1.5 * temporaries("vff joint", 8)
    assert unfenced > 0.5 * temporaries("bp", 8)


@pytest.mark.slow
@pytest.mark.full_optimisation
def test_recomputing_takes_less_than_keeping():
    assert temporaries("bp checkpointed", 8) < 0.7 * temporaries("bp", 8)


@pytest.mark.slow
@pytest.mark.full_optimisation
@pytest.mark.skipif(not targets.has_tpu_compiler(), reason="libtpu is not installed; pip install -e .[tpu-compiler]")
def test_a_step_is_compiled_for_a_tpu_that_is_not_there():
    # In a process of its own: libtpu reads its environment once, and must not meet the backend of the other tests.
    script = """
import json, sys
from vffjax.cli import flags
from vffjax.costs import ledger
from vffjax.costs import memory
from vffjax.costs import targets
case = ledger.cases(flags.parse_train(sys.argv[1:])[0], [], [])[0]
print(json.dumps([memory.measure(case, targets.find(name)) for name in ("tpu", "v5e:2x2")]))
"""
    done = in_a_process("-c", script, *DENSE, "--config.batch_size=1024")
    assert done.returncode == 0, done.stderr[-2000:]
    one, four = json.loads(done.stdout.splitlines()[-1])
    for found in (one, four):
        assert "TPU v5" in found["device"]
        assert found["alias_bytes"] > 0.9 * found["output_bytes"] > 0
    assert [found["devices"] for found in (one, four)] == [1, 4]
    # The states are on each of the four, and a quarter of the batch.
    assert four["output_bytes"] == one["output_bytes"]
    images = 1024 * 8 * 8
    assert 0.7 * images < one["argument_bytes"] - four["argument_bytes"] < one["argument_bytes"] - one["alias_bytes"]


def test_a_batch_that_the_devices_cannot_share_is_refused(monkeypatch, fails):
    several = types.SimpleNamespace(number=3, mesh=object(), device=None)
    monkeypatch.setattr(targets, "find", lambda name: several)
    parts = ["--target=v5e:1x3", "a batch of 64 images cannot be divided by its 3 devices", "give other --batches"]
    fails("memory", *DENSE, "--config.batch_size=64", "--target=v5e:1x3", parts=parts)


# ----------------------------------------------------------------------------------------------------------------------------------
# Accumulated gradients


def accumulated(**changes):
    """The states of a tiny run, those after a step on the whole batch, and those after one on its four parts."""
    run = small_run(config_of(**CONV | {"rule": "head", "grouping": "all", "optimizer": "sgd"} | changes))
    steps = (functools.partial(trainer.train_step, run.plan.program, None), functools.partial(memory.accumulated_step, run.plan.program))
    arguments = (run.task, run.states, run.batch(key=jax.random.key(3)))
    return run.states[0], *(quick_jit(step)(*arguments) for step in steps)


@pytest.mark.slow
def test_the_mean_gradient_of_the_parts_is_that_of_the_batch():
    """The momentum of a first step is its gradient."""
    start, (whole, metrics), (parts, mean) = accumulated(norm="layer")
    assert_close(parts[0].opt_state, whole[0].opt_state, rtol=1e-3, atol=1e-6)
    assert_close(parts[0].params, whole[0].params, rtol=1e-4, atol=1e-6)
    assert differs(parts[0].params, start.params)
    np.testing.assert_allclose([mean["loss"], mean["accuracy"]], [metrics["loss"][0], metrics["accuracy"][0]], rtol=1e-5)


@pytest.mark.slow
def test_batch_statistics_move_once_for_each_part():
    start, (whole, _), (parts, _) = accumulated(widths=(4,), pools=(2,), network="conv")
    moved = [new[0].batch_stats["layers_0"]["norm"]["mean"][0] for new in (whole, parts)]
    old = start.batch_stats["layers_0"]["norm"]["mean"][0]
    # 0.9 of the old each time; the batch's mean is the mean of the parts', which count 0.1, 0.09, ...
    mean = (moved[0] - 0.9 * old) / 0.1
    kept = 0.9**ledger.MICRO_BATCHES
    np.testing.assert_allclose(moved[1], kept * old + (1 - kept) * mean, atol=0.1 * np.abs(mean).max())
    assert differs(moved[0], moved[1])


# ----------------------------------------------------------------------------------------------------------------------------------
# What is compared


def named(cases):
    return {(case.method, len(case.config.widths), case.config.batch_size): case.config for case in cases}


@pytest.mark.slow
def test_without_depths_the_network_is_the_configuration_as_it_stands():
    config = config_of(**CONV, dataset="cifar10", inference="sweep", overrides={"group1": {"momentum": 0.1}})
    found = named(ledger.cases(config, [], []))
    assert list(found) == [(method, 4, 12) for method in ledger.methods("vff")]
    for case in found.values():
        assert (case.network, case.widths, case.pools, case.overrides) == ("conv4", config.widths, config.pools, {})
    assert found["vff joint", 4, 12].grouping == "width"
    assert (found["bp", 4, 12].rule, found["bp", 4, 12].grouping) == ("head", "all")
    assert [case.rematerialise for case in found.values()] == [False, True, False, False, False]
    assert found["vff sequential", 4, 12].schedule == "sequential"


@pytest.mark.parametrize("network", [CONV | {"dataset": "cifar10"}, {"network": "mlp", "widths": (4, 9)}], ids=["conv4", "mlp"])
def test_a_deepened_network_has_layers_of_the_first_width_and_vff_a_group_for_each(network):
    found = named(ledger.cases(config_of(**network), [1, 7], [8, 16]))
    assert len(found) == 2 * 2 * len(ledger.methods("vff"))
    for (method, depth, _), config in found.items():
        assert config.widths == (4,) * depth
        assert config.network == {"conv4": "conv"}.get(network["network"], "mlp")
        assert config.network == "mlp" or config.pools == (1,) * depth
        assert config.grouping == ("layer" if method.startswith("vff") else "all")


def test_in_the_sequential_schedule_the_last_group_trains():
    for case in ledger.cases(config_of(widths=(4,) * 3), [3], [8]):
        plan, step = memory.make_step(case)
        assert len(plan.groups) == (3 if case.method.startswith("vff") else 1)
        if case.method != ledger.ACCUMULATED:
            assert step.args == (plan.program, 2 if case.method == "vff sequential" else None)


def rows_of(*temps, **about):
    row = {"device": "chip", "precision": "f32", "depth": 4, "batch": 8, "grouping": "all", "problem": ""} | about
    counted = dict.fromkeys(memory.BYTES, 1_500_000)
    return [row | counted | {"method": method, "temp_bytes": temp} for method, temp in zip(ledger.methods("vff"), temps, strict=False)]


def test_rows_are_set_against_bp_of_the_same_place_and_it_is_said_where_bp_takes_less():
    rows = rows_of(4e6, 2e6, 1e6, 5e6) + rows_of(8e6, 2e6, depth=8)
    ledger.compare(rows)
    assert [row["relative_to_bp"] for row in rows] == [1, 0.5, 0.25, 1.25, 1, 0.25]
    lines = ledger.table(rows).splitlines()
    assert lines[0] == "chip, f32, batch 8: MB of one training step that takes over its states"
    assert [line.endswith("bp takes less") for line in lines[2:]] == [False, False, False, True, False, False]
    assert lines[5].split()[-5:] == ["1.50", "1.25", "bp", "takes", "less"]


def test_a_step_that_does_not_fit_is_a_row_that_says_so():
    case = ledger.cases(config_of(widths=(4,)), [], [8])[0]
    rows = [memory.row(case, targets.find("cpu"), None), *rows_of(4e6)[1:]]
    ledger.compare(rows)
    assert (rows[0]["temp_bytes"], rows[0]["relative_to_bp"]) == (None, None)
    assert ledger.table(rows).splitlines()[-1].endswith("does not fit the device")


@pytest.mark.parametrize(("message", "expected"), [("RESOURCE_EXHAUSTED: Ran out of memory in hbm", None), ("INTERNAL: a bug", "raises")])
def test_only_a_lack_of_memory_is_taken_for_one(message, expected, monkeypatch):
    def fail(*_):
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(memory, "make_step", lambda case: (None, lambda task, states: None))
    monkeypatch.setattr(memory, "step_arguments", fail)
    case, target = ledger.cases(config_of(widths=(4,)), [], [8])[0], targets.find("cpu")
    if expected is None:
        assert memory.compile_step(case, target) is None
    else:
        with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
            memory.compile_step(case, target)


# ----------------------------------------------------------------------------------------------------------------------------------
# The command


@pytest.mark.slow
def test_the_command_prints_a_table_and_writes_json(call, tmp_path):
    file = tmp_path / "memory.json"
    status, out, err = call("memory", *DENSE, "--target=cpu", f"--out={file}")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert "relative to bp" in lines[1]
    assert [line[:22].split() for line in lines[2:]] == [["2", *method.split()] for method in ledger.methods("vff")]
    found = json.loads(file.read_text())
    assert (found["config"], found["target"], found["jax"]) == ("digits", "cpu", jax.__version__)
    for row in found["rows"]:
        assert all(row[key] >= 0 for key in memory.BYTES)
        assert row["total_bytes"] == row["argument_bytes"] + row["output_bytes"] - row["alias_bytes"] + row["temp_bytes"]
        assert row["widths"] == [6, 5]
        # Parameters and moments of a dense layer alone: (64 * 6 + 6 * 5) float32 three times.
        assert 12 * (64 * 6 + 6 * 5) < row["argument_bytes"] < 40_000
    assert found["rows"][0]["relative_to_bp"] == 1


@pytest.mark.slow
def test_the_rows_are_those_of_the_configurations_own_rule(call):
    for rule, extra in (("ff", []), ("head", ["--config.grouping=layer"])):
        status, out, err = call("memory", *DENSE, f"--config.rule={rule}", *extra, "--target=cpu", "--json")
        assert (status, err) == (0, "")
        found = json.loads(out)
        assert [row["method"] for row in found["rows"]][3:] == [f"{rule} joint", f"{rule} sequential"]
        assert found["network"] == {"own": True, "measured": f"mlp, widths 6 5, grouping {'layer' if rule == 'head' else 'width'}"}


@pytest.mark.slow
def test_rule_ff_takes_other_bytes_than_vff_does():
    rows = {rule: ledger.cases(config_of(widths=(6, 5), rule=rule), [], [8])[3] for rule in ("vff", "ff", "head")}
    assert {rule: case.config.rule for rule, case in rows.items()} == {"vff": "vff", "ff": "ff", "head": "head"}
    assert len({memory.measure(case, targets.find("cpu"))["temp_bytes"] for case in rows.values()}) == 3


@pytest.mark.slow
def test_a_network_that_is_not_the_configurations_own_is_named_above_the_table(call):
    conv = [CONFIG, "--config.widths=(4,4,6,6)", "--config.batch_size=8"]
    out = call("memory", *conv, "--depths=1", "--target=cpu")[1]
    first = "network: conv with 1 layers of width 4, without pooling, each layer a group; not the configuration's own network"
    assert out.splitlines()[0] == f"{first} (conv4, widths 4 4 6 6, grouping width)"
    assert json.loads(call("memory", *conv, "--depths=1", "--target=cpu", "--json")[1])["network"]["own"] is False


def test_frozen_groups_that_the_ledger_leaves_out_are_named():
    config = config_of(widths=(6, 5), frozen_groups=1)
    assert ledger.network_of(config, [])["own"] is False
    assert "without config.frozen_groups" in ledger.network_of(config, [])["measured"]
    cached = config_of(widths=(6, 5), schedule="sequential", feature_cache="device")
    assert ledger.network_of(cached, [])["measured"].endswith("without config.feature_cache")
    assert ledger.network_of(config_of(widths=(6, 5), schedule="pipeline"), [])["measured"].endswith("without the pipeline")
    assert ledger.network_of(config_of(widths=(6, 5)), [])["own"] is True


def test_a_long_name_of_a_rule_moves_no_column():
    rows = rows_of(2e6, 2e6)
    rows[1]["method"] = "my_own_rules:RULE sequential"
    ledger.compare(rows)
    lines = ledger.table(rows).splitlines()[1:]
    assert len({len(line) for line in lines}) == 1


BAD = {
    "a word for depths": (["--depths=two"], ["--depths=two", "give for example 2,4,8"]),
    "a depth of 0": (["--depths=2,0"], ["--depths=2,0", "from 1"]),
    "a gap in depths": (["--depths=2,,4"], ["--depths=2,,4"]),
    "a fraction of a batch": (["--batches=1.5"], ["--batches=1.5", "give for example"]),
    "a batch that has no four parts": (["--batches=128,130"], ["--batches=130", "not a multiple of 4", "use for example 132"]),
    "a configured batch that has no four parts": (["--config.batch_size=7"], ["config.batch_size=7", "use for example 8"]),
    "a batch larger than the data": (["--batches=4096"], ["--batches=4096", "use at most 1293"]),
    "more images than there are": (["--config.train_examples=9999"], ["config.train_examples=9999", "1437"]),
    "an unknown target": (["--target=gpu"], ["--target=gpu", "here", "tpu"]),
    "an unknown flag": (["--depth=3"], ["'--depth=3': not known", "vffjax memory --help"]),
    "an unknown key": (["--config.epoch=3"], ["config.epoch='3'", "config.epochs"]),
    "a workdir": (["--workdir=x"], ["--workdir=x", "--out"]),
    "a file that is not JSON": (["--out=memory.txt"], ["--out=memory.txt", ".json"]),
    "a folder that is not there": (["--out=no/memory.json"], ["--out=no/memory.json", "existing folder"]),
}


@pytest.mark.parametrize(("flags", "parts"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused(flags, parts, fails):
    fails("memory", *DENSE, *flags, parts=parts)


def test_bad_input_is_refused_before_jax_is_imported():
    code = "import sys; from vffjax.cli.main import main\ntry: main(['memory', sys.argv[1], '--batches=six'])\nexcept SystemExit as e: "
    done = in_a_process("-c", code + "print('jax' in sys.modules, e.code)", CONFIG)
    assert done.stdout == "False 2\n", done.stderr
    assert "--batches=six: not whole numbers" in done.stderr


def test_a_missing_configuration_is_refused(fails):
    fails("memory", parts=["--config: missing"])


def test_a_missing_tpu_compiler_is_refused_with_its_name(fails, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "libtpu" else find(name, *rest))
    fails("memory", *DENSE, "--target=tpu", parts=["--target=tpu", "libtpu", "tpu-compiler"])


# ----------------------------------------------------------------------------------------------------------------------------------
# The benchmark


def test_the_benchmark_writes_rows_and_plot_and_says_what_it_skips(monkeypatch, tmp_path, capsys):
    out = tmp_path / "ledger.json"
    monkeypatch.setattr(sys, "argv", ["memory.py", *DENSE, "--depths=1", "--batches=8", f"--out={out}"])
    monkeypatch.setattr(targets, "has_tpu_compiler", lambda: False)
    calls = {jax.default_backend: lambda: "cpu", benchmark.measured_row: lambda case, target: {"target": target} | made_up(case)}
    monkeypatch.setattr(benchmark, "in_own_process", lambda function, *arguments: calls[function](*arguments))
    benchmark.main()
    printed = capsys.readouterr()
    found = json.loads(out.read_text())
    assert list(found["skipped"]) == ["tpu"]
    assert "tpu skipped: libtpu" in printed.err
    assert [(row["target"], row["depth"], row["method"]) for row in found["rows"]] == [
        ("cpu", 1, method) for method in ledger.methods("vff")
    ]
    assert "relative to bp" in printed.out
    with Image.open(out.with_suffix(".png")) as picture:
        assert np.asarray(picture.convert("L")).std() > 5


def made_up(case):
    return case.about | {"device": "chip", "problem": ""} | dict.fromkeys(memory.BYTES, 1_000_000 * len(case.method))


def test_a_row_is_made_in_a_process_of_its_own():
    assert benchmark.in_own_process(os.getpid) != os.getpid()


@pytest.mark.slow
def test_the_step_that_was_planned_is_run_where_the_device_is_here(monkeypatch):
    """On CPU nobody counts the peak; on a GPU or TPU the same path does."""
    ran = []

    def run(case, step):
        ran.append(run_step(case, step))

    run_step = benchmark.run
    monkeypatch.setattr(benchmark, "run", run)
    row = benchmark.measured_row(ledger.cases(config_of(widths=(6,)), [], [8])[3], "here")
    assert (row["target"], row["measured_peak_bytes"]) == ("here", None)
    ((states, metrics),) = ran
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((states, metrics)))
    assert int(states[0].opt_state[1][0].count) == 2


def test_the_benchmark_refuses_bad_input_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["memory.py", *DENSE, "--out=no/ledger.json"])
    with pytest.raises(SystemExit) as ended:
        benchmark.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_quick_is_smaller_and_depths_win(tmp_path):
    out = f"--out={tmp_path / 'x.json'}"
    assert [benchmark.parse([*DENSE, out, *flags])[0].depths for flags in ([], ["--quick"], ["--depths=3"])] == [[2, 4, 8, 16], [2, 4], [3]]
    assert [benchmark.parse([*DENSE, out, *flags])[0].batches for flags in ([], ["--quick"])] == [[128, 512], [32]]
