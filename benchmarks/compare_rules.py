"""Same network, same data, same budget, different learning rules: one table over rules and seeds.

    python benchmarks/compare_rules.py --config configs/cifar10.py:small --out results/cifar10-small [--config.KEY=VALUE ...]
                                       [--rules vff,head,bp,ff] [--seeds 0,1,2] [--set RULE.KEY=VALUE ...]

Rules: `vff` as the configuration says; `cscl` the same without the head's gradient; `head` the head loss alone, same groups; `bp`
back-propagation, one group and the head loss; `ff` Hinton's forward-forward, every layer its own group, classified by heads or by
sweep, whichever errs less on validation data. `--set bp.learning_rate=5e-3` gives one rule its own value: a baseline deserves its
best, chosen on validation data. Each run is an ordinary run in OUT/runs/RULE-SEED, so a comparison that was stopped goes on.
A key that would not mean the same for all rules is refused. Writes OUT.json and OUT.md. Every choice (epoch, voting groups, inference)
is made on validation data; the table shows errors on the test set in percent, mean and sample standard deviation over seeds. Seconds are
those of training alone.
"""

import ast
import pathlib
import statistics
import sys
from typing import Any

from arguments import one_line, parser_of, read_config, seeds, some_of
from keys import SEEDS, Only, refuse, refuse_other_groups
from vffjax.cli.options import a_path
from vffjax.config import Config
from vffjax.errors import UserError, bad_key
from vffjax.files import replace_file, write_json
from vffjax.runs import experiment
from vffjax.runs.checkpoint import Checkpoints
from vffjax.training.checks import make_config
from vffjax.uses import evaluation

RULES: dict[str, dict[str, Any]] = {
    "vff": {},
    "head": {"rule": "head", "inference": "heads"},
    "bp": {"rule": "head", "grouping": "all", "inference": "heads"},
    "ff": {"rule": "ff", "grouping": "layer", "norm": "auto", "inference": "heads"},
    "cscl": {"head_weight": 0.0},
}

# Keys whose values the comparison sets itself.
SWEPT = ("ff",)  # rows whose own inference is the sweep
SET_HERE = {"rule": Only(("vff",), "every row of the table has a rule of its own", "leave it at vff and choose by --rules"), "seed": SEEDS}


def check_keys(config: Config, variants: dict[str, dict[str, Any]], flag: str = "") -> None:
    """Raises `UserError` where the configuration says something that not every rule's runs would do; `flag` chooses the rules."""
    refuse(config, SET_HERE)
    for rule, changes in variants.items():
        if changes.get("rule", "vff") != RULES[rule].get("rule", "vff") or "seed" in changes:
            key = "seed" if "seed" in changes else "rule"
            raise UserError(f"--set={rule}.{key}={changes[key]}: the row {rule} would not be what its name says; leave it out")
    own = {rule: changes for rule, changes in variants.items() if not changes.keys() & {"frozen_groups", "overrides"}}
    refuse_other_groups(config, {rule: changes.get("grouping", config.grouping) for rule, changes in own.items()}, flag)


def run(config: Config, workdir: pathlib.Path, sweep_too: bool = False) -> dict[str, Any]:
    """One trained and tested run; the figures that the table needs. With `sweep_too`, validation images choose between heads and sweep."""
    summary = experiment.train(config, workdir)
    chosen = {"inference": config.inference} | {
        k: summary[k] for k in ("val_error", "test_error", "test_error_per_group", "voting", "best_epoch")
    }
    if sweep_too:
        # Every saved epoch has its chance, not only that which was best for the heads. The test images are swept only if the sweep is
        # chosen: with 100 classes they cost 100 passes each.
        tried = [evaluation.evaluate(workdir, "sweep", str(epoch), test=False) for epoch in Checkpoints(workdir).epochs()]
        best = min(tried, key=lambda found: found["val_error"])
        if best["val_error"] < chosen["val_error"]:
            swept = evaluation.evaluate(workdir, "sweep", str(best["epoch"]))
            chosen |= {k: swept[k] for k in ("inference", "val_error", "test_error", "test_error_per_group", "voting")}
            chosen["best_epoch"] = best["epoch"]
    kept = ("images_per_second", "seconds", "compile_seconds", "peak_bytes", "epochs", "device", "seed", "commit", "versions")
    speed = {k: summary[k] for k in kept}
    return chosen | speed


def summarise(runs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row per rule: mean and sample standard deviation over its runs."""
    rows = []
    for rule, found in runs.items():
        row: dict[str, Any] = {"rule": rule, "n": len(found)}
        for key in ("test_error", "val_error", "images_per_second", "seconds"):
            values = [r[key] for r in found]
            row[key] = statistics.mean(values)
            row[f"{key}_sd"] = statistics.stdev(values) if len(values) > 1 else None
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]], title: str) -> str:
    """Markdown."""

    def cell(row: dict[str, Any], key: str, digits: int) -> str:
        sd = row[f"{key}_sd"]
        return f"{row[key]:,.{digits}f}" + ("" if sd is None else f" ± {sd:,.{digits}f}")

    lines = [
        f"### {title}",
        "",
        "| rule | test error % | validation error % | training images/s | training seconds | n |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [cell(row, "test_error", 2), cell(row, "val_error", 2), cell(row, "images_per_second", 0), cell(row, "seconds", 0)]
        lines.append(f"| {row['rule']} | {' | '.join(cells)} | {row['n']} |")
    return "\n".join(lines) + "\n"


def given(settings: list[str], rule: str) -> dict[str, Any]:
    """What `--set` says of one rule, values as Python literals."""
    found = {}
    for setting in settings:
        name, _, value = setting.partition("=")
        if name.split(".")[0] not in RULES or "." not in name or not value:
            raise UserError(
                f"--set={setting}: not RULE.KEY=VALUE with a rule of {', '.join(RULES)}; give for example bp.learning_rate=5e-3"
            )
        if name.split(".")[0] == rule:
            try:
                found[name.split(".", 1)[1]] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                found[name.split(".", 1)[1]] = value
    return found


@one_line(__file__)
def main() -> None:
    parser = parser_of(__file__, __doc__)
    parser.add_argument("--out", type=a_path, required=True, help="results are OUT.json and OUT.md, runs lie in OUT/runs")
    parser.add_argument("--rules", type=some_of("--rules", RULES), default="vff,head,bp,ff", help="comma-separated")
    parser.add_argument("--seeds", type=seeds, default="0,1,2", help="comma-separated")
    parser.add_argument("--set", default=[], action="append", metavar="RULE.KEY=VALUE", help="a configuration value for one rule")
    own, rest = parser.parse_known_args()
    variants = {rule: RULES[rule] | given(own.set, rule) for rule in own.rules}
    config, name = read_config(rest, "runs lie in OUT/runs, by --out")
    check_keys(config, variants, "--rules")
    if config.val_fraction == 0:
        raise bad_key("val_fraction", config.val_fraction, "leaves nothing to choose on", "hold out some images, such as 0.1")
    runs: dict[str, list[dict[str, Any]]] = {}
    # Seeds outside, rules inside: a machine that slows down does so for every rule.
    for seed in own.seeds:
        for rule in own.rules:
            print(f"== {name} {rule} seed {seed}", file=sys.stderr, flush=True)
            one = make_config(config.to_dict() | {"seed": seed} | variants[rule])
            runs.setdefault(rule, []).append(run(one, own.out / "runs" / f"{rule}-{seed}", rule in SWEPT))
    rows = summarise(runs)
    text = table(rows, f"{name}, seeds {','.join(map(str, own.seeds))}")
    write_json(
        own.out.with_name(own.out.name + ".json"),
        {"config": config.to_dict(), "rules": variants, "rows": rows, "runs": runs, "command": sys.argv[1:]},
    )
    replace_file(own.out.with_name(own.out.name + ".md"), text.encode())
    print(text)


if __name__ == "__main__":
    main()
