"""Programs compiled for meshes that are not there: what they communicate, compute and hold."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kd import config as kd_config
from kd import process
from kd.aot import compile as aot
from kd.aot import hlo, topology
from kd.aot import table as aot_table
from kd.aot.__main__ import main
from kd.data import catalogue, sources
from kd.data.context import source_loader
from kd.errors import UserError
from kd.io import manifest
from kd.losses import divergence
from kd.models.causal_attention import attend_causally

ROOT = Path(__file__).parents[2]
TEACHER_WIDTH, WIDTH, CLASSES = 256, 64, 10
# Bytes of the student MLP 64-64-10 and of its teacher MLP 64-256-10.
STUDENT_BYTES = 4 * (64 * WIDTH + WIDTH + WIDTH * CLASSES + CLASSES)
TEACHER_BYTES = 4 * (64 * TEACHER_WIDTH + TEACHER_WIDTH + TEACHER_WIDTH * CLASSES + CLASSES)
# loss, grad_norm and two parts of the loss, as sums and counts, at most.
METRIC_BYTES = 64


def _recipe(**changes):
    config = kd_config.load(f'{ROOT}/configs/vision/logit_kd.py:cpu')
    config.teacher.network = dict(name='kd.models.mlp.MLP', widths=(TEACHER_WIDTH,))
    for name, value in changes.items():
        config[name] = value
    return config


def _compile(devices=8, batch_size=64, **changes):
    config = _recipe(**changes)
    config.student.batch_size = batch_size
    return aot.compile_stage(config, 'student', f'cpu:{devices}')


def test_loops_and_kinds_are_counted():
    mesh = Mesh(np.asarray(jax.devices()[:4]), ('x',))
    spec = PartitionSpec('x')

    def body(x):
        def turn(carry, _):
            return jax.lax.psum(carry, 'x') * 0.5, None

        summed = jax.lax.scan(turn, x, None, length=5)[0]
        return jax.lax.all_gather(x, 'x', tiled=True).sum() + summed

    mapped = jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    compiled = jax.jit(mapped).lower(jax.ShapeDtypeStruct((32,), jnp.float32)).compile()
    found = hlo.totals(hlo.collectives(compiled.as_text()))
    assert found == {'all-reduce': (5, 5 * 8 * 4), 'all-gather': (1, 32 * 4)}


def test_operations_of_products_convolutions_loops_and_branches():
    def product(x, y):
        return jnp.einsum('bij,bjk->bik', x, y)

    x, y = jnp.zeros((3, 4, 5)), jnp.zeros((3, 5, 6))
    assert hlo.flops(product, x, y) == 2 * 3 * 4 * 5 * 6

    def convolution(x, kernel):
        dims = ('NHWC', 'HWIO', 'NHWC')
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), 'SAME', dimension_numbers=dims)

    image, kernel = jnp.zeros((2, 8, 8, 3)), jnp.zeros((3, 3, 3, 7))
    assert hlo.flops(convolution, image, kernel) == 2 * (2 * 8 * 8 * 7) * (3 * 3 * 3)

    def strided(x):
        dims = ('NHWC', 'HWIO', 'NHWC')
        return jax.lax.conv_general_dilated(x, kernel, (2, 2), 'SAME', dimension_numbers=dims)

    # Forward and the gradient of the input use every product once.
    once = 2 * (2 * 4 * 4 * 7) * (3 * 3 * 3)
    assert hlo.flops(strided, image) == once
    assert hlo.flops(lambda x, y: jax.vjp(strided, x)[1](y), image, strided(image)) == 2 * once

    def loop(x):
        return jax.lax.scan(lambda c, _: (c @ c, None), x, None, length=11)[0]

    assert hlo.flops(jax.jit(loop), jnp.zeros((4, 4))) == 11 * 2 * 4**3

    def branch(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    assert hlo.flops(branch, jnp.zeros((4, 4))) == 2 * 2 * 4**3


def test_the_operations_of_a_step_are_those_of_its_layers():
    report = _compile(devices=1)
    student, teacher = 64 * WIDTH + WIDTH * CLASSES, 64 * TEACHER_WIDTH + TEACHER_WIDTH * CLASSES
    # Forward, gradients of all kernels, of the inputs of all layers but the first; teacher forward.
    expected = 2 * 64 * (2 * student + WIDTH * CLASSES + teacher)
    assert report.flops == expected


def test_data_parallel_steps_reduce_the_gradient_once_and_scale_weakly():
    reports = {n: _compile(devices=n, batch_size=8 * n) for n in (1, 2, 4, 8)}
    assert not reports[1].collectives
    totals = [hlo.totals(reports[n].collectives) for n in (2, 4, 8)]
    # Bytes per device and step stay flat.
    assert totals[0] == totals[1] == totals[2]
    [(kind, (count, size))] = totals[0].items()
    assert (kind, count) == ('all-reduce', 1)
    assert STUDENT_BYTES <= size <= STUDENT_BYTES + METRIC_BYTES
    # So do the operations of a device.
    assert len({r.flops // r.devices for r in reports.values()}) == 1


def test_fsdp_gathers_no_whole_teacher_and_reduces_the_gradient_once():
    rules = (('params|opt_state', 'fsdp'),)
    mesh = dict(data=1, fsdp=8, tensor=1)
    report = _compile(mesh=mesh, sharding=rules, frozen_sharding=(('.*', 'fsdp'),))
    whole = _compile()
    # An eighth of everything, up to what does not divide.
    assert report.arguments < 0.2 * whole.arguments
    gathered = [c for c in report.collectives if c.kind == 'all-gather']
    assert gathered
    assert max(c.bytes for c in gathered) < TEACHER_BYTES
    reduced = [c for c in report.collectives if c.kind in ('all-reduce', 'reduce-scatter')]
    shapes = ' '.join(c.shape for c in reduced)
    # Each kernel's gradient, whole or in its shard, in exactly one reduction.
    assert sum(c.bytes for c in reduced) <= STUDENT_BYTES + METRIC_BYTES + 64 * CLASSES * 4
    assert shapes.count(f'f32[64,{WIDTH}]') + shapes.count(f'f32[8,{WIDTH}]') <= 1


def test_tensor_parallel_steps_gather_no_parameters():
    rules = (
        ('hidden0/kernel', (None, 'tensor')),
        ('hidden0/bias', ('tensor',)),
        ('head/kernel', ('tensor', None)),
    )
    mesh = dict(data=1, fsdp=1, tensor=8)
    report = _compile(batch_size=8, mesh=mesh, sharding=rules, frozen_sharding=rules)
    # What crosses devices are the logits [8, 10] of student and teacher, and what is not sharded.
    assert not [c for c in report.collectives if c.kind == 'all-gather']
    total = sum(c.bytes * c.times for c in report.collectives)
    logits = 8 * CLASSES * 4
    assert 2 * logits <= total <= 2 * logits + METRIC_BYTES
    assert report.arguments < 0.3 * _compile(devices=1, batch_size=8).arguments


REPORT = aot.Report(
    stage='student',
    target='v5e:4x4',
    devices=16,
    batch_size=64,
    chip=topology.CHIPS['v5e'],
    arguments=2**30,
    temporaries=2**30,
    peak=2 * 2**30,
    flops=16 * 197 * 10**9,
    traffic=819 * 10**7,
    collectives=[
        hlo.Collective('all-reduce', 10**8, 2, 'f32[25000000]'),
        hlo.Collective('all-gather', 10**8, 1, 'f32[25000000]'),
    ],
    commit='0123456789+',
)


def test_the_roofline_divides_by_the_data_sheet():
    times = REPORT.times()
    assert times['arithmetic'] == pytest.approx(1e-3)
    assert times['memory'] == pytest.approx(1e-2)
    # Twice the bytes for an all-reduce, once for an all-gather, over 200 GB/s.
    assert times['communication'] == pytest.approx(5e8 / 200e9)
    assert REPORT.verdict() == 'fits, 12 % of memory; bound by memory'
    assert '1 a step' in aot.text(REPORT)
    assert '1.0 ms' in aot.text(REPORT) or '1 ms' in aot.text(REPORT)


def test_what_does_not_fit_says_what_to_change():
    parameters = dataclasses.replace(REPORT, arguments=20 * 2**30, peak=21 * 2**30)
    assert 'does not fit TPU v5e' in parameters.verdict()
    assert '--config.mesh.fsdp' in parameters.verdict()
    activations = dataclasses.replace(REPORT, temporaries=20 * 2**30, peak=21 * 2**30)
    assert 'smaller student.batch_size' in activations.verdict()
    # The compiler has accepted it, and may know better than the sum.
    assert activations.verdict().startswith('uncertain: compiles, with a sum of 131 % of memory')
    refused = dataclasses.replace(
        REPORT, refused='RESOURCE_EXHAUSTED: temporaries (40.1G) exceeds available HBM', peak=0
    )
    assert not refused.fits
    assert 'does not fit TPU v5e (temporaries 40.1G)' in refused.verdict()
    assert 'RESOURCE_EXHAUSTED' in aot.text(refused)


def test_loops_of_unknown_length_are_refused_in_the_verdict(monkeypatch):
    hidden = dataclasses.replace(REPORT, loops=2)
    assert hidden.verdict() == (
        'loop of unknown length (2, counted once): operations, traffic and collectives are too '
        'small; change: a scan of blocks, each under lax.cond; fits, 12 % of memory'
    )
    assert hidden.times() == {}
    assert 'roofline' not in aot.text(hidden)
    assert aot.from_json(json.loads(json.dumps(aot.as_json(hidden)))) == hidden
    assert aot_table.table([('x', hidden)]).splitlines()[2].count('|') == 13
    # A teacher that decodes until it is done.
    whole = divergence.forward_kl

    def until_done(student, teacher, **options):
        mixing = jnp.eye(CLASSES)
        teacher = jax.lax.while_loop(lambda x: x.sum() < 100, lambda x: x @ mixing + 1, teacher)
        return whole(student, teacher, **options)

    monkeypatch.setattr(divergence, 'forward_kl', until_done)
    report = _compile(devices=1)
    assert report.loops == 1
    assert report.verdict().startswith('loop of unknown length (1, counted once)')
    assert report.verdict().endswith('compiles')


def test_products_in_a_while_loop_are_told_to_count_once():
    def loop(x):
        return jax.lax.while_loop(lambda c: c[0] < 7, lambda c: (c[0] + 1, c[1] @ c[1]), (0, x))

    def within(x):
        return jax.lax.scan(lambda c, _: (loop(c)[1], None), x, None, length=3)

    x = jnp.zeros((4, 4))
    for function, times in ((loop, 1), (jax.jit(loop), 1), (within, 3)):
        assert hlo.flops(function, x) == times * 2 * 4**3
        assert hlo.while_loops(jax.make_jaxpr(function)(x).jaxpr) == 1
    draws = jax.make_jaxpr(lambda x: jax.random.gamma(jax.random.key(0), x))(x).jaxpr
    assert hlo.while_loops(draws) == 0


@pytest.mark.parametrize(
    ('target', 'message'),
    [
        ('v5e:16x17', r"no topology 'v5e:16x17'. Did you mean 'v5e:16x16'\?.*v5p: 2x2x1"),
        ('v9:2x2', 'Known are cpu:N and v5e: 2x2'),
        ('cpu:0', 'Known are cpu:N'),
        ('cpu:512', 'start it with JAX_NUM_CPU_DEVICES=512'),
    ],
)
def test_unknown_topologies_list_the_known_ones(target, message):
    with pytest.raises(UserError, match=message):
        topology.devices(target)


def test_a_missing_libtpu_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda _: None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[tpu\]'"):
        topology.devices('v5e:4x4')


def test_a_table_without_the_compiler_is_one_line_and_leaves_the_record_alone(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda _: None)
    with pytest.raises(UserError, match=r'^Compiling for v5e:4x4 takes the package libtpu'):
        main([f'--table={tmp_path / "aot.md"}'])
    # Rows bring their own effort; one for all of them is not taken silently.
    with pytest.raises(UserError, match='leave --effort out'):
        main([f'--table={tmp_path / "aot.md"}', '--effort=-1'])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(batch_size=60), 'student.batch_size=60 does not divide over 8 devices'),
        (dict(mesh=dict(data=16, fsdp=1, tensor=1)), 'needs 16 devices, there are 8'),
    ],
)
def test_batches_and_meshes_that_do_not_fit_are_one_clear_line(changes, message):
    with pytest.raises(UserError, match=message):
        _compile(**changes)


def test_the_command_compiles_without_data_and_without_a_word_too_many():
    command = [
        *(sys.executable, '-m', 'kd.aot', '--config=configs/vision/logit_kd.py:cpu'),
        *('--topology=cpu:4', '--stage=baseline', '--config.baseline.batch_size=32'),
        '--config.data_dir=/nonexistent',
    ]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.returncode, done.stderr) == (0, '')
    assert 'baseline on cpu:4: 4 devices, batch 32' in done.stdout
    assert 'all-reduce      1 a step' in done.stdout


@pytest.mark.parametrize(
    ('recipe', 'shape', 'classes'),
    [
        ('flow/celeba64.py:paper,lsd', (64, 64, 3), None),
        ('flow/afhq64.py:paper,lsd', (64, 64, 3), 3),
        ('dataset/mtt.py:imagefruit,ipc=1', (128, 128, 3), 10),
        ('dataset/infer_ufc.py:cifar100,ipc=10', (32, 32, 3), 100),
        ('dataset/infer_ufc.py:cpu,ipc=2', (8, 16, 1), 100),
        ('dataset/mtt.py:cpu', (8, 8, 1), 10),
    ],
)
def test_data_that_is_not_there_has_the_shapes_of_its_description(recipe, shape, classes):
    config = kd_config.load(f'{ROOT}/configs/{recipe}')
    config.data_dir = catalogue.DESCRIBED
    made = kd_config.parse(config)
    source = source_loader(made.data, made, None)('train')
    assert (source.spec['input'].shape, source.num_classes) == (shape, classes)
    assert ('label' in source.spec) == (classes is not None)
    with pytest.raises(sources.DataError, match='by its shapes alone'):
        source.fetch([0])


def test_unknown_data_is_told_also_where_only_its_shape_is_asked():
    with pytest.raises(sources.DataError, match="unknown data set 'cifar11'"):
        catalogue.load('cifar11', 'train', data_dir=catalogue.DESCRIBED)


def test_trajectories_to_match_have_the_size_of_the_network():
    config = kd_config.load(f'{ROOT}/configs/dataset/mtt.py:cpu')
    report = aot.compile_stage(config, 'distilled', 'cpu:2')
    # The mesh of the recipe has one device.
    assert (report.devices, report.chips) == (1, 2)
    network = (64 + 1) * 64 + (64 + 1) * 64 + (64 + 1) * 10
    # Start and the targets of two epochs; images, and Adam's two averages of them.
    assert report.arguments == pytest.approx(4 * (3 * network + 3 * 10 * 64), rel=0.01)


def test_batches_are_raised_to_the_devices_that_share_them():
    config = _recipe(mesh=dict(data=2, fsdp=3, tensor=1))
    config.student.batch_size = 32
    aot.raise_batch(config, 'student', 'cpu:8')
    assert config.student.batch_size == 36
    aot.raise_batch(config, 'student', 'cpu:8')
    assert config.student.batch_size == 36


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is None,
    reason="compiling for TPUs takes libtpu: pip install -e '.[tpu]'",
)


# A program for TPUs that another run left in the cache cannot be loaded without one.
unreadable = pytest.mark.filterwarnings('ignore:Error reading persistent compilation cache')


@needs_libtpu
@unreadable
def test_a_step_for_tpus_reduces_the_gradient_and_fits():
    report = aot.compile_stage(_recipe(), 'student', 'v5e:2x2')
    assert report.devices == 4
    totals = hlo.totals(report.collectives)
    assert set(totals) == {'all-reduce'}
    assert STUDENT_BYTES <= totals['all-reduce'][1] <= 2 * STUDENT_BYTES
    assert report.fits
    assert report.peak < 2**30


@needs_libtpu
@unreadable
def test_a_step_too_large_for_a_chip_is_told_to_be():
    config = _recipe()
    config.teacher.network.widths = (60_000, 60_000, 60_000)
    report = aot.compile_stage(config, 'student', 'v5e:2x2')
    assert not report.fits
    assert 'does not fit TPU v5e' in report.verdict()


def test_shardings_of_stand_ins_need_no_device():
    mesh = jax.make_mesh((8,), ('x',))
    x = jax.ShapeDtypeStruct((16, 3), np.float32, sharding=NamedSharding(mesh, PartitionSpec('x')))
    assert aot.bytes_per_device([x]) == 2 * 3 * 4


def test_the_table_has_a_row_for_each_report():
    head, rule, row = aot_table.table([('vision/logit_kd.py student', REPORT)]).splitlines()
    assert head.count('|') == rule.count('|') == row.count('|')
    assert '| vision/logit_kd.py student | v5e:4x4 | 64 |  | 1.00 GiB |' in row
    assert '2 all-reduce 191 MiB, 1 all-gather 95.4 MiB' in row
    assert row.endswith('| 0123456+ |')


def test_with_less_effort_arithmetic_alone_is_a_lower_bound():
    def hurried(**changes):
        return dataclasses.replace(REPORT, effort=-1.0, **changes)

    assert REPORT.bound() == ('memory', pytest.approx(1e-2))
    # Communication takes 2.5 ms and memory 10 ms at most, arithmetic 1 ms.
    assert hurried().bound() == ('arithmetic or memory or communication', pytest.approx(1e-3))
    assert 'bound by arithmetic or memory or communication' in hurried().verdict()
    assert aot.times(hurried()) == {
        'arithmetic': '1 ms', 'memory': '≤ 10 ms', 'communication': '≤ 2.5 ms'
    }  # fmt: skip
    assert aot.times(REPORT)['memory'] == '10 ms'
    # Where even that is shorter, nothing is open.
    alone = hurried(traffic=819 * 10**5, collectives=[])
    assert alone.bound() == ('arithmetic', pytest.approx(1e-3))
    refused = dict(refused='RESOURCE_EXHAUSTED: (20.5G) exceeds')
    assert hurried(**refused).verdict().startswith('uncertain: does not fit with less effort')
    assert dataclasses.replace(REPORT, **refused).verdict().startswith('does not fit TPU v5e')


def test_effort_is_the_compilers_and_stays_with_the_report_and_the_row():
    report = aot.compile_stage(_recipe(), 'student', 'cpu:8', effort=-1.0)
    assert report.effort == aot.from_json(aot.as_json(report)).effort == -1.0
    with pytest.raises(UserError, match=r'effort must lie in \[-1, 1\], got nan'):
        aot.compile_stage(_recipe(), 'student', 'cpu:8', effort=float('nan'))
    assert report.commit.removesuffix('+') == manifest.commit().removesuffix('+')
    usual = aot.compile_stage(_recipe(), 'student', 'cpu:8')
    assert (usual.effort, usual.flops) == (0.0, report.flops)
    assert hlo.totals(usual.collectives) == hlo.totals(report.collectives)
    row = aot_table.Row('configs/x.py', 'student', ('mesh.fsdp=4',), effort=-1.0)
    assert row.key('v5e:4x4').endswith('--config.mesh.fsdp=4 --effort=-1')
    assert row.label() == 'x.py student, `mesh.fsdp=4`, `effort=-1`'


def test_a_report_outlives_its_process():
    assert aot.from_json(json.loads(json.dumps(aot.as_json(REPORT)))) == REPORT
    # Equal collectives are kept once.
    [first, _] = REPORT.collectives
    twice = dataclasses.replace(REPORT, collectives=[first, first])
    again = aot.from_json(aot.as_json(twice))
    assert again.collectives == [first._replace(times=4)]
    assert again.times() == twice.times()


def test_an_interrupted_table_goes_on_and_tells_what_it_leaves_out(tmp_path, monkeypatch):
    row = aot_table.Row('configs/x.py', 'student', ('mesh.fsdp=4',), ('v5e:4x4', 'v5e:2x2'))
    asked = []

    def compiled(key, cpu_minutes, started):
        asked.append(key)
        if key.endswith('v5e:4x4 --config.mesh.fsdp=4'):
            return aot.as_json(REPORT)
        return {'left_out': f'not compiled within {cpu_minutes:g} CPU minutes'}

    monkeypatch.setattr(aot_table, 'compiled', compiled)
    file = tmp_path / 'docs' / 'page.md'
    file.parent.mkdir()
    # One of the two was compiled before.
    file.with_suffix('.json').write_text(json.dumps({row.key('v5e:4x4'): aot.as_json(REPORT)}))
    for _ in range(2):
        aot_table.write(file, jobs=1, cpu_minutes=3, rows=[row])
    assert asked == [row.key('v5e:2x2')]
    page = file.read_text()
    assert '| x.py student, `mesh.fsdp=4` | v5e:4x4 | 64 |' in page
    assert '- x.py student, `mesh.fsdp=4`: not compiled within 3 CPU minutes (v5e:2x2)' in page


def test_a_table_that_is_stopped_compiles_no_more(tmp_path, monkeypatch):
    """The rows that are being compiled are given up, those that wait are not begun."""
    python, begun = tmp_path / 'python', tmp_path / 'begun'
    python.write_text(
        f'#!/bin/sh\necho $$ >> {begun}\nsleep 0.5\nkill -TERM $PPID\nexec sleep 60\n'
    )
    python.chmod(0o700)
    monkeypatch.setattr(sys, 'executable', str(python))
    row = aot_table.Row('configs/x.py', 'student', (), ('v5e:4x4', 'v5e:2x2', 'v5e:2x4'))
    with process.signals(), pytest.raises(process.Stopped):
        aot_table.write(tmp_path / 'page.md', jobs=1, cpu_minutes=3, rows=[row])
    [child] = begun.read_text().split()
    assert not Path('/proc', child).exists()
    assert not (tmp_path / 'page.json').exists()


def test_a_row_that_takes_too_long_or_fails_says_so():
    key = '--config=configs/vision/logit_kd.py:cpu --stage=student --topology=cpu:2'
    assert aot_table.compiled(key, 0.001) == {'left_out': 'not compiled within 0.001 CPU minutes'}
    told = aot_table.compiled(key.replace('student', 'pupil'), 1.0)
    assert "There is no stage 'pupil'" in told['left_out']


def test_the_page_of_the_table_is_what_its_record_says():
    page, record = ROOT / 'docs' / 'aot.md', ROOT / 'docs' / 'aot.json'
    rows = json.loads(record.read_text())
    assert aot_table.page(rows) == page.read_text()
    assert all(row['commit'] for row in rows.values() if 'stage' in row)


@pytest.mark.parametrize(('block', 'bytes_'), [(8, 0), (64, 2 * 4 * 24 * 24 * 4)])
def test_the_largest_map_of_all_tokens_of_a_row_is_found_inside_of_loops(block, bytes_):
    heads = jnp.ones((2, 24, 4, 16))

    def twice(x):
        def body(x, _):
            return attend_causally(x, x, x, block=block), None

        return jax.lax.scan(body, x, None, length=2)[0].sum()

    traced = jax.make_jaxpr(jax.grad(twice))(heads).jaxpr
    assert hlo.largest_square(traced, 24, 0, 'cpu') == bytes_
    # Rows of 20 tokens padded to 24 are found too.
    assert hlo.largest_square(traced, 20, 4, 'cpu') == bytes_


def test_of_kernels_for_one_platform_only_the_others_are_told_maps():
    heads = jnp.ones((2, 512, 4, 16), jnp.bfloat16)
    traced = jax.make_jaxpr(lambda x: attend_causally(x, x, x))(heads).jaxpr
    assert hlo.largest_square(traced, 512, 0, 'cpu') == 2 * 4 * 512 * 512 * 4
    assert hlo.largest_square(traced, 512, 0, 'tpu') == 0


def test_a_report_tells_of_rows_of_tokens():
    assert aot.rows(REPORT) == ''
    text = dataclasses.replace(REPORT, tokens=16_384)
    assert aot.rows(text) == '16,384 tokens, no [T, T]'
    assert '  rows            16,384 tokens, no [T, T]' in aot.text(text)
    assert aot.rows(dataclasses.replace(text, square=2**30)) == '16,384 tokens, [T, T] in 1.00 GiB'
    assert '| 16,384 tokens, no [T, T] |' in aot_table.table([('x', text)])
