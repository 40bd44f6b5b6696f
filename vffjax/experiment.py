"""One run from configuration to summary: data, epochs, validation, checkpoints, record. Owns a workdir; all else is pure."""

import contextlib
import dataclasses
import importlib.metadata
import json
import pathlib
import platform
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vffjax import data as data_module
from vffjax import inference
from vffjax.checkpoint import Checkpoints
from vffjax.config import Config, check_against_data, from_json
from vffjax.data import Dataset
from vffjax.errors import UserError, bad_key
from vffjax.groups import GroupState, make_groups
from vffjax.logbook import Logbook, read_metrics, write_json
from vffjax.plots import plot_curves, plot_features
from vffjax.rules import Task, prepare_labelled
from vffjax.trainer import Images, Plan, init_states, make_epoch, make_plan, make_task

# Where the data lie does not change a run.
_FREE_KEYS = ("data_dir",)


def claim_workdir(workdir: pathlib.Path, config: Config) -> None:
    """Refuses a workdir that holds another configuration's run."""
    path = workdir / "config.json"
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir={workdir}: not a folder; give a folder, new or of the same run")
    if not path.exists():
        if Checkpoints(workdir).epochs():
            raise UserError(f"--workdir={workdir}: has checkpoints but no {path.name}; restore it, or give another --workdir")
        return
    wanted, found = config.to_dict(), read_config(workdir).to_dict()
    for key in wanted:
        if key not in _FREE_KEYS and wanted[key] != found[key]:
            raise bad_key(key, wanted[key], f"--workdir {workdir} holds a run with {found[key]!r}", "give another --workdir")


def read_config(workdir: pathlib.Path) -> Config:
    """The configuration of the run in `workdir`."""
    path = workdir / "config.json"
    try:
        return from_json(json.loads(path.read_text()), str(path))
    except FileNotFoundError:
        raise UserError(f"--workdir={workdir}: no run here ({path.name} is missing); give the folder of a run") from None
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); restore it, or start in a new --workdir") from None


def plan_for(config: Config, dataset: Dataset) -> Plan:
    """The plan of a run on this data, every check done before anything is compiled."""
    groups = len(make_groups(config, dataset.num_classes))
    check_against_data(config, len(dataset.train.labels), dataset.image_shape, dataset.num_classes, groups)
    return make_plan(config, len(dataset.train.labels), dataset.num_classes)


def on_device(split: data_module.Split) -> Images:
    return Images(jnp.asarray(split.images), jnp.asarray(split.labels))


def train(config: Config, workdir: pathlib.Path | str) -> dict[str, Any]:
    """Trains, or goes on where the workdir's latest checkpoint is, to the end; returns what `summary.json` holds."""
    workdir = pathlib.Path(workdir)
    claim_workdir(workdir, config)
    dataset = data_module.load(config)
    plan = plan_for(config, dataset)
    workdir.mkdir(parents=True, exist_ok=True)
    if not (workdir / "config.json").exists():
        write_json(workdir / "config.json", config.to_dict())
    print(f"workdir {workdir}", file=sys.stderr, flush=True)  # not earlier: bad input leaves one line, and no folder

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
    return _conclude(plan, dataset, checkpoints, workdir, cost)


def _run_epochs(
    plan: Plan, dataset: Dataset, task: Task, states: tuple[GroupState, ...], done: int, checkpoints: Checkpoints, workdir: pathlib.Path
) -> dict[str, Any]:
    train_data, validation = on_device(dataset.train), on_device(dataset.validation)
    scores = inference.make_scores(plan, plan.config.inference)
    cost: dict[str, Any] = {"compile_seconds": 0.0, "peak_bytes": 0}
    with Logbook(workdir, plan.total_epochs, done) as logbook, contextlib.closing(checkpoints.writer(plan)) as writer:
        run_epoch, compiled_for = None, -1
        for epoch in range(done, plan.total_epochs):
            active = plan.active(epoch)
            if run_epoch is None or active != compiled_for:
                # Compiled apart, so that no epoch's time holds it, and nothing can be compiled again.
                start = time.perf_counter()
                run_epoch = make_epoch(plan, active).lower(task, states, train_data, jnp.int32(epoch)).compile()
                cost["compile_seconds"] += time.perf_counter() - start
                cost["peak_bytes"] = max(cost["peak_bytes"], executable_bytes(run_epoch))
                compiled_for = active
            start = time.perf_counter()
            states, metrics = run_epoch(task, states, train_data, jnp.int32(epoch))
            metrics = jax.device_get(metrics)  # waits for the epoch
            seconds = time.perf_counter() - start
            _check_finite(metrics, np.asarray(_finite_groups(states)), epoch + 1, active)

            validated = _validate(scores, task, states, validation, trained_groups(plan, epoch))
            # First the line, then the checkpoint: what has a line and no checkpoint is trained again and gets a new line.
            logbook.epoch(_record(plan, metrics, epoch, active, seconds) | validated)
            last_of_stage = (epoch + 1) % plan.config.epochs == 0
            if last_of_stage or (epoch + 1) % plan.config.checkpoint_every == 0:
                writer.save(epoch + 1, states, task, _run_state(plan, dataset, epoch + 1) | validated)
    return cost


def _record(plan: Plan, metrics: dict[str, np.ndarray], epoch: int, active: int | None, seconds: float) -> dict[str, Any]:
    def per_group(values: np.ndarray) -> list[float | None]:
        trained = list(map(float, values))
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


def _validate(scores: Any, task: Task, states: tuple[GroupState, ...], validation: Images, trained: int) -> dict[str, Any]:
    """Errors in percent on validation data, and the groups that vote; without such data all trained groups vote."""
    if len(validation.labels) == 0:
        return {"val_error": None, "val_error_per_group": None, "voting": list(range(trained))}
    found = np.asarray(scores(task, states, validation.images))[:trained]
    voting = inference.choose_voting(found, validation.labels)
    return measure(found, validation.labels, voting, "val") | {"voting": list(voting)}


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


def _conclude(plan: Plan, dataset: Dataset, checkpoints: Checkpoints, workdir: pathlib.Path, cost: dict[str, Any]) -> dict[str, Any]:
    """Test error of the best epoch by validation, with its voting groups; figures and summary."""
    epoch = checkpoints.best()
    run = checkpoints.run(epoch)
    states, task = checkpoints.restore(epoch, plan)
    test = on_device(dataset.test)
    found = np.asarray(inference.make_scores(plan, plan.config.inference)(task, states, test.images))
    measured = measure(found, test.labels, tuple(run["voting"]), "test")

    metrics = read_metrics(workdir)
    summary = measured | {
        "val_error": run["val_error"],
        "voting": run["voting"],
        "epochs": plan.total_epochs,
        "best_epoch": epoch,
        "images_per_second": float(np.median([m["images_per_second"] for m in metrics])),
        "seconds": sum(m["seconds"] for m in metrics),
        **_earlier_cost(workdir, cost),
        "versions": {p: importlib.metadata.version(p) for p in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")}
        | {"python": platform.python_version(), "vffjax": importlib.metadata.version("vffjax")},
        "commit": _commit(),
        "device": jax.devices()[0].device_kind,
        "seed": plan.config.seed,
    }
    write_json(workdir / "summary.json", summary)
    plot_curves(workdir)
    draw_features(workdir / "features.png", plan, dataset, states, task)
    return summary


def _earlier_cost(workdir: pathlib.Path, cost: dict[str, Any]) -> dict[str, Any]:
    """A finished run that is started again compiles nothing; its first summary knows what it cost."""
    path = workdir / "summary.json"
    if cost["peak_bytes"] is None and path.exists():
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            earlier = json.loads(path.read_text())
            return {key: earlier[key] for key in cost}
    return cost


def executable_bytes(compiled: jax.stages.Compiled) -> int:
    """Peak bytes of a compiled program: the device's own count where it keeps one, else the compiler's plan."""
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    plan = compiled.memory_analysis()
    return int(plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes + plan.temp_size_in_bytes)


def _commit() -> str | None:
    here = pathlib.Path(__file__).resolve().parent
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5)
        return found.stdout.strip() or None if found.returncode == 0 else None
    return None


def draw_features(path: pathlib.Path, plan: Plan, dataset: Dataset, states: tuple[GroupState, ...], task: Task) -> None:
    """`features.png`: codebook, first filters, and every group's maps of the three kinds of data, for three test images."""
    labels = dataset.test.labels[:3]
    wrong = (labels + 1) % dataset.num_classes
    images = dataset.test.images[:3]
    x = (images / 255 - np.asarray(dataset.mean)) / np.asarray(dataset.std)
    x = jnp.asarray(x, jnp.float32)
    kinds = [x] + [
        jnp.concatenate([prepare_labelled(plan.config, task, x[i : i + 1], jnp.asarray(y)) for i, y in enumerate(ys)])
        for ys in (labels, wrong)
    ]
    streams = []
    z, clean = jnp.concatenate(kinds), len(labels)
    for group, state in zip(plan.groups, states, strict=True):
        z, _ = group.features(state.params, state.batch_stats, z, clean, False)
        streams.append(np.asarray(z, np.float32).reshape(3, len(labels), *z.shape[1:]))
    plot_features(
        path,
        images=images / 255,
        class_names=dataset.class_names,
        labels=labels,
        wrong_labels=wrong,
        codebook=None if plan.config.rule == "ff" else np.asarray(task.codebook),
        streams=streams,
        filters=np.asarray(states[0].params["layers_0"]["kernel"]),
    )


def load_run(workdir: pathlib.Path | str, epoch: str = "best") -> tuple[Plan, tuple[GroupState, ...], Task, dict[str, Any]]:
    """A trained run without its data: plan, groups, task and run state of the `best`, the `latest`, or a numbered epoch."""
    workdir = pathlib.Path(workdir)
    config = read_config(workdir)
    checkpoints = Checkpoints(workdir)
    chosen = {"best": checkpoints.best, "latest": checkpoints.latest}.get(epoch, lambda: _numbered(checkpoints, epoch))()
    run = checkpoints.run(chosen)
    plan = make_plan(config, run["train_size"], len(run["class_names"]))
    states, task = checkpoints.restore(chosen, plan)
    return plan, states, task, run


def _numbered(checkpoints: Checkpoints, epoch: str) -> int:
    saved = checkpoints.epochs()
    if not epoch.isdecimal() or int(epoch) not in saved:
        raise UserError(f"--epoch={epoch}: not saved; choose best, latest, or one of {', '.join(map(str, saved)) or 'none'}")
    return int(epoch)


def evaluate(workdir: pathlib.Path | str, inference_name: str = "", epoch: str = "best", data_dir: str = "") -> dict[str, Any]:
    """Validation and test errors in percent of a trained run; voting groups are chosen on the validation data."""
    plan, states, task, run = load_run(workdir, epoch)
    name = inference_name or plan.config.inference
    if name == "sweep" and plan.config.rule == "head":
        raise UserError("--inference=sweep: rule head never sees a labelled image; use --inference=heads")
    config = dataclasses.replace(plan.config, data_dir=data_dir or plan.config.data_dir)
    dataset = data_module.load(config)
    scores = inference.make_scores(plan, name)
    validated = _validate(scores, task, states, on_device(dataset.validation), run["trained_groups"])
    test = on_device(dataset.test)
    found = np.asarray(scores(task, states, test.images))[: run["trained_groups"]]
    header = {"workdir": str(workdir), "epoch": run["epoch"], "inference": name}
    return header | validated | measure(found, test.labels, tuple(validated["voting"]), "test")
