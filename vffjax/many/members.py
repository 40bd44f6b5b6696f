"""The runs of a sweep: every combination of the values that vary, with every seed."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from vffjax.config import Config
from vffjax.files import sha256
from vffjax.many.tables import named

_LONGEST = 120  # characters of a folder's name; file systems take 255 bytes


class Member(NamedTuple):
    """One run of a sweep."""

    values: dict[str, Any]  # of the keys that vary
    config: Config

    @property
    def name(self) -> str:
        """The name of its folder. It holds no character that a path to checkpoints must not have."""
        whole = named(self.values | {"seed": self.config.seed}, ",")
        name = re.sub(r"[^A-Za-z0-9.=,+_-]+", "_", whole)
        return name if name == whole and len(name) <= _LONGEST else f"{name[:_LONGEST]}-{sha256(whole.encode())[:8]}"


def value_at(config: Config, path: str) -> Any:
    """The value of a key, or of an entry of a key that is a dictionary: `overrides.group1.learning_rate`."""
    key, *deeper = path.split(".")
    found = getattr(config, key)
    for name in deeper:
        found = found[name]
    return found


def members(rows: Sequence[Config], paths: Sequence[str], seeds: Sequence[int]) -> list[Member]:
    """The runs of every row with every seed.

    Args:
        rows: the configurations, which differ at `paths`. Two that are equal there are taken once: 1e-3 and 0.001 are one value.
        paths: the keys that vary, or entries of keys.
        seeds: of the runs.
    """
    found = [Member({path: value_at(row, path) for path in paths}, dataclasses.replace(row, seed=seed)) for row in rows for seed in seeds]
    return list({member.name: member for member in found}.values())
