"""FF, the forward-forward rule (Hinton, 2022, arXiv:2212.13345): labels in the first pixels, goodness of activity."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vffjax.config import Config
from vffjax.errors import bad_key, chosen
from vffjax.hyperparameters import Scalar
from vffjax.rules.local import Metrics, Rule, Seen
from vffjax.rules.streams import Step, Streams, Task, wrong_labels


def streams(step: Step) -> Streams:
    """Clean: the neutral label. Copies: all images with the right label, then all with a wrong one."""
    wrong = wrong_labels(step.key, step.labels, step.task.classes, step.logits)
    return overlay_streams(step.images, step.labels, wrong, step.task.classes, step.task.black, step.task.white)


def loss(seen: Seen) -> tuple[Scalar, Metrics]:
    """Hinton's objective on the group's features. It has no metrics of its own."""
    half = seen.made.labels.shape[0]
    positive, negative = seen.made.copies[:half], seen.made.copies[half:]
    peer = None if seen.config.peer_normalisation == 0 else seen.hyper.peer_normalisation
    return forward_forward(positive, negative, seen.hyper.goodness_threshold, peer), {}


def shown(task: Task, images: Float[Array, "batch h w c"]) -> Float[Array, "batch h w c"]:
    """Images with the neutral label in the pixels that a label overwrites."""
    return neutral(images, task.classes, task.black, task.white)


def told(task: Task, images: Float[Array, "batch h w c"], label: Int[Array, ""]) -> Float[Array, "batch h w c"]:
    """Images that all carry one label in their first pixels."""
    weights = jnp.broadcast_to(jax.nn.one_hot(label, task.classes, dtype=jnp.float32), (images.shape[0], task.classes))
    return overlay(images, weights, task.black, task.white)


def check_data(config: Config, image_shape: tuple[int, int, int], classes: int, widths: tuple[int, ...]) -> None:
    """Raises `UserError` if the label's pixels take more than half of the image, which would leave little to see, or would be blurred."""
    if classes > image_shape[0] * image_shape[1] // 2:
        raise bad_key("rule", config.rule, f"{classes} label pixels do not fit {image_shape[:2]} images", "use another rule")
    if 0 < config.image_size < max(image_shape[:2]):
        problem = (
            f"the network would make images of {image_shape[0]}x{image_shape[1]} pixels smaller, and blur the pixels that tell the label"
        )
        raise bad_key("image_size", config.image_size, problem, f"use 0 or at least {max(image_shape[:2])}, or another rule")


def _check(config: Config) -> None:
    if config.norm not in ("auto", RULE.norm):
        problem = f"rule {config.rule} measures goodness on features that no statistic has rescaled"
        raise bad_key("norm", config.norm, problem, f"use norm=auto or norm={RULE.norm}")


def goodness(features: Float[Array, "batch *feature"]) -> Float[Array, " batch"]:
    """Forward-forward goodness (Hinton, 2022): the mean squared activity. The sum of squares is this times the number of units."""
    z = features.astype(jnp.float32)
    return jnp.mean(z * z, axis=tuple(range(1, z.ndim)))


def forward_forward(
    positive: Float[Array, "batch *feature"], negative: Float[Array, "batch *feature"], threshold: Scalar, peer_weight: Scalar | None = None
) -> Float[Array, ""]:
    """Hinton's objective: each image is positive with log-odds `sum of squares - threshold * units`; plus peer normalisation.

    The log-odds are those of the sum over channels, averaged over positions, so that a large map does not saturate them. Peer
    normalisation is `peer_weight` times the mean squared distance of each unit's mean activity from the mean of all units; None: without.
    """
    channels = positive.shape[-1]
    odds_positive = channels * (goodness(positive) - threshold)
    odds_negative = channels * (goodness(negative) - threshold)
    loss = jnp.mean(jax.nn.softplus(-odds_positive)) + jnp.mean(jax.nn.softplus(odds_negative))
    if peer_weight is not None:
        units = jnp.mean(positive.astype(jnp.float32), axis=tuple(range(positive.ndim - 1)))
        loss += peer_weight * jnp.mean((units - units.mean()) ** 2)
    return loss


def overlay(
    images: Float[Array, "batch h w c"],
    weights: Float[Array, "batch classes"],
    low: Float[Array, " c"],
    high: Float[Array, " c"],
) -> Float[Array, "batch h w c"]:
    """Forward-forward labels (Hinton, 2022): the first pixels, row by row, one per class, become `low + weight (high - low)`.

    `low` and `high` are black and white in normalised units. One-hot weights say a label, equal weights say nothing.
    """
    n, h, w, c = images.shape
    pixels = images.reshape(n, h * w, c)
    low, high = low.reshape(1, 1, c), high.reshape(1, 1, c)
    label = low + weights[:, :, None] * (high - low)
    return pixels.at[:, : weights.shape[1]].set(label.astype(images.dtype)).reshape(n, h, w, c)


def overlay_streams(
    images: Float[Array, "batch h w c"],
    labels: Int[Array, " batch"],
    wrong: Int[Array, " batch"],
    classes: int,
    low: Float[Array, " c"],
    high: Float[Array, " c"],
) -> Streams:
    """Clean: neutral label. Copies: all images with the right label, then all with a wrong one."""
    copy_labels = jnp.concatenate([labels, wrong])
    copies = overlay(jnp.concatenate([images, images]), jax.nn.one_hot(copy_labels, classes, dtype=jnp.float32), low, high)
    return Streams(jnp.concatenate([neutral(images, classes, low, high), copies]), labels, copy_labels)


def neutral(
    images: Float[Array, "batch h w c"], classes: int, low: Float[Array, " c"], high: Float[Array, " c"]
) -> Float[Array, "batch h w c"]:
    """The overlay that says nothing: every class with weight 1 / classes."""
    return overlay(images, jnp.full((images.shape[0], classes), 1 / classes, jnp.float32), low, high)


RULE = Rule(
    streams=streams,
    loss=loss,
    labelled_rows=lambda config, classes: 2 * config.batch_size,
    predicts=lambda config: chosen("negatives", config.negatives, {"hard": True, "uniform": False}),
    shown=shown,
    told=told,
    fits=lambda config, clean, told, params: goodness(told),
    norm="input",
    check=_check,
    check_data=check_data,
)
