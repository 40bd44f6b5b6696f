"""How repeated timings vary: their median and range. Over seeds figures vary as `vffjax.many.tables.Spread` says."""

import statistics
from typing import Any


def median_and_range(name: str, values: list[float]) -> dict[str, Any]:
    """The median of the values as `NAME`, and the least and the greatest as `NAME_range`. Both are None if there is no value."""
    if not values:
        return {name: None, f"{name}_range": None}
    return {name: statistics.median(values), f"{name}_range": [min(values), max(values)]}
