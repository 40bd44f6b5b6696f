"""Lists the rules, networks and data sets that a configuration can name, and the options of each rule (config.rule_options).

A rule, network or source of your own is named MODULE:NAME; see docs/extending.md.
"""

import importlib
from typing import Any

from vffjax import backend
from vffjax.cli.options import beside, give, parser_of
from vffjax.keys import default_of, fields_of
from vffjax.registry import ROOMS, Room


def run(arguments: list[str]) -> None:
    a = parser_of("list", __doc__, "--json").parse_args(arguments)
    backend.start()  # the modules of rules and networks import JAX
    found = {room.key: [_about(room, name) for name in room.names] for room in ROOMS}
    lines = []
    for key, records in found.items():
        lines += [f"config.{key}"] + [line for about in records for line in beside(f"  {about['name']}", about["about"], 17)]
    lines.append("config.rule_options")
    for about in found["rule"]:
        for option in about["options"]:
            lines += beside(f"  {about['name']}", f"{option['key']} = {option['default']!r}: {option['doc']}", 17)
    give(a, found, "\n".join(lines))


def _about(room: Room, name: str) -> dict[str, Any]:
    """The name, the first line of the module's documentation, and the keys of a rule's own."""
    first = (importlib.import_module(f"{room.package}.{name}").__doc__ or "").partition("\n")[0]
    fields = fields_of(getattr(room.find(name), "options", object)) if room.key == "rule" else {}
    options = [{"key": key, "default": default_of(field), "doc": field.metadata["doc"]} for key, field in fields.items()]
    return {"name": name, "about": first, "options": options}
