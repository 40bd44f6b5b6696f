"""Kinds of damage to a workdir: each is named, and the run ends with the bits of an undisturbed one, or stops; never silently wrong."""

import json
import re
import shutil

import numpy as np
import pytest

from runs import contents, copy_of, finished, summary_of, tiny, train, untimed
from vffjax.errors import UserError
from vffjax.runs.checkpoint import Checkpoints
from vffjax.uses import evaluation, reproduction

LATEST, EARLIER = 3, 2  # the saved epochs of `finished`


def flip(path, where=0.5, bit=1):
    content = bytearray(path.read_bytes())
    content[int(where * (len(content) - 1))] ^= bit
    path.write_bytes(content)


def cut(path, keep=0.5):
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])


def grow(path):
    path.write_bytes(path.read_bytes() + b"\0")


def swap(one, other):
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def array_file(step, item="group1"):
    """The largest of an item's files of numbers, or the file of the run's state."""
    files = [path for path in (step / item).rglob("*") if path.is_file() and (item == "run" or path.parent.name == "d")]
    return max(files, key=lambda path: path.stat().st_size)


def link(path, target):
    path.unlink()
    path.symlink_to(target)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A run of another seed, whose arrays have the same shapes."""
    workdir = tmp_path_factory.mktemp("foreign") / "run"
    train(tiny(seed=1), workdir)
    return workdir


def replace_step(step, other, with_digests=True):
    shutil.rmtree(step)
    shutil.copytree(other, step)
    if with_digests:
        shutil.copy(f"{other}.sha256.json", f"{step}.sha256.json")


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def forget(step, name):
    path = step.with_name(f"{step.name}.sha256.json")
    digests = json.loads(path.read_text())
    del digests[next(key for key in digests if key.startswith(name))]
    path.write_text(json.dumps(digests))


# What happens to the folder of the latest step, and what is said of it. `foreign` is the run of another seed.
LATEST_DAMAGE = {
    "a bit of an array": (lambda step, foreign: flip(array_file(step)), "group1/.*SHA-256 differs"),
    "the first byte of an array": (lambda step, foreign: flip(array_file(step, "group0"), 0, 255), "group0/.*SHA-256 differs"),
    "the last byte of an array": (lambda step, foreign: flip(array_file(step, "task"), 1, 128), "task/.*SHA-256 differs"),
    "a truncated array": (lambda step, foreign: cut(array_file(step)), "group1/.*SHA-256 differs"),
    "an emptied array": (lambda step, foreign: cut(array_file(step), 0), "group1/.*SHA-256 differs"),
    "a longer array": (lambda step, foreign: grow(array_file(step)), "group1/.*SHA-256 differs"),
    "zeros for an array": (lambda step, foreign: array_file(step).write_bytes(bytes(array_file(step).stat().st_size)), "SHA-256 differs"),
    "no array": (lambda step, foreign: array_file(step).unlink(), "group1/.*no such file"),
    "two groups' files exchanged": (lambda step, foreign: swap(array_file(step), array_file(step, "group0")), "SHA-256 differs"),
    "a manifest's bit": (lambda step, foreign: flip(step / "group1" / "manifest.ocdbt"), "group1/manifest.ocdbt.*SHA-256 differs"),
    "no manifest": (lambda step, foreign: (step / "group0" / "manifest.ocdbt").unlink(), "group0/manifest.ocdbt.*no such file"),
    "metadata's bit": (lambda step, foreign: flip(step / "group1" / "_METADATA"), "group1/_METADATA.*SHA-256 differs"),
    "the step's metadata": (lambda step, foreign: cut(step / "_CHECKPOINT_METADATA", 0.9), "_CHECKPOINT_METADATA.*SHA-256 differs"),
    "a whole group gone": (lambda step, foreign: shutil.rmtree(step / "group1"), "group1/.*no such file"),
    "the run's state gone": (lambda step, foreign: shutil.rmtree(step / "run"), "run/.*no such file"),
    "the run's state edited": (lambda step, foreign: flip(array_file(step, "run")), "run/.*SHA-256 differs"),
    "a folder for a file": (
        lambda step, foreign: (array_file(step, "run").unlink(), (step / "run" / "metadata").mkdir()),
        "run/metadata.*no such file",
    ),
    "a link that leads nowhere": (lambda step, foreign: link(array_file(step), array_file(step).name), "group1/.*not a file"),
    "another run's file": (
        lambda step, foreign: shutil.copy(array_file(foreign / "checkpoints" / "3"), array_file(step)),
        "group1/.*SHA-256 differs",
    ),
    "another run's step without its digests": (
        lambda step, foreign: replace_step(step, foreign / "checkpoints" / "3", False),
        "SHA-256 differs|no such file",
    ),
    "another run's step and digests": (
        lambda step, foreign: replace_step(step, foreign / "checkpoints" / "3"),
        r"foreign checkpoint, saved by another run \(config\.seed is 1 there, not 0\)",
    ),
    "an earlier step under its name": (lambda step, foreign: replace_step(step, step.with_name("2")), "foreign checkpoint, of epoch 2"),
    "digests' bit": (lambda step, foreign: flip(step.with_name("3.sha256.json")), "SHA-256 differs|no such file|digests|foreign"),
    "truncated digests": (lambda step, foreign: cut(step.with_name("3.sha256.json")), "3.sha256.json: damaged checkpoint digests"),
    "emptied digests": (lambda step, foreign: cut(step.with_name("3.sha256.json"), 0), "3.sha256.json: damaged checkpoint digests"),
    "its digests gone": (lambda step, foreign: step.with_name("3.sha256.json").unlink(), "checkpoints/3: not completely saved, or"),
    "the folder gone": (lambda step, foreign: shutil.rmtree(step), "checkpoints/3: missing"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("damage", "said"), LATEST_DAMAGE.values(), ids=LATEST_DAMAGE.keys())
def test_damage_to_the_latest_step_is_named_and_the_run_ends_as_if_undisturbed(damage, said, foreign, tmp_path, capsys):
    workdir = copy_of(finished(), tmp_path)
    (workdir / "summary.json").unlink()
    damage(workdir / "checkpoints" / str(LATEST), foreign)
    if Checkpoints(workdir).epochs() == [EARLIER, LATEST]:
        with pytest.raises(UserError, match=said):
            evaluation.evaluate(workdir, epoch=str(LATEST))
    capsys.readouterr()
    summary = train(tiny(), workdir)
    err = capsys.readouterr().err
    assert re.search(said, err), err
    assert "going on from epoch 2" in err
    assert untimed(summary) == untimed(summary_of(finished()))
    assert reproduction.compare(finished(), workdir)["differences"] == []


@pytest.mark.parametrize(("epoch", "advice"), [("3", "goes back to a sound checkpoint"), ("2", "restore it from a copy")])
def test_the_advice_for_a_damaged_epoch_is_one_that_works(epoch, advice, tmp_path):
    """A run goes back from its newest epoch, and from no other."""
    workdir = copy_of(finished(), tmp_path)
    flip(array_file(workdir / "checkpoints" / epoch))
    with pytest.raises(UserError, match=advice):
        evaluation.evaluate(workdir, epoch=epoch)


STOPPING = {
    "the configuration's bit": (lambda w: flip(w / "config.json", 0.1), "config.json|config\\."),
    "an emptied configuration": (lambda w: cut(w / "config.json", 0), "config.json: cannot be read"),
    "no configuration": (lambda w: (w / "config.json").unlink(), "has checkpoints but no config.json"),
    "another seed in the configuration": (lambda w: edit_json(w / "config.json", seed=1), r"config\.seed=0: .* holds a run with 1"),
    "another temperature in the configuration": (lambda w: edit_json(w / "config.json", temperature=0.5), r"config\.temperature=0\.05"),
    "the best step": (lambda w: flip(array_file(w / "checkpoints" / "2")), "checkpoints/2/group1/.*SHA-256 differs.*the best epoch"),
    "the best step gone": (lambda w: shutil.rmtree(w / "checkpoints" / "2"), "checkpoints/2: missing, .* the best epoch"),
    "the best step's digests gone": (lambda w: (w / "checkpoints" / "2.sha256.json").unlink(), "checkpoints/2: not comp.* the best epoch"),
    "a file that nobody saved": (
        lambda w: (w / "checkpoints" / "3" / "group0" / "extra").write_text("x"),
        r"checkpoints/3/group0/extra: foreign file .*; move it out of there, and start again$",
    ),
    "a folder that nobody saved": (
        lambda w: [(w / "checkpoints" / "3" / "mine").mkdir(), (w / "checkpoints" / "3" / "mine" / "x").write_text("x")],
        r"checkpoints/3/mine: foreign file or folder .*; move it out of there, and start again$",
    ),
    "a digest fewer": (lambda w: forget(w / "checkpoints" / "3", "group1"), "group1/.*: foreign file"),
    "both steps": (lambda w: [flip(array_file(w / "checkpoints" / n)) for n in "23"], "checkpoints/3/group1/.*SHA-256 differs"),
    "a link that leads out": (
        lambda w: (w / "metrics.jsonl.tmp").symlink_to(w.parent / "outside"),
        "metrics.jsonl.tmp: a link that leads out",
    ),
    "a link in the checkpoints": (lambda w: (w / "checkpoints" / "9").symlink_to(w.parent), "checkpoints/9: a link that leads out"),
}


@pytest.mark.parametrize(("damage", "said"), STOPPING.values(), ids=STOPPING.keys())
def test_damage_that_cannot_be_made_good_stops_the_run_and_changes_nothing(damage, said, tmp_path):
    workdir = copy_of(finished(), tmp_path)
    damage(workdir)
    before = contents(workdir)
    with pytest.raises(UserError, match=said):
        train(tiny(), workdir)
    assert contents(workdir) == before
    assert not (tmp_path / "outside").exists()


@pytest.mark.parametrize("key", ["temperature", "epochs", "seed"])
def test_a_configuration_that_was_edited_is_found_by_whoever_reads_the_checkpoints(key, tmp_path):
    # These three would change neither shapes nor what evaluation prints.
    workdir = copy_of(finished(), tmp_path)
    edit_json(workdir / "config.json", **{key: {"temperature": 0.5, "epochs": 9, "seed": 1}[key]})
    with pytest.raises(UserError, match=rf"foreign checkpoint, saved by another run \(config\.{key} is"):
        evaluation.evaluate(workdir)


HEALED = {
    "a torn line": lambda w: cut(w / "metrics.jsonl", 0.9),
    "a line's bit": lambda w: flip(w / "metrics.jsonl", 0.3),
    "a doubled line": lambda w: (w / "metrics.jsonl").write_bytes((w / "metrics.jsonl").read_bytes() * 2),
    "no record": lambda w: (w / "metrics.jsonl").unlink(),
    "a truncated summary": lambda w: cut(w / "summary.json"),
    "no summary": lambda w: (w / "summary.json").unlink(),
    "no plots": lambda w: [(w / name).unlink() for name in ("curves.png", "features.png")],
    "left-overs of a kill": lambda w: [(w / "metrics.jsonl.tmp").write_text("{"), (w / "checkpoints" / "4.orbax-checkpoint-tmp-1").mkdir()],
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", HEALED.values(), ids=HEALED.keys())
def test_record_summary_and_plots_are_made_again_from_the_checkpoints(damage, tmp_path):
    workdir = copy_of(finished(), tmp_path).rename(tmp_path / finished().name)  # which stands in curves.png
    damage(workdir)
    train(tiny(), workdir, plots=True)
    for name in ("metrics.jsonl", "summary.json", "curves.png", "features.png"):
        assert (workdir / name).read_bytes() == (finished() / name).read_bytes(), name


def test_every_file_of_a_step_is_watched_at_many_of_its_bytes(tmp_path):
    workdir = copy_of(finished(), tmp_path)
    checkpoints, rng = Checkpoints(workdir), np.random.default_rng(0)
    step = workdir / "checkpoints" / str(LATEST)
    files = [path for path in [*step.rglob("*"), step.with_name(f"{LATEST}.sha256.json")] if path.is_file() and path.stat().st_size]
    assert len(files) > 10
    assert checkpoints.opened(LATEST).fault(tiny()) is None
    for path in files:
        sound = path.read_bytes()
        for position in {0, len(sound) - 1, *rng.integers(0, len(sound), 4).tolist()}:
            content = bytearray(sound)
            content[position] ^= 1 << rng.integers(0, 7)
            path.write_bytes(content)
            assert checkpoints.opened(LATEST).fault(tiny()), (path, position)
        path.write_bytes(sound)
    assert checkpoints.opened(LATEST).fault(tiny()) is None
