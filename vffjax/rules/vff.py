"""Label-wise noise labelling (LWNL) and the cosine-similarity contrastive loss (CSCL).

The paper (Lee, Shin, Kim, Neural Networks 190:107697, 2025) publishes the idea of CSCL but no formula; the forms here are our reading.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from vffjax.hyperparameters import Scalar
from vffjax.rules.similarity import dot
from vffjax.rules.streams import Streams


def cscl_triplet(
    anchor: Float[Array, " d"], positive: Float[Array, " d"], negative: Float[Array, " d"], margin: Scalar, temperature: Scalar
) -> Float[Array, ""]:
    """CSCL for one anchor of unit length: `tau softplus((s(a, n) - s(a, p) + m) / tau)`."""
    difference = dot(negative - positive, anchor)
    return temperature * jax.nn.softplus((difference + margin) / temperature)


def cscl_in_batch(
    anchor: Float[Array, " d"],
    label: Int[Array, ""],
    copies: Float[Array, "copies d"],
    copy_labels: Int[Array, " copies"],
    margin: Scalar,
    temperature: Scalar,
) -> Float[Array, ""]:
    """CSCL for one anchor against all labelled copies: cross-entropy of `(s - m [match]) / tau`, mass on any copy of its class.

    `-log(sum_{j: match} e_j / sum_j e_j)`, the form of neighbourhood components analysis (Goldberger et al., 2004) on cosines.
    """
    match = copy_labels == label
    scores = (dot(copies, anchor) - margin * match.astype(copies.dtype)) / temperature
    right = jax.nn.logsumexp(jnp.where(match, scores, -jnp.inf))
    return jax.nn.logsumexp(scores) - right


def make_codebook(key: PRNGKeyArray, classes: int, shape: tuple[int, int, int], scale: float) -> Float[Array, "classes h w c"]:
    """One fixed noise image per class, `N(0, 1) * scale`, in units of normalised pixels."""
    return scale * jax.random.normal(key, (classes, *shape), jnp.float32)


def lwnl_triplet(
    images: Float[Array, "batch h w c"],
    labels: Int[Array, " batch"],
    wrong: Int[Array, " batch"],
    codebook: Float[Array, "classes h w c"],
) -> Streams:
    """The documented three kinds: `x`, then `x + n_y` for all images followed by `x + n_y'` for all."""
    copy_labels = jnp.concatenate([labels, wrong])
    noisy = jnp.concatenate([images, images]) + codebook[copy_labels]
    return Streams(jnp.concatenate([images, noisy]), labels, copy_labels)


def lwnl_shared(
    key: PRNGKeyArray,
    images: Float[Array, "batch h w c"],
    labels: Int[Array, " batch"],
    codebook: Float[Array, "classes h w c"],
    copies_per_class: int,
) -> Streams:
    """`copies_per_class` copies of every class, `x_j + n_c`, of images drawn without replacement as long as they last.

    Every anchor is compared with all of them, so a copy's image need not be of the class that its noise says: the noise alone
    tells the copies of a class from the others.
    """
    classes = codebook.shape[0]
    copy_labels = jnp.tile(jnp.arange(classes, dtype=labels.dtype), copies_per_class)
    rows = jnp.resize(jax.random.permutation(key, images.shape[0]), copy_labels.shape)
    copies = images[rows] + jnp.tile(codebook, (copies_per_class, 1, 1, 1))
    return Streams(jnp.concatenate([images, copies]), labels, copy_labels)
