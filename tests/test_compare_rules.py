"""The comparison of rules runs end to end, can be stopped, and reports what its runs measured."""

import json
import statistics
import subprocess
import sys

import pytest

import compare_rules
from command_lines import ROOT
from vffjax import registry
from vffjax.config import Config
from vffjax.training.checks import make_config

TINY = ["--config", str(ROOT / "configs/digits.py"), "--config.epochs=1", "--config.widths=(4, 4, 8, 8)", "--config.checkpoint_every=1"]


@pytest.mark.slow
def test_the_table_holds_mean_and_standard_deviation_of_the_runs(tmp_path, monkeypatch, capsys):
    out = tmp_path / "table"
    monkeypatch.setattr(sys, "argv", ["compare_rules.py", "--out", str(out), "--rules", "bp,ff", "--seeds", "0,3", *TINY])
    compare_rules.main()
    found = json.loads((tmp_path / "table.json").read_text())
    assert [row["rule"] for row in found["rows"]] == ["bp", "ff"]
    for row in found["rows"]:
        runs = [json.loads((out / "runs" / f"{row['rule']}-{seed}" / "summary.json").read_text()) for seed in (0, 3)]
        errors = [run["test_error"] for run in found["runs"][row["rule"]]]
        assert row["n"] == 2
        assert row["test_error"] == pytest.approx(statistics.mean(errors))
        assert row["test_error_sd"] == pytest.approx(statistics.stdev(errors))
        assert [run["seed"] for run in runs] == [0, 3]
        if row["rule"] != "ff":  # ff may have been classified by sweep, which its own summary does not know
            assert errors == [run["test_error"] for run in runs]
    text = (tmp_path / "table.md").read_text()
    assert text in capsys.readouterr().out
    assert f"{found['rows'][0]['test_error']:,.2f}" in text
    # The baseline is one group, Hinton's rule one group per layer.
    assert [len(found["runs"][rule][0]["test_error_per_group"]) for rule in ("bp", "ff")] == [1, 4]


def test_every_rule_can_be_a_row_and_keeps_its_own_normalisation_and_scores():
    asked = Config(norm="layer", inference="heads")  # rules that need a normalisation of inputs keep their own
    rows = {name: make_config(asked.to_dict() | changes) for name, changes in compare_rules.RULES.items()}
    assert set(registry.RULES.names) <= set(rows)
    assert all(rows[name].rule == name for name in registry.RULES.names)
    assert {name: row.norm for name, row in rows.items() if row.norm != asked.norm} == dict.fromkeys(
        ("ff", "symba", "deeper_forward"), "auto"
    )
    assert {name for name, row in rows.items() if row.inference == "rule"} == {"cwc", "deeper_forward", "mono_forward"}


@pytest.mark.slow
def test_bad_arguments_end_with_status_2(tmp_path):
    cases = {"nonsense": ["--rules", "vff,nonsense"], "0,x": ["--seeds", "0,x"], "config.val_fraction=0.0": ["--config.val_fraction=0.0"]}
    for named, bad in cases.items():
        command = [sys.executable, str(ROOT / "benchmarks/compare_rules.py"), "--out", str(tmp_path / "x"), *TINY, *bad]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr and named in done.stderr and done.stderr.count("\n") == 1
