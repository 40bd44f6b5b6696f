"""How an image is told a label: LWNL noise (ours and the paper's three kinds of data), or the forward-forward overlay.

A step's images come as `Streams`: the clean images, and labelled copies of some of them. No rule writes to the clean stream, but
forward-forward, which needs a neutral label in the pixels that it overwrites.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PRNGKeyArray

# What wrong labels that were drawn from predictions are called in a traced program, for the locality certificate to know them by.
DRAWN = "drawn labels"


class Streams(NamedTuple):
    """Clean rows, then labelled rows, in one array on their way through the groups: one call of a layer serves both."""

    rows: Float[Array, "rows *feature"]
    labels: Int[Array, " batch"]
    copy_labels: Int[Array, " copies"]  # the label that each copy carries, right or wrong for its image; none under rule head

    @property
    def clean(self) -> Float[Array, "batch *feature"]:
        return self.rows[: self.labels.shape[0]]

    @property
    def copies(self) -> Float[Array, "copies *feature"]:
        return self.rows[self.labels.shape[0] :]


def make_codebook(key: PRNGKeyArray, classes: int, shape: tuple[int, int, int], scale: float) -> Float[Array, "classes h w c"]:
    """One fixed noise image per class, `N(0, 1) * scale`, in units of normalised pixels."""
    return scale * jax.random.normal(key, (classes, *shape), jnp.float32)


def wrong_labels(
    key: PRNGKeyArray, labels: Int[Array, " batch"], classes: int, logits: Float[Array, "batch classes"] | None = None
) -> Int[Array, " batch"]:
    """A label other than the right one: uniform, or drawn from `softmax(logits)` with the right class masked (hard negatives)."""
    if logits is None:
        return (labels + jax.random.randint(key, labels.shape, 1, classes, labels.dtype)) % classes
    right = jax.nn.one_hot(labels, classes, dtype=bool)
    drawn = jax.random.categorical(key, jnp.where(right, -jnp.inf, logits)).astype(labels.dtype)
    return checkpoint_name(drawn, DRAWN)


def clean_only(images: Float[Array, "batch h w c"], labels: Int[Array, " batch"]) -> Streams:
    """The streams of rule head: no copies."""
    return Streams(images, labels, labels[:0])


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


def overlay(
    images: Float[Array, "batch h w c"],
    weights: Float[Array, "batch classes"],
    low: Float[Array, " c"],
    high: Float[Array, " c"],
) -> Float[Array, "batch h w c"]:
    """Forward-forward labels (Hinton, 2022): the first pixels, row by row, one per class, become `low + weight (high - low)`.

    `low` and `high` are black and white in normalised units. One-hot weights say a label, equal weights say nothing.
    """
    n, h, w, c = images.shape
    pixels = images.reshape(n, h * w, c)
    low, high = low.reshape(1, 1, c), high.reshape(1, 1, c)
    label = low + weights[:, :, None] * (high - low)
    return pixels.at[:, : weights.shape[1]].set(label.astype(images.dtype)).reshape(n, h, w, c)


def overlay_streams(
    images: Float[Array, "batch h w c"],
    labels: Int[Array, " batch"],
    wrong: Int[Array, " batch"],
    classes: int,
    low: Float[Array, " c"],
    high: Float[Array, " c"],
) -> Streams:
    """Clean: neutral label. Copies: all images with the right label, then all with a wrong one."""
    copy_labels = jnp.concatenate([labels, wrong])
    copies = overlay(jnp.concatenate([images, images]), jax.nn.one_hot(copy_labels, classes, dtype=jnp.float32), low, high)
    return Streams(jnp.concatenate([neutral(images, classes, low, high), copies]), labels, copy_labels)


def neutral(
    images: Float[Array, "batch h w c"], classes: int, low: Float[Array, " c"], high: Float[Array, " c"]
) -> Float[Array, "batch h w c"]:
    """The overlay that says nothing: every class with weight 1 / classes."""
    return overlay(images, jnp.full((images.shape[0], classes), 1 / classes, jnp.float32), low, high)
