"""Local rules, one module each. `config.rule` is the module's name, or `my_module:RULE` of a file beside the configuration."""

from typing import Any

from vffjax.config import Config
from vffjax.registry import RULES
from vffjax.rules.local import Rule

# One group that learns from its head alone.
BACK_PROPAGATION: dict[str, Any] = {"rule": "head", "rule_options": {}, "grouping": "all"}


def find(config: Config) -> Rule:
    """The rule of a configuration. Raises `UserError` if it is not known, or is code from outside that may not be run or is no rule."""
    return RULES.find(config.rule, Rule)


def norm_of(config: Config) -> str:
    """The normalisation of a configuration's layers, `auto` resolved by its rule."""
    return find(config).norm if config.norm == "auto" else config.norm
