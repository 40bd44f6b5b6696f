"""What the trainer is measured against: the same networks trained by PyTorch, written as a PyTorch user would who cares for speed.

Back-propagation (`rule=head`, `grouping=all`), and VFF in its plain form: anchor, positive and negative as three passes through each
group. Convolutions are NCHW in channels_last memory, images lie on the device as bytes, and no step waits for the host. Parameters are
float32; `precision=bf16` is autocast, heads included, where `vffjax` computes its heads in float32. In float32 PyTorch's defaults stand:
on GPUs that have it, TF32 for convolutions and not ("highest") for matrix products.

Eager VFF updates a group before the next one begins, and so keeps one group's maps at a time. Compiled VFF is one graph of all groups, each
on detached inputs: the same gradients, and more for the compiler to fuse.

Batch normalisation differs from ours in two points that cost no time: the running variance is PyTorch's unbiased one, and each of the
three streams is normalised by itself, where `vffjax` takes both labelled copies as one stream.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keys import PEER
from vffjax.config import Config, for_group
from vffjax.errors import chosen
from vffjax.networks.groups import GroupState, LayerGroup
from vffjax.networks.layers import EPSILON, MOMENTUM, ConvLayer
from vffjax.rules import head, vff
from vffjax.rules.similarity import EPSILON as LEAST_SQUARED_NORM
from vffjax.rules.streams import Task
from vffjax.training.plan import Plan

IMPLEMENTATIONS = ("fused", "foreach")  # of torch.optim; which is faster depends on the device and the network


class Dense(nn.Module):
    """Dense map of the flattened input, batch normalisation, ReLU."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.linear = nn.Linear(inputs, width, bias=False)
        self.norm = nn.BatchNorm1d(width, EPSILON, 1 - MOMENTUM)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, *feature] to [batch, width]."""
        return F.relu(self.norm(self.linear(flat(x))), inplace=True)


class Conv(nn.Module):
    """3x3 convolution with zero padding, batch normalisation, ReLU, max-pooling over `pool` x `pool` windows."""

    def __init__(self, channels: int, width: int, pool: int):
        super().__init__()
        self.linear = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width, EPSILON, 1 - MOMENTUM)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, h, w] to [batch, width, h / pool, w / pool]."""
        x = F.relu(self.norm(self.linear(x)), inplace=True)
        return F.max_pool2d(x, self.pool) if self.pool > 1 else x


class Group(nn.Module):
    """The layers of one of `vffjax`'s groups and its linear head, for inputs of `shape` (h, w, c) or (units,)."""

    def __init__(self, group: LayerGroup, shape: tuple[int, ...], classes: int):
        super().__init__()
        layers: list[nn.Module] = []
        for layer in group.module.layers:
            if isinstance(layer, ConvLayer):
                layers.append(Conv(shape[2], layer.width, layer.pool))
                shape = (shape[0] // layer.pool, shape[1] // layer.pool, layer.width)
            else:
                layers.append(Dense(math.prod(shape), layer.width))
                shape = (layer.width,)
        self.layers = nn.Sequential(*layers)
        self.shape = shape  # of one feature map, in our order
        self.cells = [min(group.module.head_grid, side) for side in shape[:-1]]
        self.head = nn.Linear(math.prod(self.cells) * shape[-1], classes)

    def features(self, x: Tensor) -> Tensor:
        """Feature map, [batch, c, h, w] or [batch, units]."""
        return self.layers(x)

    def logits(self, features: Tensor) -> Tensor:
        """Class scores [batch, classes] of the features mean-pooled to the head's grid."""
        if features.ndim == 4 and list(features.shape[2:]) != self.cells:
            features = F.adaptive_avg_pool2d(features, (self.cells[0], self.cells[1]))
        return self.head(flat(features))


def flat(x: Tensor) -> Tensor:
    """Rows flattened in the order h, w, c, so that our kernels fit; of channels_last memory it is a view."""
    return x.permute(0, 2, 3, 1).flatten(1) if x.ndim == 4 else x


def build_network(groups: Sequence[LayerGroup], image_shape: tuple[int, ...], classes: int) -> list[Group]:
    """The groups in order, parameters as PyTorch initialises them, for images (h, w, c)."""
    network: list[Group] = []
    for group in groups:
        network.append(Group(group, network[-1].shape if network else image_shape, classes))
    return network


@torch.no_grad()
def load_from_jax(network: Sequence[Group], params_of_groups: Sequence[Any], batch_stats_of_groups: Sequence[Any]) -> None:
    """Copies our parameters, and the running statistics of our clean stream, into the same network."""
    for group, params, stats in zip(network, params_of_groups, batch_stats_of_groups, strict=True):
        for i, layer in enumerate(group.layers):
            ours, norm = params[f"layers_{i}"], stats[f"layers_{i}"]["norm"]
            pairs = {"linear.weight": _weight(ours["kernel"]), "norm.weight": ours["norm"]["scale"], "norm.bias": ours["norm"]["bias"]}
            pairs |= {"norm.running_mean": norm["mean"][0], "norm.running_var": norm["var"][0]}
            _assign(layer, pairs)
        _assign(group.head, {"weight": _weight(params["head"]["kernel"]), "bias": params["head"]["bias"]})


def _weight(kernel: Any) -> np.ndarray:
    """HWIO to OIHW, or (inputs, outputs) to (outputs, inputs)."""
    kernel = np.asarray(kernel)
    return kernel.transpose(3, 2, 0, 1) if kernel.ndim == 4 else kernel.T


def _assign(module: nn.Module, values: dict[str, Any]) -> None:
    own = module.state_dict()
    for name, value in values.items():
        if own[name].shape != value.shape:  # copy_ would broadcast
            raise ValueError(f"{name}: shape {tuple(own[name].shape)}, given {value.shape}")
        own[name].copy_(torch.from_numpy(np.array(value)))


def augment(images: Tensor, config: Config) -> Tensor:
    """Mirrored and shifted views of bytes [batch, h, w, c], each image by its own draw."""
    n, device = images.shape[0], images.device
    if not config.flip and not config.crop_padding:
        return images
    mirrored = torch.rand(n, device=device) < (0.5 if config.flip else 0.0)
    starts = torch.randint(0, 2 * config.crop_padding + 1, (2, n), device=device)
    return take_views(images, mirrored, starts, config.crop_padding)


def take_views(images: Tensor, mirrored: Tensor, starts: Tensor, padding: int) -> Tensor:
    """Images [n, h, w, c], mirrored left to right where `mirrored` [n], padded with black, cropped from row and column `starts` [2, n].

    One gather of whole pixels: a third of the time of the two indexed steps on CPU.
    """
    n, h, w, c = images.shape
    height, width = h + 2 * padding, w + 2 * padding
    number, row, column = (torch.arange(size, device=images.device) for size in (n, h, w))
    rows, columns = starts[0][:, None] + row, starts[1][:, None] + column
    # Mirroring before the padding is reading the padded image from its other end.
    columns = torch.where(mirrored[:, None], width - 1 - columns, columns)
    pixels = (number[:, None, None] * height + rows[:, :, None]) * width + columns[:, None, :]
    padded = F.pad(images, (0, 0, padding, padding, padding, padding))
    return padded.reshape(-1, c).index_select(0, pixels.flatten()).reshape(n, h, w, c)


def cut_out(x: Tensor, side: int) -> Tensor:
    """One square of `side` pixels of each normalised image [batch, c, h, w] becomes 0."""
    n, _, h, w = x.shape
    inside = torch.ones((), dtype=torch.bool, device=x.device)
    for size, shape in ((h, (1, h, 1)), (w, (1, 1, w))):
        middle = (torch.arange(size, device=x.device) + 0.5).reshape(shape)
        inside = inside & ((middle - size * torch.rand(n, 1, 1, device=x.device)).abs() < side / 2)
    return x.masked_fill(inside[:, None], 0.0)


def embed(features: Tensor, similarity: str) -> Tensor:
    """Vectors [batch, d] whose dot product is `config.similarity` of two feature maps; float32."""
    z, least = features.float(), LEAST_SQUARED_NORM**0.5
    cells = chosen("similarity", similarity, {"grid": 2, "pooled": 1, "position": None, "flat": None})
    if z.ndim == 4 and similarity == "position":
        return F.normalize(z, dim=1, eps=least).flatten(1) / math.sqrt(z.shape[2] * z.shape[3])
    if z.ndim == 4 and cells:
        z = F.adaptive_avg_pool2d(z, (min(cells, z.shape[2]), min(cells, z.shape[3])))
    return F.normalize(z.flatten(1), dim=1, eps=least)


def cscl_triplet(anchors: Tensor, positives: Tensor, negatives: Tensor, config: Config) -> Tensor:
    """Mean over the batch of `tau softplus((s(a, n) - s(a, p) + m) / tau)` of three feature maps."""
    a, p, n = (embed(z, config.similarity) for z in (anchors, positives, negatives))
    difference = (a * (n - p)).sum(1)
    return config.temperature * F.softplus((difference + config.margin) / config.temperature).mean()


def head_loss(config: Config, group: Group, features: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(group.logits(features), labels, label_smoothing=config.label_smoothing)


def three_stream_loss(config: Config, group: Group, streams: Iterable[Tensor], labels: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """CSCL and head loss of one group on its inputs (anchors, positives, negatives), and its features of the three."""
    anchors, positives, negatives = (group.features(z) for z in streams)
    share = config.head_weight
    if share == 0:
        read = anchors.detach()
    else:
        read = anchors if share == 1 else share * anchors + (1 - share) * anchors.detach()
    loss = cscl_triplet(anchors, positives, negatives, config) + head_loss(config, group, read, labels)
    return loss, (anchors, positives, negatives)


class GroupOptimizer:
    """`vffjax.training.trainer.make_optimizer` for one group: warm-up, cosine decay, decoupled decay of kernels alone, clipping."""

    def __init__(self, config: Config, module: nn.Module, steps_per_epoch: int, implementation: str):
        self._params = list(module.parameters())
        self._kernels: list[Tensor] = [p for p in self._params if p.ndim > 1]
        self._clip_norm = config.clip_norm
        # torch.optim.SGD has decay only inside the gradient, where momentum averages it.
        self._decay_apart = chosen("optimizer", config.optimizer, {"sgd": config.weight_decay, "adamw": 0.0})
        options: Any = {"lr": config.learning_rate, implementation: True}
        self._optimizer: torch.optim.Optimizer
        if config.optimizer == "adamw":
            rest = [p for p in self._params if p.ndim <= 1]
            decayed = {"params": self._kernels, "weight_decay": config.weight_decay}
            self._optimizer = torch.optim.AdamW([decayed, {"params": rest, "weight_decay": 0.0}], **options)
        else:
            momentum = config.momentum
            self._optimizer = torch.optim.SGD(self._params, momentum=momentum, nesterov=momentum > 0, **options)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, _share_of_rate(config, steps_per_epoch))

    def step(self) -> None:
        """One update by the gradients that are there; they are gone afterwards."""
        if self._clip_norm > 0:
            nn.utils.clip_grad_norm_(self._params, self._clip_norm)
        if self._decay_apart > 0:
            with torch.no_grad():
                torch._foreach_mul_(self._kernels, 1 - self._optimizer.param_groups[0]["lr"] * self._decay_apart)
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad(set_to_none=True)


def _share_of_rate(config: Config, steps_per_epoch: int) -> Callable[[int], float]:
    """The rate of a step, counted from 0, as a share of the peak."""
    total = config.epochs * steps_per_epoch
    warmup = min(round(config.warmup_epochs * steps_per_epoch), total - 1)

    def share(step: int) -> float:
        if step < warmup:
            return step / warmup
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / (total - warmup))))

    return share


class Peer:
    """A network under training: back-propagation if `plan.config.rule` is `head` and there is one group, else three-stream VFF.

    Starts from `states`, ours, on `device`, `cpu` or `cuda`. With a `compile_mode`, `torch.compile` takes augmentation, network and
    losses of all groups as one graph. Raises `UserError` for a configuration that it would not obey (see `keys.PEER`).
    """

    def __init__(self, plan: Plan, task: Task, states: Sequence[GroupState], device: str, compile_mode: str | None = None):
        PEER.check(plan.config)
        torch.manual_seed(plan.config.seed)
        torch.backends.cudnn.benchmark = True
        self._plan, self._config, self._device = plan, plan.config, device
        self.network = build_network(plan.groups, task.codebook.shape[1:], task.classes)
        load_from_jax(self.network, [s.params for s in states], [s.batch_stats for s in states])
        place: Any = {"device": device, "memory_format": torch.channels_last}
        for group in self.network:
            group.to(**place)
        mean, std, codebook = (torch.from_numpy(np.array(a)).to(device) for a in (task.mean, task.std, task.codebook))
        self._scale, self._shift = (1 / (255 * std)).reshape(1, -1, 1, 1), (mean / std).reshape(1, -1, 1, 1)
        self._codebook = codebook.permute(0, 3, 1, 2)  # channels_last memory, as the images
        self._whole_loss = None
        if compile_mode is not None:
            self._whole_loss = torch.compile(self._whole(), mode=compile_mode)
        self.use_optimizers(IMPLEMENTATIONS[0])

    def _whole(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The loss of all groups as one graph. `PEER` lets no other rule in."""
        return {head.RULE: self._back_propagated_loss, vff.RULE: self._sum_of_losses}[self._plan.rule]

    def use_optimizers(self, implementation: str) -> None:
        """Fresh optimizers, one per group, of one of `IMPLEMENTATIONS`."""
        last = len(self.network) - 1
        self.optimizers = [
            GroupOptimizer(for_group(self._config, i, last - i), group, self._plan.steps_per_epoch, implementation)
            for i, group in enumerate(self.network)
        ]

    def epoch(self, images: Tensor, labels: Tensor) -> Tensor:
        """Every batch of bytes [n, h, w, c] and labels [n] in a random order; the mean loss, still on the device."""
        steps, batch = self._plan.steps_per_epoch, self._config.batch_size
        order = torch.randperm(len(labels), device=self._device)[: steps * batch].reshape(steps, batch)
        total = torch.zeros((), device=self._device)
        for rows in order:
            total += self.step(images[rows], labels[rows])
        return total / steps

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """One update of every group on one batch; the sum of their losses, on the device.

        A compiled peer may overwrite the result at its next step.
        """
        if self._whole_loss is None and self._whole() != self._back_propagated_loss:
            return self._three_stream_step(images, labels)
        loss = (self._whole_loss or self._back_propagated_loss)(images, labels)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss.detach()

    def prepare(self, images: Tensor) -> Tensor:
        """Bytes [batch, h, w, c] to augmented, normalised float32 [batch, c, h, w] in channels_last memory."""
        x = augment(images, self._config).permute(0, 3, 1, 2).float() * self._scale - self._shift
        return cut_out(x, self._config.cutout) if self._config.cutout else x

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device, torch.bfloat16, enabled=self._config.precision == "bf16")

    def _back_propagated_loss(self, images: Tensor, labels: Tensor) -> Tensor:
        with self._autocast():
            group = self.network[0]
            return head_loss(self._config, group, group.features(self.prepare(images)), labels)

    def _streams(self, images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """Anchors, and their copies with the right and with a wrong label."""
        x, classes = self.prepare(images), len(self._codebook)
        wrong = (labels + torch.randint(1, classes, labels.shape, device=self._device)) % classes
        return x, x + self._codebook[labels], x + self._codebook[wrong]

    def _sum_of_losses(self, images: Tensor, labels: Tensor) -> Tensor:
        """Of all groups. A group's inputs are detached, so the gradient of the sum is that of each group's own loss."""
        streams, total = self._streams(images, labels), torch.zeros((), device=self._device)
        for i, group in enumerate(self.network):
            with self._autocast():
                loss, features = three_stream_loss(for_group(self._config, i), group, streams, labels)
            streams = tuple(z.detach() for z in features)
            total = total + loss
        return total

    def _three_stream_step(self, images: Tensor, labels: Tensor) -> Tensor:
        """A group is updated before the next one begins, so that one group's maps are alive at a time."""
        streams, total = self._streams(images, labels), torch.zeros((), device=self._device)
        for i, (group, optimizer) in enumerate(zip(self.network, self.optimizers, strict=True)):
            with self._autocast():
                loss, features = three_stream_loss(for_group(self._config, i), group, streams, labels)
            loss.backward()
            optimizer.step()
            streams = tuple(z.detach() for z in features)
            total += loss.detach()
        return total
