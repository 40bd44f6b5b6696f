"""Early exit: an image leaves at the first group that is sure enough, and the groups behind it never see it.

Where images may leave, an ensemble of the groups so far classifies them: the mean of its log-probabilities, renormalised. An image leaves
where its largest probability reaches the threshold. The last voting group takes all that are left; what is behind it is not computed.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, UInt8

from vffjax.errors import UserError, chosen
from vffjax.networks.groups import GroupState
from vffjax.ops.batching import map_batches
from vffjax.rules.streams import Task
from vffjax.training.augment import normalised
from vffjax.training.plan import Images, Plan
from vffjax.training.scores import choose_voting, ensemble, error_percent
from vffjax.training.trainer import clean_log_p

# A group computes whole batches of the images that are left, `eval_batch_size` divided by this: in each chunk half a batch is lost ...
_PARTS = 8
# ... and a chunk is so many batches. Its maps wait for each other, which is memory. Both were measured on 2 CPU cores.
_BATCHES = 16

# Thresholds to choose from; the last lets nobody leave early, so one of them at least is as good as the full ensemble.
GRID = (*(i / 100 for i in range(1, 100)), 0.995, 0.999, 0.9995, 0.9999, 1.0)
CURVE = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999, 1.0)
REPETITIONS = 5

# Of each group up to the last that votes: the groups that classify the images that leave there; none, if none may.
Votes = tuple[tuple[int, ...], ...]


class Wanted(NamedTuple):
    """What is asked of an early exit."""

    threshold: float | None = None  # None: chosen on validation images
    exits: str = "voting"  # or all: the groups where images may leave
    curve: bool = False  # whether many thresholds are measured


DEFAULT = Wanted()


def slack(threshold: float) -> np.float32:
    """How much probability all other classes may have where an image leaves. Near 0, where float32 is finer than near 1."""
    return np.float32(1 - threshold)


def votes_of(voting: tuple[int, ...], exits: str = "voting", seen: np.ndarray | None = None, labels: Any = None) -> Votes:
    """Exits at the `voting` groups alone, each with the voters so far; or at `all` groups, each with the set of the groups so far that
    errs least on validation scores `seen`, which need not be nested. At the last both are the full ensemble."""
    if chosen("exits", exits, {"voting": True, "all": False}):
        return tuple(tuple(v for v in voting if v <= g) if g in voting else () for g in range(max(voting) + 1))
    early = range(max(voting))
    return (*(tuple(range(g + 1)) if seen is None else choose_voting(seen[: g + 1], labels) for g in early), voting)


def batch_size(plan: Plan) -> int:
    """Images that a group computes at a time."""
    return -(-plan.config.eval_batch_size // _PARTS)


def make_early_exit(plan: Plan, votes: Votes) -> jax.stages.Wrapped:
    """Jitted `(task, states, byte images [n, h, w, c], slack)` to log-probabilities [n, classes] and the group where each image left [n].

    Shapes are static and nothing waits for the host: over chunks of images, each group takes those that are left, sorted to the front,
    in a loop of as many batches as they fill. The slack is an argument, so that one program serves all thresholds.
    """

    @jax.jit
    def by_chunks(task: Task, states: tuple[GroupState, ...], images: Array, slack: Array) -> tuple[Array, Array]:
        n = images.shape[0]
        batch = min(batch_size(plan), n)
        chunk = batch * min(_BATCHES, -(-n // batch))
        padded = jnp.pad(images, ((0, -n % chunk), *((0, 0),) * (images.ndim - 1))).reshape(-1, chunk, *images.shape[1:])
        real = jnp.minimum(n - chunk * jnp.arange(len(padded)), chunk)
        one = functools.partial(_chunk, plan, votes, batch, task, states, slack)
        log_p, left = jax.lax.map(lambda pair: one(*pair), (padded, real))
        return log_p.reshape(-1, task.classes)[:n], left.reshape(-1)[:n]

    return by_chunks


def _chunk(
    plan: Plan,
    votes: Votes,
    batch: int,
    task: Task,
    states: tuple[GroupState, ...],
    slack: Float[Array, ""],
    images: UInt8[Array, "chunk h w c"],
    real: Int[Array, ""],
) -> tuple[Float[Array, "chunk classes"], Int[Array, " chunk"]]:
    """The first `real` images of a chunk are some; the others cost nothing, but in a batch that is begun."""
    last, places = len(votes) - 1, jnp.arange(len(images))
    out, left = jnp.zeros((len(images), task.classes), jnp.float32), jnp.full(len(images), last)
    # Of each place, in the order of the moment: whether its image is still there, which image it is, its map, what the heads said of it.
    staying, image = places < real, places
    maps: Any = images
    said: dict[int, Any] = {}
    for g in range(last + 1):
        order = None
        if any(votes[:g]):  # before, nobody can have left
            order = jnp.argsort(~staying, stable=True)
            staying, image, out, left, said = jax.tree.map(lambda a, order=order: a[order], (staying, image, out, left, said))
        maps, said[g] = _over_those_left(plan, votes, g, batch, task, states[g], maps, order, staying.sum())
        if votes[g]:
            log_p = jax.nn.log_softmax(sum(said[v] for v in votes[g]) / len(votes[g]))
            leaving = staying & (doubt(log_p) <= slack) & (slack > 0) if g < last else staying
            out, left = jnp.where(leaving[:, None], log_p, out), jnp.where(leaving, g, left)
            staying &= ~leaving
    return jnp.zeros_like(out).at[image].set(out), jnp.zeros_like(left).at[image].set(left)


def _over_those_left(
    plan: Plan, votes: Votes, g: int, batch: int, task: Task, state: GroupState, maps: Array, order: Array | None, count: Array
) -> tuple[Array | None, Array | None]:
    """Of group `g`, the maps, if there is a next, and log-probabilities, if it votes, of the first `count` places in this order.

    They lie in the new order: to write a batch where it stands is cheaper than to scatter its maps.
    """

    def compute(x: Array) -> tuple[Array | None, Array | None]:
        x = x if g else plan.rule.shown(task, normalised(task, x))
        z, log_p = _group(plan, votes, g, state, x)
        return (z if g + 1 < len(votes) else None), log_p

    def step(number: Array, done: Any) -> Any:
        at = number * batch
        x = jax.lax.dynamic_slice_in_dim(maps, at, batch) if order is None else maps[jax.lax.dynamic_slice_in_dim(order, at, batch)]
        return jax.tree.map(lambda whole, part: jax.lax.dynamic_update_slice_in_dim(whole, part, at, 0), done, compute(x))

    shapes = jax.eval_shape(compute, jax.ShapeDtypeStruct((batch, *maps.shape[1:]), maps.dtype))
    nothing = jax.tree.map(lambda s: jnp.zeros((len(maps), *s.shape[1:]), s.dtype), shapes)
    return jax.lax.fori_loop(0, -(-count // batch), step, nothing)


def _group(plan: Plan, votes: Votes, g: int, state: GroupState, x: Array) -> tuple[Array, Array | None]:
    """Maps of group `g`, and what its head says, if that counts anywhere."""
    z, _ = plan.groups[g].features(state.params, state.batch_stats, x, x.shape[0], False)
    counts = any(g in voters for voters in votes)
    return z, jax.nn.log_softmax(plan.groups[g].logits(state.params, z)) if counts else None


def doubt(log_p: Float[Array, "n classes"]) -> Float[Array, " n"]:
    """1 minus the largest probability, as the sum of the others: nothing is lost to rounding where it is small."""
    others = jnp.arange(log_p.shape[1])[None] != log_p.argmax(-1, keepdims=True)
    return jnp.sum(jnp.exp(log_p) * others.astype(log_p.dtype), -1)


def make_full(plan: Plan, voting: tuple[int, ...], batch: int) -> jax.stages.Wrapped:
    """Jitted `(task, states, byte images)` to the full ensemble's log-probabilities: what an early exit is measured against.

    It computes neither groups behind the last voting one nor heads that do not vote, and nothing but this one result.
    """

    def of_batch(task: Task, states: tuple[GroupState, ...], images: Array) -> Array:
        log_p = clean_log_p(plan, task, states, normalised(task, images), max(voting) + 1)
        return jax.nn.log_softmax(log_p[jnp.array(voting)].mean(axis=0))

    return jax.jit(lambda task, states, images: map_batches(functools.partial(of_batch, task, states), images, batch))


def flops(plan: Plan, task: Task, states: tuple[GroupState, ...], votes: Votes) -> list[float]:
    """Of each group up to the last that votes, its floating-point operations for one image, with its head if that counts.

    By XLA's count for the layers as they are defined, which is the same for every device: the program for a CPU has loops, of which XLA
    counts one turn.
    """
    x, out = jax.ShapeDtypeStruct((1, *task.codebook.shape[1:]), jnp.float32), []
    for g in range(len(votes)):
        group = jax.jit(functools.partial(_group, plan, votes, g)).trace(states[g], x)
        counted = (group.lower(lowering_platforms=("tpu",)).cost_analysis() or {}).get("flops")
        out.append(float(group.lower().compile().cost_analysis()["flops"] if counted is None else counted))
        x = group.out_info[0]
    return out


class Simulation(NamedTuple):
    """Early exits by scores of all groups, in NumPy: what a threshold does to images whose full pass is known."""

    log_p: Float[np.ndarray, "groups n classes"]  # of those who classify where an image leaves
    doubt: Float[np.ndarray, "groups n"]  # infinite where nobody may leave, minus infinity where all must

    def leave(self, threshold: float) -> tuple[Float[np.ndarray, "n classes"], Int[np.ndarray, " n"]]:
        """As the program of `make_early_exit`."""
        limit = slack(threshold)
        left = (self.doubt <= (limit if limit > 0 else -np.inf)).argmax(axis=0)
        return self.log_p[left, np.arange(len(left))], left


def simulate(scores: Float[np.ndarray, "groups n classes"], votes: Votes) -> Simulation:
    """From the log-probabilities of every head."""
    log_p = np.zeros((len(votes), *scores.shape[1:]))
    for g, voters in enumerate(votes):
        if voters:
            log_p[g] = ensemble(scores, voters)
            log_p[g] -= np.logaddexp.reduce(log_p[g], axis=-1, keepdims=True)
    others = np.arange(scores.shape[2]) != log_p.argmax(-1, keepdims=True)
    doubts = np.sum(np.exp(log_p) * others, axis=-1)
    doubts[[not voters for voters in votes]] = np.inf
    doubts[-1] = -np.inf
    return Simulation(log_p, doubts)


@dataclasses.dataclass(frozen=True)
class EarlyExit:
    """Early exits of a trained run, chosen on validation and measured on test images."""

    plan: Plan
    task: Task
    states: tuple[GroupState, ...]
    votes: Votes
    seen: Float[np.ndarray, "groups n classes"] | None  # scores of the validation images, if there are any
    labels: Int[ArrayLike, " n"]  # theirs

    @functools.cached_property
    def costs(self) -> Float[np.ndarray, " groups"]:
        """Of leaving at each group, in units of the full ensemble's pass."""
        full = flops(self.plan, self.task, self.states, (*((),) * (len(self.votes) - 1), self.votes[-1]))
        return np.cumsum(flops(self.plan, self.task, self.states, self.votes)) / sum(full)

    @functools.cached_property
    def simulation(self) -> Simulation | None:
        return None if self.seen is None else simulate(self.seen, self.votes)

    def choose(self, threshold: float | None) -> dict[str, Any]:
        """The threshold, if none is given the one of `GRID` that costs least with no more errors than the full ensemble on validation
        images, among equals the one with fewer errors, then the higher; and what it does to these images."""
        chosen = "given"
        if threshold is None:
            if self.seen is None or self.simulation is None:
                raise UserError("--threshold: missing, and config.val_fraction=0.0 left no images to choose it on; give --threshold=0.9")
            most, tried = error_percent(ensemble(self.seen, self.votes[-1]), self.labels), []
            for t in GRID:
                log_p, left = self.simulation.leave(t)
                tried.append((self.costs[left].mean(), error_percent(log_p, self.labels), -t))
            threshold, chosen = -min(point for point in tried if point[1] <= most)[2], "chosen on validation images"
        return {"threshold": threshold, "chosen": chosen, "costs_per_group": self.costs.tolist()} | self._validated(threshold)

    def _validated(self, threshold: float) -> dict[str, Any]:
        return {} if self.simulation is None else self._outcome("val", *self.simulation.leave(threshold), self.labels)

    def _outcome(self, split: str, log_p: np.ndarray, left: np.ndarray, labels: Any) -> dict[str, Any]:
        return {
            f"{split}_error": error_percent(log_p, labels),
            f"{split}_leaving_per_group": (np.bincount(left, minlength=len(self.votes)) / len(left)).tolist(),
            f"{split}_relative_flops": float(self.costs[left].mean()),
        }

    def measure(self, test: Images, threshold: float, curve: bool = False) -> dict[str, Any]:
        """What the threshold does to test images, and images per second beside the full ensemble's; with `curve`, of many thresholds.

        Compiled before, then in turns; medians. The full ensemble's is the faster of two sizes of a batch.
        """
        thresholds = sorted({*CURVE, threshold}) if curve else [threshold]
        program, given = make_early_exit(self.plan, self.votes), (self.task, self.states, test.images)
        sizes = {batch_size(self.plan), self.plan.config.eval_batch_size}
        calls = [functools.partial(make_full(self.plan, self.votes[-1], size), *given) for size in sorted(sizes)]
        calls += [functools.partial(program, *given, slack(t)) for t in thresholds]
        results, seconds = in_turns(calls, REPETITIONS)
        fastest = min(seconds[: len(sizes)], key=np.median)
        points = []
        for t, (log_p, left), own in zip(thresholds, results[len(sizes) :], seconds[len(sizes) :], strict=True):
            speed = {"images_per_second": len(test.labels) / float(np.median(own)), "speedup": float(np.median(fastest / own))}
            outcome = self._outcome("test", np.asarray(log_p), np.asarray(left), test.labels)
            points.append({"threshold": t} | self._validated(t) | outcome | speed)
        full = {"ensemble_images_per_second": len(test.labels) / float(np.median(fastest))}
        return points[thresholds.index(threshold)] | full | ({"curve": points} if curve else {})


def in_turns(calls: Sequence[Callable[[], Any]], repetitions: int) -> tuple[list[Any], Float[np.ndarray, "calls repetitions"]]:
    """What each call returns, and its seconds; every repetition makes each call once, so that what else the machine does meets all."""
    results = [jax.block_until_ready(call()) for call in calls]  # compiled here
    seconds = np.zeros((len(calls), repetitions))
    for r in range(repetitions):
        for i, call in enumerate(calls):
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds[i, r] = time.perf_counter() - start
    return results, seconds


def text(found: dict[str, Any]) -> str:
    """What `evaluate` found of early exit, to be read under the errors, which are early exit's own."""
    leaving, last = found["test_leaving_per_group"], len(found["test_leaving_per_group"]) - 1
    errors = {split: found[f"ensemble_{split}_error"] for split in ("val", "test")}
    lines = [
        f"threshold {found['threshold']:g}, {found['chosen']}",
        "leaving    " + "  ".join(f"group{g} {100 * share:.1f} %" for g, share in enumerate(leaving)) + "  of the test images",
        "full pass  " + ", ".join(f"{split} error {error:.2f} %" for split, error in errors.items() if error is not None),
        f"{found['test_relative_flops']:.3f} of the full pass's FLOPs; {found['images_per_second']:,.0f} images/s, "
        f"full pass {found['ensemble_images_per_second']:,.0f}: {found['speedup']:.2f} x",
    ]
    if last and found["exits"] == "voting" and found["voting"] == [last]:
        lines.append(f"group{last} alone votes, so none may leave before it; --exits=all lets them")
    return "\n".join(lines)
