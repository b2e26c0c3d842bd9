"""The benchmark of super-resolution: both sides are given one network, and say the same."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from kd.benchmarks import super_resolution as benchmark
from kd.benchmarks import turns
from kd.models.imdn import IMDN

pytestmark = pytest.mark.usefixtures('compiled_quickly')


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(benchmark, 'module', lambda: IMDN(2, channels=4, blocks=1))


def test_weights_are_written_under_the_names_of_the_release_and_asked(tmp_path):
    file = tmp_path / 'weights.safetensors'
    benchmark.prepare(str(file))
    tensors = safetensors.numpy.load_file(file)
    assert tensors['IMDB1.c1.weight'].shape == (4, 4, 3, 3)
    assert {'c.0.weight', 'upsampler.0.bias', 'IMDB1.cca.conv_du.2.weight'} <= {*tensors}
    answer = benchmark.forward(8, 1)
    assert answer['cpu_s'] > 0
    x = benchmark.peer_lib.picture(8)
    whole = np.asarray(benchmark._HELD['apply'](benchmark._HELD['variables'], x))
    np.testing.assert_allclose(answer['pixels'], whole.reshape(-1)[::24][:64], atol=1e-6)


def test_memory_is_of_what_is_between_and_a_recorded_step_does_less():
    # Features of 4 channels at 64 pixels are 65 kB.
    assert 0.06 < benchmark.temporaries(64) < 3
    took = benchmark.solutions(1, width=16, batch=2)
    assert {name: len(x) for name, x in took.items()} == {'recorded': 1, 'solved': 1}
    took = benchmark.resampling(1)
    assert took['kd'][0] / took['pillow'][0] < 20


class Asked:
    """A worker that answers at once."""

    def __init__(self, seconds, pixels):
        self.answer = {'cpu_s': seconds, 'pixels': pixels}

    def ask(self, name, **arguments):
        return self.answer if name == 'forward' else None


def test_what_is_slower_or_larger_than_its_target_is_said(monkeypatch, tmp_path, capsys):
    import contextlib

    workers = {'kd': Asked(0.12, [0.0, 1.0]), 'peer': Asked(0.1, [0.0, 1.5])}
    monkeypatch.setattr(turns, 'sides', lambda *_: contextlib.nullcontext((workers, 'torch')))
    monkeypatch.setattr(benchmark, 'temporaries', lambda side: 13.0)
    monkeypatch.setattr(benchmark, 'resampling', lambda rounds: {'kd': [2.0], 'pillow': [1.0]})
    monkeypatch.setattr(benchmark, 'solutions', lambda rounds: {'recorded': [1.0], 'solved': [2.5]})
    place = tmp_path / 'numbers.json'
    assert benchmark.main(['--sides', '64', '--rounds=1', f'--json={place}']) == 1
    said = capsys.readouterr().out
    assert (
        '| 64 | 120.0 (120.0-120.0) | 100.0 (100.0-100.0) | 1.20 (1.20-1.20) | 1.0 | 5.0e-01 |'
        in said
    )
    for line in ('64 pixels: 1.20', 'temporaries: 13.0 MB', 'solves over one that reads: 2.50'):
        assert line in said[said.index('missed') :]
    assert 'bicubic' not in said[said.index('missed') :]
    assert json.loads(Path(place).read_text())['temporaries'] == 13.0
