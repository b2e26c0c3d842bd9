"""PACED: what weights lose that are not the best ones."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from kd.theory import competence
from kd.theory.figures import COLOURS, Drawing, panels
from kd.theory.statements.rows import run


def misspecified_kernel() -> Figure:
    rng = np.random.default_rng(0)
    deltas = np.linspace(0.02, 1.5, 40)
    mu, sigma2 = rng.exponential(size=(2, 16)) + 0.05
    best = run(competence.optimal_weights, mu, sigma2)
    shifts = rng.uniform(-1, 1, (2000, 16))
    # Weights wholly at the ends of the band are the harmful ones; half of the draws are.
    shifts[::2] = np.sign(shifts[::2])
    figure, (left, right) = panels(2)
    measured = np.asarray(
        run(competence.kernel_efficiency, best * np.exp(deltas[:, None, None] * shifts), mu, sigma2)
    )
    low, high = measured.min(axis=1), measured.max(axis=1)
    left.fill_between(deltas, low, high, color='#B5DDF3', linewidth=0, label='2000 random errors')
    left.plot(
        deltas,
        run(competence.efficiency_bound, deltas),
        'k--',
        linewidth=1.2,
        label=r'bound $1/\cosh^2δ$',
    )
    points = np.linspace(0.1, 1.5, 8)
    share = 1 / (1 + np.exp(2 * points))
    energy = np.stack([share, 1 - share], -1)
    weights = np.sqrt(energy) * np.exp(np.stack([points, -points], -1))
    attained = run(competence.kernel_efficiency, weights, np.sqrt(energy), np.ones(2))
    left.plot(points, attained, 'o', color=COLOURS[1], markersize=4, label='two groups: attained')
    left.set(xlabel='log-error of the weights, ±δ', ylabel='efficiency', ylim=(0, 1.03),
             title='any weights within $e^{±δ}$ of the best')  # fmt: skip
    left.legend(loc='lower left')
    p = np.arange(1, 16) / 16
    true_a = np.linspace(0.2, 3, 60)
    for b, colour in zip((0.5, 1.0, 2.0), COLOURS, strict=False):
        truth = p ** true_a[:, None] * (1 - p) ** b
        used = run(competence.beta_kernel, p, 1.0, 1.0)
        # Constant noise: the best weights are the signal itself.
        efficiency = run(competence.kernel_efficiency, used, truth, np.ones_like(p))
        bound = run(competence.efficiency_bound, run(competence.log_spread, used, truth))
        right.plot(true_a, efficiency, color=colour, label=f'b = {b:g}')
        right.plot(true_a, bound, color=colour, linestyle='--', linewidth=1)
    right.set(xlabel='true exponent a', ylabel='efficiency of w = p (1 − p)', ylim=(0, 1.3),
              title='true kernel $p^a (1-p)^b$, 15 pass rates')  # fmt: skip
    right.legend(loc='upper center', ncols=3, title='true b; dashed: bound', title_fontsize=8)
    return figure


DRAWINGS = (
    Drawing(
        'misspecified_kernel',
        'Efficiency of misspecified weights against the Kantorovich bound, and of the default '
        'kernel when the true exponents are others (noise constant in p).',
        misspecified_kernel,
    ),
)
