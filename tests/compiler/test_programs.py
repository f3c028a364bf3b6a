"""Optimised programs are read from XLA's text: what runs, how often, and what it costs."""

import jax
import jax.numpy as jnp
import pytest

from nonlocal_jax.compiler import hlo
from nonlocal_jax.compiler.programs import Collective, Program, cost

# In the form of XLA:TPU's text: a loop of three steps around a product, then a copy and a sum over
# devices. S(1) is the vector memory.
TPU_TEXT = """\
HloModule jit_f, is_scheduled=true

%fused (param_0: bf16[8,16], param_1: bf16[16,32]) -> f32[8,32] {
  %param_0 = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  %param_1 = bf16[16,32]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %convolution.1 = f32[8,32]{1,0:T(8,128)} convolution(%param_0, %param_1),dim_labels=bf_io->bf
}

%body (arg: STATE) -> STATE {
  %arg = STATE parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %x = bf16[8,16]{1,0:T(8,128)(2,1)} get-tuple-element(%arg), index=1
  %w = bf16[16,32]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%arg), index=2
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  %fusion.1 = f32[8,32]{1,0:T(8,128)} fusion(%x, %w), calls=%fused,config={"estimated_cycles":"100"}
  ROOT %result = STATE tuple(%next, %x, %w, %fusion.1)
}

%condition (arg.1: STATE) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  %arg.1 = STATE parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}

ENTRY %main (x.1: bf16[8,16], w.1: bf16[16,32]) -> f32[8,32] {
  %x.1 = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  %w.1 = bf16[16,32]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %start = s32[]{:T(128)} constant(2)
  %copy.1 = s32[]{:T(128)} copy(%start)
  %zeros = f32[8,32]{1,0:T(8,128)S(1)} broadcast(%start), dimensions={}
  %state = STATE tuple(%copy.1, %x.1, %w.1, %zeros)
  %while.1 = STATE while(%state), condition=%condition, body=%body
  %y = f32[8,32]{1,0:T(8,128)} get-tuple-element(%while.1), index=3
  %copy.2 = f32[8,32]{0,1:T(8,128)} copy(%y), backend_config={"estimated_cycles":"7"}
  %sort.1 = f32[8,32]{0,1:T(8,128)} sort(%copy.2), dimensions={0}
  ROOT %all-reduce.1 = f32[8,32]{0,1:T(8,128)} all-reduce(%sort.1), replica_groups={{0,1}}
}
""".replace("STATE", "(s32[], bf16[8,16]{1,0}, bf16[16,32]{1,0}, f32[8,32]{1,0})")


@pytest.fixture(scope="module")
def program():
    return Program(TPU_TEXT)


def test_cycles_are_multiplied_by_the_trips_of_loops(program):
    assert program.cycles_by_kind() == {"products": 3 * 100, "copies": 7}
    assert program.unestimated() == 1  # the sort


def test_trips_that_the_compiler_states_need_no_condition():
    stated = 'condition=%fused, backend_config={"known_trip_count":{"n":"3"}}'
    program = Program(TPU_TEXT.replace("condition=%condition", stated))
    assert program.flops() == 3 * 2 * 8 * 16 * 32


def test_flops(program):
    assert program.flops() == 3 * 2 * 8 * 16 * 32


def test_collectives(program):
    assert program.collectives() == (Collective("all-reduce", 1, 4 * 8 * 32),)


def test_a_collective_that_is_split_among_fusions_counts_once():
    text = """
%first (p: bf16[2,4]) -> STATE {
  %p = bf16[2,4]{1,0} parameter(0)
  %all-gather.1 = bf16[8,4]{1,0} all-gather(%p), dimensions={0}
  ROOT %start = STATE custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%last (p.1: bf16[2,4], state: STATE) -> bf16[8,4] {
  %p.1 = bf16[2,4]{1,0} parameter(0)
  %state = STATE parameter(1)
  %all-gather.2 = bf16[8,4]{1,0} all-gather(%p.1), dimensions={0}
  ROOT %done = bf16[8,4]{1,0} custom-call(%all-gather.2), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (x: bf16[2,4]) -> bf16[8,4] {
  %x = bf16[2,4]{1,0} parameter(0)
  %fusion.1 = STATE fusion(%x), kind=kCustom, calls=%first
  ROOT %fusion.2 = bf16[8,4]{1,0} fusion(%x, %fusion.1), kind=kCustom, calls=%last
}
""".replace("STATE", "(bf16[8,4]{1,0}, u32[])")
    assert Program(text).collectives() == (Collective("all-gather", 1, 2 * 8 * 4),)


def test_traffic_leaves_out_the_vector_memory(program):
    x_bytes, y_bytes, scalar = 2 * 8 * 16, 4 * 8 * 32, 4
    each_step = x_bytes + y_bytes + 3 * scalar  # and the counter
    # The first counter and what fills the zeros, then a copy, a sort and a sum over devices.
    assert program.traffic() == 3 * each_step + 3 * scalar + 3 * 2 * y_bytes


def test_cost_of_a_real_program():
    x = jnp.ones((16, 16))
    compiled = jax.jit(lambda x: jax.lax.fori_loop(0, 4, lambda i, y: y @ x, x)).lower(x).compile()
    report = cost(compiled)
    assert Program(compiled.as_text()).flops() == 4 * 2 * 16**3
    assert report.cycles == 0  # XLA:CPU estimates none
    assert report.arguments == 2 * 4 * 16 * 16
    assert report.temporary == compiled.memory_analysis().temp_size_in_bytes


def test_products_of_batches_count_one_tap_for_each_result():
    """XLA:TPU writes 8 products of 16×32 and 32×64 as one dilated convolution over the samples."""
    line = (
        "  %c = f32[8,16,64]{2,1,0} convolution(%a, %b), "
        "window={size=8 stride=7 pad=0_0 lhs_dilate=8}, dim_labels=0bf_0io->0bf"
    )
    flops = 2 * hlo.multiplications(hlo.parse(line), "bf16[8,16,32]{2,1,0}", "bf16[8,32,64]{2,1,0}")
    assert flops == 8 * 2 * 16 * 32 * 64


def test_taps_on_padding_are_left_out():
    line = (
        "  %c = f32[1,4,1]{2,1,0} convolution(%a, %b), window={size=3 pad=1_1}, "
        "dim_labels=b0f_0io->b0f"
    )
    assert hlo.multiplications(hlo.parse(line), "f32[1,4,1]", "f32[3,1,1]") == 2 + 3 + 3 + 2


def test_traffic_of_a_fused_reduction_of_two_arrays():
    text = """\
%fused (param_0: f32[8,4]) -> (f32[8], s32[8]) {
  %param_0 = f32[8,4]{1,0} parameter(0)
  %iota = s32[8,4]{1,0} iota(), iota_dimension=1
  %low = f32[] constant(0)
  %zero = s32[] constant(0)
  ROOT %reduce = (f32[8]{0}, s32[8]{0}) reduce(%param_0, %iota, %low, %zero), dimensions={1}
}

ENTRY %main (x: f32[8,4]) -> (f32[8], s32[8]) {
  %x = f32[8,4]{1,0} parameter(0)
  ROOT %fusion = (f32[8]{0}, s32[8]{0}) fusion(%x), kind=kLoop, calls=%fused
}
"""
    assert Program(text).traffic() == 4 * 8 * 4 + 2 * 4 * 8
