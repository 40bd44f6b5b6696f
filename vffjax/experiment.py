"""One run from configuration to summary: data, epochs, validation, checkpoints, record. Owns a workdir; all else is pure."""

import contextlib
import dataclasses
import os
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vffjax import data as data_module
from vffjax import feature_cache, inference
from vffjax.checkpoint import Checkpoints
from vffjax.config import Config, check_against_data
from vffjax.data import Dataset
from vffjax.errors import UserError
from vffjax.groups import GroupState, make_groups
from vffjax.logbook import Logbook, write_json
from vffjax.rules import Task
from vffjax.summary import conclude, executable_bytes
from vffjax.trainer import Images, Plan, init_states, make_epoch, make_plan, make_task
from vffjax.workdir import claim_workdir, load_run, locked


def plan_for(config: Config, dataset: Dataset) -> Plan:
    """The plan of a run on this data, every check done before anything is compiled."""
    groups = len(make_groups(config, dataset.num_classes))
    check_against_data(config, len(dataset.train.labels), dataset.image_shape, dataset.num_classes, groups)
    return make_plan(config, len(dataset.train.labels), dataset.num_classes)


def describe(plan: Plan) -> str:
    """The groups in words, and whether they are what the rule's name promises."""
    shown = " | ".join(" ".join(str(layer.width) for layer in group.module.layers) for group in plan.groups)
    alone = len(plan.groups) == 1 and len(plan.groups[0].module.layers) > 1
    return f"{len(plan.groups)} group(s) of widths {shown}" + (
        " (one group: gradients cross all layers, back-propagation)" if alone else ""
    )


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


def train(config: Config, workdir: pathlib.Path | str) -> dict[str, Any]:
    """Trains, or goes on where the workdir's latest checkpoint is, to the end; returns what `summary.json` holds."""
    workdir = pathlib.Path(workdir)
    claim_workdir(workdir, config)
    keep_compiled_programs()
    dataset = data_module.load(config)
    plan = plan_for(config, dataset)
    workdir.mkdir(parents=True, exist_ok=True)
    # Not earlier: bad input leaves one line, and no folder.
    print(f"workdir {workdir}; {describe(plan)}; {jax.devices()[0].device_kind}", file=sys.stderr, flush=True)

    with locked(workdir):
        claim_workdir(workdir, config)  # again, now that nobody else can have written here since
        if not (workdir / "config.json").exists():
            write_json(workdir / "config.json", config.to_dict())
        return _train_in(config, workdir, dataset, plan)


def _train_in(config: Config, workdir: pathlib.Path, dataset: Dataset, plan: Plan) -> dict[str, Any]:
    checkpoints = Checkpoints(workdir)
    done = checkpoints.epochs()[-1] if checkpoints.epochs() else 0
    if done:
        states, task = checkpoints.restore(done, plan)
    else:
        states = init_states(plan, dataset.image_shape)
        task = make_task(config, dataset.num_classes, dataset.image_shape, dataset.mean, dataset.std)
    cost: dict[str, Any] = {"compile_seconds": 0.0, "peak_bytes": None}
    if done < plan.total_epochs:
        cost = _run_epochs(plan, dataset, task, states, done, checkpoints, workdir)
    epoch = checkpoints.best()
    run = checkpoints.run(epoch)
    states, task = checkpoints.restore(epoch, plan)
    test = on_device(dataset.test)
    found = np.asarray(inference.make_scores(plan, config.inference)(task, states, test.images))
    measured = measure(found, test.labels, tuple(run["voting"]), "test")
    return conclude(plan, dataset, states, task, run, measured, cost, workdir)


def _run_epochs(
    plan: Plan, dataset: Dataset, task: Task, states: tuple[GroupState, ...], done: int, checkpoints: Checkpoints, workdir: pathlib.Path
) -> dict[str, Any]:
    train_data, validation = on_device(dataset.train), on_device(dataset.validation)
    scores = inference.make_scores(plan, plan.config.inference)
    cost: dict[str, Any] = {"compile_seconds": 0.0, "peak_bytes": 0}
    with Logbook(workdir, plan.total_epochs, done) as logbook, contextlib.closing(checkpoints.writer()) as writer:
        run_epoch, compiled_for = None, None
        for epoch in range(done, plan.total_epochs):
            active = plan.active(epoch)
            if run_epoch is None or active != compiled_for:
                # Compiled apart, so that no epoch's time holds it, and nothing can be compiled again.
                start = time.perf_counter()
                run_epoch, train_data, largest = _prepare_epoch(plan, active, task, states, train_data)
                cost["compile_seconds"] += time.perf_counter() - start
                cost["peak_bytes"] = max(cost["peak_bytes"], executable_bytes(largest))
                compiled_for = active
            start = time.perf_counter()
            states, metrics = run_epoch(task, states, train_data, jnp.int32(epoch))
            # Queued behind the epoch, so that the device goes on while the host waits for the epoch's end.
            queued = (metrics, _finite_groups(states), scores(task, states, validation.images) if len(validation.labels) else None)
            jax.block_until_ready(metrics)
            seconds = time.perf_counter() - start
            metrics, finite, found = jax.device_get(queued)
            _check_finite(metrics, finite, epoch + 1, active)

            validated = validate(found, validation, trained_groups(plan, epoch))
            # First the line, then the checkpoint: what has a line and no checkpoint is trained again and gets a new line.
            logbook.epoch(_record(plan, metrics, epoch, active, seconds) | validated)
            last_of_stage = (epoch + 1) % plan.config.epochs == 0
            if last_of_stage or (epoch + 1) % plan.config.checkpoint_every == 0:
                writer.save(epoch + 1, states, task, _run_state(plan, dataset, epoch + 1) | validated)
    return cost


def _prepare_epoch(plan: Plan, active: int | None, task: Task, states: tuple[GroupState, ...], data: Images) -> tuple[Any, Images, Any]:
    """The compiled epoch of a stage, the data it takes, and the largest executable in it. Frozen features are computed here."""
    data = data._replace(features=None)
    if active and plan.config.feature_cache != "none":
        data = feature_cache.with_features(plan, active, task, states, data)
        if plan.config.feature_cache == "host":
            epoch, largest = feature_cache.make_host_epoch(plan, active, task, states, data)
            return epoch, data, largest
    compiled = make_epoch(plan, active).lower(task, states, data, jnp.int32(0)).compile()
    return compiled, data, compiled


def _record(plan: Plan, metrics: dict[str, np.ndarray], epoch: int, active: int | None, seconds: float) -> dict[str, Any]:
    def per_group(values: np.ndarray) -> list[float | None]:
        trained: list[float | None] = [float(value) for value in values]
        return trained if active is None else [trained[0] if i == active else None for i in range(len(plan.groups))]

    record: dict[str, Any] = {"epoch": epoch + 1} | ({} if active is None else {"group": active})
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


def validate(scores: np.ndarray | None, validation: Images, trained: int) -> dict[str, Any]:
    """Errors in percent from scores [groups, n, classes] on validation data, and the groups that vote; without data all trained do."""
    if scores is None:
        return {"val_error": None, "val_error_per_group": None, "voting": list(range(trained))}
    voting = inference.choose_voting(scores[:trained], validation.labels)
    return measure(scores[:trained], validation.labels, voting, "val") | {"voting": list(voting)}


def trained_groups(plan: Plan, epoch: int) -> int:
    """How many groups have trained at the end of this epoch (from 0): all, or those that the sequential schedule has reached."""
    active = plan.active(epoch)
    return len(plan.groups) if active is None else active + 1


def measure(scores: np.ndarray, labels: Any, voting: tuple[int, ...], split: str) -> dict[str, Any]:
    """`SPLIT_error` of the voting ensemble and `SPLIT_error_per_group`, in percent."""
    return {
        f"{split}_error": inference.error_percent(inference.ensemble(scores, voting), labels),
        f"{split}_error_per_group": [inference.error_percent(group, labels) for group in scores],
    }


@jax.jit
def _finite_groups(states: tuple[GroupState, ...]) -> jax.Array:
    """Of each group, whether all its parameters and statistics are finite: after the epoch's last step no loss has seen them."""
    return jnp.stack([jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(state[:2])]).all() for state in states])


def _check_finite(metrics: dict[str, np.ndarray], finite: np.ndarray, epoch: int, active: int | None) -> None:
    """Ends a run that has diverged before it is saved: the checkpoints hold finite numbers only."""
    bad = ~finite
    bad[slice(None) if active is None else slice(active, active + 1)] |= ~np.isfinite(metrics["loss"])
    if bad.any():
        what = f"epoch {epoch}: the loss or a parameter of group{int(bad.argmax())} is not finite"
        raise UserError(f"{what}; lower config.learning_rate or set config.clip_norm, in a new --workdir")


def _run_state(plan: Plan, dataset: Dataset, epoch: int) -> dict[str, Any]:
    """What a checkpoint needs beside its arrays: to go on, and to be evaluated without the training data."""
    return {
        "epoch": epoch,
        "trained_groups": trained_groups(plan, epoch - 1),
        "seed": plan.config.seed,  # every key is folded from it and the epoch
        "steps_per_epoch": plan.steps_per_epoch,
        "train_size": len(dataset.train.labels),
        "image_shape": list(dataset.image_shape),
        "class_names": list(dataset.class_names),
    }


def evaluate(
    workdir: pathlib.Path | str, inference_name: str = "", epoch: str = "best", data_dir: str = "", test: bool = True
) -> dict[str, Any]:
    """Validation and, unless `test` is off, test errors in percent of a trained run; voting groups are chosen on the validation data."""
    plan, states, task, run = load_run(workdir, epoch)
    name = inference_name or plan.config.inference
    if name == "sweep" and plan.config.rule == "head":
        raise UserError("--inference=sweep: rule head never sees a labelled image; use --inference=heads")
    config = dataclasses.replace(plan.config, data_dir=data_dir or plan.config.data_dir)
    dataset = data_module.load(config)
    scores = inference.make_scores(plan, name)
    validation = on_device(dataset.validation)
    seen = np.asarray(scores(task, states, validation.images)) if len(validation.labels) else None
    validated = validate(seen, validation, run["trained_groups"])
    header = {"workdir": str(workdir), "epoch": run["epoch"], "inference": name} | validated
    if not test:
        return header
    unseen = on_device(dataset.test)
    found = np.asarray(scores(task, states, unseen.images))[: run["trained_groups"]]
    return header | measure(found, unseen.labels, tuple(validated["voting"]), "test")
