"""The contenders of `throughput.py`: what each trains; built, compiled and warmed up, ready to run one epoch after another."""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from keys import FLOPS, JOINT, PEER, RANDOM_WEIGHTS, Only, refuse, refuse_other_groups
from rates import PRODUCTS
from vffjax.config import Config
from vffjax.data import sizes_of
from vffjax.data.sets import Split
from vffjax.errors import chosen
from vffjax.networks.groups import GroupState
from vffjax.rules.streams import Task
from vffjax.runs.loop import training_images
from vffjax.training.checks import check_against_data, make_config
from vffjax.training.compiled import executable_bytes
from vffjax.training.epochs import Epoch, segment_length
from vffjax.training.plan import Images, Plan, blank_task, init_states, make_plan

RULES: dict[str, dict[str, Any]] = {
    "vff": {"rule": "vff"},
    "vff-triplet": {"rule": "vff", "labelling": "triplet", "contrast": "triplet"},
    "head": {"rule": "head"},
    "ff": {"rule": "ff", "grouping": "layer", "norm": "auto"},
    "bp": {"rule": "head", "grouping": "all"},
}
TORCH_BP = ("torch-bp", "torch-bp-compiled")
TORCH_VFF = ("torch-vff", "torch-vff-compiled")
CONTENDERS = RULES | dict.fromkeys(TORCH_BP, RULES["bp"]) | dict.fromkeys(TORCH_VFF, RULES["vff-triplet"])

# Keys whose values the benchmark sets itself, for every contender of either library.
SET_HERE = {
    "rule": Only(("vff",), "every contender has a rule of its own", "leave it at vff and choose by --only"),
    "init_from": RANDOM_WEIGHTS,
    "schedule": JOINT,
}

# With its default mode a GPU waits for Python to launch each kernel; "max-autotune" replays CUDA graphs, and takes minutes to compile.
_COMPILE_MODES = {"cpu": ("default",), "cuda": ("default", "max-autotune")}


class Unavailable(Exception):
    """A contender that cannot run here; the message says why."""


class TorchImages(NamedTuple):
    """A workload's images and labels on PyTorch's `device`, as tensors."""

    device: str
    images: Any
    labels: Any


def variant(config: Config, name: str) -> Config:
    """The configuration that a contender trains."""
    return make_config(config.to_dict() | {"inference": "heads"} | chosen("contender", name, CONTENDERS))


def check_keys(config: Config, names: list[str]) -> None:
    """Raises `UserError` where the configuration says something that one of these contenders would not do."""
    refuse(config, SET_HERE)
    refuse_other_groups(config, {name: CONTENDERS[name].get("grouping", config.grouping) for name in names}, "--only")
    for name in names:
        FLOPS.check(variant(config, name))
    for name in names:
        if name.startswith("torch"):
            PEER.check(variant(config, name), "or leave the PyTorch contenders out by --only")


class Workload:
    """Random images of the data set's size and random labels, as many as make `steps` steps."""

    def __init__(self, config: Config, steps: int):
        _, self.shape, self.classes = sizes_of(config)
        self.examples = steps * config.batch_size
        rng = np.random.default_rng(config.seed)
        self._images = rng.integers(0, 256, (self.examples, *self.shape), np.uint8)
        self._labels = rng.integers(0, self.classes, self.examples, np.int32)

    @functools.cached_property
    def for_jax(self) -> Images:
        return training_images(Split(self._images, self._labels))

    @functools.cached_property
    def for_torch(self) -> TorchImages:
        """On the device that JAX uses. Raises `Unavailable` if PyTorch is missing or does not reach it."""
        try:
            import torch
        except (ImportError, OSError) as error:  # OSError: installed, but a library of its own does not load
            raise Unavailable(f"PyTorch cannot be imported ({_line(error)}); pip install -e '.[bench]'") from error
        backend = jax.default_backend()
        device = {"cpu": "cpu", "gpu": "cuda"}.get(backend)
        if device is None or (device == "cuda" and not torch.cuda.is_available()):
            raise Unavailable(f"JAX runs on {backend}, this PyTorch {torch.__version__} does not")
        return TorchImages(device, *(torch.from_numpy(a).to(device) for a in (self._images, self._labels.astype(np.int64))))

    def start(self, config: Config) -> tuple[Plan, Task, tuple[GroupState, ...]]:
        """Groups, codebook and fresh states of one contender."""
        plan = make_plan(config, self.examples, self.classes)
        return plan, blank_task(plan, self.shape), jax.jit(functools.partial(init_states, plan, self.shape))()

    def check(self, config: Config) -> None:
        """Raises `UserError` where a contender's configuration does not fit the images."""
        check_against_data(make_plan(config, self.examples, self.classes), self.examples, self.shape)


class JaxContender:
    """The epoch as `vffjax.training.epochs` runs it, compiled ahead of time; its states go on from epoch to epoch."""

    library = "jax"

    def __init__(self, config: Config, work: Workload):
        plan, self._task, self._states = work.start(config)
        self._data, self._number = work.for_jax, 0
        start = time.perf_counter()
        self._epoch = Epoch(plan, plan.active(0), segment_length(plan, work.shape))
        compiled = self._epoch.compile(self._task, self._states, self._data)
        self.facts: dict[str, Any] = {
            "compile_seconds": time.perf_counter() - start,
            "peak_bytes": executable_bytes(compiled),
            "peak_bytes_from": "the compiler's plan for a segment of the epoch: arguments, outputs and temporaries",
        }
        self.epoch()
        # Never falls: it is the greatest of all contenders so far.
        self.facts["process_peak_bytes_in_use"] = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")

    def epoch(self) -> None:
        """Returns when the device has done all of it."""
        self._states, _ = self._epoch(self._task, self._states, self._data, self._number)
        self._number += 1
        jax.block_until_ready(self._states)


class TorchContender:
    """A peer of `torch_peers`, in the fastest of PyTorch's ways to do the same: `facts["tried"]` has the seconds of an epoch of each.

    With `compiled`, raises `Unavailable` where `torch.compile` fails, for example without a C++ compiler.
    """

    library = "torch"

    def __init__(self, config: Config, work: Workload, compiled: bool):
        self._data, first = work.for_torch, slice(config.batch_size)
        from torch_peers import IMPLEMENTATIONS, Peer  # only now: it needs PyTorch

        plan, task, states = work.start(config)
        self.facts: dict[str, Any] = {"tried": {}, "failed": {}, "compile_seconds": None}
        fastest = None
        for mode in _COMPILE_MODES[self._data.device] if compiled else (None,):
            peer = Peer(plan, task, states, self._data.device, mode)
            try:
                compile_seconds = self._seconds(functools.partial(peer.step, self._data.images[first], self._data.labels[first]))
            except Exception as error:  # of a compiler anything may fail; another mode, and the other contenders, may do without it
                if mode is None:
                    raise
                self.facts["failed"][mode] = _line(error)
                continue
            for implementation in IMPLEMENTATIONS:
                peer.use_optimizers(implementation)
                epoch = functools.partial(peer.epoch, self._data.images, self._data.labels)
                seconds = min(self._seconds(epoch) for _ in range(2))
                self.facts["tried"][f"{mode or 'eager'}, {implementation}"] = seconds
                if fastest is None or seconds < fastest[0]:
                    fastest = seconds, peer, implementation
                    self.facts |= {"mode": mode or "eager", "optimizer": implementation}
                    self.facts["compile_seconds"] = compile_seconds if compiled else None
        if fastest is None:
            raise Unavailable(f"torch.compile failed: {self.facts['failed']}")
        _, self._peer, implementation = fastest
        self._peer.use_optimizers(implementation)
        self._measure_peak()

    def epoch(self) -> None:
        """Returns when the device has done all of it."""
        self._seconds(lambda: self._peer.epoch(self._data.images, self._data.labels))

    def _seconds(self, run: Callable[[], Any]) -> float:
        start = time.perf_counter()
        run()
        _wait_for_torch(self._data.device)
        return time.perf_counter() - start

    def _measure_peak(self) -> None:
        import torch

        if self._data.device == "cpu":
            self.facts |= {"peak_bytes": None, "peak_bytes_from": "PyTorch does not count what it allocates on CPU"}
            self.epoch()
            return
        torch.cuda.reset_peak_memory_stats()
        self.epoch()
        source = "torch.cuda.max_memory_allocated over an epoch, parameters and images of the other PyTorch contenders included"
        self.facts |= {"peak_bytes": torch.cuda.max_memory_allocated(), "peak_bytes_from": source}


def torch_products(size: int, precision: str, device: str) -> Callable[[], None]:
    """For `rates.product_rate`: PyTorch's matrix products at its default precision for `f32`."""
    import torch

    x = torch.randn(size, size, device=device).to(chosen("precision", precision, {"bf16": torch.bfloat16, "f32": torch.float32}))
    step = x / size**0.5

    def run() -> None:
        y = x
        for _ in range(PRODUCTS):
            y = y @ step
        _wait_for_torch(device)

    return run


def _wait_for_torch(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
