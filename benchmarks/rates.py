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
from vffjax.config import Config, for_group
from vffjax.errors import chosen
from vffjax.hyperparameters import at_peak
from vffjax.networks.layers import ConvLayer, Layer, WhiteningLayer
from vffjax.networks.resnet import STEMS, ResidualBlock, Stem
from vffjax.training.plan import groups_of

KERNEL = 3  # side of the kernel of a convolution, in positions, but for those of 1x1 in residual blocks and that of a stem
PRODUCTS, TRIALS = 8, 5


class GroupWork(NamedTuple):
    """The multiplications of one row's forward pass, in the layers of a group, in its head and in its rule."""

    layers: int  # that learn
    entry: int  # those among them that read the input of the group, so that nothing needs their input gradient
    fixed: int  # of a whitening layer
    head: tuple[int, ...]  # its convolutions, if there are any, and its linear map
    rule: tuple[int, ...]  # the kernels that the rule owns


def forward_work(config: Config, image_shape: tuple[int, int, int], classes: int) -> tuple[GroupWork, ...]:
    """The multiplications in each group for one row.

    Args:
        config: a configuration of layers that `layer_work` knows.
        image_shape: height, width and channels of an image.
        classes: the number of classes.
    """
    shape: tuple[int, ...] = image_shape
    work = []
    for group in groups_of(config, classes):
        layers, entry, fixed = 0, 0, 0
        for layer in group.module.layers:
            whole, entering, shape = layer_work(layer, shape)
            if layer.learns:
                entry = entry if layers else entering
                layers += whole
            else:
                fixed += whole
        head, seen = [], shape
        for layer in group.head.auxiliary:
            head.append(KERNEL * KERNEL * math.prod(seen) * layer.width)
            seen = (*seen[:-1], layer.width)
        cells = math.prod(min(group.head.grid, side) for side in seen[:-1])
        work.append(GroupWork(layers, entry, fixed, (*head, cells * seen[-1] * classes), _rule_work(config, shape, classes)))
    return tuple(work)


def layer_work(layer: Layer, shape: tuple[int, ...]) -> tuple[int, int, tuple[int, ...]]:
    """The multiplications of a layer for one row.

    Args:
        layer: one of `keys.COUNTED`.
        shape: of its input.

    Returns:
        All its multiplications, those of its products that read its input, and the shape of its output.
    """
    if getattr(layer, "resize", 0):
        shape = (layer.resize, layer.resize, shape[2])
    if isinstance(layer, WhiteningLayer):
        width = layer.channels(shape[2])
        work = math.prod(shape) * layer.side**2 * width  # a patch has side * side * channels entries
        return work, work, (*shape[:2], width)
    if isinstance(layer, ConvLayer):
        work = KERNEL**2 * math.prod(shape) * layer.width
        return work, work, (shape[0] // layer.pool, shape[1] // layer.pool, layer.width)
    if isinstance(layer, Stem):
        side, stride = STEMS[layer.kind]
        positions = strided(shape, stride)
        work = side**2 * math.prod(positions) * shape[2] * layer.width
        return work, work, (*(strided(positions, 2) if layer.kind == "imagenet" else positions), layer.width)
    if isinstance(layer, ResidualBlock):
        before, after, channels = math.prod(shape[:2]), math.prod(strided(shape, layer.stride)), shape[2]
        if layer.bottleneck:
            steps = [before * channels * layer.inner, KERNEL**2 * after * layer.inner**2, after * layer.inner * layer.width]
        else:
            steps = [KERNEL**2 * after * channels * layer.inner, KERNEL**2 * after * layer.inner * layer.width]
        shortcut = after * channels * layer.width if layer.stride > 1 or channels != layer.width else 0
        return sum(steps) + shortcut, steps[0] + shortcut, (*strided(shape, layer.stride), layer.width)
    work = math.prod(shape) * layer.width
    return work, work, (layer.width,)


def strided(shape: tuple[int, ...], stride: int) -> tuple[int, int]:
    """The height and the width of a padded convolution's or pooling's output."""
    return -(-shape[0] // stride), -(-shape[1] // stride)


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

    For each row, clean or labelled, every layer has a forward pass and a kernel gradient. Every layer but those that read the input of
    their group also has an input gradient. So has every layer of a head but its first, which has one if the head's gradient trains the
    group. The convolutions of a residual block, and the one of its shortcut, are counted like layers. The layers of a
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
    rule, groups = rules.find(config), forward_work(config, image_shape, classes)
    rows = batch + rule.labelled_rows(config, classes)
    hyper = at_peak(config, len(groups))
    total = 0
    for group, (layers, entry, fixed, head, owned) in enumerate(groups):
        frozen = group < config.frozen_groups
        enters = float(rule.head_share(for_group(config, group), hyper.of(group))) > 0
        total += rows * (fixed + (layers if frozen else 3 * layers - entry))
        total += batch * (3 * sum(head) - (0 if enters and not frozen else head[0]))
        total += 0 if frozen else (rows if rule.owns_copies else batch) * 3 * sum(owned)
        if rule.predicts(config):  # The predictions take one more forward pass of the clean rows.
            total += batch * (fixed + layers + sum(head))
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
