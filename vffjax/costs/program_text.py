"""Reads the text of a compiled program: what it launches, convolves, copies and sorts, and what its devices tell each other.

The text is what `jax.stages.Compiled.as_text()` returns: XLA's HLO after all optimisations, in the order in which the device works.
"""

import collections
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](?:\{([\d,]*)[^}]*\})?")
_COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)
_BORDERS = ("while", "conditional", "call")  # these only choose what runs next
# The device does nothing for these: they name memory, or wait for something that has been launched.
_FREE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "partition-id", "replica-id"),
    *("add-dependency", "domain", "get-dimension-size"),
)
_HOST = ("infeed", "outfeed", "send", "recv")
_BITS = {"pred": 8, "token": 0, "opaque": 0}


class Operation(NamedTuple):
    """One operation of a program.

    Attributes:
        name: its name, which is unique within its computation.
        opcode: what it does, such as `fusion` or `custom-call`.
        result: the type of its result as text, such as `bf16[8,32]{1,0}`, or a tuple of such types.
        operands: the names of its operands.
        attributes: the rest of the line.
    """

    name: str
    opcode: str
    result: str
    operands: tuple[str, ...]
    attributes: str

    @property
    def bytes(self) -> int:
        """The size of the result. Padding by the layout is not counted."""
        return sum(size for _, size, _ in _arrays(self.result))

    @property
    def target(self) -> str:
        """The library function of a custom call; else an empty text."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def kind(self) -> str:
        """What the operation is to the device: kernel, library call, copy, collective, border or free; see `Program.launches`."""
        base = re.sub(r"-start$", "", self.opcode)
        if self.opcode in _BORDERS:
            return "border"
        if self.opcode in _FREE or self.opcode.endswith(("-done", "-update")):
            return "free"
        if base in _COLLECTIVES:
            return "collective"
        return {"copy": "copy", "custom-call": "library call"}.get(base, "kernel")


class Program:
    """A compiled program.

    Args:
        text: of the program, as `as_text` returns it.
        entry: the name of the computation to begin with; empty: the program's own.

    Raises:
        ValueError: the text holds no such computation.
    """

    def __init__(self, text: str, entry: str = ""):
        self.text = text
        self.computations: dict[str, list[Operation]] = {}
        operations: list[Operation] | None = None
        for line in text.splitlines():
            if found := _COMPUTATION.match(line):
                operations = self.computations.setdefault(found[2], [])
                entry = entry or (found[2] if found[1] else "")
            elif operations is not None and (found := _OPERATION.match(line)):
                operations.append(_operation(found[1], found[2]))
        if entry not in self.computations:
            raise ValueError(f"the program has no computation {entry!r}")
        self.entry = entry

    def ran(self, *, inside_fusions: bool = False) -> Iterator[tuple[Operation, int, list[Operation]]]:
        """The operations of a run in order, as the compiler has scheduled them.

        The operations of a loop come once, with the number of its rounds, or 1 if the compiler does not know the number. All branches of a
        condition come, although one of them runs.

        Args:
            inside_fusions: also the operations that the compiler has merged into one kernel, and not only the kernel.

        Yields:
            The operation, how often it runs, and the operations of its computation.
        """
        yield from self._ran(self.entry, 1, inside_fusions)

    def _ran(self, name: str, times: int, inside_fusions: bool) -> Iterator[tuple[Operation, int, list[Operation]]]:
        operations = self.computations[name]
        for operation in operations:
            yield operation, times, operations
            called = _called(operation)
            if operation.opcode == "while":
                rounds = re.search(r'"known_trip_count":\{"n":"(\d+)"', operation.attributes)
                times_within = times * (int(rounds[1]) if rounds else 1)
                yield from self._ran(called["body"][0], times_within, inside_fusions)
            elif operation.opcode in _BORDERS:
                for branch in (*called["to_apply"], *called["branches"]):
                    yield from self._ran(branch, times, inside_fusions)
            elif inside_fusions and operation.opcode in ("fusion", "async-start", "call-start"):
                for fused in called["calls"]:
                    yield from self._ran(fused, times, inside_fusions)

    def loops(self) -> list[tuple[str, int | None]]:
        """The loops of the program's own order, which are in no other loop: the computation of each, and its rounds if they are known."""
        return self._loops(self.entry)

    def _loops(self, name: str) -> list[tuple[str, int | None]]:
        found: list[tuple[str, int | None]] = []
        for operation in self.computations[name]:
            called = _called(operation)
            if operation.opcode == "while":
                rounds = re.search(r'"known_trip_count":\{"n":"(\d+)"', operation.attributes)
                found.append((called["body"][0], int(rounds[1]) if rounds else None))
            elif operation.opcode in _BORDERS:
                found += [loop for branch in (*called["to_apply"], *called["branches"]) for loop in self._loops(branch)]
        return found

    def round(self) -> "Program":
        """One round of the largest loop, as a program. For the program of a segment this is one training step.

        Raises:
            ValueError: the program has no loop.
        """
        if not self.loops():
            raise ValueError("the program has no loop")
        return Program(self.text, max((body for body, _ in self.loops()), key=lambda body: len(self.computations[body])))

    def launches(self) -> dict[str, int]:
        """How often the device is told to do something: kernels, library calls, copies, collectives, and their sum `all`.

        Counted are the operations of the program's own order: of its entry, of each branch, and of each loop as often as it runs. A fusion
        is one kernel. A library call (cuDNN, cuBLAS) is one launch, though a library may start several kernels for it; a copy is one copy
        in device memory. Operations that name memory, wait or choose what runs next are not counted.
        """
        found = collections.Counter[str]()
        for operation, times, _ in self.ran():
            if operation.kind not in ("border", "free"):
                found[operation.kind] += times
        kinds = {"kernels": "kernel", "library_calls": "library call", "copies": "copy", "collectives": "collective"}
        counts = {name: found[kind] for name, kind in kinds.items()}
        return counts | {"all": sum(counts.values())}

    def convolutions(self) -> dict[str, int]:
        """The convolutions by type and layout, such as `bf16 b01f_o01i->b01f {3,2,1,0}`, and how many there are of each.

        The type is that of the operands. The letters name the dimensions of input, kernel and output: `b` the batch, `f` and `i` the
        channels that are read, `o` those that are written, digits the positions. So `b01f` is NHWC, and `bf01` NCHW. The numbers are the
        layout of the result in memory, the fastest dimension first. Products of matrices, which a TPU also calls convolutions, are left
        out: they have no positions.
        """
        found = collections.Counter[str]()
        for operation, times, around in self.ran(inside_fusions=True):
            labels = re.search(r"dim_labels=([\w?]+->[\w?]+)", operation.attributes)
            if (
                not labels
                or not re.search(r"\d", labels[1])
                or not (operation.opcode == "convolution" or "__cudnn$conv" in operation.target)
            ):
                continue
            results = {other.name: other.result for other in around}
            types = sorted({_arrays(results[name])[0][0] for name in operation.operands[:2] if name in results})
            layout = _arrays(operation.result)[0][2]
            found[f"{'+'.join(types)} {labels[1]} {{{layout}}}"] += times
        return dict(sorted(found.items()))

    def collectives(self) -> dict[str, dict[str, int]]:
        """What devices tell each other: by kind and type, such as `all-reduce f32`, the number of operations and of bytes.

        Bytes are those of the results on one device. The compiler may join several sums into one operation.
        """
        found: dict[str, dict[str, int]] = {}
        for operation, times, _ in self.ran(inside_fusions=True):
            if operation.kind == "collective":
                base = re.sub(r"-start$", "", operation.opcode)
                result = operation.result
                if operation.opcode.endswith("-start") and (base != "all-reduce" or result.startswith("((")):
                    result = _parts(result)[1]  # of what is given, and what comes back
                for dtype in sorted({dtype for dtype, _, _ in _arrays(result)}):
                    entry = found.setdefault(f"{base} {dtype}", {"count": 0, "bytes": 0})
                    entry["count"] += times
                    entry["bytes"] += times * sum(size for other, size, _ in _arrays(result) if other == dtype)
        return dict(sorted(found.items()))

    def sorts(self) -> list[int]:
        """The number of entries of each sort, the largest first."""
        sorted_ = [_entries(operation.result) for operation, _, _ in self.ran(inside_fusions=True) if _is_sort(operation)]
        return sorted(sorted_, reverse=True)

    def host_calls(self) -> list[str]:
        """The operations that need the host: calls of Python, and arrays that it gives or takes while the program runs."""
        found = []
        for operation, _, _ in self.ran(inside_fusions=True):
            if operation.opcode in _HOST or re.search(r"callback|host", operation.target, re.IGNORECASE):
                found.append(operation.target or operation.opcode)
        return found

    def copied_bytes(self) -> int:
        """The bytes that the copies of a run write, in the program's own order."""
        return sum(times * _first_bytes(operation) for operation, times, _ in self.ran() if operation.kind == "copy")

    def cycles(self) -> int | None:
        """The sum of the cycles that a TPU's compiler expects for each operation of the whole text, as if none ran beside another. Those of
        a loop count once. None for other devices.
        """
        found = [int(cycles) for cycles in re.findall(r'"estimated_cycles":"(\d+)"', self.text)]
        return sum(found) if found else None

    def figures(self) -> dict[str, Any]:
        """What the methods above count in the program itself, in JSON types."""
        return {
            "launches": self.launches(),
            "convolutions": self.convolutions(),
            "copied_bytes": self.copied_bytes(),
            "collectives": self.collectives(),
            "sorts": self.sorts(),
            "host_calls": self.host_calls(),
        }


def _operation(name: str, rest: str) -> Operation:
    end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    result, call = rest[:end], rest[end:].lstrip()
    opcode, _, _ = call.partition("(")
    close = _closing(call, len(opcode))
    operands = tuple(re.findall(r"%([\w.\-]+)", call[len(opcode) : close]))
    return Operation(name, opcode, result, operands, call[close + 1 :])


def _closing(text: str, start: int = 0) -> int:
    """The position of the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    return len(text)


def _parts(result: str) -> list[str]:
    """The types of which a tuple consists."""
    parts, depth, begin = [], 0, 1
    for i, character in enumerate(result):
        depth += (character in "({[") - (character in ")}]")
        if (depth == 1 and character == ",") or (depth == 0 and i == len(result) - 1):
            parts.append(result[begin:i])
            begin = i + 1
    return parts


def _called(operation: Operation) -> dict[str, list[str]]:
    """The computations that an operation calls, by the attribute that names them."""
    text = operation.attributes
    found = {key: re.findall(rf"\b{key}=%?([\w.\-]+)", text) for key in ("body", "to_apply", "calls")}
    branches = re.findall(r"\b(?:true|false)_computation=%?([\w.\-]+)", text)
    if listed := re.search(r"branch_computations=\{([^}]*)\}", text):
        branches += re.findall(r"%?([\w.\-]+)", listed[1])
    return found | {"branches": branches}


def _arrays(result: str) -> list[tuple[str, int, str]]:
    """The arrays of a type: dtype, bytes, and the order of the dimensions in memory."""
    found = []
    for dtype, sides, layout in _ARRAY.findall(result):
        bits = _BITS.get(dtype)
        if bits is None:
            number = re.search(r"\d+", dtype)
            bits = int(number[0]) if number else 0
        found.append((dtype, math.prod(int(side) for side in sides.split(",") if side) * bits // 8, layout))
    return found


def _entries(result: str) -> int:
    sides = _ARRAY.findall(result)[0][1]
    return math.prod(int(side) for side in sides.split(",") if side)


def _is_sort(operation: Operation) -> bool:
    return operation.opcode == "sort" or bool(re.search(r"sort|topk", operation.target, re.IGNORECASE))


def _first_bytes(operation: Operation) -> int:
    return _arrays(operation.result)[0][1]
