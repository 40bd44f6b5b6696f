"""Who takes part in the race of `speedrun`: our trainer, and back-propagation of the same network by PyTorch."""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, Shaped

from contenders import TorchContender, Unavailable, Workload
from vffjax.config import Config
from vffjax.data.sets import Dataset
from vffjax.runs.experiment import plan_for
from vffjax.runs.loop import on_device, training_images
from vffjax.training import scores
from vffjax.training.epochs import Epoch, segment_length
from vffjax.training.plan import init_states, make_task, noise_root, task_of_epoch, whitened

TRIAL_STEPS = {"cpu": 4, "gpu": 60}  # of an epoch by which PyTorch's fastest mode is found, by the device


class Accuracies(NamedTuple):
    """Shares of right classes, between 0 and 1, by the heads that classify. A network with one head has one accuracy twice."""

    together: float  # the mean log-probability of all heads
    last: float  # the head of the last group alone


class Racer(Protocol):
    """One network in training. It has parameters from the start."""

    name: str
    compile_seconds: float
    facts: dict[str, Any]

    def restart(self) -> None:
        """Sets all parameters as they are at the start of the race, and forgets what was learnt."""

    def epoch(self, number: int, labels: Int[np.ndarray, " n"] | None = None) -> bool:
        """Trains one epoch, with other labels if they are given, and waits for its last parameter. Returns whether losses are finite."""
        ...

    def accuracies(self, split: str) -> Accuracies:
        """The accuracies on the `validation` or `test` images."""
        ...


class Ours:
    """Our trainer on a configuration."""

    def __init__(self, config: Config, dataset: Dataset):
        self.name, self.facts = config.rule, dict[str, Any]()
        self._plan, self._dataset = plan_for(config, dataset), dataset
        self._train = training_images(dataset.train)
        self._judged = {"validation": on_device(dataset.validation), "test": on_device(dataset.test)}
        self._task = make_task(config, dataset.num_classes, dataset.image_shape, dataset.mean, dataset.std, dataset.train.images)
        self._root = noise_root(config, dataset.train.images, self._task.mean, self._task.std)
        start = time.perf_counter()
        self.restart()
        self._epoch = Epoch(self._plan, None, segment_length(self._plan, dataset.image_shape))
        self._epoch.compile(self._task, self._states, self._train)
        self._scores = {
            name: scores.compile_scores(self._plan, "heads", self._task, self._states, split.images) for name, split in self._judged.items()
        }
        self.compile_seconds = time.perf_counter() - start

    def restart(self) -> None:
        fresh = init_states(self._plan, self._dataset.image_shape)
        self._states = jax.block_until_ready(whitened(self._plan, fresh, self._dataset.train.images, self._task))

    def epoch(self, number: int, labels: Int[np.ndarray, " n"] | None = None) -> bool:
        self._task = task_of_epoch(self._plan.config, self._task, number, self._root)
        data = self._train if labels is None else self._train._replace(labels=jnp.asarray(labels))
        self._states, metrics = jax.block_until_ready(self._epoch(self._task, self._states, data, number))
        return not np.any(metrics["nonfinite_steps"])

    def accuracies(self, split: str) -> Accuracies:
        found = np.asarray(self._scores[split](self._task, self._states, self._judged[split].images))
        everyone, labels = tuple(range(len(self._plan.groups))), self._judged[split].labels
        return Accuracies(*(1 - scores.error_percent(scores.ensemble(found, heads), labels) / 100 for heads in (everyone, everyone[-1:])))


class Torch:
    """Back-propagation by PyTorch from our initial parameters, in the fastest of its modes and implementations of the optimizer.

    Args:
        config: of back-propagation: a rule without a loss of its own, and one group.
        dataset: its images.
        modes: the modes of torch.compile to try; None is all that suit the device.

    Raises:
        Unavailable: PyTorch is not installed, or does not run on the device that JAX uses.
    """

    name = "torch-bp"

    def __init__(self, config: Config, dataset: Dataset, modes: Sequence[str] | None = None):
        start = time.perf_counter()
        tried: dict[str, float] = {}
        for compiled in (False, True):
            try:
                tried |= TorchContender(config, Workload(config, TRIAL_STEPS.get(jax.default_backend(), 4), modes), compiled).facts["tried"]
            except Unavailable:
                if not compiled:
                    raise  # a compiled one may be missing, because there is no C++ compiler
        mode, implementation = min(tried, key=lambda how: tried[how]).split(", ")
        self.facts = {"mode": mode, "optimizer": implementation, "tried": tried}
        import torch  # not at the top, because only this contender needs it

        from torch_peers import Peer

        self._torch, self._config, self._dataset = torch, config, dataset
        self._plan = plan_for(config, dataset)
        self._task = make_task(config, dataset.num_classes, dataset.image_shape, dataset.mean, dataset.std, dataset.train.images)
        self._device = {"cpu": "cpu", "gpu": "cuda"}[jax.default_backend()]
        fresh = init_states(self._plan, dataset.image_shape)
        self._start = whitened(self._plan, fresh, dataset.train.images, self._task)
        self._peer = Peer(self._plan, self._task, self._start, self._device, None if mode == "eager" else mode)
        self._implementation = implementation
        self.restart()
        self._train, self._labels = self._tensor(np.asarray(dataset.train.images)), self._tensor(dataset.train.labels.astype(np.int64))
        self.compile_seconds = time.perf_counter() - start

    def _tensor(self, array: Shaped[np.ndarray, "..."]) -> Any:
        return self._torch.from_numpy(np.array(array)).to(self._device)

    def restart(self) -> None:
        self._peer.load(self._start)
        self._peer.use_optimizers(self._implementation)

    def epoch(self, number: int, labels: Int[np.ndarray, " n"] | None = None) -> bool:
        given = self._labels if labels is None else self._tensor(labels.astype(np.int64))
        loss = self._peer.epoch(self._train, given)
        return bool(self._torch.isfinite(loss))  # waits for the device

    def accuracies(self, split: str) -> Accuracies:
        judged = getattr(self._dataset, split)
        found = self._peer.classes(self._tensor(judged.images), self._config.eval_batch_size)
        share = float((found == self._tensor(judged.labels.astype(np.int64))).float().mean())
        return Accuracies(share, share)
