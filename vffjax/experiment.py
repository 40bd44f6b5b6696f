"""One run from configuration to summary: data, epochs, validation, checkpoints, record. Owns a workdir; all else is pure."""

import contextlib
import dataclasses
import os
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vffjax import data as data_module
from vffjax import early_exit, feature_cache, inference
from vffjax.checkpoint import Checkpoints, Writer, sha256_of
from vffjax.config import Config, check_against_data
from vffjax.data import Dataset
from vffjax.errors import UserError, notice
from vffjax.groups import GroupState, make_groups
from vffjax.logbook import Logbook, restore_metrics, write_json
from vffjax.paths import local
from vffjax.rules import Task
from vffjax.summary import conclude, executable_bytes, origin
from vffjax.termination import Request, Terminated, deferred
from vffjax.trainer import Images, Plan, all_finite, init_states, make_epoch, make_plan, make_task
from vffjax.weights import local_file, read_weights
from vffjax.workdir import LOCK, check_best, claim_workdir, load_run, locked, sound_epoch


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


def train(config: Config, workdir: pathlib.Path | str) -> dict[str, Any]:
    """Trains, or goes on where the workdir's newest sound checkpoint is, to the end; returns what `summary.json` holds.

    Raises `UserError` for bad input, `Terminated` if SIGTERM came while it trained, once the epoch has been saved.
    """
    workdir = local(workdir, "--workdir")
    claim_workdir(workdir, config)
    keep_compiled_programs()
    with contextlib.ExitStack() as held:
        used = (workdir / LOCK).exists()
        if used:
            held.enter_context(locked(workdir))  # while another run writes here, that is the answer, and no data are read for it
        dataset = data_module.load(config)
        plan = plan_for(config, dataset)
        workdir.mkdir(parents=True, exist_ok=True)
        # Not earlier: bad input leaves one line, and no folder.
        notice(f"workdir {workdir}; {describe(plan)}; {jax.devices()[0].device_kind}")
        if not used:
            held.enter_context(locked(workdir))
        claim_workdir(workdir, config)  # again, now that nobody else can have written here since
        if not (workdir / "config.json").exists():
            write_json(workdir / "config.json", config.to_dict())
        with deferred() as told_to_leave:
            return _train_in(config, workdir, dataset, plan, told_to_leave)


def _train_in(config: Config, workdir: pathlib.Path, dataset: Dataset, plan: Plan, told_to_leave: Request) -> dict[str, Any]:
    checkpoints = Checkpoints(workdir)
    done = sound_epoch(checkpoints, plan)
    if done:
        states, task = checkpoints.restore(done, plan)
        run = checkpoints.run(done)
        if run["data_sha256"] != dataset.sha256():
            raise UserError(
                f"config.dataset={config.dataset!r}: other images or labels than the run began with; restore them, or start anew"
            )
    else:
        states, task = _start(plan, dataset)
        run = _run_state(plan, dataset)
    restore_metrics(workdir, run["history"])
    with contextlib.closing(checkpoints.writer()) as writer:
        if done < plan.total_epochs:
            run = _run_epochs(plan, dataset, task, states, run, writer, workdir, told_to_leave)
    check_best(checkpoints, plan, run["history"], {})
    best = checkpoints.best()
    states, task = checkpoints.restore(best, plan)
    test = on_device(dataset.test)
    found = np.asarray(inference.make_scores(plan, config.inference)(task, states, test.images))
    chosen = checkpoints.run(best)
    measured = measure(found, test.labels, tuple(chosen["voting"]), "test")
    return conclude(plan, dataset, states, task, chosen, measured, run, workdir)


def _start(plan: Plan, dataset: Dataset) -> tuple[tuple[GroupState, ...], Task]:
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
    scores = inference.make_scores(plan, plan.config.inference)
    done, here = run["epoch"], origin()
    if run["origins"][-1:] != [here]:
        run["origins"].append(here)
    with Logbook(workdir, plan.total_epochs, done) as logbook:
        run_epoch, compiled_for = None, None
        for epoch in range(done, plan.total_epochs):
            active = plan.active(epoch)
            if run_epoch is None or active != compiled_for:
                # Compiled apart, so that no epoch's time holds it, and nothing can be compiled again.
                start = time.perf_counter()
                run_epoch, train_data, largest = _prepare_epoch(plan, active, task, states, train_data)
                run["compile_seconds"] += time.perf_counter() - start
                run["peak_bytes"] = max(run["peak_bytes"], executable_bytes(largest))
                compiled_for = active
            start = time.perf_counter()
            states, metrics = run_epoch(task, states, train_data, jnp.int32(epoch))
            # Queued behind the epoch, so that the device goes on while the host waits for the epoch's end.
            queued = (metrics, _finite_groups(states), scores(task, states, validation.images) if len(validation.labels) else None)
            jax.block_until_ready(metrics)
            seconds = time.perf_counter() - start
            metrics, finite, found = jax.device_get(queued)
            _check_finite(plan, metrics, finite, epoch, active, run["epoch"])

            validated = validate(found, validation, trained_groups(plan, epoch))
            # First the line, then the checkpoint: what has a line and no checkpoint is trained again and gets a new line.
            record = logbook.epoch(_record(plan, metrics, epoch, active, seconds) | validated)
            scheduled = plan.saves(epoch + 1)
            run["history"].append(record)
            if scheduled or told_to_leave.made:
                run |= validated | {"epoch": epoch + 1, "scheduled": scheduled, "trained_groups": trained_groups(plan, epoch)}
                writer.save(epoch + 1, states, task, run)
            # Of an epoch that is not saved, another is trained first: the signal came after the line above.
            if told_to_leave.made and run["epoch"] == epoch + 1:
                raise Terminated(f"epoch {epoch + 1} of {plan.total_epochs} is saved; the same command goes on from there")
    return run


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


def _run_state(plan: Plan, dataset: Dataset) -> dict[str, Any]:
    """What a checkpoint keeps beside its arrays, before the first epoch: to go on, to be evaluated without the training data, and to say
    what made it. Later it holds the last epoch's validation too."""
    return {
        "epoch": 0,
        "history": [],
        "config": plan.config.to_dict(),
        "data_sha256": dataset.sha256(),
        "init_from_sha256": sha256_of(local_file(plan.config)) if plan.config.init_from else None,
        "train_size": len(dataset.train.labels),
        "image_shape": list(dataset.image_shape),
        "class_names": list(dataset.class_names),
        "compile_seconds": 0.0,
        "peak_bytes": 0,
        "origins": [],  # more than one if it went on with other versions or on another device
    }


def evaluate(
    workdir: pathlib.Path | str,
    inference_name: str = "",
    epoch: str = "best",
    data_dir: str = "",
    test: bool = True,
    early: early_exit.Wanted = early_exit.DEFAULT,
) -> dict[str, Any]:
    """Validation and, unless `test` is off, test errors in percent of a trained run; voting groups are chosen on the validation data.

    `early` is of early exit alone, whose threshold is chosen on the validation data too if none is given.
    """
    plan, states, task, run = load_run(workdir, epoch)
    config = dataclasses.replace(plan.config, data_dir=data_dir or plan.config.data_dir)
    about = {"workdir": str(workdir), "epoch": run["epoch"]}
    return about | _judge(plan, states, task, data_module.load(config), run["trained_groups"], inference_name, test, early)


def evaluate_start(config: Config, inference_name: str = "", early: early_exit.Wanted = early_exit.DEFAULT) -> dict[str, Any]:
    """As `evaluate`, of the weights that a run of `config` would start from: what config.init_from is worth as it is."""
    dataset = data_module.load(config)
    plan = plan_for(config, dataset)
    states, task = _start(plan, dataset)
    if (inference_name or config.inference) != "sweep" and not any(np.any(state.params["head"]["kernel"]) for state in states):
        fix = "evaluate a run that has trained them, or weights with fc for these classes and config.head_grid=1"
        raise UserError(f"config.init_from={config.init_from!r}: no head came with the weights, and new ones know nothing; {fix}")
    about = {"init_from": config.init_from, "epoch": 0}
    return about | _judge(plan, states, task, dataset, len(plan.groups), inference_name, True, early)


def _judge(
    plan: Plan,
    states: tuple[GroupState, ...],
    task: Task,
    dataset: Dataset,
    trained: int,
    inference_name: str,
    test: bool,
    early: early_exit.Wanted,
) -> dict[str, Any]:
    name = inference_name or plan.config.inference
    if name == "sweep" and plan.config.rule == "head":
        raise UserError("--inference=sweep: rule head never sees a labelled image; use --inference=heads")
    scores = inference.make_scores(plan, "heads" if name == "early_exit" else name)
    validation = on_device(dataset.validation)
    seen = np.asarray(scores(task, states, validation.images)) if len(validation.labels) else None
    validated = validate(seen, validation, trained)
    header = {"inference": name} | validated
    leaving = None
    if name == "early_exit":
        votes = early_exit.votes_of(tuple(validated["voting"]), early.exits, seen, validation.labels)
        leaving = early_exit.EarlyExit(plan, task, states, votes, seen, validation.labels)
        header |= {"ensemble_val_error": validated["val_error"], "exits": early.exits} | leaving.choose(early.threshold)
    if not test:
        return header
    unseen = on_device(dataset.test)
    found = np.asarray(scores(task, states, unseen.images))[:trained]
    header |= measure(found, unseen.labels, tuple(validated["voting"]), "test")
    if leaving is not None:
        header |= {"ensemble_test_error": header["test_error"]} | leaving.measure(unseen, header["threshold"], early.curve)
    return header
