"""The speed board: a race on digits, what it refuses, and what its line says."""

import sys

import jax
import numpy as np
import optax
import pytest

import racers
import runs
import speedrun
from command_lines import ROOT
from keys import PEER
from vffjax.cli.config_file import load_config_file
from vffjax.data import load
from vffjax.errors import UserError
from vffjax.training.checks import make_config
from vffjax.training.plan import make_plan

RACED_BY_BOTH = {"network": "cifarnet", "widths": (8, 8), "grouping": "block", "whitening": 2, "activation": "gelu", "norm_scale": False}


@pytest.fixture
def raced(monkeypatch):
    """`raced(target)` on tiny digits; also the labels of every epoch that ran, with the sum of the parameters it started from.

    A list given as `into` gets "epoch" where one began, and JAX's own events, those of its compiler among them, in their order.
    """
    seen, events = [], []

    class Watched(racers.Epoch):
        def __call__(self, task, states, data, number):
            events.append("epoch")
            seen.append((np.asarray(data.labels), float(sum(np.abs(leaf).sum() for leaf in jax.tree.leaves(states)))))
            return super().__call__(task, states, data, number)

    monkeypatch.setattr(racers, "Epoch", Watched)

    def listen(event, *_, **__):
        events.append(event)

    def run(target, into=None, **changes):
        (result,) = speedrun.races_of(runs.tiny(**changes), None, target)
        if into is not None:
            into += events
        return result, seen

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield run
    jax.monitoring.unregister_event_duration_listener(listen)


def test_the_clock_stops_at_the_first_epoch_that_reaches_the_target(raced):
    result, seen = raced(0.26)
    curve = result["curve"]
    for reading in speedrun.READINGS:
        assert result[f"seconds_to_target{reading}"] == next(p["seconds"] for p in curve if p[f"val_accuracy{reading}"] >= 0.26) > 0
        assert 0.2 < result[f"test_accuracy{reading}"] <= 1
    assert max(result["seconds_to_target"], result["seconds_to_target_last"]) == curve[-1]["seconds"]
    # One warm-up on labels that are not the images', and a fresh start after it.
    (warm_labels, warm_start), (labels, start), *_ = seen
    assert len(seen) == 1 + result["epochs"]
    assert (warm_labels != labels).mean() > 0.8
    assert warm_start == start


class Scripted:
    """A racer whose validation accuracies are written down."""

    name, compile_seconds, facts = "scripted", 0.0, {}

    def __init__(self, *accuracies):
        self.accuracies_of_epochs, self.number = accuracies, None

    def restart(self):
        self.number = None

    def epoch(self, number, labels=None):
        self.number = number
        return True

    def accuracies(self, split):
        return racers.Accuracies(*self.accuracies_of_epochs[self.number])


@pytest.mark.parametrize(
    ("accuracies", "reached"),
    [
        ([(0.5, 0.6), (0.7, 0.9), (0.8, 0.7), (0.9, 0.9)], (3, 2)),  # an accuracy that falls again has reached the target
        ([(0.5, 0.6), (0.8, 0.7), (0.7, 0.7), (0.7, 0.7)], (2, None)),
        ([(0.9, 0.9), (0.0, 0.0), (0.0, 0.0), (0.0, 0.0)], (1, 1)),
    ],
)
def test_each_reading_has_the_first_epoch_that_reaches_the_target(accuracies, reached):
    result = speedrun.race(Scripted(*accuracies), runs.tiny(epochs=4), 0.8, 100, 10)
    seconds = [point["seconds"] for point in result["curve"]]
    assert len(seconds) == result["epochs"] == (4 if None in reached else max(reached))
    expected = [None if epoch is None else seconds[epoch - 1] for epoch in reached]
    assert [result["seconds_to_target"], result["seconds_to_target_last"]] == expected


@pytest.mark.parametrize(
    ("turned", "order"),
    [(False, ["vff", "head", "torch-bp"]), (True, ["torch-bp", "head", "vff"])],
)
def test_a_second_configuration_races_with_its_own_keys(turned, order, monkeypatch):
    ran = []

    def entered(name):
        made = Scripted()
        made.name = name
        return made

    monkeypatch.setattr(speedrun, "Ours", lambda config, _: entered(config.rule))
    monkeypatch.setattr(speedrun, "Torch", lambda config, _, modes: entered("torch-bp"))
    monkeypatch.setattr(speedrun, "race", lambda racer, config, *_: ran.append(racer.name) or (racer.name, config.rule, config.epochs))
    config = runs.tiny(**RACED_BY_BOTH)
    found = speedrun.races_of(config, {"epochs": 7}, 0.8, also={"rule": "head", "epochs": 3}, turned=turned)
    assert ran == order
    assert found == [("vff", "vff", config.epochs), ("head", "head", 3), ("torch-bp", "head", 7)]


def test_the_order_of_racers_turns_from_seed_to_seed_whatever_their_numbers(monkeypatch):
    turned = []

    def races_of(setting, peer, target, modes, also, turn):
        turned.append((setting.seed, turn))
        if len(turned) == 3:
            raise UserError("all seeds have had their turn")
        return []

    monkeypatch.setattr(speedrun, "races_of", races_of)
    monkeypatch.setattr(sys, "argv", ["speedrun.py", "--target", "0.8", "--seeds", "0,2,4"])
    with pytest.raises(SystemExit):
        speedrun.main()
    assert turned == [(0, False), (2, True), (4, False)]


@pytest.mark.slow
def test_nothing_is_compiled_once_the_clock_can_run(raced):
    """Neither the epoch nor the accuracy on validation or test images."""
    jax.clear_caches()  # or an earlier race has compiled it all
    raced(0.0, events := [])
    assert events.count("epoch") == 2  # the warm-up, and the one that reaches the target
    clock = len(events) - events[::-1].index("epoch")
    assert any("compile" in event for event in events[:clock])
    assert [event for event in events[clock:] if "compile" in event] == []


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_race_of_its_seed(raced, capsys):
    with runs.optimizer(lambda *_: optax.chain(optax.add_decayed_weights(1e10), optax.sgd(1e38))):
        result, seen = raced(0.999, rule="head")
        assert (result["seconds_to_target"], result["epochs"], len(seen)) == (None, 1, 2)
        assert "a loss is not finite" in capsys.readouterr().err
        result, _ = raced(0.999, rule="head", on_nonfinite="skip")
    assert result["epochs"] == runs.TINY["epochs"]


@pytest.mark.slow
def test_a_target_out_of_reach_is_said(raced):
    result, _ = raced(0.999)
    assert result["seconds_to_target"] is None
    assert result["epochs"] == runs.TINY["epochs"]
    found = speedrun.summarise([result, result | {"seconds_to_target": 2.0, "test_accuracy": 0.5}])
    assert (found["reached"], found["n"], found["seconds_mean"], found["seconds_sd"]) == (1, 2, 2.0, None)
    assert (found["reached_last"], found["seconds_mean_last"]) == (0, None)
    assert "never (0 of 2 seeds)" in speedrun.line(found, 0.999, "_last")
    assert "2.0 s (1 of 2 seeds)" in speedrun.line(found, 0.999)
    assert "never (0 of 1 seeds)" in speedrun.line(speedrun.summarise([result]), 0.999)


@pytest.mark.slow
def test_pytorch_races_on_the_same_network_and_starts_afresh_after_its_warm_up(monkeypatch):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install -e '.[bench]'")
    monkeypatch.setattr(torch, "compile", lambda function, mode: function)
    config, order = runs.tiny(**RACED_BY_BOTH), []
    sound = speedrun.race
    monkeypatch.setattr(speedrun, "race", lambda racer, *rest: order.append(racer.name) or sound(racer, *rest))
    for seed in (0, 1):
        both = runs.tiny(**RACED_BY_BOTH, seed=seed)
        ours, theirs = speedrun.races_of(both, {"learning_rate": 2e-3}, 0.999, turned=seed == 1)
        assert [ours["racer"], theirs["racer"]] == ["vff", "torch-bp"]
        assert theirs["epochs"] == both.epochs == len(theirs["curve"])
        assert max(point["val_accuracy"] for point in theirs["curve"]) > 0.3
    assert order == ["vff", "torch-bp", "torch-bp", "vff"]
    dataset = load.load(config)
    peer = racers.Torch(speedrun.back_propagation(config, {}), dataset)
    start = [p.detach().clone() for p in peer._peer.network[0].parameters()]
    accuracy = peer.accuracies("validation")
    peer.epoch(0)
    assert any((p != q).any() for p, q in zip(peer._peer.network[0].parameters(), start, strict=True))
    peer.restart()
    assert all((p == q).all() for p, q in zip(peer._peer.network[0].parameters(), start, strict=True))
    assert peer.accuracies("validation") == accuracy
    with torch.no_grad():
        peer._peer.network[0].head.weight.zero_()
    assert peer.accuracies("test") == pytest.approx((np.mean(dataset.test.labels == 0),) * 2)  # equal scores: the first class


OF_OTHER_GROUPS = {"auxiliary": (4,), "noise_cell": 2, "noise_kind": "signs", "noise_redrawn": "epoch", "temperature_end": 1.0}


@pytest.mark.parametrize("key", OF_OTHER_GROUPS)
def test_keys_without_use_for_back_propagation_are_the_peers_too_and_no_other_contenders(key):
    changes = {"labelling": "triplet", "contrast_gradient": "both", key: OF_OTHER_GROUPS[key]}
    config = runs.tiny(**RACED_BY_BOTH | changes)
    assert getattr(speedrun.back_propagation(config, {}), key) == OF_OTHER_GROUPS[key]
    with pytest.raises(UserError, match=rf"config\.{key}="):
        PEER.check(config)


def test_the_board_itself_can_be_raced_by_both():
    config = make_config(load_config_file(str(ROOT / "configs" / "cifar10_speed.py"))[0])
    assert speedrun.back_propagation(config, {}).grouping == "all"


def test_what_the_peer_would_not_obey_is_refused():
    config = runs.tiny(**RACED_BY_BOTH)
    with pytest.raises(UserError, match=r"config\.look_ahead=3: "):
        speedrun.back_propagation(config, {"look_ahead": 3})
    with pytest.raises(UserError, match=r"config\.trivial_augment=True: "):
        speedrun.back_propagation(config, {"trivial_augment": True})
    with pytest.raises(UserError, match="--peer learning_rate: not KEY=VALUE"):
        speedrun.pairs("--peer", ["learning_rate"])
    assert set(speedrun.SHARED) <= set(config.to_dict())
    assert speedrun.pairs("--peer", ["learning_rate=5e-3", "optimizer=sgd"]) == {"learning_rate": 5e-3, "optimizer": "sgd"}


@pytest.mark.parametrize(
    "changes",
    [
        {"grouping": "all"},
        {"schedule": "sequential"},
        {"val_fraction": 0.0},
        {"inference": "sweep"},
        {"views": "six"},
        {"votes": "weighted"},
        {"views": "six"},
        {"votes": "weighted"},
    ],
    ids=str,
)
def test_what_the_board_does_not_admit(changes):
    with pytest.raises(UserError, match=f"config.{next(iter(changes))}="):
        speedrun.check_rules(make_plan(runs.tiny(**changes), 100, 10))


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--target", "80"], "--target=80"),
        (["--target", "0.8", "--seeds", "a"], "--seeds=a"),
        (["--target", "0.8", "--torch-modes", "default"], "--torch-modes=default: PyTorch does not race; add --peer"),
        (["--target", "0.8", "--peer", "--torch-modes", "fast"], "--torch-modes=fast: not known; choose from default, reduce-overhead"),
        (["--target", "0.8", "--out", "no/x"], "--out=no/x"),
        (["--target", "0.8", "--also", "supcon"], "--also supcon: not KEY=VALUE"),
        (["--target", "0.8", "--also", "votes=weighted"], "config.votes='weighted'"),
        (["--target", "0.8", "--also", "rule=head", "seed=3"], "--also seed=3: all racers have the same seed and images; give --seeds"),
        (["--target", "0.8", "--peer", "val_fraction=0.2"], "--peer val_fraction=0.2: all racers have the same"),
    ],
)
def test_bad_flags_end_with_status_2_and_one_line(arguments, part, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["speedrun.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        speedrun.main()
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert error.count("\n") == 1
    assert part in error
