"""Numerical probes of locality, which confirm the proof on random images, random variables and a small batch.

Three things are measured: the gradient of every group's loss with respect to every group's parameters; whether other parameters in a later
group change the update of an earlier one; and which images of a batch influence the features of a clean image.
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
from vffjax.networks.groups import GroupState, States
from vffjax.networks.layers import FIXED
from vffjax.rules import local
from vffjax.rules.streams import Streams, Task
from vffjax.training import trainer
from vffjax.training.batch import Batch
from vffjax.training.plan import Plan, init_states, make_plan

IMAGES = 6  # in the batch of a probe
_KEPT = IMAGES // 2  # the images whose features are compared, where the other ones are replaced


def losses(
    plan: Plan, params: Sequence[Any], states: Sequence[GroupState], streams: Streams, batch: Batch
) -> tuple[list[Float[Array, ""]], list[Float[Array, "rows *feature"]]]:
    """Computes the loss of every group as a function of the parameters of all groups.

    This is the forward chain of `train_step` without its differentiation group by group, so that every derivative can still be taken.

    Args:
        plan: the plan of a run.
        params: the parameters of each group, in the place of those in `states`.
        states: the state of each group.
        streams: what the step on `batch` gives to the first group.
        batch: the batch, for its hyper-parameters and its key.

    Returns:
        The loss of each group, and the rows of features that each group passes on.
    """
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
    """Computes the gradient of every loss with respect to the parameters of every group.

    The arguments are those of `losses`.

    Returns:
        The losses; and as element [i][j] the gradient of the loss of group `i` with respect to the parameters of group `j`.
    """
    values, pull = jax.vjp(lambda params: jnp.stack(losses(plan, params, states, streams, batch)[0]), list(params))
    return values, [pull(row)[0] for row in jnp.eye(len(plan.groups), dtype=values.dtype)]


def random_states(plan: Plan, image_shape: tuple[int, int, int]) -> States:
    """States with the shapes of `init_states`, random variables, and optimizers at zero.

    No variable has its initial value, because a head that is zero hides gradients.
    """
    out = []
    for i, state in enumerate(jax.eval_shape(functools.partial(init_states, plan, image_shape))):
        params, stats = (random_variables(tree, i) for tree in (state.params, state.batch_stats))
        out.append(GroupState(params, stats, jax.tree.map(lambda leaf: jnp.asarray(np.zeros(leaf.shape, leaf.dtype)), state.opt_state)))
    return tuple(out)


def random_variables(shapes: Any, seed: int = 0) -> Any:
    """Random variables for a tree of shapes: kernels with He's standard deviation, scales and variances from 0.5 to 2, other leaves near 0.

    They are drawn by NumPy, so that nothing is compiled.
    """
    rng = np.random.default_rng(seed)

    def leaf(path: Any, shape: Any) -> Array:
        name, noise = _words(path)[-1], rng.normal(size=shape.shape)
        if name == "kernel":
            return jnp.asarray(noise * np.sqrt(2 / np.prod(shape.shape[:-1])), shape.dtype)
        return jnp.asarray(rng.uniform(0.5, 2, shape.shape) if name in ("scale", "var") else 0.2 * noise, shape.dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def probe(plan: Plan, image_shape: tuple[int, int, int]) -> dict[str, Any]:
    """Runs all probes of a plan's configuration.

    Args:
        plan: the plan of a run.
        image_shape: height, width and channels of an image.

    Returns:
        In plain JSON types:
            images_in_batch: the size of the probes' batch.
            gradients: [i][j] is the largest absolute value in d loss_i / d params_j; null stands for NaN or infinity.
            layers: for each group the largest absolute gradient of its own loss, by layer.
            images: for each group, whether another clean image changes the features of a clean image (`other_images`), and the largest
                change that other labelled copies make (`labelled_copies`).
            interference: for each later group, whether earlier groups' new states stay bitwise the same with other parameters in it.
            violations: what of this contradicts locality; see `locality.certify`.
    """
    plan, task, states, batch = _setting(plan, image_shape)
    names = [group.name for group in plan.groups]
    streams = quick_jit(functools.partial(trainer.step_streams, plan, None))(task, states, batch)
    params = [state.params for state in states]
    _, gradients = jax.device_get(quick_jit(functools.partial(loss_gradients, plan))(params, states, streams, batch))
    violations: list[dict[str, Any]] = []
    for i, loss in enumerate(names):
        for j, name in enumerate(names):
            violations += _strange(loss, name, gradients[i][j], i - j, plan.groups[j].frozen)
    images, by_copies = _touching(plan, params, states, streams, batch)
    interference, by_later = _interference(plan, task, states, batch)
    return {
        "images_in_batch": IMAGES,
        "gradients": [[_largest(tree) for tree in row] for row in gradients],
        "layers": {name: {layer: _largest(tree) for layer, tree in gradients[i][i].items()} for i, name in enumerate(names)},
        "images": images,
        "interference": interference,
        "violations": violations + by_copies + by_later,
    }


def _setting(plan: Plan, image_shape: tuple[int, int, int]) -> tuple[Plan, Task, States, Batch]:
    """The plan for a small batch, and a random task, random states and a batch of random images for it."""
    classes = plan.classes
    plan = make_plan(dataclasses.replace(plan.config, batch_size=IMAGES), IMAGES, classes)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.integers(0, 256, (IMAGES, *image_shape), dtype=np.uint8))
    # Two images of each label, because a contrast among images of one class teaches nothing where every class has one.
    labels = jnp.asarray(np.arange(IMAGES) // 2 % classes, jnp.int32)
    codebook = plan.config.noise_scale * rng.normal(size=(classes, *image_shape))
    pixels = np.full(image_shape[2], 0.5)
    task = Task(*(jnp.asarray(a, jnp.float32) for a in (codebook, pixels, pixels / 2)))
    hyper = jax.tree.map(jnp.asarray, at_peak(plan.config, len(plan.groups)))
    batch = Batch(images, labels, jnp.arange(IMAGES), jnp.int32(0), jax.random.key(1), hyper)
    return plan.program, task, random_states(plan, image_shape), batch


def _touching(
    plan: Plan, params: Sequence[Any], states: Sequence[GroupState], streams: Streams, batch: Batch
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Which rows of a batch influence the features of clean images, by group, and a violation where labelled copies do."""
    forward = quick_jit(lambda streams: losses(plan, params, states, streams, batch)[1])
    rng = np.random.default_rng(1)
    others, copies = np.array(streams.rows), np.array(streams.rows)
    others[_KEPT:IMAGES] = rng.normal(size=others[_KEPT:IMAGES].shape)
    copies[IMAGES:] = rng.normal(size=copies[IMAGES:].shape)
    each = [jax.device_get(forward(streams._replace(rows=jnp.asarray(rows)))) for rows in (streams.rows, others, copies)]
    found, violations = {}, []
    for group, before, by_others, by_copies in zip(plan.groups, *each, strict=True):
        change = float(np.abs(by_copies[:IMAGES].astype(np.float32) - before[:IMAGES]).max())
        found[group.name] = {"other_images": bool((by_others[:_KEPT] != before[:_KEPT]).any()), "labelled_copies": change}
        if change:
            where = {"from": "labelled copies", "to": f"{group.name}: features of clean images", "max_abs": change}
            violations.append(_violation("labelled copies touch clean images", "", group.name) | where)
    return found, violations


def _interference(plan: Plan, task: Task, states: States, batch: Batch) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Whether other parameters in a later group change an earlier group's update, and the violations where they do.

    The jitted `train_step` is run. In the sequential schedule it is that of the last stage behind which there is still a group.
    """
    if plan.rule.predicts(plan.config):
        return {"skipped": "wrong labels are drawn from the predictions of all heads, later ones among them"}, []
    if len(plan.groups) == 1:
        return {"skipped": "there is one group"}, []
    active = None if plan.active(0) is None else len(plan.groups) - 2
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
    """What is wrong with the gradient of one group's loss with respect to one group's parameters.

    Args:
        loss: the name of the group that has the loss.
        group: the name of the group that has the parameters.
        gradient: the gradient.
        later: by how many groups the loss lies behind the parameters: 0 in the same group, below 0 before them.
        frozen: whether the layers of `group` are frozen, and so need not learn.

    Of a rule's own parameters nothing is asked: they may be fixed, or its loss may have weight 0.
    """
    out = []
    for name, leaf in zip(leaf_names(group, gradient), jax.tree.leaves(gradient), strict=True):
        most = _largest(leaf)
        if most is None:
            kind = "not finite"
        elif later and most:
            kind = "forward" if later > 0 else "backward"
        elif not later and not most and _is_kernel(name, leaf) and "/rule/" not in name and ("/head/" in name or not frozen):
            kind = "nothing learns"
        else:
            continue
        out.append(_violation(kind, group, loss) | {"from": name, "to": f"{loss}/loss", "max_abs": most})
    return out


def _violation(kind: str, source: str, target: str) -> dict[str, Any]:
    return {"kind": kind, "program": "numbers", "from_part": source, "to_part": target}


def _largest(tree: Any) -> float | None:
    """The largest absolute value in all leaves, or None if any value is not finite."""
    each = (float(np.abs(np.asarray(leaf, np.float64)).max()) if np.isfinite(leaf).all() else math.inf for leaf in jax.tree.leaves(tree))
    most = max(each, default=0.0)  # a rule may have no parameters in some groups
    return most if math.isfinite(most) else None


def kernels(states: States) -> list[str]:
    """The names of the parameters of all groups that are to learn, or the locality of their training would mean nothing.

    These are the arrays of two dimensions or more, but for those that are fixed by their name.
    """
    found = []
    for i, state in enumerate(states):
        named = zip(leaf_names(f"group{i}", state.params), jax.tree.leaves(state.params), strict=True)
        found += [name for name, leaf in named if _is_kernel(name, leaf)]
    return found


def _is_kernel(name: str, leaf: Any) -> bool:
    return leaf.ndim > 1 and name.rpartition("/")[2] != FIXED


def leaf_names(root: str, tree: Any) -> list[str]:
    """Names the leaves of a tree, in the order in which JAX flattens it.

    Args:
        root: the name of the tree, such as `task`. If it is empty, the tree is the states of all groups.
        tree: any pytree.

    Returns:
        Names such as task/codebook; of states group1/layers_0/kernel, group1/batch_stats/layers_0/norm/mean or group1/opt_state/0/count.
    """

    def name(path: Any) -> str:
        words = _words(path)
        words = words if root else [f"group{words[0]}", *words[1:]]
        return "/".join([root] * bool(root) + [word for word in words if word != "params"])

    return [name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def _words(path: Any) -> list[str]:
    """The steps of a path into a tree: names of fields, keys of dictionaries, and numbers."""
    return [str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", None)))) for key in path]


def quick_jit(f: Any) -> Any:
    """`jax.jit` for a function that runs a few times. On CPU it skips the optimisations that pay off only in a long run."""
    return jax.jit(f, compiler_options={"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None)
