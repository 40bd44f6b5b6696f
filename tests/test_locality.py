"""The locality certificate: it passes for every configuration and option, and fails, with the right names, for back-propagation and
for planted leaks."""

import ast
import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from command_lines import CONFIG, ROOT, in_a_process
from oracles import MLP, config_of, slow_but
from runs import tiny
from vffjax import outside
from vffjax.cli.config_file import load_config_file
from vffjax.errors import UserError
from vffjax.networks import find, layers
from vffjax.proofs import locality
from vffjax.registry import SOURCES
from vffjax.rules import local as rules
from vffjax.training import trainer
from vffjax.training.checks import make_config
from vffjax.training.plan import make_plan

TWO = {"network": "mlp", "widths": (8, 6), "grouping": "layer"}  # two groups
BP = {"rule": "head", "grouping": "all"}

FILES = sorted((ROOT / "configs").glob("*.py"))
VARIANTS = re.compile(r"^VARIANTS = (\(.*\))$", re.MULTILINE)  # the first is the file's own, without a name


def given_of(path):
    found = VARIANTS.search(path.read_text())
    others = ast.literal_eval(found[1])[1:] if found else []
    return [path.name, *(f"{path.name}:{variant}" for variant in others)]


GIVEN = [given for path in FILES for given in given_of(path)]


def of_file(given):
    """The configuration of a file; one that wants images of your own gets others of its size, because there are none here."""
    values = load_config_file(str(ROOT / "configs" / given))[0]
    return make_config(values | ({"dataset": "synthetic"} if callable(SOURCES.find(values["dataset"]).sizes) else {}))


def plain(certificate):
    """The certificate, if it can be written as strict JSON and read back as it was."""
    assert json.loads(json.dumps(certificate, allow_nan=False)) == certificate
    return certificate


# ----------------------------------------------------------------------------------------------------------------------------------
# What passes


# These differ from another configuration in their images alone, or in numbers that are arguments of the program, so the program is equal.
SAME_PROGRAM = {
    "cifar100.py": "cifar10.py",
    "cifar100.py:laptop": "cifar10.py:laptop",
    "cifar100.py:small": "cifar10.py:small",
    "cifar100.py:cifarnet": "cifar10.py:cifarnet",
    "finetune.py:resnet34_cifar100": "finetune.py",
    "finetune.py:resnet50_cifar100": "finetune.py:resnet50_cifar10",
    "finetune.py:resnet18_cifar100": "finetune_resnet18_cifar10.py",
    "resnet18.py:cifar100": "resnet18.py",
    "vgg8b.py:cifar100": "vgg8b.py",
}
# These have the operations of another configuration: they differ from it in sizes, or their network has more blocks of the same kind.
SAME_OPERATIONS = {
    "cifar10.py": "cifar10.py:small",
    "cifar10.py:laptop": "cifar10.py:small",
    "finetune.py": "finetune_resnet18_cifar10.py",
    "finetune_resnet18_cifar10.py:narrow": "finetune_resnet18_cifar10.py",
}
SIZES = ("widths", "pools", "width_factor", "image_size", "crop_padding")
PROGRAMS = [given for given in GIVEN if given not in {**SAME_PROGRAM, **SAME_OPERATIONS}]


@pytest.mark.parametrize("given", SAME_PROGRAM)
def test_a_configuration_that_is_not_traced_has_the_program_of_one_that_is(given):
    other = of_file(SAME_PROGRAM[given])
    config = dataclasses.replace(of_file(given), dataset=other.dataset)
    assert make_plan(config, 1000, 10).program == make_plan(other, 1000, 10).program


@pytest.mark.parametrize("given", SAME_OPERATIONS)
def test_a_configuration_that_is_not_traced_has_the_operations_of_one_that_is(given):
    other, config = of_file(SAME_OPERATIONS[given]), of_file(given)
    changes = {key: getattr(other, key) for key in SIZES} | {"pixel_statistics": other.pixel_statistics}
    assert "resnet" not in config.network or (config.network, other.network) in [("resnet18",) * 2, ("resnet34", "resnet18")]
    same = dataclasses.replace(config, network=other.network, **changes)
    assert make_plan(same, 1000, 10).program == make_plan(other, 1000, 10).program


# digits.py comes below, with numbers; test_published_networks.py certifies narrow networks of the kinds that take seconds to trace.
@pytest.mark.slow
@pytest.mark.parametrize("given", [given for given in PROGRAMS if given != "digits.py"])
def test_every_configuration_is_local_by_its_program(given):
    found = plain(locality.certify(of_file(given), numeric=False))
    assert (found["local"], found["violations"]) == (True, [])
    assert len(found["groups"]) == (3 if given.endswith("mnist.py") else 4 if given.startswith(("resnet", "vgg", "finetune")) else 2)
    assert [(p["program"], p["trains"]) for p in found["programs"]] == [
        ("step", [*found["groups"]]),
        ("segment", [*found["groups"]]),
        ("losses", []),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("given", ["mnist.py", "cifar10.py:small", "vgg8b.py", "finetune_resnet18_cifar10.py"])
def test_each_kind_of_network_is_local_by_numbers(given):
    """Published networks narrow and on smaller images, which takes less memory and time."""
    config = of_file(given)
    if "width_factor" in find(config).keys:
        config = dataclasses.replace(config, width_factor=0.05, image_size=config.image_size and 64)
    _check_numbers(locality.certify(config))


@pytest.mark.full_optimisation
def test_digits_is_local_by_numbers():
    found = locality.certify(of_file("digits.py"))
    _check_numbers(found)
    assert all(seen["other_images"] for seen in found["numeric"]["images"].values())


def _check_numbers(found):
    numbers = plain(found)["numeric"]
    assert (found["local"], found["violations"]) == (True, [])
    gradients = np.array(numbers["gradients"])
    own = np.eye(len(gradients), dtype=bool)
    assert (gradients[own] > 0).all() and (gradients[~own] == 0).all()
    assert all(seen["labelled_copies"] == 0 for seen in numbers["images"].values())
    assert numbers["interference"] == dict.fromkeys(list(found["groups"])[1:], True)


OPTIONS = {
    "shared, hard": {"contrast": "triplet", "negatives": "hard", "head_weight": 0.5},
    "triplet, hard": {"labelling": "triplet", "negatives": "hard"},
    "ff, hard": {"rule": "ff", "negatives": "hard", "peer_normalisation": 0.1},
    "input": {"norm": "input", "rule": "head"},
    "sequential, triplet, hard": {"schedule": "sequential", "labelling": "triplet", "negatives": "hard"},
    "device cache": {"schedule": "sequential", "feature_cache": "device"},
    "host cache": {"schedule": "sequential", "feature_cache": "host", "rule": "head"},
    "rematerialised": {"rematerialise": True, "grouping": "width", "widths": (8, 8, 8, 6), "head_weight": 1.0},
    "skip, clipped, overridden": {"on_nonfinite": "skip", "clip_norm": 1.0, "overrides": {"group1": {"optimizer": "sgd"}}},
    "erased": {"random_erasing": 0.5, "trivial_augment": True, "random_resized_crop": 0.5, "color_jitter": 0.3},
    "mixed": {"mixup": 0.8, "head_weight": 0.5},
    "hard, mixed": {"labelling": "triplet", "negatives": "hard", "mixup": 0.8, "trivial_augment": True, "random_erasing": 0.1},
    "triplet, augmented, bf16": {"labelling": "triplet", "flip": True, "crop_padding": 1, "cutout": 2, "precision": "bf16"},
}


@pytest.mark.parametrize("option", slow_but(OPTIONS, "ff, hard", "host cache"))
def test_every_option_is_local_by_its_program(option):
    found = plain(locality.certify(config_of(**TWO | OPTIONS[option]), numeric=False))
    assert (found["local"], found["violations"], found["numeric"]) == (True, [], None)


@pytest.mark.slow
def test_augmented_and_mixed_images_leave_gradients_across_groups_at_zero():
    found = locality.certify(config_of(**TWO, head_weight=0.5, random_erasing=0.5, trivial_augment=True, mixup=0.8))
    gradients = np.array(plain(found)["numeric"]["gradients"])
    own = np.eye(len(gradients), dtype=bool)
    assert found["local"] and (gradients[own] > 0).all() and (gradients[~own] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["anchor", "layer", "none"])  # batch is that of digits
def test_labelled_copies_touch_no_clean_image_and_statistics_are_told(norm):
    found = locality.certify(config_of(**TWO, norm=norm))
    _check_numbers(found)
    for seen in found["numeric"]["images"].values():
        assert seen["other_images"] == (norm == "anchor")


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["supcon", "vff_supcon"])
def test_a_contrast_among_images_of_one_class_is_probed_with_such_images_where_there_are_ten_classes(rule):
    found = locality.certify(tiny(rule=rule))
    assert (found["local"], found["violations"]) == (True, [])


@pytest.mark.slow
def test_an_untrained_stage_is_told_apart_in_the_sequential_schedule():
    found = locality.certify(config_of(**TWO, schedule="sequential"))
    assert found["local"]
    assert [p["trains"] for p in found["programs"] if p["program"] == "segment"] == [["group0"], ["group1"]]
    assert found["numeric"]["interference"] == {"group1": True}
    assert found["sees"]["group1"]["running_statistics"] == ["group0"]


@pytest.mark.slow
def test_a_single_layer_is_local_trivially():
    found = locality.certify(config_of(network="mlp", widths=(6,)), numeric=False)
    assert found["local"]
    assert "trivially" in found["verdict"]


def test_a_configuration_that_does_not_fit_its_data_is_bad_input():
    with pytest.raises(UserError, match=r"config\.batch_size=5000"):
        locality.certify(config_of(**TWO, batch_size=5000))


# ----------------------------------------------------------------------------------------------------------------------------------
# What a group sees


def sees(**changes):
    return locality.certify(config_of(**MLP | changes), numeric=False)["sees"]


@pytest.mark.slow
def test_what_a_group_sees_is_read_from_its_program():
    first, second, last = sees(head_weight=0.0).values()
    assert first["images"] and first["labels"] and first["class_noise"] and first["pixel_statistics"] and first["own_optimizer_state"]
    assert (first["images_pass"], second["images_pass"], last["images_pass"]) == ([], ["group0"], ["group0", "group1"])
    for seen in (first, second, last):
        assert (seen["heads_of_others"], seen["later_groups"], seen["running_statistics"]) == ({}, {}, [])
        assert seen["own_head"] == "no"
    alone = sees(rule="head", **TWO)["group0"]
    assert (alone["own_head"], alone["class_noise"]) == ("floating point", False)


@pytest.mark.slow
def test_drawn_labels_are_told_and_no_leak():
    found = sees(labelling="triplet", negatives="hard")
    assert found["group0"]["heads_of_others"] == {"group1": "whole numbers", "group2": "whole numbers"}
    assert found["group0"]["later_groups"] == {"group1": "whole numbers", "group2": "whole numbers"}
    assert found["group2"]["later_groups"] == {}
    # Behind frozen groups only those that have trained predict.
    found = sees(labelling="triplet", negatives="hard", schedule="sequential")
    assert [list(seen["heads_of_others"]) for seen in found.values()] == [[], ["group0"], ["group0", "group1"]]
    assert all(seen["later_groups"] == {} for seen in found.values())


@pytest.mark.slow
def test_kept_features_stand_for_frozen_groups():
    found = sees(rule="head", schedule="sequential", feature_cache="device")
    assert [(seen["cached_features"], seen["images"]) for seen in found.values()] == [(False, True), (True, False), (True, False)]
    assert all(seen["images_pass"] == [] for seen in found.values())


# ----------------------------------------------------------------------------------------------------------------------------------
# Back-propagation


@pytest.mark.slow
def test_back_propagation_crosses_every_layer():
    found = plain(locality.certify(config_of(**MLP | BP)))
    assert not found["local"]
    assert found["verdict"] == "gradients cross every layer: this is back-propagation"
    crossed = {(v["from_part"], v["to_part"]) for v in found["violations"]}
    layers = [f"group0/layers_{i}" for i in range(3)]
    assert crossed == {(b, a) for i, a in enumerate(layers) for b in [*layers[i + 1 :], "group0/head"]}
    one = next(v for v in found["violations"] if v["from_part"] == "group0/layers_2" and v["to_part"] == "group0/layers_0")
    assert (one["kind"], one["from"], one["to"]) == ("backward", "group0/layers_2/kernel", "group0/layers_0/kernel")
    assert one["max_abs"] == found["numeric"]["layers"]["group0"]["layers_0"] > 0
    assert found["inside"]["group0"] == found["violations"]


UNLABELLED = """
import math

import jax
import jax.numpy as jnp

from vffjax.rules.local import Rule


def parameters(options, shape, classes, key):
    return {"kernel": jax.random.normal(key, (math.prod(shape), 3))}


def loss(seen):
    z = seen.made.clean.reshape(seen.made.clean.shape[0], -1).astype(jnp.float32)
    return jnp.mean((z @ jax.lax.stop_gradient(seen.params["kernel"])) ** 2), {}


RULE = Rule(loss=loss, parameters=parameters)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Allows a module `mine` with the code that it is given."""
    monkeypatch.setattr(outside, "_folders", {})
    monkeypatch.setattr(outside, "_loaded", {})

    def allow(code):
        (tmp_path / "mine.py").write_text(code)
        outside.allow(tmp_path)

    return allow


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["joint", "sequential"])
def test_a_rule_may_do_without_labels_and_project_by_a_fixed_kernel(schedule, own):
    own(UNLABELLED)
    found = locality.certify(config_of(**MLP, rule="mine:RULE", schedule=schedule))
    assert (found["local"], found["violations"]) == (True, [])


@pytest.mark.slow
def test_parameters_of_a_rule_may_be_lists_and_be_missing_in_a_group(own):
    listed = UNLABELLED.replace(
        '{"kernel": jax.random.normal(key, (math.prod(shape), 3))}', '{"two": [jnp.ones(3)] * 2} if shape == (8,) else {}'
    )
    own(listed.replace('seen.params["kernel"]', "jnp.ones((z.shape[1], 3))"))
    found = locality.certify(config_of(**TWO, rule="mine:RULE"))
    assert (found["local"], found["violations"]) == (True, [])


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["predsim", "vff_projected", "mono_forward"])
def test_a_rules_own_kernel_in_a_frozen_group_need_not_learn(rule):
    found = locality.certify(config_of(**TWO, rule=rule, frozen_groups=1, inference="heads"))
    assert (found["local"], found["violations"]) == (True, [])


STILL = """
import flax.linen as nn
import jax
import jax.numpy as jnp

from vffjax.networks.layers import Layer, common
from vffjax.networks.network import Network


class Flat(Layer):
    @nn.compact
    def __call__(self, x, clean, train):
        return x.reshape(x.shape[0], -1)


class Still(Layer):
    @nn.compact
    def __call__(self, x, clean, train):
        w = self.param("w", nn.initializers.he_normal(), (x.shape[1], self.width), jnp.float32)
        return nn.relu(x @ jax.lax.stop_gradient(w))


def layers(config, norm):
    given = common(config, "none")
    return Flat(64, learns=False, **given), *(Still(width, **given) for width in config.widths)


NETWORK = Network(layers, keys=("widths",))
"""


@pytest.mark.slow
@pytest.mark.parametrize("numeric", [False, True])
def test_weights_of_any_name_that_do_not_learn_are_named(numeric, own):
    own(STILL)
    found = locality.certify(config_of(network="mine:NETWORK", widths=(8, 6), grouping="layer", rule="head"), numeric=numeric)
    assert {(v["kind"], v["to"]) for v in found["violations"] if v["program"] != "numbers"} == {
        ("nothing learns", "group0/layers_1/w"),
        ("nothing learns", "group1/layers_0/w"),
    }
    assert locality.text(found).startswith("NOT PROVED: found: nothing learns")


@jax.custom_vjp
def coarse(z):
    return z


def sign_only(_, g):
    return (jnp.where(g > 0, 1e-3, -1e-3),)


coarse.defvjp(lambda z: (z, None), sign_only)


@pytest.mark.slow
def test_back_propagation_of_signs_alone_is_back_propagation(monkeypatch, traces):
    honest = layers._Affine.finish
    monkeypatch.setattr(layers._Affine, "finish", lambda self, *rest, **named: coarse(honest(self, *rest, **named)))
    found = locality.certify(config_of(**MLP | BP), numeric=False)
    assert not found["local"]
    assert found["verdict"] == "gradients cross every layer: this is back-propagation"


@pytest.mark.slow
def test_probing_a_frozen_network_crosses_no_layer_though_a_step_may_be_skipped():
    found = locality.certify(config_of(**MLP | BP, frozen_groups=1, on_nonfinite="skip"), numeric=False)
    assert (found["local"], found["violations"]) == (True, [])


@pytest.mark.slow
def test_crossings_inside_groups_are_told_and_no_leak():
    found = locality.certify(config_of(network="mlp", widths=(8, 8, 6, 6)), numeric=False)
    assert found["local"]
    for name in found["groups"]:
        assert [(v["from"], v["to"]) for v in found["inside"][name]] == [(f"{name}/layers_1/kernel", f"{name}/layers_0/kernel")]


# ----------------------------------------------------------------------------------------------------------------------------------
# Planted leaks


def leaks(numeric=False, **changes):
    """(kind, program, from part, to part) -> the violation."""
    found = plain(locality.certify(config_of(**TWO | changes), numeric))
    assert found["local"] == (not found["violations"])
    return {(v["kind"], v["program"], v["from_part"], v["to_part"]): v for v in found["violations"]}


def leaky_jax(stop_gradient):
    class Namespace:
        def __init__(self, honest, **changed):
            self.__dict__ |= {"honest": honest} | changed

        def __getattr__(self, name):
            return getattr(self.honest, name)

    return Namespace(jax, lax=Namespace(jax.lax, stop_gradient=stop_gradient))


def plant_in_loss(monkeypatch, change):
    """`change(params, group, batch_stats, rows)` are the rows that a group passes on."""
    honest = rules.local_loss

    def planted(params, setting, group, *others):
        loss, (stats, out, metrics) = honest(params, setting, group, *others)
        return loss, (stats, out._replace(rows=change(params, group, stats, out.rows)), metrics)

    monkeypatch.setattr(rules, "local_loss", planted)


def plant_in_step(monkeypatch, change):
    """`change(plan, task, states, batch)` is added to the new parameters of the first group, a tree or a number."""
    honest = trainer.train_step

    def planted(plan, active, task, states, batch):
        (first, *others), metrics = honest(plan, active, task, states, batch)
        added = change(plan, task, states, batch)
        added = jax.tree.map(lambda p: added, first.params) if isinstance(added, jax.Array) else added
        return (first._replace(params=jax.tree.map(jnp.add, first.params, added)), *others), metrics

    monkeypatch.setattr(trainer, "train_step", planted)


@pytest.mark.parametrize("changes", slow_but([{"rule": "ff"}, {"rule": "head"}], {"rule": "head"}), ids=["ff", "head"])
def test_a_removed_stop_gradient_is_found(changes, monkeypatch, traces):
    # That of what a group passes on, a tuple; not that of what its head reads, an array.
    monkeypatch.setattr(rules, "jax", leaky_jax(lambda x: x if isinstance(x, tuple) else jax.lax.stop_gradient(x)))
    found = leaks(**changes)
    assert list(found) == [("forward", "step", "group0", "group1")]
    (leak,) = found.values()
    assert (leak["from"], leak["to"]) == ("group0/layers_0/kernel", "group1/layers_0/kernel")
    # Rule ff's head reads detached features by a stop of its own.
    assert ("group1/head/kernel" in leak["to_leaves"]) == (changes["rule"] == "head")


@pytest.mark.slow
def test_a_removed_stop_gradient_behind_frozen_groups_is_found(monkeypatch, traces):
    monkeypatch.setattr(trainer, "jax", leaky_jax(lambda x: x))
    assert list(leaks(schedule="sequential")) == [("forward", "step", "group0", "group1")]


@pytest.mark.slow
def test_a_removed_stop_gradient_is_found_by_numbers(monkeypatch, traces):
    monkeypatch.setattr(rules, "jax", leaky_jax(lambda x: x))
    found = leaks(numeric=True)
    assert {key[:2] for key in found} == {("forward", "step"), ("forward", "numbers")}
    leak = found["forward", "numbers", "group0", "group1"]
    assert (leak["from"].rpartition("/")[0][:15], leak["to"]) == ("group0/layers_0", "group1/loss")
    assert leak["max_abs"] > 0


@pytest.mark.slow
def test_statistics_that_pass_on_undetached_are_found(monkeypatch, traces):
    """Numbers miss it: the derivative of the statistics is not written. The program says that they are not detached."""
    plant_in_loss(monkeypatch, lambda params, group, stats, rows: rows + stats["layers_0"]["norm"]["mean"].mean())
    (leak,) = leaks().values()
    assert (leak["kind"], leak["program"], leak["from"], leak["to"]) == (
        "forward",
        "step",
        "group0/layers_0/kernel",
        "group1/layers_0/kernel",
    )
    assert set(leak["from_leaves"]) == {"group0/layers_0/kernel", "group0/batch_stats/layers_0/norm/mean"}


@pytest.mark.slow
def test_a_later_groups_statistics_in_an_earlier_update_are_found_though_detached(monkeypatch, traces):
    plant_in_step(
        monkeypatch, lambda plan, task, states, *_: jax.lax.stop_gradient(states[1].batch_stats["layers_0"]["norm"]["var"].mean())
    )
    found = leaks()
    leak = found["backward", "step", "group1", "group0"]
    assert (leak["from"], leak["to"]) == ("group1/batch_stats/layers_0/norm/var", "group0/layers_0/kernel")
    assert leak["from_leaves"] == ["group1/batch_stats/layers_0/norm/var"]
    assert not any(name.startswith(("group0/batch_stats", "group0/opt_state")) for name in leak["to_leaves"])


DRAWN = [{}, {"labelling": "triplet", "negatives": "hard"}, {"rule": "ff", "negatives": "hard"}]


@pytest.mark.slow
@pytest.mark.parametrize("changes", DRAWN, ids=str)
def test_a_later_head_in_whole_numbers_is_found_beside_drawn_labels(changes, monkeypatch, traces):
    def quantised(plan, task, states, *_):
        return jnp.round(states[1].params["head"]["kernel"].sum() * 2**20).astype(jnp.int32).astype(jnp.float32)

    plant_in_step(monkeypatch, quantised)
    leak = leaks(**changes)["backward", "step", "group1", "group0"]
    assert (leak["from"], leak["to"]) == ("group1/head/kernel", "group0/layers_0/kernel")
    assert leak["from_leaves"] == ["group1/head/kernel"]


@pytest.mark.slow
def test_a_later_group_in_an_earlier_groups_statistics_is_found(monkeypatch, traces):
    """Only in the next step would it reach parameters."""
    honest = trainer.train_step

    def planted(plan, active, task, states, batch):
        (first, *others), metrics = honest(plan, active, task, states, batch)
        later = states[1].params["layers_0"]["norm"]["bias"].mean()
        return (first._replace(batch_stats=jax.tree.map(lambda old: old + later, first.batch_stats)), *others), metrics

    monkeypatch.setattr(trainer, "train_step", planted)
    (leak,) = leaks().values()
    assert (leak["kind"], leak["program"]) == ("backward", "step")
    assert (leak["from"], leak["to"]) == ("group1/layers_0/norm/bias", "group0/batch_stats/layers_0/norm/mean")


@pytest.mark.slow
def test_a_leak_outside_the_step_is_found(monkeypatch, traces):
    honest = trainer.run_segment

    def planted(plan, active, task, states, batches):
        (first, second), metrics = honest(plan, active, task, states, batches)
        params = jax.tree.map(lambda p: p + second.params["head"]["bias"].mean(), first.params)
        return (first._replace(params=params), second), metrics

    monkeypatch.setattr(trainer, "run_segment", planted)
    (leak,) = leaks().values()
    assert (leak["kind"], leak["program"], leak["from_part"], leak["to_part"]) == ("backward", "segment", "group1", "group0")
    assert "group1/head/bias" in leak["from_leaves"]


@pytest.mark.slow
def test_logits_that_pass_on_undetached_are_found(monkeypatch, traces):
    plant_in_loss(monkeypatch, lambda params, group, stats, rows: rows + group.logits(params, rows).mean())
    (leak,) = leaks().values()
    assert (leak["kind"], leak["from"], leak["to"]) == ("forward", "group0/head/kernel", "group1/layers_0/kernel")
    assert set(leak["from_leaves"]) == {"group0/head/kernel", "group0/head/bias"}


@pytest.mark.slow
def test_a_joint_step_of_back_propagation_is_found(monkeypatch, traces):
    def down(plan, task, states, batch):
        """Minus the gradient of the last head's loss in the first group."""
        streams, labels = trainer.step_streams(plan, None, task, states, batch), batch.labels

        def loss(params):
            rows = streams.rows
            for group, own, state in zip(plan.groups, (params, states[1].params), states, strict=True):
                rows, _ = group.features(own, state.batch_stats, rows, labels.shape[0], True)
            return -rules.head_cross_entropy(plan.groups[1].logits(states[1].params, rows)[: labels.shape[0]], labels)

        return jax.grad(loss)(states[0].params)

    plant_in_step(monkeypatch, down)
    leak = leaks()["backward", "step", "group1", "group0"]
    assert (leak["from"], leak["to"]) == ("group1/head/kernel", "group0/layers_0/kernel")
    assert {"group1/head/kernel", "group1/layers_0/kernel", "group1/layers_0/norm/scale"} <= set(leak["from_leaves"])


@pytest.mark.slow
def test_a_detachment_whose_backward_rule_does_not_detach_is_found(monkeypatch, traces):
    """No step shows it, since none differentiates there. The losses do, as functions of all parameters, and numbers."""

    @jax.custom_vjp
    def passed_on(x):
        return jax.lax.stop_gradient(x)

    passed_on.defvjp(lambda x: (jax.lax.stop_gradient(x), None), lambda _, g: (g,))
    detach = functools.partial(jax.tree.map, lambda x: passed_on(x) if jnp.issubdtype(x.dtype, jnp.floating) else x)
    monkeypatch.setattr(rules, "jax", leaky_jax(detach))
    found = leaks(numeric=True)
    assert {key[:2] for key in found} == {("forward", "losses"), ("forward", "numbers")}
    leak = found["forward", "losses", "group0", "group1"]
    assert (leak["from"], leak["to"]) == ("group0/layers_0/kernel", "group1/loss")


@pytest.mark.slow
def test_a_backward_rule_that_reads_a_later_head_is_found(monkeypatch, traces):
    @jax.custom_vjp
    def scaled(loss, kernel):
        return loss

    scaled.defvjp(lambda loss, kernel: (loss, kernel), lambda kernel, g: (g * (1 + kernel.mean()), jnp.zeros_like(kernel)))
    honest, honest_loss, smuggled = trainer.train_step, rules.local_loss, []

    def step(plan, active, task, states, batch):
        smuggled.append(states[1].params["head"]["kernel"])
        found = honest(plan, active, task, states, batch)
        smuggled.clear()
        return found

    def loss(params, setting, group, *rest):
        value, others = honest_loss(params, setting, group, *rest)
        return scaled(value, smuggled[0]) if smuggled and group.name == "group0" else value, others

    monkeypatch.setattr(trainer, "train_step", step)
    monkeypatch.setattr(rules, "local_loss", loss)
    (leak,) = leaks().values()
    assert (leak["kind"], leak["program"]) == ("backward", "step")
    assert (leak["from"], leak["to"], leak["from_leaves"]) == ("group1/head/kernel", "group0/layers_0/kernel", ["group1/head/kernel"])


@pytest.mark.slow
def test_copies_that_touch_clean_images_are_found(monkeypatch, traces):
    plant_in_loss(monkeypatch, lambda params, group, stats, rows: rows + 1e-3 * jax.lax.stop_gradient(rows[-1:]))
    found = leaks(numeric=True)
    assert {key[0] for key in found} == {"labelled copies touch clean images"}
    assert all(v["max_abs"] > 0 for v in found.values())


@pytest.mark.slow
def test_a_network_that_does_not_learn_proves_nothing(monkeypatch, traces):
    honest = trainer.train_step
    monkeypatch.setattr(
        trainer, "train_step", lambda plan, active, task, states, batch: (states, honest(plan, active, task, states, batch)[1])
    )
    found = locality.certify(config_of(**TWO), numeric=False)
    assert not found["local"]
    assert {v["kind"] for v in found["violations"]} == {"nothing learns"}
    assert {(v["from"], v["to"]) for v in found["violations"]} >= {
        ("data/images", "group0/layers_0/kernel"),
        ("data/labels", "group1/head/kernel"),
    }


@pytest.mark.slow
def test_a_group_whose_gradient_is_zero_proves_nothing(monkeypatch, traces):
    honest = rules.local_loss
    monkeypatch.setattr(rules, "local_loss", lambda params, *rest: honest(jax.lax.stop_gradient(params), *rest))
    found = locality.certify(config_of(**TWO))
    assert {(v["kind"], v["program"]) for v in found["violations"]} == {
        ("nothing learns", where) for where in ("step", "segment", "numbers")
    }
    kernels = {f"group{i}/{part}/kernel" for i in (0, 1) for part in ("layers_0", "head")}
    assert {v["to"] for v in found["violations"] if v["program"] == "step"} == kernels


# ----------------------------------------------------------------------------------------------------------------------------------
# Text, JSON and the command


SMALL = [CONFIG, "--config.network=mlp", "--config.widths=(8, 6)", "--config.grouping=layer"]


@pytest.mark.slow
def test_the_command_says_in_words_what_it_found(call):
    status, out, err = call("locality", *SMALL)
    assert (status, err) == (0, "")
    assert out.startswith("digits: local: no gradient crosses a border between groups\n")
    for part in (
        "group0, 1 layer, learns from",
        "images through group0",
        "class noise",
        "parameters of later groups: never",
        "bitwise the same",
    ):
        assert part in out, part
    assert max(map(len, out.splitlines())) <= 140


def test_the_command_fails_for_back_propagation_and_writes_json(call, tmp_path):
    path = tmp_path / "found.json"
    status, out, err = call(
        "locality", *SMALL, *(f"--config.{key}={value}" for key, value in BP.items()), "--structure", "--json", "--out", path
    )
    assert (status, err) == (1, "")
    found = json.loads(out)
    assert found == json.loads(path.read_text())
    assert (found["config"], found["local"], found["numeric"]) == ("digits", False, None)
    assert found["configuration"]["grouping"] == "all"
    assert found["violations"][0]["from"] == "group0/layers_1/kernel"


@pytest.mark.slow
def test_the_text_names_the_leaves_of_a_leak(monkeypatch, traces):
    plant_in_step(monkeypatch, lambda plan, task, states, *_: states[1].params["head"]["kernel"].mean())
    found = locality.certify(config_of(**TWO))
    numbers = next(v for v in found["violations"] if v["program"] == "numbers")
    assert (numbers["kind"], numbers["from_part"], numbers["to"]) == ("interference", "group1", "group0/head/bias")
    assert {name.split("/")[1] for name in numbers["to_leaves"]} == {"head", "layers_0"}
    text = locality.text(found)
    assert text.startswith("NOT LOCAL: found: backward, interference\n")
    assert "other parameters in group1: earlier groups' new states CHANGE" in text
    assert "  backward, by the step: group1/head/kernel -> group0/layers_0/kernel and 4 more leaves\n" in text


@pytest.mark.slow
def test_the_text_of_drawn_labels_and_of_what_was_not_tried():
    text = locality.text(locality.certify(config_of(**TWO, labelling="triplet", negatives="hard")))
    assert "predictions of group1's head, as drawn labels" in text
    assert "parameters of later groups: never, but for those drawn labels" in text
    assert "not tried, wrong labels are drawn from the predictions of all heads" in text


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["--config", "missing"]),
        ([CONFIG, "--workdir=w"], ["--workdir=w", "--out"]),
        ([CONFIG, "--config.widths=(0,)"], ["config.widths"]),
        ([CONFIG, "--out=here.txt"], ["--out=here.txt"]),
        ([CONFIG, "--nonsense"], ["nonsense"]),
    ],
)
def test_bad_input_of_the_command(arguments, parts, fails):
    fails("locality", *arguments, parts=parts)


def test_bad_input_is_refused_before_jax_is_there_and_help_needs_none():
    run = "import sys; from vffjax.cli.main import main\ntry: main(['locality', *sys.argv[1:]])\n"
    run += "except SystemExit as e: print('jax' in sys.modules, e.code)"
    assert in_a_process("-c", run, CONFIG, "--workdir=w").stdout == "False 2\n"
    done = in_a_process("-c", run, "--help")
    assert done.stdout.startswith("usage: vffjax locality --config NAME|FILE")
    assert done.stdout.endswith("False 0\n")
