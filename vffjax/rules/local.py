"""What all local rules share: the record that a rule is, and the loss of one group. Nothing here sees another group."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vffjax.config import Config
from vffjax.hyperparameters import HyperParameters, Scalar
from vffjax.networks.groups import Head, LayerGroup
from vffjax.ops.normalisation import Parts
from vffjax.ops.pooling import mean_pool_to_grid
from vffjax.rules.streams import Mixture, Step, Streams, Task, clean_only

Metrics = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """The options of a rule that has no configuration keys of its own."""


class Seen(NamedTuple):
    """What a rule's loss may look at: one group in one step."""

    config: Config  # as this group has it: overrides are applied
    options: Any  # the rule's own keys, an instance of `Rule.options`
    hyper: HyperParameters  # the group's numbers in this step, scalars
    group: int  # its index, from 0 at the input
    given: Streams  # the group's input
    made: Streams  # its output, through which the loss is differentiated; mean-pooled where `Rule.cells` allows
    logits: Float[Array, "batch classes"]  # the head's scores of the clean rows
    params: Any  # the rule's own parameters in this group, or {}
    key: Any  # for what the loss draws


class Setting(NamedTuple):
    """By what one group trains in one step."""

    rule: "Rule"
    config: Config  # as the group has it
    hyper: HyperParameters  # scalars
    key: Any


@dataclasses.dataclass(frozen=True)
class Rule:
    """A local rule: how images are told their labels, and what one group learns from them. All functions are pure.

    The head of a group learns from its cross-entropy under every rule. The rule says what else there is, and whether the head's gradient
    trains the layers too.

    Attributes:
        streams: makes a step's clean and labelled rows.
        draws: what `streams` draws, from the configuration, the number of classes, that of images in a batch, and the step's key. A segment
            draws it for all of its steps at once, so that each step has less to launch on a GPU; on CPU each step draws. `Step.drawn` has
            it. None: nothing.
        loss: the local loss of a group, and metrics of the rule's own, scalars by name; None: the head's loss alone.
        head_share: the factor on the head's gradient that trains the layers. A Python 0 cuts it, which the locality certificate can see;
            a Python 1 leaves it as it is.
        cells: the side, in cells, of the grid to which the loss itself pools a feature map; None: it reads the whole map. Where each of
            these cells consists of whole cells of the head's grid, the loss may be given the means over the head's cells. If it pools
            these further, it gets the same numbers.
        labelled_rows: how many labelled rows a step has, for a configuration and a number of classes.
        predicts: whether `streams` needs the heads' predictions, which cost one more clean pass.
        shown: an image as the clean stream shows it to a head.
        told: images that all carry one label, for the sweep and for pictures; None: the rule has no such images.
        fits: how well a label fits, from the configuration, features of the clean images, features of the same images told the label, and
            the rule's parameters in the group; None: there is no sweep.
        scores: the rule's own log-probabilities of the classes, from the options, the clean features of a group, the rule's parameters
            there, and the number of classes; None: it has none.
        parameters: the rule's own parameters in a group, from the options, the shape of one row of features, the classes and a key.
        owns_copies: whether labelled rows pass these parameters too, and not the clean rows alone. The count of operations asks for it; it
            takes a parameter of two axes for a product once a row, and one of four axes for a convolution at each position.
        options: a frozen dataclass of the rule's own keys, `config.rule_options.KEY`, declared by `keys.key`.
        norm: what `config.norm = "auto"` means.
        codebook: whether labels are told by the class noise of the codebook, which pictures then show.
        check: raises `UserError` if the configuration does not suit the rule.
        check_data: the same for the shape of an image, the number of classes and the widths of the groups.
    """

    streams: Callable[[Step], Streams] = clean_only
    draws: Callable[[Config, int, int, Any], Any] | None = None
    loss: Callable[[Seen], tuple[Scalar, Metrics]] | None = None
    head_share: Callable[[Config, HyperParameters], Scalar] = lambda config, hyper: 0
    cells: Callable[[Config], int | None] = lambda config: None
    labelled_rows: Callable[[Config, int], int] = lambda config, classes: 0
    predicts: Callable[[Config], bool] = lambda config: False
    shown: Callable[[Task, Array], Array] = lambda task, images: images
    told: Callable[[Task, Array, Int[Array, ""]], Array] | None = None
    fits: Callable[[Config, Array, Array, Any], Float[Array, " batch"]] | None = None
    scores: Callable[[Any, Array, Any, int], Float[Array, "batch classes"]] | None = None
    parameters: Callable[[Any, tuple[int, ...], int, Any], Any] | None = None
    owns_copies: bool = False
    options: type = NoOptions
    norm: str = "batch"
    codebook: bool = False
    check: Callable[[Config], None] = lambda config: None
    check_data: Callable[[Config, tuple[int, int, int], int, tuple[int, ...]], None] = lambda config, image_shape, classes, widths: None

    def cannot_score_by(self, inference: str) -> str:
        """Why the rule cannot score classes by a kind of inference (see `config.inference`); empty if it can."""
        if inference == "sweep" and (self.told is None or self.fits is None):
            return "never sees a labelled image"
        if inference == "rule" and self.scores is None:
            return "has no scores of its own"
        return ""

    def options_of(self, config: Config) -> Any:
        """The rule's own keys as a configuration that was checked has them."""
        return self.options(**config.rule_options)


def by_head_weight(config: Config, hyper: HyperParameters) -> Scalar:
    """A `Rule.head_share`: config.head_weight."""
    return 0 if config.head_weight == 0 else hyper.head_weight


def local_loss(
    params: Any, setting: Setting, group: LayerGroup, batch_stats: Any, streams: Streams
) -> tuple[Float[Array, ""], tuple[Any, Streams, Metrics]]:
    """The loss of one group on its input streams.

    Args:
        params: the group's own parameters, in which the loss is differentiated.
        setting: the rule, and the group's configuration, numbers and key.
        group: the group's functions.
        batch_stats: its running statistics.
        streams: its input.

    Returns:
        The loss; and as auxiliary output the new statistics, the output streams and the metrics, both detached.
    """
    rule, config, hyper, key = setting
    loss = rule.loss
    clean = streams.labels.shape[0]
    parts = Parts(clean, streams.real_rows - clean) if streams.padded else clean
    features, batch_stats = group.features(params, batch_stats, streams.rows, parts, True)
    made = streams._replace(rows=_pooled(rule.cells(config), group.head, features)).without_padding()
    seen = made.rows

    # The head reads clean rows only. If it is linear, all rows pass through it, because cutting the scores is cheaper than cutting the map.
    share = 0 if group.frozen else rule.head_share(config, hyper)
    read = seen[:clean] if group.head.auxiliary else seen
    logits = group.logits(params, _with_share(read, share))[:clean]
    head_loss = head_cross_entropy(logits, streams.labels, hyper.label_smoothing, streams.mixture)

    local: Any = jnp.zeros((), jnp.float32)
    own: Metrics = {}
    if loss is not None:
        options, own_params = rule.options_of(config), params.get("rule", {})
        given = Seen(config, options, hyper, group.index, streams.without_padding(), made, logits, own_params, key)
        if group.frozen:
            own = {name: jnp.zeros(metric.shape, metric.dtype) for name, metric in jax.eval_shape(lambda: loss(given)[1]).items()}
        else:
            local, own = loss(given)
    metrics = {"loss": local + head_loss, "local_loss": local, "head_loss": head_loss, "log_p": jax.nn.log_softmax(logits)} | own
    out, metrics = jax.lax.stop_gradient((streams._replace(rows=features), metrics))
    return local + head_loss, (batch_stats, out, metrics)


def _with_share(seen: Array, share: Scalar) -> Array:
    if isinstance(share, (int, float)) and share in (0, 1):
        return seen if share else jax.lax.stop_gradient(seen)
    return scale_gradient(seen, share)


def _pooled(cells: int | None, head: Head, features: Array) -> Array:
    """What the head and the loss read: means over the head's cells, where the loss's `cells` are made of whole ones; else the map.

    Both pool further by themselves and get the same numbers, and the feature map is read, and its gradient written, once.
    """
    if features.ndim != 4 or not cells or head.grid % cells or head.auxiliary:
        return features
    if any(side % head.grid for side in features.shape[1:3]):
        return features
    return mean_pool_to_grid(features, head.grid)


def head_cross_entropy(
    logits: Float[Array, "batch classes"], labels: Int[Array, " batch"], smoothing: Scalar = 0.0, mixture: Mixture | None = None
) -> Float[Array, ""]:
    """Mean cross-entropy of one group's head, labels smoothed towards uniform by `smoothing`.

    If images are mixed, it is the mean of the cross-entropies for both labels, each weighted by the share of its image.
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    right = _at(log_p, labels)
    if mixture is not None:
        smaller = _at(log_p, mixture.labels)
        right = mixture.share * right + (1 - mixture.share) * smaller
    return -jnp.mean((1 - smoothing) * right + smoothing * jnp.mean(log_p, axis=1))


def _at(log_p: Float[Array, "batch classes"], labels: Int[Array, " batch"]) -> Float[Array, " batch"]:
    """The entry of each row at its label. An index would give the same, but its gradient is a scatter, which is slow on accelerators."""
    here = labels[:, None] == np.arange(log_p.shape[1], dtype=labels.dtype)[None]  # a constant
    return jnp.where(here, log_p, 0.0).sum(1)


@jax.custom_vjp
def scale_gradient(x: Array, scale: Scalar) -> Array:
    """`x` itself, whose gradient is multiplied by `scale`. A gradient that must not pass at all is cut by `stop_gradient` instead."""
    return x


scale_gradient.defvjp(lambda x, scale: (x, scale), lambda scale, g: (g * jnp.asarray(scale, g.dtype), None))
