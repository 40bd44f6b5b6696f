"""Hyperparameters as arrays that compiled programs take as arguments, so that other values do not compile another program."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float

from vffjax.config import Config, for_group
from vffjax.errors import chosen

Scalar = float | Float[Array | np.ndarray, ""]  # one number of a loss, which a compiled step takes as an argument


class HyperParameters(NamedTuple):
    """Float32 values for every step and group, `[steps, groups]`; inside of a step `[groups]`, and for one group scalars.

    Each field is named after the configuration key that documents it. All fields are listed in `config.ARGUMENTS`.
    """

    learning_rate: Float[Array | np.ndarray, "*steps groups"]
    bias_rate: Float[Array | np.ndarray, "*steps groups"]
    weight_decay: Float[Array | np.ndarray, "*steps groups"]
    momentum: Float[Array | np.ndarray, "*steps groups"]
    slow_share: Float[Array | np.ndarray, "*steps groups"]
    clip_norm: Float[Array | np.ndarray, "*steps groups"]
    temperature: Float[Array | np.ndarray, "*steps groups"]
    margin: Float[Array | np.ndarray, "*steps groups"]
    head_weight: Float[Array | np.ndarray, "*steps groups"]
    label_smoothing: Float[Array | np.ndarray, "*steps groups"]
    goodness_threshold: Float[Array | np.ndarray, "*steps groups"]
    peer_normalisation: Float[Array | np.ndarray, "*steps groups"]

    def of(self, group: int) -> "HyperParameters":
        """The hyperparameters of one group."""
        return HyperParameters(*(values[..., group] for values in self))


def in_epoch(config: Config, groups: int, steps_per_epoch: int, epoch: int) -> HyperParameters:
    """The hyperparameters of each step of one epoch.

    Args:
        config: the run's configuration. Overrides, and the decay of the learning rate by group, are applied here.
        groups: how many groups the network has.
        steps_per_epoch: how many steps an epoch has.
        epoch: its number from 0, counted within a stage of the sequential schedule.
    """
    steps = epoch * steps_per_epoch + np.arange(steps_per_epoch)
    settings = [for_group(config, i, groups - 1 - i) for i in range(groups)]
    varying = {
        key: np.stack([schedule(own, steps_per_epoch, steps) for own in settings], axis=1)
        for key, schedule in {"learning_rate": learning_rate, "slow_share": slow_share, "temperature": temperature}.items()
    }
    constant = {key: np.tile([getattr(own, key) for own in settings], (steps_per_epoch, 1)) for key in HyperParameters._fields}
    found: Any = {key: np.asarray(values, np.float32) for key, values in (constant | varying).items()}
    return HyperParameters(**found)


def at_peak(config: Config, groups: int) -> HyperParameters:
    """The hyperparameters of one step, `[groups]`, for code that looks at one step only: peak learning rates, and first temperatures."""
    settings = [for_group(config, i, groups - 1 - i) for i in range(groups)]
    found: Any = (np.array([getattr(own, key) for own in settings], np.float32) for key in HyperParameters._fields)
    return HyperParameters(*found)


def learning_rate(config: Config, steps_per_epoch: int, steps: np.ndarray) -> np.ndarray:
    """The learning rate in each of the `steps`, by a linear warm-up from 0 and then a decay to 0.

    The steps are counted from 0 over the run, or over each stage of the sequential schedule. The decay is that of Loshchilov and Hutter
    (2017), arXiv:1608.03983, without restarts, or with config.decay=linear a line. If the warm-up fills the whole run or stage, one step is
    left for the decay. With a cosine, the values equal those of `optax.warmup_cosine_decay_schedule`, which would compile a program for the
    steps of an epoch; here NumPy computes them.
    """
    total = config.epochs * steps_per_epoch
    warmup = min(round(config.warmup_epochs * steps_per_epoch), total - 1)
    done = np.clip((steps - warmup) / (total - warmup), 0, 1)
    decayed = chosen("decay", config.decay, {"cosine": 0.5 * (1 + np.cos(np.pi * done)), "linear": 1 - done})
    return config.learning_rate * np.where(steps < warmup, steps / max(warmup, 1), decayed)


def slow_share(config: Config, steps_per_epoch: int, steps: np.ndarray) -> np.ndarray:
    """The share of the slow averages in each of the `steps`, which grows with the cube of time (K. Jordan, 2024, arXiv:2404.00498).

    The steps are counted from 0 over the run, or over each stage of the sequential schedule.
    """
    return config.slow_share * (steps / (config.epochs * steps_per_epoch)) ** 3


def temperature(config: Config, steps_per_epoch: int, steps: np.ndarray) -> np.ndarray:
    """The temperature of the contrasts in each of the `steps`.

    The steps are counted from 0 over the run, or over each stage of the sequential schedule. The temperature goes from config.temperature,
    at step 0, to config.temperature_end, after the last step, by the same factor in every step. An end of 0 leaves it as it is. That low
    temperatures weigh the hardest negatives most is known of contrastive losses (Wang and Liu, 2021, arXiv:2012.09740); the course is our
    choice.
    """
    if config.temperature_end == 0:
        return np.full(len(steps), config.temperature)
    return config.temperature * (config.temperature_end / config.temperature) ** (steps / (config.epochs * steps_per_epoch))
