"""mono_forward: each group projects its features to the classes and learns by cross-entropy (Gong, Li and Abdulla, 2025, arXiv:2501.09238).

`G = f W`, without bias, of the whole flattened feature map, and the cross-entropy of `softmax(G)`. `G` also scores the classes
(`config.inference = "rule"`). The head of the group only reads.

Our reading: the projection starts at random numbers whose variance is 1 / the number of features; a map is not pooled;
`config.label_smoothing` acts here too. The paper classifies by the last layer's `G` or by the sum over layers. Here the groups vote that
err least on the validation data; the mean of their log-probabilities ranks the classes as the sum of their `G` does.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from vffjax.hyperparameters import Scalar
from vffjax.rules.local import Metrics, NoOptions, Rule, Seen, head_cross_entropy


def parameters(options: NoOptions, shape: tuple[int, ...], classes: int, key: PRNGKeyArray) -> dict[str, Array]:
    """The projection of a flattened feature map to the classes."""
    return {"kernel": jax.nn.initializers.lecun_normal()(key, (math.prod(shape), classes), jnp.float32)}


def scores(options: NoOptions, features: Array, params: dict[str, Array], classes: int) -> Float[Array, "batch classes"]:
    """The projections, as log-probabilities."""
    flat = features.astype(jnp.float32).reshape(features.shape[0], -1)
    return jax.nn.log_softmax(jnp.dot(flat, params["kernel"], precision=jax.lax.Precision.HIGHEST))


def loss(seen: Seen) -> tuple[Scalar, Metrics]:
    """Cross-entropy of the clean images' projections, with `config.label_smoothing`. It has no metrics of its own."""
    found = scores(seen.options, seen.made.clean, seen.params, seen.logits.shape[1])
    return head_cross_entropy(found, seen.made.labels, seen.hyper.label_smoothing, seen.made.mixture), {}


RULE = Rule(loss=loss, parameters=parameters, scores=scores)
