"""What a run is before it starts: its groups, their first states, its task, and the keys that its seed gives."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from vffjax.config import Config, for_group, of_program
from vffjax.errors import chosen
from vffjax.hyperparameters import HyperParameters, at_peak, in_epoch
from vffjax.networks.groups import GroupState, LayerGroup, init_variables, make_groups
from vffjax.rules.streams import Task
from vffjax.rules.vff import make_codebook
from vffjax.training.augment import IMAGENET_MEAN, IMAGENET_STD
from vffjax.training.optimizers import make_optimizer

# What a run's seed is folded with, so that no two uses share a key.
INITIALISATION, CODEBOOK, EPOCH = range(3)


class Images(NamedTuple):
    """A split, as bytes, on the device or on the host (NumPy); `features` is what frozen groups made of the images (see `feature_cache`),
    or None. With a `shape` (height, width, channels) each image is one row of bytes: see `as_rows`."""

    images: UInt8[Array | np.ndarray, "n h w c"] | UInt8[Array | np.ndarray, "n bytes"]
    labels: Int[Array | np.ndarray, " n"]
    features: Float[Array | np.ndarray, "n *feature"] | None = None
    shape: tuple[int, int, int] | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        h, w, c = self.shape or self.images.shape[1:]
        return h, w, c

    def as_rows(self) -> "Images":
        """The same, each image one row of bytes. To gather some of them, a TPU's compiler would copy the whole set into another layout,
        padded fourfold; rows are gathered as they lie."""
        return self._replace(images=self.images.reshape(len(self.images), -1), shape=self.image_shape)


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is static in a run. Plans can be hashed: jitted functions take `Plan.program` as a static argument."""

    config: Config
    groups: tuple[LayerGroup, ...]
    steps_per_epoch: int

    @functools.cached_property
    def program(self) -> "Plan":
        """This plan as far as compiled programs depend on it; equal plans have the same programs. See `config.of_program`."""
        return Plan(of_program(self.config), self.groups, 0)

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

    def hyperparameters(self, epoch: int) -> HyperParameters:
        """The numbers of each step of an epoch (from 0), `[steps, groups]`; in the sequential schedule each stage begins anew."""
        return in_epoch(self.config, len(self.groups), self.steps_per_epoch, epoch % self.config.epochs)


def make_plan(config: Config, train_size: int, classes: int) -> Plan:
    """The groups of a run on `train_size` training images; the last, smaller batch of an epoch is left out."""
    return Plan(config, make_groups(config, classes), train_size // config.batch_size)


def run_key(config: Config, purpose: int) -> PRNGKeyArray:
    """The key for one of the purposes `INITIALISATION`, `CODEBOOK` and `EPOCH`, from the run's seed."""
    return jax.random.fold_in(jax.random.key(config.seed), purpose)


def make_task(config: Config, classes: int, image_shape: tuple[int, int, int], mean: tuple[float, ...], std: tuple[float, ...]) -> Task:
    """Codebook and pixel statistics of a run; `mean` and `std` are the training images'."""
    mean, std = chosen("pixel_statistics", config.pixel_statistics, {"data": (mean, std), "imagenet": (IMAGENET_MEAN, IMAGENET_STD)})
    codebook = make_codebook(run_key(config, CODEBOOK), classes, image_shape, config.noise_scale)
    return Task(codebook, jnp.array(mean, jnp.float32), jnp.array(std, jnp.float32))


def init_states(plan: Plan, image_shape: tuple[int, int, int]) -> tuple[GroupState, ...]:
    """Fresh groups from the run's seed."""
    variables = init_variables(plan.groups, run_key(plan.config, INITIALISATION), image_shape)
    hyper, states = at_peak(plan.config, len(plan.groups)), []
    for i, (group, (params, stats)) in enumerate(zip(plan.groups, variables, strict=True)):
        optimizer = make_optimizer(for_group(plan.config, i), hyper.of(i), group.frozen)
        states.append(GroupState(params, stats, optimizer.init(params)))
    return tuple(states)
