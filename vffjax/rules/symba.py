"""symba: a symmetric loss of positive and negative goodness (Lee and Song, 2023, arXiv:2303.08418).

`log(1 + exp(-alpha (G_positive - G_negative)))`, the mean over pairs of an image with its right label and the same image with a wrong one.
It needs no threshold, and pushes both ways equally.

We differ in how a label is told: it stands in the first pixels, as under rule ff, where the paper joins a fixed random pattern of the class
to the input. Our reading: the goodness is the mean squared activity, over positions too, so that `alpha` does not depend on the width.
"""

import dataclasses

import jax
import jax.numpy as jnp

from vffjax.hyperparameters import Scalar
from vffjax.keys import key
from vffjax.rules import ff
from vffjax.rules.local import Metrics, Seen


@dataclasses.dataclass(frozen=True)
class Options:
    """The rule's own keys."""

    alpha: float = key(4.0, "scale of the difference of goodness, as in the paper", low=1e-3, high=1e3)


def loss(seen: Seen) -> tuple[Scalar, Metrics]:
    """The symmetric loss. Its own metric is the mean difference of positive and negative goodness."""
    half = seen.made.labels.shape[0]
    difference = ff.goodness(seen.made.copies[:half]) - ff.goodness(seen.made.copies[half:])
    return jnp.mean(jax.nn.softplus(-seen.options.alpha * difference)), {"goodness_difference": jnp.mean(difference)}


RULE = dataclasses.replace(ff.RULE, loss=loss, options=Options)
