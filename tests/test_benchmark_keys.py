"""No benchmark ignores a key of the configuration: what it would not obey it refuses with status 2 and one line.

For throughput.py see test_throughput.py.
"""

import dataclasses
import sys

import pytest

import arguments
import compare_rules
import compile_report
import memory
import networks
import scan_overhead
import speedrun
import transfer
from command_lines import ROOT
from vffjax.cli.flags import parse_train
from vffjax.config import default_config
from vffjax.errors import UserError
from vffjax.runs.termination import Terminated
from vffjax.training.checks import make_config
from vffjax.training.plan import groups_of

DIGITS = ["--config", str(ROOT / "configs/digits.py")]
OVERRIDES = """
from vffjax.config import default_config

def get_config():
    config = default_config().unlock()
    config.overrides = {"group0": {"learning_rate": 1e-4}}
    return config
"""


@pytest.mark.parametrize(
    ("benchmark", "arguments", "parts"),
    [
        (speedrun, ["--target=0.8", *DIGITS, "--config.seed=3"], ["config.seed=3", "--seeds"]),
        (speedrun, ["--target=0.8", *DIGITS, "--config.init_from=w.safetensors"], ["config.init_from='w.safetensors'", "random weights"]),
        (speedrun, ["--target=0.8", *DIGITS, "--config.inference=sweep"], ["config.inference='sweep'", "inference=heads"]),
        (speedrun, ["--target=0.8", *DIGITS, "--workdir=x"], ["--workdir=x", "--out"]),
        (compare_rules, ["--out=x", *DIGITS, "--config.rule=head"], ["config.rule='head'", "--rules"]),
        (compare_rules, ["--out=x", *DIGITS, "--config.seed=3"], ["config.seed=3", "--seeds"]),
        (
            compare_rules,
            ["--out=x", *DIGITS, "--config.frozen_groups=1"],
            ["config.frozen_groups=1", "leave bp, ff out by --rules"],
        ),
        (compare_rules, ["--out=x", "--config=overrides.py"], ["config.overrides={'group0'", "grouping=all", "use {}", "--rules"]),
        (compare_rules, ["--out=x", *DIGITS, "--set=bp.rule=vff"], ["--set=bp.rule=vff", "leave it out"]),
        (compare_rules, ["--out=x", *DIGITS, "--set=vff.seed=4"], ["--set=vff.seed=4", "leave it out"]),
        (compare_rules, ["--out=x", *DIGITS, "--workdir=x"], ["--workdir=x", "OUT/runs"]),
        (transfer, ["--out=x", f"--config={ROOT}/configs/finetune_resnet18_cifar10.py"], ["config.init_from='hf://", "leave it empty"]),
        (transfer, ["--out=x", "--config=overrides.py"], ["config.overrides={'group0'", "grouping=all", "use {}"]),
        (networks, ["--out=x.json", "--networks=vgg8b", "--config.network=resnet18"], ["config.network='resnet18'", "--networks"]),
        (networks, ["--out=x.json", "--networks=vgg8b", "--config.grouping=layer"], ["config.grouping='layer'", "all groupings"]),
        (networks, ["--out=x.json", "--networks=vgg8b", "--config.frozen_groups=1"], ["config.frozen_groups=1", "use 0"]),
        (networks, ["--out=x.json", "--networks=vgg8b", "--config.rematerialise=True"], ["config.rematerialise=True", "vffjax memory"]),
        (networks, ["--out=x.json", "--networks=vgg8b", "--workdir=x"], ["--workdir=x", "--out"]),
        (memory, ["--out=x.json", *DIGITS, "--config.frozen_groups=1"], ["config.frozen_groups=1", "use 0"]),
        (memory, ["--out=x.json", "--config=overrides.py"], ["config.overrides={'group0'", "leave it out"]),
        (
            memory,
            ["--out=x.json", *DIGITS, "--config.schedule=sequential", "--config.feature_cache=device"],
            ["config.feature_cache='device'", "feature_cache=none"],
        ),
        (compile_report, [*DIGITS, "--config.schedule=sequential"], ["config.schedule='sequential'", "schedule=joint"]),
        (compile_report, [*DIGITS, "--workdir=x"], ["--workdir=x", "--out"]),
    ],
)
def test_what_a_benchmark_would_ignore_ends_with_status_2_and_one_line(benchmark, arguments, parts, tmp_path, monkeypatch, capsys):
    (tmp_path / "overrides.py").write_text(OVERRIDES)
    monkeypatch.chdir(ROOT if benchmark is networks else tmp_path)
    monkeypatch.setattr(sys, "argv", [benchmark.__file__, *arguments])
    with pytest.raises(SystemExit) as ended:
        benchmark.main()
    out, err = capsys.readouterr()
    err = "".join(line for line in err.splitlines(keepends=True) if not line.startswith("== "))  # without the progress
    assert (ended.value.code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith(f"{benchmark.__name__}: error: ")
    assert not [part for part in parts if part not in err], err
    assert [path.name for path in tmp_path.iterdir()] == ["overrides.py"]
    assert not (ROOT / "x.json").exists()


def test_what_the_scan_is_not_measured_for(monkeypatch):
    for changes in ({"schedule": "sequential"}, {"init_from": "w.safetensors"}, {"frozen_groups": 9}):
        with pytest.raises(UserError, match=f"config.{next(iter(changes))}="):
            scan_overhead.measure(make_config(default_config().to_dict() | changes))


def test_rules_that_share_groups_may_freeze_them_and_set_may_free_the_others():
    config = make_config(default_config().to_dict() | {"frozen_groups": 1})
    compare_rules.check_keys(config, {rule: compare_rules.RULES[rule] for rule in ("vff", "head", "cscl")})
    compare_rules.check_keys(config, {"vff": {}, "bp": compare_rules.RULES["bp"] | {"frozen_groups": 0}})


def test_learning_rates_are_chosen_for_one_configuration_only():
    """Another configuration of transfer.py keeps its own rate; the table says how many parameters the heads have, and what else differs."""
    assert [transfer.chosen_for(name) for name in transfer.CHOSEN_FOR] == [{("bp", "pretrained"): {"learning_rate": 1e-3}}] * 2
    assert transfer.chosen_for("finetune_resnet18_cifar10") == {}
    config, _, _ = parse_train(["--config", transfer.CHOSEN_FOR[0]])
    words = transfer.heads_in_words(config, {rule: compare_rules.RULES[rule] for rule in transfer.RULES})
    inputs = {"vff": 16 * 16 * 16 + 8 * 8 * 32 + 4 * 4 * 64 + 2 * 2 * 128, "bp": 2 * 2 * 128}  # of images of 64x64
    local = f"{10 * (inputs['vff'] + 4):,}"
    assert f"vff {local}, head {local}, bp {10 * (inputs['bp'] + 1):,}." in words
    assert f"lower rates towards the image (group_decay={config.group_decay:g})" in words
    assert "group_decay" not in transfer.heads_in_words(dataclasses.replace(config, group_decay=1.0), {})


def test_a_benchmark_that_is_told_to_leave_says_so_in_one_line(capsys):
    with pytest.raises(SystemExit) as ended, arguments.one_line("benchmarks/transfer.py"):
        raise Terminated("the run is saved")
    assert (ended.value.code, capsys.readouterr().err) == (143, "transfer: told to leave (SIGTERM): the run is saved\n")


def test_fine_tuning_compares_last_groups_whose_heads_are_equal():
    words = transfer.last_groups({"vff from scratch": [{"test_error_per_group": [50.0, error]} for error in (30.0, 32.0)]})
    assert "vff from scratch 31.00 ± 1.41." in words
    config, _, _ = parse_train(["--config", transfer.CHOSEN_FOR[0]])
    heads = [groups_of(make_config(config.to_dict() | compare_rules.RULES[rule]), 10)[-1].head for rule in transfer.RULES]
    assert len(set(heads)) == 1
