"""The contenders of `throughput.py`, and the machine on which they run.

Each contender is built, compiled and warmed up, and can then run one epoch after another.
"""

import contextlib
import functools
import os
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from keys import FLOPS, JOINT, ONE_DEVICE, PEER, RANDOM_WEIGHTS, own_rule, refuse, refuse_other_groups
from rates import PRODUCTS, jax_products, product_rate
from vffjax import backend, rules
from vffjax.config import Config
from vffjax.data import sizes_of
from vffjax.data.sets import Split
from vffjax.errors import chosen, said
from vffjax.networks.groups import GroupState
from vffjax.rules.streams import Task
from vffjax.runs.loop import training_images
from vffjax.training.checks import check_against_data, make_config
from vffjax.training.compiled import program_bytes
from vffjax.training.epochs import Epoch, segment_length
from vffjax.training.plan import Images, Plan, blank_task, init_states, make_plan

RULES: dict[str, dict[str, Any]] = {
    "vff": {"rule": "vff"},
    "vff-triplet": {"rule": "vff", "labelling": "triplet", "contrast": "triplet"},
    "head": {"rule": "head"},
    "ff": {"rule": "ff", "grouping": "layer", "norm": "auto"},
    "bp": rules.BACK_PROPAGATION,
}
TORCH_BP = ("torch-bp", "torch-bp-compiled")
TORCH_VFF = ("torch-vff", "torch-vff-compiled")
CONTENDERS = RULES | dict.fromkeys(TORCH_BP, RULES["bp"]) | dict.fromkeys(TORCH_VFF, RULES["vff-triplet"])

# Keys whose values the benchmark sets itself for all contenders.
SET_HERE = ONE_DEVICE | {"rule": own_rule("contender", "--only"), "init_from": RANDOM_WEIGHTS, "schedule": JOINT}

# The modes of torch.compile. In the default mode a GPU waits while Python launches each kernel. The others replay CUDA graphs;
# "max-autotune" also searches for kernels, and takes minutes to compile.
COMPILE_MODES = {"default": ("cpu", "cuda"), "reduce-overhead": ("cuda",), "max-autotune": ("cuda",)}  # with the devices of each


# The pause before each contender, in seconds. On CPU both libraries have a thread pool of all cores, and idle threads of OpenMP spin before
# they sleep: GNU's for some milliseconds, Intel's for 200. Without a pause a contender of JAX would share its cores with spinning threads
# of PyTorch. A GPU has no such threads, and would lower its clock in a pause.
PAUSE = 0.25 if jax.default_backend() == "cpu" else 0.0


class Unavailable(Exception):
    """Raised for a contender that cannot run on this machine. The message says why."""


class TorchImages(NamedTuple):
    """The images and labels of a workload as tensors on a device of PyTorch."""

    device: str
    images: Any
    labels: Any


def variant(config: Config, name: str) -> Config:
    """The configuration that a contender trains."""
    return make_config(config.to_dict() | {"inference": "heads"} | chosen("contender", name, CONTENDERS))


def check_keys(config: Config, names: list[str]) -> None:
    """Raises `UserError` for a key of the configuration that one of the named contenders would not obey."""
    refuse(config, SET_HERE)
    refuse_other_groups(config, {name: CONTENDERS[name].get("grouping", config.grouping) for name in names}, "--only")
    for name in names:
        FLOPS.check(variant(config, name))
    for name in names:
        if name.startswith("torch"):
            PEER.check(variant(config, name), "or leave the PyTorch contenders out by --only")


class Workload:
    """Random images of the data set's size with random labels.

    Args:
        config: the configuration of all contenders.
        steps: the number of batches to make images for.
        modes: the modes of torch.compile that compiled contenders try; None is all that suit the device.
    """

    def __init__(self, config: Config, steps: int, modes: Sequence[str] | None = None):
        self._modes = modes
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
        """The images on the device that JAX uses. Raises `Unavailable` if PyTorch is not installed or cannot use this device."""
        try:
            import torch
        except (ImportError, OSError) as error:  # OSError: PyTorch is installed, but a library that it needs does not load
            raise Unavailable(f"PyTorch cannot be imported ({said(error)}); pip install -e '.[bench]'") from error
        backend = jax.default_backend()
        device = {"cpu": "cpu", "gpu": "cuda"}.get(backend)
        if device is None or (device == "cuda" and not torch.cuda.is_available()):
            raise Unavailable(f"JAX runs on {backend}, but this PyTorch {torch.__version__} does not")
        return TorchImages(device, *(torch.from_numpy(a).to(device) for a in (self._images, self._labels.astype(np.int64))))

    @property
    def compile_modes(self) -> tuple[str, ...]:
        """The modes of torch.compile that compiled contenders try."""
        return tuple(self._modes or (mode for mode, devices in COMPILE_MODES.items() if self.for_torch.device in devices))

    def start(self, config: Config) -> tuple[Plan, Task, tuple[GroupState, ...]]:
        """The plan, the task and the initial states of a contender."""
        plan = make_plan(config, self.examples, self.classes)
        return plan, blank_task(plan, self.shape), jax.jit(functools.partial(init_states, plan, self.shape))()

    def check(self, config: Config) -> None:
        """Raises `UserError` if the configuration of a contender does not fit the images."""
        check_against_data(make_plan(config, self.examples, self.classes), self.examples, self.shape)


class JaxContender:
    """The epoch of `vffjax.training.epochs`, compiled ahead of time. Each epoch goes on from the states of the one before.

    Args:
        config: the configuration of the contender.
        work: its images.
    """

    library = "jax"

    def __init__(self, config: Config, work: Workload):
        plan, self._task, self._states = work.start(config)
        self._data, self._number = work.for_jax, 0
        start = time.perf_counter()
        self._epoch = Epoch(plan, plan.active(0), segment_length(plan, work.shape))
        compiled = self._epoch.compile(self._task, self._states, self._data)
        self.facts: dict[str, Any] = {
            "compile_seconds": time.perf_counter() - start,
            "peak_bytes": program_bytes(compiled)["total_bytes"],
            "peak_bytes_from": "the compiler's plan for a segment of the epoch: arguments, outputs and temporaries",
        }
        self.epoch()
        # This never falls: it is the peak over all contenders that ran before in this process.
        self.facts["process_peak_bytes_in_use"] = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")

    def epoch(self) -> None:
        """Runs one epoch and waits until the device has finished it."""
        self._states, _ = self._epoch(self._task, self._states, self._data, self._number)
        self._number += 1
        jax.block_until_ready(self._states)


class TorchContender:
    """A peer of `torch_peers`, with the compile mode and optimizer implementation that are fastest on this machine.

    `facts["tried"]` has the seconds of an epoch for each combination that was tried.

    Args:
        config: the configuration of the contender.
        work: its images.
        compiled: whether to use `torch.compile`.

    Raises:
        Unavailable: PyTorch cannot run here, or `torch.compile` fails in every mode, for example because there is no C++ compiler.
    """

    library = "torch"

    def __init__(self, config: Config, work: Workload, compiled: bool):
        self._data, first = work.for_torch, slice(config.batch_size)
        from torch_peers import IMPLEMENTATIONS, Peer  # not at the top, because it needs PyTorch

        plan, task, states = work.start(config)
        self.facts: dict[str, Any] = {"tried": {}, "failed": {}, "compile_seconds": None}
        fastest = None
        for mode in work.compile_modes if compiled else (None,):
            peer = Peer(plan, task, states, self._data.device, mode)
            mirrored = peer.mirrored_next(config.batch_size)
            try:
                compile_seconds = self._seconds(functools.partial(peer.step, self._data.images[first], self._data.labels[first], mirrored))
            except Exception as error:  # A compiler may fail in any way. Another mode and the other contenders may still work.
                if mode is None:
                    raise
                self.facts["failed"][mode] = said(error)
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
        """Runs one epoch and waits until the device has finished it."""
        self._seconds(lambda: self._peer.epoch(self._data.images, self._data.labels))

    def _seconds(self, run: Callable[[], Any]) -> float:
        start = time.perf_counter()
        run()
        _wait_for_torch(self._data.device)
        return time.perf_counter() - start

    def _measure_peak(self) -> None:
        import torch

        unknown = ""
        if self._data.device == "cpu":
            unknown = "PyTorch does not count what it allocates on CPU"
        elif self.facts["mode"] not in ("eager", "default"):
            unknown = "PyTorch's counter does not see the maps that a replayed CUDA graph keeps"
        if unknown:
            self.facts |= {"peak_bytes": None, "peak_bytes_from": unknown}
            self.epoch()
            return
        torch.cuda.reset_peak_memory_stats()
        self.epoch()
        source = "torch.cuda.max_memory_allocated over an epoch, parameters and images of the other PyTorch contenders included"
        self.facts |= {"peak_bytes": torch.cuda.max_memory_allocated(), "peak_bytes_from": source}


def machine(work: Workload, with_torch: bool) -> dict[str, Any]:
    """The versions, devices and threads, and the settings on which the arithmetic of f32 depends."""
    found: dict[str, Any] = {
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "torch": None},
        "device": jax.devices()[0].device_kind,
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "usable_cpus": backend.cores(),  # a container or taskset may allow fewer than all
        "jax_default_matmul_precision": jax.config.jax_default_matmul_precision,  # type: ignore[attr-defined]
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }
    if with_torch:
        import torch

        found["versions"]["torch"] = torch.__version__
        found |= {
            "torch_device": torch.cuda.get_device_name() if work.for_torch.device == "cuda" else "cpu",
            "torch_threads": torch.get_num_threads(),
            "torch_deterministic": torch.are_deterministic_algorithms_enabled(),
            "torch_float32_matmul_precision": torch.get_float32_matmul_precision(),
            "torch_cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
        }
    return found


def make_torch_deterministic() -> None:
    """Lets PyTorch, if it is installed, use deterministic kernels, and warn of an operation that has none."""
    with contextlib.suppress(ImportError, OSError):
        import torch

        torch.use_deterministic_algorithms(True, warn_only=True)


def torch_products(size: int, precision: str, device: str) -> Callable[[], None]:
    """Makes PyTorch's chain of matrix products for `rates.product_rate`.

    Args:
        size: rows and columns of the matrices.
        precision: `bf16`, or `f32` with PyTorch's default precision of products.
        device: the device of PyTorch.
    """
    import torch

    x = torch.randn(size, size, device=device).to(chosen("precision", precision, {"bf16": torch.bfloat16, "f32": torch.float32}))
    step = x / size**0.5

    def run() -> None:
        y = x
        for _ in range(PRODUCTS):
            y = y @ step
        _wait_for_torch(device)

    return run


def matrix_product_rates(precision: str, quick: bool, work: Workload, with_torch: bool) -> dict[str, Any]:
    """Measures the FLOP/s of large matrix products in each library.

    Args:
        precision: `f32` or `bf16`.
        quick: whether to take smaller matrices.
        work: the workload, for the device of PyTorch.
        with_torch: whether to measure PyTorch too.

    Returns:
        The side of the matrices as `size`, the FLOP/s of each library by its name, and those of the faster one as `best`.
    """
    size = (256 if quick else 1024) if jax.default_backend() == "cpu" else (4096 if quick else 8192)
    rates = {"jax": product_rate(jax_products(size, precision), size)}
    if with_torch:
        time.sleep(PAUSE)
        rates["torch"] = product_rate(torch_products(size, precision, work.for_torch.device), size)
    return {"size": size, **rates, "best": max(rates.values())}


def _wait_for_torch(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
