"""Tables made from the ledger, and figures in the documentation that have to agree with it."""

import sys

import pytest

import records
import tables
from vffjax.errors import UserError

ERRORS = {"vff": [28.0, 29.0, 30.0], "bp": [26.512]}


@pytest.fixture
def ledger(tmp_path):
    """A folder with records of three seeds of one name, one of another, and one that was lost."""
    folder = tmp_path / "results"
    for name, errors in ERRORS.items():
        for seed, error in enumerate(errors):
            about = {"test_error": error, "val_error": error + 1, "model_flop": 2_500_000, "parameters": {"layers": 1_234, "heads": 56}}
            about |= {"test_error_views": error - 0.5} if name == "bp" else {}
            about |= {"quiet": name == "bp", "seconds": 100.0 + seed, "changes": {"learning_rate": 0.01}}
            records.write(folder, {"format": 1, "name": f"{name}-s{seed}", "seed": seed} | about)
    records.write(folder, {"format": 1, "name": "lost-s0", "seed": 0, "changes": {}, "problem": "epoch 1: not finite; lower it"})
    return folder


def test_seeds_with_other_values_are_not_one_row(ledger):
    found = records.read_all(ledger)
    for name, seed, rate in (("vff-s0", 0, 0.01), ("vff-s1", 1, 0.02)):
        found[name]["config"] = {"seed": seed, "learning_rate": rate, "eval_batch_size": 1 + seed, f"since{seed}": 0}
    with pytest.raises(UserError, match=r"vff-s0 and vff-s1 have config\.learning_rate=0\.01 and 0\.02; give one of them another name"):
        records.seeds_of(found, "vff")
    found["vff-s1"]["config"]["learning_rate"] = 0.01
    assert len(records.seeds_of(found, "vff")) == 3


def test_a_table_has_mean_and_deviation_over_the_seeds(ledger):
    columns = ["test_error", "val_error", "n", "seeds", "changes", "parameters", "model_flop", "seconds", "test_error_views"]
    lines = tables.table(records.read_all(ledger), ["vff", "bp", "lost"], columns).splitlines()
    same = "learning_rate=0.01 | 1,234 + 56 | 2.50e+06"
    assert lines[2] == f"| vff | 29.00 ± 1.00 | 30.00 ± 1.00 | 3 | 0, 1, 2 | {same} | (busy machine) | not measured |"
    assert lines[3] == f"| bp | 26.51 | 27.51 | 1 | 0 | {same} | 100 | 26.01 |"
    assert lines[4] == "| lost | lost: epoch 1: not finite |  | 1, 1 lost | 0 | nothing |  |  |  |  |"
    assert all(line.count("|") == len(columns) + 2 for line in lines)


def test_differences_are_taken_seed_by_seed(ledger):
    for seed in (3, 4):
        records.write(ledger, {"format": 1, "name": f"vff-s{seed}", "seed": seed, "test_error": 28.0})
    for seed, error in ((1, 29.5), (2, 31.5), (7, 0.0)):
        records.write(ledger, {"format": 1, "name": f"other-s{seed}", "seed": seed, "test_error": error})
    for seed, error in ((0, 20.0), (1, 21.0), (2, 22.0), (3, 20.0), (4, 20.5), (8, 99.0)):
        records.write(ledger, {"format": 1, "name": f"far-s{seed}", "seed": seed, "test_error": error})
    found = records.read_all(ledger)
    lines = tables.table(found, ["vff", "other", "far", "bp", "lost"], ["minus vff"]).splitlines()
    # With other, seeds 1 and 2 are shared: +0.5 and +1.5. The standard error of two values is half their distance. With far they are five:
    # four times -8 and once -7.5, whose sample standard deviation is 0.5 / sqrt(5).
    cells = ["minus vff, seed by seed", "0", "+1.00 ± 0.50 (n = 2)", "**-7.90 ± 0.10 (n = 5)**", "-1.49 (n = 1)", ""]
    assert [line.split(" | ")[1].removesuffix(" |") for line in (lines[0], *lines[2:])] == cells
    # Two seeds are too few for bold.
    assert tables.table(found, ["far"], ["minus other"]).splitlines()[2] == "| far | -9.00 ± 0.50 (n = 2) |"
    assert tables.table(found, ["other"], ["minus bp"]).splitlines()[2] == "| other | no seed in common |"
    with pytest.raises(UserError, match="no record is named none"):
        tables.table(found, ["vff"], ["minus none"])


TEXT = """<!-- ledger: v*, bp columns: test_error, n -->
<!-- end of ledger -->
It errs by 29.0 ± 1.0 % (n = 3, results/vff), BP by 26.5 % (n = 1,
results/bp), and 27.51 % (n = 1, results/bp, val_error). No source: 1.0 % (n = 3).

| BP | 26.51<!-- n = 1, results/bp --> | 26.01<!-- n = 1, results/bp, test_error_views --> |
"""


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["tables.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        tables.main()
    return ended.value.code, capsys.readouterr()


def test_tables_are_written_and_then_agree(ledger, tmp_path, monkeypatch, capsys):
    path = tmp_path / "doc.md"
    path.write_text(TEXT)
    status, shown = run(monkeypatch, capsys, "--results", ledger, path)
    assert (status, path.read_text()) == (1, TEXT)
    assert shown.out.strip() == "doc.md:1: the table of v*, bp differs from the ledger; run benchmarks/tables.py --write"
    assert run(monkeypatch, capsys, "--results", ledger, "--write", path)[0] == 0
    assert "| vff | 29.00 ± 1.00 | 3 |\n| bp | 26.51 | 1 |\n<!-- end of ledger -->" in path.read_text()
    assert run(monkeypatch, capsys, "--results", ledger, path)[0] == 0


WRONG = {
    "the mean": ("29.0 ± 1.0 % (n = 3", "28.9 ± 1.0 % (n = 3"),
    "the deviation": ("29.0 ± 1.0 % (n = 3", "29.0 ± 0.9 % (n = 3"),
    "a deviation that is left out": ("29.0 ± 1.0 % (n = 3", "29.0 % (n = 3"),
    "the number of seeds": ("29.0 ± 1.0 % (n = 3", "29.0 ± 1.0 % (n = 5"),
    "a figure across two lines": ("26.5 % (n = 1,\n", "26.4 % (n = 1,\n"),
    "another column": ("27.51 %", "26.51 %"),
    "a cell of a table": ("26.51<!--", "26.52<!--"),
    "another column in a cell": ("bp, test_error_views", "bp, val_error"),
    "the number of seeds of a cell": ("26.01<!-- n = 1", "26.01<!-- n = 2"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_figure_that_differs_from_the_ledger_is_found(name, ledger):
    right, wrong = WRONG[name]
    assert right in TEXT
    found = records.read_all(ledger)
    text = TEXT.replace("<!-- end", tables.table(found, ["vff", "bp"], ["test_error", "n"]) + "<!-- end")
    assert tables.differences(found, text, "doc.md") == []
    (line,) = tables.differences(found, text.replace(right, wrong), "doc.md")
    assert line.startswith("doc.md:") and "the ledger has" in line


def test_what_the_ledger_does_not_have_is_an_error(ledger, tmp_path, monkeypatch, capsys):
    for text in ("1.0 % (n = 1, results/nothing)", "1.0 % (n = 1, results/lost)", "<!-- ledger: x* columns: n -->\n<!-- end of ledger -->"):
        (tmp_path / "doc.md").write_text(text)
        status, shown = run(monkeypatch, capsys, "--results", ledger, tmp_path / "doc.md")
        assert status == 2
        assert shown.err.startswith("tables: error: results: ") and shown.err.count("\n") == 1
    with pytest.raises(UserError, match="columns: x: not known"):
        tables.table(records.read_all(ledger), ["bp"], ["x"])


def test_the_documentation_agrees_with_the_committed_ledger(monkeypatch, capsys):
    status, shown = run(monkeypatch, capsys)
    assert status == 0, shown.out + shown.err
