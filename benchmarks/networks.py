"""Measures every published network: its groups, parameters, locality certificate, and the bytes of a training step on a TPU.

    pip install -e ".[tpu-compiler]"
    JAX_PLATFORMS=cpu python benchmarks/networks.py --out networks.json [--networks vgg8b,resnet18] [--config.KEY=VALUE ...] [--skip-tpu]

The networks are those of configs/vgg8b.py and configs/resnet18.py with `config.network` changed: CIFAR-10, batch 128, the 32x32 stem,
bfloat16. For each grouping the certificate is made from the traced program. A training step of back-propagation, and one of VFF for each
grouping, are compiled for one chip of a TPU v5e by Google's own compiler. Nothing is trained, and no data set is read. All of it takes half
an hour on two cores. Results in FILE.json that belong to the same configuration and package versions are kept, so that a stopped run goes
on. Changes to the code of this package are not noticed: give another file after a change.
"""

import importlib.metadata
import importlib.util
import json
import sys
import time
from typing import Any

from arguments import one_line, parser_of, read_config, some_of
from keys import JOINT, Only, default, refuse
from records import parameters
from vffjax.cli.options import json_file
from vffjax.config import Config
from vffjax.costs import ledger, memory, targets
from vffjax.data import sizes_of
from vffjax.files import write_json
from vffjax.proofs import locality
from vffjax.registry import NETWORKS
from vffjax.training.checks import make_config
from vffjax.training.plan import make_plan

GROUPINGS = ("width", "block", "layer")
# The networks with published widths. Sorted by length first, vgg8b comes before vgg11b.
PUBLISHED = sorted((name for name in NETWORKS.names if "width_factor" in NETWORKS.find(name).keys), key=lambda name: (len(name), name))
# Keys whose values the table sets itself.
SET_HERE = {
    "grouping": Only(("width",), "every row has all groupings", "leave it out"),
    "rule": Only((default("rule"),), "every row has VFF and back-propagation", f"leave it at {default('rule')}"),
    "schedule": JOINT,
    "frozen_groups": Only((0,), "back-propagation and each grouping have other groups", "use 0"),
    "overrides": Only(({},), "back-propagation and each grouping have other groups", "leave it out"),
    "rematerialise": Only((False,), "the table compares steps that keep their maps", "use vffjax memory for the others"),
}
VERSIONS = ("jax", "libtpu")


def certificates(config: Config) -> dict[str, Any]:
    """For each grouping: whether it is local, the number of layers in each group, and the seconds that the certificate took.

    The grouping `all` is back-propagation, and must not be local.
    """
    found = {}
    for grouping in (*GROUPINGS, "all"):
        start = time.perf_counter()
        certificate = locality.certify(make_config(config.to_dict() | {"grouping": grouping}), numeric=False)
        groups = list(certificate["groups"].values())
        found[grouping] = {"local": certificate["local"], "layers_of_groups": groups, "seconds": time.perf_counter() - start}
    return found


def counted(config: Config) -> dict[str, int]:
    """The number of scalar parameters in the whole network (`all`), and of those in its `heads`."""
    sizes = sizes_of(config)
    count = parameters(make_plan(config, sizes.train_images, sizes.classes))
    return {"all": sum(count.values()), "heads": count["heads"]}


def steps(config: Config) -> list[ledger.Case]:
    """The training steps to compile: that of back-propagation, and that of VFF for each grouping."""
    groupings = [ledger.cases(make_config(config.to_dict() | {"grouping": grouping}), [], []) for grouping in GROUPINGS]
    bp = [case for case in groupings[0] if case.method == "bp"]
    return bp + [case for cases in groupings for case in cases if case.method == f"{config.rule} joint"]


@one_line(__file__)
def main() -> None:
    parser = parser_of(__file__, __doc__)
    parser.add_argument("--out", type=json_file, required=True, metavar="FILE.json", help="file of the results")
    parser.add_argument(
        "--networks", type=some_of("--networks", dict.fromkeys(PUBLISHED)), default=",".join(PUBLISHED), help="comma-separated"
    )
    parser.add_argument("--skip-tpu", action="store_true", help="make only certificates and counts of parameters")
    own, rest = parser.parse_known_args()
    found: dict[str, Any] = json.loads(own.out.read_text()) if own.out.exists() else {}
    versions = {name: importlib.metadata.version(name) for name in VERSIONS if importlib.util.find_spec(name)}
    for network in own.networks:
        name = "resnet18" if NETWORKS.find(network).blocks else "vgg8b"
        given = ["--config", name, f"--config.network={network}", "--config.precision=bf16", *rest]
        config = read_config(given)[0]
        refuse(config, {"network": Only((network,), "the networks are those of --networks", "leave it out")} | SET_HERE)
        print(f"== {network}", file=sys.stderr, flush=True)
        about = {"config": json.loads(json.dumps(config.to_dict())), "versions": versions}
        row: dict[str, Any] = found.get(network, {})
        if {key: row.get(key) for key in about} != about:
            row = found[network] = about | {"parameters": counted(config), "certificates": certificates(config), "ledger": []}
            write_json(own.out, found)
        known = [(step["method"], step["grouping"]) for step in row["ledger"]]
        missing = [case for case in steps(config) if (case.method, case.config.grouping) not in known]
        for case in [] if own.skip_tpu else missing:
            start = time.perf_counter()
            row["ledger"].append(memory.measure(case, targets.find("tpu")) | {"seconds_to_compile": time.perf_counter() - start})
            ledger.compare(row["ledger"])
            write_json(own.out, found)
    print(table(found))


def table(found: dict[str, Any]) -> str:
    """The results as a Markdown table.

    Bytes are the temporaries of a step in MB, for back-propagation and for VFF in each grouping, with the ratio of the two.
    """
    titles = ["network", "million parameters (heads)", f"groups by {', '.join(GROUPINGS)}", "local", "bp"]
    titles += [f"vff by {grouping}" for grouping in GROUPINGS]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for network, row in found.items():
        local = all(row["certificates"][g]["local"] for g in GROUPINGS) and not row["certificates"]["all"]["local"]
        groups = ", ".join(str(len(row["certificates"][g]["layers_of_groups"])) for g in GROUPINGS)
        all_, heads = (row["parameters"][key] / 1e6 for key in ("all", "heads"))
        taken = {step["grouping"]: step for step in row["ledger"]}
        cells = [_megabytes(taken.get(grouping)) for grouping in ("all", *GROUPINGS)]
        verdict = "each; back-propagation refused" if local else "NO"
        lines.append(f"| `{network}` | {all_:.1f} ({heads:.2f}) | {groups} | {verdict} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _megabytes(step: dict[str, Any] | None) -> str:
    if step is None or step["problem"]:
        return step["problem"] if step else "-"
    ratio = f" ({step['relative_to_bp']:.2f})" if step["grouping"] != "all" and step["relative_to_bp"] else ""
    return f"{step['temp_bytes'] / 1e6:,.0f}{ratio}"


if __name__ == "__main__":
    main()
