"""cwc: goodness by channel groups of classes (Papachristodoulou et al., 2024, arXiv:2312.12668, "channel-wise competitive").

The channels of a group's features are cut into one set for each class. The goodness of a class is the mean squared activity of its set,
and the loss is the cross-entropy of the softmax over these. There are no negative images: classes compete by channels. The goodness also
scores the classes (`config.inference = "rule"`). The head of the group only reads.

We differ in the network: the layers are those of `config.network`, where the paper alternates full convolutions with convolutions within
each class's channels (its CFSE blocks), and all groups train on each batch, or in turn by `config.schedule`. Our reading: where the
channels cannot be shared out evenly, sets differ by one channel; `config.label_smoothing` acts here too. The mean of the voting groups'
log-probabilities ranks the classes as their mean goodness does.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vffjax.config import Config
from vffjax.errors import bad_key
from vffjax.hyperparameters import Scalar
from vffjax.ops.channel_sets import means
from vffjax.rules.local import Metrics, NoOptions, Rule, Seen, head_cross_entropy


def goodness(features: Float[Array, "batch *feature"], classes: int) -> Float[Array, "batch classes"]:
    """Of each class the mean squared activity over positions and over the channels of its set."""
    return means(jnp.square(features.astype(jnp.float32)), classes)


def competing(goodness: Callable[[Array, int], Float[Array, "batch classes"]]) -> dict[str, Any]:
    """The fields `loss` and `scores` of a rule whose classes compete by a goodness, which takes features and the number of classes.

    The loss is the cross-entropy of the clean images' goodness. Its own metric is the mean goodness of the right class. The scores are the
    goodness as log-probabilities.
    """

    def scores(options: NoOptions, features: Array, params: dict[str, Array], classes: int) -> Float[Array, "batch classes"]:
        return jax.nn.log_softmax(goodness(features, classes))

    def loss(seen: Seen) -> tuple[Scalar, Metrics]:
        found, labels = goodness(seen.made.clean, seen.logits.shape[1]), seen.made.labels
        right = jnp.take_along_axis(found, labels[:, None], axis=1)
        return head_cross_entropy(found, labels, seen.hyper.label_smoothing, seen.made.mixture), {"right_goodness": jnp.mean(right)}

    return {"loss": loss, "scores": scores}


def check_data(config: Config, image_shape: tuple[int, int, int], classes: int, widths: tuple[int, ...]) -> None:
    """Raises `UserError` if a group has fewer channels than there are classes."""
    if min(widths) < classes:
        problem = f"a group of {min(widths)} channels has none for some of {classes} classes"
        raise bad_key("rule", config.rule, problem, "use wider layers, or another rule")


RULE = Rule(**competing(goodness), check_data=check_data)
