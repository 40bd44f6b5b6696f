"""What fine-tuning adds: frozen groups, frozen statistics, learning rates by group, ImageNet's pixel statistics."""

import functools
import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracles
from command_lines import ROOT
from oracles import CONV, MLP, config_of, differs, quick_jit, slow_but, small_run
from runs import train
from vffjax.config import for_group
from vffjax.errors import UserError
from vffjax.proofs import locality
from vffjax.runs.workdir import load_run
from vffjax.training.checks import make_config
from vffjax.training.plan import make_task
from vffjax.training.trainer import train_step
from vffjax.weights.weights import read_weights

RESNET = {"network": "resnet18", "width_factor": 0.05, "grouping": "width"}
ANCHOR = CONV | {"norm": "anchor"}
FF = MLP | {"rule": "ff", "norm": "auto"}
FROZEN = {"norm_statistics": "frozen", "init_from": "weights.safetensors"}  # the file is read by the run, not by a step


def stepped(run, key, steps=1):
    """The states after some steps on the same batch, weight decay and all."""
    step = quick_jit(functools.partial(train_step, run.plan.program, None))
    states = run.states
    for i in range(steps):
        states, metrics = step(run.task, states, run.batch(key=jax.random.fold_in(key, i)))
    return states, metrics


@pytest.mark.parametrize("changes", slow_but([CONV, RESNET, FF], CONV), ids=["conv4", "resnet18", "ff"])
@pytest.mark.parametrize("optimizer", slow_but(["adamw", "sgd"], "adamw"))
def test_a_frozen_group_stays_to_the_bit_and_its_head_learns(changes, optimizer, key):
    if "rule" in changes and optimizer == "sgd":
        pytest.skip("one optimizer is enough for a rule")
    config = config_of(**changes, frozen_groups=1, optimizer=optimizer, weight_decay=0.1, head_weight=1.0)
    run = small_run(config, shape=(8, 8, 3))
    states, _ = stepped(run, key, 3)
    for i, (before, after) in enumerate(zip(run.states, states, strict=True)):
        layers = [{name: leaf for name, leaf in state.params.items() if name != "head"} for state in (before, after)]
        statistics = before.batch_stats, after.batch_stats
        if i == 0:
            oracles.assert_same(*layers)
            oracles.assert_same(*statistics)
        else:
            assert all(differs(layers[0][name], layers[1][name]) for name in layers[0])
            assert not before.batch_stats or differs(*statistics)
        assert differs(before.params["head"], after.params["head"])


def test_a_frozen_group_keeps_no_optimizer_state_for_its_layers():
    run = small_run(config_of(**CONV, frozen_groups=1))
    frozen, free = (sum(leaf.size for leaf in jax.tree.leaves(state.opt_state)) for state in run.states)
    head = sum(leaf.size for leaf in jax.tree.leaves(run.states[0].params["head"]))
    assert frozen == pytest.approx(2 * head, abs=4)  # two moments and counters
    assert free > 2 * head


def test_later_groups_train_on_what_a_frozen_group_gives_in_evaluation(key):
    """Its running statistics, as they will be used; batch statistics would be others than the network's own."""
    run = small_run(config_of(**CONV, frozen_groups=1))
    group, state, x = run.plan.groups[0], run.states[0], jnp.asarray(np.random.default_rng(0).normal(size=(6, 8, 8, 2)), jnp.float32)
    training, evaluation = (group.features(state.params, state.batch_stats, x, 3, train)[0] for train in (True, False))
    oracles.assert_same(training, evaluation)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [CONV, RESNET, ANCHOR, MLP], ids=["conv4", "resnet18", "anchor", "mlp"])
def test_frozen_statistics_stay_and_all_parameters_learn(changes, key):
    run = small_run(config_of(**changes, **FROZEN), shape=(8, 8, 3))
    states, _ = stepped(run, key)
    for before, after in zip(run.states, states, strict=True):
        oracles.assert_same(before.batch_stats, after.batch_stats)
        moved = [differs(a, b) for a, b in zip(jax.tree.leaves(before.params), jax.tree.leaves(after.params), strict=True)]
        assert all(moved)


@pytest.mark.slow
def test_with_frozen_statistics_a_row_is_normalised_the_same_in_training_and_evaluation(key):
    run = small_run(config_of(**RESNET, **FROZEN), shape=(8, 8, 3))
    group, state = run.plan.groups[0], run.states[0]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 8, 8, 3)), jnp.float32)
    training, evaluation = (group.features(state.params, state.batch_stats, x, 4, train)[0] for train in (True, False))
    np.testing.assert_allclose(training, evaluation, rtol=1e-5, atol=1e-6)


def test_rates_fall_towards_the_image_and_overrides_win():
    config = config_of(learning_rate=0.1, group_decay=0.5, overrides={"group1": {"learning_rate": 7.0}})
    assert [for_group(config, i, 2 - i).learning_rate for i in range(3)] == pytest.approx([0.025, 7.0, 0.1])
    assert for_group(config, 0).learning_rate == 0.1  # a single group, back-propagation


@pytest.mark.slow
def test_a_plan_gives_each_group_its_rate(key):
    """A step of plain SGD moves a parameter by rate times gradient: the same network at two decays."""
    moves = []
    for decay in (1.0, 0.5):
        run = small_run(config_of(**MLP, optimizer="sgd", momentum=0.0, learning_rate=1e-2, group_decay=decay, head_weight=1.0))
        states, _ = stepped(run, key)
        moves.append(
            [np.asarray(b.params["layers_0"]["kernel"] - a.params["layers_0"]["kernel"]) for a, b in zip(run.states, states, strict=True)]
        )
    for i, (full, less) in enumerate(zip(*moves, strict=True)):
        np.testing.assert_allclose(less, full * 0.5 ** (2 - i), rtol=1e-2, atol=1e-6)


def test_imagenets_pixel_statistics_take_the_place_of_the_datas():
    given = ((8, 8, 3), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    own, imagenet = (make_task(config_of(pixel_statistics=name), 3, *given) for name in ("data", "imagenet"))
    np.testing.assert_allclose(own.mean, given[1], rtol=1e-6)
    np.testing.assert_allclose(own.std, given[2], rtol=1e-6)
    np.testing.assert_allclose(imagenet.mean, (0.485, 0.456, 0.406), rtol=1e-6)
    np.testing.assert_allclose(imagenet.std, (0.229, 0.224, 0.225), rtol=1e-6)
    oracles.assert_same(own.codebook, imagenet.codebook)


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [1, 4])
def test_fine_tuning_is_local(frozen):
    """By the program; for frozen groups of a small network by numbers too."""
    network = CONV if frozen == 1 else RESNET
    changes = network | FROZEN | {"dataset": "cifar10", "frozen_groups": frozen, "head_weight": 1.0}
    found = locality.certify(config_of(**changes), numeric=network is CONV)
    assert (found["local"], found["violations"]) == (True, [])


def test_linear_probing_leaves_the_whole_network(key):
    run = small_run(config_of(**MLP, frozen_groups=3))
    states, metrics = stepped(run, key)
    for before, after in zip(run.states, states, strict=True):
        oracles.assert_same(before.params["layers_0"], after.params["layers_0"])
        assert differs(before.params["head"], after.params["head"])
    assert not np.asarray(metrics["local_loss"]).any()


REFUSED = {
    "statistics of nothing": ({"norm_statistics": "frozen"}, "config.norm_statistics"),
    "statistics of layers": (FROZEN | {"norm": "layer"}, "config.norm_statistics"),
    "no weight file": ({"init_from": "weights.npz"}, "config.init_from"),
    "resized vectors": ({"network": "mlp", "image_size": 32}, "config.image_size"),
    "a factor of nothing": ({"network": "conv4", "widths": (4, 4, 4, 4), "width_factor": 0.5}, "config.width_factor"),
    "a stem without a resnet": ({"network": "vgg8b", "stem": "imagenet"}, "config.stem"),
    "residual goodness": ({"network": "resnet18", "rule": "ff"}, "config.network"),
    "residual sums of any size": ({"network": "resnet18", "norm": "none"}, "config.network"),
}


@pytest.mark.parametrize(("changes", "part"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_meant_is_refused(changes, part):
    with pytest.raises(UserError, match=part):
        make_config(changes)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"frozen_groups": 4} | MLP, "config.frozen_groups"),
        ({"network": "vgg8b"}, "config.network"),  # of 8x8 digits nothing is left
        ({"pixel_statistics": "imagenet"}, "config.pixel_statistics"),  # grey digits
    ],
)
def test_what_does_not_fit_the_data_is_refused(changes, part):
    with pytest.raises(UserError, match=part):
        locality.certify(config_of(**changes), numeric=False)


@pytest.mark.slow
def test_a_resnet_goes_out_under_torchvisions_names_and_comes_in_again(call, tmp_path):
    """One network trained as a whole, its file evaluated as it is, and fine-tuned in frozen and free groups."""
    common = {"dataset": "synthetic", "train_examples": 200, "network": "resnet18", "width_factor": 0.05, "head_grid": 1, "epochs": 1}
    common |= {"batch_size": 32, "copies_per_class": 1}
    pretrained, file = tmp_path / "pretrained", tmp_path / "resnet.safetensors"
    summary = train(make_config(common | {"rule": "head", "grouping": "all"}), pretrained)
    status, out, err = call("export", f"--workdir={pretrained}", f"--out={file}")
    assert (status, "left out" in out) == (0, False), err
    given = [f"--config={ROOT / 'configs' / 'digits.py'}", *(f"--config.{key}={value}" for key, value in common.items())]
    status, out, err = call("evaluate", *given, "--config.rule=head", "--config.grouping=all", f"--config.init_from={file}", "--json")
    assert status == 0, err
    assert json.loads(out)["test_error"] == pytest.approx(summary["test_error"], abs=1e-6)

    headless = ["--config.head_grid=2", f"--config.init_from={file}"]
    status, _, err = call("evaluate", *given, *headless)
    assert (status, "no head came with the weights" in err) == (2, True)
    tuned = make_config(common | {"init_from": str(file), "frozen_groups": 2, "norm_statistics": "frozen"})
    train(tuned, tmp_path / "tuned")
    plan, states, _, run = load_run(tmp_path / "tuned", "best")
    assert run["init_from_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    start = read_weights(file, plan, states)[0]
    for i, (group, before, after) in enumerate(zip(plan.groups, start, states, strict=True)):
        same = [not differs(before.params[name], after.params[name]) for name in before.params if name != "head"]
        assert (all(same), any(same)) == ((True, True) if i < 2 else (False, False)), group.name
        oracles.assert_same(before.batch_stats, after.batch_stats)
