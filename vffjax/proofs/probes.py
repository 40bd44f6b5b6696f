"""Probes of locality by numbers: gradients of every group's loss in every group's parameters, what a change of a later group's parameters
does to earlier groups, and which images of a batch touch a clean image's features. Random inputs, random variables, a small batch.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vffjax.hyperparameters import at_peak
from vffjax.networks.groups import GroupState
from vffjax.rules import local
from vffjax.rules.streams import Streams, Task
from vffjax.training import trainer
from vffjax.training.batch import Batch
from vffjax.training.plan import Plan, init_states, make_plan

IMAGES = 6  # of a probe's batch


def losses(
    plan: Plan, params: Sequence[Any], states: Sequence[GroupState], streams: Streams, batch: Batch
) -> tuple[list[Float[Array, ""]], list[Float[Array, "rows *feature"]]]:
    """Every group's loss and output rows as functions of all groups' `params`: the forward chain that `train_step` runs on the streams
    of its batch, without its per-group differentiation, which would hide a dependence."""
    known = tuple(state._replace(params=own) for state, own in zip(states, params, strict=True))
    found, rows, given = [], [], streams
    for i, (group, state) in enumerate(zip(plan.groups, known, strict=True)):
        if plan.config.schedule == "sequential":
            given = trainer.behind_frozen(plan, i, known, streams)
        setting = plan.setting(i, batch.hyper, batch.key)
        loss, (_, given, _) = local.local_loss(state.params, setting, group, state.batch_stats, given)
        found.append(loss)
        rows.append(given.rows)
    return found, rows


def loss_gradients(
    plan: Plan, params: Sequence[Any], states: Sequence[GroupState], streams: Streams, batch: Batch
) -> tuple[Float[Array, " groups"], list[list[Any]]]:
    """Losses of all groups; [i][j], the gradient of loss `i` in the parameters of group `j`. See `losses`."""
    values, pull = jax.vjp(lambda params: jnp.stack(losses(plan, params, states, streams, batch)[0]), list(params))
    return values, [pull(row)[0] for row in jnp.eye(len(plan.groups), dtype=values.dtype)]


def random_states(plan: Plan, image_shape: tuple[int, int, int]) -> tuple[GroupState, ...]:
    """States as `init_states` shapes them, no variable at its initial value (a zero head hides gradients), optimizers at zero."""
    out = []
    for i, state in enumerate(jax.eval_shape(functools.partial(init_states, plan, image_shape))):
        params, stats = (random_variables(tree, i) for tree in (state.params, state.batch_stats))
        out.append(GroupState(params, stats, jax.tree.map(lambda leaf: jnp.asarray(np.zeros(leaf.shape, leaf.dtype)), state.opt_state)))
    return tuple(out)


def random_variables(shapes: Any, seed: int = 0) -> Any:
    """Variables of a module of given shapes: kernels of usual size, scales and variances positive. From NumPy: nothing is compiled."""
    rng = np.random.default_rng(seed)

    def leaf(path: Any, shape: Any) -> Array:
        name, noise = path[-1].key, rng.normal(size=shape.shape)
        if name == "kernel":
            return jnp.asarray(noise * np.sqrt(2 / np.prod(shape.shape[:-1])), shape.dtype)
        return jnp.asarray(rng.uniform(0.5, 2, shape.shape) if name in ("scale", "var") else 0.2 * noise, shape.dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def probe(plan: Plan, image_shape: tuple[int, int, int]) -> dict[str, Any]:
    """All probes of a plan's configuration, in plain JSON types, its `violations` among them; see `locality.certify`.

    `gradients[i][j]`: the largest absolute value of d loss_i / d params_j; null is NaN or infinity. `layers`: the same of each group's own
    loss by layer. `images`, per group: whether another clean image changes a clean image's features, and by how much, at most, labelled
    copies do. `interference`: for each later group whose parameters were changed, whether earlier groups' new states are bitwise the same.
    """
    classes = plan.classes
    plan = make_plan(dataclasses.replace(plan.config, batch_size=IMAGES), IMAGES, classes)
    rng, names = np.random.default_rng(0), [group.name for group in plan.groups]
    images = jnp.asarray(rng.integers(0, 256, (IMAGES, *image_shape), dtype=np.uint8))
    labels = jnp.asarray(np.arange(IMAGES) % classes, jnp.int32)
    codebook = plan.config.noise_scale * rng.normal(size=(classes, *image_shape))
    pixels = np.full(image_shape[2], 0.5)
    task = Task(*(jnp.asarray(a, jnp.float32) for a in (codebook, pixels, pixels / 2)))
    states, hyper = random_states(plan, image_shape), at_peak(plan.config, len(plan.groups))
    batch = Batch(images, labels, jnp.arange(IMAGES), jnp.int32(0), jax.random.key(1), jax.tree.map(jnp.asarray, hyper))
    plan = plan.program

    streams = quick_jit(functools.partial(trainer.step_streams, plan, None))(task, states, batch)
    params = [state.params for state in states]
    _, gradients = jax.device_get(quick_jit(functools.partial(loss_gradients, plan))(params, states, streams, batch))
    violations: list[dict[str, Any]] = []
    largest = [[_largest(tree) for tree in row] for row in gradients]
    for i, loss in enumerate(names):
        for j, name in enumerate(names):
            violations += _strange(loss, name, gradients[i][j], i - j, plan.groups[j].frozen)

    forward, touching = quick_jit(lambda streams: losses(plan, params, states, streams, batch)[1]), {}
    others, copies = np.array(streams.rows), np.array(streams.rows)
    others[1] = rng.normal(size=others[1].shape)
    copies[IMAGES:] = rng.normal(size=copies[IMAGES:].shape)
    each = [jax.device_get(forward(streams._replace(rows=jnp.asarray(rows)))) for rows in (streams.rows, others, copies)]
    for name, before, by_others, by_copies in zip(names, *each, strict=True):
        by_copies = float(np.abs(by_copies[:IMAGES].astype(np.float32) - before[:IMAGES]).max())
        touching[name] = {"other_images": bool((by_others[0] != before[0]).any()), "labelled_copies": by_copies}
        if by_copies:
            where = {"from": "labelled copies", "to": f"{name}: features of clean images", "max_abs": by_copies}
            violations.append(_violation("labelled copies touch clean images", "", name) | where)
    layers = [{layer: _largest(tree) for layer, tree in row[i].items()} for i, row in enumerate(gradients)]
    found, interfering = _interference(plan, task, states, batch)
    return {
        "images_in_batch": IMAGES,
        "gradients": largest,
        "layers": dict(zip(names, layers, strict=True)),
        "images": touching,
        "interference": found,
        "violations": violations + interfering,
    }


def _interference(plan: Plan, task: Task, states: tuple[GroupState, ...], batch: Batch) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """By the jitted `train_step`; in the sequential schedule that of the last stage behind which a group is left."""
    if plan.rule.predicts(plan.config):
        return {"skipped": "wrong labels are drawn from the predictions of all heads, later ones among them"}, []
    if len(plan.groups) == 1:
        return {"skipped": "there is one group"}, []
    active = None if plan.config.schedule == "joint" else len(plan.groups) - 2
    step = quick_jit(functools.partial(trainer.train_step, plan, active))
    base = step(task, states, batch)[0]
    found: dict[str, Any] = {}
    violations = []
    for j in range(1 if active is None else active + 1, len(states)):
        other = states[j]._replace(params=random_variables(states[j].params, 100 + j))
        new = step(task, (*states[:j], other, *states[j + 1 :]), batch)[0]
        leaves = zip(leaf_names("", new[:j]), jax.tree.leaves(new[:j]), jax.tree.leaves(base[:j]), strict=True)
        touched = [name for name, a, b in leaves if not np.array_equal(a, b, equal_nan=True)]
        found[f"group{j}"] = not touched
        where = {"from": f"group{j}: its parameters", "to_leaves": touched}
        violations += [_violation("interference", f"group{j}", touched[0].split("/")[0]) | where | {"to": touched[0]}] if touched else []
    return found, violations


def _strange(loss: str, group: str, gradient: Any, later: int, frozen: bool) -> list[dict[str, Any]]:
    """What is wrong with the gradient of a group's loss in a group's parameters; `later` by so many groups is that of the loss. The layers
    of a `frozen` group need not learn."""
    out = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        name, most = "/".join([group, *(key.key for key in path)]), _largest(leaf)
        if most is None:
            kind = "not finite"
        elif later and most:
            kind = "forward" if later > 0 else "backward"
        elif not later and not most and name.endswith("kernel") and not (frozen and path[0].key.startswith("layers_")):
            kind = "nothing learns"
        else:
            continue
        out.append(_violation(kind, group, loss) | {"from": name, "to": f"{loss}/loss", "max_abs": most})
    return out


def _violation(kind: str, source: str, target: str) -> dict[str, Any]:
    return {"kind": kind, "program": "numbers", "from_part": source, "to_part": target}


def _largest(tree: Any) -> float | None:
    """The largest absolute value of all leaves; None if one is not finite."""
    most = max(float(np.abs(np.asarray(leaf, np.float64)).max()) if np.isfinite(leaf).all() else math.inf for leaf in jax.tree.leaves(tree))
    return most if math.isfinite(most) else None


def leaf_names(root: str, tree: Any) -> list[str]:
    """Of every leaf, under `root`, such as task/codebook; without one the tree is the states of all groups: group1/layers_0/kernel,
    group1/batch_stats/layers_0/norm/mean, group1/opt_state/..."""

    def name(path: Any) -> str:
        words = [str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", None)))) for key in path]
        words = words if root else [f"group{words[0]}", *words[1:]]
        return "/".join([root] * bool(root) + [word for word in words if word != "params"])

    return [name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def quick_jit(f: Any) -> Any:
    """`jax.jit` for what runs a few times: on CPU it compiles faster, without the optimisations that pay off in a long run."""
    return jax.jit(f, compiler_options={"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None)
