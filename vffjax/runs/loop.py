"""The loop over the epochs of a run: it trains, validates, keeps the record and saves."""

import contextlib
import copy
import pathlib
import time
from collections.abc import Callable
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vffjax import hosts
from vffjax.data.sets import Dataset, Split
from vffjax.errors import UserError, chosen
from vffjax.networks.groups import States
from vffjax.rules.streams import Task
from vffjax.runs import state as run_state
from vffjax.runs.checkpoint import Checkpoints, Writer
from vffjax.runs.logbook import Logbook, Silent
from vffjax.runs.termination import NOTHING, Request, Terminated
from vffjax.training import feature_cache, trainer
from vffjax.training.compiled import program_bytes
from vffjax.training.epochs import Epoch, Metrics, joined, over_steps
from vffjax.training.mesh import everywhere, fetched, within
from vffjax.training.pipeline import epoch_of
from vffjax.training.plan import Images, Plan, noise_root, task_of_epoch
from vffjax.training.scores import compile_scores, validate
from vffjax.training.stages import mesh_for

AfterEpoch = Callable[[dict[str, Any]], object]


def goes_on(record: dict[str, Any]) -> bool:
    """What is done after an epoch by default: nothing, and the run goes on."""
    return False


class Diverged(UserError):
    """A loss or a state is not finite. The message says where, what is kept, and the fix."""


# An epoch of fewer FLOP takes at most about a second on two CPU cores.
_SHORT_EPOCH = 2e10


def on_device(split: Split, mesh: Mesh | None = None) -> Images:
    """A split's images and labels on JAX's first device, or on every device of a mesh."""
    if mesh is not None:
        return everywhere(mesh, Images(split.images, split.labels))
    return Images(jnp.asarray(split.images), jnp.asarray(split.labels))


def placed(split: Split, where: str, mesh: Mesh | None = None) -> Images:
    """A split's images and labels on the device, on every device of a mesh, or on the host or on disk, as config.data_on says."""
    on_host = chosen("data_on", where, {"device": False, "host": True, "disk": True})
    return Images(split.images, split.labels) if on_host else on_device(split, mesh)


def training_images(split: Split, where: str = "device", mesh: Mesh | None = None) -> Images:
    """A split's images, each as one row of bytes, and labels, where config.data_on says; `Epoch` gathers batches from them."""
    rows = Images(split.images, split.labels).as_rows()  # on the host, where a reshape costs nothing
    return placed(Split(rows.images, rows.labels), where, mesh)._replace(shape=rows.shape)  # type: ignore[arg-type]


class Loop:
    """Trains the rest of a run, epoch by epoch.

    Args:
        plan: the run's plan.
        dataset: the run's data.
        task: the run's task, at its start or as it was saved.
        run: the run's state (see `runs.state`), new or as it was saved; the loop keeps it up to date.
        checkpoints: the run's checkpoints, for saves inside of an epoch.
        writer: saves whole epochs.
        request: what SIGTERM and Ctrl-C ask for. The loop looks at it between two segments, and keeps it informed about what is saved.
        after_epoch: is called with the record of each epoch. If it returns true, the run is saved and told to leave.
    """

    def __init__(
        self,
        plan: Plan,
        dataset: Dataset,
        task: Task,
        run: dict[str, Any],
        checkpoints: Checkpoints,
        writer: Writer,
        request: Request,
        after_epoch: AfterEpoch = goes_on,
    ):
        self._plan, self._config, self._task, self._run = plan, plan.config, task, run
        self._checkpoints, self._writer, self._request, self._after_epoch = checkpoints, writer, request, after_epoch
        redraws = plan.config.noise_redrawn != "never"
        self._noise_root = noise_root(plan.config, dataset.train.images, task.mean, task.std) if redraws else None
        where, self._mesh = plan.config.data_on, mesh_for(plan.config, run.get("devices", 1))
        self._data, self._validation = training_images(dataset.train, where, self._mesh), placed(dataset.validation, where, self._mesh)
        self._task = everywhere(self._mesh, self._task)
        self._position = run.pop("inside", None)  # the position inside of an epoch, until that epoch goes on
        self._epoch: Epoch | None = None
        self._compiled_for: int | None = None
        self._say_what_is_saved(run["epoch"], self._steps_done)

    @property
    def _steps_done(self) -> int:
        """The steps that are done already of an epoch which was saved inside and goes on; else 0."""
        return self._position["step"] if self._position else 0

    def train(self, states: States, workdir: pathlib.Path, progress: TextIO | None = None) -> dict[str, Any]:
        """Trains to the end, from these states, whose arrays are donated; returns the run's state. Shows its progress as `Logbook` does.

        Raises `Terminated` if the run was told to leave, after it has been saved, and `Diverged` if it has diverged.
        """
        done, total = self._run["epoch"], self._plan.total_epochs
        states = everywhere(self._mesh, states)
        with within(self._mesh), self._logbook(workdir, progress) as logbook:
            logbook.phase("compiling")
            self._compile_checks(states)
            for epoch in range(done, total):
                if self._epoch is None or self._plan.active(epoch) != self._compiled_for:
                    logbook.phase("compiling")
                    self._request.idle = self._saved_epoch == epoch
                    self._compile_stage(states, epoch)
                self._request.idle = False
                if self._saved_epoch == epoch and self._told_to_leave():
                    raise Terminated(self._request.saved)
                self._task = everywhere(self._mesh, task_of_epoch(self._config, self._task, epoch, self._noise_root))
                logbook.phase("training")
                states, means, checks, seconds = self._train_epoch(states, epoch, logbook)
                logbook.phase("validating")
                finite, found = fetched(checks)
                self._check_finite(means, finite, epoch)
                validated = validate(found, self._validation.labels, self._plan.trained_groups(epoch), self._config.votes)
                # The line comes before the checkpoint: an epoch with a line but no checkpoint is trained again and gets a new line.
                record = logbook.epoch(_record(self._plan, means, epoch, seconds) | validated)
                logbook.phase("saving")
                self._finish_epoch(states, epoch, record, validated)
        return self._run

    def _compile_checks(self, states: States) -> None:
        """Compiles what follows each epoch, before the first one is timed: the check for finite groups, and the validation scores."""
        began = time.perf_counter()
        images = self._validation.images
        self._finite_groups = _finite_groups.lower(states).compile()
        self._scores = None
        if len(images):
            self._scores = compile_scores(self._plan, self._config.inference, self._task, states, images)
        self._run["compile_seconds"] += time.perf_counter() - began

    def _compile_stage(self, states: States, epoch: int) -> None:
        """Compiles the programs for the group that trains now. No epoch's time includes this, and nothing is compiled twice."""
        began = time.perf_counter()
        active = self._plan.active(epoch)
        self._data = self._data._replace(features=None)  # frees the last stage's features before new ones are made
        if active and self._config.feature_cache != "none":
            self._data = feature_cache.with_features(self._plan, active, self._task, states, self._data)
        shape = self._data.image_shape
        self._epoch = epoch_of(self._plan, active, self._run["segment_steps"], self._run.get("devices", 1), shape)
        self._compiled_for = active
        largest = self._epoch.compile(self._task, states, self._data, self._steps_done)
        if _is_short(self._plan, largest):
            self._epoch(self._task, jax.tree.map(jnp.copy, states), self._data, epoch)
        self._run["compile_seconds"] += time.perf_counter() - began
        self._run["peak_bytes"] = max(self._run["peak_bytes"], program_bytes(largest)["total_bytes"])

    def _train_epoch(
        self, states: States, epoch: int, logbook: Logbook | Silent
    ) -> tuple[States, dict[str, np.ndarray], tuple[jax.Array, jax.Array | np.ndarray | None], float]:
        """Trains one epoch, or the rest of it.

        Returns:
            The new states; the metrics over all steps of the epoch; whether each group is finite, and the validation scores or None, still
            on the device if the images are; and the seconds that training took.
        """
        assert self._epoch is not None
        step, seconds, parts = self._steps_done, 0.0, list[Any]()
        if self._position:
            seconds, parts = self._position["seconds"], [run_state.metrics_of(self._position)]
            self._position = None
        began = time.perf_counter()
        for part in self._epoch.segments(self._task, states, self._data, epoch, step):
            states = part.states
            parts.append(part.metrics)
            logbook.step(epoch, part.done, self._plan.steps_per_epoch)
            # A run that is to leave is also saved after the last segment, since validation may take long.
            saved_soon = part.done == self._plan.steps_per_epoch and self._config.checkpoint_due(epoch + 1)
            if self._told_to_leave() or (not saved_soon and self._save_is_due()):
                metrics = joined(jax.device_get(parts))
                seconds += time.perf_counter() - began
                self._save_inside(states, epoch, part.done, seconds, metrics)
                parts, began = [metrics], time.perf_counter()
        images = self._validation.images
        if not isinstance(images, jax.Array):  # To score them, the host waits for the device, and that time is no training.
            jax.block_until_ready(parts)
            seconds += time.perf_counter() - began
        here = self._epoch.together(states)
        # The checks are dispatched before the host waits for the epoch, so that the device is never idle.
        checks = (self._finite_groups(here), self._scores(self._task, here, images) if self._scores else None)
        if isinstance(images, jax.Array):
            jax.block_until_ready(parts)
            seconds += time.perf_counter() - began
        return states, over_steps(joined(jax.device_get(parts))), checks, seconds

    def _logbook(self, workdir: pathlib.Path, progress: TextIO | None) -> Logbook | Silent:
        if not hosts.is_first():
            return Silent()
        return Logbook(workdir, self._plan.total_epochs, self._run["epoch"], progress, self._config.to_dict())

    def _told_to_leave(self) -> bool:
        """Whether any process of the run was told to leave. All ask at the same steps and get the same answer, so all leave together."""
        return hosts.any_of(self._request.leave)

    def _save_is_due(self) -> bool:
        every = self._config.checkpoint_seconds
        return every > 0 and hosts.any_of(time.perf_counter() - self._saved_seconds > every)

    def _save_inside(self, states: States, epoch: int, step: int, seconds: float, metrics: Metrics) -> None:
        """Saves the run inside of an epoch. Raises `Terminated` if the run was told to leave."""
        if self._request.abandoned:
            raise Terminated(self._request.saved)
        assert self._epoch is not None
        self._check_finite(over_steps(metrics), fetched(self._finite_groups(self._epoch.together(states))), epoch, step)
        state = run_state.inside(self._run, epoch, step, self._plan.steps_per_epoch, seconds, metrics)
        with contextlib.closing(self._checkpoints.inside.writer()) as writer:
            writer.save(run_state.number(state), states, self._task, state)
        self._say_what_is_saved(epoch, step)
        if self._told_to_leave():
            raise Terminated(self._request.saved)

    def _finish_epoch(self, states: States, epoch: int, record: dict[str, Any], validated: dict[str, Any]) -> None:
        """Adds an epoch to the record, and saves it if a checkpoint is due or the run was told to leave, which raises `Terminated`.

        What is due is saved before `after_epoch` is called, which may fail.
        """
        run = self._run
        scheduled = self._config.checkpoint_due(epoch + 1)
        run["history"].append(record)
        run["due"] += [epoch + 1] if scheduled else []
        run.pop("vote_weights", None)  # of the epoch before; an epoch in which no group knows anything has none
        run |= validated | {"epoch": epoch + 1, "scheduled": scheduled, "trained_groups": self._plan.trained_groups(epoch)}
        if self._request.abandoned:
            raise Terminated(self._request.saved)
        if scheduled:
            self._save(states, epoch)
        if self._after_epoch(copy.deepcopy(record)) and epoch + 1 < self._plan.total_epochs:
            self._request.made = True
        if self._told_to_leave() and self._writer.newest <= epoch:
            self._save(states, epoch)
        if self._writer.newest == epoch + 1 and self._told_to_leave():  # if SIGTERM came only now, the run is saved after its next segment
            raise Terminated(self._request.saved)

    def _save(self, states: States, epoch: int) -> None:
        self._writer.save(epoch + 1, states, self._task, self._run)
        self._say_what_is_saved(epoch + 1, 0)

    def _say_what_is_saved(self, epochs: int, step: int) -> None:
        self._saved_epoch, self._saved_seconds = epochs, time.perf_counter()
        self._request.saved = what_is_saved(self._plan, epochs, step)

    def _check_finite(self, metrics: dict[str, np.ndarray], finite: np.ndarray, epoch: int, step: int = 0) -> None:
        """Raises `Diverged` if the run has diverged. This is done before each save, so that checkpoints hold finite numbers only.

        Args:
            metrics: the metrics of the epoch, or of its first `step` steps, as `epochs.over_steps` returns them.
            finite: whether the state of each group is finite.
            epoch: the epoch, from 0.
            step: how many of its steps are done; 0 if all are.
        """
        plan, active = self._plan, self._plan.active(epoch)
        groups, steps = range(len(plan.groups)) if active is None else [active], plan.steps_per_epoch
        problems = []
        for group, first, count in zip(groups, metrics["first_nonfinite"], metrics["nonfinite_steps"], strict=True):
            if self._config.on_nonfinite == "stop" and first:
                problems.append((int(first), f"step {first} of {steps}: the loss of group{group} is not finite"))
            elif count == steps:
                problems.append((steps, f"no step of group{group} was finite"))
        after = f"after its step {step}" if step else "after its last step"
        problems += [(steps, f"{after} a number of group{i}'s state is not finite") for i in np.flatnonzero(~finite)]
        if problems:
            kept = f"the checkpoint of epoch {self._writer.newest} is kept" if self._writer.newest else "there is no checkpoint yet"
            fix = "lower config.learning_rate, or set config.clip_norm or config.on_nonfinite=skip, in a new --workdir"
            raise Diverged(f"epoch {epoch + 1}, {min(problems)[1]}; {kept}; {fix}")


def what_is_saved(plan: Plan, epochs: int, step: int) -> str:
    """Says where a run goes on that was saved after so many epochs, and so many steps of the next one."""
    if not epochs and not step:
        return NOTHING
    of = f"of {plan.total_epochs}"
    where = f"epoch {epochs + 1} {of}, step {step} of {plan.steps_per_epoch}," if step else f"epoch {epochs} {of}"
    return f"{where} is saved; the same command goes on from there"


@jax.jit
def _finite_groups(states: States) -> jax.Array:
    """Whether the whole state of each group is finite. No loss has been computed yet from the state after an epoch's last step."""
    return jnp.stack([trainer.all_finite(state) for state in states])


def _is_short(plan: Plan, compiled: jax.stages.Compiled) -> bool:
    """Whether an epoch is so short that it should be run once, with its result thrown away, before it is timed.

    On CPU the libraries that XLA calls make their kernels when a program first runs, which takes some tenths of a second. That would be a
    large part of the time of a short epoch.
    """
    costs = compiled.cost_analysis() or {}  # counts the body of a loop once; None if the compiler does not say
    return 0 < costs.get("flops", 0.0) * plan.steps_per_epoch < _SHORT_EPOCH


# The metrics of every rule. Any other is the rule's own.
_COMMON = ("loss", "local_loss", "head_loss", "accuracy", "ensemble_accuracy", "nonfinite_steps", "first_nonfinite")


def _record(plan: Plan, metrics: dict[str, np.ndarray], epoch: int, seconds: float) -> dict[str, Any]:
    """The line of metrics.jsonl for an epoch (from 0), but for its validation. A group that did not train has None in each list."""
    active = plan.active(epoch)

    def per_group(values: np.ndarray) -> list[float | None]:
        trained: list[float | None] = [float(value) for value in values]
        return trained if active is None else [trained[0] if i == active else None for i in range(len(plan.groups))]

    record: dict[str, Any] = {"epoch": epoch + 1} | ({} if active is None else {"group": active})
    if plan.config.on_nonfinite == "skip":
        record["skipped_steps_per_group"] = per_group(metrics["nonfinite_steps"])
    own = {f"{name}_per_group": per_group(values) for name, values in metrics.items() if name not in _COMMON}
    return record | {
        "loss": float(metrics["loss"].sum()),
        "loss_per_group": per_group(metrics["loss"]),
        "local_loss_per_group": per_group(metrics["local_loss"]),
        "head_loss_per_group": per_group(metrics["head_loss"]),
        **own,  # the rule's
        "train_accuracy": float(metrics["ensemble_accuracy"]),
        "train_accuracy_per_group": per_group(metrics["accuracy"]),
        "images_per_second": plan.steps_per_epoch * plan.config.batch_size / seconds,
        "seconds": seconds,
    }
