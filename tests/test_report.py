"""The report of a run: what is measured, the page, its pictures, what is left out, and the page of a run that is training."""

import base64
import dataclasses
import functools
import html.parser
import http.server
import io
import itertools
import json
import re
import shutil
import subprocess
import threading
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from command_lines import in_a_process
from runs import copy_of, finished, scratch, summary_of, tiny, train
from vffjax.data import load as data
from vffjax.data.sets import Split
from vffjax.runs import experiment, logbook
from vffjax.runs.trained import Trained
from vffjax.runs.workdir import load_run
from vffjax.training import augment, trainer
from vffjax.uses import evaluation, report, report_live, report_page, report_sections
from vffjax.uses import report_figures as figures
from vffjax.uses.report_page import Section, Table

HOSTILE = "<script>alert('x')</script>\"><img src=x onerror=alert(1)> $a_b$ \\frac{ \ud800"


class Page(html.parser.HTMLParser):
    """What a page consists of."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.headings, self.pictures, self.text, self._in = [], [], {}, "", ""
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        self._in = tag
        if tag == "img":
            content = base64.b64decode(attributes["src"].removeprefix("data:image/png;base64,"), validate=True)
            self.pictures[attributes["alt"]] = content

    def handle_endtag(self, tag):
        self._in = ""

    def handle_data(self, text):
        if self._in != "style":
            self.text += text
        if self._in == "h2":
            self.headings.append(text)


def assert_needs_nothing_else(page):
    assert not {"script", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in page.tags}
    addresses = [value for _, given in page.tags for key, value in given.items() if key in ("src", "href", "srcset", "action", "data")]
    assert addresses and all(address.startswith("data:") for address in addresses)
    assert not any(key.startswith("on") for _, given in page.tags for key in given)
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in [given.get("content") for _, given in page.tags]


@functools.cache
def voting():
    """A run of two groups, which both vote, and its report. Not to be written to."""
    workdir = scratch() / "voting"
    summary = train(tiny(widths=(8, 24), epochs=8, head_weight=30.0), workdir)
    assert summary["voting"] == [0, 1]
    report_sections.write(workdir)
    return workdir


@functools.cache
def seen():
    trained = load_run(voting())
    return report_sections.look(trained, data.load(trained.plan.config))


# --- the page


def test_the_page_holds_every_part_and_needs_nothing_else():
    page = Page(voting() / "report.html")
    assert page.headings == ["Errors", "The run", "Curves", "Mistakes", "Groups", "Labelled copies", "What the network sees"]
    assert list(page.pictures) == [
        *("Training and validation error", "Local loss", "Head loss", "Confusion matrix", "Error by class", "The worst mistakes"),
        *("Accuracy by depth", "Agreement of groups", "Early exit", "Right and wrong noise", "Similarity by class"),
        "Inputs and features",
    ]
    assert_needs_nothing_else(page)
    files = {path.read_bytes() for path in (voting() / "report").glob("*.png")}
    assert files == set(page.pictures.values()) and len(files) == len(page.pictures)
    for content in files:
        with Image.open(io.BytesIO(content)) as picture:
            pixels = np.asarray(picture.convert("L"))
        assert pixels.shape[1] >= 600 and pixels.std() > 5
    summary = summary_of(voting())
    for error in (summary["test_error"], summary["val_error"], *summary["test_error_per_group"]):
        assert f"{error:.2f}" in page.text
    assert f"vffjax reproduce {voting()}" in page.text
    changed = page.text.partition("changed key")[2].partition("All ")[0]
    assert "learning_rate" in changed and "weight_decay" not in changed


def test_pictures_of_an_earlier_report_do_not_stay(tmp_path):
    shutil.copytree(voting() / "report", tmp_path / "report")
    (tmp_path / "report" / "mine.png").touch()
    report_page.picture_folder(tmp_path, fresh=True)
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["mine.png"]


def test_what_a_rule_does_not_have_is_left_out(tmp_path, call):
    train(tiny(rule="head", grouping="all", epochs=2, val_fraction=0.0), tmp_path)
    status, out, err = call("report", f"--workdir={tmp_path}")
    assert (status, out, err) == (0, f"{tmp_path / 'report.html'}\n", "")
    page = Page(tmp_path / "report.html")
    assert page.headings == ["Errors", "The run", "Curves", "Mistakes", "Groups", "What the network sees"]
    assert not {"Local loss", "Agreement of groups", "Early exit", "Right and wrong noise"} & set(page.pictures)
    assert "Error on training images" in page.pictures
    assert "no validation images" in page.text


def test_another_epoch_is_reported_as_evaluate_measures_it(tmp_path):
    workdir = copy_of(finished(), tmp_path)
    report_sections.write(workdir, "latest")
    page, errors = Page(workdir / "report.html"), evaluation.evaluate(workdir, epoch="latest")["test_error_per_group"]
    assert errors != summary_of(workdir)["test_error_per_group"]
    assert all(f"{error:.2f}" in page.text for error in errors)
    assert "Epoch of this report" in page.text and "3 of 3" in page.text
    assert "The groups that vote were chosen on validation images." in page.text
    assert "The epoch and the groups" not in page.text


def test_a_picture_that_fails_is_a_line_and_the_report_stands(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("no\nfont")

    workdir = copy_of(finished(), tmp_path)
    monkeypatch.setattr(figures, "confusion", fail)
    monkeypatch.setattr(report, "label_fits", fail)
    report_sections.write(workdir)
    page = Page(workdir / "report.html")
    assert {"Error by class", "Accuracy by depth"} <= set(page.pictures) and "Confusion matrix" not in page.pictures
    assert "“Confusion matrix” could not be drawn" in page.text
    assert "A part of this section could not be made" in page.text.partition("Labelled copies")[2]
    why = "is left out (RuntimeError: no font); the result stands"
    told = capsys.readouterr().err.splitlines()
    assert told == [f"{workdir / 'report' / 'confusion.png'} {why}", f"{workdir / 'report.html'}, Labelled copies {why}"]


def test_names_and_values_from_outside_are_text(tmp_path):
    folder = tmp_path / "report"
    folder.mkdir()
    names = (HOSTILE, "b" * 500, "$\\frac{$", "猫", *seen().names[4:])
    hostile = seen()._replace(dataset=dataclasses.replace(seen().dataset, class_names=names))
    sections = [
        Section("Mistakes", folder).fill(functools.partial(report_sections.mistakes, seen=hostile)),
        Section(HOSTILE, folder, [HOSTILE], [Table([HOSTILE], [[HOSTILE]], HOSTILE)], HOSTILE, notes=[HOSTILE]),
    ]
    config = seen().trained.plan.config.to_dict() | {"data_dir": HOSTILE, "rule_options": {HOSTILE: HOSTILE}}
    origins = [{"device": HOSTILE, "versions": {HOSTILE: HOSTILE}, "commit": [HOSTILE]}]
    about = functools.partial(report_page.about_the_run, config=config, origins=origins, workdir=tmp_path / HOSTILE[:9])
    records = [{"epoch": e, f"{HOSTILE}/../../x_per_group": [1.0, 2.0]} for e in (1, 2)]
    sections.append(Section("The run", folder).fill(about))
    sections.append(Section("Curves", folder).fill(functools.partial(report_page.curves, records=records)))
    assert [section.notes for section in sections] == [[], [HOSTILE], [], []]
    report_page.write(tmp_path / "report.html", HOSTILE, HOSTILE, [(HOSTILE, HOSTILE)], sections)
    page = Page(tmp_path / "report.html")
    assert_needs_nothing_else(page)
    assert len([tag for tag, _ in page.tags if tag == "img"]) == len(list(folder.iterdir())) == 4
    assert page.text.count("<script>alert('x')</script>") > 8


def test_nothing_is_written_outside_of_the_workdir(tmp_path, fails):
    workdir = copy_of(finished(), tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (workdir / "report").symlink_to(tmp_path / "elsewhere")
    for live in ([], ["--live"]):
        fails("report", f"--workdir={workdir}", *live, parts=[str(workdir / "report"), "a link that leads out"])
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--live", "--epoch=2"], ["--epoch=2", "leave it out"]),
        (["--epoch=7"], ["7"]),
        (["--other"], ["--other", "vffjax report --help"]),
    ],
)
def test_bad_arguments_are_refused(arguments, parts, fails):
    fails("report", f"--workdir={finished()}", *arguments, parts=parts)


@pytest.mark.parametrize("live", [[], ["--live"]])
def test_a_folder_without_a_run_is_refused(live, tmp_path, fails):
    fails("report", f"--workdir={tmp_path}", *live, parts=[str(tmp_path), "config.json is missing"])
    assert not list(tmp_path.iterdir())


# --- in a browser

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
WRAPPER = """<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,">
<iframe id="page" src="report.html" width="1200" height="900"></iframe>
<pre id="found"></pre><script>
addEventListener("load", () => {
  const frame = document.getElementById("page"), inside = frame.contentDocument;
  const found = {
    title: inside.title,
    widths: [...inside.images].map(image => image.complete ? image.naturalWidth : 0),
    requests: frame.contentWindow.performance.getEntriesByType("resource").map(entry => entry.name),
    scrolls: inside.documentElement.scrollWidth > inside.documentElement.clientWidth,
  };
  document.getElementById("found").textContent = JSON.stringify(found);
});
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(not BROWSER, reason="neither chromium nor google-chrome is on the PATH")
def test_a_browser_shows_the_page_without_the_network(tmp_path):
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *given):
            super().__init__(*given, directory=tmp_path)

        def log_request(self, *_):
            asked.append(self.path)

        def log_message(self, *_):
            pass

    (tmp_path / "wrapper.html").write_text(WRAPPER)
    shutil.copy(voting() / "report.html", tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}"]
        address = f"http://127.0.0.1:{server.server_address[1]}/wrapper.html"
        command = [BROWSER, *options, "--virtual-time-budget=20000", "--dump-dom", address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        server.shutdown()
    found = json.loads(re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)[1])
    assert found["title"] == "voting: rule vff on digits"
    assert len(found["widths"]) == 12 and min(found["widths"]) >= 600
    assert [name for name in found["requests"] if not name.startswith("data:")] == []
    assert not found["scrolls"]
    assert sorted(asked) == ["/report.html", "/wrapper.html"]
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []


# --- a run that is training


def test_the_live_page_follows_a_run_and_ends_with_it(tmp_path, monkeypatch, capsys):
    workdir = copy_of(finished(), tmp_path)
    lines, summary = (workdir / "metrics.jsonl").read_bytes().splitlines(keepends=True), (workdir / "summary.json").read_bytes()
    before = set(workdir.iterdir()) | {workdir / "report", workdir / "live.html"}
    (workdir / "summary.json").unlink()
    (workdir / "metrics.jsonl").write_bytes(b"")
    pages, drawn, sound = [], [], report_live._write
    monkeypatch.setattr(report_live, "_write", lambda *given: (drawn.append(len(given[2])), sound(*given)))

    def sleep(_):
        pages.append(Page(workdir / "live.html"))
        step = len(pages)
        if step == 2:
            (workdir / "metrics.jsonl").write_bytes(lines[0] + lines[1][:20])  # the second is torn
        if step == 3:
            (workdir / "metrics.jsonl").write_bytes(lines[0] + lines[1])
        if step == 4:
            (workdir / "metrics.jsonl").write_bytes(b"".join(lines))
            (workdir / "summary.json").write_bytes(summary)

    monkeypatch.setattr(report_live.time, "sleep", sleep)
    assert report_live.follow(workdir) == workdir / "live.html"
    assert drawn == [0, 1, 2, 3]
    last = Page(workdir / "live.html")
    refreshes = [[given["content"] for _, given in page.tags if given.get("http-equiv") == "refresh"] for page in [*pages, last]]
    assert refreshes == [["5"]] * 4 + [[]]
    assert [list(page.pictures) for page in pages[:3]] == [[], [], []]
    assert list(last.pictures) == list(pages[3].pictures) == ["Training and validation error", "Local loss", "Head loss"]
    assert "1 of 3" in pages[2].text and "3 of 3" in last.text and "has ended" in last.text
    ended = json.loads(lines[-1])
    for name, percent in (
        ("Training error", f"{100 * (1 - ended['train_accuracy']):.1f} %"),
        ("Validation error", f"{ended['val_error']:.2f} %"),
    ):
        assert re.search(rf"{name}\s*{re.escape(percent)}", last.text)
    assert_needs_nothing_else(last)
    assert set(workdir.iterdir()) == before | {workdir / "summary.json"}


def test_the_live_page_needs_no_jax_and_waits_for_no_lock(tmp_path):
    workdir = copy_of(finished(), tmp_path)
    code = "import sys\nfrom vffjax.cli.commands import report\n"
    code += f"from vffjax.runs import lock\nfile = open({str(workdir / '.lock')!r}, 'a')\nassert lock.take(file)\n"
    code += f"report.run(['--live', '--workdir', {str(workdir)!r}])\nprint('jax' in sys.modules)"
    done = in_a_process("-c", code)
    assert done.stdout.splitlines() == [
        f"{workdir / 'live.html'}: the run has ended; vffjax report --workdir {workdir} shows what was learnt",
        "False",
    ]


def test_a_run_that_trains_lost_epochs_again_has_not_ended(tmp_path):
    workdir = copy_of(finished(), tmp_path)
    assert logbook.finished(workdir)
    (workdir / "metrics.jsonl").write_bytes((workdir / "metrics.jsonl").read_bytes().split(b"\n")[0] + b"\n")
    assert not logbook.finished(workdir)


# --- what is measured


def test_the_sample_is_bounded_by_images_and_bytes_and_is_the_seeds():
    split = Split(np.arange(40 * 4, dtype=np.uint8).reshape(40, 2, 2, 1), np.arange(40, dtype=np.int32))
    some = report.sample(split, 10, 3)
    assert len(set(some.labels)) == 10 and list(some.labels) == sorted(some.labels)
    assert some.images[:, 0, 0, 0].tolist() == (4 * some.labels).tolist()
    assert list(report.sample(split, 10, 3).labels) == list(some.labels) != list(report.sample(split, 10, 4).labels)
    assert report.sample(split, 40, 3).images is split.images
    with mock.patch.object(report, "MOST_BYTES", 100):
        assert [len(report.sample(split, 99, 0, size)) for size in (0, 20, 1000)] == [25, 5, 1]


def test_mistakes_agree_with_a_slow_count():
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(3, 60, 4)), rng.integers(0, 4, 60)
    total = scores.mean(axis=0)
    said = total.argmax(axis=1)
    counts = report.confusion(said, labels, 4)
    slow = np.zeros((4, 4), int)
    for right, wrong in zip(labels, said, strict=True):
        slow[right, wrong] += 1
    np.testing.assert_array_equal(counts, slow)
    listed = report.most_confused(counts, 3)
    pairs = sorted(((slow[r, s], r, s) for r in range(4) for s in range(4) if r != s), key=lambda pair: -pair[0])[:3]
    assert [count for _, _, count in listed] == [count for count, _, _ in pairs]
    assert all(slow[right, wrong] == count and right != wrong for right, wrong, count in listed)
    assert report.most_confused(np.diag([2, 3]), 3) == []
    p = np.exp(total) / np.exp(total).sum(axis=1, keepdims=True)
    order, sure = report.worst(total, labels, 5)
    wrong = sorted((i for i in range(60) if said[i] != labels[i]), key=lambda i: -p[i].max())[:5]
    assert order.tolist() == wrong
    np.testing.assert_allclose(sure, p[wrong].max(axis=1))
    same, both = report.agreement(scores, labels)
    for a in range(3):
        for b in range(3):
            one, other = scores[a].argmax(axis=1), scores[b].argmax(axis=1)
            assert same[a, b] == pytest.approx(np.mean(one == other))
            assert both[a, b] == pytest.approx(np.mean((one != labels) & (other != labels)))


def test_a_probe_finds_what_is_linear_and_no_more():
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(3, 20))
    labels = rng.integers(0, 3, 600)
    x = (directions[labels] + rng.normal(scale=0.5, size=(600, 20))).astype(np.float32)
    x[:, 0] = 7.0  # a dead unit
    assert report.probe_accuracy(x[:400], labels[:400], x[400:], labels[400:]) > 0.97
    noise = rng.normal(size=(600, 20)).astype(np.float32)
    assert report.probe_accuracy(noise[:400], labels[:400], noise[400:], labels[400:]) < 0.5


@pytest.mark.parametrize("rule", ["vff", "ff"])
def test_probes_see_pooled_maps_of_bounded_size(rule):
    config = tiny(rule=rule, network="conv4", widths=(4, 4, 300, 300), pools=(1, 2, 1, 2), grouping="layer")
    dataset = data.load(config)
    plan = experiment.plan_for(config, dataset)
    trained = Trained(plan, *experiment.start(plan, dataset), {"trained_groups": 4})
    split = report.sample(dataset.test, 20, 0)
    with mock.patch.object(report, "PROBE_INPUTS", 256):
        inputs, active = report.inside(trained, split.images, [0, 3])
    # The image at 8x8; four channels at 8x8; 300 channels at a single position, of which 256 are taken.
    assert [part.shape for part in inputs] == [(20, 64), (20, 256), (20, 256)]
    pixels = (split.images.reshape(20, -1) / 255 - dataset.mean[0]) / dataset.std[0]
    shown = slice(0, None) if rule == "vff" else slice(10, None)  # ff writes labels into the first pixels
    np.testing.assert_allclose(inputs[0][:, shown], pixels[:, shown], atol=1e-4)
    x = plan.rule.shown(trained.task, augment.normalised(trained.task, jnp.asarray(split.images)))
    maps = [np.asarray(z) for _, _, z in trainer.evaluated(plan, trained.states, x, 20)]
    np.testing.assert_allclose(inputs[1], maps[0].reshape(20, -1), atol=1e-5)  # fine enough to need no pooling
    np.testing.assert_allclose(inputs[2], maps[3].mean(axis=(1, 2))[:, np.linspace(0, 299, 256).round().astype(int)], atol=1e-5)
    for found, z in zip(active, maps, strict=True):
        np.testing.assert_array_equal(found, (np.abs(z) > 1e-6).any(axis=(1, 2)))
    assert report.learning_layers(trained) == [f"group{g} layer 0" for g in range(4)]


def test_dead_units_are_counted_on_test_images_and_drawn(tmp_path):
    trained, test = seen().trained, seen().test
    params = trained.states[1].params
    norm = {name: np.array(value) for name, value in params["layers_0"]["norm"].items()}
    norm["bias"][[2, 5]] = -1e4
    changed = trained.states[1]._replace(params=dict(params) | {"layers_0": dict(params["layers_0"]) | {"norm": norm}})
    silenced = trained._replace(states=(trained.states[0], changed))
    sections = [Section("", tmp_path), Section("", tmp_path)]
    for section, run in zip(sections, (trained, silenced), strict=True):
        report_sections._inside(section, run, [50.0, 60.0], [0], report.sample(seen().dataset.train, 50, 0), test)
    titles = [[picture.title for picture in section.pictures] for section in sections]
    assert titles == [["Accuracy by depth"], ["Accuracy by depth", "Dead units"]]
    assert "none is dead" in sections[0].texts[0]
    assert sections[1].pictures[1].caption.startswith(f"2 of 32 channels and units give 0 for all of {len(test)} test images")


def test_fits_of_labels_are_those_of_the_sweep():
    trained, dataset = seen().trained, seen().dataset
    found = report.label_fits(trained, dataset.test)
    swept = evaluation.evaluate(voting(), "sweep")
    np.testing.assert_allclose(100 * (1 - found.best), swept["test_error_per_group"])
    (scores,) = report.class_scores(trained, "sweep", dataset.test)
    for g, (n, label) in [(0, (0, dataset.test.labels[0])), (1, (5, dataset.test.labels[5]))]:
        assert found.right[g, n] == scores[g, n, label]
        np.testing.assert_array_equal(found.wrong[g, n], np.delete(scores[g, n], label))
    of_class = dataset.test.labels == 3
    np.testing.assert_allclose(found.means[1, 3], scores[1, of_class].mean(axis=0), rtol=1e-5)
    assert report.can_tell(trained)


def test_early_exits_cost_less_and_end_at_the_full_ensemble():
    trained, dataset, test = seen().trained, seen().dataset, seen().test
    known = seen().known
    found = report.exits(trained, known, dataset.validation.labels, seen().heads, test.labels)
    wanted = evaluation.evaluate(voting(), "early_exit", early=evaluation.early_exit.Wanted(exits="all"))
    assert found.chosen["threshold"] == wanted["threshold"]
    assert found.chosen["cost"] == pytest.approx(wanted["test_relative_flops"])
    assert found.chosen["error"] == pytest.approx(wanted["test_error"])
    assert found.full_error == pytest.approx(wanted["ensemble_test_error"])
    assert found.costs[0] < found.costs[-1] and found.errors[-1] == found.full_error
    one = trained._replace(run=trained.run | {"trained_groups": 1})
    assert report.exits(one, known[:1], dataset.validation.labels, seen().heads[:1], test.labels) is None


# --- figures


@pytest.mark.slow
@pytest.mark.parametrize("classes", [2, 10, 100, 300])
def test_matrices_and_bars_of_any_number_of_classes(classes, tmp_path):
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 5, (classes, classes)) + 20 * np.eye(classes, dtype=int)
    names = [f"a class with a long name {c}" for c in range(classes)]
    folder = Section("", tmp_path)
    folder.draw("confusion", "", "", lambda: figures.confusion(counts, names))
    folder.draw("class_errors", "", "", lambda: figures.class_errors(counts, names))
    folder.draw("means", "", "", lambda: figures.fit_means(rng.normal(size=(classes, classes)), names))
    assert not folder.notes
    figure = figures.confusion(counts, names)
    labels = [text for text in figure.axes[0].get_yticklabels() if text.get_text()]
    assert len(labels) == classes or classes > figures.NAMED
    assert len(figure.axes[0].texts) == (classes**2 - np.count_nonzero(counts == 0) if classes <= figures.NUMBERED else 0)
    if 10 <= classes <= figures.NAMED:
        figure.savefig(io.BytesIO(), format="png")
        boxes = [label.get_window_extent() for label in labels]
        assert all(abs(a.y0 - b.y0) >= 0.7 * a.height for a, b in itertools.pairwise(boxes))  # none is hidden by the next


def test_curves_mark_the_chosen_epoch_and_draw_training_dashed():
    records = [
        {"epoch": e, "val_error": 20.0 / e, "train_accuracy": 1 - 0.1 / e, "val_error_per_group": [20.0 / e, 30.0 / e]} for e in range(1, 6)
    ]
    axes = figures.curves(records, {"val_error": "validation", "train_accuracy": "training"}, "error (%)", 3).axes[0]
    drawn = {(line.get_label(), line.get_linestyle()): list(line.get_ydata()) for line in axes.lines}
    np.testing.assert_allclose(drawn["ensemble", "-"], [20.0 / e for e in range(1, 6)])
    np.testing.assert_allclose(drawn["group 1", "-"], [30.0 / e for e in range(1, 6)])
    (training,) = [y for (label, style), y in drawn.items() if style == "--" and y]
    np.testing.assert_allclose(training, [10.0 / e for e in range(1, 6)])
    assert [line.get_xdata()[0] for line in axes.lines if line.get_label() == "epoch 3"] == [3]
