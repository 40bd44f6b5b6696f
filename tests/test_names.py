"""A name that code does not know is an error where it is used: nothing takes it for another."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import contenders
import keys
import rates
from oracles import config_of
from vffjax import config as config_module
from vffjax import data as sources
from vffjax import networks, rules
from vffjax.costs import memory, targets
from vffjax.errors import UserError
from vffjax.hyperparameters import at_peak
from vffjax.networks import layers
from vffjax.rules import ff, similarity, vff
from vffjax.rules.streams import Step, Task
from vffjax.training import scores as inference
from vffjax.training.optimizers import make_optimizer
from vffjax.training.plan import Plan, groups_of, make_plan, make_task
from vffjax.uses import early_exit

SOUND = config_of()


def other(**changes):
    """A configuration with a name that a later version might know; `make_config` would refuse it."""
    return dataclasses.replace(SOUND, **changes)


def plan_of(config):
    return Plan(config, vff.RULE, (), 1)


IMAGES = jnp.zeros((2, 8, 8, 1))
TASK = Task(jnp.zeros((10, 8, 8, 1)), jnp.zeros(1), jnp.ones(1))
USES = {
    "optimizer": lambda c: make_optimizer(c, at_peak(c, 1).of(0)),
    "schedule": lambda c: plan_of(c).active(0),
    "schedule of stages": lambda c: plan_of(c).stages,
    "pixel_statistics": lambda c: make_task(c, 10, (8, 8, 1), (0.5,), (0.5,)),
    "network": networks.find,
    "dataset": sources.find,
    "grouping": lambda c: groups_of(c, 10),
    "precision": lambda c: layers.common(c, "batch"),
    "norm_statistics": lambda c: layers.common(c, "batch"),
    "rule": rules.find,
    "rule of a plan": lambda c: make_plan(c, 12, 10),
    "rule of memory": memory.least_bytes,
    "labelling": lambda c: vff.streams(Step(c, None, None, None, IMAGES, jnp.zeros(2, int))),
    "labelling of memory": memory.least_bytes,
    "labelling of floating-point operations": lambda c: rates.training_flops(c, (8, 8, 1), 10),
    "negatives": lambda c: vff.RULE.predicts(c),
    "negatives of goodness": lambda c: ff.RULE.predicts(c),
    "contrast": vff.in_batch,
    "similarity": lambda c: similarity.embed(IMAGES, c.similarity),
    "similarity of what is pooled": lambda c: vff.RULE.cells(c),
    "inference": lambda c: inference.make_scores(plan_of(c), c.inference)(TASK, (), IMAGES.astype(jnp.uint8)),
    "optimizer of memory": memory.least_bytes,
}


@pytest.mark.parametrize("use", USES)
def test_an_unknown_name_is_an_error_that_names_the_key(use):
    key = use.split()[0]
    with pytest.raises(UserError, match=rf"config\.{key}='brand_new': not known( here)?; choose one of "):
        USES[use](other(**{key: "brand_new"}))


def test_an_unknown_normalisation_is_no_batch_normalisation():
    norm = layers.Norm("brand_new")
    with pytest.raises(UserError, match=r"config\.norm='brand_new': not known here"):
        norm.init(jax.random.key(0), jnp.zeros((2, 3)), 2, True)


def test_names_that_are_no_keys():
    with pytest.raises(UserError, match="exits='brand_new'"):
        early_exit.votes_of((0, 1), "brand_new")
    with pytest.raises(UserError, match="--target=brand_new: not known"):
        targets.find("brand_new")
    with pytest.raises(UserError, match="contender='brand_new'"):
        contenders.variant(SOUND, "brand_new")
    with pytest.raises(UserError, match="precision='brand_new'"):
        rates.jax_products(4, "brand_new")


def test_pytorchs_peers_train_what_they_are_asked_for_or_nothing():
    pytest.importorskip("torch", exc_type=ImportError)
    import torch_peers

    known = other(rule="vff", labelling="triplet", contrast="triplet")
    keys.PEER.check(known)
    keys.PEER.check(other(rule="head", grouping="all"))
    for changes in ({"rule": "ff"}, {"labelling": "shared"}, {"contrast": "in_batch"}, {"negatives": "hard"}, {"norm": "layer"}):
        with pytest.raises(UserError, match=f"config.{next(iter(changes))}="):
            keys.PEER.check(dataclasses.replace(known, **changes))
    with pytest.raises(UserError, match=r"config\.grouping="):
        keys.PEER.check(other(rule="head"))
    with pytest.raises(UserError, match=r"config\.similarity='brand_new'"):
        torch_peers.embed(torch_peers.torch.zeros(2, 3), "brand_new")


def test_every_name_that_the_configuration_knows_is_known_where_it_is_used():
    # The other half: a table that lacks a name would refuse what is documented.
    tried = 0
    for key in ("similarity", "schedule", "precision", "optimizer"):
        for value in config_module.FIELDS[key].metadata["choices"]:
            for use in (use for use in USES if use.split()[0] == key):
                USES[use](other(**{key: value}))
                tried += 1
    assert tried >= 4 + 3 + 2 + 3  # one use of each name at least
