"""Artefacts: what the run says they say, without this package, for any number of images; nothing of this machine is in them."""

import hashlib
import json
import os
import re
import sys
import tempfile

import jax
import jax.export
import numpy as np
import pytest

from command_lines import ROOT, TINY_FLAGS, in_a_process
from image_sets import fails as refused
from oracles import CONV, MLP, config_of, slow_but, small_run, traced_afresh
from runs import contents, copy_of, finished, tiny, train
from vffjax.costs import targets
from vffjax.data import load as data
from vffjax.ops import winograd
from vffjax.runs.trained import Trained
from vffjax.runs.workdir import load_run
from vffjax.training.scores import ensemble, make_scores
from vffjax.uses import artefact

SHAPE, CLASSES, EXAMPLES = (8, 8, 2), 3, 12
# Wide enough for winograd, which training takes and an artefact does not.
WIDE = CONV | {"widths": (16, 16, 24, 24)}
SHORT = {"network": "conv", "widths": (16, 24), "pools": (1, 2)}
BATCHES = (1, 5, EXAMPLES)


def run_state(run, **changes):
    """What a checkpoint says of a run; all groups are trained and vote."""
    groups = list(range(len(run.plan.groups)))
    names = [f"class {i}" for i in range(CLASSES)]
    return {"epoch": 2, "class_names": names, "image_shape": list(SHAPE), "voting": groups, "trained_groups": len(groups)} | changes


def written(folder, run, **changes):
    """Writes the ensemble of a small run, reads it back, and returns it with its description."""
    path = folder / "e.stablehlo"
    described = artefact.write_artefact(path, Trained(run.plan, run.states, run.task, run_state(run, **changes)))
    return jax.export.deserialize(bytearray(path.read_bytes())), described


def wanted(plan, task, states, images, voting, trained, inference="heads"):
    """By the program that evaluates: log-probabilities of the trained groups, and of the ensemble, normalised."""
    groups = np.asarray(make_scores(plan, inference)(task, states, jax.numpy.asarray(images)))[:trained]
    votes = np.exp(ensemble(groups, tuple(voting)).astype(np.float64))
    return {"ensemble": np.log(votes / votes.sum(axis=-1, keepdims=True)), "groups": groups}


def rows(said, n):
    """Of the first images."""
    return {name: values[..., :n, :] for name, values in said.items()}


def assert_says(found, expected, atol=1e-5):
    assert found.keys() == expected.keys()
    for name, values in found.items():
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, expected[name], rtol=1e-5, atol=atol, err_msg=name)


# ----------------------------------------------------------------------------------------------------------------------------------
# What it says

KINDS = {
    "vff": MLP,
    "vff by layer normalisation": MLP | {"norm": "layer"},
    "head": MLP | {"rule": "head"},
    "ff": MLP | {"rule": "ff"},
    "bf16": MLP | {"precision": "bf16"},
    "conv4": WIDE,
    "conv, ff": SHORT | {"rule": "ff"},
    "conv, ragged pools": SHORT | {"pools": (3, 1)},
    "conv of larger images": SHORT | {"image_size": 12},
}


@pytest.mark.parametrize("kind", slow_but(KINDS, "vff", "conv, ff"))
def test_it_says_what_the_run_says_for_any_number_of_images(kind, tmp_path):
    run = small_run(config_of(**KINDS[kind]), shape=SHAPE)
    found, _ = written(tmp_path, run)
    groups = range(len(run.plan.groups))
    images = np.asarray(run.data.images)
    expected = wanted(*run[:3], images, groups, len(groups))
    # Compiling is what takes the time.
    for n in BATCHES if kind in ("vff", "conv4") else (5,):
        assert_says(found.call(images[:n]), rows(expected, n))


def test_a_run_that_the_rule_scores_is_exported_with_these_scores(tmp_path):
    run = small_run(config_of(**MLP, rule="mono_forward", inference="rule"), shape=SHAPE)
    images = np.asarray(run.data.images)
    found, described = written(tmp_path, run, voting=[1])
    said = found.call(images)
    assert described["voting"] == [1]
    assert_says(said, wanted(*run[:3], images, (1,), len(run.plan.groups), "rule"))
    assert np.abs(said["groups"] - wanted(*run[:3], images, (1,), len(run.plan.groups))["groups"]).max() > 0.1, "the heads say otherwise"


def test_weighted_votes_are_exported(tmp_path):
    run, weights = small_run(config_of(**SHORT, votes="weighted"), shape=SHAPE), (0.3, 1.4)
    images = np.asarray(run.data.images)
    found, described = written(tmp_path, run, vote_weights=list(weights))
    assert (described["voting"], described["vote_weights"]) == ([0, 1], list(weights))
    groups = np.asarray(make_scores(run.plan, "heads")(run.task, run.states, run.data.images), np.float64)
    votes = np.exp(weights[0] * groups[0] + weights[1] * groups[1])
    np.testing.assert_allclose(found.call(images)["ensemble"], np.log(votes / votes.sum(axis=-1, keepdims=True)), atol=1e-5)


def test_the_views_that_the_run_is_evaluated_by_are_exported(tmp_path):
    run = small_run(config_of(**SHORT, views="six"), shape=SHAPE)
    images = np.asarray(run.data.images)
    found, _ = written(tmp_path, run)
    groups = np.asarray(make_scores(run.plan, "heads")(run.task, run.states, run.data.images))
    said = found.call(images)["groups"]
    np.testing.assert_allclose(said, groups, atol=1e-5)
    one = np.asarray(make_scores(small_run(config_of(**SHORT), shape=SHAPE).plan, "heads")(run.task, run.states, run.data.images))
    assert np.abs(said - one).max() > 1e-3


@pytest.mark.slow
def test_bf16_convolutions_are_those_of_the_run(tmp_path, monkeypatch):
    run = small_run(config_of(**SHORT, precision="bf16"), shape=SHAPE)
    found, _ = written(tmp_path, run)
    images = np.asarray(run.data.images)
    said = found.call(images)
    # With other sums bf16 rounds otherwise.
    assert_says(said, wanted(*run[:3], images, (0, 1), 2), atol=0.1)
    monkeypatch.setattr(winograd, "applies", lambda *_: False)
    with traced_afresh():
        assert_says(said, wanted(*run[:3], images, (0, 1), 2))


def test_only_trained_groups_are_in_it_and_only_those_that_vote_are_the_ensemble(tmp_path):
    run = small_run(config_of(**MLP, schedule="sequential"), shape=SHAPE)
    images = np.asarray(run.data.images)
    whole, _ = written(tmp_path, run, voting=[2, 0])
    assert_says(whole.call(images), wanted(*run[:3], images, (0, 2), 3))
    found, described = written(tmp_path, run, voting=[1], trained_groups=2)
    said = found.call(images)
    assert said["groups"].shape == (2, EXAMPLES, CLASSES)
    assert_says(said, wanted(*run[:3], images, (1,), 2))
    assert (described["groups"], described["voting"]) == (["group0", "group1"], [1])
    last = np.asarray(run.states[2].params["layers_0"]["kernel"])
    sizes = [len(bytes(each.mlir_module_serialized)) for each in (whole, found)]
    assert sizes[0] - sizes[1] > last.nbytes


def test_voters_that_a_sweep_chose_say_nothing_of_heads(tmp_path, capsys):
    run = small_run(config_of(**MLP, inference="sweep"), shape=SHAPE)
    found, described = written(tmp_path, run, voting=[0])
    assert "here the heads of all trained groups classify" in capsys.readouterr().err
    assert described["voting"] == [0, 1, 2]
    images = np.asarray(run.data.images)
    assert_says(found.call(images), wanted(*run[:3], images, (0, 1, 2), 3))


# ----------------------------------------------------------------------------------------------------------------------------------
# Without this package

ALONE = """
import json, os, pathlib, sys
sys.modules["vffjax"] = None  # to import it raises ImportError
import numpy as np
for folder in sys.argv[1:]:
    os.chdir(folder)
    lines = json.loads(pathlib.Path("e.json").read_text())["call"]
    images = np.load("images.npy")
    for n in (1, len(images)):
        space = {"images": images[:n]}
        exec("\\n".join(lines), space)
        np.savez(f"{n}.npz", ensemble=space["log_p"], groups=space["classify"](images[:n])["groups"])
assert not [name for name in sys.modules if name.startswith("vffjax.")]
print("alone")
"""


@pytest.mark.slow
def test_the_three_lines_classify_without_this_package(call, tmp_path):
    mlp, conv = tmp_path / "mlp", tmp_path / "a conv's"
    mlp.mkdir()
    conv.mkdir()
    status, out, err = call("export", f"--workdir={finished()}", f"--out={mlp / 'e.stablehlo'}")
    assert (status, err) == (0, "")
    plan, states, task, state = load_run(finished())
    voting, epoch = state["voting"], state["epoch"]
    assert out == f"{mlp}/e.stablehlo: groups {voting} of epoch {epoch} vote, for cpu, cuda, tpu; {mlp}/e.json says how to call it\n"
    run = small_run(config_of(**WIDE), shape=SHAPE)
    written(conv, run)
    np.save(mlp / "images.npy", data.load(tiny()).test.images[:40])
    np.save(conv / "images.npy", run.data.images)
    # -I: nothing of this checkout is on the path.
    done = in_a_process("-I", "-W", "error", "-c", ALONE, mlp, conv)
    assert (done.returncode, done.stdout) == (0, "alone\n"), done.stderr
    for folder, parts, voters in ((mlp, (plan, task, states), voting), (conv, run[:3], (0, 1))):
        images = np.load(folder / "images.npy")
        expected = wanted(*parts, images, voters, 2)
        for n in (1, len(images)):
            assert_says(dict(np.load(folder / f"{n}.npz")), rows(expected, n))


def test_other_inputs_are_refused_by_jax(tmp_path):
    run = small_run(config_of(**MLP), shape=SHAPE)
    found, _ = written(tmp_path, run)
    images = np.asarray(run.data.images)
    for wrong in (images.astype(np.float32), images[:, :4], images[0], images[:0]):
        with pytest.raises(ValueError, match=r"ismatch|do not match"):
            found.call(wrong)


# ----------------------------------------------------------------------------------------------------------------------------------
# What is in it


def test_it_is_one_program_for_three_platforms_of_plain_operations(tmp_path):
    run = small_run(config_of(**WIDE), shape=SHAPE)
    found, _ = written(tmp_path, run)
    assert found.platforms == ("cpu", "cuda", "tpu")
    assert str(found.in_avals[0].shape) == "(b, 8, 8, 2)"
    assert not found.has_vjp()
    module = found.mlir_module()
    assert module.count("stablehlo.convolution") >= len(run.plan.config.widths)
    # JAX's own check of the batch, which is gone when the batch is known.
    assert set(re.findall(r"custom_call @(\w+)", module)) <= {"shape_assertion"}


@pytest.mark.parametrize("platform", artefact.PLATFORMS)
def test_of_each_platform_alone_it_is_the_same(platform, tmp_path, monkeypatch):
    run = small_run(config_of(**WIDE), shape=SHAPE)
    monkeypatch.setattr(artefact, "PLATFORMS", (platform,))
    module = written(tmp_path, run)[0].mlir_module()
    # Not winograd's tiles and products: these are for training on CPU.
    assert module.count("stablehlo.convolution") == len(run.plan.config.widths)
    assert "custom_call" not in module.replace("custom_call @shape_assertion", "")


TPU = """
import pathlib, sys, jax, jax.export
from vffjax.costs import targets
device = targets.find("tpu")
found = jax.export.deserialize(bytearray(pathlib.Path(sys.argv[1]).read_bytes()))
compiled = jax.jit(found.call).lower(device.array(5, 8, 8, 2, dtype="uint8")).compile()
print("convolution" in compiled.as_text(), "custom-call" in compiled.as_text())
"""


@pytest.mark.full_optimisation
@pytest.mark.skipif(not targets.has_tpu_compiler(), reason="libtpu is not installed; pip install -e .[tpu-compiler]")
def test_the_tpu_compiler_takes_it(tmp_path):
    written(tmp_path, small_run(config_of(**WIDE), shape=SHAPE))
    # In a process of its own, for libtpu's sake: see tests/compiled.py.
    done = in_a_process("-c", TPU, tmp_path / "e.stablehlo")
    assert done.stdout == "True False\n", done.stderr


@pytest.mark.slow
def test_equal_runs_give_equal_bytes_and_nothing_of_this_machine(call, tmp_path):
    def export(name):
        assert call("export", f"--workdir={finished()}", f"--out={tmp_path / name}")[0] == 0
        return (tmp_path / name).read_bytes()

    first = export("a.stablehlo")
    code = "from vffjax.cli.main import main; import sys; main(sys.argv[1:])"
    done = in_a_process("-c", code, "export", f"--workdir={finished()}", f"--out={tmp_path / 'b.stablehlo'}")
    assert done.returncode == 0, done.stderr
    # What this process has traced before, in other places, is not in it either.
    jax.jit(lambda x: jax.nn.log_softmax(jax.nn.relu(x)))(np.ones((2, 10), np.float32))
    assert export("c.stablehlo") == first == (tmp_path / "b.stablehlo").read_bytes()
    folders = [ROOT, finished(), tmp_path, sys.prefix, os.path.dirname(jax.__file__), os.path.expanduser("~"), tempfile.gettempdir()]
    leaks = [text for text in (*map(str, folders), "vffjax", ".py", "site-packages") if text.encode() in first and len(text) > 2]
    assert not leaks
    assert str(finished()).encode() not in (tmp_path / "a.json").read_bytes()


def test_what_jax_was_told_of_locations_is_as_before(tmp_path):
    keys = ("jax_traceback_in_locations_limit", "jax_include_full_tracebacks_in_locations")
    before = [getattr(jax.config, key) for key in keys]
    run = small_run(config_of(**MLP), shape=SHAPE)
    written(tmp_path, run)
    with pytest.raises(RuntimeError, match="mine"), artefact._without_locations():
        raise RuntimeError("mine")
    assert [getattr(jax.config, key) for key in keys] == before != [0, True]


# ----------------------------------------------------------------------------------------------------------------------------------
# The description, and the folder


def test_the_description_tells_what_it_is(tmp_path):
    run = small_run(config_of(**MLP), shape=SHAPE)
    found, described = written(tmp_path, run, voting=[1, 2])
    told = json.loads((tmp_path / "e.json").read_text())
    assert told == described
    content = (tmp_path / "e.stablehlo").read_bytes()
    assert (told["file"], told["sha256"]) == ("e.stablehlo", hashlib.sha256(content).hexdigest())
    assert (told["format"], told["epoch"], told["voting"]) == ("vffjax ensemble 1", 2, [1, 2])
    assert (told["class_names"], told["image_shape"]) == (["class 0", "class 1", "class 2"], list(SHAPE))
    assert (told["platforms"], told["jax"]) == (["cpu", "cuda", "tpu"], jax.__version__)
    assert told["calling_convention_version"] == found.calling_convention_version
    assert len(told["call"]) == 3
    assert "6 months" in told["compatibility"]
    assert "https://docs.jax.dev/en/latest/export/export.html#compatibility-guarantees" in told["compatibility"]


def test_damage_is_refused_by_jax_or_seen_by_the_digest(tmp_path):
    _, told = written(tmp_path, small_run(config_of(**MLP), shape=SHAPE))
    content = (tmp_path / "e.stablehlo").read_bytes()
    for cut in (0, 3, 100, len(content) // 2):
        with pytest.raises(Exception, match="buffer"):
            jax.export.deserialize(bytearray(content[:cut]))
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1  # in the weights, where jax cannot know
    assert hashlib.sha256(flipped).hexdigest() != told["sha256"]


def test_old_files_are_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    run = small_run(config_of(**MLP), shape=SHAPE)
    written(tmp_path, run)
    before = contents(tmp_path)
    assert set(before) == {"e.stablehlo", "e.json"}

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            written(tmp_path, run, voting=[0])
    assert contents(tmp_path) == before
    written(tmp_path, run, voting=[0])
    after = contents(tmp_path)
    assert set(after) == set(before)
    assert all(after[name][0] != before[name][0] for name in before)


def test_what_cannot_be_written_is_refused_before_anything_is_done(tmp_path, monkeypatch):
    run = small_run(config_of(**MLP), shape=SHAPE)
    monkeypatch.setattr(artefact, "export_ensemble", lambda *_: pytest.fail("began"))
    for content in ("{}", "[]", "", '{"format": "another"}'):
        (tmp_path / "e.json").write_text(content)
        refused(lambda: written(tmp_path, run), f"--out={tmp_path}/e.stablehlo", "e.json beside it", "; give another")
    (tmp_path / "e.json").unlink()
    (tmp_path / "e.json").symlink_to(tmp_path / "nothing")
    refused(lambda: written(tmp_path, run), "e.json beside it")
    (tmp_path / "e.json").unlink()
    with monkeypatch.context() as patched:
        patched.setattr(artefact, "_MAX_BYTES", 1000)
        refused(lambda: written(tmp_path, run), "--format=stablehlo", "GB of weights", "; use --format=safetensors")
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    refused(lambda: written(tmp_path, run), "--format=stablehlo", "flatbuffers", "; pip install flatbuffers")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_workdir_that_holds_exports_goes_on_as_before(call, tmp_path):
    workdir = copy_of(finished(), tmp_path)
    before = contents(workdir)
    status, out, err = call("export", f"--workdir={workdir}", "--epoch=latest")
    assert (status, out, err) == (0, f"{workdir}/weights.safetensors: 2 groups of epoch 3\n", "")
    status, out, err = call("export", f"--workdir={workdir}", "--format=stablehlo", "--epoch=latest")
    assert (status, err) == (0, "")
    assert re.match(rf"{workdir}/ensemble.stablehlo: groups \[.*\] of epoch 3 vote", out)
    exports = {"weights.safetensors", "ensemble.stablehlo", "ensemble.json"}
    held = contents(workdir)
    assert set(held) == set(before) | exports
    assert {name: held[name] for name in before} == before
    assert call("evaluate", f"--workdir={workdir}")[0] == 0
    status, out, err = call("train", *TINY_FLAGS, f"--workdir={workdir}")
    assert status == 0, err
    assert out.startswith("test error")
    assert {name: contents(workdir)[name] for name in exports} == {name: held[name] for name in exports}
    # Exported again in the same place.
    assert call("export", f"--workdir={workdir}", "--format=stablehlo")[0] == 0
    # Nor is a run disturbed that begins in a folder where such files lie already.
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    for name in exports:
        (fresh / name).write_bytes(held[name][0])
    train(tiny(epochs=1), fresh)
    assert {name: contents(fresh)[name][0] for name in exports} == {name: held[name][0] for name in exports}
