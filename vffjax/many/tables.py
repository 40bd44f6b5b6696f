"""Figures over seeds, and tables of them."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
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


def named(values: Mapping[str, Any], between: str = ", ") -> str:
    """Keys with their values in words; "as configured" if there are none.

    >>> named({"rule": "vff", "margin": 0.5})
    'rule=vff, margin=0.5'
    """
    return between.join(f"{key}={value}" for key, value in values.items()) or "as configured"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    """A Markdown table whose columns are aligned, so that it reads well on a terminal too.

    >>> print(markdown(["rule", "error %"], [["vff", "2.1"], ["head", "12.0"]]))
    | rule | error % |
    |------|--------:|
    | vff  |     2.1 |
    | head |    12.0 |

    Args:
        head: the heading of each column.
        rows: the cells of each row.
        text_columns: how many columns from the left are text; the others are numbers, and end at the right.
    """
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

    def line(row: Sequence[str]) -> str:
        shown = [f"{cell:{'<' if i < text_columns else '>'}{width}}" for i, (cell, width) in enumerate(zip(row, widths, strict=True))]
        return f"| {' | '.join(shown)} |"

    rule = [("-" * (width + 2)) if i < text_columns else ("-" * (width + 1) + ":") for i, width in enumerate(widths)]
    return "\n".join([line(cells[0]), f"|{'|'.join(rule)}|", *map(line, cells[1:])])
