"""The loop benchmark starts, and its ratio is what it says."""

import re

import pytest

from kd.benchmarks import loop


def test_the_ratio_is_loop_speed_over_bare_speed(monkeypatch):
    bare, looped = iter([0.010, 0.012, 0.010, 0.010, 0.010, 0.010]), iter([0.011, 0.020, 0.0125])
    monkeypatch.setattr(loop, 'calibrate', lambda milliseconds, now: 8)
    monkeypatch.setattr(loop, 'prepare', lambda *_: None)
    monkeypatch.setattr(loop, 'bare', lambda stage, steps, now: next(bare))
    monkeypatch.setattr(loop, 'looped', lambda stage, directory, now: next(looped))
    row = loop.measure(10.0, rounds=3, steps=1)
    # Per round 1.0, 0.5 and 0.8: the median.
    assert row['ratio'] == pytest.approx(0.8)
    assert row['loop_ms'] == pytest.approx(12.5)


def test_it_starts_and_prints_a_row(monkeypatch, capsys):
    monkeypatch.setattr(loop, 'TARGETS', {'tiny': (0.01, 0.0)})
    assert loop.main(['--rounds=1', '--seconds=0.001']) == 0
    row = re.search(
        r'\| tiny \| 128 \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|', capsys.readouterr().out
    )
    assert row
    assert all(float(value) > 0 for value in row.groups())
