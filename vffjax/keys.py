"""How a configuration key is declared, and how a value that a person gave becomes one of its type and range."""

import dataclasses
import difflib
import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from vffjax.errors import UserError, bad_key, printable


def key(
    default: Any, doc: str, choices: tuple[str, ...] = (), low: float | None = None, high: float | None = None, section: str = ""
) -> Any:
    """A field of a dataclass that is a configuration key.

    Args:
        default: its value where nobody sets it. Values of the key have the default's type: bool, int, float, str, tuple or dict.
        doc: what it means, with its unit; `--help` prints it.
        choices: the words that it takes; empty: any.
        low, high: the least and the largest number that it takes.
        section: the heading under which `--help` lists it and those after it; empty: that of the key before.
    """
    about = {"doc": doc, "choices": choices, "low": low, "high": high, "section": section}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=dict, metadata=about)
    return dataclasses.field(default=default, metadata=about)


def fields_of(kind: type) -> dict[str, dataclasses.Field[Any]]:
    """The keys that a dataclass declares, by name."""
    return {field.name: field for field in dataclasses.fields(kind)}


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The value of a key that nobody sets."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def value_of(field: dataclasses.Field[Any], value: Any, shown: str) -> Any:
    """A value as the key takes it: a list as a tuple, a whole number as a float.

    Raises `UserError` that calls the key `shown`, if the value has another type, or is none of the choices, or is out of range.
    """
    value = _converted(value, default_of(field), shown)
    choices = field.metadata["choices"]
    if choices and value not in choices:
        raise unknown(shown, value, choices)
    if isinstance(value, str) and any(unicodedata.category(c) == "Cc" for c in value):
        raise bad_key(shown, value, "holds a control character", "remove it; a path with one has to be renamed")
    if isinstance(value, float) and not math.isfinite(value):
        raise bad_key(shown, value, "not a finite number", "give a finite number")
    if field.metadata["low"] is not None and value < field.metadata["low"]:
        raise bad_key(shown, value, "too small", f"the least is {field.metadata['low']}")
    if field.metadata["high"] is not None and value > field.metadata["high"]:
        raise bad_key(shown, value, "too large", f"the most is {field.metadata['high']}")
    return value


def unknown(shown: str, value: str, choices: Sequence[str]) -> UserError:
    """The error for a word that is none of the choices."""
    near = difflib.get_close_matches(value, choices, n=1)
    return bad_key(shown, value, "not known", f"{f'did you mean {near[0]!r}? ' if near else ''}choose one of {', '.join(choices)}")


def _converted(value: Any, default: Any, shown: str) -> Any:
    kind = type(default)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        if abs(value) > 10**300:  # float() would raise
            raise bad_key(shown, value, "too large", "give a number of common size")
        value = float(value)
    if kind is tuple:
        numbers = isinstance(value, (list, tuple)) and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
        if numbers and (value or not default):
            return tuple(value)
        raise bad_key(shown, value, "not a tuple of whole numbers", f"give for example --config.{shown}='{default or (64,)}'")
    if (kind is int and isinstance(value, bool)) or not isinstance(value, Mapping if kind is dict else kind):
        raise bad_key(shown, value, f"has type {type(value).__name__}", f"give a value of type {type(default).__name__}")
    return value


def options(kind: type, given: Mapping[str, Any], shown: str) -> Any:
    """The dataclass `kind` with the values that were given.

    Raises `UserError` for a key that it does not declare, or a value that does not fit, or if its fields are not declared by `key`; `shown`
    is the name under which they were given.
    """
    if not dataclasses.is_dataclass(kind) or not all("doc" in field.metadata for field in dataclasses.fields(kind)):
        raise bad_key(shown, dict(given), f"{kind!r} is no dataclass of fields that vffjax.keys.key declares", "make it one")
    known = fields_of(kind)
    for name, value in given.items():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            fix = f"did you mean config.{shown}.{near[0]}?" if near else f"known here: {', '.join(known) or 'none'}"
            raise bad_key(f"{shown}.{printable(str(name), 100)}", value, "no such key", fix)
    return kind(**{name: value_of(known[name], value, f"{shown}.{name}") for name, value in given.items()})
