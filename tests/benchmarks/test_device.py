"""The checks of a GPU, at sizes for a CPU; and the script that installs and runs them."""

import os
import subprocess
from pathlib import Path

import pytest

from kd.benchmarks import device

pytestmark = pytest.mark.usefixtures('compiled_quickly')

ROOT = Path(__file__).parent.parent.parent
OF = device.Roofline(operations=1e12, bandwidth=1e9)


def test_least_time_is_of_what_binds():
    assert OF.least(2e12, 1e9) == 2.0
    assert OF.least(1e11, 3e9) == 3.0


def test_weights_are_read_for_each_token():
    [line] = device.decoding(device.TINY, OF)
    module = device.TINY.decoder
    assert f'{device.TINY.rows} x {device.TINY.new} after {device.TINY.prompt}' in line
    assert line.endswith('% of the roofline')
    assert module.dtype == device.FULL.decoder.dtype


@pytest.mark.parametrize('check', [device.fused, device.distilling, device.flow_step])
def test_checks_tell_a_ratio(check):
    for line in check(device.TINY, OF):
        share = float(line.split('|')[-1].split()[0])
        assert 0 < share < 1e4


def test_a_stage_that_is_cut_off_ends_with_the_same_bits_and_others_are_told(monkeypatch):
    [line] = device.resumed(device.TINY, OF)
    assert line.endswith('| bit-identical')
    ends = iter([{'w': 1.0}, {'w': 1.5}])
    monkeypatch.setattr(device, '_trained', lambda *_: next(ends))
    [line] = device.resumed(device.TINY, OF)
    assert line.endswith('| NOT bit-identical')


def test_a_check_that_fails_is_told_and_the_rest_is_done(monkeypatch, capsys):
    def broken(sizes, of):
        raise RuntimeError('out of memory\nand more')
        yield

    def fine(sizes, of):
        yield 'a | b | c'

    monkeypatch.setattr(device, 'CHECKS', (broken, fine))
    monkeypatch.setattr(device, 'roofline', lambda side: OF)
    assert device.main(['--tiny']) == 1
    told = capsys.readouterr().out
    assert '| broken | failed | RuntimeError: out of memory |\n| a | b | c |\n' in told
    monkeypatch.setattr(device, 'CHECKS', (fine,))
    assert device.main(['--tiny']) == 0


@pytest.mark.parametrize('status', [0, 1])
def test_the_script_runs_the_checks_within_its_limit_and_passes_their_status_on(status, tmp_path):
    python = tmp_path / 'python'
    python.write_text(f'#!/bin/sh\necho "ran $* in $PYTHONPATH"\nexit {status}\n')
    python.chmod(0o755)
    done = subprocess.run(
        [ROOT / 'launch' / 'device_check.sh'],
        env=os.environ | {'KD_PYTHON': str(python), 'KD_DEVICE_CHECK': '--tiny'},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == status
    assert 'ran -m kd.benchmarks.device --tiny in .\n' in done.stdout
    assert done.stdout.strip().splitlines()[-1].startswith('Took ')
