"""The benchmark of score distillation counts what a cycle does and what it has to."""

import dataclasses

import numpy as np
import pytest

from kd.benchmarks import score_distillation as benchmark
from kd.benchmarks.peers import dmd2
from kd.losses import schedule
from kd.models.denoiser import Denoised
from kd.models.velocity_mlp import VelocityMLP

pytestmark = pytest.mark.usefixtures('compiled_quickly')

WIDTH, BATCH = 24, 4
MLP = Denoised(VelocityMLP(width=WIDTH, depth=2, num_classes=3), schedule.edm(), 'flow', 'edm')
CASE = benchmark.Case(MLP, (5,), BATCH, 80.0, {'label': 3}, 2.0, 'hidden1')


@pytest.fixture(scope='module')
def made():
    return benchmark.cycle(CASE, 2)


def test_a_cycle_of_two_moves_has_the_operations_of_its_passes_and_one_program():
    row = benchmark.measured(CASE._replace(feature=''), 2, rounds=0)
    assert row['operations'] == pytest.approx(1.0, abs=1e-3)
    assert row['traces'] == 1
    assert 'time' not in row


def test_passes_of_a_perceptron_are_counted_by_hand(made):
    needed = benchmark.passes(CASE, made, 2)
    assert {name: times for name, (times, _, _) in needed.items()} == {
        'generator': 1, 'teacher': 1, 'critic asked': 1, 'fresh samples': 1, 'critic': 2
    }  # fmt: skip
    own = {name: benchmark.hlo.flops(f, *given) for name, (_, f, given) in needed.items()}
    leaves = made.state.params['generator']
    kernels = {name: x['kernel'].size for name, x in leaves.items() if 'kernel' in x}
    forward = 2 * BATCH * sum(kernels.values())
    assert own['critic asked'] == own['fresh samples'] == forward
    assert own['teacher'] == 2 * forward


def test_adapters_are_as_small_as_their_count(monkeypatch):
    small = dataclasses.replace(
        benchmark.preset('sd15'), channels=(32, 64), depths=(0, 1), heads=(2, 2), context=16
    )
    monkeypatch.setattr(benchmark, 'preset', lambda of: small)
    share = benchmark.adapter_share('sd15')
    # A down block of two attentions, an up block of three and the middle, each of one block with
    # queries and values to itself [64, 64] and to the text [64, 64] and [16, 64].
    own = 6 * benchmark.RANK * (3 * (64 + 64) + (16 + 64))
    assert share == pytest.approx(own / round(own / share))
    assert round(own / share) == benchmark._size(parameters(small))


def parameters(module):
    spec = {'input': benchmark.jax.ShapeDtypeStruct((64, 64, 4), np.float32)}
    inputs = Denoised(module, schedule.discrete(), 'eps').example_inputs(spec)
    return benchmark.jax.eval_shape(module.init, benchmark.jax.random.key(0), *inputs)['params']


def test_both_sides_are_asked_the_same():
    batch = {'input': np.zeros((2, 4, 4, 3)), 'text': np.zeros((2, 5, 6))}
    x, t, text = dmd2.question(3, batch)
    assert [x.shape, text.shape] == [(2, 4, 4, 3), (2, 5, 6)]
    assert t.tolist() == [500.0, 500.0]
    np.testing.assert_array_equal(x, dmd2.question(3, batch)[0])


def test_without_a_peer_it_says_so_and_targets_decide(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, 'cases', lambda: {'mlp': CASE})
    monkeypatch.setattr(benchmark, 'adapter_share', lambda of: 0.03)
    monkeypatch.setattr(benchmark, 'measured', lambda case, updates, rounds: dict(
        operations=1.03, memory=1.0, time=1.0, ms=1.0, traces=1))  # fmt: skip
    assert benchmark.main(['--peers=', '--rounds=1']) == 1
    told = capsys.readouterr().out
    assert 'No peer: name a Python with diffusers by --peers or KD_PEERS.' in told
    assert 'missed: mlp, 1 critic moves: operations 1.030 > 1.02' in told
    assert 'mlp, 5 critic moves: operations' not in told
    assert 'missed: adapters of sdxl: 0.0300 > 0.02' in told
