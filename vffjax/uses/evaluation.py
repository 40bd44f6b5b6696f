"""Validation and test errors: of a trained run, or of the weights that a configuration starts from."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from vffjax.config import Config
from vffjax.data import find
from vffjax.data import load as data_module
from vffjax.data.sets import Dataset, joined
from vffjax.errors import UserError, phase, printable
from vffjax.runs import experiment, loop
from vffjax.runs.trained import Trained
from vffjax.runs.workdir import load_run
from vffjax.training import scores as inference
from vffjax.training.plan import Plan
from vffjax.training.stages import judges
from vffjax.uses import early_exit


def evaluate(
    workdir: pathlib.Path | str,
    inference_name: str = "",
    epoch: str = "best",
    data_dir: str = "",
    test: bool = True,
    early: early_exit.Wanted = early_exit.DEFAULT,
    other_data: bool = False,
    views: str = "",
) -> dict[str, Any]:
    """Errors of a trained run. The groups that vote are chosen on the validation images, which are also measured; on other data than the
    run's own they stay those of the run, if scores and views are as configured.

    Args:
        workdir: the run's folder.
        inference_name: heads, sweep, rule or early_exit; empty: as the run was configured.
        epoch: best, latest, or the number of a saved epoch.
        data_dir: the folder of the data set, if it is no longer where it was when the run was trained.
        test: whether test images are classified too.
        early: what is asked of an early exit. Its threshold is also chosen on the validation images, if none is given.
        views: one, mirror or six, whose scores are averaged (see config.views); empty: as the run was configured.
        other_data: whether images are accepted on which the run was not trained, if their shape and classes are the same.

    Returns:
        Errors in percent and the groups that vote, as for `vffjax evaluate --json`.

    Raises:
        UserError: the run cannot be read, or the data do not fit it.
    """
    trained = load_run(workdir, epoch)
    before = trained.plan.config.views
    trained = trained._replace(plan=with_views(trained.plan, views))
    config = trained.plan.config
    here = dataclasses.replace(config, data_dir=data_dir or config.data_dir)
    if data_dir and not find(config).reads_data_dir:
        fix = "leave it out, or judge the run by other images in Python: vffjax.evaluate(run, data)"
        raise UserError(f"--data_dir={data_dir}: dataset={config.dataset} reads no folder; {fix}")
    with phase("reading data"):
        dataset = data_module.load(here)
    own_data = check_data(dataset, trained.run, data_dir, other_data)
    about = {"workdir": str(workdir), "epoch": trained.run["epoch"], "own_data": own_data}
    # On other data the groups vote that the run has chosen, as they do in `predict`. By other scores or views others may have to.
    as_it_was = not own_data and (inference_name or config.inference) == config.inference and config.views == before
    if not own_data and not find(config).has_test(here):
        dataset = _whole(here, 0.0 if as_it_was else config.val_fraction)
    return about | _judge(trained, dataset, inference_name, test, early, trained.run if as_it_was else None)


def _whole(config: Config, val_fraction: float) -> Dataset:
    """A set without parts, on which no run was trained: all its images are test images, but for those by which something is chosen."""
    dataset = data_module.load(dataclasses.replace(config, val_fraction=val_fraction, train_examples=0, wrong_labels=0.0))
    return dataclasses.replace(dataset, test=joined([dataset.train, dataset.test]))


def with_views(plan: Plan, views: str) -> Plan:
    """The plan with another config.views; if that is empty, the plan itself."""
    return dataclasses.replace(plan, config=dataclasses.replace(plan.config, views=views or plan.config.views))


def check_data(dataset: Dataset, run: dict[str, Any], data_dir: str, other_data: bool | None) -> bool:
    """Whether a data set is the one that the run was trained on.

    Raises `UserError` if it is not, unless `other_data` is true (None: the caller has no such choice to offer), and if it has images of
    another shape, or other classes.
    """
    where = f"--data_dir={data_dir}" if data_dir else f"config.dataset={dataset.name!r}"
    if dataset.image_shape != tuple(run["image_shape"]):
        here, there = ("x".join(map(str, shape)) for shape in (dataset.image_shape, run["image_shape"]))
        raise UserError(f"{where}: its images are {here}, and those of the run were {there}; give the data that the run was trained on")
    if list(dataset.class_names) != run["class_names"]:
        here, there = (f"{len(names)} ({_some(names)})" for names in (dataset.class_names, run["class_names"]))
        raise UserError(f"{where}: its classes are {here}, and those of the run were {there}; give the data that the run was trained on")
    if dataset.sha256() == run["data_sha256"]:
        return True
    if not other_data:
        fix = "give the run's own data"
        fix += ", or add --other_data to judge the run by these (in Python, give them as data=...)" if other_data is False else ""
        raise UserError(f"{where}: other images or labels than the run was trained on; {fix}")
    return False


def _some(names: Sequence[str]) -> str:
    return printable(", ".join(names[:5]), 200) + ", ..." * (len(names) > 5)


def evaluate_start(
    config: Config, inference_name: str = "", early: early_exit.Wanted = early_exit.DEFAULT, views: str = ""
) -> dict[str, Any]:
    """Errors of the weights that a run of `config` would start from, before any training. Arguments and results are those of `evaluate`.

    Raises:
        UserError: the weights do not fit the network, or bring no head although the heads are to classify.
    """
    dataset = data_module.load(config)
    plan = with_views(experiment.plan_for(config, dataset), views)
    states, task = experiment.start(plan, dataset)
    if (inference_name or config.inference) in ("heads", "early_exit") and all(state.has_new_head for state in states):
        fix = "evaluate a run that has trained them, or weights with fc for these classes and config.head_grid=1"
        raise UserError(f"config.init_from={config.init_from!r}: no head came with the weights, and a new head cannot classify; {fix}")
    if problem := experiment.heads_of_others(states, config, dataset):
        raise UserError(f"config.init_from={config.init_from!r}: {problem}; give the data in the order of the file's classes")
    trained = Trained(plan, states, task, {"trained_groups": len(plan.groups)})
    return {"init_from": config.init_from, "epoch": 0} | _judge(trained, dataset, inference_name, True, early)


def _judge(
    trained: Trained, dataset: Dataset, inference_name: str, test: bool, early: early_exit.Wanted, kept: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Errors on validation and, with `test`, test images. The votes are those of `kept`; None: as the validation images say."""
    plan = trained.plan
    name = inference_name or plan.config.inference
    if name == "early_exit" and plan.config.views != "one":
        raise UserError(f"--views={plan.config.views}: an early exit looks at one view of an image; use --views=one")
    if why := plan.rule.cannot_score_by(name):
        raise UserError(f"--inference={name}: rule {plan.config.rule} {why}; use --inference=heads")
    scored = functools.partial(experiment.scores_on, judges(plan.config, trained.run), trained, "heads" if name == "early_exit" else name)
    validation = dataset.validation
    with phase("classifying validation images"):
        seen = scored(validation) if len(validation.labels) else None
    votes_by = "subset" if name == "early_exit" else plan.config.votes  # the groups before an exit have plain means
    if kept is None:
        validated = inference.validate(seen, validation.labels, trained.groups, votes_by)
    else:
        validated = {key: kept[key] for key in ("voting", "vote_weights") if key in kept}
        none = {"val_error": None, "val_error_per_group": None}
        validated |= none if seen is None else inference.measure(seen[: trained.groups], validation.labels, kept, "val")
    header: dict[str, Any] = {"inference": name, "views": plan.config.views, "val_images": len(validation.labels)} | validated
    leaving = None
    if name == "early_exit":
        votes = early_exit.votes_of(tuple(validated["voting"]), early.exits, seen, validation.labels)
        leaving = early_exit.EarlyExit(trained, votes, seen, validation.labels)
        header |= {"ensemble_val_error": validated["val_error"], "exits": early.exits} | leaving.choose(early.threshold)
    if not test:
        return header
    with phase("classifying test images"):
        found = scored(dataset.test)[: trained.groups]
    header |= {"test_images": len(dataset.test.labels)} | inference.measure(found, dataset.test.labels, validated, "test")
    if leaving is not None:
        unseen = loop.placed(dataset.test, plan.config.data_on)
        header |= {"ensemble_test_error": header["test_error"]} | leaving.measure(unseen, header["threshold"], early.curve)
    return header
