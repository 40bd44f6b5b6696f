"""The PyTorch code of docs/pytorch.md, as it stands there: it reads exported weights and gives the probabilities of the run's ensemble."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from command_lines import ROOT
from oracles import CONV, MLP, config_of, slow_but, small_run
from runs import tiny, train
from vffjax.data import load as data
from vffjax.runs.trained import Trained
from vffjax.training.scores import ensemble, make_scores
from vffjax.weights import weights

torch = pytest.importorskip("torch")
SHAPE = (8, 8, 2)
RECIPE = {"whitening": 2, "activation": "gelu", "norm_scale": False, "auxiliary": (5, 4), "head_grid": 3}
RESNET = {"network": "resnet18", "width_factor": 0.05, "grouping": "block", "head_grid": 2}


@pytest.fixture(scope="module")
def page():
    """What the code of the page defines."""
    (code,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "pytorch.md").read_text(), re.MULTILINE | re.DOTALL)
    assert set(re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE)) == {"json", "numpy", "torch", "safetensors"}
    space = {"__name__": "page"}
    exec(compile(code, "docs/pytorch.md", "exec"), space)
    return space


def by_pytorch(page, file, images):
    with torch.inference_mode():
        return page["Ensemble"](file).eval()(torch.from_numpy(images)).numpy()


def moderate(run):
    """The run with heads whose scores of an image differ by 4 at the most: random weights can be sure of one class for all images."""
    scores = np.asarray(make_scores(run.plan, "heads")(run.task, run.states, run.data.images))
    scales = 4 / np.ptp(scores, axis=2).max(axis=1)
    heads = [s.params["head"] | {k: s.params["head"][k] * f for k in ("kernel", "bias")} for s, f in zip(run.states, scales, strict=True)]
    states = (state._replace(params=state.params | {"head": head}) for state, head in zip(run.states, heads, strict=True))
    return run._replace(states=tuple(states))


CASES = {
    "convolutions": CONV | RECIPE | {"votes": "weighted"},
    "convolutions that pools do not divide": {**CONV, "pools": (3, 1, 2, 1), "whitening": 3, "norm": "anchor", "grouping": "layer"},
    "norm of each image": CONV | {"norm": "layer", "views": "mirror"},
    "norm of inputs": CONV | {"norm": "input", "rule": "head", "image_size": 12},
    "norm of sets of channels": CONV | {"norm": "class", "rule": "cwc", "widths": (4, 6, 7, 9)},
    "no norm": CONV | {"norm": "none", "rule": "head", "image_size": 5, "pools": (1, 1, 2, 1)},
    "cifarnet": {"network": "cifarnet", "widths": (4, 6), "views": "six"} | RECIPE,
    "vgg8b": {"network": "vgg8b", "width_factor": 0.02, "image_size": 32, "auxiliary": (4,)},
    "mlp": MLP,
    "resnet18": RESNET,
    "resnet18 behind its first stem": RESNET | {"stem": "imagenet", "image_size": 40, "norm": "layer"},
    "resnet50": RESNET | {"network": "resnet50", "width_factor": 0.02, "grouping": "width", "norm": "anchor"},
}


@pytest.mark.parametrize("name", slow_but(CASES, "convolutions", "norm of inputs", "norm of sets of channels", "mlp"))
def test_its_probabilities_are_those_of_the_ensemble(name, page, tmp_path):
    run = moderate(small_run(config_of(**CASES[name]), shape=SHAPE, examples=40))
    groups = len(run.plan.groups)
    voting, weighed = list(range(groups))[-2:], {"vote_weights": [0.25, 1.5][-groups:]} if name == "convolutions" else {}
    state = {"epoch": 1, "class_names": ["a", "b", "c"], "image_shape": list(SHAPE), "trained_groups": groups, "voting": voting} | weighed
    trained = Trained(run.plan, run.states, run.task, state)
    weights.write_weights(tmp_path / "w.safetensors", run.plan, run.states, trained.about, names="vffjax")
    scores = make_scores(run.plan, "heads")(run.task, run.states, run.data.images)
    expected = np.exp(ensemble(scores, trained.voting, trained.vote_weights))
    expected /= expected.sum(axis=1, keepdims=True)
    found = by_pytorch(page, tmp_path / "w.safetensors", np.array(run.data.images))
    assert np.ptp(expected, axis=0).max() > 0.02  # images differ, so that a mistake shows
    np.testing.assert_allclose(found, expected, atol=1e-4)


RUNS = {
    "conv4": {"network": "conv4", "widths": (4, 4, 6, 6), "pools": (1, 2, 1, 2)} | RECIPE,
    "resnet18": {"network": "resnet18", "width_factor": 0.05},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_its_probabilities_are_those_of_predict(name, page, call, tmp_path):
    train(tiny(**RUNS[name], epochs=1), tmp_path / "run")
    images = data.load(tiny()).test.images[:20]
    for i, image in enumerate(images):
        Image.fromarray(image[:, :, 0]).save(tmp_path / f"{i:02d}.png")
    status, out, err = call("predict", f"--workdir={tmp_path / 'run'}", "--json", "--top=10", *sorted(tmp_path.glob("*.png")))
    assert (status, err) == (0, "")
    assert call("export", f"--workdir={tmp_path / 'run'}", "--names=vffjax", f"--out={tmp_path / 'w.safetensors'}")[0] == 0
    found = by_pytorch(page, tmp_path / "w.safetensors", images)
    for entry, p in zip(json.loads(out), found, strict=True):
        expected = {one["class"]: one["probability"] for one in entry["by"]["ensemble"]}
        np.testing.assert_allclose(p, [expected[str(i)] for i in range(10)], atol=1e-4)


def test_it_refuses_what_it_cannot_compute(page, tmp_path):
    run = small_run(config_of(**RESNET), shape=SHAPE)
    state = {"epoch": 1, "class_names": ["a", "b", "c"], "image_shape": list(SHAPE), "trained_groups": 9, "voting": [8]}
    about = Trained(run.plan, run.states, run.task, state).about
    for changes, names, says in (
        ({}, "torchvision", "not all groups by vffjax's names"),
        ({"scored_by": "rule"}, "vffjax", "a way of its own"),
        ({"rule_changes_images": True}, "vffjax", "a way of its own"),
    ):
        weights.write_weights(tmp_path / "w.safetensors", run.plan, run.states, about | changes, names=names)
        with pytest.raises(ValueError, match=says):
            page["Ensemble"](tmp_path / "w.safetensors")
