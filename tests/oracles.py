"""Slow NumPy float64 versions of what the library computes, written from the definitions, and small set-ups that tests share."""

import contextlib
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vffjax.config import default_config
from vffjax.hyperparameters import HyperParameters, at_peak
from vffjax.proofs.probes import random_states, random_variables
from vffjax.rules.streams import Step, Task
from vffjax.training.augment import normalise
from vffjax.training.batch import Batch
from vffjax.training.checks import make_config
from vffjax.training.plan import Images, make_plan
from vffjax.training.trainer import clean_log_p

quick_jit = jax.jit  # how much it optimises is chosen for all tests of a session: see conftest.py

CONV = {"network": "conv4", "widths": (4, 4, 6, 6), "pools": (1, 2, 1, 2)}  # two groups
MLP = {"network": "mlp", "widths": (12, 10, 12), "grouping": "layer"}  # three groups


def slow_but(cases, *quick, several=False):
    """The cases of a parametrized test, all marked `slow` but the `quick` ones, which stand for the others. `several`: a case is a tuple
    of several arguments of the test."""
    missing = [case for case in quick if case not in cases]
    assert not missing, missing
    return [pytest.param(*(case if several else (case,)), marks=[] if case in quick else pytest.mark.slow) for case in cases]


def config_of(**changes):
    """The default configuration with changes, through the same checks as a run's."""
    return make_config(default_config().to_dict() | {"batch_size": 12, "epochs": 2} | changes)


class Run(NamedTuple):
    """A tiny run: everything that a step takes."""

    plan: Any
    task: Any
    states: Any
    data: Images

    @property
    def hyper(self):
        """The numbers of one step in which every group has its full learning rate."""
        return at_peak(self.plan.config, len(self.plan.groups))

    def batch(self, start=0, key=None, step=None):
        """The images from `start` on as a step takes them, with the numbers of a `step` of the run, or those of `hyper`."""
        rows, hyper = slice(start, start + self.plan.config.batch_size), self.hyper
        if step is not None:
            epoch, number = divmod(step, self.plan.steps_per_epoch)
            hyper = HyperParameters(*(values[number] for values in self.plan.hyperparameters(epoch)))
        ids = np.arange(len(self.data.labels), dtype=np.int32)[rows]
        key = jax.random.key(0) if key is None else key
        return Batch(self.data.images[rows], self.data.labels[rows], ids, np.int32(0), key, hyper)


def small_run(config, classes=3, shape=(8, 8, 2), examples=0):
    """A run on random images, no leaf at its initial value: a zero head hides gradients, unit statistics hide their use.

    Everything comes from NumPy, since initialisation outside jit costs seconds of compiling.
    """
    rng = np.random.default_rng(0)
    examples = examples or config.batch_size
    images = rng.integers(0, 256, (examples, *shape), dtype=np.uint8)
    labels = rng.permutation(np.arange(examples) % classes).astype(np.int32)
    plan = make_plan(config, examples, classes)
    channel = np.arange(shape[2], dtype=np.float32)
    codebook = config.noise_scale * rng.normal(size=(classes, *shape))
    task = Task(*(jnp.asarray(a, jnp.float32) for a in (codebook, 0.4 + 0.05 * channel, 0.3 - 0.02 * channel)))
    return Run(plan, task, random_states(plan, shape), Images(jnp.asarray(images), jnp.asarray(labels)))


@contextlib.contextmanager
def traced_afresh():
    """Within, no function is taken as it was traced before, and nothing traced there is taken afterwards.

    Whatever changes code that compiled functions are traced from has to do it within: these functions are the library's own, and JAX
    keeps their traces for equal arguments.
    """
    jax.clear_caches()
    try:
        yield
    finally:
        jax.clear_caches()


def variables_of(module, x, clean=1):
    """Random variables of a layer for inputs like `x`."""
    return random_variables(jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros(np.shape(x)), clean, False)))


def streams_of(run, key):
    """The streams that `train_step` makes of the first batch, without augmentation."""
    images, labels, *_ = run.batch()
    x = normalise(images, run.task.mean, run.task.std)
    hard = run.plan.rule.predicts(run.plan.config)
    logits = clean_log_p(run.plan, run.task, run.states, x).mean(axis=0) if hard else None
    return streams_from(run, jax.random.fold_in(key, 1), x, labels, logits)


def streams_from(run, key, images, labels, logits=None):
    """The streams that a run's rule makes of normalised images."""
    plan = run.plan
    return plan.rule.streams(Step(plan.config, plan.rule.options_of(plan.config), run.task, key, images, labels, logits))


def setting_of(run, group, key):
    """By what a group of a run trains, with the very key that is given."""
    return run.plan.setting(group, run.hyper, key)._replace(key=key)


def leaves(tree):
    """(path, NumPy array) of every leaf; for states pass what is to be compared."""
    return [(jax.tree_util.keystr(path), np.asarray(leaf)) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def assert_same(a, b):
    """Bitwise equality of two trees."""
    chex.assert_trees_all_equal(a, b, strict=True)


def assert_close(a, b, rtol=1e-5, atol=1e-6):
    chex.assert_trees_all_close(a, b, rtol=rtol, atol=atol)


def differs(a, b):
    """Whether any leaf of two trees differs in any bit."""
    return any((x != y).any() for (_, x), (_, y) in zip(leaves(a), leaves(b), strict=True))


def numeric_gradient(f, x, step=1e-6):
    """Central differences of a float64 function of one array."""
    x = np.asarray(x, np.float64)
    out = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        move = np.zeros_like(x)
        move[index] = step
        out[index] = (f(x + move) - f(x - move)) / (2 * step)
    return out


def pool_to_grid(x, cells):
    """Mean over cells of one map [h, w, c]; a cell spans every position that it touches."""
    rows, columns = min(cells, x.shape[0]), min(cells, x.shape[1])
    out = np.zeros((rows, columns, x.shape[2]))
    for i in range(rows):
        for j in range(columns):
            ys = [y for y in range(x.shape[0]) if y + 1 > i * x.shape[0] / rows + 1e-9 and y < (i + 1) * x.shape[0] / rows - 1e-9]
            zs = [z for z in range(x.shape[1]) if z + 1 > j * x.shape[1] / columns + 1e-9 and z < (j + 1) * x.shape[1] / columns - 1e-9]
            out[i, j] = np.mean([x[y, z] for y in ys for z in zs], axis=0)
    return out


def cosine(a, b):
    """Of two vectors; 0 where one is zero."""
    lengths = np.sqrt(a @ a) * np.sqrt(b @ b)
    return a @ b / lengths if lengths else 0.0


def similarity(a, b, kind):
    """Of two feature maps, by the definition in the design."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim == 3 and kind == "position":
        return np.mean([cosine(a[i, j], b[i, j]) for i in range(a.shape[0]) for j in range(a.shape[1])])
    if a.ndim == 3 and kind in ("grid", "pooled"):
        a, b = (pool_to_grid(z, 2 if kind == "grid" else 1) for z in (a, b))
    return cosine(a.ravel(), b.ravel())


def softplus(x):
    return max(x, 0.0) + np.log1p(np.exp(-abs(x)))


def triplet(anchor, positive, negative, kind, margin, tau):
    return tau * softplus((similarity(anchor, negative, kind) - similarity(anchor, positive, kind) + margin) / tau)


def in_batch(anchor, label, copies, copy_labels, kind, margin, tau):
    right, everything = 0.0, 0.0
    for copy, copy_label in zip(copies, copy_labels, strict=True):
        e = np.exp((similarity(anchor, copy, kind) - margin * (copy_label == label)) / tau)
        everything += e
        right += e * (copy_label == label)
    return -np.log(right / everything)


def cross_entropy(logits, labels, smoothing):
    total, classes = 0.0, logits.shape[1]
    for row, label in zip(np.asarray(logits, np.float64), labels, strict=True):
        p = np.exp(row - row.max())
        p /= p.sum()
        target = [smoothing / classes + (1 - smoothing) * (c == label) for c in range(classes)]
        total -= sum(t * np.log(q) for t, q in zip(target, p, strict=True))
    return total / len(labels)


def forward_forward(positive, negative, threshold, peer):
    total, channels = 0.0, positive.shape[-1]
    for rows, sign in ((positive, 1), (negative, -1)):
        for row in np.asarray(rows, np.float64):
            # The sum of squares over channels, averaged over positions, against the threshold of each unit.
            odds = (row.reshape(-1, channels) ** 2).sum(1).mean() - threshold * channels
            total += softplus(-sign * odds) / len(rows)
    units = np.asarray(positive, np.float64).reshape(-1, channels).mean(0)
    return total + peer * ((units - units.mean()) ** 2).mean()


def _taps(x, kernel, stride):
    """Every (output, kernel, input) position of a convolution padded by half the kernel on all sides, and the output's shape."""
    (n, h, w, _), (k, _, _, d) = x.shape, kernel.shape
    p = k // 2
    shape = n, (h + 2 * p - k) // stride + 1, (w + 2 * p - k) // stride + 1, d
    positions = ((b, i, j, u, v, stride * i + u - p, stride * j + v - p) for b, i, j, u, v in np.ndindex(*shape[:3], k, k))
    return [((b, i, j), (u, v), (b, y, z)) for b, i, j, u, v, y, z in positions if 0 <= y < h and 0 <= z < w], shape


def conv(x, kernel, stride=1):
    """Cross-correlation with zero padding, one output at a time."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    taps, shape = _taps(x, kernel, stride)
    out = np.zeros(shape)
    for o, k, i in taps:
        out[o] += x[i] @ kernel[k]
    return out


def conv_gradients(x, kernel, g, stride=1):
    """Of `sum(conv(x, kernel, stride) * g)`, collected term by term."""
    x, kernel, g = (np.asarray(a, np.float64) for a in (x, kernel, g))
    dx, dkernel = np.zeros_like(x), np.zeros_like(kernel)
    for o, k, i in _taps(x, kernel, stride)[0]:
        dx[i] += kernel[k] @ g[o]
        dkernel[k] += np.outer(x[i], g[o])
    return dx, dkernel


def max_pool(x, g, window, stride, padding):
    """The maximum of each window, entries beyond the map left out, and the gradient of `sum(max_pool(x) * g)`; entries are distinct."""
    x, dx = np.asarray(x, np.float64), np.zeros(x.shape)
    n, h, w, c = x.shape
    out = np.zeros((n, (h + 2 * padding - window) // stride + 1, (w + 2 * padding - window) // stride + 1, c))
    for b, i, j, channel in np.ndindex(out.shape):
        ys = [y for y in range(stride * i - padding, stride * i - padding + window) if 0 <= y < h]
        zs = [z for z in range(stride * j - padding, stride * j - padding + window) if 0 <= z < w]
        y, z = max(((y, z) for y in ys for z in zs), key=lambda at: x[b, *at, channel])
        out[b, i, j, channel] = x[b, y, z, channel]
        dx[b, y, z, channel] += g[b, i, j, channel]
    return out, dx
