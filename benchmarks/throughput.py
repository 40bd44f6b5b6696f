"""Training images per second: every rule of `vffjax`, and PyTorch on the same network, in one run on one machine.

    python benchmarks/throughput.py --config configs/cifar10.py:yardstick --out FILE.json [--config.KEY=VALUE ...] [--quick]
                                    [--only NAME,NAME] [--steps N] [--repeats N]

Contenders of `vffjax`, each as the scanned epoch: `vff` as configured, `vff-triplet` with a right and a wrong copy of each image, `head`
the head loss alone, `ff` Hinton's forward-forward, `bp` back-propagation. Of PyTorch (see `torch_peers.py`): `torch-bp` back-propagation,
`torch-vff` the three streams of `vff-triplet`; `torch-bp-compiled` and `torch-vff-compiled` the same by torch.compile. All have the
network, batch, precision, augmentation and optimizer of the configuration, and train on random images of the data set's size; no data set
is read. A key that one of the contenders would not obey is refused (see `keys.py`).

Like is compared with like: `vff-triplet` with the faster of the two `torch-vff`, `bp` with the faster of the two `torch-bp`. `vff` with
shared copies is another, cheaper algorithm, and the table says so where it sets it beside the others.

After compiling and warming up, contenders take turns: a round times an epoch of `--steps` steps of each. Ratios are taken within a round.
Achieved FLOP/s count the model's arithmetic (see `rates.py`), and are set against the rate of
large matrix products in the same precision, the better of the two libraries'. In f32 on a GPU each library keeps its default of TF32,
which the JSON records; bf16 compares like with like. Writes FILE.json, a bar chart FILE.png, and the table to standard output.
"""

import argparse
import os
import pathlib
import platform
import statistics
import sys
import time
from typing import Any

# JAX would take three quarters of a GPU's memory for itself, and PyTorch would starve.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# Compile seconds are to be those of a first run, as ours are.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")

import jax

from arguments import one_line, parser_of, read_config, some_of
from contenders import (
    CONTENDERS,
    TORCH_BP,
    TORCH_VFF,
    JaxContender,
    TorchContender,
    Unavailable,
    Workload,
    check_keys,
    torch_products,
    variant,
)
from rates import jax_products, product_rate, training_flops
from vffjax.cli.options import a_count, json_file
from vffjax.config import Config
from vffjax.errors import UserError
from vffjax.files import write_json
from vffjax.rules.vff import in_batch
from vffjax.runs import drawing

# On CPU both libraries have a thread pool of all cores, and OpenMP's idle threads spin before they sleep: GNU's for some milliseconds,
# Intel's for 200. Without a pause a contender of JAX would share its cores with the spinning threads of the PyTorch contender before it.
# A GPU has no such threads, and would lower its clock.
_PAUSE = 0.25 if jax.default_backend() == "cpu" else 0.0  # seconds

# Each with the peers whose fastest it is set against.
COMPARED = (
    ("vff-triplet", TORCH_VFF),
    ("bp", TORCH_BP),
    ("vff", TORCH_BP),
    ("vff", TORCH_VFF),
    ("vff", ("bp",)),
    ("vff-triplet", ("bp",)),
)


def parse(arguments: list[str]) -> tuple[argparse.Namespace, Config, str]:
    """Own options, completed and checked; the configuration and its name. Raises `UserError`."""
    parser = parser_of(__file__, __doc__)
    parser.add_argument("--out", type=json_file, required=True, metavar="FILE.json", help="results; the chart is FILE.png")
    parser.add_argument(
        "--only", type=some_of("--only", CONTENDERS), default=",".join(CONTENDERS), help="comma-separated contenders; default: all"
    )
    parser.add_argument("--steps", type=a_count, help="training steps in a timed epoch; default: 8 on CPU, else 200; quick: 2, 20")
    parser.add_argument("--repeats", type=a_count, help="timed epochs of each contender; default: 5; quick: 2")
    parser.add_argument("--quick", action="store_true", help="a look, not a measurement")
    own, rest = parser.parse_known_args(arguments)
    config, name = read_config(rest, "use --out")
    check_keys(config, own.only)
    if os.environ.get("OMP_WAIT_POLICY", "").lower() == "active" and any(name.startswith("torch") for name in own.only):
        raise UserError("OMP_WAIT_POLICY=active: idle PyTorch threads would spin through the rounds of JAX; unset it")
    on_cpu = jax.default_backend() == "cpu"
    own.steps = ((2 if on_cpu else 20) if own.quick else (8 if on_cpu else 200)) if own.steps is None else own.steps
    own.repeats = (2 if own.quick else 5) if own.repeats is None else own.repeats
    return own, config, name


def build(names: list[str], config: Config, work: Workload) -> tuple[dict[str, JaxContender | TorchContender], dict[str, str]]:
    """Contenders, compiled and warm; and those that cannot run here, with the reason."""
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
    """Images per second of each contender in each round; a round starts one contender further on, so that none always follows the same."""
    names, rounds = list(contenders), []
    for number in range(repeats):
        _progress(f"round {number + 1} of {repeats}")
        speeds = {}
        for i in range(len(names)):
            name = names[(i + number) % len(names)]
            time.sleep(_PAUSE)
            start = time.perf_counter()
            contenders[name].epoch()
            speeds[name] = images / (time.perf_counter() - start)
        rounds.append({name: speeds[name] for name in names})
    return rounds


def matrix_product_rates(precision: str, quick: bool, work: Workload, with_torch: bool) -> dict[str, Any]:
    """FLOP/s of large matrix products in each library, and the better one's."""
    size = (256 if quick else 1024) if jax.default_backend() == "cpu" else (4096 if quick else 8192)
    rates = {"jax": product_rate(jax_products(size, precision), size)}
    if with_torch:
        time.sleep(_PAUSE)
        rates["torch"] = product_rate(torch_products(size, precision, work.for_torch.device), size)
    return {"size": size, **rates, "best": max(rates.values())}


def summarise(
    name: str, contender: JaxContender | TorchContender, rounds: list[dict[str, float]], flops_per_image: float, product_rate: float
) -> dict[str, Any]:
    """The row of one contender."""
    speeds = [speed[name] for speed in rounds]
    best_peers = [max((speed[peer] for peer in TORCH_BP if peer in speed), default=None) for speed in rounds]
    ratios = [speed / peer for speed, peer in zip(speeds, best_peers, strict=True) if peer is not None]
    achieved = statistics.median(speeds) * flops_per_image
    return {
        "contender": name,
        "library": contender.library,
        "images_per_second": statistics.median(speeds),
        "images_per_second_range": [min(speeds), max(speeds)],
        "n": len(speeds),
        "over_torch_bp": statistics.median(ratios) if ratios else None,
        "over_torch_bp_range": [min(ratios), max(ratios)] if ratios else None,
        "model_flops_per_image": flops_per_image,
        "flops_per_second": achieved,
        "share_of_matrix_product_rate": achieved / product_rate,
        **contender.facts,
    }


def comparisons(rounds: list[dict[str, float]], variants: dict[str, Config]) -> list[dict[str, Any]]:
    """Ratios of images per second to the fastest peer of the same round, and whether the two train by the same algorithm."""
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
                "ratio": statistics.median(ratios),
                "ratio_range": [min(ratios), max(ratios)],
                "n": len(ratios),
            }
        )
    return found


def _algorithm(config: Config) -> dict[str, Any]:
    return config.to_dict() | {"contrast": in_batch(config)}


def comparison_table(found: list[dict[str, Any]]) -> list[str]:
    """Markdown lines, those of equal algorithms first."""
    lines = ["| compared | with the fastest of | ratio of images/s | least - most | n | algorithm |", "|---" * 6 + "|"]
    for row in sorted(found, key=lambda row: not row["same_algorithm"]):
        low, high = row["ratio_range"]
        algorithm = "the same on both sides" if row["same_algorithm"] else "two different ones"
        cells = [row["contender"], ", ".join(row["peers"]), f"{row['ratio']:.2f}", f"{low:.2f} - {high:.2f}", str(row["n"]), algorithm]
        lines.append(f"| {' | '.join(cells)} |")
    return lines if found else []


def table(found: dict[str, Any]) -> str:
    """Markdown."""
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


def draw(found: dict[str, Any], path: pathlib.Path) -> None:
    drawing.draw(path, lambda: figure_of(found))


def figure_of(found: dict[str, Any]) -> Any:
    """A bar for each row: the median, with a line from the least to the greatest."""
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


def machine(work: Workload, with_torch: bool) -> dict[str, Any]:
    """Versions, devices, threads and the settings on which the arithmetic of f32 depends."""
    # Not os.cpu_count() alone: a container or taskset may leave fewer.
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    found: dict[str, Any] = {
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "torch": None},
        "device": jax.devices()[0].device_kind,
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "usable_cpus": usable,
        "jax_default_matmul_precision": jax.config.jax_default_matmul_precision,  # type: ignore[attr-defined]
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }
    if with_torch:
        import torch

        found["versions"]["torch"] = torch.__version__
        found |= {
            "torch_device": torch.cuda.get_device_name() if work.for_torch.device == "cuda" else "cpu",
            "torch_threads": torch.get_num_threads(),
            "torch_float32_matmul_precision": torch.get_float32_matmul_precision(),
            "torch_cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
        }
    return found


def _progress(message: str) -> None:
    print(f"== {message}", file=sys.stderr, flush=True)


@one_line(__file__)
def main() -> None:
    own, config, name = parse(sys.argv[1:])
    work = Workload(config, own.steps)
    variants = {contender: variant(config, contender) for contender in own.only}
    for one in variants.values():
        work.check(one)
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
        draw(found, own.out.with_suffix(".png"))
    print(table(found))


if __name__ == "__main__":
    main()
