"""The optimizer of each group: AdamW, Nesterov SGD or Muon.

Gradients may be clipped, kernels decay apart from their gradients, biases may have a rate of their own, and weights may look ahead.
"""

from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int
from optax.contrib import MuonDimensionNumbers

from vffjax.config import Config
from vffjax.errors import chosen
from vffjax.hyperparameters import HyperParameters
from vffjax.networks.layers import FIXED


def make_optimizer(config: Config, hyper: HyperParameters, frozen: bool = False) -> optax.GradientTransformation:
    """The optimizer of one group in one step.

    Weight decay reaches all kernels, with Muon only those of layers. It never reaches biases and scales.

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
    optimizer = _with_look_ahead(optimizer, config.look_ahead, hyper.slow_share) if config.look_ahead else optimizer
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


class LookAheadState(NamedTuple):
    """The state of an optimizer that looks ahead."""

    inner: optax.OptState
    slow: optax.Params
    steps: Int[Array, ""]  # since the slow averages were last changed


def _with_look_ahead(optimizer: optax.GradientTransformation, every: int, share: Any) -> optax.GradientTransformation:
    """The optimizer, after each `every`-th update of which the parameters go back towards their slow averages.

    The averages become `share` of what they were plus `1 - share` of the parameters, and the parameters become the averages (Zhang et al.,
    2019, arXiv:1907.08610). What is evaluated, saved and exported are the parameters, whose last such step is within `every` of the end.
    """

    def init(params: optax.Params) -> LookAheadState:
        return LookAheadState(optimizer.init(params), jax.tree.map(jnp.copy, params), jnp.zeros((), jnp.int32))

    def update(grads: optax.Updates, state: LookAheadState, params: Any = None) -> tuple[optax.Updates, LookAheadState]:
        updates, inner = optimizer.update(grads, state.inner, params)
        done = state.steps + 1
        due = done == every

        def average(slow: Array, old: Array, step: Array) -> Array:
            return jnp.where(due, share * slow + (1 - share) * (old + step), slow)

        slow = jax.tree.map(average, state.slow, params, updates)
        back = jax.tree.map(lambda new, old, step: jnp.where(due, new - old, step), slow, params, updates)
        return back, LookAheadState(inner, slow, jnp.where(due, 0, done))

    return optax.GradientTransformation(init, update)
