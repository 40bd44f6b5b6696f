"""Every published network in one table: groups, parameters, the locality certificate, bytes of a training step, and a TPU's executable.

    pip install -e ".[tpu-compiler]"
    JAX_PLATFORMS=cpu python benchmarks/networks.py --out networks.json [--networks vgg8b,resnet18] [--config.KEY=VALUE ...] [--skip-tpu]

Networks are those of configs/vgg8b.py and configs/resnet18.py with `config.network` changed: CIFAR-10, batch 128, the 32x32 stem, in
bfloat16. For each grouping the certificate is made on the traced program; a training step, back-propagation's and VFF's for
each grouping, is compiled for one chip of a TPU v5e by Google's own compiler, whose ledger is shown. Nothing is trained, no data set read.
Half an hour of two cores in all; what FILE.json holds of the same configuration and packages is kept, so that a stopped run goes on.
It does not know of changes to this package's own code: after one, give another file.
"""

import importlib.metadata
import importlib.util
import json
import sys
import time
from typing import Any

import jax

from arguments import one_line, parser_of, read_config, some_of
from keys import JOINT, Only, refuse
from vffjax.cli.options import json_file
from vffjax.config import Config
from vffjax.costs import ledger, memory, targets
from vffjax.data import sizes_of
from vffjax.files import write_json
from vffjax.proofs import locality
from vffjax.registry import NETWORKS
from vffjax.training.checks import make_config
from vffjax.training.plan import init_states, make_plan

GROUPINGS = ("width", "block", "layer")
# Keys whose values the table sets itself, for one row or column after another.
PUBLISHED = ("vgg8b", "vgg11b", "resnet18", "resnet34", "resnet50")
SET_HERE = {
    "grouping": Only(("width",), "every row has all groupings", "leave it out"),
    "rule": Only(("vff",), "every row has VFF and back-propagation", "leave it at vff"),
    "schedule": JOINT,
    "frozen_groups": Only((0,), "back-propagation and each grouping have other groups", "use 0"),
    "overrides": Only(({},), "back-propagation and each grouping have other groups", "leave it out"),
    "rematerialise": Only((False,), "the table compares steps that keep their maps", "use vffjax memory for the others"),
}
VERSIONS = ("jax", "libtpu")


def certificates(config: Config) -> dict[str, Any]:
    """Of each grouping: its groups, whether it is local, and the seconds that took; back-propagation, one group, must fail."""
    found = {}
    for grouping in (*GROUPINGS, "all"):
        start = time.perf_counter()
        certificate = locality.certify(make_config(config.to_dict() | {"grouping": grouping}), numeric=False)
        groups = list(certificate["groups"].values())
        found[grouping] = {"local": certificate["local"], "layers_of_groups": groups, "seconds": time.perf_counter() - start}
    return found


def parameters(config: Config) -> dict[str, int]:
    """Entries of all parameters, and those of the heads among them."""
    sizes = sizes_of(config)
    plan = make_plan(config, sizes.train_images, sizes.classes)
    trees = [state.params for state in jax.eval_shape(lambda: init_states(plan, sizes.image_shape))]
    return {
        name: sum(leaf.size for leaf in jax.tree.leaves(parts)) for name, parts in (("all", trees), ("heads", [t["head"] for t in trees]))
    }


def steps(config: Config) -> list[ledger.Case]:
    """Back-propagation's, and VFF's for each grouping."""
    groupings = [ledger.cases(make_config(config.to_dict() | {"grouping": grouping}), [], []) for grouping in GROUPINGS]
    bp = [case for case in groupings[0] if case.method == "bp"]
    return bp + [case for cases in groupings for case in cases if case.method == f"{config.rule} joint"]


@one_line(__file__)
def main() -> None:
    parser = parser_of(__file__, __doc__)
    parser.add_argument("--out", type=json_file, required=True, metavar="FILE.json")
    parser.add_argument(
        "--networks", type=some_of("--networks", dict.fromkeys(PUBLISHED)), default=",".join(PUBLISHED), help="comma-separated"
    )
    parser.add_argument("--skip-tpu", action="store_true", help="certificates and parameters alone")
    own, rest = parser.parse_known_args()
    found: dict[str, Any] = json.loads(own.out.read_text()) if own.out.exists() else {}
    versions = {name: importlib.metadata.version(name) for name in VERSIONS if importlib.util.find_spec(name)}
    for network in own.networks:
        file = "configs/resnet18.py" if NETWORKS.find(network).blocks else "configs/vgg8b.py"
        given = ["--config", file, f"--config.network={network}", "--config.precision=bf16", *rest]
        config = read_config(given, "use --out")[0]
        refuse(config, {"network": Only((network,), "the networks are those of --networks", "leave it out")} | SET_HERE)
        print(f"== {network}", file=sys.stderr, flush=True)
        about = {"config": json.loads(json.dumps(config.to_dict())), "versions": versions}
        row: dict[str, Any] = found.get(network, {})
        if {key: row.get(key) for key in about} != about:
            row = found[network] = about | {"parameters": parameters(config), "certificates": certificates(config), "ledger": []}
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
    """Markdown: temporaries of a step in MB, of back-propagation and of VFF for each grouping, with the ratio of the two."""
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
