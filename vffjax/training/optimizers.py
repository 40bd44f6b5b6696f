"""The optimizer of each group: AdamW, Nesterov SGD or Muon.

Gradients may be clipped, kernels decay apart from their gradients, and biases may have a rate of their own.
"""

from typing import Any

import flax
import jax
import optax
from optax.contrib import MuonDimensionNumbers

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

    def muon() -> optax.GradientTransformation:
        # An update has the root mean square of AdamW's, so that both take the same learning rates (Liu et al., 2025, arXiv:2502.16982).
        rates = {"learning_rate": hyper.learning_rate, "weight_decay": hyper.weight_decay, "beta": hyper.momentum}
        return optax.chain(clip, optax.contrib.muon(**rates, muon_weight_dimension_numbers=_kernels_of_layers, consistent_rms=0.2))

    kinds = {"adamw": adamw, "sgd": sgd, "muon": muon}
    optimizer = _with_bias_rate(chosen("optimizer", config.optimizer, kinds)(), hyper.bias_rate)
    if not frozen and not config.whitening:
        return optimizer

    def labels(params: Any) -> Any:
        if frozen:
            return {name: "learns" if name == "head" else "frozen" for name in params}
        return flax.traverse_util.path_aware_map(lambda path, _: "frozen" if FIXED in path else "learns", params)

    return optax.partition({"learns": optimizer, "frozen": optax.set_to_zero()}, labels)


def _kernels_of_layers(params: Any) -> Any:
    """For each kernel of a layer, that it is a matrix from all its axes but the last one to the last one; None for other parameters."""

    def dimensions(path: Any, leaf: Any) -> MuonDimensionNumbers | None:
        axes = getattr(leaf, "ndim", 0)
        return MuonDimensionNumbers(tuple(range(axes - 1)), axes - 1) if axes > 1 and path[0].startswith("layers_") else None

    return flax.traverse_util.path_aware_map(dimensions, params)


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
