"""What a run writes at its end: summary.json, curves.png and features.png."""

import contextlib
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vffjax.data.sets import Dataset
from vffjax.errors import aid
from vffjax.files import write_json
from vffjax.networks.groups import States
from vffjax.rules.streams import Task
from vffjax.runs.feature_plots import plot_features
from vffjax.runs.plots import plot_curves, title_of
from vffjax.runs.tensorboard import Events
from vffjax.runs.trained import Trained
from vffjax.training.augment import normalise
from vffjax.training.compiled import compiled
from vffjax.training.plan import Plan
from vffjax.training.trainer import feature_maps


def conclude(best: Trained, dataset: Dataset, measured: dict[str, Any], last: dict[str, Any], workdir: pathlib.Path) -> dict[str, Any]:
    """Writes summary.json, curves.png and features.png of a finished run, and its last TensorBoard events; returns what summary.json holds.

    `seconds` and `images_per_second` are those of training alone. Compilation has its own entry; validation and saving are not counted.

    Args:
        best: the run as it was after its best epoch.
        dataset: the run's data, of which the pictures show test images.
        measured: the test errors of that epoch.
        last: the state of the run after its last epoch.
        workdir: the run's folder.
    """
    summary = measured | {
        "val_error": best.run["val_error"],
        "voting": best.run["voting"],
        "epochs": best.plan.total_epochs,
        "best_epoch": best.run["epoch"],
        "images_per_second": float(np.median([m["images_per_second"] for m in last["history"]])),
        "seconds": sum(m["seconds"] for m in last["history"]),
        **{key: last[key] for key in ("compile_seconds", "peak_bytes", "devices", "data_sha256") if key in last},
        **{key: last[key] for key in ("init_from_sha256", "code_sha256") if key in last},
        **{key: best.run[key] for key in ("vote_weights",) if key in best.run},
        **last["origins"][-1],
        "earlier_origins": last["origins"][:-1],
        "seed": best.plan.config.seed,
    }
    write_json(workdir / "summary.json", summary)
    plot_curves(workdir, title_of(workdir, best.plan.config.rule, summary["test_error"]))
    with aid(f"{workdir / 'features.png'}"):
        draw_features(workdir / "features.png", best.plan, dataset, best.states, best.task)
    with contextlib.closing(Events(workdir / "tensorboard", summary["epochs"])) as events:
        events.finish({"test_error": summary["test_error"]}, [workdir / "curves.png", workdir / "features.png"], summary["epochs"])
    return summary


def draw_features(path: pathlib.Path, plan: Plan, dataset: Dataset, states: States, task: Task) -> pathlib.Path | None:
    """`features.png`: codebook, first filters, and every group's maps of test images of different classes.

    Under a rule that tells images a label, three images are drawn, each also with the right and with a wrong label. Under any other rule
    up to nine images are drawn as they are. Returns what `drawing.draw` does.
    """
    rule, labels = plan.rule, dataset.test.labels
    chosen = np.sort(np.unique(labels, return_index=True)[1])[: 9 if rule.told is None else 3]  # the first image of each class
    right = labels[chosen]
    wrong = (right + 1) % dataset.num_classes
    x = normalise(jnp.asarray(dataset.test.images[chosen]), task.mean, task.std)
    kinds = [rule.shown(task, x)]
    if rule.told is not None:
        for told in (right, wrong):
            pairs = zip(x[:, None], map(jnp.asarray, told), strict=True)
            kinds.append(jnp.concatenate([rule.told(task, image, label) for image, label in pairs]))
    rows, clean = jnp.concatenate(kinds), len(chosen)

    def by_kind(rows: jax.Array) -> np.ndarray:
        return np.asarray(rows, np.float32).reshape(len(kinds), clean, *rows.shape[1:])

    return plot_features(
        path,
        inputs=by_kind(rows) * np.asarray(task.std) + np.asarray(task.mean),
        class_names=dataset.class_names,
        labels=right.tolist(),
        wrong_labels=wrong.tolist(),
        codebook=np.asarray(task.codebook) if rule.codebook else None,
        streams=[by_kind(z) for z in compiled(feature_maps, plan.program, clean, states, rows)(states, rows)],
        filters=np.asarray(_first_kernel(states)),
    )


def _first_kernel(states: States) -> jax.Array:
    """Of the network's first layer that has one."""
    layers = sorted((name for name in states[0].params if name.startswith("layers_")), key=lambda name: int(name.removeprefix("layers_")))
    return next(leaf for name in layers for leaf in jax.tree.leaves(states[0].params[name]) if leaf.ndim > 1)
