"""The reader of compiled programs, on small programs of this machine's compiler and on lines as compilers of GPUs and TPUs write them."""

import jax
import jax.numpy as jnp
import pytest

from vffjax.costs.program_text import Program

# What compilers write, cut down: a loop of 7 rounds with a convolution by cuDNN, a fusion, a copy and what devices tell each other.
GPU = """HloModule jit_segment, is_scheduled=true

%fused (p: f32[4,8]) -> f32[4,8] {
  %p = f32[4,8]{1,0} parameter(0)
  %inner = f32[4,8]{0,1} copy(%p)
  ROOT %twice = f32[4,8]{1,0} add(%inner, %inner)
}

%body (state: (s32[], bf16[2,6,6,3])) -> (s32[], bf16[2,6,6,3]) {
  %state = (s32[], bf16[2,6,6,3]{3,2,1,0}, /*index=2*/bf16[4,3,3,3]{3,2,1,0}) parameter(0)
  %x = bf16[2,6,6,3]{3,2,1,0} get-tuple-element(%state), index=1
  %k = bf16[4,3,3,3]{3,2,1,0} get-tuple-element(%state), index=2
  %conv.1 = (bf16[2,6,6,4]{3,2,1,0}, u8[0]{0}) custom-call(%x, %k), dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$conv"
  %kernel.1 = f32[4,8]{1,0} fusion(%x), kind=kLoop, calls=%fused
  %copy.1 = f32[4,8]{1,0} copy(%kernel.1)
  %sum-start = (f32[4,8]{1,0}, bf16[16]{0}) all-reduce-start(%copy.1, %x), channel_id=1, replica_groups=[1,4]<=[4], to_apply=%add
  %sum-done = (f32[4,8]{1,0}, bf16[16]{0}) all-reduce-done(%sum-start)
  %rows-start = (f32[2,8]{1,0}, f32[8,8]{1,0}) all-gather-start(%kernel.1), channel_id=2, dimensions={0}
  %rows-done = f32[8,8]{1,0} all-gather-done(%rows-start)
  %loss-start = ((f32[3]{0}), f32[3]{0}) all-reduce-start(%kernel.1), channel_id=3, to_apply=%add
  %loss-done = f32[3]{0} all-reduce-done(%loss-start)
  ROOT %out = (s32[], bf16[2,6,6,3]{3,2,1,0}) tuple(%state, %x)
}

%condition (state: (s32[], bf16[2,6,6,3])) -> pred[] {
  %state.1 = (s32[], bf16[2,6,6,3]{3,2,1,0}) parameter(0)
  ROOT %less = pred[] compare(%state.1, %state.1), direction=LT
}

ENTRY %main (a: (s32[], bf16[2,6,6,3])) -> (s32[], bf16[2,6,6,3]) {
  %a = (s32[], bf16[2,6,6,3]{3,2,1,0}) parameter(0)
  %first = f32[4,8]{1,0} copy(%a)
  ROOT %loop = (s32[], bf16[2,6,6,3]{3,2,1,0}) while(%a), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"7"}}
}
"""
TPU = """HloModule jit_step, is_scheduled=true

%fused.1 (p.0: bf16[2,6,6,3], p.1: f32[3,3,3,4]) -> bf16[2,6,6,4] {
  %p.0 = bf16[2,6,6,3]{3,0,2,1:T(8,128)(2,1)} parameter(0)
  %p.1 = f32[3,3,3,4]{3,2,1,0:T(8,128)} parameter(1)
  ROOT %convolution.1 = bf16[2,6,6,4]{3,0,2,1:T(8,128)(2,1)S(1)} convolution(%p.0, %p.1), dim_labels=b01f_01io->b01f
}

ENTRY %main (a: bf16[2,6,6,3], b: f32[3,3,3,4]) -> bf16[2,6,6,4] {
  %a = bf16[2,6,6,3]{3,0,2,1:T(8,128)(2,1)} parameter(0)
  %b = f32[3,3,3,4]{3,2,1,0:T(8,128)} parameter(1)
  %product = f32[3,3]{1,0:T(8,128)} convolution(%b, %b), dim_labels=bf_io->bf, backend_config={"estimated_cycles":"30"}
  %start = (bf16[2,6,6,3]{3,0,2,1:T(8,128)(2,1)S(1)}, bf16[2,6,6,3]{3,0,2,1:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%a)
  %done = bf16[2,6,6,3]{3,0,2,1:T(8,128)(2,1)S(1)} copy-done(%start)
  ROOT %fusion.1 = bf16[2,6,6,4]{3,0,2,1} fusion(%done, %b), kind=kOutput, calls=%fused.1, backend_config={"estimated_cycles":"12"}
}
"""


def test_a_loop_counts_as_often_as_it_runs_and_its_round_once():
    whole, once = Program(GPU), Program(GPU).round()
    assert whole.loops() == [("body", 7)]
    assert once.launches() == {"kernels": 1, "library_calls": 1, "copies": 1, "collectives": 3, "all": 6}
    # The copy before the loop is one more; the copy within the fusion is a part of its kernel.
    assert whole.launches() == {"kernels": 7, "library_calls": 7, "copies": 8, "collectives": 21, "all": 43}
    assert (once.copied_bytes(), whole.copied_bytes()) == (4 * 8 * 4, 8 * 4 * 8 * 4)


def test_convolutions_are_read_with_the_type_of_their_operands_and_their_layout():
    assert Program(GPU).round().convolutions() == {"bf16 b01f_o01i->b01f {3,2,1,0}": 1}
    # A product of matrices is none, and one operand in float32 is said.
    assert Program(TPU).convolutions() == {"bf16+f32 b01f_01io->b01f {3,0,2,1}": 1}


def test_what_devices_tell_each_other_is_counted_by_kind_and_type():
    assert Program(GPU).round().collectives() == {
        "all-gather f32": {"count": 1, "bytes": 8 * 8 * 4},
        "all-reduce bf16": {"count": 1, "bytes": 16 * 2},
        "all-reduce f32": {"count": 2, "bytes": 4 * 8 * 4 + 3 * 4},
    }
    assert Program(TPU).collectives() == {}


def test_a_copy_that_starts_and_ends_is_one_and_cycles_are_added():
    assert Program(TPU).launches() == {"kernels": 2, "library_calls": 0, "copies": 1, "collectives": 0, "all": 3}
    assert Program(TPU).copied_bytes() == 2 * 6 * 6 * 3 * 2
    assert (Program(TPU).cycles(), Program(GPU).cycles()) == (42, None)


def test_a_text_without_a_program_or_a_loop_is_refused():
    with pytest.raises(ValueError, match="no computation"):
        Program("nothing")
    with pytest.raises(ValueError, match="no loop"):
        Program(TPU).round()


def compiled(function, *shapes):
    return Program(jax.jit(function).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).compile().as_text())


def test_sorts_and_calls_of_the_host_are_seen_in_a_real_program():
    def harmless(x):
        return jnp.sin(x) + 1

    def sorts(x):
        return jnp.sort(harmless(x))

    def calls(x):
        return jax.pure_callback(lambda v: v, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    assert (compiled(harmless, (5, 7)).sorts(), compiled(harmless, (5, 7)).host_calls()) == ([], [])
    assert compiled(sorts, (5, 7)).sorts() == [35]
    assert len(compiled(calls, (5, 7)).host_calls()) == 1


def test_a_loop_of_a_real_program_has_its_rounds():
    def scanned(x, xs):
        return jax.lax.scan(lambda c, v: (jnp.tanh(c @ v), None), x, xs)[0]

    program = compiled(scanned, (4, 4), (9, 4, 4))
    assert [rounds for _, rounds in program.loops()] == [9]
    assert 0 < program.round().launches()["all"] < program.launches()["all"]
