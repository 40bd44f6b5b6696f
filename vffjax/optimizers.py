"""The optimizer of each group: gradient clipping, AdamW or Nesterov SGD, decoupled decay of kernels, warm-up and cosine decay."""

from typing import Any

import jax
import optax

from vffjax.config import Config
from vffjax.errors import chosen


def of_the_head(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer of a frozen group: it updates the head, and neither moves nor decays the layers, nor keeps any state for them."""
    parts = {"learns": optimizer, "frozen": optax.set_to_zero()}
    return optax.partition(parts, lambda params: {name: "learns" if name == "head" else "frozen" for name in params})


def make_optimizer(config: Config, steps_per_epoch: int) -> optax.GradientTransformation:
    """Warm-up from 0, cosine decay to 0; kernels decay, biases and scales do not.

    Raises `UserError` for an optimizer that is not known.
    """
    total = config.epochs * steps_per_epoch
    warmup = min(round(config.warmup_epochs * steps_per_epoch), total - 1)  # one step is left to decay in
    rate = optax.warmup_cosine_decay_schedule(0.0 if warmup else config.learning_rate, config.learning_rate, warmup, total)
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm > 0 else optax.identity()

    def kernels(params: Any) -> Any:
        return jax.tree.map(lambda p: p.ndim > 1, params)

    def sgd() -> optax.GradientTransformation:
        decay = optax.add_decayed_weights(config.weight_decay, mask=kernels)
        return optax.chain(clip, optax.trace(config.momentum, nesterov=True), decay, optax.scale_by_learning_rate(rate))

    def adamw() -> optax.GradientTransformation:
        return optax.chain(clip, optax.adamw(rate, weight_decay=config.weight_decay, mask=kernels))

    return _promoting(chosen("optimizer", config.optimizer, {"adamw": adamw, "sgd": sgd})())


def _promoting(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same optimizer, also where `JAX_NUMPY_DTYPE_PROMOTION=strict`: optax multiplies whole numbers by floats."""

    def update(*arguments: Any, **named: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(*arguments, **named)

    return optax.GradientTransformation(optimizer.init, update)
