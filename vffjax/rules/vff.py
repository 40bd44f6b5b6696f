"""VFF: label-wise noise labelling (LWNL) and the cosine-similarity contrastive loss (CSCL), with a share of the head's loss.

Labels are told by class noise that is added to copies of the images; a clean image's features are drawn towards those of the copies that
carry its label. The paper (Lee, Shin, Kim, Neural Networks 190:107697, 2025) publishes these ideas but no formula; the forms here are our
reading.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from vffjax.config import Config
from vffjax.errors import bad_key, chosen
from vffjax.hyperparameters import Scalar
from vffjax.rules.local import Metrics, Rule, Seen, by_head_weight
from vffjax.rules.similarity import between, cells_of, comparable, dot, embed, unit
from vffjax.rules.streams import Step, Streams, Task, wrong_labels


def streams(step: Step) -> Streams:
    """The clean images, and copies that are told a label: shared by all anchors, or a right and a wrong one of each image."""
    if _is_shared(step.config):
        drawn = draws(step.config, step.task.classes, step.labels.shape[0], step.key) if step.drawn is None else step.drawn
        return lwnl_shared(drawn, step.images, step.labels, step.task.codebook)
    wrong = wrong_labels(step.key, step.labels, step.task.classes, step.logits)
    return lwnl_triplet(step.images, step.labels, wrong, step.task.codebook)


def draws(config: Config, classes: int, batch: int, key: PRNGKeyArray) -> Any:
    """The images that shared copies are made of; None for triplets, which need every image."""
    return drawn_images(key, batch, config.copies_per_class * classes) if _is_shared(config) else None


def loss(seen: Seen) -> tuple[Scalar, Metrics]:
    """CSCL of the group's features. It has no metrics of its own."""
    return contrast(seen, *comparable(seen.made.rows, seen.config.similarity)), {}


def contrast(seen: Seen, vectors: Float[Array, "rows d"], scaled: bool = False) -> Float[Array, ""]:
    """CSCL of vectors, one for each row of `seen.made`, by their cosines; or by their products, if they are scaled already."""
    config = seen.config
    to_anchors, to_copies = chosen(
        "contrast_gradient", config.contrast_gradient, {"both": (True, True), "anchors": (True, False), "copies": (False, True)}
    )
    margin, temperature = seen.hyper.margin, seen.hyper.temperature
    if in_batch(config):
        per_anchor = jax.vmap(cscl_in_batch, in_axes=(0, 0, None, None, None))
        cosines = between(vectors, seen.made.labels.shape[0], scaled, to_anchors, to_copies)
        return jnp.mean(per_anchor(cosines, seen.made.labels, seen.made.copy_labels, margin, temperature))
    made = seen.made._replace(rows=vectors if scaled else unit(vectors))
    anchors = made.clean if to_anchors else jax.lax.stop_gradient(made.clean)
    copies = made.copies if to_copies else jax.lax.stop_gradient(made.copies)
    triplet = jax.vmap(cscl_triplet, in_axes=(0, 0, 0, None, None))
    half = made.labels.shape[0]
    if not _is_shared(config):
        return jnp.mean(triplet(anchors, copies[:half], copies[half:], margin, temperature))
    # Shared copies: the mean embedding of a class's copies stands for its copy, since cosines are linear in it.
    hard = jax.lax.stop_gradient(seen.logits) if _negatives_are_hard(config) else None
    wrong = wrong_labels(seen.key, made.labels, seen.logits.shape[1], hard)
    means = copies.reshape(config.copies_per_class, -1, copies.shape[1]).mean(axis=0)
    return jnp.mean(triplet(anchors, means[made.labels], means[wrong], margin, temperature))


def _is_shared(config: Config) -> bool:
    return chosen("labelling", config.labelling, {"shared": True, "triplet": False})


def _negatives_are_hard(config: Config) -> bool:
    return chosen("negatives", config.negatives, {"hard": True, "uniform": False})


def in_batch(config: Config) -> bool:
    """Whether CSCL compares an anchor with all copies of the batch; else with one right and one wrong copy."""
    return chosen("contrast", config.contrast, {"auto": _is_shared(config), "in_batch": True, "triplet": False})


def _predicts(config: Config) -> bool:
    return _negatives_are_hard(config) and not _is_shared(config)


def _told(task: Task, images: Float[Array, "batch h w c"], label: Int[Array, ""]) -> Float[Array, "batch h w c"]:
    return images + task.codebook[label][None]


def _fits(config: Config, clean: Array, told: Array, params: Any) -> Float[Array, " batch"]:
    return jnp.sum(embed(clean, config.similarity) * embed(told, config.similarity), axis=1)


def _labelled_rows(config: Config, classes: int) -> int:
    return config.copies_per_class * classes if _is_shared(config) else 2 * config.batch_size


def _check(config: Config) -> None:
    if _negatives_are_hard(config) and _is_shared(config) and in_batch(config):
        problem = "every class is a negative already where shared copies are contrasted in the batch"
        raise bad_key("negatives", config.negatives, problem, "use labelling=triplet or contrast=triplet")


def cscl_triplet(
    anchor: Float[Array, " d"], positive: Float[Array, " d"], negative: Float[Array, " d"], margin: Scalar, temperature: Scalar
) -> Float[Array, ""]:
    """CSCL for one anchor of unit length: `tau softplus((s(a, n) - s(a, p) + m) / tau)`."""
    difference = dot(negative - positive, anchor)
    return jnp.multiply(temperature, jax.nn.softplus((difference + margin) / temperature))


def cscl_in_batch(
    cosines: Float[Array, " copies"], label: int | Int[Array, ""], copy_labels: Int[Array, " copies"], margin: Scalar, temperature: Scalar
) -> Float[Array, ""]:
    """CSCL for one anchor against all labelled copies, from cosines: cross-entropy of `(s - m [match]) / tau`, mass on any right copy.

    `-log(sum_{j: match} e_j / sum_j e_j)`, the form of neighbourhood components analysis (Goldberger et al., 2004) on cosines.
    """
    match = copy_labels == label
    scores = (cosines - margin * match.astype(cosines.dtype)) / temperature
    right = jax.nn.logsumexp(jnp.where(match, scores, -jnp.inf))
    return jax.nn.logsumexp(scores) - right


def lwnl_triplet(
    images: Float[Array, "batch h w c"],
    labels: Int[Array, " batch"],
    wrong: Int[Array, " batch"],
    codebook: Float[Array, "classes h w c"],
) -> Streams:
    """The documented three kinds: `x`, then `x + n_y` for all images followed by `x + n_y'` for all."""
    copy_labels = jnp.concatenate([labels, wrong])
    noisy = jnp.concatenate([images, images]) + codebook[copy_labels]
    return Streams(jnp.concatenate([images, noisy]), labels, copy_labels)


def drawn_images(key: PRNGKeyArray, batch: int, copies: int) -> Int[Array, " copies"]:
    """The numbers in the batch of so many images, drawn without replacement as long as they last."""
    return jnp.resize(jax.random.permutation(key, batch), (copies,))


def lwnl_shared(
    drawn: Int[Array, " copies"],
    images: Float[Array, "batch h w c"],
    labels: Int[Array, " batch"],
    codebook: Float[Array, "classes h w c"],
) -> Streams:
    """Equally many copies of every class, `x_j + n_c`, of the images `drawn`, whose number is a multiple of that of the classes.

    Every anchor is compared with all of them, so a copy's image need not be of the class that its noise says: the noise alone
    tells the copies of a class from the others.
    """
    classes = codebook.shape[0]
    of_each = drawn.shape[0] // classes
    copy_labels = jnp.tile(jnp.arange(classes, dtype=labels.dtype), of_each)
    copies = images[drawn] + jnp.tile(codebook, (of_each, 1, 1, 1))
    return Streams(jnp.concatenate([images, copies]), labels, copy_labels)


RULE = Rule(
    streams=streams,
    draws=draws,
    loss=loss,
    head_share=by_head_weight,
    cells=lambda config: cells_of(config.similarity),
    labelled_rows=_labelled_rows,
    predicts=_predicts,
    told=_told,
    fits=_fits,
    codebook=True,
    check=_check,
)
