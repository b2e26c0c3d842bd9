"""The benchmark of masked decoding: both sides have one network, and what misses is said."""

import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from kd.benchmarks import masked_decoding as benchmark
from kd.benchmarks import turns

pytestmark = pytest.mark.usefixtures('compiled_quickly')


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    for name, value in dict(
        VOCABULARY=7, PROMPT=3, ANSWER=4, BLOCK=2, PROMPTS=5, DEPTH=1, WIDTH=8, HEADS=2
    ).items():
        monkeypatch.setattr(benchmark, name, value)


def test_rows_are_decoded_as_one_after_another_with_weights_under_their_paths(tmp_path):
    """A loop in Python, a call of the network at a time."""
    file = tmp_path / 'weights.safetensors'
    benchmark.prepare(str(file))
    weights = safetensors.numpy.load_file(file)
    assert {'embed/embedding', 'block0/attention/query/kernel', 'head/bias'} <= {*weights}
    assert weights['embed/embedding'].shape == (8, 8)
    answer = benchmark.decode(1)
    assert answer['cpu_s'] > 0
    assert answer['forward_s'] > 0
    forward = jax.jit(benchmark._HELD['forward'])
    for prompt, row, calls in zip(
        benchmark.prompts(), answer['tokens'], answer['calls'], strict=True
    ):
        z, count = np.append(prompt, [7] * 4), 0
        for begin in (3, 5):
            while (z[begin : begin + 2] == 7).any():
                logits = np.asarray(forward(benchmark._HELD['variables'], jnp.asarray(z[None])))
                said = logits[0, begin : begin + 2].astype(np.float64)
                p = np.exp(said - said.max(-1, keepdims=True))
                p /= p.sum(-1, keepdims=True)
                entropy = np.where(z[begin : begin + 2] == 7, -(p * np.log(p)).sum(-1), np.inf)
                take = entropy <= benchmark.THRESHOLD
                take[entropy.argmin()] = True
                z[begin : begin + 2] = np.where(take, said.argmax(-1), z[begin : begin + 2])
                count += 1
        assert row == z.tolist()
        assert calls == count


def test_sizes_are_those_of_the_programs():
    # 3 of 24 positions, and a network below that reads all of them.
    found = benchmark.certainty(4_001, 24, 3)
    assert 3 / 24 < found['operations'] < 0.3
    assert found['temporaries'] < 0.3
    sizes = benchmark.coupled(501, (2, 16))
    assert sizes['uniform'] < 0.01
    assert sizes['gaussians'] > 2 * 16 * 501 * 4 / 1e6


def test_steps_do_what_their_passes_do():
    """Traps: a pass too many; a network that is traced for each state of a segment."""
    found = benchmark.steps(width=32, batch=4)
    assert set(found) == {'ArcFlow', 'TSCD', 'MDT-dist'}
    for name, each in found.items():
        assert 0.9 < each['operations'] <= benchmark.STEP, name
    assert found['ArcFlow']['calls'] == 2


class Asked:
    """A worker that answers at once."""

    def __init__(self, **answer):
        self.answer = answer

    def ask(self, name, **arguments):
        return self.answer if name == 'decode' else None


def test_what_misses_its_target_is_said(monkeypatch, tmp_path, capsys):
    ours = dict(cpu_s=3.0, forward_s=1.0, tokens=[[1], [2]], calls=[1, 2])
    theirs = dict(cpu_s=6.0, tokens=[[1], [3]], calls=[1, 2])
    workers = {'kd': Asked(**ours), 'peer': Asked(**theirs)}
    monkeypatch.setattr(turns, 'sides', lambda *_: contextlib.nullcontext((workers, 'torch')))
    monkeypatch.setattr(benchmark, 'certainty', lambda: {'temporaries': 0.5, 'operations': 0.09})
    monkeypatch.setattr(benchmark, 'coupled', lambda: {'uniform': 0.1, 'gaussians': 1600.0})
    monkeypatch.setattr(benchmark, 'steps', lambda: {'TSCD': {'operations': 1.2, 'calls': 3}})
    place = tmp_path / 'numbers.json'
    assert benchmark.main(['--rounds=1', f'--json={place}']) == 1
    said = capsys.readouterr().out
    missed = said[said.index('missed') :]
    for line in (
        'a call over a forward: 1.50',
        'tokens or calls are not those of torch',
        'temporaries of certainty, block over dense: 0.500 > 0.125',
        'operations of TSCD over its passes: 1.200 > 1.050',
    ):
        assert line in missed
    assert 'coupled' not in missed
    assert json.loads(place.read_text())['decoding']['peer_over_kd'] == [2.0]
