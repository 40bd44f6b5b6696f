"""Early exit: an image leaves at the first group that is sure enough of its class, and later groups do not compute it.

Wherever images may leave, an ensemble of the groups so far classifies them by the mean of their log-probabilities, renormalised. An image
leaves if the largest of these probabilities reaches the threshold. The last voting group classifies all images that are left; the groups
after it are not computed.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from vffjax.errors import UserError, chosen
from vffjax.networks.groups import GroupState, States
from vffjax.ops.batching import map_batches
from vffjax.rules.streams import Task
from vffjax.runs.trained import Trained
from vffjax.training import augment, trainer
from vffjax.training.plan import Images, Plan
from vffjax.training.scores import choose_voting, ensemble, error_percent

# A group computes `eval_batch_size` images divided by this at a time: in each chunk half a batch is wasted on average.
_PARTS = 8
# A chunk is so many batches. Its feature maps are kept between groups, which takes memory. Both were measured on 2 CPU cores.
_BATCHES = 16

# The thresholds to choose from. At the last of them no image leaves early, so at least one is as good as the full ensemble.
GRID = (*(i / 100 for i in range(1, 100)), 0.995, 0.999, 0.9995, 0.9999, 1.0)
CURVE = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999, 1.0)
REPETITIONS = 5

# For each group up to the last that votes, the groups that classify the images which leave there; empty where no image may leave.
Votes = tuple[tuple[int, ...], ...]


class Wanted(NamedTuple):
    """What is asked of an early exit."""

    threshold: float | None = None  # None: chosen on validation images
    exits: str = "voting"  # the groups where images may leave: those that vote, or all
    curve: bool = False  # whether many thresholds are measured


DEFAULT = Wanted()


def votes_of(voting: tuple[int, ...], exits: str = "voting", seen: np.ndarray | None = None, labels: Any = None) -> Votes:
    """Where images may leave, and which groups classify them there. At the last exit it is always the full ensemble.

    Args:
        voting: the groups of the full ensemble.
        exits: `voting`: images leave at these groups alone, and are classified by those of them so far. `all`: they may leave at every
            group, and are classified by the set of groups so far that errs least on validation images; these sets need not be nested.
        seen: scores [groups, n, classes] of the validation images, for `all`. Without them, all groups so far classify.
        labels: the labels [n] of the validation images.
    """
    if chosen("exits", exits, {"voting": True, "all": False}):
        return tuple(tuple(v for v in voting if v <= g) if g in voting else () for g in range(max(voting) + 1))
    early = range(max(voting))
    return (*(tuple(range(g + 1)) if seen is None else choose_voting(seen[: g + 1], labels) for g in early), voting)


def slack(threshold: float) -> np.float32:
    """The largest probability that all other classes together may have for an image to leave.

    Programs take it in place of the threshold, because float32 is finer near 0 than near 1.
    """
    return np.float32(1 - threshold)


def batch_size(plan: Plan) -> int:
    """How many images a group computes at a time."""
    return -(-plan.config.eval_batch_size // _PARTS)


def make_early_exit(plan: Plan, votes: Votes) -> jax.stages.Wrapped:
    """A jitted function of `(task, states, images, slack)` that classifies byte images [n, h, w, c], each by no more groups than it needs.

    All shapes are static, and nothing waits for the host. In each chunk of images, a group computes those that are left, which are sorted
    to the front, in a loop over the batches that they fill. The slack is an argument, so that one program serves all thresholds.

    The function returns log-probabilities [n, classes], and the number of the group at which each image left [n].
    """
    last = len(votes) - 1

    @jax.jit
    def by_chunks(task: Task, states: States, images: Array, slack: Array) -> tuple[Array, Array]:
        n = images.shape[0]
        batch = min(batch_size(plan), n)
        chunk = batch * min(_BATCHES, -(-n // batch))
        places = jnp.arange(chunk)

        def compute(g: int, x: Array) -> tuple[Array | None, Array | None]:
            x = x if g else plan.rule.shown(task, augment.normalised(task, x))
            z, log_p = _group(plan, votes, g, states[g], x)
            return (z if g < last else None), log_p

        def over_those_left(g: int, maps: Array, order: Array | None, count: Array) -> tuple[Array | None, Array | None]:
            """Maps and log-probabilities of group `g` for the first `count` places in a new order. They are written in that order, which is
            cheaper than to scatter a batch to the places that its images had before."""

            def step(number: Array, done: Any) -> Any:
                at = number * batch
                x = jax.lax.dynamic_slice_in_dim(maps, at, batch) if order is None else maps[jax.lax.dynamic_slice_in_dim(order, at, batch)]
                write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=at, axis=0)
                return jax.tree.map(write, done, compute(g, x))

            shapes = jax.eval_shape(functools.partial(compute, g), jax.ShapeDtypeStruct((batch, *maps.shape[1:]), maps.dtype))
            nothing = jax.tree.map(lambda s: jnp.zeros((chunk, *s.shape[1:]), s.dtype), shapes)
            return jax.lax.fori_loop(0, -(-count // batch), step, nothing)

        def one_chunk(rows_and_count: tuple[Array, Array]) -> tuple[Array, Array]:
            """A chunk of which only the first rows are images. Padding is computed only where it shares a batch with an image."""
            maps: Any
            maps, real = rows_and_count
            out, left = jnp.zeros((chunk, task.classes), jnp.float32), jnp.full(chunk, last)
            # For each place in the current order: whether its image is still there, which image it is, and what the heads said of it.
            staying, image = places < real, places
            said: dict[int, Any] = {}
            for g in range(last + 1):
                order = None
                if any(votes[:g]):  # before the first exit no image can have left
                    order = jnp.argsort(~staying, stable=True)
                    staying, image, out, left, said = jax.tree.map(lambda a, order=order: a[order], (staying, image, out, left, said))
                maps, said[g] = over_those_left(g, maps, order, staying.sum())
                if votes[g]:
                    log_p = jax.nn.log_softmax(sum(said[v] for v in votes[g]) / len(votes[g]))
                    leaving = staying & (doubt(log_p) <= slack) & (slack > 0) if g < last else staying
                    out, left = jnp.where(leaving[:, None], log_p, out), jnp.where(leaving, g, left)
                    staying &= ~leaving
            return jnp.zeros_like(out).at[image].set(out), jnp.zeros_like(left).at[image].set(left)

        padded = jnp.pad(images, ((0, -n % chunk), *((0, 0),) * (images.ndim - 1))).reshape(-1, chunk, *images.shape[1:])
        real = jnp.minimum(n - chunk * jnp.arange(len(padded)), chunk)
        log_p, left = jax.lax.map(one_chunk, (padded, real))
        return log_p.reshape(-1, task.classes)[:n], left.reshape(-1)[:n]

    return by_chunks


def _group(plan: Plan, votes: Votes, g: int, state: GroupState, x: Array) -> tuple[Array, Array | None]:
    """Group `g` on prepared images, or on maps: its own maps, and the log-probabilities of its head if that votes anywhere."""
    z, _ = plan.groups[g].features(state.params, state.batch_stats, x, x.shape[0], False)
    counts = any(g in voters for voters in votes)
    return z, jax.nn.log_softmax(plan.groups[g].logits(state.params, z)) if counts else None


def doubt(log_p: Float[Array, "n classes"]) -> Float[Array, " n"]:
    """1 minus the largest probability, computed as the sum of the others, so that a small difference is not lost to rounding."""
    others = jnp.arange(log_p.shape[1])[None] != log_p.argmax(-1, keepdims=True)
    return jnp.sum(jnp.exp(log_p) * others.astype(log_p.dtype), -1)


def make_full(plan: Plan, voting: tuple[int, ...], batch: int) -> jax.stages.Wrapped:
    """A jitted function of `(task, states, images)`: the full ensemble's log-probabilities, with which an early exit is compared.

    `batch` images are computed at a time.
    """

    def of_batch(task: Task, states: States, images: Array) -> Array:
        log_p = trainer.clean_log_p(plan, task, states, augment.normalised(task, images), max(voting) + 1)
        return jax.nn.log_softmax(log_p[jnp.array(voting)].mean(axis=0))

    return jax.jit(lambda task, states, images: map_batches(functools.partial(of_batch, task, states), images, batch))


def flops(trained: Trained, votes: Votes) -> list[float]:
    """The floating-point operations of each group up to the last that votes, for one image, with its head if that votes.

    XLA counts them for the layers as they are defined, which is the same for every device. It could not count the program for a CPU, which
    contains loops, of which XLA counts one turn.
    """
    x, out = jax.ShapeDtypeStruct((1, *trained.task.codebook.shape[1:]), jnp.float32), []
    for g in range(len(votes)):
        group = jax.jit(functools.partial(_group, trained.plan, votes, g)).trace(trained.states[g], x)
        counted = (group.lower(lowering_platforms=("tpu",)).cost_analysis() or {}).get("flops")
        out.append(float(group.lower().compile().cost_analysis()["flops"] if counted is None else counted))
        x = group.out_info[0]
    return out


class Simulation(NamedTuple):
    """What the program of `make_early_exit` does, at any threshold, to images whose scores by all groups are known; in NumPy."""

    log_p: Float[np.ndarray, "groups n classes"]  # of the ensemble that classifies the images which leave at each group
    doubt: Float[np.ndarray, "groups n"]  # infinite where no image may leave, minus infinity where all must

    def leave(self, threshold: float) -> tuple[Float[np.ndarray, "n classes"], Int[np.ndarray, " n"]]:
        """Log-probabilities, and the group at which each image leaves, as that program returns them."""
        limit = slack(threshold)
        left = (self.doubt <= (limit if limit > 0 else -np.inf)).argmax(axis=0)
        return self.log_p[left, np.arange(len(left))], left


def simulate(scores: Float[np.ndarray, "groups n classes"], votes: Votes) -> Simulation:
    """A simulation from the log-probabilities of every head."""
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
    """Early exits of a trained run: chosen on validation images and measured on test images."""

    trained: Trained
    votes: Votes
    seen: Float[np.ndarray, "groups n classes"] | None  # scores of the validation images; None if there are no such images
    labels: Int[ArrayLike, " n"]  # their labels

    @functools.cached_property
    def costs(self) -> Float[np.ndarray, " groups"]:
        """The operations of an image that leaves at each group, as a share of those of the full ensemble's pass."""
        full = flops(self.trained, (*((),) * (len(self.votes) - 1), self.votes[-1]))
        return np.cumsum(flops(self.trained, self.votes)) / sum(full)

    @functools.cached_property
    def simulation(self) -> Simulation | None:
        return None if self.seen is None else simulate(self.seen, self.votes)

    def choose(self, threshold: float | None) -> dict[str, Any]:
        """The threshold that is used, and what it does to the validation images.

        If none is given, it is that of `GRID` which costs least while it makes no more errors on validation images than the full ensemble;
        among equals the one with fewer errors, then the highest. Raises `UserError` if none is given and there are no such images.
        """
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
        """What a threshold does to test images, and its images per second beside those of the full ensemble.

        With `curve`, the same for many thresholds. All are compiled first, and then timed in turns; the times are medians. The full
        ensemble's time is that of the faster of two batch sizes.
        """
        plan, given = self.trained.plan, (self.trained.task, self.trained.states, jnp.asarray(test.images))
        thresholds = sorted({*CURVE, threshold}) if curve else [threshold]
        sizes, program = sorted({batch_size(plan), plan.config.eval_batch_size}), make_early_exit(plan, self.votes)
        calls = [functools.partial(make_full(plan, self.votes[-1], size), *given) for size in sizes]
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
    """What each call returns, and the seconds that it takes, for each repetition.

    Every repetition makes each call once, so that other work on the machine slows all of them alike.
    """
    results = [jax.block_until_ready(call()) for call in calls]  # the first call compiles
    seconds = np.zeros((len(calls), repetitions))
    for r in range(repetitions):
        for i, call in enumerate(calls):
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds[i, r] = time.perf_counter() - start
    return results, seconds


def text(found: dict[str, Any]) -> str:
    """What `evaluate` found about early exit, in words, to be printed below the errors."""
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
