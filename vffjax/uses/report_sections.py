"""The report of a trained run: reads the run and its data, measures, draws, and writes report.html."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from vffjax import paths
from vffjax.data import load as data_module
from vffjax.data.sets import Dataset, Split
from vffjax.errors import phase
from vffjax.runs import experiment
from vffjax.runs.logbook import read_metrics
from vffjax.runs.summary import draw_features
from vffjax.runs.trained import Trained
from vffjax.runs.workdir import load_run
from vffjax.training.scores import ensemble, error_percent
from vffjax.uses import report, report_page
from vffjax.uses import report_figures as figures
from vffjax.uses.evaluation import check_data, with_views
from vffjax.uses.report_page import Section, Table

PAGE = "report.html"
MISTAKES = 20  # images that are shown
CONFUSED = 12  # pairs of classes that are listed
FEWEST = 5  # images of a class of which a mean is drawn
BEST = "Chosen epoch"  # the heading of the epoch that validation images, or the end of the training, have chosen


class Seen(NamedTuple):
    """What all sections of a report look at."""

    trained: Trained
    dataset: Dataset
    test: Split  # a sample, or all
    validation: Split  # likewise; there may be none
    scores: np.ndarray  # [groups, n, classes] of the test images, as the run scores classes
    heads: np.ndarray  # the same by the heads, of one view of each image
    known: np.ndarray  # the same of the validation images
    total: np.ndarray  # [n, classes] of the test images by the ensemble
    called: str = BEST  # what the run's epoch is called

    @property
    def names(self) -> tuple[str, ...]:
        return self.dataset.class_names

    @property
    def seed(self) -> int:
        return self.trained.plan.config.seed

    @property
    def counts(self) -> np.ndarray:
        """The confusion matrix of the ensemble."""
        return report.confusion(self.total.argmax(axis=1), self.test.labels, len(self.names))

    @property
    def once(self) -> Trained:
        return _once(self.trained)


def _once(trained: Trained) -> Trained:
    """The run, which looks at one view of an image."""
    return trained._replace(plan=with_views(trained.plan, "one"))


def write(workdir: pathlib.Path, epoch: str = "best", data_dir: str = "") -> pathlib.Path:
    """Writes report.html and its pictures into a run's folder; returns its path.

    Args:
        workdir: the run's folder. The run may be training meanwhile.
        epoch: best, latest, or the number of a saved epoch.
        data_dir: the folder of the data set, if it is no longer where it was when the run was trained.

    Raises:
        UserError: the run cannot be read, or the data are not those that it was trained on.
    """
    workdir = paths.local(workdir, "--workdir")
    trained = load_run(workdir, epoch)
    paths.refuse_links(workdir, report_page.PICTURES)
    config, run = trained.plan.config, trained.run
    with phase("reading data"):
        dataset = data_module.load(dataclasses.replace(config, data_dir=data_dir or config.data_dir))
    check_data(dataset, run, data_dir, other_data=None)
    with phase("classifying test images"):
        seen = look(trained, dataset)._replace(called=BEST if epoch == "best" else "Epoch of this report")
    records, folder = read_metrics(workdir) or run["history"], report_page.picture_folder(workdir, fresh=True)
    makers: dict[str, Callable[[Section], None]] = {
        "Errors": functools.partial(errors, seen=seen),
        "The run": lambda section: report_page.about_the_run(section, config.to_dict(), run["origins"], workdir),
        "Curves": lambda section: report_page.curves(section, records, run["epoch"], seen.called.lower()),
        "Mistakes": functools.partial(mistakes, seen=seen),
        "Groups": functools.partial(groups, seen=seen),
        "Labelled copies": functools.partial(copies, seen=seen),
        "What the network sees": functools.partial(features, seen=seen),
    }
    sections = []
    for title, fill in makers.items():
        with phase(f"drawing: {title}"):
            sections.append(Section(title, folder).fill(fill))
    title = f"{workdir.resolve().name}: rule {config.rule} on {config.dataset}"
    report_page.write(workdir / PAGE, title, describe(seen), facts(seen), sections)
    return workdir / PAGE


def look(trained: Trained, dataset: Dataset) -> Seen:
    """Scores samples of the test and validation images."""
    config, classes = trained.plan.config, dataset.num_classes
    most = min(report.SCORED, max(report.SWEPT // classes, 100)) if config.inference == "sweep" else report.SCORED
    test = report.sample(dataset.test, most, config.seed, 4 * trained.groups * classes)
    validation = report.sample(dataset.validation, report.SCORED, config.seed, 4 * trained.groups * classes)
    heads, known = report.class_scores(_once(trained), "heads", test, validation)
    plain = config.inference == "heads" and config.views == "one"
    scores = heads if plain else report.class_scores(trained, config.inference, test)[0]
    total = ensemble(scores, tuple(trained.run["voting"]), tuple(weights_of(trained)))
    return Seen(trained, dataset, test, validation, scores, heads, known, total)


def weights_of(trained: Trained) -> list[float]:
    """The weights of the groups that vote; empty if all weigh the same."""
    return list(trained.run.get("vote_weights", ()))


def describe(seen: Seen) -> str:
    """One line about the network and the images."""
    plan, of = seen.trained.plan, len(seen.dataset.test)
    tested = f"{len(seen.test):,} test images" + ("" if len(seen.test) == of else f" of {of:,}, drawn by the seed")
    return f"{plan.config.network}, {experiment.describe(plan)}; {len(seen.dataset.train):,} training images; {tested}."


def facts(seen: Seen) -> list[tuple[str, str]]:
    """The figures at the top."""
    run = seen.trained.run
    val = [] if run["val_error"] is None else [("Validation error", f"{run['val_error']:.2f} %")]
    seconds = sum(record["seconds"] for record in run["history"])
    return [
        ("Test error", f"{error_percent(seen.total, seen.test.labels):.2f} %"),
        *val,
        (seen.called, f"{run['epoch']} of {seen.trained.plan.total_epochs}"),
        ("Training until then", f"{seconds:,.0f} s"),
        ("Device", report_page.text(run["origins"][-1].get("device", "not known"))),
    ]


def errors(section: Section, seen: Seen) -> None:
    """The table of errors."""
    run, labels = seen.trained.run, seen.test.labels
    weights: dict[int, float | None] = dict.fromkeys(run["voting"]) | dict(zip(run["voting"], weights_of(seen.trained), strict=False))
    val: list[Any] = run.get("val_error_per_group") or [""] * seen.trained.groups
    rows = []
    for g in range(seen.trained.groups):
        weight = weights.get(g)
        votes = "" if g not in weights else "yes" if weight is None else f"weight {weight:.2f}"
        rows.append((f"group {g}", _percent(val[g]), _percent(error_percent(seen.scores[g], labels)), votes))
    rows.append(("ensemble", _percent(run["val_error"]), _percent(error_percent(seen.total, labels)), ""))
    config = seen.trained.plan.config
    asked = seen.called != BEST
    if run["val_error"] is None:
        by = f"There are no validation images; {'' if asked else 'the last epoch was taken, and '}all groups vote."
    else:
        by = f"{'The' if asked else 'The epoch and the'} groups that vote were chosen on validation images."
    section.texts.append(f"In percent, by config.inference={config.inference} and config.views={config.views}. {by}")
    section.tables.append(Table(("", "validation error", "test error", "votes"), rows))


def _percent(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, (int, float)) else ""


def mistakes(section: Section, seen: Seen) -> None:
    """The confusion matrix, the errors of the classes, and the worst mistakes of the ensemble."""
    labels, names, counts = seen.test.labels, seen.names, seen.counts
    caption = "Rows: the right class; columns: the class that the ensemble said; in percent of the images of the class."
    caption += "" if len(names) <= figures.NUMBERED else " Right answers have no colour."
    section.draw("confusion", "Confusion matrix", caption, lambda: figures.confusion(counts, names), len(names) > figures.NUMBERED)
    left = "" if len(names) <= figures.BARS else f" The {figures.BARS} of {len(names)} classes with the greatest errors."
    section.draw(
        "class_errors", "Error by class", f"In percent of the test images of a class.{left}", lambda: figures.class_errors(counts, names)
    )
    if confused := report.most_confused(counts, CONFUSED):
        rows = [(report_page.text(names[right]), report_page.text(names[said]), str(count)) for right, said, count in confused]
        section.tables.append(Table(("right class", "taken for", "test images"), rows, "The most frequent mistakes"))
    worst, sure = report.worst(seen.total, labels, MISTAKES)
    if len(worst):
        probabilities = None if seen.trained.plan.config.inference == "sweep" else sure
        caption = "Misclassified test images whose wrong class had the greatest probability: the right class, and what the ensemble said."
        said = seen.total[worst].argmax(axis=1)
        make = functools.partial(figures.mistakes, seen.test.images[worst], labels[worst], said, probabilities, names)
        section.draw("mistakes", "The worst mistakes", caption, make)


def groups(section: Section, seen: Seen) -> None:
    """What each group knows: by its head and by a linear probe; silent channels; agreement; early exit."""
    trained, dataset, labels, test = seen.trained, seen.dataset, seen.test.labels, seen.test
    heads = [100 - error_percent(scores, labels) for scores in seen.heads]
    probed = figures.spread(trained.groups, figures.SHOWN_GROUPS)
    fitted, judged = report.sample(dataset.train, report.PROBED, seen.seed), report.sample(test, report.PROBED, seen.seed)
    section.fill(functools.partial(_inside, trained=trained, heads=heads, probed=probed, fitted=fitted, judged=judged))
    if trained.groups > 1:
        caption = f"Of {len(labels):,} test images, by the heads of two groups. On the diagonal: 100, and the error of the group."
        section.draw("agreement", "Agreement of groups", caption, lambda: figures.agreement(report.agreement(seen.heads, labels)))
        section.fill(functools.partial(_exits, seen=seen))


def _inside(section: Section, trained: Trained, heads: list[float], probed: list[int], fitted: Split, judged: Split) -> None:
    inside, n = report.inside(trained, np.concatenate([fitted.images, judged.images]), probed), len(fitted)
    with phase("fitting linear probes"):
        found = [100 * report.probe_accuracy(x[:n], fitted.labels, x[n:], judged.labels) for x in inside.inputs]
    caption = (
        f"A linear probe is a ridge classifier fitted to {n:,} training images, with the same budget for all: at most "
        f"{report.PROBE_INPUTS:,} numbers an image, maps pooled by means. It is judged on {len(judged):,} test images, on which nothing is "
        "chosen."
    )
    chance = 100 * float(np.bincount(judged.labels).max()) / len(judged)
    caption += f" To say the most frequent class always would be right in {chance:.1f} %."
    probes = list(zip([-1, *probed], found, strict=True))
    section.draw("depth", "Accuracy by depth", caption, functools.partial(figures.by_depth, heads, probes))
    silent = [~active[n:].any(axis=0) for active in inside.active]
    _dead(section, list(zip(report.learning_layers(trained), silent, strict=True)), len(judged))


def _dead(section: Section, layers: list[tuple[str, np.ndarray]], images: int) -> None:
    dead, total = sum(int(silent.sum()) for _, silent in layers), sum(len(silent) for _, silent in layers)
    if not dead:
        section.texts.append(f"Each of the {total:,} channels and units is active for some of {images:,} test images: none is dead.")
        return
    caption = f"{dead:,} of {total:,} channels and units give 0 for all of {images:,} test images, at every position."
    shown = [layers[i] for i in figures.spread(len(layers), figures.BARS)]
    caption += "" if len(shown) == len(layers) else f" {len(shown)} of {len(layers)} layers are shown."
    section.draw("dead", "Dead units", caption, lambda: figures.silent(shown))


def _exits(section: Section, seen: Seen) -> None:
    known = seen.known if len(seen.validation) else None
    found = report.exits(seen.once, known, seen.validation.labels, seen.heads, seen.test.labels)
    if found is not None:
        caption = "An image leaves at the first group whose ensemble so far is sure enough, and later groups do not compute it."
        section.draw("exits", "Early exit", caption, lambda: figures.exits(found))


def copies(section: Section, seen: Seen) -> None:
    """How alike images and their labelled copies are, for rules that tell labels by the noise of a codebook."""
    if not report.can_tell(seen.trained):
        return
    classes = len(seen.names)
    most = min(report.TOLD, max(report.TOLD_PAIRS // classes, 10))
    told = report.sample(seen.test, most, seen.seed)
    found = report.label_fits(seen.once, told)
    section.texts.append(
        "The rule tells a label by adding the noise of a class to an image. A group learns to make images alike to the copies that have "
        f"the noise of their class. Here each of {len(told):,} test images is compared with copies of itself, one with the noise of each "
        "class."
    )
    caption = "Similarity to the copy with the noise of the right class, and to those of the wrong classes."
    section.draw("copies", "Right and wrong noise", caption, lambda: figures.fits(found))
    if len(told) >= FEWEST * classes:
        last = seen.trained.groups - 1
        caption = f"Group {last}: means by the class of the image and the class of the noise, less the mean of each row."
        make = functools.partial(figures.fit_means, found.means[last], seen.names)
        section.draw("copy_means", "Similarity by class", caption, make, classes > 40)


def features(section: Section, seen: Seen) -> None:
    """The picture features.png of this epoch."""
    plan, states, task, _ = seen.trained
    path = draw_features(section.folder / "features.png", plan, seen.dataset, states, task)
    what = "The noise of the classes, filters" if plan.rule.codebook else "Filters"
    section.add(
        path, "Inputs and features", f"{what} of the first layer, test images of different classes, and every group's maps of them.", True
    )
