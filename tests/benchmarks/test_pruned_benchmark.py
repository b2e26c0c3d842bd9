"""A network with a third less is really faster, where gates of zero are not, and bytes are few."""

import sys

from kd.benchmarks import pruned as benchmark


def test_a_third_less_is_faster_and_four_bits_are_small(monkeypatch, capsys):
    """On a busy machine: two thirds of the arithmetic cannot take as long as all of it."""
    found = benchmark.measure(width=256, depth=6, side=16, batch=8, rounds=8)
    assert found['faster'] > 1.2
    assert found['faster'] > found['gated'] + 0.1
    assert found['bytes'] <= benchmark.BYTES
    monkeypatch.setattr(benchmark, 'measure', lambda **sizes: found | {'faster': 1.0, 'bytes': 1})
    monkeypatch.setattr(sys, 'argv', ['x', '--depth=6'])
    assert benchmark.main() == 1
    told = capsys.readouterr().out
    assert 'MISSED: 1.00 times faster, target 1.35' in told
    assert 'MISSED: 1.000 of the bytes, target 0.27' in told
