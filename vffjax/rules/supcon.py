"""supcon: a supervised contrast among the clean images, behind a linear projection (Khosla et al., 2020, arXiv:2004.11362).

`z = W f` of length 1, and for each image the mean over the others of its class of
`-log(exp(z_i.z_p / tau) / sum_{a != i} exp(z_i.z_a / tau))`.
Work on contrastive forward-forward learning (HCL-FF, CVPR 2026) found that such a contrast with a linear projection adds most. A share of
the head's loss, `config.head_weight`, trains the group too; `tau` is `config.temperature`.

We differ from Khosla et al. in that each group has a contrast of its own, that an image is seen once and not in two augmented views, that
the projection is linear and not a network of two layers, and that the loss is the mean over images and not their sum. Our reading: a
feature map is mean-pooled to a few cells before the projection, and an image without another of its class is left out of the mean.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from vffjax.config import Config
from vffjax.hyperparameters import Scalar
from vffjax.keys import key
from vffjax.ops.pooling import mean_pool_to_grid
from vffjax.rules.local import Metrics, Rule, Seen, by_head_weight
from vffjax.rules.similarity import dot, unit


@dataclasses.dataclass(frozen=True)
class Options:
    """The rule's own keys."""

    dimensions: int = key(128, "length of the projected vectors", low=1, high=65_536)
    cells: int = key(2, "side in cells of the grid to which a feature map is mean-pooled before the projection", low=1, high=1024)


def parameters(options: Options, shape: tuple[int, ...], classes: int, key: PRNGKeyArray) -> dict[str, Array]:
    """The projection of pooled and flattened features."""
    inputs = shape[-1]
    for side in shape[:-1]:
        inputs *= min(side, options.cells)
    return {"kernel": jax.nn.initializers.lecun_normal()(key, (inputs, options.dimensions), jnp.float32)}


def projected(options: Options, features: Float[Array, "rows *feature"], params: dict[str, Array]) -> Float[Array, "rows d"]:
    """The projection of features, which are mean-pooled to the grid of cells first if they have positions. In float32."""
    features = features.astype(jnp.float32)
    if features.ndim == 4:
        features = mean_pool_to_grid(features, options.cells)
    return dot(features.reshape(features.shape[0], -1), params["kernel"])


def contrast(z: Float[Array, "batch d"], labels: Int[Array, " batch"], temperature: Scalar) -> Float[Array, ""]:
    """The supervised contrast of vectors of length 1; 0 if no two images share a class."""
    others = ~jnp.eye(len(labels), dtype=bool)
    scores = jnp.where(others, dot(z, z.T) / temperature, -jnp.inf)
    log_p = scores - jax.nn.logsumexp(scores, axis=1, keepdims=True)
    positive = others & (labels[:, None] == labels[None, :])
    count = positive.sum(axis=1)
    each = -jnp.where(positive, log_p, 0.0).sum(axis=1) / jnp.maximum(count, 1)
    return each.sum() / jnp.maximum((count > 0).sum(), 1)


def loss(seen: Seen) -> tuple[Scalar, Metrics]:
    """The contrast of the clean images. It has no metrics of its own."""
    z = unit(projected(seen.options, seen.made.clean, seen.params))
    return contrast(z, seen.made.labels, seen.hyper.temperature), {}


def _cells(config: Config) -> int:
    return Options(**config.rule_options).cells


RULE = Rule(loss=loss, head_share=by_head_weight, cells=_cells, parameters=parameters, options=Options)
