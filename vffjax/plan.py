"""What a run is before it starts: its groups, their optimizers and first states, its task, and the keys that its seed gives."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from vffjax.augment import IMAGENET_MEAN, IMAGENET_STD
from vffjax.config import Config, for_group
from vffjax.errors import chosen
from vffjax.groups import GroupState, LayerGroup, init_variables, make_groups
from vffjax.labelling import make_codebook
from vffjax.optimizers import make_optimizer, of_the_head
from vffjax.rules import Task

# What a run's seed is folded with, so that no two uses share a key.
INITIALISATION, CODEBOOK, EPOCH = range(3)


class Images(NamedTuple):
    """A split on the device, as bytes; `features` is what frozen groups made of them (see `feature_cache`), or None."""

    images: UInt8[Array, "n h w c"]
    labels: Int[Array, " n"]
    features: Float[Array | np.ndarray, "n *feature"] | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is static in a run: traced functions close over it, arrays never."""

    config: Config
    groups: tuple[LayerGroup, ...]
    optimizers: tuple[optax.GradientTransformation, ...]
    steps_per_epoch: int

    @property
    def stages(self) -> int:
        """Runs of `config.epochs` epochs: one if all groups train together, else one per group."""
        return chosen("schedule", self.config.schedule, {"joint": 1, "sequential": len(self.groups)})

    @property
    def total_epochs(self) -> int:
        return self.stages * self.config.epochs

    def active(self, epoch: int) -> int | None:
        """The group that trains in this epoch (from 0), or None for all."""
        return chosen("schedule", self.config.schedule, {"joint": None, "sequential": epoch // self.config.epochs})

    def trained_groups(self, epoch: int) -> int:
        """How many groups have trained at the end of this epoch (from 0): all, or those that the sequential schedule has reached."""
        active = self.active(epoch)
        return len(self.groups) if active is None else active + 1


def make_plan(config: Config, train_size: int, classes: int) -> Plan:
    """Groups and optimizers for `train_size` training images; the last, smaller batch of an epoch is left out."""
    groups = make_groups(config, classes)
    steps = train_size // config.batch_size
    optimizers = (make_optimizer(for_group(config, i, len(groups) - 1 - i), steps) for i in range(len(groups)))
    pairs = zip(groups, optimizers, strict=True)
    return Plan(config, groups, tuple(of_the_head(optimizer) if group.frozen else optimizer for group, optimizer in pairs), steps)


def run_key(config: Config, purpose: int) -> PRNGKeyArray:
    return jax.random.fold_in(jax.random.key(config.seed), purpose)


def make_task(config: Config, classes: int, image_shape: tuple[int, int, int], mean: tuple[float, ...], std: tuple[float, ...]) -> Task:
    """Codebook and pixel statistics of a run; `mean` and `std` are the training images'."""
    mean, std = chosen("pixel_statistics", config.pixel_statistics, {"data": (mean, std), "imagenet": (IMAGENET_MEAN, IMAGENET_STD)})
    codebook = make_codebook(run_key(config, CODEBOOK), classes, image_shape, config.noise_scale)
    return Task(codebook, jnp.array(mean, jnp.float32), jnp.array(std, jnp.float32))


def init_states(plan: Plan, image_shape: tuple[int, int, int]) -> tuple[GroupState, ...]:
    """Fresh groups from the run's seed."""
    variables = init_variables(plan.groups, run_key(plan.config, INITIALISATION), image_shape)
    pairs = zip(variables, plan.optimizers, strict=True)
    return tuple(GroupState(params, stats, optimizer.init(params)) for (params, stats), optimizer in pairs)
