"""The local objective of one group, for each rule, and the streams that it needs. Nothing here sees another group."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from vffjax.config import Config
from vffjax.errors import chosen
from vffjax.hyperparameters import HyperParameters, Scalar
from vffjax.networks.groups import LayerGroup
from vffjax.ops.pooling import mean_pool_to_grid
from vffjax.rules import ff, vff
from vffjax.rules import streams as labelling
from vffjax.rules.similarity import embed
from vffjax.rules.streams import Streams, Task

_KNOWN = {
    "rule": ("vff", "ff", "head"),
    "labelling": ("shared", "triplet"),
    "negatives": ("uniform", "hard"),
    "resolved_contrast": ("in_batch", "triplet"),
}


def check_names(config: Config) -> None:
    """Raises `UserError` for a name that this module would otherwise take for another."""
    for key, known in _KNOWN.items():
        chosen(key.removeprefix("resolved_"), getattr(config, key), dict.fromkeys(known))


def needs_predictions(config: Config) -> bool:
    """Whether `make_streams` draws wrong labels from the heads' prediction, which costs one more clean pass."""
    check_names(config)
    labelled_wrongly = config.rule == "ff" or (config.rule == "vff" and config.labelling == "triplet")
    return labelled_wrongly and config.negatives == "hard"


def make_streams(
    config: Config,
    task: Task,
    key: PRNGKeyArray,
    images: Float[Array, "batch h w c"],
    labels: Int[Array, " batch"],
    logits: Float[Array, "batch classes"] | None = None,
) -> Streams:
    """The streams of a step under `config.rule`; `logits` are the ensemble's, where `needs_predictions`."""
    check_names(config)
    if config.rule == "head":
        return labelling.clean_only(images, labels)
    if config.rule == "vff" and config.labelling == "shared":
        return vff.lwnl_shared(key, images, labels, task.codebook, config.copies_per_class)
    wrong = labelling.wrong_labels(key, labels, task.classes, logits)
    if config.rule == "ff":
        return ff.overlay_streams(images, labels, wrong, task.classes, task.black, task.white)
    return vff.lwnl_triplet(images, labels, wrong, task.codebook)


def prepare_clean(config: Config, task: Task, images: Float[Array, "batch h w c"]) -> Float[Array, "batch h w c"]:
    """Images as the clean stream shows them to a head: untouched, but for the neutral label of rule ff."""
    check_names(config)
    return ff.neutral(images, task.classes, task.black, task.white) if config.rule == "ff" else images


def prepare_labelled(config: Config, task: Task, images: Float[Array, "batch h w c"], label: Int[Array, ""]) -> Float[Array, "batch h w c"]:
    """Images that all carry one label, for the sweep."""
    check_names(config)
    if config.rule == "ff":
        weights = jnp.broadcast_to(jax.nn.one_hot(label, task.classes, dtype=jnp.float32), (images.shape[0], task.classes))
        return ff.overlay(images, weights, task.black, task.white)
    return images + task.codebook[label][None]


def local_loss(
    params: Any, config: Config, group: LayerGroup, hyper: HyperParameters, batch_stats: Any, streams: Streams, key: PRNGKeyArray
) -> tuple[Float[Array, ""], tuple[Any, Streams, dict[str, Array]]]:
    """Loss of one group on its input streams; new statistics, detached output streams and metrics as auxiliary output.

    `hyper` are the group's numbers in this step. The configuration says which parts there are: see `config.of_program`.
    """
    check_names(config)
    clean = streams.labels.shape[0]
    features, batch_stats = group.features(params, batch_stats, streams.rows, clean, True)
    out = streams._replace(rows=features)
    seen = _pooled(config, group.head_grid, features)

    # All rows through the head, the copies' scores dropped: cutting the small scores is cheaper than cutting the feature map.
    logits = group.logits(params, _read_by_head(config, group, hyper, seen))[:clean]
    head_loss = head_cross_entropy(logits, streams.labels, hyper.label_smoothing)

    if config.rule == "head" or group.frozen:
        local = jnp.zeros((), jnp.float32)
    else:
        own = streams._replace(rows=seen)
        local = _forward_forward(config, hyper, out) if config.rule == "ff" else _cscl(config, hyper, own, key, logits)
    metrics = {"loss": local + head_loss, "local_loss": local, "head_loss": head_loss, "log_p": jax.nn.log_softmax(logits)}
    out, metrics = jax.lax.stop_gradient((out, metrics))
    return local + head_loss, (batch_stats, out, metrics)


def _read_by_head(config: Config, group: LayerGroup, hyper: HyperParameters, seen: Array) -> Array:
    """What the head reads, with the share of its gradient that trains the layers."""
    if group.frozen or config.rule == "ff" or (config.rule == "vff" and config.head_weight == 0):
        return jax.lax.stop_gradient(seen)
    return seen if config.rule == "head" else scale_gradient(seen, hyper.head_weight)


def _pooled(config: Config, head_grid: int, features: Array) -> Array:
    """What the head and the cosine read: means over the head's cells, where the cosine's cells are made of whole ones; else the map.

    Both pool further by themselves and get the same numbers, and the feature map is read, and its gradient written, once.
    """
    cells = chosen("similarity", config.similarity, {"grid": 2, "pooled": 1, "position": None, "flat": None})
    if config.rule != "vff" or features.ndim != 4 or not cells or head_grid % cells:
        return features
    if any(side % head_grid for side in features.shape[1:3]):
        return features
    return mean_pool_to_grid(features.astype(jnp.float32), head_grid)


def _forward_forward(config: Config, hyper: HyperParameters, streams: Streams) -> Array:
    half = streams.labels.shape[0]
    positive, negative = streams.copies[:half], streams.copies[half:]
    peer = None if config.peer_normalisation == 0 else hyper.peer_normalisation
    return ff.forward_forward(positive, negative, hyper.goodness_threshold, peer)


def _cscl(config: Config, hyper: HyperParameters, streams: Streams, key: PRNGKeyArray, logits: Array) -> Array:
    embedded = streams._replace(rows=embed(streams.rows, config.similarity))
    anchors, copies = embedded.clean, embedded.copies
    margin, temperature = hyper.margin, hyper.temperature
    if config.resolved_contrast == "in_batch":
        per_anchor = jax.vmap(vff.cscl_in_batch, in_axes=(0, 0, None, None, None, None))
        return jnp.mean(per_anchor(anchors, streams.labels, copies, streams.copy_labels, margin, temperature))
    triplet = jax.vmap(vff.cscl_triplet, in_axes=(0, 0, 0, None, None))
    half = streams.labels.shape[0]
    if config.labelling == "triplet":
        return jnp.mean(triplet(anchors, copies[:half], copies[half:], margin, temperature))
    # Shared copies: the mean embedding of a class's copies stands for its copy, since cosines are linear in it.
    hard = jax.lax.stop_gradient(logits) if config.negatives == "hard" else None
    wrong = labelling.wrong_labels(key, streams.labels, logits.shape[1], hard)
    means = copies.reshape(config.copies_per_class, -1, copies.shape[1]).mean(axis=0)
    return jnp.mean(triplet(anchors, means[streams.labels], means[wrong], margin, temperature))


def head_cross_entropy(logits: Float[Array, "batch classes"], labels: Int[Array, " batch"], smoothing: Scalar = 0.0) -> Float[Array, ""]:
    """Mean cross-entropy of one group's head, labels smoothed towards uniform by `smoothing`."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    right = jnp.take_along_axis(log_p, labels[:, None], axis=1)[:, 0]
    return -jnp.mean((1 - smoothing) * right + smoothing * jnp.mean(log_p, axis=1))


@jax.custom_vjp
def scale_gradient(x: Array, scale: Scalar) -> Array:
    """`x` itself, whose gradient is multiplied by `scale`. A gradient that must not pass at all is cut by `stop_gradient` instead."""
    return x


scale_gradient.defvjp(lambda x, scale: (x, scale), lambda scale, g: (g * jnp.asarray(scale, g.dtype), None))
