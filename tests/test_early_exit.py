"""Early exit: on the device as in NumPy as in a slow loop; that it saves the work it claims, the choice of the threshold, the command."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oracles import CONV, MLP, config_of, slow_but, small_run
from runs import copy_of, finished, tiny, train
from vffjax.data import load as data
from vffjax.runs import plots
from vffjax.runs.trained import Trained
from vffjax.runs.workdir import load_run
from vffjax.training import scores as inference
from vffjax.training.scores import choose_voting, ensemble, error_percent, make_scores
from vffjax.uses import early_exit, evaluation
from vffjax.uses.early_exit import GRID, EarlyExit, make_early_exit, make_full, simulate, slack, votes_of

CASES = {"conv4": CONV, "mlp": MLP, "ff": MLP | {"rule": "ff"}}


def slow_exits(scores, votes, threshold):
    """Prediction and exit of every image, one after the other, from the definition."""
    found = []
    for n in range(scores.shape[1]):
        for group, voters in enumerate(votes):
            if not voters:
                continue
            mean = sum(np.float64(scores[v, n]) for v in voters) / len(voters)
            p = np.exp(mean) / np.exp(mean).sum()
            if p.max() >= threshold or group == len(votes) - 1:
                found.append((int(p.argmax()), group))
                break
    return np.array(found).T


def random_scores(groups=3, n=40, classes=4, seed=0):
    logits = np.random.default_rng(seed).normal(scale=2, size=(groups, n, classes)).astype(np.float32)
    return np.asarray(jax.nn.log_softmax(logits))


def telling(scores, votes):
    """Thresholds that split the images at many places, each far from every confidence, where rounding could decide."""
    sure = 1 - np.unique(simulate(scores, votes).doubt[:-1][[bool(voters) for voters in votes[:-1]]])
    middles = [(a + b) / 2 for a, b in zip(np.sort(sure)[:-1], np.sort(sure)[1:], strict=True) if b - a > 1e-4]
    return middles[:: max(1, len(middles) // 6)]


def run_of(name="mlp", **changes):
    return small_run(config_of(**CASES[name], batch_size=37, **changes))


def scores_of(run):
    return np.asarray(make_scores(run.plan, "heads")(run.task, run.states, run.data.images))


def trained_of(run):
    return Trained(run.plan, run.states, run.task, {"trained_groups": len(run.plan.groups)})


def on_device(run, votes, threshold, images=None):
    images = run.data.images if images is None else images
    return [np.asarray(a) for a in make_early_exit(run.plan, votes)(run.task, run.states, images, slack(threshold))]


# ----------------------------------------------------------------------------------------------------------------------------------
# What leaves where


def test_exits_are_at_the_voters_with_the_voters_so_far():
    assert votes_of((0, 2)) == ((0,), (), (0, 2))
    assert votes_of((1,)) == ((), (1,))
    assert votes_of((0,)) == ((0,),)


def test_exits_at_all_groups_have_the_voters_that_validation_chooses():
    scores, labels = random_scores(), np.arange(40) % 4
    votes = votes_of((2,), "all", scores, labels)
    assert votes == ((0,), choose_voting(scores[:2], labels), (2,))
    assert votes_of((0, 1, 2), "all") == ((0,), (0, 1), (0, 1, 2))  # nothing to choose on


VOTES = [((0,), (0, 1), (0, 1, 2)), ((), (1,), (1, 2)), ((0,), (), (0, 2)), ((0,), (0,), (2,)), ((), (), (2,)), ((0,),)]


@pytest.mark.parametrize("votes", VOTES, ids=str)
def test_the_simulation_equals_a_slow_loop(votes):
    scores = random_scores()
    for threshold in (0.01, 0.4, 0.6, 0.8, 0.95, 1.0):
        log_p, left = simulate(scores, votes).leave(threshold)
        np.testing.assert_array_equal([log_p.argmax(-1), left], slow_exits(scores, votes, threshold))
        np.testing.assert_allclose(np.exp(log_p).sum(-1), 1, rtol=1e-6)


# Batches are an eighth: 37 images in one chunk of 63, in batches of 2 with a chunk that is short, of 1, and in one chunk that is full.
SIZES = [("mlp", 500), ("mlp", 16), ("mlp", 3), ("ff", 16), ("conv4", 16), ("conv4", 8 * 37)]


@pytest.mark.parametrize(("name", "size"), slow_but(SIZES, ("mlp", 16), several=True))
def test_the_device_lets_the_same_images_leave_as_the_simulation(name, size):
    run = run_of(name, eval_batch_size=size)
    scores, exits = scores_of(run), len(run.plan.groups)
    for votes in VOTES[:3] if exits == 3 else (((0,), (0, 1)), ((0,), (1,))):
        program, seen = make_early_exit(run.plan, votes), set()
        for threshold in telling(scores, votes):
            log_p, left = map(np.asarray, program(run.task, run.states, run.data.images, slack(threshold)))
            expected, where = simulate(scores, votes).leave(threshold)
            np.testing.assert_array_equal(left, where)
            np.testing.assert_array_equal(log_p.argmax(-1), expected.argmax(-1))
            np.testing.assert_allclose(log_p, expected, rtol=1e-4, atol=1e-5)
            seen |= {tuple(np.bincount(left, minlength=len(votes)))}
        assert len(seen) > 2  # the thresholds do differ


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 31, 33])
def test_any_number_of_images_in_any_place_is_classified_alike(n):
    run = run_of(eval_batch_size=16)
    votes, order = VOTES[0], np.random.default_rng(n).permutation(37)[:n]
    threshold = telling(scores_of(run), votes)[2]
    whole, some = on_device(run, votes, threshold), on_device(run, votes, threshold, run.data.images[order])
    np.testing.assert_array_equal(some[1], whole[1][order])
    np.testing.assert_allclose(some[0], whole[0][order], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sharpness", [1, 1e4])
def test_at_threshold_one_all_go_to_the_end_however_sure(sharpness):
    """With the heads sharpened, float32 rounds probabilities to 1, and their complements to 0."""
    run = run_of()
    heads = [state.params | {"head": jax.tree.map(lambda a: a * sharpness, state.params["head"])} for state in run.states]
    run = run._replace(states=tuple(state._replace(params=head) for state, head in zip(run.states, heads, strict=True)))
    log_p, left = on_device(run, VOTES[0], 1.0)
    scores = scores_of(run)
    full = jax.nn.log_softmax(ensemble(scores, (0, 1, 2)))
    assert (float(jnp.exp(full).max()) == 1) == (sharpness > 1)
    assert set(left) == set(simulate(scores, VOTES[0]).leave(1.0)[1]) == {2}
    np.testing.assert_allclose(log_p, full, rtol=1e-4, atol=1e-5 * sharpness)
    np.testing.assert_allclose(make_full(run.plan, (0, 1, 2), 5)(run.task, run.states, run.data.images), full, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("votes", "first"), [(VOTES[0], 0), (VOTES[1], 1)])
def test_at_a_tiny_threshold_all_leave_at_the_first_voter(votes, first):
    run = run_of()
    log_p, left = on_device(run, votes, 1e-6)
    assert set(left) == {first}
    np.testing.assert_allclose(log_p, scores_of(run)[first], rtol=1e-4, atol=1e-5)


def test_thresholds_near_one_are_told_apart():
    # In float32, 1 - 1e-9 is 1.
    scores = np.log(np.array([[[1 - 1e-8, 1e-8]], [[0.5, 0.5]]]))
    assert [int(simulate(scores, ((0,), (0, 1))).leave(t)[1][0]) for t in (1 - 1e-7, 1 - 1e-9)] == [0, 1]


# ----------------------------------------------------------------------------------------------------------------------------------
# The work


@pytest.mark.slow
@pytest.mark.parametrize("size", [16, 40])
def test_no_more_batches_are_computed_than_those_left_fill(size, monkeypatch):
    """Counted as they run, in every group and chunk; rows that pad a chunk fill none."""
    run, computed, plain = run_of(eval_batch_size=size), [], early_exit._group

    def counting(plan, votes, g, state, x):
        jax.debug.callback(lambda _: computed.append(g), x[0, 0])
        return plain(plan, votes, g, state, x)

    votes = VOTES[0]
    threshold = telling(scores_of(run), votes)[3]
    monkeypatch.setattr(early_exit, "_group", counting)
    _, left = on_device(run, votes, threshold)
    jax.effects_barrier()
    batch, expected = size // 8, []
    for start in range(0, 37, 16 * batch):
        there = left[start : start + 16 * batch]
        expected += [-(-int((there >= g).sum()) // batch) for g in range(3)]
    assert [computed.count(g) for g in range(3)] == list(np.reshape(expected, (-1, 3)).sum(0))
    assert computed.count(0) > computed.count(1) > computed.count(2) > 0


@pytest.mark.slow
def test_groups_behind_the_last_voter_are_not_computed(monkeypatch):
    run, traced, plain = run_of(), set(), early_exit._group
    monkeypatch.setattr(early_exit, "_group", lambda plan, votes, g, *rest: traced.add(g) or plain(plan, votes, g, *rest))
    on_device(run, votes_of((0, 1)), 0.5)
    assert traced == {0, 1}


def test_one_program_serves_all_thresholds():
    run = run_of()
    program = make_early_exit(run.plan, VOTES[0])
    for threshold in (0.1, 0.5, 0.99, 1.0):
        program(run.task, run.states, run.data.images, slack(threshold))
    assert program._cache_size() == 1


@pytest.mark.parametrize("name", ["mlp", "conv4"])
def test_the_program_lowers_for_accelerators_without_one(name):
    run = run_of(name)
    traced = make_early_exit(run.plan, votes_of((0, 1))).trace(run.task, run.states, run.data.images, slack(0.5))
    for platform in ("tpu", "cuda"):
        assert "while" in traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.slow
def test_flops_are_those_of_the_layers_as_defined():
    """Two 3x3 convolutions by 16 channels at 8x8 and 4x4, where a CPU would take Winograd's; a tap beyond the border costs nothing."""
    run = small_run(config_of(network="conv4", widths=(16, 16, 16, 16), pools=(2, 1, 2, 1), grouping="layer", eval_batch_size=7))
    first, second, *_ = early_exit.flops(trained_of(run), votes_of((3,)))
    assert first == pytest.approx(2 * (3 * 8 - 2) ** 2 * 2 * 16, rel=0.2)  # and normalisation, pooling
    assert second == pytest.approx(2 * (3 * 4 - 2) ** 2 * 16 * 16, rel=0.05)
    with_head = early_exit.flops(trained_of(run), votes_of((0, 3)))
    assert with_head[0] - first == pytest.approx(2 * 4 * 4 * 16 * 3, rel=0.3)
    assert with_head[1] == second  # its head does not count


def test_costs_are_shares_of_the_pass_that_computes_voting_heads_alone():
    run, nothing = run_of(), np.zeros(0, np.int32)
    one, all_ = (EarlyExit(trained_of(run), votes, None, nothing).costs for votes in (((), (1,)), ((0,), (1,))))
    assert one[-1] == 1.0
    assert 0 < one[0] < all_[0] < 1 < all_[1]


# ----------------------------------------------------------------------------------------------------------------------------------
# The choice


def exits_of(seed, labels, votes=VOTES[0], scores=None):
    run = run_of()
    return EarlyExit(trained_of(run), votes, random_scores(seed=seed) if scores is None else scores, labels)


@pytest.mark.parametrize("seed", range(4))
def test_the_choice_is_the_cheapest_that_errs_no_more(seed):
    labels = random_scores(seed=seed).sum(0).argmax(-1)
    labels[::3] = np.arange(len(labels))[::3] % 4
    exits = exits_of(seed, labels)
    found = exits.choose(None)
    allowed = []
    for threshold in GRID:
        predicted, left = slow_exits(exits.seen, exits.votes, threshold)
        if np.mean(predicted != labels) <= np.mean(exits.seen.mean(0).argmax(-1) != labels):
            allowed.append(exits.costs[left].mean())
    assert found["val_relative_flops"] == pytest.approx(min(allowed))
    assert found["val_error"] <= error_percent(ensemble(exits.seen, (0, 1, 2)), labels)
    assert (found["chosen"], sum(found["val_leaving_per_group"])) == ("chosen on validation images", pytest.approx(1))
    assert exits.choose(0.77)["threshold"] == 0.77


def test_of_thresholds_that_do_the_same_the_highest_is_chosen():
    scores = np.log(np.array([[[0.9, 0.1]] * 4, [[0.6, 0.4]] * 4, [[0.6, 0.4]] * 4]))
    assert exits_of(0, np.zeros(4, np.int32), scores=scores).choose(None)["threshold"] == 0.9
    # Where nobody gains, all stay.
    assert exits_of(0, np.zeros(4, np.int32), votes=((), (), (2,)), scores=scores).choose(None)["threshold"] == 1.0


# ----------------------------------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture(autouse=True)
def _timed_once(monkeypatch):
    monkeypatch.setattr(early_exit, "REPETITIONS", 1)


@pytest.fixture
def both_vote(monkeypatch):
    """In the tiny run one group may be best alone."""
    finished()  # which other files share, and which is trained without this
    monkeypatch.setattr(inference, "choose_voting", lambda scores, labels: tuple(range(len(scores))))


def evaluate(call, workdir, *options):
    status, out, err = call("evaluate", f"--workdir={workdir}", "--inference=early_exit", *options)
    assert (status, err) == (0, "")
    return out


@pytest.mark.slow
def test_evaluate_reports_what_the_scores_imply(call, both_vote):
    found = json.loads(evaluate(call, finished(), "--threshold=0.3", "--exits=all", "--json"))
    plain = json.loads(call("evaluate", f"--workdir={finished()}", "--json")[1])
    plan, states, task, _ = load_run(finished())
    dataset = data.load(plan.config)
    score = lambda split: np.asarray(make_scores(plan, "heads")(task, states, jnp.asarray(split.images)))  # noqa: E731
    seen, unseen = score(dataset.validation), score(dataset.test)
    votes = votes_of(tuple(plain["voting"]), "all", seen, dataset.validation.labels)
    for split, scores, labels in (("val", seen, dataset.validation.labels), ("test", unseen, dataset.test.labels)):
        predicted, left = slow_exits(scores, votes, 0.3)
        assert found[f"{split}_error"] == pytest.approx(100 * np.mean(predicted != labels))
        assert found[f"{split}_leaving_per_group"] == pytest.approx(np.bincount(left, minlength=len(votes)) / len(left))
        assert found[f"{split}_relative_flops"] == pytest.approx(np.mean(np.array(found["costs_per_group"])[left]))
        assert found[f"ensemble_{split}_error"] == plain[f"{split}_error"]
        assert found[f"{split}_error_per_group"] == plain[f"{split}_error_per_group"]
    assert 0 < found["test_leaving_per_group"][0] < 1
    assert (found["threshold"], found["chosen"], found["inference"], found["exits"]) == (0.3, "given", "early_exit", "all")
    assert found["speedup"] == pytest.approx(found["images_per_second"] / found["ensemble_images_per_second"])


@pytest.mark.slow
def test_evaluate_says_the_same_in_words(call, both_vote):
    out = evaluate(call, finished(), "--exits=all")
    assert "inference early_exit, views one, voting groups" in out
    for part in ("val  error", "test error", "chosen on validation images", "of the test images", "full pass", "FLOPs", "images/s"):
        assert part in out


@pytest.mark.slow
def test_the_choice_sees_no_test_image(monkeypatch, both_vote):
    def with_other_test_images(config):
        found = load(config)
        return dataclasses.replace(found, test=data.Split(255 - found.test.images, found.test.labels[::-1]))

    load, wanted = data.load, early_exit.Wanted(exits="all")
    before = evaluation.evaluate(finished(), "early_exit", test=False, early=wanted)
    monkeypatch.setattr(data, "load", with_other_test_images)
    after = evaluation.evaluate(finished(), "early_exit", test=False, early=wanted, other_data=True)
    assert before == after | {"own_data": True}
    assert not after["own_data"]
    assert before["chosen"] == "chosen on validation images"
    assert before["val_error"] <= before["ensemble_val_error"]


@pytest.mark.slow
def test_the_curve_is_written_and_drawn(call, tmp_path, both_vote):
    path = tmp_path / "exits.json"
    told = json.loads(evaluate(call, finished(), "--threshold=0.83", "--exits=all", f"--curve={path}", "--json"))
    found = json.loads(path.read_text())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["exits.json", "exits.png"]
    points = found.pop("curve")
    assert found == told
    assert [point["threshold"] for point in points] == sorted({*early_exit.CURVE, 0.83})
    chosen = next(point for point in points if point["threshold"] == 0.83)
    assert chosen.items() <= found.items()
    assert points[-1]["test_error"] == found["ensemble_test_error"]
    costs = [point["test_relative_flops"] for point in points]
    assert costs == sorted(costs) and costs[0] < costs[-1]
    axes = plots.exits_figure(found | {"curve": points}).axes[0]
    test = next(line for line in axes.lines if line.get_label() == "test images, by threshold")
    np.testing.assert_allclose(test.get_ydata(), [100 - point["test_error"] for point in points])
    np.testing.assert_allclose(test.get_xdata(), [point["images_per_second"] for point in points])
    stars = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines if line.get_marker() == "*"]
    assert stars == [(found["images_per_second"], 100 - found[f"{split}_error"]) for split in ("val", "test")]


@pytest.mark.slow
def test_a_run_without_validation_images_wants_a_threshold(call, fails, tmp_path):
    train(tiny(val_fraction=0.0, epochs=1), tmp_path / "run")
    arguments = ("evaluate", f"--workdir={tmp_path / 'run'}", "--inference=early_exit")
    fails(*arguments, parts=["--threshold: missing", "config.val_fraction=0.0", "give --threshold=0.9"])
    found = json.loads(evaluate(call, tmp_path / "run", "--threshold=0.5", f"--curve={tmp_path / 'c.json'}", "--json"))
    assert (found["val_error"], found["ensemble_val_error"], found["voting"]) == (None, None, [0, 1])
    assert "val_leaving_per_group" not in found
    assert "threshold 0.5, given" in evaluate(call, tmp_path / "run", "--threshold=0.5")


@pytest.mark.slow
def test_a_group_that_has_not_trained_is_not_asked(call, tmp_path):
    """Sequential, after the first group's stage; a single group then, for which there is no earlier exit."""
    train(tiny(schedule="sequential", epochs=1), tmp_path / "run")
    found = json.loads(evaluate(call, tmp_path / "run", "--epoch=1", "--json"))
    assert (found["voting"], found["test_leaving_per_group"], found["costs_per_group"]) == ([0], [1.0], [1.0])
    assert (found["threshold"], found["test_error"]) == (1.0, found["ensemble_test_error"])
    assert "--exits=all" not in evaluate(call, tmp_path / "run", "--epoch=1")


@pytest.mark.slow
def test_a_run_whose_last_group_alone_votes_says_how_to_gain(call, monkeypatch, tmp_path):
    workdir = copy_of(finished(), tmp_path)
    monkeypatch.setattr(inference, "choose_voting", lambda scores, labels: (len(scores) - 1,))
    out = evaluate(call, workdir)
    assert "group1 alone votes, so none may leave before it; --exits=all lets them" in out
    assert "leaving    group0 0.0 %  group1 100.0 %" in out
    assert "alone votes" not in evaluate(call, workdir, "--exits=all")
