"""Rules, networks and data sources by their names in a configuration. Each is a record in a module of its own.

The record of the rule `symba` is `RULE` in `vffjax/rules/symba.py`: the name in the configuration is the module's name. Names are known
without importing anything. A name with a colon, such as `my_module:RULE`, is code from outside of this package: see `outside`.
"""

import functools
import importlib
import importlib.resources
import re
from typing import Any, NamedTuple

from vffjax import outside
from vffjax.keys import unknown


class Room(NamedTuple):
    """A package in which modules hold a record each."""

    key: str  # of the configuration, such as rule
    package: str
    record: str  # the record's name in its module, such as RULE

    @property
    def names(self) -> tuple[str, ...]:
        """Every record of the package by its name in a configuration, in alphabetical order."""
        return _names(self)

    def check(self, name: str) -> None:
        """Raises `UserError` if nothing has this name. Imports nothing."""
        if not outside.is_outside(name) and name not in self.names:
            raise unknown(self.key, name, self.names)

    def find(self, name: str, kind: type = object) -> Any:
        """The record of this name, of this kind.

        Raises `UserError` if there is none, or if it is code from outside that nobody allowed, that fails, or that is of another kind.
        """
        self.check(name)
        if outside.is_outside(name):
            return outside.load(self.key, name, kind)
        return getattr(importlib.import_module(f"{self.package}.{name}"), self.record)


@functools.cache
def _names(room: Room) -> tuple[str, ...]:
    root, *inner = room.package.split(".")  # the files of the inner package itself would import it, and with it JAX
    modules = [file for file in importlib.resources.files(root).joinpath(*inner).iterdir() if file.name.endswith(".py")]
    holds = re.compile(rf"^{room.record}\b", re.MULTILINE)
    return tuple(sorted(file.name.removesuffix(".py") for file in modules if holds.search(file.read_text(encoding="utf-8"))))


RULES = Room("rule", "vffjax.rules", "RULE")
NETWORKS = Room("network", "vffjax.networks", "NETWORK")
SOURCES = Room("dataset", "vffjax.data", "SOURCE")
ROOMS = (RULES, NETWORKS, SOURCES)
