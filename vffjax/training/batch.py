"""What one training step takes beside the states."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt8

from vffjax.hyperparameters import HyperParameters


class Batch(NamedTuple):
    """The input of one training step, besides task and states. For a segment, each array has one more axis in front: the steps.

    The images of a segment are rows of bytes. A TPU would pad the 32 pixels of a row of an image to the 128 lanes of its registers, which
    makes the images of all steps four times as large.
    """

    images: UInt8[Array, "batch h w c"] | UInt8[Array, "steps batch bytes"]
    labels: Int[Array, "*steps batch"]
    ids: Int[Array, "*steps batch"]  # the images' numbers in the training set
    epoch: Int[Array, "*steps"]  # the number of the epoch, from 0
    key: Key[Array, "*steps"]  # of the step
    hyper: HyperParameters  # [*steps, groups]
    features: Float[Array, "*feature"] | None = None  # [*steps, batch, *feature]: what frozen groups make of the images, if kept
    drawn: Any = None  # what the rule's streams draw, with one more axis in front for a segment; None: the step draws by itself

    def shaped(self, image_shape: tuple[int, ...]) -> "Batch":
        """A step's part of a segment, with its images in their shape: height, width, channels."""
        return self._replace(images=self.images.reshape(self.images.shape[0], *image_shape))


def abstract_batch(batch: int, image_shape: tuple[int, ...], groups: int, feature: Any = None, steps: tuple[int, ...] = ()) -> Batch:
    """The shapes of a batch, or of a segment's; `feature` is the abstract kept features of any number of images."""

    def shape(*sides: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct((*steps, *sides), dtype)

    hyper = HyperParameters(*(shape(groups, dtype=jnp.float32) for _ in HyperParameters._fields))
    key = jax.eval_shape(lambda: jax.random.key(0))
    features = None if feature is None else shape(batch, *feature.shape[1:], dtype=feature.dtype)
    images = shape(batch, *([math.prod(image_shape)] if steps else image_shape), dtype=jnp.uint8)
    return Batch(images, shape(batch), shape(batch), shape(), shape(dtype=key.dtype), hyper, features)
