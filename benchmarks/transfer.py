"""Compares fine-tuning from pretrained weights with training from scratch, for VFF and for back-propagation, on CPU.

    python benchmarks/transfer.py --out runs/transfer [--seeds 0,1,2] [--set bp.learning_rate=1e-3 ...]
                                  [--pretrain configs/resnet18.py:narrow_cifar100] [--config configs/finetune_resnet18_cifar10.py:narrow]

1. Trains `--pretrain` (a narrow ResNet-18 on CIFAR-100, by VFF) and exports it under torchvision's names to OUT/pretrained.safetensors.
2. For every seed, trains `--config` (a subset of CIFAR-10) from that file and from scratch, by VFF and by back-propagation. The seed draws
   the subset too; the pretrained weights are the same for all seeds. `--set` gives one rule its own value, chosen on validation data. From
   scratch all groups learn at the same rate (`group_decay=1`).
3. Prints errors on the test set, training images/s, and the memory ledger of one step. Writes OUT/transfer.json and OUT/transfer.md.

Both rules start from weights that VFF has trained. Weights that were pretrained by back-propagation are not part of the comparison. VFF has
a head for every group and back-propagation has one head in all, so the two differ in their number of parameters. The numbers are printed
below the table.

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
from vffjax.runs import experiment
from vffjax.runs.workdir import load_run
from vffjax.training.checks import make_config
from vffjax.weights import weights

RULES = ("vff", "bp")
# For each rule and start, the one of the learning rates 1e-3 and 4e-3 that had the lower error on the 2,000 validation images of seed 0.
# The configuration itself has the rate of VFF. These rates are used for this configuration only.
CHOSEN_FOR = "configs/finetune_resnet18_cifar10.py:narrow"
CHOSEN: dict[tuple[str, str], dict[str, Any]] = {("bp", "pretrained"): {"learning_rate": 1e-3}}

# Keys whose values the benchmark sets itself.
SET_HERE = {"init_from": Only(("",), "runs start from the weights that this benchmark trains, and from scratch", "leave it empty")}


def pretrain(config: Config, out: pathlib.Path) -> tuple[pathlib.Path, dict[str, Any]]:
    """Trains the weights to start from.

    Args:
        config: the configuration of the pretraining.
        out: the folder for the run and its weights.

    Returns:
        The file of the weights under torchvision's names, and the summary of the run.
    """
    summary = experiment.train(config, out / "pretrained")
    plan, states, task, run = load_run(out / "pretrained", "best")
    file = out / "pretrained.safetensors"
    about = {key: run[key] for key in ("epoch", "class_names", "image_shape")}
    about |= {"pixel_mean": task.mean.tolist(), "pixel_std": task.std.tolist()}
    weights.write_weights(file, plan, states, about, names="torchvision")
    return file, summary


def bytes_of_a_step(config: Config) -> str:
    """The memory ledger of the configuration as text: one step of its rule beside one of back-propagation."""
    rows = [memory.measure(case, targets.find("here")) for case in ledger.cases(config, [], []) if "sequential" not in case.method]
    ledger.compare(rows)
    return ledger.table(rows)


def heads_in_words(config: Config, variants: dict[str, dict[str, Any]]) -> str:
    """The sentences below the table: which weights the runs start from, and how many parameters the heads of each rule have."""
    counts = {rule: counted(make_config(config.to_dict() | changes))["heads"] for rule, changes in variants.items()}
    shown = ", ".join(f"{rule} {count:,}" for rule, count in counts.items())
    return f"Both rules start from weights that VFF has trained. Parameters of all heads: {shown}."


@one_line(__file__)
def main() -> None:
    parser = parser_of(__file__, __doc__, "--seeds", "--set")
    parser.add_argument("--out", type=a_path, required=True, help="folder of results and runs")
    parser.add_argument("--pretrain", default="configs/resnet18.py:narrow_cifar100", metavar="FILE[:VARIANT]")
    parser.add_argument("--config", default=CHOSEN_FOR, metavar="FILE[:VARIANT]")
    own = parser.parse_args()
    begin = time.perf_counter()
    # A program does not depend on its initial weights, so the two runs of a rule and seed share one compiled program.
    jax.config.update("jax_compilation_cache_dir", str(own.out.absolute() / "compiled"))
    variants = {rule: compare_rules.RULES[rule] | compare_rules.given(own.set, rule) for rule in RULES}
    config, name = read_config(["--config", own.config])
    refuse(config, SET_HERE)
    compare_rules.check_keys(config, variants)
    chosen = CHOSEN if own.config == CHOSEN_FOR else {}
    file, pretrained = pretrain(read_config(["--config", own.pretrain])[0], own.out)
    print(f"pretrained: {pretrained['test_error']:.2f} % test error, {pretrained['seconds']:.0f} s of training", file=sys.stderr)
    runs: dict[str, list[dict[str, Any]]] = {}
    for seed in own.seeds:
        for rule in RULES:
            for start, changes in (("pretrained", {"init_from": str(file)}), ("scratch", {"init_from": "", "group_decay": 1.0})):
                print(f"== {rule} from {start}, seed {seed}", file=sys.stderr, flush=True)
                one = make_config(config.to_dict() | {"seed": seed} | changes | chosen.get((rule, start), {}) | variants[rule])
                run = compare_rules.run(one, own.out / "runs" / f"{rule}-{start}-{seed}") | {"config": one.to_dict()}
                runs.setdefault(f"{rule} from {start}", []).append(run)
    step, heads = bytes_of_a_step(config), heads_in_words(config, variants)
    rows, minutes = compare_rules.summarise(runs), (time.perf_counter() - begin) / 60
    title = f"{name}, seeds {','.join(map(str, own.seeds))}"
    text = f"{compare_rules.table(rows, title)}\n{heads}\n\n```\n{step}\n```\n"
    found = {"config": config.to_dict(), "rules": variants, "pretrained": pretrained, "rows": rows, "runs": runs, "minutes": minutes}
    write_json(own.out / "transfer.json", found | {"command": sys.argv[1:]})
    replace_file(own.out / "transfer.md", text.encode())
    print(f"{text}\n{minutes:.0f} minutes in all")


if __name__ == "__main__":
    main()
