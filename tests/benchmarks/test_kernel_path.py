"""The kernel-path benchmark: its predictions, its table and its exit status."""

import subprocess
import sys

import jax
import numpy as np
import pytest

from kd.benchmarks import kernel_path


@pytest.fixture(scope='module')
def grid():
    with jax.enable_x64(True):
        return kernel_path.make_grid(n=40, val=10, steps=4, weights=3, regularisations=3)


def test_the_whole_grid_equals_refits_to_1e_8(grid):
    with jax.enable_x64(True):
        ours = kernel_path.ours(grid)
    assert ours.shape == (3, 3, 4, 10)
    for i, lam in enumerate(grid.lams):
        refits, seconds = kernel_path.refitted(grid, grid.alphas, lam)
        np.testing.assert_allclose(ours[i], refits, atol=1e-8)
        assert seconds > 0


def test_sampling_scales_to_the_whole_grid(grid):
    with jax.enable_x64(True):
        result = kernel_path.measure(grid, chains=2)
    assert (result['points'], result['sampled']) == (36, 8)
    assert result['deviation'] < 1e-8
    # A refit together costs no more systems than one weight's refits.
    assert 0 < result['batched'] < result['per_point']


@pytest.mark.parametrize(('target', 'status'), [('0', 0), ('1e12', 1)])
def test_exit_status_follows_the_target(target, status, capsys):
    sizes = ['--n=40', '--val=10', '--steps=4', '--weights=3', '--regularisations=3']
    assert kernel_path.main([*sizes, '--chains=1', f'--target={target}']) == status
    printed = capsys.readouterr().out
    assert '36 predictors on n = 40; a refit per point is timed on 4 of them' in printed


def test_wrong_predictions_fail_the_benchmark(grid, monkeypatch):
    right = kernel_path.ours
    monkeypatch.setattr(kernel_path, 'ours', lambda grid: right(grid) + 1e-6)
    sizes = ['--n=40', '--val=10', '--steps=4', '--weights=3', '--regularisations=3']
    assert kernel_path.main([*sizes, '--chains=1', '--target=0']) == 1


def test_the_command_starts():
    command = [sys.executable, '-m', 'kd.benchmarks.kernel_path', '--help']
    assert '--regularisations' in subprocess.run(
        command, capture_output=True, text=True, check=True
    ).stdout  # fmt: skip
