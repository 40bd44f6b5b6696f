"""How measured figures vary: over seeds as mean and sample standard deviation, over repeated timings as median and range."""

import statistics
from collections.abc import Iterable
from typing import Any, NamedTuple


class Spread(NamedTuple):
    """The mean of a figure over seeds, its sample standard deviation (None for one seed), and the number of seeds.

    >>> f"{Spread.of([28.0, 29.0, 30.0]):.1f}", f"{Spread.of([1234.6]):,.0f}"
    ('29.0 ± 1.0', '1,235')
    """

    mean: float
    sd: float | None
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """The spread of at least one value."""
        values = [float(value) for value in values]
        return cls(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))

    def __format__(self, spec: str) -> str:
        return f"{self.mean:{spec}}" + ("" if self.sd is None else f" ± {self.sd:{spec}}")


def median_and_range(name: str, values: list[float]) -> dict[str, Any]:
    """The median of the values as `NAME`, and the least and the greatest as `NAME_range`. Both are None if there is no value."""
    if not values:
        return {name: None, f"{name}_range": None}
    return {name: statistics.median(values), f"{name}_range": [min(values), max(values)]}
