"""The memory ledger in full: what one training step takes, VFF beside back-propagation, by depth, batch and device.

    python benchmarks/memory.py --config configs/cifar10.py:yardstick --out FILE.json [--config.KEY=VALUE ...] [--quick]
                                [--depths 2,4,8,16] [--batches 128,512]

Methods: `bp` is back-propagation on the same network; `bp checkpointed` keeps the inputs of segments of about sqrt(depth) layers and
recomputes the rest; `bp accumulated` computes four parts of the batch one after the other and takes the mean of their gradients; `vff
joint` trains all groups on each batch; `vff sequential` trains the last group behind its frozen predecessors. Another config.rule has the
same two rows under its own name. For the local rule each layer is a group. A network of given depth has layers of the configuration's first
width, without pooling.

Devices: this machine's CPU in the configuration's precision; a TPU v5e in bf16, which need not be present, because libtpu's compiler makes
a real executable without it (skipped if libtpu is not installed); and JAX's own device in bf16, if it is a GPU or TPU.

Bytes are those of the compiler's plan for one step with donated states: arguments (states, batch, codebook), outputs, the part of the
outputs that overwrites arguments, and temporaries. Three things are not counted: the rest of the data set on the device; the scratch memory
of the runtime and its libraries; and on a TPU what the compiler keeps in the chip's vector memory, which is 128 MiB on a v5e. If the
feature maps of a small batch fit there, back-propagation takes little of the counted memory, and less than VFF. On CPU the plan is that of
XLA's default schedule, which training uses too. It allocates the outputs of all gradient loops of `bp` before the first one begins, which
is a quarter of the temporaries of `bp`. This hardly happens for `bp checkpointed`.

On a GPU or TPU each row also has the peak that the allocator measured over two steps. It includes the memory that the compiler used to try
kernels. Every row is measured in a process of its own, so that each peak belongs to one row. The script writes FILE.json after every row
and the plot FILE.png at the end, and prints the table.
"""

import argparse
import concurrent.futures
import functools
import multiprocessing
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from arguments import one_line, parser_of, read_config
from keys import Only, refuse
from vffjax.cli.options import json_file, whole_numbers
from vffjax.config import Config
from vffjax.costs import ledger, targets
from vffjax.costs.ledger import Case
from vffjax.costs.memory import compile_step, make_step, row
from vffjax.data import sizes_of
from vffjax.files import write_json
from vffjax.hyperparameters import at_peak
from vffjax.runs import drawing
from vffjax.training.batch import Batch
from vffjax.training.checks import make_config
from vffjax.training.plan import blank_task, init_states
from vffjax.training.trainer import with_draws

STYLES = {
    "bp": ("tab:red", "-"),
    "bp checkpointed": ("tab:orange", "-"),
    ledger.ACCUMULATED: ("tab:purple", "-"),
    "joint": ("tab:blue", "-"),
    "sequential": ("tab:cyan", "--"),
}

# Keys whose values the ledger sets itself.
SET_HERE = {
    "frozen_groups": Only((0,), "methods and depths have other groups than the configuration", "use 0"),
    "overrides": Only(({},), "methods and depths have other groups than the configuration", "leave it out"),
    "feature_cache": Only(("none",), "the sequential step of the ledger computes the output of frozen groups", "use feature_cache=none"),
}


def parse(arguments: list[str]) -> tuple[argparse.Namespace, Config, str]:
    """Reads the command line.

    Returns:
        The benchmark's own options with their defaults filled in, the configuration, and its name.

    Raises:
        UserError: an option or the configuration is not valid.
    """
    parser = parser_of(__file__, __doc__)
    parser.add_argument("--out", type=json_file, required=True, metavar="FILE.json", help="results; the plot is FILE.png")
    parser.add_argument("--depths", metavar="N,N", help="layers of the networks; default: 2,4,8,16; quick: 2,4")
    parser.add_argument("--batches", metavar="N,N", help="images in a step; default: 128,512; quick: 32")
    parser.add_argument("--quick", action="store_true", help="a first look at small networks, which show less of the difference")
    own, rest = parser.parse_known_args(arguments)
    own.depths = whole_numbers("--depths", own.depths or ("2,4" if own.quick else "2,4,8,16"))
    own.batches = whole_numbers("--batches", own.batches or ("32" if own.quick else "128,512"))
    config, name = read_config(rest)
    refuse(config, SET_HERE)
    return own, config, name


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function in a new process and returns its result. The process then ends, and frees what it held on the device."""
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measured_row(case: Case, target: str) -> dict[str, Any]:
    """Measures one row of the ledger.

    Args:
        case: the case.
        target: the name of the device; see `targets.find`.

    Returns:
        The row, with the name of the `target`, and `measured_peak_bytes`: the peak of two steps on JAX's own device, or None if they were
        not run or the device does not count bytes.
    """
    place = targets.find(target)
    compiled = compile_step(case, place)
    found = {"target": target} | row(case, place, compiled) | {"measured_peak_bytes": None}
    if target == "here" and compiled is not None:
        run(case, compiled)
        found["measured_peak_bytes"] = (place.device.memory_stats() or {}).get("peak_bytes_in_use")
    return found


def run(case: Case, step: Callable[..., Any], steps: int = 2) -> Any:
    """Runs a compiled step a few times on random images, from initial states. Returns the last states and metrics."""
    sizes, (plan, _) = sizes_of(case.config), make_step(case)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.integers(0, 256, (plan.config.batch_size, *sizes.image_shape), np.uint8))
    labels = jnp.asarray(rng.integers(0, sizes.classes, plan.config.batch_size), jnp.int32)
    task = blank_task(plan, sizes.image_shape)
    states, metrics = jax.jit(functools.partial(init_states, plan, sizes.image_shape))(), None
    hyper = jax.tree.map(jnp.asarray, at_peak(plan.config, len(plan.groups)))
    for number in range(steps):
        batch = Batch(images, labels, jnp.arange(len(labels)), jnp.int32(0), jax.random.key(number), hyper)
        states, metrics = step(task, states, with_draws(plan, task, batch))
    return jax.block_until_ready((states, metrics))


def draw(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Plots temporaries against depth to a file, with a line for each method and a panel for each device and batch size."""
    drawing.draw(path, lambda: figure_of(rows))


def figure_of(rows: list[dict[str, Any]]) -> Any:
    """The plot as a Matplotlib figure."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    panels = list(dict.fromkeys((r["target"], r["batch"]) for r in rows))
    names = list(dict.fromkeys(target for target, _ in panels))
    batches = list(dict.fromkeys(batch for _, batch in panels))
    figure = Figure(figsize=(4.6 * len(batches), 3.4 * len(names) + 0.5), dpi=120, layout="constrained")
    grid = figure.subplots(len(names), len(batches), squeeze=False)
    for (target, batch), axes in zip(panels, grid.ravel(), strict=True):
        shown = [r for r in rows if (r["target"], r["batch"]) == (target, batch)]
        for method in dict.fromkeys(r["method"] for r in shown):
            color, style = STYLES[method if method in STYLES else method.split()[-1]]  # "joint" for "vff joint"
            points = [(r["depth"], r["temp_bytes"] / 1e6) for r in shown if r["method"] == method and not r["problem"]]
            axes.plot([p[0] for p in points], [p[1] for p in points], style, color=color, marker="o", markersize=3.5, label=method)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_minor_locator(NullLocator())
        depths = sorted({r["depth"] for r in shown})
        axes.set_xticks(depths, [str(depth) for depth in depths])
        axes.set_ylim(bottom=0)
        axes.set(title=f"{shown[0]['device']}, {shown[0]['precision']}, batch {batch}", xlabel="layers", ylabel="temporaries (MB)")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize="small")
    return figure


@one_line(__file__)
def main() -> None:
    own, config, name = parse(sys.argv[1:])
    # A process that asks JAX for its device also holds the device, so another process asks.
    precisions = {"cpu": config.precision, "tpu": "bf16"} | ({} if in_own_process(jax.default_backend) == "cpu" else {"here": "bf16"})
    skipped = {} if targets.has_tpu_compiler() else {"tpu": "libtpu is not installed; pip install -e '.[tpu-compiler]'"}
    cases = {}
    for target in (t for t in precisions if t not in skipped):
        cases[target] = ledger.cases(make_config(config.to_dict() | {"precision": precisions[target]}), own.depths, own.batches)
    for target, reason in skipped.items():
        print(f"== {target} skipped: {reason}", file=sys.stderr)
    rows: list[dict[str, Any]] = []
    network = ledger.network_of(config, own.depths)
    found = {
        "config": name,
        "network": network,
        "command": sys.argv[1:],
        "quick": own.quick,
        "jax": jax.__version__,
        "skipped": skipped,
        "rows": rows,
    }
    for target in cases:
        for case in cases[target]:
            print(f"== {target}: {case}", file=sys.stderr, flush=True)
            rows.append(in_own_process(measured_row, case, target))
            ledger.compare(rows)
            write_json(own.out, found)
    draw(rows, own.out.with_suffix(".png"))
    print(f"network: {network['measured']}")
    print(ledger.table(rows))


if __name__ == "__main__":
    main()
