"""The arithmetic of a training step, and how fast this machine multiplies matrices: together, the share of the machine that is used.

FLOPs are those of the model, counted from layer shapes, not those that a program executes. A fast convolution algorithm (Winograd, FFT)
may execute fewer, and padding counts as if it were image. Normalisation, activation, pooling, CSCL and the optimizer count nothing.
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
from vffjax.networks.layers import ConvLayer
from vffjax.training.plan import groups_of

KERNEL = 3  # side of every convolution's kernel, in positions
PRODUCTS, TRIALS = 8, 5


class GroupWork(NamedTuple):
    """Multiplications that one row needs on its way forward: in each layer of a group, and in its head."""

    layers: tuple[int, ...]
    head: int


def forward_work(config: Config, image_shape: tuple[int, int, int], classes: int) -> tuple[GroupWork, ...]:
    """The multiplications of each group for images (h, w, c)."""
    shape: tuple[int, ...] = image_shape
    work = []
    for group in groups_of(config, classes):
        layers = []
        for layer in group.module.layers:
            if isinstance(layer, ConvLayer):
                layers.append(KERNEL * KERNEL * math.prod(shape) * layer.width)
                shape = (shape[0] // layer.pool, shape[1] // layer.pool, layer.width)
            else:
                layers.append(math.prod(shape) * layer.width)
                shape = (layer.width,)
        cells = math.prod(min(group.head_grid, side) for side in shape[:-1])
        work.append(GroupWork(tuple(layers), cells * shape[-1] * classes))
    return tuple(work)


def training_flops(config: Config, image_shape: tuple[int, int, int], classes: int) -> int:
    """Model FLOPs of one training step of all groups, two for each multiplication.

    Every layer goes forward and has a kernel gradient for each row, clean or labelled; each but the first of its group has an input
    gradient as well, and so has a head whose gradient enters the group. The layers of a frozen group only go forward, and no gradient
    enters them. Heads count for clean rows only. Raises `UserError` for a configuration whose step is not counted (see `keys.FLOPS`).
    """
    FLOPS.check(config)
    batch = config.batch_size
    rule = rules.find(config)
    rows = batch + rule.labelled_rows(config, classes)
    enters = float(rule.head_share(config, at_peak(config, 1).of(0))) > 0
    total = 0
    for group, (layers, head) in enumerate(forward_work(config, image_shape, classes)):
        frozen = group < config.frozen_groups
        total += rows * (sum(layers) if frozen else 3 * sum(layers) - layers[0])
        total += batch * head * (3 if enters and not frozen else 2)
        if rule.predicts(config):  # one more clean pass, forward alone
            total += batch * (sum(layers) + head)
    return 2 * total


def product_rate(products: Callable[[], None], size: int) -> float:
    """FLOP/s of `products`, which multiplies matrices of `size` x `size` `PRODUCTS` times and waits: the median of `TRIALS` runs."""
    products()
    seconds = []
    for _ in range(TRIALS):
        start = time.perf_counter()
        products()
        seconds.append(time.perf_counter() - start)
    return PRODUCTS * 2 * size**3 / statistics.median(seconds)


def jax_products(size: int, precision: str) -> Callable[[], None]:
    """For `product_rate`: JAX at its default precision for `f32`, in and out of bfloat16 for `bf16`."""
    dtype = chosen("precision", precision, {"bf16": jnp.bfloat16, "f32": jnp.float32})
    multiply: Any = jax.jit(jnp.matmul)
    x = jax.random.normal(jax.random.key(0), (size, size), jnp.float32).astype(dtype)
    step = x / math.sqrt(size)  # products of products stay near 1

    def run() -> None:
        y = x
        for _ in range(PRODUCTS):
            y = multiply(y, step)
        y.block_until_ready()

    return run
