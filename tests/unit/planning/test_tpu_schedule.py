"""Communication in compiled programs: what waits, what runs beside the work, and whose links it needs."""

import pytest

from jaxllm.planning.tpu.program import Program
from tests.unit.planning.tpu_texts import cycles, program_of


def test_an_asynchronous_collective_hides_behind_what_is_scheduled_before_its_end():
    def entry(between):
        return f"""  %p = f32[8]{{0}} parameter(0)
  %s = (f32[8]{{0}}, f32[32]{{0}}) all-gather-start(%p), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={{0}}
  %y = f32[8]{{0}} negate(%p), {cycles(between)}
  %d = f32[32]{{0}} all-gather-done(%s)
  ROOT %z = f32[8]{{0}} slice(%d), {cycles(1)}"""

    (hidden,) = program_of(entry(5000)).collectives
    (partly,) = program_of(entry(400)).collectives
    assert (hidden.kind, hidden.axes, hidden.size, hidden.exposed) == ("all-gather", "fsdp", 128, 0.0)
    assert partly.exposed == 600


def test_two_collectives_share_their_links():
    program = program_of(
        f"""  %p = f32[8]{{0}} parameter(0)
  %a = (f32[8]{{0}}, f32[32]{{0}}) all-gather-start(%p), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={{0}}
  %b = (f32[8]{{0}}, f32[32]{{0}}) all-gather-start(%p), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={{0}}
  %y = f32[8]{{0}} negate(%p), {cycles(1500)}
  %c = f32[32]{{0}} all-gather-done(%a)
  ROOT %d = f32[32]{{0}} all-gather-done(%b)"""
    )
    assert [each.exposed for each in program.collectives] == [0.0, 500.0]


def test_the_core_waits_for_a_synchronous_collective_once():
    """Three in a row, and one that runs beside the work: the clock goes on while the core waits."""
    gather = "all-gather(%p), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}"
    program = program_of(
        f"""  %p = f32[8]{{0}} parameter(0)
  %a = f32[32]{{0}} {gather}
  %b = f32[32]{{0}} {gather}
  %f = f32[8]{{0}} fusion(%p), kind=kCustom, calls=%all-reduce-scatter, {cycles(30)}
  %s = (f32[8]{{0}}, f32[32]{{0}}) all-gather-start(%p), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={{0}}
  %y = f32[8]{{0}} negate(%p), {cycles(400)}
  ROOT %d = f32[32]{{0}} all-gather-done(%s)""",
        """
%all-reduce-scatter (q: f32[32]) -> f32[8] {
  %q = f32[32]{0} parameter(0)
  %r = f32[32]{0} all-reduce(%q), replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%add
  %i = s32[] constant(0)
  ROOT %cut = f32[8]{0} dynamic-slice(%r, %i), dynamic_slice_sizes={8}
}""",
    )
    assert [each.exposed for each in program.collectives] == [1000.0, 1000.0, 970.0, 600.0]
    assert program.clock == program.total_cycles == 4000.0


def test_a_program_whose_parts_do_not_add_up_is_not_believed(monkeypatch):
    monkeypatch.setattr(Program, "total_cycles", 20.0)
    with pytest.raises(RuntimeError, match="the schedule takes 10 cycles, but its parts add up to 20"):
        program_of(f"  ROOT %y = f32[8]{{0}} negate(%p), {cycles(10)}")


def gathering(call):
    """Computations for another core: `outer`, which comes to the all-gather of `inner` by `call`."""
    return f"""
%inner (q: f32[8]) -> f32[32] {{
  %q = f32[8]{{0}} parameter(0)
  ROOT %g = f32[32]{{0}} all-gather(%q), replica_groups={{{{0,2,4,6}},{{1,3,5,7}}}}, dimensions={{0}}
}}
%outer (o: f32[8]) -> f32[32] {{
  %o = f32[8]{{0}} parameter(0)
  ROOT %c = f32[32]{{0}} {call}
}}"""


def test_a_collective_on_another_core_is_found_through_its_calls():
    program = program_of(
        f"""  %p = f32[8]{{0}} parameter(0)
  %s = ((f32[8]{{0}}), f32[32]{{0}}) async-start(%p), async_execution_thread="sparsecore", calls=%outer
  %y = f32[8]{{0}} negate(%p), {cycles(400)}
  ROOT %d = f32[32]{{0}} async-done(%s)""",
        gathering("call(%o), to_apply=%inner"),
    )
    (found,) = program.collectives
    assert (found.kind, found.axes, found.exposed) == ("all-gather", "fsdp", 600.0)


def test_a_sparse_core_begins_when_it_gets_its_operands():
    """It is started early and without any; `async-update` hands them over, `async-done` waits for that."""
    program = program_of(
        f"""  %p = f32[8]{{0}} parameter(0)
  %s = ((), (), (s32[8]{{0}})) async-start(), async_execution_thread="sparsecore", calls=%outer
  %y = f32[8]{{0}} negate(%p), {cycles(5000)}
  %u = ((f32[8]{{0}}), f32[32]{{0}}, (s32[8]{{0}})) async-update(%s, %y)
  %z = f32[8]{{0}} negate(%y), {cycles(400)}
  ROOT %d = f32[32]{{0}} async-done(%u)""",
        gathering('custom-call(%o), custom_call_target="name", called_computations={%inner}'),
    )
    (found,) = program.collectives
    assert (found.kind, found.axes, found.size, found.exposed) == ("all-gather", "fsdp", 128, 600.0)


def test_an_update_of_what_runs_already_is_waited_for_under_its_name():
    program = program_of(
        f"""  %p = f32[8]{{0}} parameter(0)
  %s = ((f32[8]{{0}}), f32[32]{{0}}) async-start(%p), async_execution_thread="sparsecore", calls=%inner
  %y = f32[8]{{0}} negate(%p), {cycles(300)}
  %u = ((f32[8]{{0}}), f32[32]{{0}}) async-update(%s)
  %z = f32[8]{{0}} negate(%y), {cycles(300)}
  ROOT %d = f32[32]{{0}} async-done(%u)""",
        """
%inner (q: f32[8]) -> f32[32] {
  %q = f32[8]{0} parameter(0)
  ROOT %g = f32[32]{0} all-gather(%q), replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}
}""",
    )
    assert [each.exposed for each in program.collectives] == [400.0]


def test_a_reduction_that_is_cut_up_in_its_fusion_is_a_reduce_scatter():
    program = program_of(
        """  %p = f32[32]{0} parameter(0)
  ROOT %f = f32[8]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter""",
        """
%all-reduce-scatter (q: f32[32]) -> f32[8] {
  %q = f32[32]{0} parameter(0)
  %r = f32[32]{0} all-reduce(%q), replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%add
  %i = s32[] constant(0)
  ROOT %cut = f32[8]{0} dynamic-slice(%r, %i), dynamic_slice_sizes={8}
}""",
    )
    (found,) = program.collectives
    assert (found.kind, found.axes, found.size, found.exposed) == ("reduce-scatter", "fsdp", 128, 1000.0)


def test_copies_to_the_host_are_transfers_and_prefetches_are_not():
    program = program_of(
        """  %p = f32[8]{0} parameter(0)
  %a = (f32[8]{0:S(5)}, f32[8]{0}, u32[]) copy-start(%p)
  %b = f32[8]{0:S(5)} copy-done(%a)
  %c = (f32[8]{0:S(1)}, f32[8]{0}, u32[]) copy-start(%p)
  ROOT %d = f32[8]{0:S(1)} copy-done(%c)"""
    )
    assert [(each.to_host, each.size, each.exposed) for each in program.transfers] == [(True, 32, 1000.0)]
