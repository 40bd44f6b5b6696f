"""Finds what each output of a traced program depends on, by evaluating its jaxpr on sets of sources in the place of arrays.

The analysis trusts three facts: no derivative passes `stop_gradient`; no derivative passes a result that is not floating point; and an
optimization barrier returns each operand unchanged. Every other operation is assumed to pass all its inputs to all its outputs. Calls,
loops and conditions are entered. The analysis may therefore report a dependence that does not exist, but it misses none that exists,
unless data passes through the host without JAX knowing it.

The layout of a loop's jaxpr differs between versions of JAX. An equation that contains a program in an unknown layout raises `UserError`.
Assuming that everything in it reaches everything would report a leak of gradients that may not exist.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jax.extend.core.primitives import stop_gradient_p

from vffjax.errors import UserError


class Flow(NamedTuple):
    """The sources on which one array depends, as four sets. A set is an integer in which source `i` is the bit `1 << i`.

    Attributes:
        value: the array depends on these sources in any way.
        real: it depends on them by a path on which everything is floating point.
        gradient: such a path has no `stop_gradient` on it. A derivative can follow only these paths, though perhaps not all of them.
        undrawn: like value, but an array that was `named` hides what it was computed from, and is a source itself.
        choice: no set, but whether each number of the array is the place of a largest entry (`argmax`), as a draw of labels is.
    """

    value: int = 0
    real: int = 0
    gradient: int = 0
    undrawn: int = 0
    choice: bool = False


NOTHING = Flow()
Named = Mapping[str, int]  # names given by `checkpoint_name`, and the sources that they stand for


class _Walk(NamedTuple):
    """The state of one analysis."""

    named: Named
    # Results of inner programs by program and inputs. The same program occurs again, for instance in every turn of a loop.
    walked: dict[tuple[int, tuple[Flow, ...]], list[Flow]]


def flows(program: ClosedJaxpr, named: Named | None = None) -> list[Flow]:
    """Finds the sources of every output of a program.

    Each input is a source. One that is not floating point is a source of values only. Constants are not sources.

    Args:
        program: a traced program, such as that of `jax.make_jaxpr`.
        named: arrays in the program that are sources themselves in the set `undrawn`. There, an array that
            `jax.ad_checkpoint.checkpoint_name` gave one of these names, and that consists of places of largest entries, depends on this
            source instead of those from which it was computed. Other arrays keep their sources, whatever their name.

    Returns:
        The flow of each flattened output.

    Raises:
        UserError: this version of JAX lays programs out in an unknown way, or the program uses an operation on programs that is not known.

    >>> program = jax.make_jaxpr(lambda x, y: x * jax.lax.stop_gradient(y))(1.0, 2.0)
    >>> (flow,) = flows(program)
    >>> members(flow.value), members(flow.gradient)
    ([0, 1], [0])
    """
    inputs = [_onto(variable, Flow(1 << i, 1 << i, 1 << i, 1 << i)) for i, variable in enumerate(program.jaxpr.invars)]
    return _walk(program.jaxpr, inputs, _Walk(named or {}, {}))


def members(sources: int) -> list[int]:
    """The numbers of the sources in a set, in order.

    >>> members(0b101)
    [0, 2]
    """
    return [i for i in range(sources.bit_length()) if sources >> i & 1]


def union(parts: Iterable[Flow]) -> Flow:
    """The flow of an array that depends on all the parts."""
    value = real = gradient = undrawn = 0
    for part in parts:
        value, real, gradient, undrawn = value | part.value, real | part.real, gradient | part.gradient, undrawn | part.undrawn
    return Flow(value, real, gradient, undrawn)


def _values(flow: Flow) -> Flow:
    """The flow without its real paths and gradients."""
    return Flow(value=flow.value, undrawn=flow.undrawn, choice=flow.choice)


def _floating(variable: Any) -> bool:
    # The dtype of a random key is not a number, and a token has no dtype.
    dtype = getattr(variable.aval, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.inexact)


def _onto(variable: Any, flow: Flow) -> Flow:
    """The flow that a variable receives: integers, booleans and random keys carry neither real paths nor gradients."""
    return flow if _floating(variable) else _values(flow)


def _walk(jaxpr: Jaxpr, inputs: Sequence[Flow], walk: _Walk) -> list[Flow]:
    place = id(jaxpr), tuple(inputs)  # the outer program keeps the inner ones alive, so no id is used twice
    if place not in walk.walked:
        walk.walked[place] = _outputs(jaxpr, inputs, walk)
    return walk.walked[place]


def _outputs(jaxpr: Jaxpr, inputs: Sequence[Flow], walk: _Walk) -> list[Flow]:
    known = dict(zip(jaxpr.invars, inputs, strict=True))
    # An operation with an effect may influence every later operation with an effect: by a reference or through the host.
    world = NOTHING

    def read(atom: Any) -> Flow:
        return NOTHING if isinstance(atom, Literal) else known.get(atom, NOTHING)

    for equation in jaxpr.eqns:
        operands = [read(atom) for atom in equation.invars]
        if _has_effect(equation):
            world = union([world, *operands])
            found = [world] * len(equation.outvars)
            # The operation may have written to a reference among its operands.
            known.update({atom: union([read(atom), world]) for atom in equation.invars if not isinstance(atom, Literal)})
        else:
            found = _through(equation, operands, walk)
            if any(type(effect).__name__ in _PRINTS for effect in equation.effects):  # which a later operation may hear from the host
                world = union([world, *operands])
        known.update({variable: _onto(variable, flow) for variable, flow in zip(equation.outvars, found, strict=True)})
    return [read(atom) for atom in jaxpr.outvars]


def _has_effect(equation: JaxprEqn) -> bool:
    # JAX lists the use of a mapped axis's name among the effects, but it has none. What prints returns nothing to the program.
    return any(type(effect).__name__ not in ("NamedAxisEffect", *_PRINTS) for effect in equation.effects)


def _through(equation: JaxprEqn, operands: list[Flow], walk: _Walk) -> list[Flow]:
    """The flow of each output of an equation without effects."""
    if equation.primitive is stop_gradient_p:
        return [flow._replace(gradient=0) for flow in operands]
    if equation.primitive.name == "argmax":
        return [union(operands)._replace(choice=True)]
    if equation.primitive.name in _REARRANGES and len(operands) == 1:
        return [operands[0]._replace(choice=operands[0].choice and not _floating(equation.outvars[0]))]
    if equation.primitive.name == "name":
        number = walk.named.get(equation.params.get("name", ""))
        return [operands[0] if number is None or not operands[0].choice else _values(operands[0])._replace(undrawn=1 << number)]
    rule = _RULES.get(equation.primitive.name)
    if rule:
        try:
            found = rule(equation, operands, walk)
            if len(found) != len(equation.outvars):
                raise ValueError("other results than the rule found")
            return found
        except (ValueError, AttributeError, KeyError, TypeError, IndexError) as error:  # its parameters are not those that the rule expects
            raise _not_understood(equation) from error
    if equation.primitive.name not in _WHOLE and any(map(_programs, equation.params.values())):
        problem = f"it uses '{equation.primitive.name}', into which the certificate cannot look"
        raise UserError(f"the traced program: {problem}; write the rule or the layer without it")
    return [union(operands)] * len(equation.outvars)


def _programs(value: Any) -> bool:
    """Whether a parameter of an equation is a program or contains one."""
    if isinstance(value, Mapping):
        value = list(value.values())
    return any(map(_programs, value)) if isinstance(value, tuple | list) else hasattr(value, "eqns") or hasattr(value, "jaxpr")


def _not_understood(equation: JaxprEqn) -> UserError:
    problem = f"the traced program has an equation '{equation.primitive.name}' in a layout that is not known"
    return UserError(f"jax {jax.__version__}: this JAX is newer than the certificate understands ({problem}); use jax {_SUPPORTED}")


def _body(equation: JaxprEqn) -> Jaxpr:
    """The program that an equation calls."""
    inner = [equation.params[name] for name in ("jaxpr", "call_jaxpr") if name in equation.params]
    if len(inner) != 1 or not isinstance(inner[0], ClosedJaxpr | Jaxpr):
        raise _not_understood(equation)
    return inner[0].jaxpr if isinstance(inner[0], ClosedJaxpr) else inner[0]


def _called(equation: JaxprEqn, operands: list[Flow], walk: _Walk) -> list[Flow]:
    return _walk(_body(equation), operands, walk)


def _own_derivative(equation: JaxprEqn, operands: list[Flow], walk: _Walk) -> list[Flow]:
    """A function with a custom derivative. The derivative may depend on any operand, whatever the function itself does."""
    anything = union(operands).gradient
    return [flow._replace(gradient=anything) for flow in _called(equation, operands, walk)]


def _conditional(equation: JaxprEqn, operands: list[Flow], walk: _Walk) -> list[Flow]:
    index, rest = operands[0], operands[1:]
    each = [_walk(branch.jaxpr, rest, walk) for branch in equation.params["branches"]]
    return [union([_values(index), *flows]) for flows in zip(*each, strict=True)]


def _scan(equation: JaxprEqn, operands: list[Flow], walk: _Walk) -> list[Flow]:
    jaxpr, (consts, carries) = _body(equation), _scan_layout(equation)
    fixed, start, each = operands[:consts], operands[consts : consts + carries], operands[consts + carries :]
    # The results of a step that are not carried. The last pass has the largest sets, which hold for all steps.
    results: list[Flow] = []

    def step(carry: list[Flow]) -> list[Flow]:
        found = _walk(jaxpr, [*fixed, *carry, *each], walk)
        results[:] = found[carries:]
        return found[:carries]

    return _settled(step, start) + results


def _scan_layout(equation: JaxprEqn) -> tuple[int, int]:
    """The numbers of constant and of carried operands of a scan. The other operands have one slice for each step."""
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
    """Raises `UserError` if the shapes or dtypes that a loop carries change in a step: then its layout was misread."""
    shapes = [[(getattr(v.aval, "shape", None), getattr(v.aval, "dtype", None)) for v in side] for side in (given, returned)]
    if shapes[0] != shapes[1]:
        raise _not_understood(equation)


def _while(equation: JaxprEqn, operands: list[Flow], walk: _Walk) -> list[Flow]:
    names = ("cond_jaxpr", "cond_nconsts", "body_jaxpr", "body_nconsts")
    condition, tested, body, fixed = (equation.params[name] for name in names)
    of_condition, of_body, start = operands[:tested], operands[tested : tested + fixed], operands[tested + fixed :]
    _check_carried(equation, body.jaxpr.invars[fixed:], body.jaxpr.outvars)

    def step(carry: list[Flow]) -> list[Flow]:
        (goes_on,) = _walk(condition.jaxpr, [*of_condition, *carry], walk)
        return [union([flow, _values(goes_on)]) for flow in _walk(body.jaxpr, [*of_body, *carry], walk)]

    return _settled(step, start)


def _settled(step: Callable[[list[Flow]], list[Flow]], carry: list[Flow]) -> list[Flow]:
    """The flows that a loop carries after any number of steps, including none. This ends, because the sets are finite and only grow."""
    while True:
        grown = [union(pair) for pair in zip(carry, step(carry), strict=True)]
        if grown == carry:
            return carry
        carry = grown


# What changes the shape or the type of an array and no number in it.
_REARRANGES = ("broadcast_in_dim", "convert_element_type", "copy", "reshape", "squeeze")
_SUPPORTED = "0.10 to 0.12"
_PRINTS = ("DebugEffect", "OrderedDebugEffect")  # the effects of `jax.debug.print` and `jax.debug.callback`
# Operations whose inner program need not be entered, because it only combines single entries or is a kernel. All inputs reach all outputs.
_SCATTERS = {"scatter", *(f"scatter{mark}{how}" for mark in "-_" for how in ("add", "sub", "mul", "min", "max"))}
_WHOLE = _SCATTERS | {"custom_linear_solve", "pallas_call", "reduce", "reduce_window", "select_and_scatter", "select_and_scatter_add"}
_CALLS = ("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint", "shard_map")
_RULES: dict[str, Callable[[JaxprEqn, list[Flow], _Walk], list[Flow]]] = {
    **dict.fromkeys(_CALLS, _called),
    **dict.fromkeys(("custom_jvp_call", "custom_vjp_call"), _own_derivative),
    "optimization_barrier": lambda equation, operands, walk: operands,
    "cond": _conditional,
    "scan": _scan,
    "while": _while,
}
