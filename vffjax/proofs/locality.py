"""The locality certificate: whether any gradient crosses between groups, by the traced program and by numbers, and what a group sees.

The program is `trainer.run_segment`, which an epoch calls, on abstract inputs of the data set's sizes: nothing is read, and no segment is
compiled. `dataflow` says what each new parameter depends on. docs/method.md says what that proves and what it does not.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vffjax.config import Config
from vffjax.data import sizes_of
from vffjax.data.load import split_sizes
from vffjax.proofs import dataflow
from vffjax.proofs.probes import leaf_names, losses, probe
from vffjax.rules.streams import DRAWN
from vffjax.training import trainer
from vffjax.training.batch import abstract_batch
from vffjax.training.checks import check_against_data
from vffjax.training.feature_cache import clean_features
from vffjax.training.plan import Plan, abstract_start, make_plan


def certify(config: Config, numeric: bool = True) -> dict[str, Any]:
    """The certificate of a configuration, in plain JSON types; `local` is the verdict, `violations` is empty if it is true.

    A violation has a `kind` (forward, backward, nothing learns, ...), the `program` that shows it, and the leaves `from` which something
    came `to` which. With `numeric`, gradients are computed as well, on random inputs. Raises `UserError` if the configuration does not fit
    its data set.
    """
    sizes = sizes_of(config)
    images = split_sizes(config, sizes.train_images)[0]
    plan = make_plan(config, images, sizes.classes)
    check_against_data(plan, images, sizes.image_shape)
    layers = {group.name: len(group.module.layers) for group in plan.groups}
    numbers = probe(plan, sizes.image_shape) if numeric else None

    programs = _programs(plan, sizes.image_shape, images)
    steps = [program for program in programs if program.name == "step"]
    inside = {name: _crossings(_of(steps, i), _layers(_of(steps, i), name), ("backward",)) for i, name in enumerate(layers)}
    # Of one group there is no border to cross: its layers are held to what groups are held to.
    single = next(iter(layers)) if len(layers) == 1 else ""
    violations: list[dict[str, Any]] = []
    for program in programs:
        parts = _layers(program, single) if single else {name: _leaves(program, f"{name}/") for name in layers}
        trivial = single and layers[single] == 1
        found = [] if trivial else _crossings(program, parts, ("backward",) if single else ("forward", "backward"))
        known = {(v["kind"], v["from_part"], v["to_part"]) for v in violations}
        violations += [v for v in found if (v["kind"], v["from_part"], v["to_part"]) not in known]
        violations += _idle(program, list(layers), plan.config.frozen_groups)
    if numbers is not None:
        violations += numbers.pop("violations")
        for v in [*itertools.chain(*inside.values()), *violations]:
            group, _, layer = v["to_part"].partition("/")
            if layer:
                v["max_abs"] = numbers["layers"][group][layer]
    local = not violations
    return {
        "local": local,
        "verdict": _verdict(local, layers, violations),
        "configuration": config.to_dict(),
        "groups": layers,
        "violations": violations,
        "sees": {name: _sees(_of(steps, i), i, list(layers)) for i, name in enumerate(layers)},
        "inside": inside,
        "programs": [{"program": p.name, "trains": p.trains, "sources": len(p.sources) - 1, "results": len(p.found)} for p in programs],
        "numeric": numbers,
    }


def _verdict(local: bool, layers: dict[str, int], violations: list[dict[str, Any]]) -> str:
    kinds = {v["kind"] for v in violations}
    if local and len(layers) == 1:
        return "one group of one layer: there is no border, it is local trivially"
    if local:
        return "no gradient crosses a border between groups"
    if len(layers) == 1 and "backward" in kinds:
        (count,) = layers.values()
        crossed = {
            (v["from_part"], v["to_part"])
            for v in violations
            if v["kind"] == "backward" and not v["from_part"].endswith(("/head", "/rule"))
        }
        return f"gradients cross {'every layer' if len(crossed) == count * (count - 1) // 2 else 'layers'}: this is back-propagation"
    return f"found: {', '.join(sorted(kinds))}"


# ----------------------------------------------------------------------------------------------------------------------------------
# The traced programs


_STEPS = 2  # of a traced segment: its loop has one body, whatever its length


class _Program(NamedTuple):
    name: str  # segment, step, losses
    trains: list[str]  # groups that change in it
    sources: list[str]  # names of the flattened inputs
    found: dict[str, dataflow.Flow]  # of the new leaves of the states, or of the losses
    undrawn: dict[str, dataflow.Flow]  # the same, where labels that were drawn from predictions come from nowhere

    def reaching(self, results: Sequence[str], path: str) -> list[str]:
        """Names of the sources that any of the results depends on by `path`: value, real, gradient; undrawn: value, not by drawn labels."""
        found = self.undrawn if path == "undrawn" else self.found
        flow, path = dataflow.union(found[name] for name in results), "value" if path == "undrawn" else path
        return [self.sources[i] for i in dataflow.members(getattr(flow, path))]


def _programs(plan: Plan, image_shape: tuple[int, int, int], images: int) -> list[_Program]:
    """Every stage's step and segment, traced, and the chain of losses. Steps first: they name the leaves that cross at once."""
    size = plan.config.batch_size
    shape: Any = jax.ShapeDtypeStruct
    task, states = abstract_start(plan, image_shape)
    program, groups = plan.program, len(plan.groups)
    batch = abstract_batch(size, image_shape, groups)
    steps, segments = [], []
    for active in [None] if plan.config.schedule == "joint" else range(plan.stages):
        trains = [group.name for group in plan.groups if active in (None, group.index)]
        cached = None
        if active and plan.config.feature_cache != "none":
            every_image = shape((images, *image_shape), jnp.uint8)
            cached = jax.eval_shape(lambda *a, active=active: clean_features(program, active, *a), task, states, every_image)
        step, segment = (functools.partial(f, program, active) for f in (trainer.train_step, trainer.run_segment))
        one, some = (abstract_batch(size, image_shape, groups, cached, length) for length in ((), (_STEPS,)))
        steps.append(_traced("step", trains, step, task, states, one))
        segments.append(_traced("segment", trains, segment, task, states, some))

    def chain(task: Any, states: Any, batch: Any) -> Any:
        return losses(program, [s.params for s in states], states, trainer.step_streams(program, None, task, states, batch), batch)[0]

    return [*steps, *segments, _traced("losses", [], chain, task, states, batch)]


def _traced(name: str, trains: list[str], f: Callable[..., Any], task: Any, states: Any, batch: Any) -> _Program:
    program, out = jax.make_jaxpr(f, return_shape=True)(task, states, batch)
    sources = [*leaf_names("task", task), *leaf_names("", states), *leaf_names("data", batch)]
    results = [f"group{i}/loss" for i in range(len(out))] if name == "losses" else leaf_names("", out[0])
    found = [dict(zip(results, dataflow.flows(program, named=named), strict=False)) for named in (None, {DRAWN: len(sources)})]
    return _Program(name, trains, [*sources, DRAWN], *found)


def _of(steps: list[_Program], group: int) -> _Program:
    """The step in which a group trains."""
    return steps[group if len(steps) > 1 else 0]


def _leaves(program: _Program, prefix: str) -> list[str]:
    return [name for name in program.found if name.startswith(prefix)]


def _params(program: _Program, group: str) -> list[str]:
    return [name for name in _leaves(program, f"{group}/") if name.split("/")[1] not in ("batch_stats", "opt_state")]


def _layers(program: _Program, group: str) -> dict[str, list[str]]:
    """The leaves of each layer of a group; its head and what its rule owns come last."""
    parts: dict[str, list[str]] = {}
    for name in _params(program, group):
        parts.setdefault("/".join(name.split("/")[:2]), []).append(name)
    return {part: parts[part] for part in sorted(parts, key=lambda p: (p.endswith(("/head", "/rule")), len(p), p))}


def _crossings(program: _Program, parts: dict[str, list[str]], kinds: Sequence[str]) -> list[dict[str, Any]]:
    """What passes between parts of a network, given from input to output. Forward: a later part's results could be differentiated in
    an earlier part's leaves. Backward: an earlier part's results are computed from a later part's leaves, as back-propagation does;
    between groups in any way but by labels drawn from predictions, inside a group by floating point."""
    found = []
    for (a, earlier), (b, later) in itertools.combinations(parts.items(), 2):
        for kind, source, target, path in (("forward", a, b, "gradient"), ("backward", b, a, "real" if "/" in a else "undrawn")):
            # A source's leaves have the names of the results, except in the program of the losses, which has other results.
            begins, ends = f"{source}/", earlier if target == a else later
            if kind not in kinds:
                continue
            reached = {name: [s for s in program.reaching([name], path) if s.startswith(begins)] for name in ends}
            reached = {name: sources for name, sources in reached.items() if sources}
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
    """Parameters before statistics before an optimizer's state, kernels first, a head's last."""
    words = name.split("/")
    return ("batch_stats" in words) + 2 * ("opt_state" in words), words[-1] != "kernel", "head" in words, name


def _nearness(name: str) -> tuple[int, bool, bool, str]:
    """As `_plainness`, but a head's kernel first: what comes down from a loss comes through it."""
    kind, other, head, name = _plainness(name)
    return kind, other, not head, name


def _idle(program: _Program, groups: list[str], frozen: int) -> list[dict[str, Any]]:
    """Kernels that do not learn from images and labels: without these a proof that nothing crosses says nothing. Of the first `frozen`
    groups the head alone has to."""
    out = []
    kernels = (name for group in groups if group in program.trains for name in _params(program, group) if name.endswith("kernel"))
    for name in (name for name in kernels if not name.startswith(tuple(f"{group}/layers_" for group in groups[:frozen]))):
        value = {"data/images" if s == "data/features" else s for s in program.reaching([name], "value")}
        missing = [source for source in ("data/images", "data/labels") if source not in value]
        missing += [] if name in program.reaching([name], "gradient") else [name]
        out += [{"kind": "nothing learns", "program": program.name, "from": source, "to": name} for source in missing]
    return [v | {"from_part": "", "to_part": v["to"].split("/")[0]} for v in out]


def _sees(program: _Program, group: int, groups: list[str]) -> dict[str, Any]:
    """What a group's new parameters are computed from, in one step: sources of other groups by how they arrive."""
    own = groups[group]
    value, real = (program.reaching(_params(program, own), path) for path in ("value", "real"))

    def how(kind: str, others: list[str], by: Sequence[str] = value, by_real: Sequence[str] = real) -> dict[str, str]:
        """`floating point` or `whole numbers` for each group that has leaves of a kind among the sources."""
        found = {name: [s for s in by if s.startswith(f"{name}/{kind}")] for name in others}
        return {name: "floating point" if set(of) & set(by_real) else "whole numbers" for name, of in found.items() if of}

    layers = [name for name in _params(program, own) if name.startswith(f"{own}/layers_")]
    of_layers = [program.reaching(layers, path) for path in ("value", "real")]
    others = [name for name in groups if name != own]
    return {
        "images": "data/images" in value,
        "cached_features": "data/features" in value,
        "images_pass": list(how("layers_", groups[:group])),
        "labels": "data/labels" in value,
        "class_noise": "task/codebook" in value,
        "pixel_statistics": "task/mean" in value,
        "own_head": how("head/", [own], *of_layers).get(own, "no"),
        "own_rule": how("rule/", [own], *of_layers).get(own, "no"),
        "own_optimizer_state": bool(how("opt_state/", [own])),
        "running_statistics": list(how("batch_stats/", groups)),
        "heads_of_others": how("head/", others),
        "later_groups": how("", groups[group + 1 :]),
    }


# ----------------------------------------------------------------------------------------------------------------------------------
# Text


def text(certificate: dict[str, Any]) -> str:
    """A certificate to read."""
    numbers, layers = certificate["numeric"], certificate["groups"]
    lines = [f"{'local' if certificate['local'] else 'NOT LOCAL'}: {certificate['verdict']}"]
    for v in certificate["violations"]:
        more = sum(len(v.get(key, [0])) - 1 for key in ("from_leaves", "to_leaves"))
        size = f", at most {v['max_abs']:.2g}" if v.get("max_abs") else ""
        lines.append(f"  {v['kind']}, by the {v['program']}: {v['from']} -> {v['to']}{f' and {more} more leaves' if more else ''}{size}")
    traced = ", ".join(f"{p['program']} ({p['sources']} sources, {p['results']} results)" for p in certificate["programs"])
    lines += [f"traced: {traced}", ""]
    for name, seen in certificate["sees"].items():
        lines.append(f"{name}, {layers[name]} layer{'s' * (layers[name] > 1)}, learns from")
        lines += [f"    {line}" for line in _seen(seen, numbers and numbers["images"][name])]
        crossed = [f"{_short(v['from_part'])} to {_short(v['to_part'])}" for v in certificate["inside"][name]]
        lines.append(f"    gradients inside the group: {', '.join(crossed) or 'none from one layer to another'}")
    if numbers is None:
        return "\n".join(lines)
    count = numbers["images_in_batch"]
    lines += ["", f"largest absolute gradient of each group's loss (row) in each group's parameters (column), {count} random images"]
    lines.append(" " * 9 + "".join(f"{name:>12s}" for name in layers))
    for name, row in zip(layers, numbers["gradients"], strict=True):
        lines.append(f"{name:9s}" + "".join(f"{'not finite' if x is None else f'{x:.3g}':>12s}" for x in row))
    interference = numbers["interference"]
    if "skipped" in interference:
        return "\n".join([*lines, f"interference of later parameters with earlier groups' steps: not tried, {interference['skipped']}"])
    for name, same in interference.items():
        lines.append(f"other parameters in {name}: earlier groups' new states {'bitwise the same' if same else 'CHANGE'}")
    return "\n".join(lines)


def _short(part: str) -> str:
    return part.rpartition("/")[2]


def _seen(seen: dict[str, Any], images: dict[str, Any] | None) -> list[str]:
    through = f" through {', '.join(seen['images_pass'])}" if seen["images_pass"] else ""
    lines = [f"images{through}"] if seen["images"] else []
    lines += ["kept features of images"] if seen["cached_features"] else []
    noise = ", and the class noise of the codebook" if seen["class_noise"] else ""
    lines += [f"labels{noise}"] if seen["labels"] else []
    lines += ["the training images' pixel statistics"] if seen["pixel_statistics"] else []
    if images:
        others = "with the other clean images of the batch (batch statistics)" if images["other_images"] else "by itself"
        lines.append(f"each clean image {others}; labelled copies change its features by {images['labelled_copies']:.3g}")
    lines += [f"running statistics of {', '.join(seen['running_statistics'])}"] if seen["running_statistics"] else []
    lines += ["its optimizer's state"] if seen["own_optimizer_state"] else []
    head = {"floating point": "by gradient", "whole numbers": "by whole numbers alone", "no": "not at all"}[seen["own_head"]]
    lines.append(f"its head, which reaches the layers {head}")
    lines += ["its rule's own parameters, which reach the layers by gradient"] if seen["own_rule"] != "no" else []
    for name, how in seen["heads_of_others"].items():
        drawn = "as drawn labels" if how == "whole numbers" else "as floating-point numbers"
        lines.append(f"predictions of {name}'s head, {drawn}")
    later = [name for name, how in seen["later_groups"].items() if how == "floating point"]
    never = "never, but for those drawn labels" if seen["later_groups"] else "never"
    return [*lines, f"parameters of later groups: {', '.join(later) or never}"]
