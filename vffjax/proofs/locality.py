"""The locality certificate: a proof, from the traced training program, that no gradient crosses from one group to another.

The program is `trainer.run_segment`, which an epoch calls, traced on abstract inputs of the data set's sizes. No data set is read, and no
segment is compiled. `dataflow` finds the inputs on which each new parameter depends, and `probes` confirms the verdict with numbers.
docs/method.md says what the certificate proves and what it does not.
"""

import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vffjax.config import Config
from vffjax.proofs import dataflow, probes
from vffjax.rules.streams import DRAWN
from vffjax.training import checks, feature_cache, mesh, pipeline, stages, trainer
from vffjax.training.batch import abstract_batch
from vffjax.training.plan import Plan, abstract_start


def certify(config: Config, numeric: bool = True) -> dict[str, Any]:
    """Decides whether training by a configuration is local, that is, whether no gradient crosses from one group to another.

    Args:
        config: a checked configuration.
        numeric: whether to confirm the proof with gradients on random images as well, which compiles programs.

    Returns:
        The certificate, in plain JSON types. `local` is the verdict, and `violations` lists what contradicts it. A violation has a `kind`
        (forward, backward, nothing learns, ...), the `program` that shows it, and the leaves `from` which something passes `to` others.
        `sees` lists what each group learns from. `inside` lists gradients between the layers of one group, which are allowed.

    Raises:
        UserError: the configuration does not fit its data set.
    """
    plan, sizes = checks.plan_before_data(config)
    layers = {group.name: sum(layer.learns for layer in group.module.layers) for group in plan.groups}
    numbers = probes.probe(plan, sizes.image_shape) if numeric else None

    devices = stages.count(config)
    with mesh.within(stages.mesh_for(config, devices)):  # the program that trains here
        programs = _programs(plan, sizes.image_shape)
    step_of = {name: program for program in programs if program.name == "step" for name in program.trains}
    inside = {name: _crossings(step, _layers(step, name), ("backward",), "real") for name, step in step_of.items()}
    violations = _violations(programs, layers, config.frozen_groups)
    if numbers is not None:
        violations += numbers.pop("violations")
        for v in [*itertools.chain(*inside.values()), *violations]:
            group, _, layer = v["to_part"].partition("/")
            if layer:
                v["max_abs"] = numbers["layers"][group][layer]
    return {
        "local": not violations,
        "verdict": _verdict(layers, violations),
        "configuration": config.to_dict(),
        "groups": layers,
        "devices": devices,
        "violations": violations,
        "sees": {name: _sees(step, i, list(layers)) for i, (name, step) in enumerate(step_of.items())},
        "inside": inside,
        "programs": [{"program": p.name, "trains": p.trains, "sources": len(p.sources) - 1, "results": len(p.found)} for p in programs],
        "numeric": numbers,
    }


def _verdict(layers: dict[str, int], violations: list[dict[str, Any]]) -> str:
    kinds = {v["kind"] for v in violations}
    if not violations:
        alone = "one group of one layer: there is no border, it is local trivially"
        return alone if [*layers.values()] == [1] else "no gradient crosses a border between groups"
    if len(layers) > 1 or "backward" not in kinds:
        return f"found: {', '.join(sorted(kinds))}"
    (count,) = layers.values()
    backward = {(v["from_part"], v["to_part"]) for v in violations if v["kind"] == "backward"}
    crossed = [pair for pair in backward if not pair[0].endswith(("/head", "/rule"))]
    return f"gradients cross {'every layer' if len(crossed) == count * (count - 1) // 2 else 'layers'}: this is back-propagation"


# ----------------------------------------------------------------------------------------------------------------------------------
# The traced programs


_STEPS = 2  # The loop of a segment has one body, whatever its length, so a segment of two steps stands for all.


class _Program(NamedTuple):
    name: str  # segment, step or losses
    trains: list[str]  # the groups that change in it
    sources: list[str]  # the names of the flattened inputs
    kernels: list[str]  # those of the parameters that are to learn: with two dimensions or more, and not fixed
    # The sources of each result, by kind of path, as the sets of `dataflow.Flow`. Here undrawn is value without the paths through labels
    # that were drawn from predictions. Results are new leaves of the states, or losses.
    found: dict[str, dict[str, int]]

    def reaching(self, results: Iterable[str], path: str) -> list[str]:
        """The names of the sources on which any of the results depends by a kind of path."""
        reached = functools.reduce(operator.or_, (self.found[name][path] for name in results), 0)
        return [self.sources[i] for i in dataflow.members(reached)]


def _programs(plan: Plan, image_shape: tuple[int, int, int]) -> list[_Program]:
    """Traces the step and the segment of every stage, and the chain of losses.

    Steps come first, because a violation is reported by the first program that shows it, and a step names exactly the leaves that cross.
    """
    size, groups, program = plan.config.batch_size, len(plan.groups), plan.program
    task, states = abstract_start(plan, image_shape)
    steps, segments = [], []
    for active in [None] if plan.active(0) is None else range(plan.stages):
        trains = [group.name for group in plan.groups if active in (None, group.index)]
        cached = None
        if active and plan.config.feature_cache != "none":
            image = jax.ShapeDtypeStruct((1, *image_shape), jnp.uint8)  # the features of any number of images have the same shape
            cached = jax.eval_shape(functools.partial(feature_cache.clean_features, program, active), task, states, image)
        step, segment = (functools.partial(f, program, active) for f in (trainer.step_of_segment, trainer.run_segment))
        if stages.is_pipeline(plan.config):  # its stages one after the other, each with one group: no border is inside of a stage
            segment = functools.partial(pipeline.in_one, program, [(i, i + 1) for i in range(groups)])
        one, some = (abstract_batch(size, image_shape, groups, cached, length) for length in ((), (_STEPS,)))
        steps.append(_traced("step", trains, step, task, states, one))
        segments.append(_traced("segment", trains, segment, task, states, some))

    def chain(task: Any, states: Any, batch: Any) -> Any:
        streams = trainer.step_streams(program, None, task, states, batch)
        return probes.losses(program, [s.params for s in states], states, streams, batch)[0]

    return [*steps, *segments, _traced("losses", [], chain, task, states, abstract_batch(size, image_shape, groups))]


def _traced(name: str, trains: list[str], f: Callable[..., Any], task: Any, states: Any, batch: Any) -> _Program:
    program, out = jax.make_jaxpr(f, return_shape=True)(task, states, batch)
    sources = [*probes.leaf_names("task", task), *probes.leaf_names("", states), *probes.leaf_names("data", batch)]
    results = [f"group{i}/loss" for i in range(len(out))] if name == "losses" else probes.leaf_names("", out[0])
    # A step returns metrics too, which are left out: they follow the states.
    each = zip(results, dataflow.flows(program, named={DRAWN: len(sources)}), strict=False)
    return _Program(name, trains, [*sources, DRAWN], probes.kernels(states), {result: flow._asdict() for result, flow in each})


def _leaves(program: _Program, prefix: str) -> list[str]:
    return [name for name in program.found if name.startswith(prefix)]


def _params(program: _Program, group: str) -> list[str]:
    return [name for name in _leaves(program, f"{group}/") if name.split("/")[1] not in ("batch_stats", "opt_state")]


def _layers(program: _Program, group: str) -> dict[str, list[str]]:
    """The leaves of each layer of a group in order, then those of its head and of its rule."""
    parts: dict[str, list[str]] = {}
    for name in _params(program, group):
        parts.setdefault("/".join(name.split("/")[:2]), []).append(name)
    return {part: parts[part] for part in sorted(parts, key=lambda p: (p.endswith(("/head", "/rule")), len(p), p))}


# ----------------------------------------------------------------------------------------------------------------------------------
# What the programs show


def _violations(programs: list[_Program], layers: dict[str, int], frozen: int) -> list[dict[str, Any]]:
    """What contradicts locality: crossings, each from the first program that shows it, and kernels that do not learn."""
    # A network of one group has no border between groups, so its layers are judged as if each were a group.
    single = next(iter(layers)) if len(layers) == 1 else ""
    kinds = ("backward",) if single else ("forward", "backward")
    # Whether a group's new state is finite (config.on_nonfinite=skip) reaches its frozen layers as a truth value. They never change.
    backward = "real" if single and frozen else "undrawn"
    # By the chain of losses, and not by the step: in a fenced step every gradient depends on the images, even one of zeros.
    learning = {s for program in programs if program.name == "losses" for s in program.reaching(program.found, "gradient")}
    crossed: set[tuple[str, ...]] = set()
    found: list[dict[str, Any]] = []
    for program in programs:
        parts = _layers(program, single) if single else {name: _leaves(program, f"{name}/") for name in layers}
        for v in [] if single and layers[single] == 1 else _crossings(program, parts, kinds, backward):
            where = v["kind"], v["from_part"], v["to_part"]
            found += [] if where in crossed else [v]
            crossed.add(where)
        found += _idle(program, list(layers), frozen, learning)
    return found


def _crossings(program: _Program, parts: dict[str, list[str]], kinds: Sequence[str], backward: str = "undrawn") -> list[dict[str, Any]]:
    """What passes between the parts of a network.

    Forward: results of a later part could be differentiated with respect to leaves of an earlier part. Backward: results of an earlier part
    are computed from leaves of a later part, as in back-propagation.

    Args:
        program: a traced program.
        parts: groups, or layers of a group, in order from input to output, with the names of their results.
        kinds: which of `forward` and `backward` to look for.
        backward: the kind of path that counts backward. `undrawn` is any path, except through labels that were drawn from predictions. What
            is `real` passes floating-point numbers alone.

    Returns:
        One violation for each kind and pair of parts between which something passes.
    """
    found = []
    for (early, early_results), (late, late_results) in itertools.combinations(parts.items(), 2):
        ways = {"forward": (early, late, late_results, "gradient"), "backward": (late, early, early_results, backward)}
        for kind in kinds:
            source, target, results, path = ways[kind]
            each = {name: [s for s in program.reaching([name], path) if s.startswith(f"{source}/")] for name in results}
            reached = {name: sources for name, sources in each.items() if sources}
            if not reached:
                continue
            to = min(reached, key=_plainness)
            every = sorted(set().union(*reached.values()), key=_nearness)
            found.append(
                {"kind": kind, "program": program.name, "from": min(reached[to], key=_nearness), "to": to, "from_part": source}
                | {"to_part": target, "from_leaves": every, "to_leaves": sorted(reached, key=_plainness)}
            )
    return found


def _plainness(name: str) -> tuple[int, bool, bool, str]:
    """Sorts parameters before statistics before the state of an optimizer. Among parameters kernels come first, the head's last."""
    words = name.split("/")
    return ("batch_stats" in words) + 2 * ("opt_state" in words), words[-1] != "kernel", "head" in words, name


def _nearness(name: str) -> tuple[int, bool, bool, str]:
    """Sorts like `_plainness`, but with the head's kernel first, because a gradient of the loss comes through it."""
    kind, other, head, name = _plainness(name)
    return kind, other, not head, name


def _idle(program: _Program, groups: list[str], frozen: int, learning: set[str]) -> list[dict[str, Any]]:
    """Kernels with respect to which no loss has a gradient, or that a step does not change by images, and in heads by labels too, which a
    rule need not use. If nothing learns, the absence of crossings proves nothing.

    In the first `frozen` groups only the head has to learn. Of the rules' own kernels only those have to that are `learning`: a loss has a
    gradient with respect to them.
    """
    fixed = tuple(f"{group}/{part}" for group in groups[:frozen] for part in ("layers_", "rule/"))
    found = []
    for name in program.kernels:
        if name.partition("/")[0] not in program.trains or name.startswith(fixed) or ("/rule/" in name and name not in learning):
            continue
        value = {"data/images" if s == "data/features" else s for s in program.reaching([name], "value")}
        missing = [source for source in ("data/images", "data/labels")[: 1 + ("/head/" in name)] if source not in value]
        missing += [] if name in learning else [name]
        about = {"kind": "nothing learns", "program": program.name}
        found += [about | {"from": source, "to": name, "from_part": "", "to_part": name.split("/")[0]} for source in missing]
    return found


def _sees(program: _Program, group: int, groups: list[str]) -> dict[str, Any]:
    """What the new parameters of a group are computed from in one step."""
    own = groups[group]
    params = _params(program, own)
    layers = [name for name in params if name.startswith(f"{own}/layers_")]
    value = program.reaching(params, "value")
    ways = functools.partial(_ways, program, params)
    return {
        "images": "data/images" in value,
        "cached_features": "data/features" in value,
        "images_pass": list(ways(groups[:group], "layers_")),
        "labels": "data/labels" in value,
        "class_noise": "task/codebook" in value,
        "pixel_statistics": "task/mean" in value,
        "own_head": _ways(program, layers, [own], "head/").get(own, "no"),
        "own_rule": _ways(program, layers, [own], "rule/").get(own, "no"),
        "own_optimizer_state": bool(ways([own], "opt_state/")),
        "running_statistics": list(ways(groups, "batch_stats/")),
        "heads_of_others": ways([name for name in groups if name != own], "head/"),
        "later_groups": ways(groups[group + 1 :], ""),
    }


def _ways(program: _Program, results: list[str], groups: list[str], kind: str) -> dict[str, str]:
    """For each group of which leaves of this kind reach the results: whether as `floating point` or only as `whole numbers`."""
    value, real = (set(program.reaching(results, path)) for path in ("value", "real"))
    found = {name: {source for source in value if source.startswith(f"{name}/{kind}")} for name in groups}
    return {name: "floating point" if leaves & real else "whole numbers" for name, leaves in found.items() if leaves}


# ----------------------------------------------------------------------------------------------------------------------------------
# Text


def text(certificate: dict[str, Any]) -> str:
    """A certificate as text for a person to read."""
    numbers, layers, clipped = certificate["numeric"], certificate["groups"], certificate["configuration"]["clip_norm"] > 0
    crossing = {v["kind"] for v in certificate["violations"]} - {"nothing learns", "not finite"}
    lines = [f"{'local' if certificate['local'] else 'NOT LOCAL' if crossing else 'NOT PROVED'}: {certificate['verdict']}"]
    for v in certificate["violations"]:
        more = sum(len(v.get(key, [0])) - 1 for key in ("from_leaves", "to_leaves"))
        size = f", at most {v['max_abs']:.2g}" if v.get("max_abs") else ""
        lines.append(f"  {v['kind']}, by the {v['program']}: {v['from']} -> {v['to']}{f' and {more} more leaves' if more else ''}{size}")
    traced = ", ".join(f"{p['program']} ({p['sources']} sources, {p['results']} results)" for p in certificate["programs"])
    for_devices = f", for {certificate['devices']} devices" if certificate["devices"] > 1 else ""
    lines += [f"traced{for_devices}: {traced}", ""]
    for name, seen in certificate["sees"].items():
        lines.append(f"{name}, {layers[name]} layer{'s' * (layers[name] > 1)}, learns from")
        lines += [f"    {line}" for line in _seen(seen, numbers and numbers["images"][name], clipped)]
        crossed = [" to ".join(v[key].rpartition("/")[2] for key in ("from_part", "to_part")) for v in certificate["inside"][name]]
        which = "gradients inside the group" + " (config.clip_norm scales them together)" * clipped
        lines.append(f"    {which}: {', '.join(crossed) or 'none from one layer to another'}")
    return "\n".join(lines + (_numbers(numbers, list(layers)) if numbers else []))


def _numbers(numbers: dict[str, Any], groups: list[str]) -> list[str]:
    """The table of gradients, and whether later groups interfere with earlier ones."""
    count = numbers["images_in_batch"]
    lines = ["", f"largest absolute gradient of each group's loss (row) in each group's parameters (column), {count} random images"]
    lines.append(" " * 9 + "".join(f"{name:>12s}" for name in groups))
    for name, row in zip(groups, numbers["gradients"], strict=True):
        lines.append(f"{name:9s}" + "".join(f"{'not finite' if x is None else f'{x:.3g}':>12s}" for x in row))
    interference = numbers["interference"]
    if "skipped" in interference:
        return [*lines, f"interference of later parameters with earlier groups' steps: not tried, {interference['skipped']}"]
    for name, same in interference.items():
        lines.append(f"other parameters in {name}: earlier groups' new states {'bitwise the same' if same else 'CHANGE'}")
    return lines


def _seen(seen: dict[str, Any], images: dict[str, Any] | None, clipped: bool) -> list[str]:
    """What a group learns from, one line for each source.

    Args:
        seen: of the group, as `_sees` gives it.
        images: what the probe found about clean images, if there was one.
        clipped: whether the gradients of a group are scaled together, by their norm.
    """
    through, statistics = (", ".join(seen[key]) for key in ("images_pass", "running_statistics"))
    clean = ""
    if images:
        others = "with the other clean images of the batch" if images["other_images"] else "by itself"
        clean = f"each clean image {others}; labelled copies change its features by {images['labelled_copies']:.3g}"
    by_gradient = "by gradient, or by its norm" if clipped else "by gradient"
    reaches = {"floating point": by_gradient, "whole numbers": "by whole numbers alone", "no": "not at all"}
    lines = {
        f"images through {through}" if through else "images": seen["images"],
        "kept features of images": seen["cached_features"],
        "labels, and the class noise of the codebook" if seen["class_noise"] else "labels": seen["labels"],
        "the training images' pixel statistics": seen["pixel_statistics"],
        clean: clean,
        f"running statistics of {statistics}": statistics,
        "its optimizer's state": seen["own_optimizer_state"],
        f"its head, which reaches the layers {reaches[seen['own_head']]}": True,
        f"its rule's own parameters, which reach the layers {reaches[seen['own_rule']]}": seen["own_rule"] != "no",
    }
    drawn = {"floating point": "as floating-point numbers", "whole numbers": "as drawn labels"}
    heads = [f"predictions of {name}'s head, {drawn[how]}" for name, how in seen["heads_of_others"].items()]
    later = [name for name, how in seen["later_groups"].items() if how == "floating point"]
    never = "never, but for those drawn labels" if seen["later_groups"] else "never"
    return [*(line for line, present in lines.items() if present), *heads, f"parameters of later groups: {', '.join(later) or never}"]
