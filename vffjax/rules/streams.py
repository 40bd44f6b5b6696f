"""The rows of a training step: clean images, and copies that carry a label.

A step's images come as `Streams`: the clean images, and labelled copies of some of them. No rule writes to the clean stream, but
forward-forward, which needs a neutral label in the pixels that it overwrites.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PRNGKeyArray

from vffjax.config import Config
from vffjax.errors import chosen

# The name, in a traced program, of wrong labels that were drawn from predictions. The locality certificate looks for it.
DRAWN = "drawn labels"


class Task(NamedTuple):
    """What a run fixes once about its labels and pixels. These arrays are arguments of every jitted function."""

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


def make_codebook(
    key: PRNGKeyArray, classes: int, shape: tuple[int, int, int], scale: float, cell: int = 1, kind: str = "normal"
) -> Float[Array, "classes h w c"]:
    """One fixed noise image for each class.

    Args:
        key: for the draws.
        classes: how many there are.
        shape: height, width and channels of an image.
        scale: standard deviation of the noise, in units of normalised pixels.
        cell: the noise is drawn on a grid of one point for each `cell` x `cell` pixels, and interpolated between them by cubic splines.
            With 1 it is white.
        kind: `normal`, or `signs`: of the normal noise on that grid, every entry becomes `scale` with the entry's sign.
    """
    h, w, c = shape
    noise = jax.random.normal(key, (classes, -(-h // cell), -(-w // cell), c), jnp.float32)
    noise = noise if cell == 1 else jax.image.resize(noise, (classes, *shape), "cubic")
    if chosen("noise_kind", kind, {"normal": False, "signs": True}):
        return scale * jnp.where(noise < 0, -1.0, 1.0)
    return scale * noise if cell == 1 else scale * noise / noise.std(axis=(1, 2, 3), keepdims=True)


class Step(NamedTuple):
    """What a rule makes its streams from."""

    config: Config
    options: Any  # the rule's own keys
    task: Task
    key: PRNGKeyArray  # for what is drawn
    images: Float[Array, "batch h w c"]  # augmented and normalised
    labels: Int[Array, " batch"]
    logits: Float[Array, "batch classes"] | None = None  # the ensemble's predictions, where the rule needs them
    drawn: Any = None  # what `Rule.draws` returned; None: nothing was drawn ahead


class Mixture(NamedTuple):
    """What was mixed into the images of a step; see `augment.mix_up`."""

    labels: Int[Array, " batch"]  # of the smaller part of each image
    share: Float[Array, ""]  # of the larger part, at least 1/2


class Streams(NamedTuple):
    """Clean rows followed by labelled rows, in one array, so that one call of a layer serves both.

    In a program for several devices padding may follow them from group to group. A rule gets streams without it.
    """

    rows: Float[Array, "rows *feature"]
    labels: Int[Array, " batch"]  # of the larger part of each image, where images are mixed
    copy_labels: Int[Array, " copies"]  # the label that each copy carries, which may be wrong for its image
    mixture: Mixture | None = None  # None: images are not mixed

    @property
    def clean(self) -> Float[Array, "batch *feature"]:
        return self.rows[: self.labels.shape[0]]

    @property
    def copies(self) -> Float[Array, "copies *feature"]:
        return self.rows[self.labels.shape[0] : self.real_rows]

    @property
    def real_rows(self) -> int:
        """How many rows there are, without padding."""
        return self.labels.shape[0] + self.copy_labels.shape[0]

    @property
    def padded(self) -> bool:
        return self.rows.shape[0] > self.real_rows

    def without_padding(self) -> "Streams":
        return self._replace(rows=self.rows[: self.real_rows]) if self.padded else self


def wrong_labels(
    key: PRNGKeyArray, labels: Int[Array, " batch"], classes: int, logits: Float[Array, "batch classes"] | None = None
) -> Int[Array, " batch"]:
    """Draws a wrong label for each image: uniformly, or, with `logits`, from their softmax without the right class (hard negatives)."""
    if logits is None:
        return (labels + jax.random.randint(key, labels.shape, 1, classes, labels.dtype)) % classes
    right = jax.nn.one_hot(labels, classes, dtype=bool)
    drawn = jax.random.categorical(key, jnp.where(right, -jnp.inf, logits)).astype(labels.dtype)
    return checkpoint_name(drawn, DRAWN)


def clean_only(step: Step) -> Streams:
    """The images as they are, and no copies."""
    return Streams(step.images, step.labels, step.labels[:0])
