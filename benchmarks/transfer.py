"""Compares fine-tuning from pretrained weights with training from scratch, for VFF, the head loss alone and back-propagation, on CPU.

    python benchmarks/transfer.py --out runs/transfer [--seeds 0,1,2] [--set bp.learning_rate=1e-3 ...]
                                  [--pretrain configs/resnet18.py:narrow_cifar100] [--config configs/finetune_resnet18_cifar10.py:narrow]

1. Each rule trains `--pretrain` (a narrow ResNet-18 on CIFAR-100) by itself, with seed 0, and exports it under torchvision's names to
   OUT/pretrained-RULE.safetensors. All rules pretrain at the learning rate of the configuration, which is tuned for none of them.
2. For every seed, each rule trains `--config` (a subset of CIFAR-10) from its own file and from scratch. The seed draws the subset too; the
   pretrained weights are the same for all seeds. `--set` gives one rule its own value there, chosen on validation data. From scratch all
   groups learn at the same rate (`group_decay=1`).
3. Prints errors on the test set, training images/s, and the memory ledger of one step. Writes OUT/transfer.json and OUT/transfer.md.

A local rule has a head for every group and back-propagation has one head in all. The table gives the error of all groups that vote. A line
below it gives the error of the last group alone, whose head has the same size under every rule.

Each run is an ordinary run in OUT/runs, so that a comparison that was stopped goes on. To fine-tune ImageNet weights instead, see
configs/finetune_resnet18_cifar10.py and configs/finetune.py.
"""

import pathlib
import sys
import time
from typing import Any

import jax

import compare_rules
from arguments import one_line, parser_of, read_config
from keys import Only, refuse
from networks import counted
from vffjax.cli.options import a_path
from vffjax.config import Config
from vffjax.costs import ledger, memory, targets
from vffjax.files import replace_file, write_json
from vffjax.many.tables import Spread
from vffjax.runs import experiment
from vffjax.runs.workdir import load_run
from vffjax.training.checks import make_config
from vffjax.weights import weights

RULES = ("vff", "head", "bp")
# For vff and bp and each start, the one of the learning rates 1e-3 and 4e-3 that had the lower error on the 2,000 validation images of seed
# 0, from weights that VFF had pretrained. The configuration itself has the rate of VFF, which head takes too, without a trial. These rates
# are used for this configuration only.
CHOSEN_FOR = ("finetune_resnet18_cifar10:narrow", "configs/finetune_resnet18_cifar10.py:narrow")  # the same by its name and by its file
CHOSEN: dict[tuple[str, str], dict[str, Any]] = {("bp", "pretrained"): {"learning_rate": 1e-3}}

# Keys whose values the benchmark sets itself.
SET_HERE = {"init_from": Only(("",), "runs start from the weights that this benchmark trains, and from scratch", "leave it empty")}


def chosen_for(name: str) -> dict[tuple[str, str], dict[str, Any]]:
    """The values that were chosen for a rule and a start, under the configuration of this name; none under another one."""
    return CHOSEN if name in CHOSEN_FOR else {}


def pretrain(config: Config, name: str, out: pathlib.Path) -> tuple[pathlib.Path, dict[str, Any]]:
    """Trains the weights that the runs of one rule start from.

    Args:
        config: the configuration of the pretraining, by this rule.
        name: the rule's.
        out: the folder for the run and its weights.

    Returns:
        The file of the weights under torchvision's names, and the summary of the run.
    """
    workdir, file = out / f"pretrained-{name}", out / f"pretrained-{name}.safetensors"
    summary = experiment.train(config, workdir)
    trained = load_run(workdir, "best")
    weights.write_weights(file, trained.plan, trained.states, trained.about, names="torchvision")
    return file, summary


def bytes_of_a_step(config: Config) -> str:
    """The memory ledger of the configuration as text: one step of its rule beside one of back-propagation."""
    rows = [memory.measure(case, targets.find("here")) for case in ledger.cases(config, [], []) if "sequential" not in case.method]
    ledger.compare(rows)
    return ledger.table(rows)


def heads_in_words(config: Config, variants: dict[str, dict[str, Any]]) -> str:
    """The sentence below the table: how many parameters the heads of each rule have."""
    counts = {rule: counted(make_config(config.to_dict() | changes))["heads"] for rule, changes in variants.items()}
    shown = ", ".join(f"{rule} {count:,}" for rule, count in counts.items())
    differs = ""
    if config.group_decay != 1.0:
        differs = " From pretrained weights, rules in several groups have lower rates towards the image "
        differs += f"(group_decay={config.group_decay:g}), and back-propagation in one group has one rate for all layers."
    once = "Each rule starts from weights that it has trained itself, once for all seeds, so ± leaves out how much pretraining varies."
    rates = "Where this configuration's rates were chosen, it was by VFF's weights and on seed 0."
    return f"{once}{differs} {rates} Parameters of all heads: {shown}."


def last_groups(runs: dict[str, list[dict[str, Any]]]) -> str:
    """The test error of each row's last group alone, whose head has the same size under every rule, as one line."""
    found = {name: Spread.of(run["test_error_per_group"][-1] for run in rows) for name, rows in runs.items()}
    return "Test error of the last group alone, %: " + "; ".join(f"{name} {spread:,.2f}" for name, spread in found.items()) + "."


@one_line(__file__)
def main() -> None:
    parser = parser_of(__file__, __doc__, "--seeds", "--set")
    parser.add_argument("--out", type=a_path, required=True, help="folder of results and runs")
    parser.add_argument("--pretrain", default="resnet18:narrow_cifar100", metavar="NAME|FILE[:VARIANT]")
    parser.add_argument("--config", default=CHOSEN_FOR[0], metavar="NAME|FILE[:VARIANT]")
    own = parser.parse_args()
    begin = time.perf_counter()
    # A program does not depend on its initial weights, so the two runs of a rule and seed share one compiled program.
    jax.config.update("jax_compilation_cache_dir", str(own.out.absolute() / "compiled"))
    variants = {rule: compare_rules.RULES[rule] | compare_rules.given(own.set, rule) for rule in RULES}
    config, name = read_config(["--config", own.config])
    refuse(config, SET_HERE)
    compare_rules.check_keys(config, variants)
    base = read_config(["--config", own.pretrain])[0]
    refuse(base, SET_HERE)
    compare_rules.check_keys(base, {rule: compare_rules.RULES[rule] for rule in RULES})
    chosen = chosen_for(own.config)
    pretrained = {}
    for rule in RULES:
        print(f"== {rule}, pretraining", file=sys.stderr, flush=True)
        pretrained[rule] = pretrain(make_config(base.to_dict() | compare_rules.RULES[rule]), rule, own.out)
        print(f"pretrained: {pretrained[rule][1]['test_error']:.2f} % test error", file=sys.stderr)
    runs: dict[str, list[dict[str, Any]]] = {}
    for seed in own.seeds:
        for rule in RULES:
            for start, changes in (
                ("pretrained", {"init_from": str(pretrained[rule][0])}),
                ("scratch", {"init_from": "", "group_decay": 1.0}),
            ):
                print(f"== {rule} from {start}, seed {seed}", file=sys.stderr, flush=True)
                one = make_config(config.to_dict() | {"seed": seed} | changes | chosen.get((rule, start), {}) | variants[rule])
                run = compare_rules.run(one, own.out / "runs" / f"{rule}-{start}-{seed}") | {"config": one.to_dict()}
                runs.setdefault(f"{rule} from {start}", []).append(run)
    step, heads = bytes_of_a_step(config), heads_in_words(config, variants)
    rows, minutes = compare_rules.summarise(runs), (time.perf_counter() - begin) / 60
    title = f"{name}, seeds {','.join(map(str, own.seeds))}"
    text = f"{compare_rules.table(rows, title)}\n{last_groups(runs)}\n\n{heads}\n\n```\n{step}\n```\n"
    summaries = {rule: summary for rule, (_, summary) in pretrained.items()}
    found = {"config": config.to_dict(), "rules": variants, "pretrained": summaries, "rows": rows, "runs": runs, "minutes": minutes}
    write_json(own.out / "transfer.json", found | {"command": sys.argv[1:]})
    replace_file(own.out / "transfer.md", text.encode())
    print(f"{text}\n{minutes:.0f} minutes in all")


if __name__ == "__main__":
    main()
