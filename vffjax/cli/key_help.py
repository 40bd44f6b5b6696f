"""The help of the configuration's keys, in sections, or of one key in full. Needs no JAX."""

import dataclasses
from typing import Any

from vffjax.cli.options import beside
from vffjax.config import FIELDS, key_like
from vffjax.errors import UserError, printable
from vffjax.keys import default_of
from vffjax.registry import ROOMS

_KINDS = {
    "bool": "True or False; --config.{key} alone sets it, --noconfig.{key} clears it",
    "int": "whole number",
    "float": "number",
    "str": "text",
    "tuple": "whole numbers, as --config.{key}='(64, 64)'",
    "dict": "dictionary; an entry is set by --config.{key}.NAME=VALUE",
}


def every_key() -> str:
    """Every key with its default, its choices and what it means, under the headings of their sections."""
    lines = []
    for key, field in FIELDS.items():
        if field.metadata["section"]:
            lines += ["", f"{field.metadata['section']}:"]
        lines += beside(f"  {key} = {default_of(field)!r}", " ".join([f"{field.metadata['doc']}.", *_one_of(key, field)]), 6)
    return "\n".join(lines[1:])


def every_key_as_markdown() -> str:
    """What `every_key` shows, as a table of Markdown for each section. The page docs/keys.md holds it."""
    lines = []
    for key, field in FIELDS.items():
        about = field.metadata
        if about["section"]:
            lines += ["", f"### {about['section']}", "", "| key | default | values | meaning |", "|---|---|---|---|"]
        names = _names(key) or about["choices"]
        values = ", ".join(f"`{name}`" for name in names) or _range(about["low"], about["high"])
        if isinstance(default_of(field), bool):
            values = "`True`, `False`"
        lines.append(f"| `{key}` | `{default_of(field)!r}` | {values} | {about['doc'].replace('|', chr(92) + '|')} |")
    return "\n".join(lines[1:])


def one_key(given: str) -> str:
    """One key in full: what it means, its type, default, range and choices.

    Args:
        given: the key, also as config.KEY or --config.KEY.

    Raises:
        UserError: there is no such key; it suggests the nearest.
    """
    key = given.lstrip("-").removeprefix("config.")
    if key not in FIELDS:
        near = key_like(key)
        fix = f"did you mean --help {near}?" if near else "vffjax train --help lists the keys"
        raise UserError(f"--help {printable(given, 100)}: no such key; {fix}")
    field, default = FIELDS[key], default_of(FIELDS[key])
    about = field.metadata
    rows = {
        "section": section_of(key),
        "meaning": f"{about['doc']}.",
        "type": _KINDS[type(default).__name__].format(key=key),
        "default": repr(default),
        "range": _range(about["low"], about["high"]),
        "choices": ", ".join(about["choices"]),
        "names": ", ".join(_names(key)) + "; vffjax list says what each is" if _names(key) else "",
    }
    lines = [line for name, text in rows.items() if text for line in beside(f"  {name}", text, 11)]
    return "\n".join([f"config.{key}", *lines])


def section_of(key: str) -> str:
    """The section in which a key is listed."""
    found = ""
    for name, field in FIELDS.items():
        found = field.metadata["section"] or found
        if name == key:
            break
    return found


def _one_of(key: str, field: "dataclasses.Field[Any]") -> list[str]:
    names = _names(key) or field.metadata["choices"]
    return [f"One of {', '.join(names)}."] if names else []


def _names(key: str) -> tuple[str, ...]:
    """The rules, networks or data sets that a key can name."""
    return next((room.names for room in ROOMS if room.key == key), ())


def _range(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{_number(low)} to {_number(high)}"


def _number(value: float) -> str:
    return f"{int(value):,}" if value == int(value) and value < 1e12 else f"{value:g}"
