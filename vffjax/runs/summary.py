"""What a run writes at its end: summary.json, curves.png and features.png."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vffjax.data.sets import Dataset
from vffjax.errors import aid
from vffjax.files import write_json
from vffjax.networks.groups import States
from vffjax.networks.layers import FIXED
from vffjax.rules.streams import Task
from vffjax.runs.plots import plot_curves, plot_features
from vffjax.runs.trained import Trained
from vffjax.training.augment import normalise
from vffjax.training.compiled import compiled
from vffjax.training.plan import Plan
from vffjax.training.trainer import feature_maps


def conclude(best: Trained, dataset: Dataset, measured: dict[str, Any], last: dict[str, Any], workdir: pathlib.Path) -> dict[str, Any]:
    """Writes summary.json, curves.png and features.png of a finished run; returns what summary.json holds.

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
        **{key: last[key] for key in ("compile_seconds", "peak_bytes", "data_sha256", "init_from_sha256", "code_sha256") if key in last},
        **{key: best.run[key] for key in ("vote_weights",) if key in best.run},
        **last["origins"][-1],
        "earlier_origins": last["origins"][:-1],
        "seed": best.plan.config.seed,
    }
    write_json(workdir / "summary.json", summary)
    plot_curves(workdir)
    with aid(f"{workdir / 'features.png'}"):
        draw_features(workdir / "features.png", best.plan, dataset, best.states, best.task)
    return summary


def draw_features(path: pathlib.Path, plan: Plan, dataset: Dataset, states: States, task: Task) -> None:
    """`features.png`: codebook, first filters, and every group's maps of the three kinds of data, for three test images.

    Under a rule without labelled images their rows are left blank.
    """
    labels = dataset.test.labels[:3]
    wrong = (labels + 1) % dataset.num_classes
    images = dataset.test.images[:3]
    x = normalise(jnp.asarray(images), task.mean, task.std)
    kinds = [plan.rule.shown(task, x)]
    if plan.rule.told is not None:
        for told in (labels, wrong):
            pairs = zip(x[:, None], map(jnp.asarray, told), strict=True)
            kinds.append(jnp.concatenate([plan.rule.told(task, image, label) for image, label in pairs]))
    streams, clean = [], len(labels)
    rows = jnp.concatenate(kinds)
    for z in compiled(feature_maps, plan.program, clean, states, rows)(states, rows):
        shown = np.full((3, clean, *z.shape[1:]), np.nan, np.float32)
        shown[: len(kinds)] = np.asarray(z, np.float32).reshape(len(kinds), clean, *z.shape[1:])
        streams.append(shown)
    plot_features(
        path,
        images=images / 255,
        class_names=dataset.class_names,
        labels=labels.tolist(),
        wrong_labels=wrong.tolist(),
        codebook=np.asarray(task.codebook) if plan.rule.codebook else None,
        streams=streams,
        filters=np.asarray(_first_kernel(states)),
    )


def _first_kernel(states: States) -> jax.Array:
    """Of the network's first layer; a ResNet's stem keeps it under conv1."""
    leaves = jax.tree_util.tree_leaves_with_path(states[0].params["layers_0"])
    return next(leaf for path, leaf in leaves if path[-1].key in ("kernel", FIXED))
