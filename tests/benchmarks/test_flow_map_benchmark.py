"""The cost of the flow-map losses over flow matching, counted by XLA."""

import runpy
import sys

import pytest

from kd.benchmarks import flow_map as benchmark
from kd.models.velocity_mlp import VelocityMLP


@pytest.fixture(name='rows', scope='module')
def _rows():
    # Wide enough for matrix products to dominate, as in a real network.
    network = VelocityMLP(width=128, depth=2)
    return benchmark.measure(('lsd', 'psd_midpoint'), network, (2,), 256, rounds=2)


def test_lagrangian_step_stays_within_its_budget(rows):
    row = rows['lsd']
    assert row['flops'] <= benchmark.FLOPS
    assert row['memory'] <= benchmark.MEMORY


def test_flops_are_those_of_the_network_calls(rows):
    # In network evaluations: a gradient step costs 3; the time derivative doubles it and the
    # field adds 1; two frozen jumps add 2. A quarter of the batch is off-diagonal.
    for name, calls in (('lsd', 7), ('psd_midpoint', 5)):
        expected = 0.75 + 0.25 * calls / 3
        assert abs(rows[name]['flops'] / expected - 1.0) < 0.08, name
    assert rows['flow_matching']['flops'] == rows['flow_matching']['memory'] == 1.0


def test_steps_are_compiled_once(rows):
    assert {row['traces'] for row in rows.values()} == {1}


def test_missed_targets_are_reported():
    good = {'flops': 1.4, 'time': 1.5, 'memory': 1.2, 'traces': 1}
    assert benchmark.failures(good) == []
    for key, value in (('flops', 2.7), ('time', 1.8), ('memory', 2.1), ('traces', 2)):
        assert len(benchmark.failures({**good, key: value})) == 1


def test_command_prints_a_row_for_each_algorithm(monkeypatch, capsys):
    arguments = ['flow_map', '--algorithms', 'consistency', '--rounds', '1', '--batch', '32']
    monkeypatch.setattr(sys, 'argv', arguments)
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(benchmark.__file__, run_name='__main__')
    assert exit_info.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith('mlp, batch 32, ')
    assert [line.split(' | ')[0] for line in lines[3:]] == ['| flow_matching', '| consistency']
