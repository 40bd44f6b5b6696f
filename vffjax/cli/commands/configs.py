"""Lists the configurations that come with vffjax, what each trains, and the test errors that were measured with it.

Give such a name to --config, with a variant as cifar10:small. The first variant is also meant by the name alone.
"""

import re
import textwrap
from collections.abc import Collection
from typing import Any

from vffjax import backend
from vffjax.cli import packaged
from vffjax.cli.config_file import Loaded, running
from vffjax.cli.options import COLUMNS, beside, give, parser_of
from vffjax.config import Config, converted
from vffjax.errors import UserError

_LEGEND = """Test errors are means ± standard deviations over n seeds. head: by the loss of
the local heads alone. back-propagation: of the same network in the same steps."""
_KEYS = ("dataset", "train_examples", "network", "grouping", "rule", "epochs", "batch_size", "init_from")
# How a configuration file states an error in MEASURED; benchmarks/tables.py checks those that name a record.
_ERROR = re.compile(r"(?P<mean>\d+\.\d+)(?: ± (?P<sd>\d+\.\d+))? % \(n = (?P<n>\d+)(?:, (?P<source>results/[\w.-]+))?\)")


def run(arguments: list[str]) -> None:
    a = parser_of("configs", __doc__, "--json").parse_args(arguments)
    backend.start()  # networks say which keys are theirs, and import JAX
    found = [_about(name) for name in packaged.names()]
    give(a, found, "\n\n".join([*map(_text, found), _LEGEND]))


def _about(name: str) -> dict[str, Any]:
    """The first line of a file's documentation, and for each of its variants what it trains and what errors were measured."""
    with running(name) as loaded:
        variants = [_variant(loaded, variant) for variant in loaded.variants or (None,)]
        return {"name": name, "about": (loaded.module.__doc__ or "").partition("\n")[0], "file": loaded.file, "variants": variants}


def _variant(loaded: Loaded, variant: str | None) -> dict[str, Any]:
    from vffjax.networks import find

    config, measured = converted(loaded.config(variant)), getattr(loaded.module, "MEASURED", {})
    keys = find(config).keys
    name = loaded.shown if variant is None else f"{loaded.shown}:{variant}"
    errors = measured if variant is None else measured.get(variant, {})
    trains = {key: value for key, value in config.to_dict().items() if key in (*_KEYS, *keys)}
    return {
        "name": name,
        "trains": trains,
        "summary": _summary(config, keys),
        "measured": [_error(by, text) for by, text in errors.items()],
    }


def _error(by: str, text: str) -> dict[str, Any]:
    """A measured test error, in percent: its mean and standard deviation over n seeds, and the record of the ledger, if there is one."""
    if not (match := _ERROR.fullmatch(text)):
        raise UserError(f"MEASURED: {text!r} is no error; write for example '20.3 ± 0.4 % (n = 3)'")
    sd = match["sd"] and float(match["sd"])
    return {"by": by, "test_error": float(match["mean"]), "sd": sd, "n": int(match["n"]), "source": match["source"]}


def _summary(config: Config, keys: Collection[str]) -> str:
    """What a configuration trains, in words; `keys` are those that its network depends on."""
    widths = f" of {'-'.join(map(str, config.widths))}" if "widths" in keys else ""
    images = f"{config.train_examples:,} images of {config.dataset}" if config.train_examples else config.dataset
    start = f", from {config.init_from}" if config.init_from else ""
    return f"{config.network}{widths} by {config.rule}, {config.epochs} epochs of {images}{start}"


def _text(about: dict[str, Any]) -> str:
    """A file and its variants, in lines of at most `COLUMNS` characters."""
    lines = textwrap.wrap(about["about"], COLUMNS)
    for variant in about["variants"]:
        lines += [f"  {variant['name']}", *beside("", variant["summary"], 6)]
        for error in variant["measured"]:
            sd = "" if error["sd"] is None else f" ± {error['sd']}"
            lines.append(f"      test error {error['test_error']}{sd} % (n = {error['n']}) by {error['by']}")
    return "\n".join(lines)
