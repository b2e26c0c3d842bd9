"""Self-distillation with labels: filters per eigen-direction, and what they amount to."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from kd.theory import kernel_regression as kr
from kd.theory.figures import COLOURS, GREY, Drawing, panels


def filter_decay() -> Figure:
    d, lam, steps = np.array([30.0, 3.0, 0.3, 0.03]), 0.2, np.arange(1, 26)
    s = d / (d + lam)
    figure, grid = panels(3)
    for axes, alpha in zip(grid, (0.0, 0.1, 0.5), strict=True):
        path = np.asarray(kr.spectral_filter_path(s, np.full(len(steps) - 1, alpha)))
        limit = np.asarray(kr.spectral_filter_limit(d, lam, alpha))
        for k, colour in zip(range(len(d)), COLOURS, strict=False):
            axes.semilogy(steps, path[:, k], color=colour, marker='.', label=f'd = {d[k]:g}')
            if alpha:
                axes.axhline(limit[k], color=colour, linestyle=':', linewidth=1.2)
        axes.set(ylim=(1e-3, 1.5), xlabel='step t', title=f'weight of the truth α = {alpha:g}')
    grid[0].set_ylabel('filter $B_t$ of an eigen-direction')
    grid[0].legend(loc='lower right')
    for axes, note in zip(grid[1:], ('dotted: limit d / (d + λ/α)', 'λ = 0.2'), strict=True):
        axes.text(1, 1.4e-3, note, fontsize=8, color=GREY)
    return figure


def effective_regularisation() -> Figure:
    d, lam, steps = np.array([3.0, 0.3]), 0.2, np.arange(1, 41)
    s = d / (d + lam)
    figure, (left, right) = panels(2)
    for alpha, colour in zip((0.0, 0.1, 0.25, 0.5, 1.0), COLOURS, strict=False):
        path = np.asarray(kr.spectral_filter_path(s, np.full(len(steps) - 1, alpha)))
        effective = np.asarray(kr.effective_regularisation(path, d)) / lam
        left.loglog(steps, effective[:, 0], color=colour, label=f'α = {alpha:g}')
        left.loglog(steps, effective[:, 1], color=colour, linestyle='--')
        if alpha:
            left.axhline(1 / alpha, color=colour, linestyle=':', linewidth=1)
        ratio = path[:, 0] / path[:, 1]
        right.semilogy(steps, ratio, color=colour, label=f'α = {alpha:g}')
        if alpha:
            limit = np.asarray(kr.spectral_filter_limit(d, lam, alpha))
            right.axhline(limit[0] / limit[1], color=colour, linestyle=':', linewidth=1)
    left.set(ylim=(0.8, 100), xlabel='step t', ylabel='effective regularisation / λ',
             title='one ridge fit that shrinks as much')  # fmt: skip
    left.text(1.05, 30, 'solid: d = 3\ndashed: d = 0.3\ndotted: 1/α', fontsize=8, color=GREY)
    right.legend(loc='upper right', ncols=2)
    right.set(ylim=(1.3, 30), xlabel='step t', ylabel=r'$\rho_t$ = $B_t$(d = 3) / $B_t$(d = 0.3)',
              title='two directions: overshoot (limits dotted)')  # fmt: skip
    right.set_yticks([2, 5, 10, 20], labels=['2', '5', '10', '20'], minor=False)
    right.minorticks_off()
    return figure


DRAWINGS = (
    Drawing(
        'filter_decay',
        'Self-distillation filters per eigen-direction (λ = 0.2). Without the truth all decay '
        'to zero; with weight α each tends to the dotted ridge filter with λ/α.',
        filter_decay,
    ),
    Drawing(
        'effective_regularisation',
        'The ridge parameter that shrinks a direction as much as t steps do, and the ratio of '
        'two filters, which for 0 < α < 1 can overshoot its limit.',
        effective_regularisation,
    ),
)
