"""Everything that is fixed before a run starts: groups, initial states, task, and the PRNG keys of the seed."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from vffjax import rules
from vffjax.config import Config, for_group, of_program
from vffjax.data.on_disk import OnDisk, Pixels
from vffjax.errors import chosen
from vffjax.hyperparameters import HyperParameters, at_peak, in_epoch
from vffjax.networks.groups import GroupState, LayerGroup, States, init_variables, make_groups
from vffjax.networks.layers import FIXED, resized, whitening_kernel
from vffjax.ops.spectrum import filtered, spectrum_root
from vffjax.rules.local import Rule, Setting
from vffjax.rules.streams import Task, make_codebook
from vffjax.training.augment import IMAGENET_MEAN, IMAGENET_STD, normalise
from vffjax.training.optimizers import make_optimizer

# The seed's key is folded with one of these, so that no two uses share a key.
INITIALISATION, CODEBOOK, EPOCH, RULE = range(4)
MEASURED = 5_000  # training images whose patches the whitening layer, and whose spectrum class noise, is computed from


class Images(NamedTuple):
    """The images of a split, as bytes, on the device (JAX arrays), on the host (NumPy arrays), or on disk.

    Attributes:
        images: one image in each entry of the first axis.
        labels: their classes.
        features: the output of the frozen groups for each image (see `feature_cache`), or None.
        shape: height, width and channels of an image if `images` are rows of bytes (see `as_rows`), or None.
    """

    images: UInt8[Array | Pixels, "n h w c"] | UInt8[Array | Pixels, "n bytes"]
    labels: Int[Array | np.ndarray, " n"]
    features: Float[Array | np.ndarray, "n *feature"] | None = None
    shape: tuple[int, int, int] | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        h, w, c = self.shape or self.images.shape[1:]
        return h, w, c

    def as_rows(self) -> "Images":
        """The same images, each flattened to one row of bytes.

        To gather images, the TPU compiler would copy the whole set into a layout of four times the bytes. It gathers rows in place.
        """
        return self._replace(images=self.images.reshape(len(self.images), -1), shape=self.image_shape)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static part of a run. A plan is hashable; jitted functions take `Plan.program` as a static argument."""

    config: Config
    rule: Rule
    groups: tuple[LayerGroup, ...]
    steps_per_epoch: int

    @functools.cached_property
    def program(self) -> "Plan":
        """The part of the plan that compiled programs depend on. Plans with equal parts share their programs; see `config.of_program`."""
        return Plan(of_program(self.config), self.rule, self.groups, 0)

    @property
    def stages(self) -> int:
        """How many times `config.epochs` epochs are trained: once if all groups train together, else once per group."""
        return chosen("schedule", self.config.schedule, {"joint": 1, "pipeline": 1, "sequential": len(self.groups)})

    @property
    def classes(self) -> int:
        return self.groups[0].head.classes

    @property
    def rows_of_a_step(self) -> int:
        """Rows that pass through the layers in a step: the images of a batch and their labelled copies."""
        return self.config.batch_size + self.rule.labelled_rows(self.config, self.classes)

    @property
    def total_epochs(self) -> int:
        return self.stages * self.config.epochs

    def active(self, epoch: int) -> int | None:
        """The group that trains in this epoch (from 0), or None for all."""
        return chosen("schedule", self.config.schedule, {"joint": None, "pipeline": None, "sequential": epoch // self.config.epochs})

    def trained_groups(self, epoch: int) -> int:
        """How many groups have been trained at the end of this epoch (numbered from 0); fewer than all in the sequential schedule."""
        active = self.active(epoch)
        return len(self.groups) if active is None else active + 1

    def setting(self, group: int, hyper: HyperParameters, key: PRNGKeyArray) -> Setting:
        """The setting in which a group trains in one step, from the step's hyperparameters, `[groups]`, and its key."""
        key = jax.random.fold_in(jax.random.fold_in(key, 2), group)
        return Setting(self.rule, for_group(self.config, group), hyper.of(group), key)

    def hyperparameters(self, epoch: int) -> HyperParameters:
        """The hyperparameters of each step of an epoch (numbered from 0), `[steps, groups]`. Each stage starts its schedule anew."""
        return in_epoch(self.config, len(self.groups), self.steps_per_epoch, epoch % self.config.epochs)


def make_plan(config: Config, train_size: int, classes: int) -> Plan:
    """The plan of a run on `train_size` training images of `classes` classes. An incomplete last batch of an epoch is left out."""
    return Plan(config, rules.find(config), groups_of(config, classes), train_size // config.batch_size)


def groups_of(config: Config, classes: int) -> tuple[LayerGroup, ...]:
    """The groups of a configuration, with heads of so many classes."""
    return make_groups(config, rules.norm_of(config), classes)


def run_key(config: Config, purpose: int) -> PRNGKeyArray:
    """The key for one of the purposes `INITIALISATION`, `CODEBOOK`, `EPOCH` and `RULE`, from the run's seed."""
    return jax.random.fold_in(jax.random.key(config.seed), purpose)


def make_task(
    config: Config,
    classes: int,
    image_shape: tuple[int, int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    images: UInt8[Pixels, "n h w c"] | None = None,
) -> Task:
    """The task of a run in its first epoch: its codebook of class noise, and the pixel statistics by which images are normalised.

    Args:
        config: of the run.
        classes: how many there are.
        image_shape: height, width and channels.
        mean, std: of each channel of the training images, where 255 is 1. They are ignored if config.pixel_statistics is imagenet.
        images: the training images, whose spectrum config.noise_spectrum=images is about; None: noise is as it is drawn.
    """
    mean, std = chosen("pixel_statistics", config.pixel_statistics, {"data": (mean, std), "imagenet": (IMAGENET_MEAN, IMAGENET_STD)})
    pixels = jnp.array(mean, jnp.float32), jnp.array(std, jnp.float32)
    root = None if images is None else noise_root(config, images, *pixels)
    return Task(_codebook(config, classes, image_shape, 0, root), *pixels)


def noise_root(
    config: Config, images: UInt8[Pixels, "n h w c"], mean: Float[Array, " c"], std: Float[Array, " c"]
) -> Float[np.ndarray, "h w c c"] | None:
    """The root of the spectrum that class noise shall have, which is that of the first training images; None: noise is as it is drawn.

    The outputs of a whitening layer are then about as uncorrelated, and as equally strong, for noise as for images. See `ops.spectrum`.

    Args:
        config: of the run.
        images: the training images.
        mean, std: of the pixels, as the task has them.
    """
    if chosen("noise_spectrum", config.noise_spectrum, {"drawn": True, "images": False}):
        return None
    return spectrum_root(_measured(images), lambda block: normalise(jnp.asarray(block), mean, std))


def _measured(images: Pixels) -> Pixels:
    """The first of the images, of which nothing is read or copied yet."""
    return images.only(np.arange(min(len(images), MEASURED))) if isinstance(images, OnDisk) else images[:MEASURED]


def task_of_epoch(config: Config, task: Task, epoch: int, root: Float[np.ndarray, "h w c c"] | None) -> Task:
    """A run's task in an epoch, numbered from 0 over the run. With config.noise_redrawn=epoch, the class noise is that epoch's own.

    It is a function of the seed and the epoch, and of the training images by their `noise_root`. So a run which resumes inside of an epoch
    goes on with the same noise.
    """
    _, h, w, c = task.codebook.shape
    return task._replace(codebook=_codebook(config, task.classes, (h, w, c), epoch, root)) if _redraws(config) else task


def _redraws(config: Config) -> bool:
    return chosen("noise_redrawn", config.noise_redrawn, {"never": False, "epoch": True})


def _codebook(
    config: Config, classes: int, image_shape: tuple[int, int, int], epoch: int, root: Float[np.ndarray, "h w c c"] | None
) -> Float[Array, "classes h w c"]:
    key = run_key(config, CODEBOOK)
    key = jax.random.fold_in(key, epoch) if _redraws(config) else key
    if root is not None:
        white = make_codebook(key, classes, image_shape, 1.0)
        return jnp.asarray(config.noise_scale * filtered(np.asarray(white), root), jnp.float32)
    return make_codebook(key, classes, image_shape, config.noise_scale, config.noise_cell, config.noise_kind)


def blank_task(plan: Plan, image_shape: tuple[int, int, int]) -> Task:
    """The task of a run whose images are not known: pixels of mean 1/2 and deviation 1/4."""
    return make_task(plan.config, plan.classes, image_shape, (0.5,) * image_shape[2], (0.25,) * image_shape[2])


def abstract_start(plan: Plan, image_shape: tuple[int, int, int]) -> tuple[Task, States]:
    """The shapes of a run's task and first states. Nothing is computed."""
    return jax.eval_shape(lambda: (blank_task(plan, image_shape), init_states(plan, image_shape)))


def whitened(plan: Plan, states: States, images: UInt8[Pixels, "n h w c"], task: Task) -> States:
    """The states with the kernel of the whitening layer, if there is one, by the first training images; see `whitening_kernel`."""
    if not plan.config.whitening:
        return states
    first = plan.groups[0].module.layers[0]

    def prepare(block: Any) -> Array:
        return resized(normalise(jnp.asarray(block), task.mean, task.std), first.resize)

    params = states[0].params
    kernel = jnp.asarray(whitening_kernel(_measured(images), first.side, prepare=prepare))
    return (states[0]._replace(params=params | {"layers_0": {FIXED: kernel}}), *states[1:])


def init_states(plan: Plan, image_shape: tuple[int, int, int]) -> States:
    """The states of all groups before training, from the run's seed."""
    options, make = plan.rule.options_of(plan.config), plan.rule.parameters

    def own(group: int, shape: tuple[int, ...]) -> dict[str, Any]:
        """What the rule owns in a group, whose features of one image have this shape."""
        return {"rule": make(options, shape, plan.classes, jax.random.fold_in(run_key(plan.config, RULE), group))} if make else {}

    variables = init_variables(plan.groups, run_key(plan.config, INITIALISATION), image_shape, own)
    return with_new_optimizers(plan, tuple(GroupState(params, stats, None) for params, stats in variables))


def with_new_optimizers(plan: Plan, states: States) -> States:
    """The states with what their optimizers keep before the first step. Slow averages of `look_ahead` begin with the parameters."""
    hyper, out = at_peak(plan.config, len(plan.groups)), []
    for i, (group, state) in enumerate(zip(plan.groups, states, strict=True)):
        optimizer = make_optimizer(for_group(plan.config, i), hyper.of(i), group.frozen)
        out.append(state._replace(opt_state=optimizer.init(state.params)))
    return tuple(out)
