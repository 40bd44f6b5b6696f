"""deeper_forward: mean goodness by channel sets of classes, and inputs normalised by these sets (Sun et al., ICLR 2025, "DeeperForward").

The channels of a group's features are cut into one set for each class. The goodness of a class is the mean activity of its set, where `cwc`
takes the mean square, and the loss is the cross-entropy of the softmax over these. The input of each layer is normalised by `norm=class`:
each set gets mean 0 and variance 1, so that a layer cannot read the goodness of the one before and has to find features of its own. The
goodness also scores the classes (`config.inference = "rule"`). The head of the group only reads.

The paper gives each layer a loss of its own (`config.grouping = "layer"`) and adds the goodness of the layers from one to another; with
`config.votes = "subset"` the layers that vote are chosen on validation images. We differ in the network, whose layers have a bias and 3x3
kernels and pool maxima after the activation; the paper's small network has no biases, kernels of 5x5 in its first two layers, and pools
means before a layer. Our reading: the mean of log-probabilities ranks the classes as their mean goodness does; where the channels cannot be
shared out evenly, sets differ by one channel. The input of the first layer, whose channels belong to no class, is normalised as one set. So
is the output of a layer with fewer than two channels for each class, because a dense unit alone in its set would be normalised to 0.
"""

import dataclasses

from vffjax.config import Config
from vffjax.errors import bad_key
from vffjax.ops.channel_sets import means
from vffjax.rules import cwc


def _check(config: Config) -> None:
    if config.norm not in ("auto", RULE.norm):
        problem = f"rule {config.rule} needs inputs that carry no goodness of the layer before"
        raise bad_key("norm", config.norm, problem, f"use norm=auto or norm={RULE.norm}")


RULE = dataclasses.replace(cwc.RULE, **cwc.competing(means), norm="class", check=_check)
