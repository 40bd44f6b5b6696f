"""The optimizer of each group: gradient clipping, AdamW or Nesterov SGD, decoupled decay of kernels, and a rate of their own for biases."""

from typing import Any

import flax
import jax
import optax

from vffjax.config import Config
from vffjax.errors import chosen
from vffjax.hyperparameters import HyperParameters
from vffjax.networks.layers import FIXED


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

    optimizer = _with_bias_rate(chosen("optimizer", config.optimizer, {"adamw": adamw, "sgd": sgd})(), hyper.bias_rate)
    if not frozen and not config.whitening:
        return optimizer

    def labels(params: Any) -> Any:
        if frozen:
            return {name: "learns" if name == "head" else "frozen" for name in params}
        return flax.traverse_util.path_aware_map(lambda path, _: "frozen" if FIXED in path else "learns", params)

    return optax.partition({"learns": optimizer, "frozen": optax.set_to_zero()}, labels)


def _with_bias_rate(optimizer: optax.GradientTransformation, bias_rate: Any) -> optax.GradientTransformation:
    """The optimizer, whose updates of the layers' biases are multiplied by `bias_rate`.

    It is usable with JAX_NUMPY_DTYPE_PROMOTION=strict too, although optax multiplies integers by floats.
    """

    def scaled(path: Any, update: Any) -> Any:
        return update * bias_rate if path[0].startswith("layers_") and path[-1] == "bias" else update

    def update(*arguments: Any, **named: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(*arguments, **named)
            return flax.traverse_util.path_aware_map(scaled, updates), state

    return optax.GradientTransformation(optimizer.init, update)
