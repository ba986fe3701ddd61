"""Costs read off the text of a compiled program: loops by their trips, collectives once a channel."""
import jax
import jax.numpy as jnp
import pytest

from experiments.runtime import hlo
from experiments.runtime import mesh as mesh_lib

PROGRAM = '''
HloModule jit_step

%stage (p0: bf16[16,128]) -> bf16[256,128] {
  %a.2 = bf16[256,128]{1,0:T(8,128)} all-gather(%p0), channel_id=7, dimensions={0}
}

%limit (p1: s32[]) -> pred[] {
  %n = s32[]{:T(128)} constant(28)
  ROOT %less = pred[] compare(%p1, %n), direction=LT
}

%condition (p2: (s32[], f32[16])) -> pred[] {
  %i = s32[] get-tuple-element(%p2), index=0
  ROOT %f = pred[] fusion(%i), kind=kLoop, calls=%limit
}

%body (p3: (s32[], f32[16])) -> (s32[], f32[16]) {
  %k = f32[16]{0} custom-call(%p3), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="pallas_call"}
  %x = f32[99] fusion(%p3), kind=kLoop, calls=%stage, backend_config={"window_config":{"estimated_cycles":"100"}}
  %c = (f32[16]{0}, f32[16]{0}, u32[]) collective-permute-start(%x), channel_id=9, source_target_pairs={{0,1}}
}

%dear (p4: f32[]) -> f32[] {
  %e = f32[] fusion(%p4), kind=kLoop, calls=%none, backend_config={"estimated_cycles":"5"}
}

%cheap (p5: f32[]) -> f32[] {
  %g = f32[] fusion(%p5), kind=kLoop, calls=%none, backend_config={"estimated_cycles":"2"}
}

ENTRY %main.1 (p: f32[16]) -> f32[16] {
  %a.1 = bf16[256,128]{1,0:T(8,128)} all-gather(%p), channel_id=7, dimensions={0}
  %b = (f32[4,2]{1,0}, pred[]) all-reduce(%x, %y), channel_id=8, to_apply=%add
  %w = (s32[], f32[16]) while(%t), condition=%condition, body=%body
  %d = f32[] conditional(%q, %r, %s), branch_computations={%dear, %cheap}
  ROOT %h = f32[16] fusion(%w), kind=kLoop, calls=%none, backend_config={"estimated_cycles":"7"}
}
'''


def test_loops_branches_and_collectives():
    found = hlo.costs(PROGRAM)
    assert found.cycles == 28 * 100 + 5 + 7
    gathered, summed, sent = (found.collectives[kind] for kind in ('all-gather', 'all-reduce', 'collective-permute'))
    assert (gathered.count, gathered.runs, gathered.largest_bytes) == (1, 28, 256 * 128 * 2)
    assert (summed.count, summed.runs, summed.bytes) == (1, 1, 33)  # both of its results
    assert (sent.count, sent.runs, sent.bytes, sent.largest_bytes) == (1, 28, 28 * 64, 64)


def test_a_scan_of_this_machine_counts_its_steps():
    mesh = mesh_lib.make_mesh({'fsdp': 8})
    rows = mesh_lib.batch_sharding(mesh)

    def program(x):
        whole = lambda c: jax.lax.with_sharding_constraint(c, mesh_lib.replicated(mesh))
        return jax.lax.scan(lambda c, _: (c + whole(c).sum(), None), x, None, length=5)[0]
    text = jax.jit(program, in_shardings=rows, out_shardings=rows).lower(jnp.ones((64, 3))).compile().as_text()
    assert sum(entry.runs for entry in hlo.costs(text).collectives.values()) % 5 == 0
    assert sum(entry.runs for entry in hlo.costs(text).collectives.values()) >= 5


def test_other_text_is_refused():
    with pytest.raises(ValueError, match='it has no ENTRY computation'):
        hlo.costs('nothing')


TRAFFIC = '''
%slices (p0: f32[8,128], p1: s32[]) -> f32[128] {
  %p0 = f32[8,128] parameter(0)
  %p1 = s32[] parameter(1)
  ROOT %s = f32[1,128] dynamic-slice(%p0, %p1, %p1), dynamic_slice_sizes={1,128}
}

%writes (q0: f32[8,128], q1: f32[1,128]) -> f32[8,128] {
  %q0 = f32[8,128] parameter(0)
  %q1 = f32[1,128] parameter(1)
  ROOT %u = f32[8,128] dynamic-update-slice(%q0, %q1, %z, %z)
}

%condition (p2: (s32[])) -> pred[] {
  %n = s32[] constant(8)
  ROOT %less = pred[] compare(%p2, %n), direction=LT
}

%body (p3: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %a = f32[8,128] get-tuple-element(%p3), index=1
  %i = s32[] get-tuple-element(%p3), index=0
  %x = f32[1,128] fusion(%a, %i), kind=kLoop, calls=%slices
  %y = f32[8,128] fusion(%a, %x), kind=kLoop, calls=%writes
}

ENTRY %main (p: f32[8,128]) -> f32[8,128] {
  %p = f32[8,128] parameter(0)
  %w = (s32[], f32[8,128]) while(%p), condition=%condition, body=%body
  %v = f32[64,128]{1,0:T(8,128)S(1)} copy(%p)
  ROOT %d = f32[8,128] add(%p, %p)
}
'''


def test_traffic_counts_slices_in_loops_and_not_what_stays_on_the_chip():
    row, whole = 128 * 4, 8 * 128 * 4
    loop = 8 * ((row + 4 + row) + (row + row))  # a row is read with its index and written; read, and written in place
    assert hlo.costs(TRAFFIC).bytes == loop + whole + 3 * whole  # a copy onto the chip; a sum of two
