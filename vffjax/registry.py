"""Rules, networks and data sources by their names in a configuration. Each is a record in a module of its own.

The record of the rule `symba` is `RULE` in `vffjax/rules/symba.py`: the name in the configuration is the module's name. Names are known
without importing anything. A name with a colon, such as `my_module:RULE`, is code from outside of this package: see `outside`.

A module may also make a record for any name behind a colon: `tfds:svhn_cropped` is what the function `FAMILY` of `vffjax/data/tfds.py`
returns for svhn_cropped. Such a prefix never means code from outside.
"""

import functools
import importlib
import importlib.resources
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from vffjax import outside
from vffjax.errors import bad_key
from vffjax.keys import unknown


class Room(NamedTuple):
    """A package in which modules hold a record each."""

    key: str  # of the configuration, such as rule
    package: str
    record: str  # the record's name in its module, such as RULE
    family: str = "FAMILY"  # the name, in its module, of a function that makes records

    @property
    def names(self) -> tuple[str, ...]:
        """Every record of the package by its name in a configuration, in alphabetical order."""
        return _names(self.package, self.record)

    @property
    def families(self) -> tuple[str, ...]:
        """The prefixes, without the colon, of names for which a module of the package makes the record."""
        return _names(self.package, f"def {self.family}")

    def is_outside(self, name: str) -> bool:
        """Whether a name means code from outside of this package."""
        return outside.is_outside(name) and name.partition(":")[0] not in self.families

    def check(self, name: str) -> None:
        """Raises `UserError` if nothing has this name. Imports nothing."""
        family, colon, rest = name.partition(":")
        if not colon and name not in self.names:
            raise unknown(self.key, name, (*self.names, *(f"{family}:NAME" for family in self.families)))
        if family in self.families and not rest:
            raise bad_key(self.key, name, "no name behind the colon", f"give one: {family}:NAME")

    def find(self, name: str, kind: type = object) -> Any:
        """The record of this name, of this kind.

        Raises `UserError` if there is none, or if it is code from outside that nobody allowed, that fails, or that is of another kind.
        """
        self.check(name)
        if self.is_outside(name):
            return outside.load(self.key, name, kind)
        family, colon, rest = name.partition(":")
        if colon:
            return getattr(importlib.import_module(f"{self.package}.{family}"), self.family)(rest)
        return getattr(importlib.import_module(f"{self.package}.{name}"), self.record)


@functools.cache
def _names(package: str, holds: str) -> tuple[str, ...]:
    """The modules of a package whose source has a line that begins with the words `holds`, in alphabetical order."""
    root, *inner = package.split(".")  # the files of the inner package itself would import it, and with it JAX
    modules = [file for file in importlib.resources.files(root).joinpath(*inner).iterdir() if file.name.endswith(".py")]
    line = re.compile(rf"^{holds}\b", re.MULTILINE)
    return tuple(sorted(file.name.removesuffix(".py") for file in modules if line.search(file.read_text(encoding="utf-8"))))


RULES = Room("rule", "vffjax.rules", "RULE")
NETWORKS = Room("network", "vffjax.networks", "NETWORK")
SOURCES = Room("dataset", "vffjax.data", "SOURCE")
ROOMS = (RULES, NETWORKS, SOURCES)


def outside_names(values: Mapping[str, str]) -> dict[str, str]:
    """Of the values of configuration keys, such as {"rule": "my_module:RULE"}, those that mean code from outside of this package."""
    return {room.key: values[room.key] for room in ROOMS if room.is_outside(values[room.key])}
