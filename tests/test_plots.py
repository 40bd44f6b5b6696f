"""The figures of a run: the curves of its record, and what its network sees."""

import io
from unittest import mock

import numpy as np
import pytest
from matplotlib.image import imread

from oracles import slow_but
from runs import TINY
from vffjax.data import load as data
from vffjax.runs import experiment, feature_plots, plots, summary
from vffjax.runs.logbook import Logbook
from vffjax.training.checks import make_config


def test_a_name_in_a_picture_is_one_line():
    assert plots.short("red\n\x1b[31mfox", 30).isprintable()
    assert plots.short("a long name of a class", 8) == "a long …"


def pixels(path, least=(300, 600), most=(3000, 2000)):
    """The picture's RGB values, its size checked."""
    picture = imread(path)[..., :3]
    assert least[0] <= picture.shape[0] <= most[0] and least[1] <= picture.shape[1] <= most[1]
    return picture


def coloured(picture):
    """Share of pixels that are neither grey nor white: curves or maps, but no frame or text."""
    return float(np.mean(np.ptp(picture, axis=-1) > 0.2))


# --- curves.png


def curve_records(groups, count, sequential=False):
    records = []
    for epoch in range(1, count * (groups if sequential else 1) + 1):
        training = (epoch - 1) // count
        losses = [None if sequential and g != training else 2.0 / epoch + g for g in range(groups)]
        errors = [20.0 / epoch + g for g in range(groups)]
        record = {"epoch": epoch, "loss": 1.5, "loss_per_group": losses, "val_error": 19.0 / epoch, "val_error_per_group": errors}
        records.append(record | ({"group": training} if sequential else {}))
    return records


def curves(axes):
    """Label up to the bracket -> epochs; leaves out the lines that mark stages."""
    return {line.get_label().split(" (")[0]: list(line.get_xdata()) for line in axes.lines if "(last" in line.get_label()}


@pytest.mark.slow
@pytest.mark.parametrize("groups", [1, 8])
@pytest.mark.parametrize("count", [1, 12])
def test_curves_file(tmp_path, no_tensorboard, groups, count):
    with Logbook(tmp_path, count, 0, io.StringIO()) as book:
        for record in curve_records(groups, count):
            book.epoch(record)
    path = plots.plot_curves(tmp_path)
    assert path == tmp_path / "curves.png"
    assert coloured(pixels(path)) > (1e-4 if count == 1 else 1e-3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_curves_content():
    figure = plots.curves_figure(curve_records(2, 4), "run: rule $x_1$")
    left, right = figure.axes
    assert figure.get_suptitle() == "run: rule $x_1$"
    assert curves(left) == {"group 0": [1, 2, 3, 4], "group 1": [1, 2, 3, 4]}
    assert curves(right) == {"group 0": [1, 2, 3, 4], "group 1": [1, 2, 3, 4], "ensemble": [1, 2, 3, 4]}
    ensemble = next(line for line in right.lines if line.get_label().startswith("ensemble"))
    np.testing.assert_allclose(ensemble.get_ydata(), [19.0, 19.0 / 2, 19.0 / 3, 19.0 / 4])
    assert (left.get_xlabel(), right.get_xlabel(), right.get_ylabel()) == ("epoch", "epoch", "error (%)")
    assert "ensemble (last: 4.75 %)" in [text.get_text() for text in right.get_legend().get_texts()]
    assert right.get_ylim()[0] == 0 and right.get_ylim()[1] > 21.0


def test_curves_sequential():
    left, right = plots.curves_figure(curve_records(3, 2, sequential=True)).axes
    assert curves(left) == {"group 0": [1, 2], "group 1": [3, 4], "group 2": [5, 6]}
    assert curves(right)["ensemble"] == [1, 2, 3, 4, 5, 6]
    marks = [line.get_xdata()[0] for line in left.lines if "(last" not in line.get_label()]
    assert marks == [2.5, 4.5]


def test_curves_without_validation():
    records = [{"epoch": 1, "loss": None, "loss_per_group": [None], "train_accuracy": 0.75, "val_error": None, "val_error_per_group": None}]
    left, right = plots.curves_figure(records).axes
    assert [text.get_text() for text in left.texts] == ["nothing recorded"]
    assert list(right.lines[0].get_ydata()) == [25.0]
    assert "training" in right.get_title()


def test_curves_loss_scale():
    records = [{"epoch": e, "loss_per_group": [10.0**-e]} for e in range(1, 5)]
    assert plots.curves_figure(records).axes[0].get_yscale() == "log"
    records[0]["loss_per_group"] = [-1.0]
    assert plots.curves_figure(records).axes[0].get_yscale() == "linear"


def test_curves_of_no_epoch(tmp_path):
    assert pixels(plots.plot_curves(tmp_path)).min() < 0.5


# --- features.png


def features(path, shape, classes=10, maps=((4, 4, 6), (2, 2, 6)), filters=(3, 3, None, 16), count=2, kinds=3):
    rng = np.random.default_rng(0)
    filters = tuple(shape[2] if size is None else size for size in filters)
    return feature_plots.plot_features(
        path,
        inputs=rng.uniform(size=(kinds, count, *shape)).astype(np.float32),
        class_names=[f"a rather long $name_{i}" for i in range(classes)],
        labels=np.arange(count) % classes,
        wrong_labels=(np.arange(count) + 1) % classes,
        codebook=rng.normal(size=(classes, *shape)) if kinds == 3 else None,
        streams=[rng.uniform(size=(kinds, count, *size)) for size in maps],
        filters=rng.normal(size=filters),
    )


@pytest.mark.parametrize(
    "arguments",
    slow_but(
        [
            {"shape": (32, 32, 3)},
            {"shape": (8, 8, 1), "classes": 2, "count": 1, "maps": ((3, 3, 2),)},
            {"shape": (224, 224, 3), "classes": 100, "count": 3, "maps": ((56, 56, 2),) * 8},
            {"shape": (28, 28, 1), "count": 3, "maps": ((30,), (31,), (1,)), "filters": (784, 20)},
            {"shape": (8, 8, 3), "kinds": 1, "count": 9},
        ],
        {"shape": (8, 8, 3), "kinds": 1, "count": 9},
    ),
    ids=["conv", "smallest", "largest", "dense", "no copies"],
)
def test_features_file(tmp_path, arguments):
    path = features(tmp_path / "features.png", **arguments)
    assert [path] == list(tmp_path.iterdir())
    assert coloured(pixels(path)) > 0.02  # the maps are drawn in colour


@pytest.mark.slow
def test_filters_are_skipped_when_they_cannot_be_shown(tmp_path):
    tall = pixels(features(tmp_path / "a.png", (8, 8, 1)))
    for filters in ((3, 3, 5, 16), (65, 16), (16,)):
        assert len(pixels(features(tmp_path / "b.png", (8, 8, 1), filters=filters))) < len(tall) - 100
    assert len(pixels(features(tmp_path / "c.png", (8, 8, 1), filters=(64, 16)))) == len(tall)


def test_filter_tiles():
    weights = np.arange(-12.0, 12.0).reshape(12, 2)  # a 2x2 RGB image, two units
    tiles = feature_plots._filter_tiles(weights, (2, 2, 3))
    assert [tile.shape for tile in tiles] == [(2, 2, 3)] * 2
    np.testing.assert_allclose(tiles[0].ravel(), 0.5 + weights[:, 0] / 24)
    assert len(feature_plots._filter_tiles(np.zeros((3, 3, 1, 30)), (8, 8, 1))) == 24


def test_features_that_diverged(tmp_path):
    stream = np.full((3, 1, 2, 2, 1), np.nan)
    path = feature_plots.plot_features(
        tmp_path / "x.png",
        inputs=np.full((3, 1, 8, 8, 1), np.nan),
        class_names=["a", "b"],
        labels=[0],
        wrong_labels=[1],
        codebook=np.zeros((2, 8, 8, 1)),
        streams=[stream, np.tile([np.nan, np.inf, 1.0, 2.0], (3, 1, 1))],
        filters=np.full((3, 3, 1, 4), np.nan),
    )
    assert coloured(pixels(path)) > 1e-3  # the two finite units


def test_fold_and_scale():
    folded = feature_plots._fold(np.arange(5.0))
    np.testing.assert_array_equal(folded, [[0, 1, 2], [3, 4, np.nan]])
    np.testing.assert_array_equal(feature_plots._fold(np.arange(8.0).reshape(2, 2, 2)), [[0.5, 2.5], [4.5, 6.5]])
    values = np.array([-1.0, 1.0, 3.0, np.nan])
    assert feature_plots._limits(values) == (-1.0, 3.0)
    np.testing.assert_allclose(feature_plots._unit(values, -1.0, 2.0), [0, 2 / 3, 1, np.nan])
    np.testing.assert_array_equal(feature_plots._unit(np.full(3, 7.0), 7.0, 7.0), [0.5] * 3)


def test_labelled_copies_are_brought_to_the_range_of_the_display():
    clean = np.tile(np.linspace(0, 1, 100), (1, 1, 1, 1, 1)).reshape(1, 1, 10, 10, 1)
    copies = np.concatenate([5 * clean - 2, 3 * clean])
    shown = feature_plots._displayed(np.concatenate([clean, copies]))
    np.testing.assert_array_equal(shown[0], clean[0])
    low, high = np.percentile(copies, (1, 99))
    np.testing.assert_allclose(shown[1:], np.clip((copies - low) / (high - low), 0, 1))
    np.testing.assert_array_equal(
        feature_plots._displayed(np.concatenate([clean, clean[:, :, ::-1]]))[1], clean[0, :, ::-1]
    )  # they fit already


@pytest.mark.parametrize("rule", ["vff", "head"])
def test_features_show_what_the_rule_uses(rule, tmp_path):
    config = make_config(TINY | {"rule": rule})
    dataset = data.load(config)
    plan = experiment.plan_for(config, dataset)
    states, task = experiment.start(plan, dataset)
    with mock.patch.object(summary, "plot_features") as plot:
        summary.draw_features(tmp_path / "features.png", plan, dataset, states, task)
    drawn = plot.call_args.kwargs
    assert len(set(drawn["labels"])) == len(drawn["labels"]) == drawn["inputs"].shape[1]
    images = [dataset.test.images[list(dataset.test.labels).index(label)] / 255 for label in drawn["labels"]]
    np.testing.assert_allclose(drawn["inputs"][0], images, atol=1e-6)
    if rule == "head":
        assert (drawn["codebook"], len(drawn["inputs"])) == (None, 1)
        assert [stream.shape for stream in drawn["streams"]] == [(1, 9, 16), (1, 9, 12)]
    else:
        noise = (drawn["inputs"][1:] - drawn["inputs"][0]) / np.asarray(task.std)
        np.testing.assert_allclose(noise, np.asarray(task.codebook)[[drawn["labels"], drawn["wrong_labels"]]], atol=1e-5)
