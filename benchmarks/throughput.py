"""Measures training images per second for rules of `vffjax` and for PyTorch, on the same network, in one run on one machine.

    python benchmarks/throughput.py --config configs/cifar10.py:yardstick --out FILE.json [--config.KEY=VALUE ...] [--quick]
                                    [--only NAME,NAME] [--steps N] [--repeats N] [--torch-modes MODE,MODE] [--deterministic]

The contenders of `vffjax` run the trainer's epoch: `vff` as configured, `vff-triplet` with a right and a wrong copy of each image, `head`
the head loss alone, `ff` Hinton's forward-forward, and `bp` back-propagation. Those of PyTorch (see `torch_peers.py`) are `torch-bp`
back-propagation and `torch-vff`, which has the three streams of `vff-triplet`; `torch-bp-compiled` and `torch-vff-compiled` are the same
under torch.compile. All have the network, batch, precision, augmentation and optimizer of the configuration. They train on random images of
the data set's size, and no data set is read. A key that a contender would not obey is refused (see `keys.py`).

Equal algorithms are compared with each other: `vff-triplet` with the faster of the two `torch-vff`, and `bp` with the faster of the two
`torch-bp`. `vff` with shared copies is another, cheaper algorithm. The table says so wherever it compares `vff` with the others.

After compiling and warming up, contenders take turns. A round times an epoch of `--steps` steps of each, and ratios are taken within a
round. FLOP/s count the model's arithmetic (see `rates.py`). They are compared with the rate of large matrix products in the same precision,
in the library where it is higher. In f32 on a GPU each library keeps its own default for TF32, which the JSON records; bf16 is the same
arithmetic in both. The script writes FILE.json and a bar chart FILE.png, and prints the table.

On a GPU neither library gives the same bits in two runs unless it is told to. With --deterministic both are told so: JAX by the flag
--xla_gpu_deterministic_ops of XLA_FLAGS, PyTorch by `torch.use_deterministic_algorithms`, which only warns where it has no such kernel.
"""

import argparse
import os
import statistics
import sys
import time
from typing import Any

# JAX would otherwise reserve three quarters of a GPU's memory, and leave too little for PyTorch.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# Without PyTorch's cache its compile time is that of a first run, like ours.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
if "--deterministic" in sys.argv:  # before JAX and CUDA start, which read these once
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true".strip()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import jax

from arguments import one_line, parser_of, read_config, some_of
from contenders import (
    COMPILE_MODES,
    CONTENDERS,
    PAUSE,
    TORCH_BP,
    TORCH_VFF,
    JaxContender,
    TorchContender,
    Unavailable,
    Workload,
    check_keys,
    machine,
    make_torch_deterministic,
    matrix_product_rates,
    variant,
)
from rates import training_flops
from spread import median_and_range
from vffjax.cli.options import a_count, json_file
from vffjax.config import Config
from vffjax.errors import UserError
from vffjax.files import write_json
from vffjax.rules.vff import in_batch
from vffjax.runs import drawing

# Contenders, each with the peers of which the fastest is compared with it.
COMPARED = (
    ("vff-triplet", TORCH_VFF),
    ("bp", TORCH_BP),
    ("vff", TORCH_BP),
    ("vff", TORCH_VFF),
    ("vff", ("bp",)),
    ("vff-triplet", ("bp",)),
)


def parse(arguments: list[str]) -> tuple[argparse.Namespace, Config, str]:
    """Reads the command line.

    Returns:
        The benchmark's own options with their defaults filled in, the configuration, and its name.

    Raises:
        UserError: an option or the configuration is not valid, or a contender would not obey a key.
    """
    parser = parser_of(__file__, __doc__)
    parser.add_argument("--out", type=json_file, required=True, metavar="FILE.json", help="results; the chart is FILE.png")
    parser.add_argument(
        "--only", type=some_of("--only", CONTENDERS), default=",".join(CONTENDERS), help="comma-separated contenders; default: all"
    )
    parser.add_argument("--steps", type=a_count, help="training steps in a timed epoch; default: 8 on CPU, else 200; quick: 2, 20")
    parser.add_argument("--repeats", type=a_count, help="timed epochs of each contender; default: 5; quick: 2")
    parser.add_argument(
        "--torch-modes",
        type=some_of("--torch-modes", COMPILE_MODES),
        metavar="MODE,MODE",
        help="modes of torch.compile; default: all that suit the device",
    )
    parser.add_argument("--deterministic", action="store_true", help="the same bits in each run, as far as a library can")
    parser.add_argument("--quick", action="store_true", help="a first look that is no measurement")
    own, rest = parser.parse_known_args(arguments)
    config, name = read_config(rest)
    check_keys(config, own.only)
    if own.torch_modes and not any(name.endswith("-compiled") for name in own.only):
        raise UserError(
            f"--torch-modes={','.join(own.torch_modes)}: no contender is compiled by PyTorch; add one to --only, or leave it out"
        )
    if os.environ.get("OMP_WAIT_POLICY", "").lower() == "active" and any(name.startswith("torch") for name in own.only):
        raise UserError("OMP_WAIT_POLICY=active: idle PyTorch threads would spin through the rounds of JAX; unset it")
    on_cpu = jax.default_backend() == "cpu"
    own.steps = ((2 if on_cpu else 20) if own.quick else (8 if on_cpu else 200)) if own.steps is None else own.steps
    own.repeats = (2 if own.quick else 5) if own.repeats is None else own.repeats
    return own, config, name


def build(names: list[str], config: Config, work: Workload) -> tuple[dict[str, JaxContender | TorchContender], dict[str, str]]:
    """Builds, compiles and warms up contenders.

    Args:
        names: the contenders.
        config: the configuration that they share.
        work: their images.

    Returns:
        The contenders that are ready, by name; and for those that cannot run on this machine, the reason by name.
    """
    ready: dict[str, JaxContender | TorchContender] = {}
    missing = {}
    for name in names:
        _progress(f"building {name}")
        try:
            if name.startswith("torch"):
                ready[name] = TorchContender(variant(config, name), work, compiled=name.endswith("-compiled"))
            else:
                ready[name] = JaxContender(variant(config, name), work)
        except Unavailable as reason:
            missing[name] = str(reason)
    return ready, missing


def measure(contenders: dict[str, JaxContender | TorchContender], repeats: int, images: int) -> list[dict[str, float]]:
    """Times an epoch of each contender in each round.

    Each round starts with the next contender, so that no contender always follows the same one.

    Args:
        contenders: the contenders by name.
        repeats: the number of rounds.
        images: the number of images in an epoch.

    Returns:
        For each round the images per second of each contender.
    """
    names, rounds = list(contenders), []
    for number in range(repeats):
        _progress(f"round {number + 1} of {repeats}")
        speeds = {}
        for i in range(len(names)):
            name = names[(i + number) % len(names)]
            time.sleep(PAUSE)
            start = time.perf_counter()
            contenders[name].epoch()
            speeds[name] = images / (time.perf_counter() - start)
        rounds.append({name: speeds[name] for name in names})
    return rounds


def summarise(
    name: str, contender: JaxContender | TorchContender, rounds: list[dict[str, float]], flops_per_image: float, product_rate: float
) -> dict[str, Any]:
    """The row of one contender.

    Args:
        name: the name of the contender.
        contender: the contender.
        rounds: the result of `measure`.
        flops_per_image: the model FLOPs of training on one image.
        product_rate: the FLOP/s of large matrix products.
    """
    speeds = [speed[name] for speed in rounds]
    best_peers = [max((speed[peer] for peer in TORCH_BP if peer in speed), default=None) for speed in rounds]
    ratios = [speed / peer for speed, peer in zip(speeds, best_peers, strict=True) if peer is not None]
    achieved = statistics.median(speeds) * flops_per_image
    return {
        "contender": name,
        "library": contender.library,
        **median_and_range("images_per_second", speeds),
        "n": len(speeds),
        **median_and_range("over_torch_bp", ratios),
        "model_flops_per_image": flops_per_image,
        "flops_per_second": achieved,
        "share_of_matrix_product_rate": achieved / product_rate,
        **contender.facts,
    }


def comparisons(rounds: list[dict[str, float]], variants: dict[str, Config]) -> list[dict[str, Any]]:
    """Compares contenders with the fastest of their peers in the same round.

    Args:
        rounds: the result of `measure`.
        variants: the configuration that each contender trains.

    Returns:
        For each comparison the ratios of images per second, and whether both sides train by the same algorithm.
    """
    found = []
    for name, peers in COMPARED:
        present = [peer for peer in peers if rounds and peer in rounds[0]]
        if not rounds or name not in rounds[0] or not present:
            continue
        ratios = [speed[name] / max(speed[peer] for peer in present) for speed in rounds]
        found.append(
            {
                "contender": name,
                "peers": present,
                "same_algorithm": _algorithm(variants[name]) == _algorithm(variants[present[0]]),
                **median_and_range("ratio", ratios),
                "n": len(ratios),
            }
        )
    return found


def _algorithm(config: Config) -> dict[str, Any]:
    return config.to_dict() | {"contrast": in_batch(config)}


def comparison_table(found: list[dict[str, Any]]) -> list[str]:
    """The lines of a Markdown table of comparisons, in which those of equal algorithms come first."""
    lines = ["| compared | with the fastest of | ratio of images/s | least - most | n | algorithm |", "|---" * 6 + "|"]
    for row in sorted(found, key=lambda row: not row["same_algorithm"]):
        low, high = row["ratio_range"]
        algorithm = "the same on both sides" if row["same_algorithm"] else "two different ones"
        cells = [row["contender"], ", ".join(row["peers"]), f"{row['ratio']:.2f}", f"{low:.2f} - {high:.2f}", str(row["n"]), algorithm]
        lines.append(f"| {' | '.join(cells)} |")
    return lines if found else []


def table(found: dict[str, Any]) -> str:
    """All results as Markdown."""
    head = ["images/s", "least - most", "n", "over best PyTorch BP", "model GFLOP/s", "of matrix products", "compile s", "peak MB"]
    lines = [f"### {found['title']}", "", f"| contender | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    for row in found["rows"]:
        low, high = row["images_per_second_range"]
        cells = [f"{row['images_per_second']:,.0f}", f"{low:,.0f} - {high:,.0f}", str(row["n"])]
        cells.append(_shown(row["over_torch_bp"], 2))
        cells += [f"{row['flops_per_second'] / 1e9:,.1f}", f"{100 * row['share_of_matrix_product_rate']:.1f} %"]
        cells += [_shown(row["compile_seconds"], 1), _shown(row["peak_bytes"] and row["peak_bytes"] / 1e6, 1)]
        lines.append(f"| {row['contender']} | {' | '.join(cells)} |")
    lines += [f"| {name} | did not run: {reason}{' |' * len(head)}" for name, reason in found["missing"].items()]
    lines += ["", *comparison_table(found["comparisons"])]
    rates = found["matrix_products"]
    measured = ", ".join(f"{name} {rates[name] / 1e9:,.0f}" for name in ("jax", "torch") if name in rates)
    sizes = f"{rates['size']} x {rates['size']} in {found['config']['precision']}"
    lines += ["", f"Rounds of {found['steps']} steps. Matrix products of {sizes}, GFLOP/s: {measured}."]
    lines += [f"{row['contender']}: {row['mode']}, {row['optimizer']} optimizer." for row in found["rows"] if "mode" in row]
    return "\n".join(lines) + "\n"


def _shown(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def figure_of(found: dict[str, Any]) -> Any:
    """The chart as a Matplotlib figure, with a bar for the median of each row and a line for its range."""
    from matplotlib.figure import Figure

    rows = found["rows"][::-1]
    figure = Figure(figsize=(9.0, 1.4 + 0.42 * len(rows)), dpi=120, layout="constrained")
    axes = figure.subplots()
    for at, row in enumerate(rows):
        median, (low, high) = row["images_per_second"], row["images_per_second_range"]
        axes.barh(at, median, color="tab:blue" if row["library"] == "jax" else "tab:orange")
        axes.plot([low, high], [at, at], color="black", linewidth=1.5, marker="|")
        axes.annotate(f"{median:,.0f}", (high, at), xytext=(6, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(rows)), [row["contender"] for row in rows])
    axes.set_xlabel(f"training images/s: median, least and greatest of {found['repeats']} rounds (blue: vffjax, orange: PyTorch)")
    axes.set_title(found["title"], fontsize=10)
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _progress(message: str) -> None:
    print(f"== {message}", file=sys.stderr, flush=True)


@one_line(__file__)
def main() -> None:
    own, config, name = parse(sys.argv[1:])
    work = Workload(config, own.steps, own.torch_modes)
    variants = {contender: variant(config, contender) for contender in own.only}
    for one in variants.values():
        work.check(one)
    if own.deterministic:
        make_torch_deterministic()
    contenders, missing = build(own.only, config, work)
    with_torch = any(contender.library == "torch" for contender in contenders.values())
    rates = matrix_product_rates(config.precision, own.quick, work, with_torch)
    rounds = measure(contenders, own.repeats, work.examples)
    flops = {n: training_flops(variants[n], work.shape, work.classes) / config.batch_size for n in contenders}
    about = machine(work, with_torch)
    found = {
        "title": f"{name}, batch {config.batch_size}, {config.precision}, {about['device']}",
        "command": sys.argv[1:],
        "quick": own.quick,
        "deterministic": own.deterministic,
        "steps": own.steps,
        "repeats": own.repeats,
        **about,
        "matrix_products": rates,
        "rows": [summarise(n, contender, rounds, flops[n], rates["best"]) for n, contender in contenders.items()],
        "comparisons": comparisons(rounds, variants),
        "missing": missing,
        "rounds": rounds,
        "config": config.to_dict(),
        "variants": {n: CONTENDERS[n] for n in own.only},
    }
    write_json(own.out, found)
    if contenders:
        drawing.draw(own.out.with_suffix(".png"), lambda: figure_of(found))
    print(table(found))


if __name__ == "__main__":
    main()
