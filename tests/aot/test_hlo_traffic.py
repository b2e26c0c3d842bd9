"""Bytes between chip and memory, counted in the text of programs."""

import jax
import jax.numpy as jnp
import pytest

from kd.aot import hlo, hlo_traffic


def _compiled(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function).lower(*arguments).compile()


def test_without_loops_it_is_the_count_of_xla():
    def function(x, y, z):
        mixed = jax.nn.softmax(x @ y) @ z
        return mixed.at[3].set(0.0), jnp.sort(mixed, 0)[:5], mixed[:, 2].sum()

    compiled = _compiled(function, (64, 128), (128, 32), (32, 16))
    expected = compiled.cost_analysis()['bytes accessed']
    assert hlo_traffic.traffic(compiled.as_text()) == pytest.approx(expected, rel=0.02)


def test_a_loop_counts_as_often_as_it_runs_and_reads_one_slice_a_turn():
    def function(n):
        def run(x, stacked):
            return jax.lax.scan(lambda x, y: (jnp.tanh(x) @ y, None), x, stacked)[0]

        return hlo_traffic.traffic(_compiled(run, (64, 64), (n, 64, 64)).as_text())

    a_turn = (function(30) - function(10)) / 20
    matrix = 4 * 64 * 64
    # tanh: in and out; slice: in and out; product: two in and one out; if need be, copies.
    assert 5 * matrix <= a_turn <= 10 * matrix


TPU = """HloModule step

%fused (a: f32[100,8,128], b: s32[]) -> f32[8,128] {
  %a = f32[100,8,128]{2,1,0:T(8,128)} parameter(0)
  %b = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %slice = f32[1,8,128]{2,1,0:T(8,128)} dynamic-slice(%a, %b, %zero, %zero)
  ROOT %bitcast = f32[8,128]{1,0:T(8,128)} bitcast(%slice)
}

ENTRY %main (p: f32[100,8,128], i: s32[], n: f32[16,3]) -> f32[8,128] {
  %p = f32[100,8,128]{2,1,0:T(8,128)} parameter(0)
  %i = s32[]{:T(128)} parameter(1)
  %n = f32[16,3]{1,0:T(8,128)} parameter(2)
  %near = f32[16,3]{1,0:T(8,128)S(1)} copy(%n)
  %twice = f32[16,3]{1,0:T(8,128)S(1)} add(%near, %near)
  ROOT %out = f32[8,128]{1,0:T(8,128)} fusion(%p, %i), kind=kLoop, calls=%fused
}
"""


def test_memory_on_the_chip_is_free_and_tiles_are_whole():
    tile = 4 * 8 * 128
    # 16 x 3 takes two tiles of 8 x 128 and is read once; a slice of one tile is read and written.
    # Four bytes are those of the index.
    assert hlo_traffic.traffic(TPU) == 2 * tile + 2 * tile + 4


LOOP = """HloModule step

%sum (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %add = f32[]{:T(128)} add(%x, %y)
}

%body (s: (s32[], f32[64,128])) -> (s32[], f32[64,128]) {
  %s = (s32[]{:T(128)}, f32[64,128]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  %one = s32[]{:T(128)} constant(STEP)
  %next = s32[]{:T(128)} add(%i, %one)
  %x = f32[64,128]{1,0:T(8,128)} get-tuple-element(%s), index=1
  %all = f32[64,128]{1,0:T(8,128)} all-reduce(%x), replica_groups={{0,1}}, to_apply=%sum
  ROOT %t = (s32[]{:T(128)}, f32[64,128]{1,0:T(8,128)}) tuple(%next, %all)
}

%cond (s: (s32[], f32[64,128])) -> pred[] {
  %n = s32[]{:T(128)} constant(BOUND)
  %s = (s32[]{:T(128)}, f32[64,128]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %n), direction=LT
}

ENTRY %main (p: f32[64,128]) -> f32[64,128] {
  %p = f32[64,128]{1,0:T(8,128)} parameter(0)
  %zero = s32[]{:T(128)} constant(START)
  %begin = s32[]{:T(128)} copy(%zero)
  %t = (s32[]{:T(128)}, f32[64,128]{1,0:T(8,128)}) tuple(%begin, %p)
  %w = (s32[]{:T(128)}, f32[64,128]{1,0:T(8,128)}) while(%t), condition=%cond, body=%body
  ROOT %out = f32[64,128]{1,0:T(8,128)} get-tuple-element(%w), index=1
}
"""


@pytest.mark.parametrize(
    ('start', 'bound', 'step', 'turns'),
    [(0, 20, 1, 20), (0, 8, 2, 4), (3, 8, 2, 3), (0, 7, 7, 1)],
)
def test_loops_of_programs_for_tpus_run_as_often_as_their_counter_says(start, bound, step, turns):
    size = 4 * 64 * 128
    text = LOOP.replace('START', str(start)).replace('BOUND', str(bound)).replace('STEP', str(step))
    [found] = hlo.collectives(text)
    assert (found.bytes, found.times) == (size, turns)
    # Two numbers read and one value written by the condition and by the addition; one number copied
    # before.
    assert hlo_traffic.traffic(text) == turns * (2 * size + 9 + 12) + 8


@pytest.mark.parametrize(
    ('place', 'other'),
    [
        ('direction=LT', 'direction=NE'),
        ('compare(%i, %n), direction=LT', 'custom-call(%i), custom_call_target="any"'),
        ('s32[]{:T(128)} add(', 's32[]{:T(128)} multiply('),
        ('s32[]{:T(128)} constant(0)', 's32[]{:T(128)} custom-call()'),
    ],
)
def test_a_loop_that_does_not_tell_counts_once_and_is_named(place, other):
    text = LOOP.replace('START', '0').replace('BOUND', '20').replace('STEP', '1')
    assert hlo.parse(text).loops_of_unknown_length() == 0
    assert place in text
    silent = text.replace(place, other)
    [found] = hlo.collectives(silent)
    assert found.times == 1
    assert hlo.parse(silent).loops_of_unknown_length() == 1
    told = silent.replace('body=%body', 'body=%body, backend_config={"known_trip_count":{"n":"6"}}')
    [found] = hlo.collectives(told)
    assert found.times == 6
    assert hlo.parse(told).loops_of_unknown_length() == 0


BRANCHES = """HloModule step

%sum (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %add = f32[]{:T(128)} add(%x, %y)
}

%made (a: (f32[64,128])) -> f32[64,128] {
  %a = (f32[64,128]{1,0:T(8,128)}) parameter(0)
  %x = f32[64,128]{1,0:T(8,128)} get-tuple-element(%a), index=0
  %twice = f32[64,128]{1,0:T(8,128)} add(%x, %x)
  ROOT %all = f32[64,128]{1,0:T(8,128)} all-reduce(%twice), replica_groups={{0,1}}, to_apply=%sum
}

%left_out (b: (f32[64,128])) -> f32[64,128] {
  %b = (f32[64,128]{1,0:T(8,128)}) parameter(0)
  %y = f32[64,128]{1,0:T(8,128)} get-tuple-element(%b), index=0
  ROOT %copy = f32[64,128]{1,0:T(8,128)} copy(%y)
}

ENTRY %main (p: f32[64,128], q: pred[]) -> f32[64,128] {
  %p = f32[64,128]{1,0:T(8,128)} parameter(0)
  %q = pred[]{:T(512)} parameter(1)
  %t = (f32[64,128]{1,0:T(8,128)}) tuple(%p)
  ROOT %out = f32[64,128]{1,0:T(8,128)} conditional(%q, %t, %t), CALLED
}
"""


@pytest.mark.parametrize(
    'called',
    [
        'true_computation=%made, false_computation=%left_out',
        'branch_computations={%left_out, %made}',
        'branch_computations={%made, %left_out, %made}',
    ],
)
def test_of_a_conditional_the_dearest_branch_counts(called):
    size = 4 * 64 * 128
    text = BRANCHES.replace('CALLED', called)
    [found] = hlo.collectives(text)
    assert (found.kind, found.bytes, found.times) == ('all-reduce', size, 1)
    # Of the sum an operand is named twice.
    assert hlo_traffic.traffic(text) == 3 * size + 2 * size
    # Both may run, one of them in each execution.
    assert hlo.parse(text).runs()['left_out'] == 1


PIECES = """HloModule step

%begun (x: f32[8,128]) -> (f32[8,128], f32[64,128]) {
  %x = f32[8,128]{1,0:T(8,128)} parameter(0)
  %g = f32[64,128]{1,0:T(8,128)} all-gather(%x), channel_id=7, dimensions={0}
  ROOT %c = (f32[8,128], f32[64,128]) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

%beside (x: f32[8,128]) -> f32[64,128] {
  %x = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %g = f32[64,128]{1,0:T(8,128)} all-gather(%x), channel_id=7, dimensions={0}
}

ENTRY %main (p: f32[8,128]) -> f32[64,128] {
  %p = f32[8,128]{1,0:T(8,128)} parameter(0)
  %s = (f32[8,128], f32[64,128]) fusion(%p), kind=kCustom, calls=%begun
  %other = f32[64,128]{1,0:T(8,128)} all-gather(%p), channel_id=8, dimensions={0}
  ROOT %out = f32[64,128]{1,0:T(8,128)} fusion(%p), kind=kCustom, calls=%beside
}
"""


def test_a_collective_in_pieces_beside_other_work_counts_once():
    found = hlo.collectives(PIECES)
    assert hlo.totals(found) == {'all-gather': (2, 2 * 4 * 64 * 128)}


SLICED = """HloModule step

ENTRY %main (p: f32[64,128]) -> f32[8,128] {
  %p = f32[64,128]{1,0:T(8,128)} parameter(0)
  %s = ((f32[64,128]{1,0:T(8,128)}), f32[8,128]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%p)
  %near = f32[8,128]{1,0:T(8,128)S(1)} slice-done(%s)
  %c = (f32[8,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) copy-start(%near)
  %new = f32[64,128]{1,0:T(8,128)} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %out = f32[8,128]{1,0:T(8,128)} copy-done(%c)
}
"""


def test_a_slice_brought_onto_the_chip_reads_the_slice_alone():
    # Read to the chip, and written back from there; a buffer that is set aside moves nothing.
    assert hlo_traffic.traffic(SLICED) == 2 * 4 * 8 * 128


@pytest.mark.parametrize(
    ('shape', 'size'),
    [
        ('f32[16,3]{1,0:T(8,128)}', 4 * 16 * 128),
        ('f32[16,3]{0,1:T(8,128)}', 4 * 128 * 8),
        ('bf16[5,9,200]{2,1,0:T(8,128)(2,1)}', 2 * 5 * 16 * 256),
        ('f32[16]{0:T(128)S(1)}', 0),
        ('f32[16,3]{1,0}', 4 * 16 * 3),
        ('pred[]', 1),
    ],
)
def test_bytes_of_a_layout(shape, size):
    found = hlo.SHAPE.match(shape)
    assert hlo.bytes_in_memory(found) == size
    assert hlo.bytes_in_memory(found, on_chip=True) == (size or 4 * 128)
