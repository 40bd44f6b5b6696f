"""What each output of a traced program depends on, found by walking its jaxpr with sets of sources in the place of arrays.

Trusted are three facts: `stop_gradient` lets no derivative through, neither does a result that is not floating point, and an optimization
barrier gives each operand back. Every other operation counts as passing whatever it takes to all that it returns. Calls, loops and choices
are walked. So a dependence may be reported that is not there, but none that is there is missed, unless it goes through the host behind
JAX's back.

How JAX lays out a loop's program has changed between versions. An equation that holds a program in a layout that is not known here raises
`UserError`: to let everything in it reach everything would be a verdict, and a wrong one.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jax.extend.core.primitives import stop_gradient_p

from vffjax.errors import UserError


class Flow(NamedTuple):
    """Sets of sources, source `i` as the bit `1 << i`, of one array."""

    value: int = 0  # it depends on them in any way
    real: int = 0  # ... by a path on which everything is floating point
    gradient: int = 0  # ... and on which no `stop_gradient` lies: all that a derivative could follow, and perhaps more


NOTHING = Flow()
Named = Mapping[str, int]


class _Walk(NamedTuple):
    """What one walk of a program knows."""

    named: Named
    # What a program inside it made of its inputs. Programs are met again: in the branches of a choice, in every turn of a loop.
    walked: dict[tuple[int, tuple[Flow, ...]], list[Flow]]


def flows(program: ClosedJaxpr, sources: Sequence[int] | None = None, named: Named | None = None) -> list[Flow]:
    """The flow of every output of `program`, whose flattened input `i` is source `sources[i]`, by default `i`.

    Several inputs may be one source. An input that is not floating point is a source by value alone. Constants are none. What the program
    has given a name by `jax.ad_checkpoint.checkpoint_name` and `named` knows is a source of its own, in the place of all that it was
    computed from, if it is no floating-point array.
    """
    variables = program.jaxpr.invars
    numbers = range(len(variables)) if sources is None else sources
    inputs = [_onto(variable, Flow(1 << i, 1 << i, 1 << i)) for variable, i in zip(variables, numbers, strict=True)]
    return _walk(program.jaxpr, inputs, _Walk(named or {}, {}))


def members(sources: int) -> list[int]:
    """The numbers of the sources in a set."""
    return [i for i in range(sources.bit_length()) if sources >> i & 1]


def union(parts: Iterable[Flow]) -> Flow:
    """What depends on any of what the parts depend on."""
    value = real = gradient = 0
    for part in parts:
        value, real, gradient = value | part.value, real | part.real, gradient | part.gradient
    return Flow(value, real, gradient)


def _floating(variable: Any) -> bool:
    # Keys of random numbers, tokens and the like have a type that is no number, or none.
    dtype = getattr(variable.aval, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.inexact)


def _onto(variable: Any, flow: Flow) -> Flow:
    """`flow` as it arrives in a variable: whole numbers, truth values and keys carry neither real paths nor gradients."""
    return flow if _floating(variable) else Flow(flow.value)


def _walk(jaxpr: Jaxpr, inputs: Sequence[Flow], walk: _Walk) -> list[Flow]:
    place = id(jaxpr), tuple(inputs)  # the whole program holds on to its parts, so that none takes another's place
    if place not in walk.walked:
        walk.walked[place] = _outputs(jaxpr, inputs, walk)
    return walk.walked[place]


def _outputs(jaxpr: Jaxpr, inputs: Sequence[Flow], walk: _Walk) -> list[Flow]:
    known = dict(zip(jaxpr.invars, inputs, strict=True))
    # Whatever has an effect may speak to whatever has one after it: by a reference, through the host, by order.
    world = NOTHING

    def read(atom: Any) -> Flow:
        return NOTHING if isinstance(atom, Literal) else known.get(atom, NOTHING)

    for equation in jaxpr.eqns:
        operands = [read(atom) for atom in equation.invars]
        if _speaks(equation):
            world = union([world, *operands])
            found = [world] * len(equation.outvars)
            # A reference may have been written to.
            known.update({atom: union([read(atom), world]) for atom in equation.invars if not isinstance(atom, Literal)})
        else:
            found = _through(equation, operands, walk)
        known.update({variable: _onto(variable, flow) for variable, flow in zip(equation.outvars, found, strict=True)})
    return [read(atom) for atom in jaxpr.outvars]


def _speaks(equation: JaxprEqn) -> bool:
    # The name of a mapped axis counts as an effect in JAX, and is none.
    return any(type(effect).__name__ != "NamedAxisEffect" for effect in equation.effects)


def _through(equation: JaxprEqn, operands: list[Flow], walk: _Walk) -> list[Flow]:
    """The flows of an equation's outputs."""
    if equation.primitive is stop_gradient_p:
        return [flow._replace(gradient=0) for flow in operands]
    if equation.primitive.name == "name" and equation.params.get("name") in walk.named and not _floating(equation.outvars[0]):
        return [Flow(1 << walk.named[equation.params["name"]])]
    rule = _RULES.get(equation.primitive.name)
    if rule:
        try:
            return rule(equation, operands, walk)
        except (ValueError, AttributeError, KeyError, TypeError, IndexError) as error:  # parameters of other kinds or numbers than here
            raise _not_understood(equation) from error
    if equation.primitive.name not in _WHOLE and any(map(_programs, equation.params.values())):
        raise _not_understood(equation)
    return [union(operands)] * len(equation.outvars)


def _programs(value: Any) -> bool:
    """Whether a parameter of an equation is a program, or holds some."""
    if isinstance(value, Mapping):
        value = list(value.values())
    return any(map(_programs, value)) if isinstance(value, tuple | list) else hasattr(value, "eqns") or hasattr(value, "jaxpr")


def _not_understood(equation: JaxprEqn) -> UserError:
    problem = f"the traced program has an equation '{equation.primitive.name}' in a layout that is not known"
    return UserError(f"jax {jax.__version__}: this JAX is newer than the certificate understands ({problem}); use jax {_SUPPORTED}")


def _body(equation: JaxprEqn) -> Jaxpr:
    """The one program that an equation runs on its operands one by one."""
    inner = [equation.params[name] for name in ("jaxpr", "call_jaxpr") if name in equation.params]
    if len(inner) != 1 or not isinstance(inner[0], ClosedJaxpr | Jaxpr):
        raise _not_understood(equation)
    jaxpr = inner[0].jaxpr if isinstance(inner[0], ClosedJaxpr) else inner[0]
    if (len(jaxpr.invars), len(jaxpr.outvars)) != (len(equation.invars), len(equation.outvars)):
        raise _not_understood(equation)
    return jaxpr


def _called(equation: JaxprEqn, operands: list[Flow], walk: _Walk) -> list[Flow]:
    return _walk(_body(equation), operands, walk)


def _own_derivative(equation: JaxprEqn, operands: list[Flow], walk: _Walk) -> list[Flow]:
    """A function with a rule of its own for derivatives: the rule may do anything, whatever the function itself does."""
    anything = union(operands).gradient
    return [flow._replace(gradient=anything) for flow in _called(equation, operands, walk)]


def _barrier(equation: JaxprEqn, operands: list[Flow], _: _Walk) -> list[Flow]:
    if len(operands) != len(equation.outvars):
        raise _not_understood(equation)
    return operands


def _conditional(equation: JaxprEqn, operands: list[Flow], walk: _Walk) -> list[Flow]:
    branches = equation.params.get("branches", ())
    ways = (len(operands) - 1, len(equation.outvars))
    if not branches or any((len(branch.jaxpr.invars), len(branch.jaxpr.outvars)) != ways for branch in branches):
        raise _not_understood(equation)
    index, rest = operands[0], operands[1:]
    each = [_walk(branch.jaxpr, rest, walk) for branch in branches]
    return [union([Flow(index.value), *flows]) for flows in zip(*each, strict=True)]


def _scan(equation: JaxprEqn, operands: list[Flow], walk: _Walk) -> list[Flow]:
    jaxpr, (consts, carries) = _body(equation), _scan_layout(equation)
    fixed, start, each = operands[:consts], operands[consts : consts + carries], operands[consts + carries :]
    # A step's results beside the carry are those of the last, widest pass.
    results: list[Flow] = []

    def step(carry: list[Flow]) -> list[Flow]:
        found = _walk(jaxpr, [*fixed, *carry, *each], walk)
        results[:] = found[carries:]
        return found[:carries]

    return _settled(step, start) + results


def _scan_layout(equation: JaxprEqn) -> tuple[int, int]:
    """How many of a scan's operands are constants, and how many are carried; the rest are divided into steps."""
    params = equation.params
    if "num_consts" in params and "num_carry" in params:  # jax 0.10
        consts, carries = params["num_consts"], params["num_carry"]
        each = len(equation.invars) - consts - carries
    else:  # from jax 0.11
        consts, carries, each = (len(part) for part in params["ft_in"].unpack())
    if consts + carries + each != len(equation.invars):
        raise _not_understood(equation)
    body = _body(equation)
    _check_carried(equation, body.invars[consts : consts + carries], body.outvars[:carries])
    return consts, carries


def _check_carried(equation: JaxprEqn, given: Sequence[Any], returned: Sequence[Any]) -> None:
    """What a loop carries has the same shapes and types before and after a step, or its layout was misread."""
    shapes = [[(getattr(v.aval, "shape", None), getattr(v.aval, "dtype", None)) for v in side] for side in (given, returned)]
    if shapes[0] != shapes[1]:
        raise _not_understood(equation)


def _while(equation: JaxprEqn, operands: list[Flow], walk: _Walk) -> list[Flow]:
    names = ("cond_jaxpr", "cond_nconsts", "body_jaxpr", "body_nconsts")
    if not all(name in equation.params for name in names):
        raise _not_understood(equation)
    condition, tested, body, fixed = (equation.params[name] for name in names)
    of_condition, of_body, start = operands[:tested], operands[tested : tested + fixed], operands[tested + fixed :]
    _check_carried(equation, body.jaxpr.invars[fixed:], body.jaxpr.outvars)
    if len(start) != len(equation.outvars):
        raise _not_understood(equation)

    def step(carry: list[Flow]) -> list[Flow]:
        (goes_on,) = _walk(condition.jaxpr, [*of_condition, *carry], walk)
        return [union([flow, Flow(goes_on.value)]) for flow in _walk(body.jaxpr, [*of_body, *carry], walk)]

    return _settled(step, start)


def _settled(step: Callable[[list[Flow]], list[Flow]], carry: list[Flow]) -> list[Flow]:
    """A loop's carry after any number of steps, none included. Sets only grow, and are finite, so this ends."""
    while True:
        grown = [union(pair) for pair in zip(carry, step(carry), strict=True)]
        if grown == carry:
            return carry
        carry = grown


_SUPPORTED = "0.10 to 0.12"
# Operations that hold a program and pass all that they take to all that they return: the program combines single entries, or is a kernel.
_SCATTERS = {f"scatter{mark}{how}" for mark in "-_" for how in ("add", "sub", "mul", "min", "max")}
_WHOLE = {
    "custom_linear_solve",
    "pallas_call",
    "reduce",
    "reduce_window",
    "select_and_scatter",
    "select_and_scatter_add",
    "scatter",
    *_SCATTERS,
}
_CALLS = ("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint", "shard_map")
_RULES: dict[str, Callable[[JaxprEqn, list[Flow], _Walk], list[Flow]]] = {
    **dict.fromkeys(_CALLS, _called),
    **dict.fromkeys(("custom_jvp_call", "custom_vjp_call"), _own_derivative),
    "optimization_barrier": _barrier,
    "cond": _conditional,
    "scan": _scan,
    "while": _while,
}
