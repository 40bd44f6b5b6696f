"""The FLOPs of a training step, and the FLOP/s of matrix products on this machine. Together they say how much of the machine is used.

FLOPs are those of the model, counted from the shapes of its layers, and not those that a program executes. A fast convolution algorithm
(Winograd, FFT) may execute fewer. Padding is counted like image. Normalisation, activations, pooling, CSCL and the optimizer are not
counted.
"""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from keys import FLOPS
from vffjax import rules
from vffjax.config import Config
from vffjax.errors import chosen
from vffjax.hyperparameters import at_peak
from vffjax.networks.layers import ConvLayer, WhiteningLayer
from vffjax.training.plan import groups_of

KERNEL = 3  # side of the kernel of every convolution, in positions
PRODUCTS, TRIALS = 8, 5


class GroupWork(NamedTuple):
    """The multiplications of one row's forward pass, in each layer of a group, in its head and in its rule."""

    layers: tuple[int, ...]  # that learn
    fixed: int  # of a whitening layer, whose 2 k k c filters are of k k c entries each
    head: tuple[int, ...]  # its convolutions, if there are any, and its linear map
    rule: tuple[int, ...]  # the kernels that the rule owns


def forward_work(config: Config, image_shape: tuple[int, int, int], classes: int) -> tuple[GroupWork, ...]:
    """The multiplications in each group for one row.

    Args:
        config: a configuration of plain layers.
        image_shape: height, width and channels of an image.
        classes: the number of classes.
    """
    shape: tuple[int, ...] = image_shape
    work = []
    for group in groups_of(config, classes):
        layers, fixed = [], 0
        for layer in group.module.layers:
            if isinstance(layer, WhiteningLayer):
                shape = (*shape[:2], layer.channels(shape[2]))
                fixed = math.prod(shape) * shape[2] // 2
            elif isinstance(layer, ConvLayer):
                layers.append(KERNEL * KERNEL * math.prod(shape) * layer.width)
                shape = (shape[0] // layer.pool, shape[1] // layer.pool, layer.width)
            else:
                layers.append(math.prod(shape) * layer.width)
                shape = (layer.width,)
        head, seen = [], shape
        for layer in group.head.auxiliary:
            head.append(KERNEL * KERNEL * math.prod(seen) * layer.width)
            seen = (*seen[:-1], layer.width)
        cells = math.prod(min(group.head.grid, side) for side in seen[:-1])
        work.append(GroupWork(tuple(layers), fixed, (*head, cells * seen[-1] * classes), _rule_work(config, shape, classes)))
    return tuple(work)


def _rule_work(config: Config, shape: tuple[int, ...], classes: int) -> tuple[int, ...]:
    """The multiplications of each kernel that the rule owns in a group, for one row. A kernel of a convolution acts at each position."""
    rule = rules.find(config)
    if rule.parameters is None:
        return ()
    make = rule.parameters
    owned = jax.tree.leaves(jax.eval_shape(lambda: make(rule.options_of(config), shape, classes, jax.random.key(0))))
    return tuple(leaf.size * (math.prod(shape[:-1]) if leaf.ndim == 4 else 1) for leaf in owned if leaf.ndim > 1)


def training_flops(config: Config, image_shape: tuple[int, int, int], classes: int) -> int:
    """The model FLOPs of one training step of all groups, two for each multiplication.

    For each row, clean or labelled, every layer has a forward pass and a kernel gradient. Every layer but the first of its group also has
    an input gradient. So has every layer of a head but its first, which has one if the head's gradient trains the group. The layers of a
    frozen group have a forward pass only. Heads are counted for clean rows only. A kernel that the rule owns counts like a layer within its
    group, for the rows that pass it; a frozen group has no loss of a rule.

    Args:
        config: a checked configuration.
        image_shape: height, width and channels of an image.
        classes: the number of classes.

    Raises:
        UserError: the step of this configuration cannot be counted; see `keys.FLOPS`.
    """
    FLOPS.check(config)
    batch = config.batch_size
    rule = rules.find(config)
    rows = batch + rule.labelled_rows(config, classes)
    enters = float(rule.head_share(config, at_peak(config, 1).of(0))) > 0
    total = 0
    for group, (layers, fixed, head, owned) in enumerate(forward_work(config, image_shape, classes)):
        frozen = group < config.frozen_groups
        total += rows * (fixed + (sum(layers) if frozen else 3 * sum(layers) - layers[0]))
        total += batch * (3 * sum(head) - (0 if enters and not frozen else head[0]))
        total += 0 if frozen else (rows if rule.owns_copies else batch) * 3 * sum(owned)
        if rule.predicts(config):  # The predictions take one more forward pass of the clean rows.
            total += batch * (fixed + sum(layers) + sum(head))
    return 2 * total


def product_rate(products: Callable[[], None], size: int) -> float:
    """The FLOP/s of matrix products, as the median of `TRIALS` runs after one to warm up.

    Args:
        products: multiplies matrices `PRODUCTS` times, and waits for the result.
        size: rows and columns of the matrices.
    """
    products()
    seconds = []
    for _ in range(TRIALS):
        start = time.perf_counter()
        products()
        seconds.append(time.perf_counter() - start)
    return PRODUCTS * 2 * size**3 / statistics.median(seconds)


def jax_products(size: int, precision: str) -> Callable[[], None]:
    """Makes JAX's chain of matrix products for `product_rate`.

    Args:
        size: rows and columns of the matrices.
        precision: `bf16`, for which factors and products are bfloat16, or `f32` with JAX's default precision of products.
    """
    dtype = chosen("precision", precision, {"bf16": jnp.bfloat16, "f32": jnp.float32})
    multiply: Any = jax.jit(jnp.matmul)
    x = jax.random.normal(jax.random.key(0), (size, size), jnp.float32).astype(dtype)
    step = x / math.sqrt(size)  # so that repeated products stay near 1

    def run() -> None:
        y = x
        for _ in range(PRODUCTS):
            y = multiply(y, step)
        y.block_until_ready()

    return run
