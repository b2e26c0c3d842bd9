"""A whole grid of kernel self-distillation from one eigendecomposition.

    python -m kd.benchmarks.kernel_path

20 steps x 50 weights x 50 regularisations on n = 1000 points: 50,000 predictors, each evaluated at
200 held-out points. Ours: one `ridge_smoother`, all filters in closed form, one matrix product per
regularisation. Baseline: scikit-learn's KernelRidge with the same precomputed Gram matrix,
refitted for every point of the grid. The baseline is timed on a sample of whole chains (a weight
and a regularisation, all steps); its fastest refit times the number of points is its time, and ours
is the best of three, so that a busy machine does not flatter the ratio. Every sampled prediction
must equal ours to 1e-8.

A stronger baseline is reported beside it: KernelRidge too can fit the 50 weights of one step and
one regularisation together, as 50 targets of one linear system.

Target: at least 100 times faster than a refit per point, compilation not counted.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import sklearn
from sklearn.kernel_ridge import KernelRidge

from kd import process
from kd.benchmarks import turns
from kd.errors import UserError
from kd.theory import kernel_regression as kr

TARGET = 100.0
TOLERANCE = 1e-8


class Grid(NamedTuple):
    """A regression problem and the grid: Gram matrices [n, n], [m, n], targets [n, 1] and axes."""

    gram: np.ndarray
    gram_val: np.ndarray
    targets: np.ndarray
    alphas: np.ndarray
    lams: np.ndarray
    steps: int


def make_grid(n: int, val: int, steps: int, weights: int, regularisations: int) -> Grid:
    """A noisy smooth function of five inputs; weights in [0, 1], lam from 1e-3 to 1e2."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n + val, 5))
    y = np.sin(x @ rng.normal(size=5)) + 0.3 * rng.normal(size=n + val)
    gram = np.asarray(kr.rbf_kernel(x, x[:n], 0.2))
    axes = np.linspace(0, 1, weights), np.geomspace(1e-3, 1e2, regularisations)
    return Grid(gram[:n], gram[n:], y[:n, None], *axes, steps)


@jax.jit
def _predictions(gram_val, smoother: kr.Smoother, targets, lams, alphas, powers):
    """[regularisations, weights, steps, m]; `powers` are the steps 1 ... T."""
    _, d, V = smoother
    basis = (gram_val @ V) * (V.T @ targets)[:, 0]

    def one_lam(lam):
        s = kr.shrinkage(d, lam)
        filters = kr.spectral_filter_constant(s, alphas[:, None, None], powers[:, None])
        ratio = jnp.where(d > 0, filters / jnp.where(d > 0, d, 1.0), 0.0)
        return ratio.reshape(-1, d.size) @ basis.T

    grid = jax.lax.map(one_lam, lams)
    return grid.reshape(lams.size, alphas.size, powers.size, -1)


def ours(grid: Grid) -> np.ndarray:
    """Predictions of the whole grid: [regularisations, weights, steps, m]."""
    smoother = kr.ridge_smoother(grid.gram, grid.lams[0])
    powers = np.arange(1.0, grid.steps + 1)
    arguments = grid.gram_val, smoother, grid.targets, grid.lams, grid.alphas, powers
    return np.asarray(_predictions(*arguments))


def refitted(grid: Grid, alphas: np.ndarray, lam: float) -> tuple[np.ndarray, float]:
    """The same by refitting: [weights, steps, m], and the seconds of the fastest refit.

    One linear system per step, with a target for each of `alphas`.
    """
    labels = np.tile(grid.targets, (1, len(alphas)))
    predictions, seconds = [], []
    for _ in range(grid.steps):
        began = time.perf_counter()
        model = KernelRidge(alpha=lam, kernel='precomputed').fit(grid.gram, labels)
        predictions.append(model.predict(grid.gram_val).T)
        fitted = model.predict(grid.gram)
        seconds.append(time.perf_counter() - began)
        labels = alphas * grid.targets + (1 - alphas) * fitted.reshape(labels.shape)
    return np.stack(predictions, axis=1), min(seconds)


def measure(grid: Grid, chains: int) -> dict[str, float]:
    """Seconds of the grid and of the two baselines, and the worst deviation of a prediction."""
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        predictions = ours(grid)
        seconds.append(time.perf_counter() - began)
    rng = np.random.default_rng(1)
    rows, columns = len(grid.lams), len(grid.alphas)
    sample = rng.choice(rows * columns, size=min(chains, rows * columns), replace=False)
    deviation, single, together = 0.0, [], []
    for i, j in zip(*np.divmod(sample, columns), strict=True):
        refits, fastest = refitted(grid, grid.alphas[j : j + 1], grid.lams[i])
        single.append(fastest)
        deviation = max(deviation, float(np.max(np.abs(refits[0] - predictions[i, j]))))
    for i in rng.choice(rows, size=min(2, rows), replace=False):
        refits, fastest = refitted(grid, grid.alphas, grid.lams[i])
        together.append(fastest)
        deviation = max(deviation, float(np.max(np.abs(refits - predictions[i]))))
    return {
        'points': rows * columns * grid.steps,
        'sampled': len(sample) * grid.steps,
        'cold': seconds[0],
        'warm': min(seconds[1:]),
        'per_point': min(single) * rows * columns * grid.steps,
        'batched': min(together) * rows * grid.steps,
        'deviation': deviation,
    }


def rows(options: argparse.Namespace) -> list[turns.Row]:
    """Its ratio to a refit per point: see `kd.benchmarks`."""
    with jax.enable_x64(True):
        grid = make_grid(1000, 200, 20, 50, 50)
        alphas, lam = grid.alphas[25:26], grid.lams[25]
        apart = np.max(np.abs(ours(grid)[25, 25] - refitted(grid, alphas, lam)[0][0]))
        if apart > TOLERANCE:
            raise UserError(f'predictions differ by {apart:.1e}.')
        took = turns.seconds(
            {'kd': partial(ours, grid), 'peer': partial(refitted, grid, alphas, lam)},
            options.rounds,
        )
    chains = grid.alphas.size * grid.lams.size
    theirs = [chains * each for each in took['peer']]
    return [
        turns.Row(
            f'{chains * grid.steps:,} predictors, n = 1,000; the peer is timed on one of '
            f'{chains:,} chains', f'scikit-learn {sklearn.__version__}',
            turns.over(theirs, took['kd']), TARGET, 'speed', least=True,
        )
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; exit status 1 if predictions differ or the target is missed."""
    parser = argparse.ArgumentParser(prog='python -m kd.benchmarks.kernel_path')
    parser.add_argument('--n', type=int, default=1000, help='training points')
    parser.add_argument('--val', type=int, default=200, help='points at which to predict')
    parser.add_argument('--steps', type=int, default=20)
    parser.add_argument('--weights', type=int, default=50)
    parser.add_argument('--regularisations', type=int, default=50)
    parser.add_argument('--chains', type=int, default=5, help='sampled chains of the baseline')
    parser.add_argument('--target', type=float, default=TARGET, help='least ratio')
    a = parser.parse_args(argv)
    with jax.enable_x64(True):
        grid = make_grid(a.n, a.val, a.steps, a.weights, a.regularisations)
        result = measure(grid, a.chains)
    ratio = result['per_point'] / result['warm']
    print(
        f'{result["points"]} predictors on n = {a.n}; a refit per point is timed on '
        f'{result["sampled"]} of them and scaled up from the fastest.\n'
        '| | seconds | ratio |\n|---|---:|---:|\n'
        f'| one eigendecomposition | {result["warm"]:.2f} | 1 |\n'
        f'| the same with compilation | {result["cold"]:.2f} | '
        f'{result["cold"] / result["warm"]:.1f} |\n'
        f'| KernelRidge per point | {result["per_point"]:.0f} | {ratio:.0f} |\n'
        f'| KernelRidge, weights as targets of one fit | {result["batched"]:.1f} | '
        f'{result["batched"] / result["warm"]:.1f} |\n'
        f'Largest deviation of a prediction: {result["deviation"]:.1e} (allowed {TOLERANCE:.0e}). '
        f'Target: {a.target:g} times KernelRidge per point.'
    )
    return int(result['deviation'] > TOLERANCE or ratio < a.target)


if __name__ == '__main__':
    process.command(main)
