"""What a run is before it starts: its groups, their first states, its task, and the keys that its seed gives."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from vffjax import rules
from vffjax.config import Config, for_group, of_program
from vffjax.errors import chosen
from vffjax.hyperparameters import HyperParameters, at_peak, in_epoch
from vffjax.networks.groups import GroupState, LayerGroup, init_variables, make_groups
from vffjax.rules.local import Rule, Setting
from vffjax.rules.streams import Task, make_codebook
from vffjax.training.augment import IMAGENET_MEAN, IMAGENET_STD
from vffjax.training.optimizers import make_optimizer

# What a run's seed is folded with, so that no two uses share a key.
INITIALISATION, CODEBOOK, EPOCH, RULE = range(4)


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
    rule: Rule
    groups: tuple[LayerGroup, ...]
    steps_per_epoch: int

    @functools.cached_property
    def program(self) -> "Plan":
        """This plan as far as compiled programs depend on it; equal plans have the same programs. See `config.of_program`."""
        return Plan(of_program(self.config), self.rule, self.groups, 0)

    @property
    def stages(self) -> int:
        """Runs of `config.epochs` epochs: one if all groups train together, else one per group."""
        return chosen("schedule", self.config.schedule, {"joint": 1, "sequential": len(self.groups)})

    @property
    def classes(self) -> int:
        return self.groups[0].module.classes

    @property
    def rows_of_a_step(self) -> int:
        """Images of a batch and their labelled copies: all that passes through the layers in a step."""
        return self.config.batch_size + self.rule.labelled_rows(self.config, self.classes)

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

    def setting(self, group: int, hyper: HyperParameters, key: PRNGKeyArray) -> Setting:
        """By what a group trains in a step with these numbers, `[groups]`, and this key."""
        key = jax.random.fold_in(jax.random.fold_in(key, 2), group)
        return Setting(self.rule, for_group(self.config, group), hyper.of(group), key)

    def hyperparameters(self, epoch: int) -> HyperParameters:
        """The numbers of each step of an epoch (from 0), `[steps, groups]`; in the sequential schedule each stage begins anew."""
        return in_epoch(self.config, len(self.groups), self.steps_per_epoch, epoch % self.config.epochs)


def make_plan(config: Config, train_size: int, classes: int) -> Plan:
    """The groups of a run on `train_size` training images; the last, smaller batch of an epoch is left out."""
    return Plan(config, rules.find(config), groups_of(config, classes), train_size // config.batch_size)


def groups_of(config: Config, classes: int) -> tuple[LayerGroup, ...]:
    """The groups of a configuration, with heads of so many classes."""
    return make_groups(config, rules.norm_of(config), classes)


def run_key(config: Config, purpose: int) -> PRNGKeyArray:
    """The key for one of the purposes `INITIALISATION`, `CODEBOOK` and `EPOCH`, from the run's seed."""
    return jax.random.fold_in(jax.random.key(config.seed), purpose)


def make_task(config: Config, classes: int, image_shape: tuple[int, int, int], mean: tuple[float, ...], std: tuple[float, ...]) -> Task:
    """Codebook and pixel statistics of a run; `mean` and `std` are the training images'."""
    mean, std = chosen("pixel_statistics", config.pixel_statistics, {"data": (mean, std), "imagenet": (IMAGENET_MEAN, IMAGENET_STD)})
    codebook = make_codebook(run_key(config, CODEBOOK), classes, image_shape, config.noise_scale)
    return Task(codebook, jnp.array(mean, jnp.float32), jnp.array(std, jnp.float32))


def blank_task(plan: Plan, image_shape: tuple[int, int, int]) -> Task:
    """The task of a run whose images are not known: pixels of mean 1/2 and deviation 1/4."""
    return make_task(plan.config, plan.classes, image_shape, (0.5,) * image_shape[2], (0.25,) * image_shape[2])


def abstract_start(plan: Plan, image_shape: tuple[int, int, int]) -> tuple[Task, tuple[GroupState, ...]]:
    """The shapes of a run's task and first states. Nothing is computed."""
    return jax.eval_shape(lambda: (blank_task(plan, image_shape), init_states(plan, image_shape)))


def init_states(plan: Plan, image_shape: tuple[int, int, int]) -> tuple[GroupState, ...]:
    """Fresh groups from the run's seed."""
    variables = init_variables(plan.groups, run_key(plan.config, INITIALISATION), image_shape)
    hyper, states = at_peak(plan.config, len(plan.groups)), []
    own = _own_parameters(plan, variables, image_shape)
    for i, (group, (params, stats)) in enumerate(zip(plan.groups, variables, strict=True)):
        params |= own[i]
        optimizer = make_optimizer(for_group(plan.config, i), hyper.of(i), group.frozen)
        states.append(GroupState(params, stats, optimizer.init(params)))
    return tuple(states)


def _own_parameters(plan: Plan, variables: Sequence[tuple[Any, Any]], image_shape: tuple[int, int, int]) -> list[dict[str, Any]]:
    """Of each group the parameters that the rule owns there, under `rule`; nothing where it has none."""
    if plan.rule.parameters is None:
        return [{} for _ in plan.groups]
    options, own = plan.rule.options_of(plan.config), []
    x: Any = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    for group, (params, stats) in zip(plan.groups, variables, strict=True):
        x, _ = jax.eval_shape(functools.partial(group.features, clean=1, train=False), params, stats, x)
        key = jax.random.fold_in(run_key(plan.config, RULE), group.index)
        own.append({"rule": plan.rule.parameters(options, x.shape[1:], plan.classes, key)})
    return own
