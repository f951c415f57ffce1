"""Reading compiled programs: small texts in the compiler's notation, with its traps."""

import itertools
import textwrap

import numpy as np
import pytest

from jaxllm.planning.tpu.groups import groups, mesh_axes
from jaxllm.planning.tpu.hlo import arrays, parse
from jaxllm.planning.tpu.matmul import instruction_flops
from jaxllm.planning.tpu.origins import Origins
from jaxllm.planning.tpu.source import phase_of
from tests.unit.planning.tpu_texts import MESH, cycles, program_of


def loop(condition, increment, start="0", fused=False):
    """A loop around one operation of 10 cycles, as the compiler writes loops."""
    compare = (
        f"""
%fused_compare (a: s32[], b: s32[]) -> pred[] {{
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %c = pred[] compare(%a, %b), direction={condition[0]}
}}
%cond (state: (s32[], f32[8])) -> pred[] {{
  %state = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %n = s32[] constant({condition[1]})
  ROOT %f = pred[] fusion(%i, %n), kind=kLoop, calls=%fused_compare
}}"""
        if fused
        else f"""
%cond (state: (s32[], f32[8])) -> pred[] {{
  %state = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %n = s32[] constant({condition[1]})
  ROOT %c = pred[] compare(%i, %n), direction={condition[0]}
}}"""
    )
    body = f"""
%body (s: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %s = (s32[], f32[8]) parameter(0)
  %j = s32[] get-tuple-element(%s), index=0
  %step = s32[] constant({increment})
  %next = s32[]{{:T(128)}} add(%j, %step)
  %x = f32[8]{{0:T(8,128)S(1)}} get-tuple-element(%s), index=1
  %y = f32[8]{{0}} negate(%x), {cycles(10)}
  ROOT %r = (s32[], f32[8]) tuple(%next, %y)
}}"""
    entry = f"""  %p = f32[8]{{0}} parameter(0)
  %zero = s32[] constant({start})
  %t = (s32[], f32[8]) tuple(%zero, %p)
  %w = (s32[], f32[8]) while(%t), condition=%cond, body=%body
  ROOT %out = f32[8] get-tuple-element(%w), index=1"""
    return program_of(entry, compare + "\n" + body)


@pytest.mark.parametrize(
    ("condition", "increment", "start", "trips"),
    [
        (("LT", 32), 1, "0", 32),
        (("LT", 8), 2, "0", 4),  # a windowed einsum counts by two
        (("LT", 31), 1, "0", 31),  # a scan of 32 layers with one peeled off
        (("LE", 10), 3, "1", 4),
        (("GE", 0), -1, "7", 8),
    ],
)
@pytest.mark.parametrize("fused", [False, True])
def test_trip_counts(condition, increment, start, trips, fused):
    program = loop(condition, increment, start, fused)
    assert program.cycles == 10 * trips
    assert not program.assumed


def test_what_cannot_be_read_of_a_loop_is_said():
    program = program_of(
        """  %p = f32[8]{0} parameter(0)
  %t = (s32[], f32[8]) custom-call(%p), custom_call_target="x"
  %w = (s32[], f32[8]) while(%t), condition=%cond, body=%body
  ROOT %out = f32[8] get-tuple-element(%w), index=1""",
        """
%cond (state: (s32[], f32[8])) -> pred[] {
  %state = (s32[], f32[8]) parameter(0)
  ROOT %b = pred[] custom-call(%state), custom_call_target="y"
}
%body (s: (s32[], f32[8])) -> (s32[], f32[8]) {
  ROOT %s = (s32[], f32[8]) parameter(0)
}""",
    )
    assert "taken to run once" in program.assumed["w"]


def test_a_kernel_over_three_lines_is_one_instruction():
    program = program_of(
        f"""  %p = f32[8]{{0}} parameter(0)
  %k = f32[8]{{0}} custom-call(%p), custom_call_target="tpu_custom_call", metadata={{op_name="jit(step)/jvp()/splash_mqa_fwd"
}}, kernel_metadata={{xprof
  }}}}, stack_frame_id=3
  ROOT %y = f32[8]{{0}} negate(%k), {cycles(10)}"""
    )
    assert program.cycles == 10
    assert [(kernel.name, kernel.phase, kernel.cycles) for kernel in program.kernels] == [("splash_mqa_fwd", "forward", 1000.0)]


def test_the_dearest_branch_counts():
    program = program_of(
        """  %p = f32[8]{0} parameter(0)
  %i = s32[] constant(0)
  ROOT %c = f32[8]{0} conditional(%i, %p, %p), branch_computations={%cheap, %dear}""",
        f"""
%cheap (a: f32[8]) -> f32[8] {{
  %a = f32[8]{{0}} parameter(0)
  ROOT %x = f32[8]{{0}} negate(%a), {cycles(3)}
}}
%dear (b: f32[8]) -> f32[8] {{
  %b = f32[8]{{0}} parameter(0)
  ROOT %y = f32[8]{{0}} negate(%b), {cycles(70)}
}}""",
    )
    assert program.cycles == 70


def test_operations_know_the_python_they_come_from():
    head = textwrap.dedent(
        """
        FileNames
        1 "/x/jaxllm/jax_backend/step.py"
        2 "/x/jaxllm/jax_backend/model/mlp.py"
        3 "/x/jaxllm/jax_backend/model/linear.py"

        FunctionNames
        1 "loss_sum"
        2 "Mlp.__call__"
        3 "Linear.__call__"

        FileLocations
        1 {file_name_id=1 function_name_id=1 line=1 end_line=1 column=1 end_column=1}
        2 {file_name_id=2 function_name_id=2 line=1 end_line=1 column=1 end_column=1}
        3 {file_name_id=3 function_name_id=3 line=1 end_line=1 column=1 end_column=1}

        StackFrames
        1 {file_location_id=1 parent_frame_id=1}
        2 {file_location_id=2 parent_frame_id=2}
        3 {file_location_id=3 parent_frame_id=3}
        """
    )
    name = "jit(step)/transpose(jvp())/while/body/checkpoint/rematted_computation/dot_general"
    program = program_of(
        f"""  %p = f32[8]{{0}} parameter(0)
  ROOT %y = f32[8]{{0}} negate(%p), metadata={{op_name="{name}" stack_frame_id=3}}, {cycles(3)}""",
        head=head,
    )
    (operation,) = program.operations
    assert (operation.source, operation.phase) == ("mlp", "recompute")


def test_phases():
    assert phase_of("jit(step)/jvp()/while/body/dot_general") == "forward"
    assert phase_of("jit(step)/transpose(jvp())/dot_general") == "backward"
    assert phase_of("jit(step)/sub") == "update"


def test_arrays_of_a_type():
    found = arrays("(bf16[2,512]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/f32[]{:T(128)}, s4[3]{0})")
    assert [(each.dtype, each.dims, each.space, each.bytes) for each in found] == [
        ("bf16", (2, 512), 1, 2048),
        ("f32", (), 0, 4),
        ("s4", (3,), 0, 1.5),
    ]


@pytest.mark.parametrize(
    ("attributes", "expected", "axes"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", [(0, 1), (2, 3), (4, 5), (6, 7)], "tensor"),
        ("replica_groups=[4,2]<=[8]", [(0, 1), (2, 3), (4, 5), (6, 7)], "tensor"),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", [(0, 2, 4, 6), (1, 3, 5, 7)], "fsdp"),
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}", [(0, 2, 4, 6), (1, 3, 5, 7)], "fsdp"),
        ("replica_groups=mesh['a'=4,'b'=2] {'a','b'}", [tuple(range(8))], "fsdp+tensor"),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", [(0, 2, 4, 6), (1, 3, 5, 7)], "fsdp"),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", [(0, 1, 2, 3), (4, 5, 6, 7)], "fsdp+tensor"),
        ("replica_groups={}", [tuple(range(8))], "fsdp+tensor"),
        ("source_target_pairs={{0,2},{2,4},{4,6},{6,0}}", [(0, 2), (2, 4), (4, 6), (6, 0)], "fsdp"),
    ],
)
def test_groups_and_the_axes_they_span(attributes, expected, axes):
    found = groups(f"channel_id=1, {attributes}, use_global_device_ids=true", 8)
    assert found == expected
    assert mesh_axes(found, MESH) == axes


def convolution(left, right, out, labels, window):
    text = f"""HloModule m

ENTRY %main (a: f32[1]) -> f32[1] {{
  %a = bf16[{left}]{{0}} parameter(0)
  %b = bf16[{right}]{{0}} parameter(1)
  ROOT %c = bf16[{out}]{{0}} convolution(%a, %b), window={{{window}}}, dim_labels={labels}
}}
"""
    module = parse(text)
    computation = module.computations["main"]
    return instruction_flops(computation["c"], computation)


def test_a_plain_product():
    assert convolution("128,64", "64,32", "128,32", "bf_io->bf", "") == 2 * 128 * 64 * 32


def test_a_batched_product_slides_a_window_over_padding():
    """Batch of 4 as the compiler writes it: one tap of four falls inside for each output."""
    window = "size=4 stride=3 pad=3_3 lhs_dilate=4 rhs_reversal=0"
    found = convolution("8,4,16", "16,4,32", "8,4,32", "b0f_i0o->b0f", window)
    inside = 0
    for output, tap in itertools.product(range(4), range(4)):
        place = output * 3 + tap - 3
        inside += 0 <= place <= 3 * 4 and place % 4 == 0
    assert found == 2 * 8 * 32 * 16 * inside
    assert inside > 0


def test_a_dot():
    module = parse(
        """HloModule m

ENTRY %main (a: f32[4,8]) -> f32[4,2] {
  %a = f32[4,8]{1,0} parameter(0)
  %b = f32[8,2]{1,0} parameter(1)
  ROOT %c = f32[4,2]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
    )
    computation = module.computations["main"]
    assert instruction_flops(computation["c"], computation) == 2 * 4 * 8 * 2


def test_a_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        parse("HloModule empty\n")


def test_taps_agree_with_counting_them():
    random = np.random.default_rng(0)
    for _ in range(20):
        length, outputs, size, stride, dilation = (int(n) for n in random.integers(1, 6, 5))
        padding = int(random.integers(0, 4))
        counted = sum(
            0 <= o * stride + t - padding <= (length - 1) * dilation and (o * stride + t - padding) % dilation == 0
            for o in range(outputs)
            for t in range(size)
        )
        window = f"size={size} stride={stride} pad={padding}_0 lhs_dilate={dilation}"
        assert convolution(f"1,{length},1", f"1,{size},1", f"1,{outputs},1", "b0f_i0o->b0f", window) == 2 * counted


def test_origins_go_through_loops_tuples_and_copies():
    module = parse(
        """HloModule m

%body (s: (s32[], f32[8], f32[8])) -> (s32[], f32[8], f32[8]) {
  %s = (s32[], f32[8], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %kept = f32[8]{0} get-tuple-element(%s), index=1
  %new = f32[8]{0} negate(%kept), metadata={op_name="jit(step)/transpose(jvp())/mul"}
  ROOT %r = (s32[], f32[8], f32[8]) tuple(%i, %kept, %new)
}
%cond (c: (s32[], f32[8], f32[8])) -> pred[] {
  %c = (s32[], f32[8], f32[8]) parameter(0)
  ROOT %k = pred[] constant(false)
}
ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %made = f32[8]{0} negate(%p), metadata={op_name="jit(step)/jvp()/while"}
  %copied = f32[8]{0} copy(%made)
  %zero = s32[] constant(0)
  %t = (s32[], f32[8], f32[8]) tuple(%zero, %copied, %p)
  %w = (s32[], f32[8], f32[8]) while(%t), condition=%cond, body=%body
  ROOT %out = f32[8]{0} get-tuple-element(%w), index=2
}
"""
    )
    origins, names = Origins(module), module.instructions
    assert origins.of(names["kept"])[0].name == "made"
    assert origins.of(names["s"], (1,))[0].name == "made"
    assert origins.of(names["w"], (1,))[0].name == "made"
    assert origins.of(names["out"])[0].name == "w"
    assert origins.of(names["new"])[0].name == "new"
