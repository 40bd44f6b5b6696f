"""vff_projected: VFF whose contrast reads a learnt linear projection of the features, the same for clean images and copies.

A group learns from CSCL of `z = W f` of length 1 in the place of the features `f`, with the labelled copies and keys of `vff` and the
projection of `supcon`, and from a share of the head's loss. `W` learns from CSCL alone. The group may so keep in `f` what CSCL would throw
away. Work on contrastive forward-forward learning (HCL-FF, CVPR 2026) found that a linear projection adds most to a contrast among clean
images; whether it does so for CSCL is the question of this rule.

A feature map is mean-pooled to a few cells before the projection, so `config.similarity` means nothing here. With the option `channels` the
contrast stands behind a 3x3 convolution and ReLU too (a dense map and ReLU, where features have no positions), which the rule owns: it is
to CSCL what the convolutions of `config.auxiliary` are to the head.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from vffjax.config import Config
from vffjax.hyperparameters import Scalar
from vffjax.keys import key
from vffjax.ops.conv import conv
from vffjax.rules import supcon, vff
from vffjax.rules.local import Metrics, Seen
from vffjax.rules.similarity import dot, unit


@dataclasses.dataclass(frozen=True)
class Options(supcon.Options):
    """The keys of `supcon`, and the width of a convolution before the projection."""

    channels: int = key(0, "of a convolution and ReLU between the features and the projection; 0: none", low=0, high=65_536)


def parameters(options: Options, shape: tuple[int, ...], classes: int, key: PRNGKeyArray) -> dict[str, Array]:
    """The projection, and the kernel of the convolution if there is one. It starts as He et al. (2015) start kernels before ReLU."""
    if not options.channels:
        return supcon.parameters(options, shape, classes, key)
    size = (3, 3, shape[-1], options.channels) if len(shape) == 3 else (shape[-1], options.channels)
    before = jax.nn.initializers.he_normal()(jax.random.fold_in(key, 0), size, jnp.float32)
    return {"before": before} | supcon.parameters(options, (*shape[:-1], options.channels), classes, jax.random.fold_in(key, 1))


def vectors(options: Options, features: Float[Array, "rows *feature"], params: dict[str, Array]) -> Float[Array, "rows d"]:
    """The vectors whose cosines CSCL compares; of zero features they are zero."""
    z = features.astype(jnp.float32)
    if options.channels:
        z = jax.nn.relu((conv if z.ndim == 4 else dot)(z, params["before"]))
    return supcon.projected(options, z, params)


def loss(seen: Seen) -> tuple[Scalar, Metrics]:
    """CSCL of the projected features. It has no metrics of its own."""
    return vff.contrast(seen, vectors(seen.options, seen.made.rows, seen.params)), {}


def _fits(config: Config, clean: Array, told: Array, params: Any) -> Float[Array, " batch"]:
    options = Options(**config.rule_options)
    return jnp.sum(unit(vectors(options, clean, params)) * unit(vectors(options, told, params)), axis=1)


def _cells(config: Config) -> int | None:
    options = Options(**config.rule_options)
    return None if options.channels else options.cells


RULE = dataclasses.replace(vff.RULE, loss=loss, cells=_cells, parameters=parameters, owns_copies=True, options=Options, fits=_fits)
