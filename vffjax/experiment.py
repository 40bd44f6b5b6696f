"""One run from configuration to summary: data, epochs, validation, checkpoints, record. Owns a workdir; all else is pure."""

import contextlib
import copy
import os
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vffjax import data as data_module
from vffjax import feature_cache, inference, run_state
from vffjax.checkpoint import Checkpoints, Writer
from vffjax.checks import check_against_data
from vffjax.config import Config
from vffjax.data import Dataset
from vffjax.errors import UserError, bad_key, notice
from vffjax.groups import GroupState, make_groups
from vffjax.inference import measure, validate
from vffjax.logbook import Logbook, restore_metrics
from vffjax.paths import local
from vffjax.plan import Images, Plan, init_states, make_plan, make_task
from vffjax.rules import Task
from vffjax.saved_epoch import sha256_of
from vffjax.summary import conclude, executable_bytes, origin
from vffjax.termination import Request, Terminated, deferred
from vffjax.trainer import all_finite, make_epoch
from vffjax.weights import local_file, read_weights
from vffjax.workdir import LOCK, check_best, claim_workdir, locked, sound_epochs, write_config

# FLOP of an epoch that takes a second or less on two CPU cores.
_SHORT_EPOCH = 2e10


def plan_for(config: Config, dataset: Dataset) -> Plan:
    """The plan of a run on this data, every check done before anything is compiled."""
    groups = len(make_groups(config, dataset.num_classes))
    check_against_data(config, len(dataset.train.labels), dataset.image_shape, dataset.num_classes, groups)
    return make_plan(config, len(dataset.train.labels), dataset.num_classes)


def describe(plan: Plan) -> str:
    """The groups in words, and whether they are what the rule's name promises."""
    shown = " | ".join(" ".join(str(layer.width) for layer in group.module.layers) for group in plan.groups)
    alone = len(plan.groups) == 1 and len(plan.groups[0].module.layers) > 1
    note = " (one group: gradients cross all layers, back-propagation)" if alone else ""
    frozen = plan.config.frozen_groups
    note = f" (the first {frozen} frozen, their heads learn)" if frozen else note
    return f"{len(plan.groups)} group(s) of widths {shown}{note}"


def on_device(split: data_module.Split) -> Images:
    return Images(jnp.asarray(split.images), jnp.asarray(split.labels))


def keep_compiled_programs() -> None:
    """On GPU and TPU, the second start of a configuration compiles nothing: programs are kept in `$XDG_CACHE_HOME/vffjax`, or
    `~/.cache/vffjax`. What JAX was told otherwise wins (`JAX_COMPILATION_CACHE_DIR`).

    Not on CPU, where a program kept by one machine can be wrong for another that shares the home folder.
    """
    told = jax.config.values.get("jax_compilation_cache_dir")
    if jax.default_backend() != "cpu" and not told:
        home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(home) / "vffjax"))


def train(config: Config, workdir: pathlib.Path | str, data_sha256: str = "") -> dict[str, Any]:
    """Trains, or goes on where the workdir's newest sound checkpoint is, to the end; returns what `summary.json` holds.

    With a `data_sha256`, the data set must have it. Raises `UserError` for bad input, `Terminated` if SIGTERM came while it trained, once
    the epoch has been saved.
    """
    workdir = local(workdir, "--workdir")
    claim_workdir(workdir, config)
    keep_compiled_programs()
    with contextlib.ExitStack() as held:
        used = (workdir / LOCK).exists()
        if used:
            held.enter_context(locked(workdir))  # while another run writes here, that is the answer, and no data are read for it
        dataset = data_module.load(config)
        if data_sha256:
            check_same_data(config, dataset, data_sha256)
        plan = plan_for(config, dataset)
        workdir.mkdir(parents=True, exist_ok=True)
        # Not earlier: bad input leaves one line, and no folder.
        notice(f"workdir {workdir}; {describe(plan)}; {jax.devices()[0].device_kind}")
        if not used:
            held.enter_context(locked(workdir))
        claim_workdir(workdir, config)  # again, now that nobody else can have written here since
        with deferred() as told_to_leave:
            return _train_in(config, workdir, dataset, plan, told_to_leave)


def check_same_data(config: Config, dataset: Dataset, sha256: str) -> None:
    """Raises `UserError` if a data set is not the one with this digest."""
    if dataset.sha256() != sha256:
        key = "data_dir" if config.data_dir else "dataset"
        raise bad_key(key, getattr(config, key), "other images or labels than the run began with", "restore them, or start anew")


def _train_in(config: Config, workdir: pathlib.Path, dataset: Dataset, plan: Plan, told_to_leave: Request) -> dict[str, Any]:
    checkpoints = Checkpoints(workdir)
    sound = sound_epochs(checkpoints, config)
    done = max(sound, default=0)
    if done:
        run = copy.deepcopy(sound[done].run) | {"config": config.to_dict()}
        check_same_data(config, dataset, run["data_sha256"])
    else:
        file = local_file(config) if config.init_from else ""
        about = {"data_sha256": dataset.sha256(), "train_size": len(dataset.train.labels), "image_shape": list(dataset.image_shape)}
        run = run_state.new_state(config, about | {"class_names": list(dataset.class_names)}, sha256_of(file) if file else None)
    for line in write_config(workdir, config):
        notice(line)
    _note_origin(run, origin(config), trains=done < plan.total_epochs)
    restore_metrics(workdir, run["history"])
    with contextlib.closing(checkpoints.writer(sound)) as writer:
        if done < plan.total_epochs:
            states, task = sound[done].restore(plan) if done else start(plan, dataset)
            run = _run_epochs(plan, dataset, task, states, run, writer, workdir, told_to_leave)
    best = check_best(checkpoints, run, sound)
    assert best is not None  # the last epoch is always saved
    states, task = best.restore(plan)
    test = on_device(dataset.test)
    found = np.asarray(inference.make_scores(plan, config.inference)(task, states, test.images))
    measured = measure(found, test.labels, tuple(best.run["voting"]), "test")
    return conclude(plan, dataset, states, task, best.run, measured, run, workdir)


def _note_origin(run: dict[str, Any], here: dict[str, Any], trains: bool) -> None:
    """Adds `here` to the run's origins, if it trains here and something differs from the last origin, or if it is judged by other settings.

    A finished run that is only judged again keeps the origin that trained it. Older versions wrote no settings; theirs count as equal.
    """
    last = [{"settings": here["settings"]} | origin for origin in run["origins"][-1:]]
    other_settings = any(origin["settings"] != here["settings"] for origin in last)
    if other_settings or (trains and last != [here]):
        run["origins"].append(here)


def start(plan: Plan, dataset: Dataset) -> tuple[tuple[GroupState, ...], Task]:
    """What a run begins with: groups from its seed or from config.init_from, codebook and pixel statistics."""
    config, states = plan.config, init_states(plan, dataset.image_shape)
    if config.init_from:
        states, left_out = read_weights(local_file(config), plan, states)
        for note in left_out:
            notice(f"{config.init_from}: {note}")
    return states, make_task(config, dataset.num_classes, dataset.image_shape, dataset.mean, dataset.std)


def _run_epochs(
    plan: Plan,
    dataset: Dataset,
    task: Task,
    states: tuple[GroupState, ...],
    run: dict[str, Any],
    writer: Writer,
    workdir: pathlib.Path,
    told_to_leave: Request,
) -> dict[str, Any]:
    """Trains what is left of the run after `run`, the state of its newest checkpoint; returns the state of its last."""
    train_data, validation = on_device(dataset.train), on_device(dataset.validation)
    done = run["epoch"]
    began = time.perf_counter()
    finite_groups, scores = _compiled_checks(plan, task, states, validation)
    run["compile_seconds"] += time.perf_counter() - began
    with Logbook(workdir, plan.total_epochs, done) as logbook:
        run_epoch, compiled_for = None, None
        for epoch in range(done, plan.total_epochs):
            active = plan.active(epoch)
            if run_epoch is None or active != compiled_for:
                # Compiled apart, so that no epoch's time holds it, and nothing can be compiled again.
                began = time.perf_counter()
                train_data = train_data._replace(features=None)  # those of the last stage go before the next ones are made
                run_epoch = None
                run_epoch, train_data, largest = _prepare_epoch(plan, active, task, states, train_data)
                if _is_short(plan, largest):
                    jax.block_until_ready(run_epoch(task, jax.tree.map(jnp.copy, states), train_data, jnp.int32(epoch)))
                run["compile_seconds"] += time.perf_counter() - began
                run["peak_bytes"] = max(run["peak_bytes"], executable_bytes(largest))
                compiled_for = active
            began = time.perf_counter()
            states, metrics = run_epoch(task, states, train_data, jnp.int32(epoch))
            # Queued behind the epoch, so that the device goes on while the host waits for the epoch's end.
            queued = (metrics, finite_groups(states), scores(task, states, validation.images) if scores else None)
            jax.block_until_ready(metrics)
            seconds = time.perf_counter() - began
            metrics, finite, found = jax.device_get(queued)
            _check_finite(plan, metrics, finite, epoch, active, run["epoch"])

            validated = validate(found, validation.labels, plan.trained_groups(epoch))
            # First the line, then the checkpoint: what has a line and no checkpoint is trained again and gets a new line.
            record = logbook.epoch(_record(plan, metrics, epoch, active, seconds) | validated)
            scheduled = plan.config.checkpoint_due(epoch + 1)
            run["history"].append(record)
            run["due"] += [epoch + 1] if scheduled else []
            if scheduled or told_to_leave.made:
                run |= validated | {"epoch": epoch + 1, "scheduled": scheduled, "trained_groups": plan.trained_groups(epoch)}
                writer.save(epoch + 1, states, task, run)
            # Of an epoch that is not saved, another is trained first: the signal came after the line above.
            if told_to_leave.made and run["epoch"] == epoch + 1:
                raise Terminated(f"epoch {epoch + 1} of {plan.total_epochs} is saved; the same command goes on from there")
    return run


def _compiled_checks(plan: Plan, task: Task, states: tuple[GroupState, ...], validation: Images) -> tuple[Any, Any]:
    """What follows each epoch, compiled before the first one is timed: whether each group is finite, and the scores of the validation
    images, or None without such images."""
    finite = _finite_groups.lower(states).compile()
    if not len(validation.labels):
        return finite, None
    return finite, inference.make_scores(plan, plan.config.inference).lower(task, states, validation.images).compile()


def _prepare_epoch(plan: Plan, active: int | None, task: Task, states: tuple[GroupState, ...], data: Images) -> tuple[Any, Images, Any]:
    """The compiled epoch of a stage, the data it takes, and the largest executable in it. Frozen features are computed here."""
    if active and plan.config.feature_cache != "none":
        data = feature_cache.with_features(plan, active, task, states, data)
        if plan.config.feature_cache == "host":
            epoch, largest = feature_cache.make_host_epoch(plan, active, task, states, data)
            return epoch, data, largest
    compiled = make_epoch(plan, active).lower(task, states, data, jnp.int32(0)).compile()
    return compiled, data, compiled


def _is_short(plan: Plan, compiled: jax.stages.Compiled) -> bool:
    """Whether an epoch is so short that it is run once, for nothing, before the clock starts.

    On CPU the libraries that XLA calls make their kernels when a program first runs, which takes some tenths of a second. In an epoch of
    that length it would be most of what is measured.
    """
    costs = compiled.cost_analysis() or {}  # of a loop's body once, and None where the compiler does not say
    return 0 < costs.get("flops", 0.0) * plan.steps_per_epoch < _SHORT_EPOCH


def _record(plan: Plan, metrics: dict[str, np.ndarray], epoch: int, active: int | None, seconds: float) -> dict[str, Any]:
    def per_group(values: np.ndarray) -> list[float | None]:
        trained: list[float | None] = [float(value) for value in values]
        return trained if active is None else [trained[0] if i == active else None for i in range(len(plan.groups))]

    record: dict[str, Any] = {"epoch": epoch + 1} | ({} if active is None else {"group": active})
    if plan.config.on_nonfinite == "skip":
        record["skipped_steps_per_group"] = per_group(metrics["nonfinite_steps"])
    return record | {
        "loss": float(metrics["loss"].sum()),
        "loss_per_group": per_group(metrics["loss"]),
        "local_loss_per_group": per_group(metrics["local_loss"]),
        "head_loss_per_group": per_group(metrics["head_loss"]),
        "train_accuracy": float(metrics["ensemble_accuracy"]),
        "train_accuracy_per_group": per_group(metrics["accuracy"]),
        "images_per_second": plan.steps_per_epoch * plan.config.batch_size / seconds,
        "seconds": seconds,
    }


@jax.jit
def _finite_groups(states: tuple[GroupState, ...]) -> jax.Array:
    """Of each group, whether its whole state is finite: after the epoch's last step no loss has seen it."""
    return jnp.stack([all_finite(state) for state in states])


def _check_finite(plan: Plan, metrics: dict[str, np.ndarray], finite: np.ndarray, epoch: int, active: int | None, saved: int) -> None:
    """Ends a run that has diverged before it is saved: the checkpoints hold finite numbers only."""
    groups = range(len(plan.groups)) if active is None else [active]
    problems = []
    for group, first, count in zip(groups, metrics["first_nonfinite"], metrics["nonfinite_steps"], strict=True):
        if plan.config.on_nonfinite == "stop" and first:
            problems.append((int(first), f"step {first} of {plan.steps_per_epoch}: the loss of group{group} is not finite"))
        elif count == plan.steps_per_epoch:
            problems.append((plan.steps_per_epoch, f"no step of group{group} was finite"))
    problems += [(plan.steps_per_epoch, f"after its last step a number of group{i}'s state is not finite") for i in np.flatnonzero(~finite)]
    if problems:
        kept = f"the checkpoint of epoch {saved} is kept" if saved else "there is no checkpoint yet"
        fix = "lower config.learning_rate, or set config.clip_norm or config.on_nonfinite=skip, in a new --workdir"
        raise UserError(f"epoch {epoch + 1}, {min(problems)[1]}; {kept}; {fix}")
