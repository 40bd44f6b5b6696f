"""The optimizer of each group: gradient clipping, AdamW or Nesterov SGD, and decoupled decay of kernels."""

from typing import Any

import jax
import optax

from vffjax.config import Config
from vffjax.errors import chosen
from vffjax.hyperparameters import HyperParameters


def make_optimizer(config: Config, hyper: HyperParameters, frozen: bool = False) -> optax.GradientTransformation:
    """The optimizer of one group in one step. Kernels decay; biases and scales do not.

    Args:
        config: the group's configuration, which says what kind of optimizer it is, and whether gradients are clipped.
        hyper: the group's hyperparameters in this step, scalars, which may be traced. The optimizer's state does not depend on them.
        frozen: whether only the head learns. The optimizer then changes no other parameter and keeps no state for it.

    Raises:
        UserError: the optimizer is not known.
    """
    clip = optax.clip_by_global_norm(hyper.clip_norm) if config.clip_norm != 0 else optax.identity()

    def kernels(params: Any) -> Any:
        return jax.tree.map(lambda p: p.ndim > 1, params)

    def sgd() -> optax.GradientTransformation:
        decay = optax.add_decayed_weights(hyper.weight_decay, mask=kernels)
        return optax.chain(clip, optax.trace(hyper.momentum, nesterov=True), decay, optax.scale_by_learning_rate(hyper.learning_rate))

    def adamw() -> optax.GradientTransformation:
        return optax.chain(clip, optax.adamw(hyper.learning_rate, weight_decay=hyper.weight_decay, mask=kernels))

    optimizer = _promoting(chosen("optimizer", config.optimizer, {"adamw": adamw, "sgd": sgd})())
    if not frozen:
        return optimizer
    parts = {"learns": optimizer, "frozen": optax.set_to_zero()}
    return optax.partition(parts, lambda params: {name: "learns" if name == "head" else "frozen" for name in params})


def _promoting(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer, usable with JAX_NUMPY_DTYPE_PROMOTION=strict too, although optax multiplies integers by floats."""

    def update(*arguments: Any, **named: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(*arguments, **named)

    return optax.GradientTransformation(optimizer.init, update)
