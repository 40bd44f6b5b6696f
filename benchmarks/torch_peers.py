"""The same networks trained by PyTorch, as a comparison for the trainer. They are written as a PyTorch user would write them for speed.

There are two kinds: back-propagation (`rule=head`, `grouping=all`), and VFF in its plain form, in which anchors, positives and negatives
pass through each group one after the other. Convolutions are NCHW in channels_last memory, images lie on the device as bytes, and no step
waits for the host. Parameters are float32. `precision=bf16` means autocast of everything including the heads, whereas `vffjax` computes its
heads in float32. In float32 the defaults of PyTorch hold: GPUs that have TF32 use it for convolutions but not for matrix products.

Eager VFF updates each group before the next one begins, and so keeps the feature maps of one group at a time. Compiled VFF is one graph of
all groups, each with detached inputs. This gives the same gradients and lets the compiler fuse more.

Batch normalisation differs from ours in two points that cost no time: PyTorch's running variance is the unbiased one, and each of the three
streams is normalised by its own statistics, whereas `vffjax` takes both labelled copies as one stream.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keys import PEER
from torch_networks import Group, build_network, load_from_jax
from vffjax.config import Config, for_group
from vffjax.errors import chosen
from vffjax.networks.groups import GroupState
from vffjax.rules.similarity import EPSILON as LEAST_SQUARED_NORM
from vffjax.rules.streams import Task
from vffjax.training.plan import Plan

IMPLEMENTATIONS = ("fused", "foreach")  # in torch.optim; which one is faster depends on the device and the network


def augment(images: Tensor, config: Config, mirrored: Tensor | None = None) -> Tensor:
    """Randomly mirrored and shifted views of images, bytes [batch, h, w, c]. Each image has its own draw.

    `mirrored`, [batch], says which images are mirrored, in place of a draw.
    """
    n, device = images.shape[0], images.device
    if not config.flip and not config.crop_padding:
        return images
    if mirrored is None:
        mirrored = torch.rand(n, device=device) < (0.5 if config.flip else 0.0)
    starts = torch.randint(0, 2 * config.crop_padding + 1, (2, n), device=device)
    return take_views(images, mirrored, starts, config.crop_padding)


def take_views(images: Tensor, mirrored: Tensor, starts: Tensor, padding: int) -> Tensor:
    """Mirrors, pads and crops images in one gather of whole pixels, which takes a third of the time of two indexed steps on CPU.

    Args:
        images: [n, h, w, c].
        mirrored: [n], whether to mirror each image left to right.
        starts: [2, n], the row and the column in the padded image where each crop begins.
        padding: pixels of black on each side.
    """
    n, h, w, c = images.shape
    height, width = h + 2 * padding, w + 2 * padding
    number, row, column = (torch.arange(size, device=images.device) for size in (n, h, w))
    rows, columns = starts[0][:, None] + row, starts[1][:, None] + column
    # To mirror an image before it is padded is the same as to read the padded image from its other end.
    columns = torch.where(mirrored[:, None], width - 1 - columns, columns)
    pixels = (number[:, None, None] * height + rows[:, :, None]) * width + columns[:, None, :]
    padded = F.pad(images, (0, 0, padding, padding, padding, padding))
    return padded.reshape(-1, c).index_select(0, pixels.flatten()).reshape(n, h, w, c)


def cut_out(x: Tensor, side: int) -> Tensor:
    """Sets one random square of `side` pixels in each normalised image [batch, c, h, w] to 0."""
    n, _, h, w = x.shape
    inside = torch.ones((), dtype=torch.bool, device=x.device)
    for size, shape in ((h, (1, h, 1)), (w, (1, 1, w))):
        middle = (torch.arange(size, device=x.device) + 0.5).reshape(shape)
        inside = inside & ((middle - size * torch.rand(n, 1, 1, device=x.device)).abs() < side / 2)
    return x.masked_fill(inside[:, None], 0.0)


def embed(features: Tensor, similarity: str) -> Tensor:
    """Float32 vectors [batch, d] whose dot products are the cosines of feature maps that `config.similarity` names."""
    z, least = features.float(), LEAST_SQUARED_NORM**0.5
    cells = chosen("similarity", similarity, {"grid": 2, "pooled": 1, "position": None, "flat": None})
    if z.ndim == 4 and similarity == "position":
        return F.normalize(z, dim=1, eps=least).flatten(1) / math.sqrt(z.shape[2] * z.shape[3])
    if z.ndim == 4 and cells:
        z = F.adaptive_avg_pool2d(z, (min(cells, z.shape[2]), min(cells, z.shape[3])))
    return F.normalize(z.flatten(1), dim=1, eps=least)


def cscl_triplet(anchors: Tensor, positives: Tensor, negatives: Tensor, config: Config) -> Tensor:
    """CSCL, the mean over the batch of `tau softplus((s(a, n) - s(a, p) + m) / tau)` for the maps of anchors, positives and negatives."""
    a, p, n = (embed(z, config.similarity) for z in (anchors, positives, negatives))
    difference = (a * (n - p)).sum(1)
    return config.temperature * F.softplus((difference + config.margin) / config.temperature).mean()


def head_loss(config: Config, group: Group, features: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of a group's head on its feature maps, with `config.label_smoothing`."""
    return F.cross_entropy(group.logits(features), labels, label_smoothing=config.label_smoothing)


def three_stream_loss(config: Config, group: Group, streams: Iterable[Tensor], labels: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss of one group in VFF.

    Args:
        config: the configuration as the group has it.
        group: the group.
        streams: its inputs: anchors, positives and negatives.
        labels: [batch], the labels of the anchors.

    Returns:
        The sum of CSCL and the head's loss, and the feature maps of the three streams.
    """
    anchors, positives, negatives = (group.features(z) for z in streams)
    share = config.head_weight
    if share == 0:
        read = anchors.detach()
    else:
        read = anchors if share == 1 else share * anchors + (1 - share) * anchors.detach()
    loss = cscl_triplet(anchors, positives, negatives, config) + head_loss(config, group, read, labels)
    return loss, (anchors, positives, negatives)


class GroupOptimizer:
    """The optimizer of one group, as `vffjax.training.optimizers.make_optimizer` defines it.

    It has a linear warm-up, decay along a cosine or a line, decoupled weight decay of the kernels, another rate for the biases of layers,
    and clipping by the gradient's norm.
    """

    def __init__(self, config: Config, module: nn.Module, steps_per_epoch: int, implementation: str):
        learning = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._params = list(learning.values())
        self._kernels: list[Tensor] = [p for p in self._params if p.ndim > 1]
        biases = [p for name, p in learning.items() if name.startswith("layers.") and name.endswith(".bias")]
        apart = {id(p) for p in self._kernels + biases}
        rest = [p for p in self._params if id(p) not in apart]
        own_rate: dict[str, Any] = {"params": biases, "lr": config.learning_rate * config.bias_rate}
        self._clip_norm = config.clip_norm
        # The weight decay of torch.optim.SGD is a part of the gradient, which momentum averages, so ours is applied apart.
        self._decay_apart = chosen("optimizer", config.optimizer, {"sgd": config.weight_decay, "adamw": 0.0})
        options: Any = {"lr": config.learning_rate, implementation: True}
        self._optimizer: torch.optim.Optimizer
        if config.optimizer == "adamw":
            decayed: dict[str, Any] = {"params": self._kernels, "weight_decay": config.weight_decay}
            kept: dict[str, Any] = {"weight_decay": 0.0}
            self._optimizer = torch.optim.AdamW([decayed, own_rate | kept, {"params": rest} | kept], **options)
        else:
            momentum = config.momentum
            parts: list[dict[str, Any]] = [{"params": self._kernels}, own_rate, {"params": rest}]
            self._optimizer = torch.optim.SGD(parts, momentum=momentum, nesterov=momentum > 0, **options)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, _share_of_rate(config, steps_per_epoch))

    def step(self) -> None:
        """Makes one update with the accumulated gradients, and then drops them."""
        if self._clip_norm > 0:
            nn.utils.clip_grad_norm_(self._params, self._clip_norm)
        if self._decay_apart > 0:
            with torch.no_grad():
                torch._foreach_mul_(self._kernels, 1 - self._optimizer.param_groups[0]["lr"] * self._decay_apart)
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad(set_to_none=True)


def _share_of_rate(config: Config, steps_per_epoch: int) -> Callable[[int], float]:
    """A function from the number of a step, from 0, to its learning rate as a fraction of the peak."""
    total = config.epochs * steps_per_epoch
    warmup = min(round(config.warmup_epochs * steps_per_epoch), total - 1)

    def share(step: int) -> float:
        if step < warmup:
            return step / warmup
        done = min(1.0, (step - warmup) / (total - warmup))
        return chosen("decay", config.decay, {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done})

    return share


class Peer:
    """A network in training by PyTorch: by back-propagation if the rule is the head's loss alone, else by three-stream VFF.

    Args:
        plan: the plan of the same run in `vffjax`.
        task: its codebook and pixel statistics.
        states: our states, from which the network starts.
        device: `cpu` or `cuda`.
        compile_mode: the mode of `torch.compile`, which then takes augmentation, network and losses of all groups as one graph; or None.

    Raises:
        UserError: the peer would not obey a key of the configuration; see `keys.PEER`.
    """

    def __init__(self, plan: Plan, task: Task, states: Sequence[GroupState], device: str, compile_mode: str | None = None):
        PEER.check(plan.config)
        torch.manual_seed(plan.config.seed)
        torch.backends.cudnn.benchmark = True
        self._plan, self._config, self._device = plan, plan.config, device
        self.network = build_network(plan.groups, task.codebook.shape[1:], task.classes)
        self.load(states)
        place: Any = {"device": device, "memory_format": torch.channels_last}
        for group in self.network:
            group.to(**place)
        mean, std, codebook = (torch.from_numpy(np.array(a)).to(device) for a in (task.mean, task.std, task.codebook))
        self._scale, self._shift = (1 / (255 * std)).reshape(1, -1, 1, 1), (mean / std).reshape(1, -1, 1, 1)
        self._codebook = codebook.permute(0, 3, 1, 2)  # in channels_last memory, like the images
        self._mirrored: Tensor | None = None
        self._back_propagates = plan.rule.loss is None
        self._whole_loss = None if compile_mode is None else torch.compile(self._whole(), mode=compile_mode)
        self.use_optimizers(IMPLEMENTATIONS[0])

    def load(self, states: Sequence[GroupState]) -> None:
        """Sets all parameters and running statistics to those of our states."""
        load_from_jax(self.network, [s.params for s in states], [s.batch_stats for s in states])

    @torch.no_grad()
    def classes(self, images: Tensor, batch: int) -> Tensor:
        """The classes [n] that back-propagation's network finds in images, bytes [n, h, w, c], by its running statistics."""
        group = self.network[0].eval()
        found = [group.logits(group.features(self._normalised(part))).argmax(1) for part in images.split(batch)]
        group.train()
        return torch.cat(found)

    def _normalised(self, images: Tensor) -> Tensor:
        return images.permute(0, 3, 1, 2).float() * self._scale - self._shift

    def _whole(self) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
        """The loss of all groups as one function. `PEER` accepts only these two rules."""
        return self._back_propagated_loss if self._back_propagates else self._sum_of_losses

    def use_optimizers(self, implementation: str) -> None:
        """Gives each group a new optimizer, in one of the `IMPLEMENTATIONS`."""
        last = len(self.network) - 1
        self.optimizers = [
            GroupOptimizer(for_group(self._config, i, last - i), group, self._plan.steps_per_epoch, implementation)
            for i, group in enumerate(self.network)
        ]

    def epoch(self, images: Tensor, labels: Tensor) -> Tensor:
        """Trains one epoch on images, bytes [n, h, w, c], and labels [n] in random order. Returns the mean loss, still on the device."""
        steps, batch = self._plan.steps_per_epoch, self._config.batch_size
        order = torch.randperm(len(labels), device=self._device)[: steps * batch].reshape(steps, batch)
        total, mirrored = torch.zeros((), device=self._device), self.mirrored_next(len(labels))
        for rows in order:
            total += self.step(images[rows], labels[rows], None if mirrored is None else mirrored[rows])
        return total / steps

    def mirrored_next(self, n: int) -> Tensor | None:
        """Which of n images the next epoch mirrors, [n]: with `config.alternating_flip` those that the last one did not.

        Chance decides in the first epoch, as K. Jordan has it (2024, arXiv:2404.00498). Without that key the steps draw for themselves, and
        this is None.
        """
        if not self._config.alternating_flip:
            return None
        before = self._mirrored
        self._mirrored = torch.rand(n, device=self._device) < 0.5 if before is None or len(before) != n else ~before
        return self._mirrored

    def step(self, images: Tensor, labels: Tensor, mirrored: Tensor | None = None) -> Tensor:
        """Updates every group once on one batch, and returns the sum of their losses, still on the device.

        `mirrored`, [batch], says which images are mirrored, in place of a draw. A compiled peer may overwrite the returned tensor in its
        next step.
        """
        if self._whole_loss is None and not self._back_propagates:
            return self._three_stream_step(images, labels, mirrored)
        loss = (self._whole_loss or self._back_propagated_loss)(images, labels, mirrored)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss.detach()

    def prepare(self, images: Tensor, mirrored: Tensor | None = None) -> Tensor:
        """Augments and normalises bytes [batch, h, w, c] to float32 [batch, c, h, w] in channels_last memory."""
        x = self._normalised(augment(images, self._config, mirrored))
        return cut_out(x, self._config.cutout) if self._config.cutout else x

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device, torch.bfloat16, enabled=self._config.precision == "bf16")

    def _back_propagated_loss(self, images: Tensor, labels: Tensor, mirrored: Tensor | None) -> Tensor:
        with self._autocast():
            group = self.network[0]
            return head_loss(self._config, group, group.features(self.prepare(images, mirrored)), labels)

    def _streams(self, images: Tensor, labels: Tensor, mirrored: Tensor | None) -> tuple[Tensor, ...]:
        """The anchors, their copies with the right label, and their copies with a wrong label."""
        x, classes = self.prepare(images, mirrored), len(self._codebook)
        wrong = (labels + torch.randint(1, classes, labels.shape, device=self._device)) % classes
        return x, x + self._codebook[labels], x + self._codebook[wrong]

    def _sum_of_losses(self, images: Tensor, labels: Tensor, mirrored: Tensor | None) -> Tensor:
        """The sum of all groups' losses. Inputs are detached, so each group's gradient of the sum is that of its own loss."""
        streams, total = self._streams(images, labels, mirrored), torch.zeros((), device=self._device)
        for i, group in enumerate(self.network):
            with self._autocast():
                loss, features = three_stream_loss(for_group(self._config, i), group, streams, labels)
            streams = tuple(z.detach() for z in features)
            total = total + loss
        return total

    def _three_stream_step(self, images: Tensor, labels: Tensor, mirrored: Tensor | None) -> Tensor:
        """Updates each group before the next one begins, so that the maps of one group are alive at a time."""
        streams, total = self._streams(images, labels, mirrored), torch.zeros((), device=self._device)
        for i, (group, optimizer) in enumerate(zip(self.network, self.optimizers, strict=True)):
            with self._autocast():
                loss, features = three_stream_loss(for_group(self._config, i), group, streams, labels)
            loss.backward()
            optimizer.step()
            streams = tuple(z.detach() for z in features)
            total += loss.detach()
        return total
