"""The benchmark of classical losses: what is measured is one thing on both sides."""

import contextlib
import types

import numpy as np
import pytest

from kd.benchmarks import classical as benchmark
from kd.benchmarks import turns
from kd.losses import relation

pytestmark = pytest.mark.usefixtures('compiled_quickly')


def test_value_and_gradient_are_asked_of_one_batch():
    benchmark.prepare('PKT')
    answer = benchmark.gradient(1)
    student, teacher, labels = benchmark.arrays((64,))
    assert answer['cpu_s'] > 0
    assert labels.shape == (64,)
    # The mean over all pairs.
    wanted = np.mean(relation.probabilistic_transfer(student, teacher)) / 64
    assert answer['value'] == pytest.approx(float(wanted), rel=1e-5)
    assert len(answer['gradient']) == 64


def test_temporaries_are_counted_and_an_array_of_differences_is_a_miss(monkeypatch):
    monkeypatch.setattr(benchmark, 'BATCH', 6)
    monkeypatch.setattr(benchmark, 'WIDE', 40)
    monkeypatch.setattr(benchmark, 'MAPS', (2, 2, 8))
    rkd, nst = benchmark.memory()
    # [B, B, B] of cosines, and no [B, B, D].
    assert 0 < rkd.ratios[0] < 1
    assert nst.ratios[0] > 0

    def by_differences(s, t, labels):
        apart = s[:, None] - s
        return ((apart[:, :, None] * apart[:, None]).sum(-1) ** 2).sum((1, 2)) + apart.sum((1, 2))

    monkeypatch.setitem(
        benchmark.CASES, 'RKD', benchmark.CASES['RKD']._replace(loss=by_differences)
    )
    assert benchmark.memory()[0].missed()


class Asked:
    """A worker that answers at once."""

    def __init__(self, seconds, value):
        self.answer = {'cpu_s': seconds, 'value': value, 'gradient': [value, 0.0]}

    def ask(self, name, form='', **arguments):
        return None if name == 'prepare' or form == 'torchdistill' else self.answer


@pytest.mark.parametrize(('value', 'seconds'), [(1.0, 0.2), (1.0, 0.4), (1.1, 0.1)])
def test_a_row_is_a_ratio_and_what_differs_is_an_error(monkeypatch, value, seconds):
    workers = {'kd': Asked(seconds, 1.0), 'peer': Asked(1.0, value)}
    peer = 'torchdistill 1, torch 2'
    monkeypatch.setattr(turns, 'sides', lambda *_: contextlib.nullcontext((workers, peer)))
    monkeypatch.setattr(benchmark, 'CASES', {'RKD': benchmark.CASES['RKD']})
    monkeypatch.setattr(benchmark, 'memory', list)
    options = types.SimpleNamespace(peers='python', rounds=2)
    if value != 1.0:
        with pytest.raises(ValueError, match=r'RKD: kd and mdistiller differ by 9\.1e-02'):
            benchmark.rows(options)
        return
    (row,) = benchmark.rows(options)
    assert (row.peer, row.ratios) == ('mdistiller, written plainly, torch 2', [seconds, seconds])
    assert row.missed() == (seconds > 0.2)
    assert benchmark.rows(types.SimpleNamespace(peers='')) == []
