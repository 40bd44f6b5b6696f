"""Prediction: image files in, ranked classes out."""

import itertools
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from vffjax.data.pictures import KINDS, pictures_in, read_image
from vffjax.errors import UserError, notice
from vffjax.runs.trained import Trained
from vffjax.runs.workdir import load_run
from vffjax.training.scores import ensemble, make_scores

MOST_AT_ONCE = 500  # images in memory


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


def predict(
    workdir: pathlib.Path | str, paths: Sequence[pathlib.Path | str], epoch: str = "best", top: int = 3
) -> Iterator[dict[str, Any]]:
    """Classifies image files by a trained run, some hundreds at a time.

    Args:
        workdir: the run's folder.
        paths: image files, and folders, of which all image files are taken (see `pictures.pictures_in`). `pictures.read_image` says what is
            read and how it becomes an image of the network's size.
        epoch: best, latest, or the number of a saved epoch.
        top: how many classes are listed.

    Yields:
        For each file, in their order, its path as `image`. As `by` the likeliest classes by each trained group and by the voting
        `ensemble`, and a `note` if the image looks unlike the training images (see `oddity`). Or an `error`, if it cannot be read.

    Raises:
        UserError: the run cannot be read.
    """
    trained = load_run(workdir, epoch)
    if trained.caution:
        notice(trained.caution)
    shape, most = tuple(trained.run["image_shape"]), min(trained.plan.config.eval_batch_size, MOST_AT_ONCE)
    waiting, images = list[dict[str, Any]](), list[np.ndarray]()
    for path in paths:
        files, problems, others = pictures_in(path) if os.path.isdir(path) else ([pathlib.Path(path)], [], [])
        if others:
            notice(f"{path}: {len(others)} passed over, since they are no {KINDS} files or are links to folders, such as {others[0].name}")
        waiting += [{"image": str(path), "error": str(problem)} for problem in problems]
        for file in files:
            waiting.append({"image": str(file)})
            try:
                images.append(read_image(file, shape))
            except UserError as error:
                waiting[-1]["error"] = str(error)
            if len(images) == most:
                yield from _classified(trained, waiting, images, top)
                waiting, images = [], []
    yield from _classified(trained, waiting, images, top)


def _classified(trained: Trained, entries: list[dict[str, Any]], images: list[np.ndarray], top: int) -> Iterator[dict[str, Any]]:
    """The entries of `predict`, completed. The images belong to those without an error, in their order."""
    (plan, states, task, run), numbers = trained, itertools.count()
    if images:
        scores = np.asarray(make_scores(plan, trained.scored_by)(task, states, jnp.asarray(np.stack(images))))
        votes = ensemble(scores, trained.voting, trained.vote_weights)
    for entry in entries:
        if "error" not in entry:
            i = next(numbers)
            entry["by"] = {plan.groups[g].name: rank(scores[g, i], run["class_names"], top) for g in range(trained.groups)}
            entry["by"]["ensemble"] = rank(votes[i], run["class_names"], top)
            if note := oddity(images[i], np.asarray(task.mean), np.asarray(task.std)):
                entry["note"] = note
        yield entry
