"""Prediction: image files in, ranked classes out."""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from vffjax.data.pictures import read_image
from vffjax.runs.workdir import load_run
from vffjax.training.scores import ensemble, make_scores


def oddity(image: UInt8[np.ndarray, "h w c"], mean: Float[np.ndarray, " c"], std: Float[np.ndarray, " c"]) -> str:
    """Says why an image is so unlike the training images that its classification means little; empty if it is not.

    Args:
        image: the image as the network gets it, in bytes.
        mean: per channel, the mean by which the run normalises pixels, on the scale where 255 is 1: that of its training images or, with
            config.pixel_statistics=imagenet, of ImageNet's.
        std: the same for the standard deviation.
    """
    found = image.mean((0, 1)) / 255
    here, there = f"{100 * found.mean():.0f} %", f"{100 * mean.mean():.0f} %"
    if (image == image[0, 0]).all():
        return "what the network sees of it has one colour everywhere, so that there is nothing to recognise"
    if (np.abs(found - mean) > 3 * std).any():
        far = f"its pixels are {here} of white on average, far from the {there} that the run expects"
        return f"{far}; the network has hardly seen one like it"
    # Where most pixels are black or white, the test above is weak, since their deviation is large. But if the training images are mostly
    # dark, or mostly bright, a negative can be recognised: its mean is near 1 minus that of the training images.
    if np.abs(mean.mean() - 0.5) > 0.15 and np.abs(found.mean() - mean.mean()) > 2 * np.abs(1 - found.mean() - mean.mean()):
        return f"it looks like a negative: its pixels are {here} of white on average, those that the run expects {there}; try it inverted"
    return ""


def rank(log_p: Float[np.ndarray, " classes"], class_names: list[str], top: int) -> list[dict[str, Any]]:
    """The `top` likeliest classes with their probabilities, from log-probabilities that need not be normalised."""
    p = np.exp(log_p - log_p.max())
    p /= p.sum()
    return [{"class": class_names[i], "probability": float(p[i])} for i in np.argsort(-p, kind="stable")[:top]]


def predict(workdir: pathlib.Path | str, paths: Sequence[pathlib.Path | str], epoch: str = "best", top: int = 3) -> list[dict[str, Any]]:
    """Classifies image files by a trained run.

    Args:
        workdir: the run's folder.
        paths: PNG or JPEG files; `read_image` says how they become images of the network's size.
        epoch: best, latest, or the number of a saved epoch.
        top: how many classes are listed.

    Returns:
        For each file its path as `image`; as `by` the likeliest classes by each trained group and by the voting `ensemble`; and a
        `note` if the image looks unlike the training images (see `oddity`).

    Raises:
        UserError: the run or an image cannot be read.
    """
    trained = load_run(workdir, epoch)
    plan, states, task, run = trained
    images = np.stack([read_image(pathlib.Path(path), tuple(run["image_shape"])) for path in paths])
    scores = np.asarray(make_scores(plan, trained.scored_by)(task, states, jnp.asarray(images)))
    names = run["class_names"]
    found = []
    for i, path in enumerate(paths):
        by = {plan.groups[g].name: rank(scores[g, i], names, top) for g in range(trained.groups)}
        by["ensemble"] = rank(ensemble(scores[:, i : i + 1], trained.voting, trained.vote_weights)[0], names, top)
        note = oddity(images[i], np.asarray(task.mean), np.asarray(task.std))
        found.append({"image": str(path), "by": by} | ({"note": note} if note else {}))
    return found
