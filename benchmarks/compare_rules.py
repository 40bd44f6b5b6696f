"""Compares local rules: the same network, data and budget for each, in one table over rules and seeds.

    python benchmarks/compare_rules.py --config configs/cifar10.py:small --out results/cifar10-small [--config.KEY=VALUE ...]
                                       [--rules vff,head,bp,ff] [--seeds 0,1,2] [--set RULE.KEY=VALUE ...]

Rows of the table: `vff` as configured; `cscl` the same without the head's gradient; `head` the head loss alone in the same groups; `bp`
back-propagation, which is the head loss with one group; `ff` Hinton's forward-forward, in which every layer is its own group, and
classes are scored by heads or by a sweep over labels, whichever has the lower validation error. Any other rule of `vffjax list` can be
named too; its classes are scored by the rule itself where it can do so, else by heads.

`--set bp.learning_rate=5e-3` gives one row its own value, so that a baseline can have its best one, chosen on validation data. A key that
would not mean the same in all rows is refused. Each run is an ordinary run in OUT/runs/RULE-SEED, so that a comparison that was stopped
goes on. The script writes OUT.json and OUT.md. Every choice (epoch, voting groups, inference) is made on validation data. The table shows
errors on the test set in percent, as mean and sample standard deviation over seeds. Seconds are those of training alone.
"""

import pathlib
import sys
from typing import Any

from arguments import one_line, parser_of, read_config, some_of
from keys import SEEDS, default, own_rule, refuse, refuse_other_groups
from vffjax import registry, rules
from vffjax.cli.flags import literal
from vffjax.cli.options import a_path
from vffjax.config import Config
from vffjax.errors import UserError, bad_key
from vffjax.files import replace_file, write_json
from vffjax.many import sweep
from vffjax.many.tables import Spread, markdown
from vffjax.rules.local import Rule
from vffjax.runs.checkpoint import Checkpoints
from vffjax.training.checks import make_config
from vffjax.uses import evaluation


def row_of(name: str) -> dict[str, Any]:
    """What the row of a rule changes in the configuration: its own normalisation and its own scores of classes, where it has them."""
    rule: Rule = registry.RULES.find(name)
    changes: dict[str, Any] = {"rule": name, "inference": "rule" if rule.scores else "heads"}
    return changes | ({"norm": "auto"} if rule.norm != Rule.norm else {})


RULES: dict[str, dict[str, Any]] = {
    "vff": {},
    "head": row_of("head"),
    "bp": row_of(rules.BACK_PROPAGATION["rule"]) | rules.BACK_PROPAGATION,
    "ff": row_of("ff") | {"grouping": "layer"},
    "cscl": {"head_weight": 0.0},
}
RULES |= {name: row_of(name) for name in registry.RULES.names if name not in RULES}

SWEPT = ("ff",)  # rows that may be classified by a sweep over labels
SET_HERE = {"rule": own_rule("row of the table", "--rules"), "seed": SEEDS}  # keys whose values the comparison sets itself
_FIGURES = {"test_error": ("test error %", ",.2f"), "val_error": ("validation error %", ",.2f")}
_FIGURES |= {"images_per_second": ("training images/s", ",.0f"), "seconds": ("training seconds", ",.0f")}


def check_keys(config: Config, variants: dict[str, dict[str, Any]], flag: str = "") -> None:
    """Raises `UserError` for a key of the configuration that not every row would obey.

    Args:
        config: the configuration that all rows share.
        variants: what each row changes in it.
        flag: the flag that chooses the rows, if there is one.
    """
    refuse(config, SET_HERE)
    for name, changes in variants.items():
        meant = {"seed": None, "rule": RULES[name].get("rule", default("rule"))}
        for key in meant:
            if key in changes and changes[key] != meant[key]:
                raise UserError(f"--set={name}.{key}={changes[key]}: the row {name} would not be what its name says; leave it out")
    own = {name: changes for name, changes in variants.items() if not changes.keys() & {"frozen_groups", "overrides"}}
    refuse_other_groups(config, {name: changes.get("grouping", config.grouping) for name, changes in own.items()}, flag)


def run(config: Config, workdir: pathlib.Path, sweep_too: bool = False) -> dict[str, Any]:
    """Trains and tests one run, and returns the figures that the table needs.

    Args:
        config: the configuration of the run.
        workdir: its folder.
        sweep_too: whether validation images choose between the configured inference and a sweep over labels.
    """
    summary = sweep.trained(config, workdir)
    errors = ("val_error", "test_error", "test_error_per_group", "voting")
    chosen = {"inference": config.inference} | {key: summary[key] for key in (*errors, "best_epoch")}
    if sweep_too:
        # Every saved epoch is tried, because the best one for heads need not be the best for the sweep. Test images are swept only if the
        # sweep is chosen, because with 100 classes they cost 100 passes each.
        tried = [evaluation.evaluate(workdir, "sweep", str(epoch), test=False) for epoch in Checkpoints(workdir).epochs()]
        best = min(tried, key=lambda found: found["val_error"])
        if best["val_error"] < chosen["val_error"]:
            swept = evaluation.evaluate(workdir, "sweep", str(best["epoch"]))
            chosen |= {key: swept[key] for key in ("inference", *errors)} | {"best_epoch": best["epoch"]}
    kept = ("images_per_second", "seconds", "compile_seconds", "peak_bytes", "epochs", "device", "seed", "commit", "versions")
    return chosen | {key: summary[key] for key in kept}


def summarise(runs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row for each rule, with the mean and the sample standard deviation of each figure over its runs."""
    rows = []
    for rule, found in runs.items():
        row: dict[str, Any] = {"rule": rule, "n": len(found)}
        for key in _FIGURES:
            row[key], row[f"{key}_sd"], _ = Spread.of(one[key] for one in found)
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]], title: str) -> str:
    """The rows of `summarise` as a Markdown table."""
    titles = ["rule", *(heading for heading, _ in _FIGURES.values()), "n"]
    cells = [[row["rule"], *(sweep.cell(row, key, spec) for key, (_, spec) in _FIGURES.items()), str(row["n"])] for row in rows]
    return f"### {title}\n\n{markdown(titles, cells)}\n"


def given(settings: list[str], rule: str) -> dict[str, Any]:
    """The values that `--set` gives to one row. They are read as Python literals, else as text.

    Raises:
        UserError: a setting is not of the form RULE.KEY=VALUE, or its rule is not known.
    """
    found = {}
    for setting in settings:
        name, _, value = setting.partition("=")
        row, _, key = name.partition(".")
        if row not in RULES or not key or not value:
            raise UserError(
                f"--set={setting}: not RULE.KEY=VALUE with a rule of {', '.join(RULES)}; give for example bp.learning_rate=5e-3"
            )
        if row == rule:
            found[key] = literal(value)
    return found


@one_line(__file__)
def main() -> None:
    parser = parser_of(__file__, __doc__, "--seeds", "--set")
    parser.add_argument("--out", type=a_path, required=True, help="results are OUT.json and OUT.md, runs lie in OUT/runs")
    parser.add_argument("--rules", type=some_of("--rules", RULES), default="vff,head,bp,ff", help="comma-separated")
    own, rest = parser.parse_known_args()
    variants = {rule: RULES[rule] | given(own.set, rule) for rule in own.rules}
    config, name = read_config(rest, "runs lie in OUT/runs, by --out")
    check_keys(config, variants, "--rules")
    if config.val_fraction == 0:
        raise bad_key("val_fraction", config.val_fraction, "leaves nothing to choose on", "hold out some images, such as 0.1")
    runs: dict[str, list[dict[str, Any]]] = {}
    # All rules of a seed run before the next seed, so that a machine that slows down does so for every rule.
    for seed in own.seeds:
        for rule in own.rules:
            print(f"== {name} {rule} seed {seed}", file=sys.stderr, flush=True)
            one = make_config(config.to_dict() | {"seed": seed} | variants[rule])
            runs.setdefault(rule, []).append(run(one, own.out / "runs" / f"{rule}-{seed}", rule in SWEPT))
    rows = summarise(runs)
    text = table(rows, f"{name}, seeds {','.join(map(str, own.seeds))}")
    found = {"config": config.to_dict(), "rules": variants, "rows": rows, "runs": runs, "command": sys.argv[1:]}
    write_json(own.out.with_name(own.out.name + ".json"), found)
    replace_file(own.out.with_name(own.out.name + ".md"), text.encode())
    print(text)


if __name__ == "__main__":
    main()
