"""Computes the features of frozen groups once, for the sequential schedule without augmentation.

A group behind frozen groups sees the same clean features in every epoch. They are kept on the device, or on the host, which then sends them
to the device one segment at a time. The labelled copies change in every step, so they pass the frozen groups again.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from vffjax.networks.groups import States
from vffjax.ops.batching import map_batches
from vffjax.rules.streams import Task
from vffjax.training import augment, trainer
from vffjax.training.mesh import fetched
from vffjax.training.plan import Images, Plan, abstract_start

# The host fetches the features of this many batches at a time.
BATCHES_PER_FETCH = 16


@functools.partial(jax.jit, static_argnums=(0, 1))
def clean_features(
    plan: Plan, active: int, task: Task, states: States, images: UInt8[Array, "n h w c"]
) -> Float[Array, "n_padded *feature"]:
    """The input of group `active` for clean images, with running statistics, in batches of `config.eval_batch_size`. The rows at the end
    that fill the last batch belong to no image."""

    def features(batch: Array) -> Array:
        z = plan.rule.shown(task, augment.normalised(task, batch))
        return trainer.before(plan, active, states, z, z.shape[0])

    return map_batches(features, images, plan.config.eval_batch_size, padded=True)


def bytes_of_an_image(plan: Plan, image_shape: tuple[int, int, int]) -> int:
    """The most bytes that the kept features of one image take in any stage of the run; 0 if none are kept."""
    if plan.config.feature_cache == "none":
        return 0
    task, states = abstract_start(plan, image_shape)
    image: Any = jax.ShapeDtypeStruct((1, *image_shape), jnp.uint8)
    sizes = [clean_features.eval_shape(plan.program, active, task, states, image) for active in range(1, len(plan.groups))]
    return max((size.size * size.dtype.itemsize for size in sizes), default=0)


def with_features(plan: Plan, active: int, task: Task, states: States, data: Images) -> Images:
    """`data` with the input of group `active` for each image, as a JAX array, or as a NumPy array if config.feature_cache is host. Rows at
    the end that fill the last batch belong to no image."""
    images = data.images.reshape(-1, *data.image_shape)
    if plan.config.feature_cache != "host" and isinstance(images, jax.Array):
        return data._replace(features=clean_features(plan.program, active, task, states, images))
    # A few batches at a time, because all features together may not fit on the device. The last one is filled up to a whole batch, since in
    # a smaller one the same numbers may be rounded otherwise.
    batch = min(plan.config.eval_batch_size, len(images))
    pieces = []
    for start in range(0, len(images), BATCHES_PER_FETCH * batch):
        piece = images[start : start + BATCHES_PER_FETCH * batch]
        whole = jnp.pad(piece, ((0, -len(piece) % batch), *((0, 0),) * 3))
        pieces.append(fetched(clean_features(plan.program, active, task, states, whole)))
    features = np.concatenate(pieces)
    return data._replace(features=features if plan.config.feature_cache == "host" else jnp.asarray(features))
