"""Sets of sources against what functions are known to depend on, and against JAX's own derivatives."""

import collections.abc
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from command_lines import CONFIG
from vffjax.errors import UserError
from vffjax.proofs import dataflow
from vffjax.proofs.dataflow import Flow, flows, members, union

X = jnp.float32(0.3)
N = jnp.int32(3)


def found(f, *arguments):
    """For each output, the numbers of the inputs in its value, real and gradient sets. Nothing is named, so undrawn is value."""
    each = flows(jax.make_jaxpr(f)(*arguments))
    assert all(flow.undrawn == flow.value for flow in each)
    return [tuple(members(part) for part in flow[:3]) for flow in each]


def all_three(*sources):
    return (list(sources),) * 3


# ----------------------------------------------------------------------------------------------------------------------------------
# Single operations


def test_an_operation_passes_what_it_takes_to_what_it_returns():
    assert found(lambda x, y, z: (x * y, jnp.sin(z), x), X, X, X) == [all_three(0, 1), all_three(2), all_three(0)]


def test_constants_and_literals_are_no_sources():
    assert found(lambda x: (x + jnp.ones(3), jnp.zeros(2) + 1.0, 2.0), X) == [all_three(0), all_three(), all_three()]


def test_a_stopped_gradient_is_real_and_no_gradient():
    assert found(lambda x, y: lax.stop_gradient(x) * y, X, X) == [([0, 1], [0, 1], [1])]


def test_a_stop_on_one_path_leaves_another():
    assert found(lambda x: lax.stop_gradient(x) + x, X) == [all_three(0)]


@pytest.mark.parametrize(
    "f",
    [
        lambda x: jnp.round(x).astype(jnp.int32).astype(jnp.float32),
        lambda x: lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.int32), jnp.float32),
        lambda x: jnp.where(x > 0, 1.0, 2.0),
        lambda x: jnp.stack([x, -x]).argmax() * 1.0,
        lambda x: jax.random.categorical(jax.random.key(0), jnp.stack([x, -x])) * 1.0,
        lambda x: jax.random.normal(jax.random.fold_in(jax.random.key(0), x.astype(jnp.int32))),
    ],
    ids=["rounded", "bits", "compared", "argmax", "drawn", "key"],
)
def test_whole_numbers_truth_values_and_keys_pass_values_alone(f):
    assert found(f, X) == [([0], [], [])]
    assert jax.grad(f)(X) == 0


def test_an_input_of_whole_numbers_is_a_source_by_value():
    assert found(lambda n, x: (n * x, n + 1), N, X) == [([0, 1], [1], [1]), ([0], [], [])]


def test_a_table_of_floats_is_real_where_whole_numbers_look_it_up():
    assert found(lambda table, n: table[n], jnp.ones(5), N) == [([0, 1], [0], [0])]


def test_a_barrier_passes_each_operand_to_itself():
    assert found(lambda x, y: lax.optimization_barrier((x, lax.stop_gradient(y))), X, X) == [all_three(0), ([1], [1], [])]


def test_sets():
    assert members(0) == []
    assert members(0b1001010) == [1, 3, 6]
    assert union([Flow(1, 1, 0, 8), Flow(6, 4, 4, 1)]) == Flow(7, 5, 4, 9)
    assert union([]) == Flow()


# ----------------------------------------------------------------------------------------------------------------------------------
# Programs inside programs


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, lambda f: jax.jit(jax.checkpoint(f)), jax.vmap])
def test_calls_are_walked(wrap):
    f = lambda x, y, z: (x * lax.stop_gradient(y), z + 1, z)  # noqa: E731
    x = jnp.ones(2)
    assert found(wrap(f), x, x, x) == [([0, 1], [0, 1], [0]), all_three(2), all_three(2)]


def test_a_shard_is_walked_and_a_sum_over_shards_passes_its_own_operand():
    mesh = jax.make_mesh((1,), ("images",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
    spec = jax.sharding.PartitionSpec

    def f(x, y):
        return lax.psum(x, "images"), lax.psum(lax.stop_gradient(y), "images")

    f = jax.shard_map(f, mesh=mesh, in_specs=(spec("images"),) * 2, out_specs=(spec(),) * 2)
    assert found(f, jnp.ones(1), jnp.ones(1)) == [all_three(0), ([1], [1], [])]


def test_a_choice_joins_its_branches_and_its_predicate_reaches_all_by_value():
    def f(p, x, y):
        return lax.cond(p > 0, lambda x, y: (x, 1.0), lambda x, y: (lax.stop_gradient(y), 2.0), x, y)

    assert found(f, X, X, X) == [([0, 1, 2], [1, 2], [1]), ([0], [], [])]
    assert found(lambda i, x, y: lax.switch(i, [lambda x, y: x, lambda x, y: y, lambda x, y: 1.0], x, y), N, X, X) == [
        ([0, 1, 2], [1, 2], [1, 2])
    ]


def test_all_platforms_branches_count():
    assert found(lambda x, y: lax.platform_dependent(x, y, cpu=lambda x, y: x, default=lambda x, y: y), X, X) == [all_three(0, 1)]


def test_a_scan_passes_through_its_carry_as_often_as_it_takes():
    def step(carry, x):
        a, b, c, d = carry
        return (a, a + b, lax.stop_gradient(b) + c, c), (d, x)

    def f(a, b, c, d, xs):
        return lax.scan(step, (a, b, c, d), xs)

    a, b, c, d, late, each = found(f, X, X, X, X, jnp.ones(5))
    assert (a, b) == (all_three(0), all_three(0, 1))
    assert c == ([0, 1, 2], [0, 1, 2], [2])
    assert d == late == ([0, 1, 2, 3], [0, 1, 2, 3], [2, 3])
    assert each == all_three(4)


def test_a_scan_keeps_constants_carry_and_items_apart():
    def f(scale, start, xs):
        return lax.scan(lambda carry, x: (carry + 1.0, x * scale), start, xs)

    assert found(f, X, X, jnp.ones(5)) == [all_three(1), all_three(0, 2)]


def test_a_stop_inside_a_scan_cuts_the_carry_from_what_came_before():
    def f(x, y):
        return lax.scan(lambda c, _: (lax.stop_gradient(c) * y, None), x, length=2)[0]

    assert found(f, X, X) == [([0, 1], [0, 1], [0, 1])], "the carry itself is returned where the loop has no step"
    assert found(lambda x, y: lax.scan(lambda c, _: (c, lax.stop_gradient(c) * y), x, length=2)[1], X, X) == [([0, 1], [0, 1], [1])]


def test_the_condition_of_a_loop_reaches_all_by_value():
    def f(limit, x, y):
        return lax.while_loop(lambda c: c[0] < limit, lambda c: (c[0] + c[1], 2 * c[1], lax.stop_gradient(c[1])), (x, y, 1.0))

    assert found(f, X, X, X) == [([0, 1, 2], [1, 2], [1, 2]), ([0, 1, 2], [2], [2]), ([0, 1, 2], [2], [])]
    assert found(lambda n, x: lax.fori_loop(0, n, lambda i, x: x * 2, x), N, X) == [([0, 1], [1], [1])]


def test_loops_in_loops():
    def inner(a, b):
        return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[2], c[1]), (0, a, b))[1:]

    def f(a, b, c):
        return jax.jit(lambda a, b, c: lax.scan(lambda abc, _: ((*inner(*abc[:2]), abc[2] * abc[0]), None), (a, b, c), length=3)[0])(
            a, b, c
        )

    assert found(f, X, X, X) == [all_three(0, 1), all_three(0, 1), all_three(0, 1, 2)]


# ----------------------------------------------------------------------------------------------------------------------------------
# Derivatives of one's own


@jax.custom_vjp
def leaky(x, y):
    """Ignores `y`, and detaches `x`; its derivative does neither."""
    return lax.stop_gradient(x) + 0.0 * N


leaky.defvjp(lambda x, y: (leaky(x, y), (x, y)), lambda residuals, g: (g * residuals[1], g * residuals[0]))


@jax.custom_jvp
def leaky_forward(x, y):
    return lax.stop_gradient(x)


@leaky_forward.defjvp
def _(primals, tangents):
    return leaky_forward(*primals), tangents[0] + tangents[1]


@pytest.mark.parametrize("f", [leaky, leaky_forward, jax.jit(leaky), lambda x, y: lax.cond(True, leaky, leaky, x, y)])
def test_a_rule_for_derivatives_may_do_anything(f):
    (found_here,) = found(f, X, X)
    assert found_here == ([0], [0], [0, 1])
    assert all(g != 0 for g in jax.grad(f, (0, 1))(X, X))


def test_a_rule_for_derivatives_carries_only_gradients_that_reach_it():
    assert found(lambda x, y: leaky(lax.stop_gradient(x), y), X, X) == [([0], [0], [1])]
    whole = jax.custom_jvp(lambda x, n: n + 1)
    whole.defjvp(lambda primals, tangents: (whole(*primals), np.zeros((), jax.dtypes.float0)))
    assert found(whole, X, N) == [([1], [], [])]


def test_in_a_gradient_the_backward_rule_is_walked_as_it_stands():
    # d/dx of leaky is y, and so y is what the result is made of; a stop in the forward pass does not hide it.
    assert found(lambda x, y: jax.grad(leaky)(x, y), X, X) == [([1], [1], [1])]
    assert found(jax.grad(lambda x, y: lax.stop_gradient(x) * y * x), X, X) == [([0, 1], [0, 1], [1])]


def test_a_gradient_of_relu_is_cut_by_the_comparison():
    assert found(lambda x, y: jax.nn.relu(x) * y, X, X) == [all_three(0, 1)]
    assert found(lambda x, y: jax.vjp(jax.nn.relu, x)[1](y)[0], X, X) == [([0, 1], [1], [1])]


# ----------------------------------------------------------------------------------------------------------------------------------
# What cannot be walked


def held(name, **params):
    """A function that traces to an equation of this name and these parameters, of two operands and two results."""
    primitive = jax.extend.core.Primitive(name)
    primitive.multiple_results = True
    primitive.def_abstract_eval(lambda *avals, **_: list(avals))
    return lambda x, y: primitive.bind(x, y, **params)


class Layout:
    """How jax 0.11 and later say which operands of a scan are constants, carried, and divided into steps."""

    def __init__(self, *parts):
        self.parts = parts

    def unpack(self):
        return self.parts


class Cases(collections.abc.Mapping):
    """Programs by name; JAX wants parameters that can be hashed."""

    def __init__(self, **cases):
        self.cases = cases

    def __getitem__(self, name):
        return self.cases[name]

    def __iter__(self):
        return iter(self.cases)

    def __len__(self):
        return len(self.cases)

    def __hash__(self):
        return id(self)


TWO = jax.make_jaxpr(lambda x, y: (x, y))(X, X)
WIDE = jax.make_jaxpr(lambda x, y: (jnp.stack([x, y]), y))(X, X)
TEST = jax.make_jaxpr(lambda x, y: x < y)(X, X)
THREE = jax.make_jaxpr(lambda x, y, z: (x, y, z))(X, X, X)


@pytest.mark.parametrize(
    "f",
    [
        *(held(name) for name in ("scan", "cond", "while", "jit", "custom_vjp_call", "custom_jvp_call", "checkpoint", "shard_map")),
        held("jit", jaxpr=THREE),
        held("scan", jaxpr=TWO, length=3),
        held("scan", jaxpr=TWO, ft_in=(1, 1)),
        held("scan", jaxpr=TWO, ft_in=Layout((0,), (0,), (0,))),
        held("cond", branches=(TWO,)),
        held("scan", jaxpr=TWO, num_consts=1, num_carry=2),
        held("scan", jaxpr=WIDE, num_consts=0, num_carry=2),
        held("while", body_jaxpr=TWO, cond_jaxpr=TWO),
        held("while", body_jaxpr=TWO, cond_jaxpr=TEST, body_nconsts=1, cond_nconsts=0),
        held("while", body_jaxpr="a step", cond_jaxpr=TEST, body_nconsts=0, cond_nconsts=0),
    ],
)
def test_a_layout_that_is_not_known_is_an_error_and_no_verdict(f):
    """As after a change of JAX: the name or its parameters are new."""
    with pytest.raises(UserError, match="this JAX is newer than the certificate understands"):
        found(f, X, X)


@pytest.mark.parametrize(
    "f",
    [
        held("repeat_until_settled", jaxpr=TWO),
        held("one_of_many", cases=(TWO,)),
        held("by_name", cases=Cases(first=TWO)),
        jax.lax.composite(lambda x, y: x + y, name="mine.add"),
    ],
)
def test_an_operation_on_programs_that_is_not_known_is_named_and_no_verdict(f):
    with pytest.raises(UserError, match="into which the certificate cannot look; write the rule or the layer without it"):
        found(f, X, X)


def test_a_scan_says_where_its_carry_ends_as_jax_0_10_and_as_jax_0_12_do():
    body = jax.make_jaxpr(lambda fixed, carry: (carry, fixed))(X, X)
    for layout in ({"num_consts": 1, "num_carry": 1}, {"ft_in": Layout((0,), (0,), ())}):
        assert found(held("scan", jaxpr=body, **layout), X, X) == [all_three(1), all_three(0)]


@pytest.mark.slow
def test_the_certificate_of_a_newer_jax_is_one_line(monkeypatch, fails):
    monkeypatch.setitem(dataflow._RULES, "scan", lambda equation, *_: (_ for _ in ()).throw(dataflow._not_understood(equation)))
    fails("locality", CONFIG, "--structure", parts=["this JAX is newer than the certificate understands", "'scan'", "use jax 0.10"])


def test_an_operation_whose_program_combines_entries_passes_all():
    add = lambda x, y: lax.reduce((x, y), (jnp.float32(0),) * 2, lambda a, b: (a[0] + b[0], a[1] + b[1]), (0,))  # noqa: E731
    assert found(add, jnp.ones(3), jnp.ones(3)) == [all_three(0, 1)] * 2
    assert found(lambda x, y: x.at[0].add(y).at[1].set(y).at[2].max(y).at[3].multiply(y), jnp.ones(4), X) == [all_three(0, 1)]
    pooled = lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (2,), (2,), "VALID").sum()  # noqa: E731
    assert found(jax.grad(lambda x: pooled(x) ** 2), jnp.ones(4)) == [all_three(0)]


def test_a_primitive_that_is_only_called_stop_gradient_is_not_trusted():
    primitive = jax.extend.core.Primitive("stop_gradient")
    primitive.def_abstract_eval(lambda aval: aval)
    assert found(primitive.bind, X) == [all_three(0)]


def test_what_is_written_to_a_reference_is_what_may_be_read():
    def f(x, y):
        kept = jax.new_ref(jnp.zeros(()))
        kept[...] = x
        early = kept[...]
        kept[...] += y
        return early, kept[...], x

    early, late, plain = found(f, X, X)
    assert early == all_three(0)
    assert late == all_three(0, 1)
    assert plain == all_three(0)
    assert found(jax.jit(f), X, X) == [all_three(0, 1)] * 3


def test_what_speaks_to_the_host_may_be_heard_from_it():
    said = jax.ShapeDtypeStruct((), jnp.float32)

    def f(x, y):
        jax.experimental.io_callback(lambda x: None, None, x, ordered=True)
        return jax.experimental.io_callback(lambda: np.float32(0), said, ordered=True), y * 2

    assert found(f, X, X) == [all_three(0), all_three(1)]


# ----------------------------------------------------------------------------------------------------------------------------------
# Against JAX's derivatives


def random_program(seed):
    """A function of four scalars to three, of 12 random operations, calls, loops and choices among them."""
    rng = np.random.default_rng(seed)
    plan = [(int(rng.integers(9)), *rng.integers(0, 1000, 3).tolist()) for _ in range(12)]

    def f(*inputs):
        known = list(inputs)
        for kind, i, j, k in plan:
            a, b, c = (known[n % len(known)] for n in (i, j, k))
            known.append(
                [
                    lambda a, b, c: a * b + jnp.sin(c),
                    lambda a, b, c: lax.stop_gradient(a) * jnp.cos(b),
                    lambda a, b, c: jnp.where(a > b, b, c),
                    jax.jit(lambda a, b, c: a - jnp.tanh(c)),
                    lambda a, b, c: lax.scan(lambda s, _: (jnp.sin(s) * b, s), a, length=3)[0] + c,
                    lambda a, b, c: lax.cond(a > 0.1, lambda: b, lambda: lax.stop_gradient(c)),
                    lambda a, b, c: lax.scan(lambda s, _: ((s[1], lax.stop_gradient(s[0]) + b), s[0] * c), (a, b), length=3)[1].sum(),
                    lambda a, b, c: jnp.round(10 * a).astype(jnp.int32) * 0.01 + 0.5 * b,
                    lambda a, b, c: jax.grad(lambda a: jnp.sin(a * b) * lax.stop_gradient(a))(a),
                ][kind](a, b, c)
            )
        return known[-3:]

    return f


@pytest.mark.parametrize("seed", range(6))
def test_no_derivative_is_missed_in_random_programs(seed):
    f = random_program(seed)
    sets = found(f, X, X, X, X)
    jacobian = np.zeros((3, 4))
    for at in ((0.3, -0.2, 0.9, 1.4), (-1.1, 0.4, 0.2, -0.6)):
        jacobian += np.abs(jax.jacobian(lambda x: jnp.stack(f(*x)))(jnp.asarray(at)))
    for row, (value, real, gradient) in zip(jacobian, sets, strict=True):
        assert set(gradient) <= set(real) <= set(value)
        assert set(np.flatnonzero(row)) <= set(gradient)


def test_the_random_programs_can_find_something():
    """Some derivatives are cut, and some sets are smaller than others: the property above is not of empty or full sets alone."""
    sizes = [tuple(map(len, sets)) for seed in range(6) for sets in found(random_program(seed), X, X, X, X)]
    assert any(gradient < real for _, real, gradient in sizes)
    assert any(real < value for value, real, _ in sizes)
    assert {gradient for *_, gradient in sizes} >= {1, 2, 3}


def test_the_sets_of_a_training_step_by_hand():
    """Two dense layers, each on its own loss: as small as it can be, and each path known."""

    def step(w0, w1, x, label):
        loss = lambda w, x: jnp.mean((jnp.tanh(x * w) - label) ** 2)  # noqa: E731
        between = lax.stop_gradient(jnp.tanh(x * w0))
        return w0 - jax.grad(loss)(w0, x), w1 - jax.grad(loss)(w1, between)

    local = functools.partial(found, step)
    assert local(X, X, X, N) == [([0, 2, 3], [0, 2], [0, 2]), ([0, 1, 2, 3], [0, 1, 2], [1])]


def test_what_has_a_known_name_and_is_no_floating_point_is_a_source_of_its_own():
    def program(x, y):
        drawn = checkpoint_name(jnp.argmax(x), "drawn")
        return (
            drawn * 2,
            checkpoint_name(x * 1.5, "drawn"),
            checkpoint_name(jnp.argmax(y), "other"),
            lax.cond(drawn > 0, jnp.sin, jnp.cos, y[0]),
            lax.while_loop(lambda carry: carry[0] < drawn, lambda carry: (carry[0] + 1, carry[1] * 2), (0, y[0]))[1],
        )

    traced = jax.make_jaxpr(jax.jit(program))(jnp.ones(3), jnp.ones(3))
    found = flows(traced, named={"drawn": 2})
    assert [members(flow.undrawn) for flow in found] == [[2], [0], [1], [1, 2], [1, 2]]
    assert [members(flow.value) for flow in found] == [[0], [0], [1], [0, 1], [0, 1]]
    assert [flow.undrawn for flow in flows(traced)] == [flow.value for flow in found]


def test_what_is_no_draw_keeps_its_sources_whatever_its_name():
    def program(x):
        drawn = jax.random.categorical(jax.random.key(0), x).astype(jnp.int16)
        return (
            checkpoint_name(drawn, "drawn"),
            checkpoint_name(drawn[None].astype(jnp.float32).astype(jnp.int32), "drawn"),
            checkpoint_name(jnp.round(x).astype(jnp.int32), "drawn"),
            checkpoint_name(lax.bitcast_convert_type(x, jnp.int32), "drawn"),
            checkpoint_name(jnp.argmax(x) * 2, "drawn"),
            checkpoint_name(jnp.argsort(x), "drawn"),
        )

    found = flows(jax.make_jaxpr(program)(jnp.ones(3)), named={"drawn": 1})
    assert [members(flow.undrawn) for flow in found] == [[1], [0], [0], [0], [0], [0]]


def test_what_is_printed_comes_back_to_no_result():
    def printed(x, y):
        jax.debug.print("{}", x)
        return y * 2

    def f(x, y):
        return lax.cond(y > 0, printed, lambda x, y: y, x, y), lax.scan(lambda c, _: (printed(x, c), None), y, None, length=2)[0]

    assert found(f, X, X) == [all_three(1), all_three(1)]


def test_what_is_told_to_the_host_may_be_heard_from_it_later():
    said = jax.ShapeDtypeStruct((), jnp.float32)

    def f(x, y):
        jax.debug.callback(lambda y: None, y, ordered=True)
        return x + jax.experimental.io_callback(lambda: np.float32(0), said, ordered=True), x * 2

    assert found(f, X, X) == [all_three(0, 1), all_three(0)]
