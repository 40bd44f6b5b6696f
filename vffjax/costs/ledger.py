"""The memory ledger on paper: which training steps are compared, at which depths and batches, and the table of what they take.

`memory.py` compiles the steps.
"""

import dataclasses
from typing import Any

from vffjax import rules
from vffjax.config import Config
from vffjax.data import sizes_of
from vffjax.data.load import split_sizes
from vffjax.errors import UserError
from vffjax.networks import find
from vffjax.registry import NETWORKS
from vffjax.training.checks import check_against_data, make_config
from vffjax.training.plan import groups_of, make_plan

TARGETS = ("here", "cpu", "tpu")
MICRO_BATCHES = 4
ACCUMULATED = "bp accumulated"

_BP = rules.BACK_PROPAGATION | {"schedule": "joint", "rematerialise": False}


def methods(rule: str) -> dict[str, dict[str, Any]]:
    """What is compared: back-propagation's ways, and the two schedules of a local rule; by name, what each changes in a configuration."""
    own = {f"{rule} {schedule}": {"rule": rule, "schedule": schedule} for schedule in ("joint", "sequential")}
    return {"bp": _BP, "bp checkpointed": _BP | {"rematerialise": True}, ACCUMULATED: _BP} | own


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the ledger before it is compiled: a method of `methods`, and the configuration that it trains by."""

    method: str
    config: Config

    def __str__(self) -> str:
        return f"{self.method}, depth {self.depth}, batch {self.config.batch_size}"

    @property
    def depth(self) -> int:
        """Layers, of which a residual block is one."""
        return sum(len(group.module.layers) for group in groups_of(self.config, 2))

    @property
    def about(self) -> dict[str, Any]:
        """What the row says of itself."""
        c = self.config
        named = {"depth": self.depth, "batch": c.batch_size, "method": self.method, "grouping": c.grouping}
        return named | {"network": c.network, "precision": c.precision, **_size(c)}


def cases(config: Config, depths: list[int], batches: list[int]) -> list[Case]:
    """Every batch with every depth and method, those of `config.rule` beside back-propagation's. No `depths`: the configuration's own
    network as it stands; no `batches`: its own.

    A network of given depth has that many layers of the configuration's first width, without pooling, and for the local rule each layer
    is its own group. Overrides and frozen groups name groups, which methods do not share, and are dropped. Raises `UserError` for a batch
    that does not fit.
    """
    if depths and find(config).deepened is None:
        able = ", ".join(name for name in NETWORKS.names if NETWORKS.find(name).deepened)
        raise UserError(f"--depths: {config.network} has its own depth; leave it out, or set config.network to one of {able}")
    networks = [deepened(config, depth) for depth in depths] or [config]
    found = []
    for batch in batches or [config.batch_size]:
        _check_batch(config, batch, f"--batches={batch}" if batches else f"config.batch_size={batch}")
        for network in networks:
            common = network.to_dict() | {
                "batch_size": batch,
                "overrides": {},
                "frozen_groups": 0,
                "inference": "heads",
                "feature_cache": "none",
            }
            found += [Case(method, make_config(common | changes)) for method, changes in methods(config.rule).items()]
    sizes = sizes_of(config)
    images = split_sizes(config, sizes.train_images)[0]
    for case in found:
        check_against_data(make_plan(case.config, images, sizes.classes), images, sizes.image_shape)
    return found


def deepened(config: Config, depth: int) -> Config:
    """The configuration's kind of network with `depth` layers of its first width, no pooling, each layer a group."""
    changes = find(config).deepened
    assert changes is not None  # `cases` has asked
    return dataclasses.replace(config, **{**changes(config, depth), "grouping": "layer"})


def _size(config: Config) -> dict[str, Any]:
    """The keys that say how wide the network is, as JSON has them."""
    wide = {key: getattr(config, key) for key in ("widths", "width_factor") if key in find(config).keys}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in wide.items()}


def network_of(config: Config, depths: list[int]) -> dict[str, Any]:
    """Which network the rows are of: `own`, whether it is the configuration's, and `measured`, in words."""
    wide = [f"{key} {' '.join(map(str, value)) if isinstance(value, list) else f'{value:g}'}" for key, value in _size(config).items()]
    mine = ", ".join([config.network, *wide, f"grouping {config.grouping}"])
    if not depths:
        left_out = [f"config.{key}" for key in ("overrides", "frozen_groups") if getattr(config, key)]
        return {"own": not left_out, "measured": mine + (f", without {' and '.join(left_out)}" if left_out else "")}
    deep = deepened(config, depths[0])
    layers = f"{deep.network} with {', '.join(map(str, depths))} layers of width {deep.widths[0]}, without pooling, each layer a group"
    return {"own": False, "measured": f"{layers}; not the configuration's own network ({mine})"}


def _check_batch(config: Config, batch: int, shown: str) -> None:
    images = split_sizes(config, sizes_of(config).train_images)[0]
    if batch > images:
        raise UserError(f"{shown}: larger than the {images} training images; use at most {images}")
    if batch % MICRO_BATCHES:
        near = batch + MICRO_BATCHES - batch % MICRO_BATCHES
        raise UserError(f"{shown}: not a multiple of {MICRO_BATCHES}, the micro-batches of {ACCUMULATED}; use for example {near}")


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in MB (10^6 bytes), under a title for each device and batch; `relative to bp` compares temporaries."""
    lines: list[str] = []
    title = ""
    for row in rows:
        wanted = f"{row['device']}, {row['precision']}, batch {row['batch']}: MB of one training step that takes over its states"
        if wanted != title:
            title = wanted
            lines += [""] * bool(lines) + [title, _line("depth", "method", "grouping", *_COLUMNS, "in all", "relative to bp")]
        if row["problem"]:
            lines.append(_line(row["depth"], row["method"], row["grouping"]) + f"  {row['problem']}")
            continue
        numbers = [f"{row[key] / 1e6:,.2f}" for key in (*_COLUMNS.values(), "total_bytes")]
        line = _line(row["depth"], row["method"], row["grouping"], *numbers, _ratio(row))
        line += "  bp takes less" if (row["relative_to_bp"] or 0) > 1 else ""
        peak = row.get("measured_peak_bytes")
        lines.append(line + (f"  measured peak {peak / 1e6:,.2f}" if peak else ""))
    return "\n".join(lines)


_COLUMNS = {"arguments": "argument_bytes", "outputs": "output_bytes", "aliased": "alias_bytes", "temporaries": "temp_bytes"}


def _line(depth: Any, method: str, grouping: str, *cells: str) -> str:
    return (
        f"{depth:>5}  {method:15s} {grouping:8s}"
        + "".join(f"  {cell:>11s}" for cell in cells[:-1])
        + "".join(f"  {cell:>14s}" for cell in cells[-1:])
    )


def _ratio(row: dict[str, Any]) -> str:
    if row["relative_to_bp"] is None:
        return "-"
    return f"{row['relative_to_bp']:.2f}"


def compare(rows: list[dict[str, Any]]) -> None:
    """Adds `relative_to_bp` to every row: its temporaries over those of bp on the same device, depth and batch; None where one failed."""
    place = ("device", "precision", "depth", "batch")
    bp = {tuple(row[key] for key in place): row["temp_bytes"] for row in rows if row["method"] == "bp"}
    for row in rows:
        base = bp.get(tuple(row[key] for key in place))
        row["relative_to_bp"] = row["temp_bytes"] / base if base and row["temp_bytes"] is not None else None
