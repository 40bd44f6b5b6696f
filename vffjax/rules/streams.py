"""How a step's images come to the groups: as clean images, and as copies that are told a label.

A step's images come as `Streams`: the clean images, and labelled copies of some of them. No rule writes to the clean stream, but
forward-forward, which needs a neutral label in the pixels that it overwrites.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PRNGKeyArray

from vffjax.config import Config

# What wrong labels that were drawn from predictions are called in a traced program, for the locality certificate to know them by.
DRAWN = "drawn labels"


class Task(NamedTuple):
    """What a run fixes once about its labels and pixels; arrays, passed to every jitted function as arguments."""

    codebook: Float[Array, "classes h w c"]
    mean: Float[Array, " c"]  # of pixels on the 0..1 scale, the training images' or ImageNet's
    std: Float[Array, " c"]

    @property
    def black(self) -> Float[Array, " c"]:
        return -self.mean / self.std

    @property
    def white(self) -> Float[Array, " c"]:
        return (1 - self.mean) / self.std

    @property
    def classes(self) -> int:
        return self.codebook.shape[0]


def make_codebook(key: PRNGKeyArray, classes: int, shape: tuple[int, int, int], scale: float) -> Float[Array, "classes h w c"]:
    """One fixed noise image per class, `N(0, 1) * scale`, in units of normalised pixels."""
    return scale * jax.random.normal(key, (classes, *shape), jnp.float32)


class Step(NamedTuple):
    """What a rule makes its streams from."""

    config: Config
    options: Any  # the rule's own keys
    task: Task
    key: PRNGKeyArray  # for what is drawn
    images: Float[Array, "batch h w c"]  # augmented and normalised
    labels: Int[Array, " batch"]
    logits: Float[Array, "batch classes"] | None = None  # the ensemble's predictions, where the rule needs them


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


def wrong_labels(
    key: PRNGKeyArray, labels: Int[Array, " batch"], classes: int, logits: Float[Array, "batch classes"] | None = None
) -> Int[Array, " batch"]:
    """A label other than the right one: uniform, or drawn from `softmax(logits)` with the right class masked (hard negatives)."""
    if logits is None:
        return (labels + jax.random.randint(key, labels.shape, 1, classes, labels.dtype)) % classes
    right = jax.nn.one_hot(labels, classes, dtype=bool)
    drawn = jax.random.categorical(key, jnp.where(right, -jnp.inf, logits)).astype(labels.dtype)
    return checkpoint_name(drawn, DRAWN)


def clean_only(step: Step) -> Streams:
    """The images as they are, and no copies."""
    return Streams(step.images, step.labels, step.labels[:0])
