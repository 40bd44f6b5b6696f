"""The memory ledger without its measurements: which training steps are compared, and the table of the bytes that they take.

`memory.py` compiles the steps.
"""

import dataclasses
import functools
from typing import Any

from vffjax import networks, rules
from vffjax.config import Config
from vffjax.data import load, sizes_of
from vffjax.errors import UserError
from vffjax.registry import NETWORKS
from vffjax.training import checks, plan
from vffjax.training.stages import is_pipeline

MICRO_BATCHES = 4
ACCUMULATED = "bp accumulated"

LEFT_OUT = ("overrides", "frozen_groups", "feature_cache")  # keys that have their defaults in every case
_BP = rules.BACK_PROPAGATION | {"schedule": "joint", "rematerialise": False}


def methods(rule: str) -> dict[str, dict[str, Any]]:
    """The methods that are compared for a rule, and the configuration keys that each changes.

    They are back-propagation, the same with checkpointing, the same with accumulated gradients, and the rule in both schedules.
    """
    own = {f"{rule} {schedule}": {"rule": rule, "schedule": schedule} for schedule in ("joint", "sequential")}
    return {"bp": _BP, "bp checkpointed": _BP | {"rematerialise": True}, ACCUMULATED: _BP} | own


@dataclasses.dataclass(frozen=True)
class Case:
    """One training step to measure: a method of `methods`, and the configuration that it trains."""

    method: str
    config: Config

    def __str__(self) -> str:
        return f"{self.method}, depth {self.depth}, batch {self.config.batch_size}"

    @property
    def depth(self) -> int:
        """The number of layers. A residual block counts as one."""
        return sum(len(group.module.layers) for group in plan.groups_of(self.config, 2))

    @property
    def about(self) -> dict[str, Any]:
        """The keys of a row that describe the case."""
        c = self.config
        named = {"depth": self.depth, "batch": c.batch_size, "method": self.method, "grouping": c.grouping}
        return named | {"network": c.network, "precision": c.precision, **_size(c)}


def cases(config: Config, depths: list[int], batches: list[int]) -> list[Case]:
    """Lists every combination of batch size, depth and method, for the configuration's rule and for back-propagation.

    `overrides` and `frozen_groups` refer to groups, which differ between methods, and kept features to the sequential schedule, so they are
    left out.

    Args:
        config: a checked configuration.
        depths: numbers of layers. A network of given depth has layers of the configuration's first width, no pooling, and a group for each
            layer. If the list is empty, the configuration's own network is taken as it is.
        batches: numbers of images in a step. If the list is empty, the configuration's own number is taken.

    Raises:
        UserError: a batch size does not fit, the network has a fixed depth, or a configuration does not fit the data.
    """
    if depths and networks.find(config).deepened is None:
        able = ", ".join(name for name in NETWORKS.names if NETWORKS.find(name).deepened)
        fix = f"leave the flag out, or set config.network to one of {able}"
        raise UserError(f"--depths: the depth of {config.network} is fixed; {fix}")
    images = load.split_sizes(config, sizes_of(config).train_images)[0]
    usual = Config().to_dict()
    same = {key: usual[key] for key in (*LEFT_OUT, "inference")}
    found = []
    for batch in batches or [config.batch_size]:
        _check_batch(batch, images, f"--batches={batch}" if batches else f"config.batch_size={batch}")
        for network in [deepened(config, depth) for depth in depths] or [config]:
            common = network.to_dict() | same | {"batch_size": batch}
            found += [Case(method, checks.make_config(common | changes)) for method, changes in methods(config.rule).items()]
    for case in found:
        checks.plan_before_data(case.config)
    return found


def deepened(config: Config, depth: int) -> Config:
    """A network of the configuration's kind with `depth` layers of its first width, no pooling, and a group for each layer."""
    changes = networks.find(config).deepened
    assert changes is not None  # `cases` has checked this
    return dataclasses.replace(config, **{**changes(config, depth), "grouping": "layer"})


def _size(config: Config) -> dict[str, Any]:
    """The keys that say how wide the network is, in JSON types."""
    plain = config.to_dict()
    return {key: plain[key] for key in ("widths", "width_factor") if key in networks.find(config).keys}


def network_of(config: Config, depths: list[int]) -> dict[str, Any]:
    """Describes the network that `cases` measures.

    Returns:
        `own`, whether it is the configuration's own network as it is; and `measured`, a description in words.
    """
    wide = [f"{key} {' '.join(map(str, value)) if isinstance(value, list) else f'{value:g}'}" for key, value in _size(config).items()]
    mine = ", ".join([config.network, *wide, f"grouping {config.grouping}"])
    if not depths:
        usual = Config()
        left_out = [f"config.{key}" for key in LEFT_OUT if getattr(config, key) != getattr(usual, key)]
        left_out += ["the pipeline"] if is_pipeline(config) else []
        return {"own": not left_out, "measured": mine + (f", without {' and '.join(left_out)}" if left_out else "")}
    deep = deepened(config, depths[0])
    layers = f"{deep.network} with {', '.join(map(str, depths))} layers of width {deep.widths[0]}, without pooling, each layer a group"
    return {"own": False, "measured": f"{layers}; not the configuration's own network ({mine})"}


def _check_batch(batch: int, images: int, shown: str) -> None:
    if batch > images:
        raise UserError(f"{shown}: larger than the {images} training images; use at most {images}")
    if batch % MICRO_BATCHES:
        near = batch + MICRO_BATCHES - batch % MICRO_BATCHES
        raise UserError(f"{shown}: not a multiple of {MICRO_BATCHES}, the micro-batches of {ACCUMULATED}; use for example {near}")


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text, in MB (10^6 bytes), with a title for each device, precision and batch size.

    The column `relative to bp` compares temporaries; see `compare`, which must have been called.
    """
    line = functools.partial(_line, max(15, *(len(row["method"]) for row in rows)))
    lines: list[str] = []
    title = ""
    for row in rows:
        number = row.get("devices", 1)  # which older versions did not write
        device, each = (row["device"], "") if number == 1 else (f"{number} x {row['device']}", ", on each device")
        wanted = f"{device}, {row['precision']}, batch {row['batch']}: MB of one training step that takes over its states{each}"
        if wanted != title:
            title = wanted
            lines += [""] * bool(lines) + [title, line("depth", "method", "grouping", *_COLUMNS, "in all", "relative to bp")]
        about, ratio = [row[key] for key in ("depth", "method", "grouping")], row["relative_to_bp"]
        if row["problem"]:
            lines.append(f"{line(*about)}  {row['problem']}")
            continue
        numbers = [f"{row[key] / 1e6:,.2f}" for key in (*_COLUMNS.values(), "total_bytes")]
        shown = line(*about, *numbers, "-" if ratio is None else f"{ratio:.2f}")
        shown += "  bp takes less" if (ratio or 0) > 1 else ""
        peak = row.get("measured_peak_bytes")
        lines.append(shown + (f"  measured peak {peak / 1e6:,.2f}" if peak else ""))
    return "\n".join(lines)


_COLUMNS = {"arguments": "argument_bytes", "outputs": "output_bytes", "aliased": "alias_bytes", "temporaries": "temp_bytes"}
_WIDTHS = (*[11] * (len(_COLUMNS) + 1), 14)  # in characters


def _line(longest: int, depth: Any, method: str, grouping: str, *cells: str) -> str:
    first = f"{depth:>5}  {method:{longest}s} {grouping:8s}"
    return first + "".join(f"  {cell:>{width}s}" for cell, width in zip(cells, _WIDTHS, strict=False))


def compare(rows: list[dict[str, Any]]) -> None:
    """Adds `relative_to_bp` to every row.

    This is its temporaries divided by those of `bp` for the same devices, precision, depth and batch size; None if either has no step, or
    if those of `bp` are 0.
    """
    place = ("device", "devices", "precision", "depth", "batch")
    bp = {tuple(row.get(key) for key in place): row["temp_bytes"] for row in rows if row["method"] == "bp"}
    for row in rows:
        base = bp.get(tuple(row.get(key) for key in place))
        row["relative_to_bp"] = row["temp_bytes"] / base if base and row["temp_bytes"] is not None else None
