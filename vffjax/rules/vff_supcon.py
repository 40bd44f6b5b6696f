"""vff_supcon: VFF with a supervised contrast among the clean images beside CSCL.

A group learns from `CSCL + w supcon`, with the labelled copies and keys of `vff` and the projection of `supcon`, and from a share of the
head's loss. Compared with `vff`, `supcon` and `head` it shows what either contrast adds to the other.
"""

import dataclasses

import jax.numpy as jnp

from vffjax.config import Config
from vffjax.hyperparameters import Scalar
from vffjax.keys import key
from vffjax.rules import supcon, vff
from vffjax.rules.local import Metrics, Seen


@dataclasses.dataclass(frozen=True)
class Options(supcon.Options):
    """The keys of `supcon`, and the weight of its contrast."""

    weight: float = key(1.0, "of the contrast among clean images, beside CSCL's 1", low=0.0, high=1e6)


def loss(seen: Seen) -> tuple[Scalar, Metrics]:
    """Both contrasts. The metrics `cscl` and `supcon` are each without a weight."""
    (labelled, _), (clean, _) = vff.loss(seen), supcon.loss(seen)
    return labelled + seen.options.weight * clean, {"cscl": jnp.asarray(labelled), "supcon": jnp.asarray(clean)}


def _cells(config: Config) -> int | None:
    """The grid that both contrasts pool to by themselves, if it is the same."""
    own = Options(**config.rule_options).cells
    return own if vff.RULE.cells(config) == own else None


RULE = dataclasses.replace(vff.RULE, loss=loss, cells=_cells, parameters=supcon.parameters, options=Options)
