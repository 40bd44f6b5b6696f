"""predsim: similarity matching and prediction (Nokland and Eidnes, 2019, arXiv:1901.06656).

A group's features pass a convolution (a dense map, where they have no positions) that the rule owns. How alike two images then are shall be
how alike their labels are: `mean over pairs of (S(f)_ij - S(y)_ij)^2`, where `S` is the cosine of centred vectors. The head adds
prediction: the layers learn from `(1 - weight)` of the head's cross-entropy and `weight` of the similarity matching.

Our reading, where the paper leaves it open, is that of the authors' program. The vector of a map is the standard deviation of each channel
over positions, but the flattened map where it has one row or at most three channels. The squared Frobenius norm is divided by the number
of pairs, and pairs of an image with itself count. We differ in that the head itself learns from its whole cross-entropy, so that its
gradient is `1 / (1 - weight)` times the paper's, and in that it reads the map through the grid of `config.head_grid`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from vffjax.config import Config
from vffjax.hyperparameters import HyperParameters, Scalar
from vffjax.keys import key
from vffjax.ops.conv import conv
from vffjax.rules.local import Metrics, Rule, Seen
from vffjax.rules.similarity import dot, unit

EPSILON = 1e-8  # added to a variance, whose root has no gradient at 0
FEW_CHANNELS = 3  # of which deviations tell too little: two centred numbers have a cosine of 1 or -1


@dataclasses.dataclass(frozen=True)
class Options:
    """The rule's own keys."""

    weight: float = key(0.99, "share of similarity matching in the loss; the rest is the head's", low=0.0, high=1.0)


def parameters(options: Options, shape: tuple[int, ...], classes: int, key: PRNGKeyArray) -> dict[str, Array]:
    """A 3x3 convolution of a map's channels, or a dense map of features without positions; both keep the width and have no bias."""
    size = (3, 3, shape[-1], shape[-1]) if len(shape) == 3 else (shape[-1], shape[-1])
    return {"kernel": jax.nn.initializers.he_normal()(key, size, jnp.float32)}


def vectors(mapped: Float[Array, "batch *feature"]) -> Float[Array, "batch d"]:
    """What stands for each image: the deviation of each channel over positions, or all features where these would tell too little."""
    if mapped.ndim == 4 and mapped.shape[1] > 1 and mapped.shape[3] > FEW_CHANNELS:
        return jnp.sqrt(mapped.var(axis=(1, 2)) + EPSILON)
    return mapped.reshape(mapped.shape[0], -1)


def similarities(rows: Float[Array, "batch d"]) -> Float[Array, "batch batch"]:
    """The cosine of each pair of rows, each row centred at its own mean."""
    centred = unit(rows - rows.mean(axis=1, keepdims=True))
    return dot(centred, centred.T)


def label_similarities(labels: Int[Array, " batch"], classes: int) -> Float[Array, "batch batch"]:
    """The same of one-hot labels: 1 for two images of one class, `-1 / (classes - 1)` for two of different classes."""
    same = labels[:, None] == labels[None, :]
    return jnp.where(same, 1.0, -1.0 / (classes - 1))


def loss(seen: Seen) -> tuple[Scalar, Metrics]:
    """The weighted similarity matching of the clean images. Its own metric is the matching without the weight."""
    features, kernel = seen.made.clean.astype(jnp.float32), seen.params["kernel"]
    mapped = conv(features, kernel) if features.ndim == 4 else dot(features, kernel)
    distance = jnp.mean((similarities(vectors(mapped)) - label_similarities(seen.made.labels, seen.logits.shape[1])) ** 2)
    return seen.options.weight * distance, {"similarity_loss": distance}


def _head_share(config: Config, hyper: HyperParameters) -> Scalar:
    share = 1 - Options(**config.rule_options).weight
    return 0 if share == 0 else jnp.float32(share)


RULE = Rule(loss=loss, head_share=_head_share, parameters=parameters, options=Options)
