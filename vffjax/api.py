"""What programs and notebooks use: train, load, evaluate, and a run as a value.

>>> import tempfile, vffjax
>>> config = vffjax.default_config()  # of scikit-learn's digits
>>> config.widths, config.epochs = (64, 64), 2
>>> run = vffjax.train(config, workdir=tempfile.mkdtemp(), quiet=True)
>>> run.summary["best_epoch"]
2
>>> found = run.predict(run.data.test.images[:5])
>>> found.classes.shape, found.probabilities.shape
((5,), (5, 10))
"""

import functools
import io
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from vffjax import outside, paths
from vffjax.cli.config_file import load_config_file
from vffjax.config import Config
from vffjax.costs import fits
from vffjax.data import in_memory
from vffjax.data import load as data_module
from vffjax.errors import UserError, notice, printable
from vffjax.files import holds
from vffjax.run import Run, arguments
from vffjax.runs import experiment
from vffjax.runs.checkpoint import Checkpoints
from vffjax.runs.termination import Terminated
from vffjax.runs.usual_folder import usual_folder
from vffjax.runs.workdir import LOCK, WRITTEN, locked
from vffjax.training import scores, stages
from vffjax.training.checks import make_config
from vffjax.uses import evaluation
from vffjax.weights import weights

Data = Mapping[str, Any] | Sequence[Any]


def read(name: str) -> ml_collections.ConfigDict:
    """A configuration by its file, FILE[:VARIANT], or by its name, such as `digits` or `cifar10:small`, to be changed and trained.

    >>> config = read("digits")
    >>> config.network
    'conv4'

    Raises:
        UserError: there is no such configuration, or its file fails.
    """
    from vffjax.config import default_config

    with arguments():
        values, _ = load_config_file(name)
        config = default_config()
        config.update(values)
        return config


def train(
    config: ml_collections.ConfigDict | Mapping[str, Any] | Config,
    workdir: str | pathlib.Path | None = None,
    *,
    data: Data | None = None,
    overwrite: bool = False,
    callbacks: Sequence[Callable[[dict[str, Any]], object]] = (),
    quiet: bool = False,
) -> Run:
    """Trains a run to its end. The same arguments go on with a run that was interrupted, and return one that has finished.

    Args:
        config: from `default_config` or `read`, or a dictionary of the keys that are not at their defaults.
        workdir: the run's folder; default: a folder in runs/, named after the data set and a hash of the configuration.
        data: images of your own instead of config.dataset: a dictionary of arrays `x_train`, `y_train`, `x_test` and `y_test`, or `images`
            and `labels`, or a tuple of these; see `vffjax.data.in_memory.from_mapping`. They are kept until the process ends.
        overwrite: whether a run that lies in `workdir` is deleted first. A folder that holds anything else is never deleted.
        callbacks: each is called with the record of each epoch, a dictionary as in `Run.metrics`. If one returns True, the run is saved and
            left after that epoch; the same arguments go on from there. Any other value means nothing.
        quiet: whether the progress is not shown. Problems still are, on standard error.

    Returns:
        The run, with the weights of its best epoch.

    Raises:
        UserError: an argument or a key of the configuration is wrong, or the run has diverged.
        KeyboardInterrupt: the cell or program was interrupted; what was saved stays.
    """
    with arguments():
        if callable(callbacks):
            raise UserError("callbacks: is one function; give a list of functions, as callbacks=[function]")
        checked = make_config(_values(config) | (in_memory.hold(data) if data is not None else {}))
        name = re.sub(r"[^A-Za-z0-9_.-]+", "-", checked.dataset)
        folder = usual_folder(checked, name) if workdir is None else paths.local(workdir, "workdir")
        paths.check_run_folder(folder, "workdir")
        if overwrite or not (folder / "config.json").exists():  # a run that continues has its weights already
            weights.check_start(checked)
        fits.check_memory(checked)
        if overwrite:  # not earlier: bad input should cost no run
            stages.count(checked)  # training checks this and the data again, since it is called without this function too
            experiment.plan_for(checked, data_module.load(checked))
            _delete(folder)
        stopped: list[int] = []

        def after_epoch(record: dict[str, Any]) -> bool:
            answers = [callback(record) for callback in callbacks]
            if any(isinstance(answer, bool | np.bool_) and answer for answer in answers):
                stopped.append(record["epoch"])
            return bool(stopped)

        try:
            experiment.train(checked, folder, progress=io.StringIO() if quiet else None, after_epoch=after_epoch)
        except Terminated:
            if not stopped:
                raise
            if not quiet:
                notice(f"stopped after epoch {stopped[-1]}, as a callback asked; the same arguments go on from there")
        return Run(folder)


def load(workdir: str | pathlib.Path, epoch: str | int = "best", code: str | pathlib.Path | None = None) -> Run:
    """A run that was trained before, here or by `vffjax train`.

    Args:
        workdir: its folder.
        epoch: best (by validation error), latest, or the number of a saved epoch.
        code: the folder of a rule, network or data source of your own that the run was trained with; its code is run.

    Raises:
        UserError: there is no run, no such epoch, or a file of it is damaged.
    """
    with arguments():
        if code is not None:
            outside.allow(code)
        run = Run(paths.local(workdir, "workdir"), str(epoch))
        _ = run.trained  # a problem is found here, and not at the first use
        return run


def evaluate(run: Run | str | pathlib.Path, data: Data | None = None, inference: str = "", views: str = "") -> dict[str, Any]:
    """Errors of a run in percent.

    Args:
        run: the run, or its folder.
        data: images and labels, a tuple of two arrays or a dictionary with `images` and `labels`; labels are numbers or names of the run's
            classes. Default: the run's own validation and test images.
        inference: heads, sweep or rule, and without `data` also early_exit; default: as the run was configured.
        views: one, mirror or six; default: as configured. With another inference or other views than configured, the groups that vote are
            chosen anew, on the run's own validation images.

    Returns:
        As `vffjax evaluate --json`; for `data`, `error` of the ensemble, `error_per_group`, and `n`.

    Raises:
        UserError: an argument does not fit the run.
    """
    with arguments():
        run = run if isinstance(run, Run) else load(run)
        if data is None:
            return evaluation.evaluate(run.workdir, inference, run.epoch, views=views)
        parts = in_memory.by_name(data)
        if set(parts) != {"images", "labels"}:
            raise UserError(f"data: holds {printable(', '.join(map(str, parts)), 200) or 'nothing'}; give images and labels")
        given, trained = run.as_images(parts["images"]), run.trained
        numbers = in_memory.numbers_of(parts["labels"], run.class_names, "labels")
        if len(numbers) != len(given):
            raise UserError(f"labels: are {len(numbers)} for {len(given)} images; give each image one label")
        name = inference or trained.plan.config.inference
        if name not in scores.SCORES:
            raise UserError(f"inference={name}: not known for images of your own; use one of {', '.join(scores.SCORES)}")
        if why := trained.plan.rule.cannot_score_by(name):
            raise UserError(f"inference={name}: rule {trained.plan.config.rule} {why}; use heads")
        plan = evaluation.with_views(trained.plan, views)
        score = functools.partial(scores.make_scores(plan, name), trained.task, trained.states)
        votes = trained.run
        if (name, plan.config.views) != (trained.plan.config.inference, trained.plan.config.views):  # for which others may vote
            known = run.data.validation
            seen = np.asarray(score(known.images)) if len(known.labels) else None
            votes = scores.validate(seen, known.labels, trained.groups, plan.config.votes)
        found = np.asarray(score(given))[: trained.groups]
        measured = scores.measure(found, numbers, votes, "own")
        return {"error": measured["own_error"], "error_per_group": measured["own_error_per_group"], "n": len(numbers)}


def _values(config: Any) -> dict[str, Any]:
    """The values of a configuration of any of the kinds that `train` takes."""
    if isinstance(config, str):
        raise UserError(f"config={config}: is a text; give vffjax.read({config!r}), or a dictionary of keys")
    if not isinstance(config, (ml_collections.ConfigDict, Config, Mapping)):
        raise UserError(f"config: of type {type(config).__name__}; give vffjax.read(NAME), or a dictionary of keys")
    values = dict(config) if isinstance(config, Mapping) else config.to_dict()
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _written(name: str) -> bool:
    # `export --group` writes the first. The second is there for an instant while several processes start.
    return name in WRITTEN or bool(re.fullmatch(r"group\d+\.safetensors|\.seen-[0-9a-f]+", name))


def _delete(folder: pathlib.Path) -> None:
    """Deletes the run in a folder. Raises `UserError` if the folder holds anything else, or if a run is training there."""
    if not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir())):
        return
    fix = "is not deleted; give another folder, or overwrite=False"
    if not folder.is_dir():
        raise UserError(f"workdir={folder}: is no folder, and {fix}")
    others = sorted(path.name for path in folder.iterdir() if not _written(path.name.removesuffix(".tmp")))
    if others:
        raise UserError(f"workdir={folder}: holds {printable(others[0], 100)}, which no run wrote, and {fix}")
    if not holds(folder / "config.json", "vffjax") and not Checkpoints(folder).epochs():
        raise UserError(f"workdir={folder}: holds no run, and {fix}")
    with locked(folder):
        for path in folder.iterdir():  # the folder itself may be a link, or a volume
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()
