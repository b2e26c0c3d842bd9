"""Figures of the theorems, for the report of `kd.theory.verify`.

Each function computes what it draws with the functions under test and returns a matplotlib figure.
Call them with float64 enabled.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.figure import Figure

from kd.losses import preference
from kd.theory import competence
from kd.theory import kernel_regression as kr
from kd.theory import meta_distillation as md
from kd.theory.statements import meta_refits
from kd.theory.statements.recursive_meta_distillation import trajectory
from kd.theory.statements.rows import run

# Okabe and Ito's palette, told apart by colour-blind readers as well.
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')
GREY = '#666666'
STYLE: Any = {
    'font.size': 9,
    'axes.titlesize': 9.5,
    'axes.labelsize': 9,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.grid': True,
    'grid.color': '#DDDDDD',
    'grid.linewidth': 0.5,
    'legend.fontsize': 8,
    'legend.frameon': False,
    'lines.linewidth': 1.6,
    'savefig.dpi': 180,
}


class Drawing(NamedTuple):
    """A figure of the report: file name without suffix, caption, and the function that draws it."""

    name: str
    caption: str
    draw: Callable[[], Figure]


def panels(columns: int, rows: int = 1, height: float = 2.9) -> tuple[Figure, np.ndarray]:
    """A figure with a grid of axes, [rows * columns]."""
    figure = Figure(figsize=(3.35 * columns, height * rows), layout='constrained')
    return figure, np.ravel(figure.subplots(rows, columns))


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


def trajectories() -> Figure:
    lam, generations = 0.2, 30
    times = np.arange(generations + 1)
    # A start on which the geometric operator violates the bound of the linear one.
    log_s, log_t = np.log([0.98, 0.01, 0.01]), np.log([0.01, 0.495, 0.495])
    names = {
        'kl_student_base': 'KL($S_t$ ‖ T)',
        'kl_base_student': 'KL(T ‖ $S_t$)',
        'total_variation': 'total variation',
        'hilbert': 'Hilbert metric',
    }
    proven = {
        'kl_student_base': '$(1-λ)^t$: bound for linear only',
        'kl_base_student': '$(1-λ)^t$: bound for all three',
        'total_variation': '$(1-λ)^t$: exact for linear',
        'hilbert': '$(1-λ)^t$: exact for geometric',
    }
    figure, grid = panels(3, 2, height=2.6)
    distances = dict(zip(names, grid[[0, 1, 2, 5]], strict=True))
    factors = dict(zip(('kl_student_base', 'kl_base_student'), grid[[3, 4]], strict=True))
    operators = (('linear', 1.0), ('power 1/2', 0.5), ('geometric', 0.0))
    for (operator, power), colour in zip(operators, COLOURS, strict=False):
        step = functools.partial(md.anchor, power=power)
        path = trajectory(log_s, log_t, np.full(generations, lam), tuple(names), step)
        for name, axes in distances.items():
            axes.semilogy(times, path.measures[name], color=colour, label=operator)
        for name, axes in factors.items():
            value = np.asarray(path.measures[name])
            axes.plot(times[:-1], value[1:] / value[:-1], color=colour)
    for name, axes in distances.items():
        start = float(md.MEASURES[name](jnp.asarray(log_s), jnp.asarray(log_t)))
        (line,) = axes.semilogy(times, start * (1 - lam) ** times, 'k--', linewidth=1.2)
        unit = ', nats' if name.startswith('kl') else ' of $S_t$ and T'
        axes.set(ylabel=names[name] + unit, xlabel='generation t')
        handles = [line, *axes.get_lines()[:-1]] if name == 'kl_student_base' else [line]
        labels = [proven[name], *(operator for operator, _ in operators)]
        axes.legend(handles, labels[: len(handles)], loc='lower left')
    grid[0].set_ylim(bottom=1e-9)
    for name, axes in factors.items():
        axes.axhline(1 - lam, color='k', linestyle='--', linewidth=1.2)
        axes.axhline((1 - lam) ** 2, color='k', linestyle=':', linewidth=1.2)
        axes.text(generations, 1 - lam + 0.02, '1 − λ', ha='right')
        axes.text(generations, (1 - lam) ** 2 - 0.05, '$(1-λ)^2$', ha='right')
        axes.set(ylim=(0.3, 1), xlabel='generation t', ylabel=f'one-step factor of {names[name]}')
    figure.suptitle('λ = 0.2, $S_0$ = (.98, .01, .01), T = (.01, .495, .495)', fontsize=9.5)
    return figure


def collapse() -> Figure:
    samples, chains, generations, eps = 50, 1000, 200, 0.01
    times = np.arange(generations + 1)
    log_t = np.log([0.3, 0.25, 0.2, 0.15, 0.1])
    concentration = float(np.sum(np.exp(2 * log_t)))
    key = jax.random.key(0)

    def refit(log_m, t):
        return md.refit_from_samples(jax.random.fold_in(key, t), log_m, samples)

    def biased(log_m, t):
        # The same small error, away from T, in every generation.
        return jnp.log(jnp.exp(log_m) + eps * jnp.array([-1.0, 0, 0, 0, 1.0]))

    figure, (left, right) = panels(2)
    start = np.tile(log_t, (chains, 1))
    for lam, colour in zip((0.0, 0.05, 0.2, 0.5), COLOURS, strict=False):
        lams = np.full(generations, lam)
        path = trajectory(start, log_t, lams, ('collision',), realise=refit)
        mean = path.measures['collision'].mean(axis=1)
        exact = meta_refits.expected_collision(concentration, lam, samples, generations)
        left.plot(times, exact, color=colour, label=f'λ = {lam:g}')
        left.plot(times[::10], mean[::10], 'o', color=colour, markersize=3)
        # Unanchored, the first outcome would run empty at t = 30.
        end = generations if lam else 29
        path = trajectory(log_t, log_t, lams[:end], ('total_variation',), realise=biased)
        error = path.measures['total_variation']
        right.loglog(np.arange(1, end + 1), error[1:], color=colour)
        if lam:
            right.axhline(eps / lam, color=colour, linestyle=':', linewidth=1.2)
    left.set(ylim=(0.15, 1.02), xlabel='generation t',
             ylabel=r'collision probability E $\sum_i S_t[i]^2$',
             title=f'refits from N = {samples} samples')  # fmt: skip
    left.legend(
        loc='center right', title=f'lines: exact\npoints: mean of {chains}', title_fontsize=8
    )
    right.set(xlabel='generation t', ylabel=r'total variation of $S_t$ and T', ylim=(0.008, 0.4),
              title=f'refits that err by ε = {eps:g}; dotted: ε/λ')  # fmt: skip
    return figure


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


def trust_region() -> Figure:
    rng = np.random.default_rng(3)
    anchor = np.asarray(jax.nn.log_softmax(rng.normal(size=4)))
    target = np.array([0.6, 0.25, 0.1, 0.05])
    taus = np.geomspace(0.02, 30, 120)
    figure, (left, right) = panels(2)
    best = run(jax.vmap(preference.closed_form_policy, (None, None, 0)), anchor, target, taus)
    distance = np.sum(np.exp(best) * (best - anchor), axis=-1)
    p = np.exp(anchor)
    variance = np.sum(p * (np.log(target) - p @ np.log(target)) ** 2)
    left.loglog(taus, distance, color=COLOURS[0], label=r'KL(π* ‖ π$_{ref}$)')
    left.loglog(
        taus, taus**2 * variance / 2, 'k--', linewidth=1, label=r'$τ^2$ Var$_{ref}$(log q) / 2'
    )
    left.axhline(
        -anchor[np.argmax(target)], color=GREY, linestyle=':', label='all mass on argmax q'
    )
    slope = np.linalg.norm(1 / 4 - target) / taus
    left.loglog(taus, slope, color=COLOURS[1], label=r'gradient norm at π$_{ref}$')
    left.set(ylim=(1e-4, 60), xlabel='anchoring temperature τ', ylabel='nats (KL), nats per logit',
             title='larger τ: weaker pull, farther optimum')  # fmt: skip
    left.legend(loc='lower right')
    direction = np.array([0.5, -0.5, 0.5, -0.5])
    sizes = np.linspace(-4, 4, 161)
    fisher = np.diag(target) - np.outer(target, target)
    for tau, colour in zip((0.5, 1.0, 2.0), COLOURS, strict=False):
        centre = np.asarray(preference.closed_form_policy(anchor, target, tau))
        moved = centre + sizes[:, None] * direction
        loss = preference.anchored_cross_entropy(
            moved, np.tile(anchor, (161, 1)), np.tile(target, (161, 1)), tau
        )
        floor = -np.sum(target * np.log(target))
        right.plot(sizes, np.asarray(loss) - floor, color=colour, label=f'τ = {tau:g}')
        quadratic = sizes**2 * (direction @ fisher @ direction) / (2 * tau**2)
        right.plot(sizes, quadratic, color=colour, linestyle='--', linewidth=1)
    right.set(ylim=(0, 1.0), xlabel='logit displacement from the optimum', ylabel='L − L*, nats',
              title=r'dashed: $d^T$(diag q − q$q^T$) d / (2τ²)')  # fmt: skip
    right.legend(loc='upper center')
    return figure


DRAWINGS: dict[str, tuple[Drawing, ...]] = {
    'even_your_teacher': (
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
    ),
    'recursive_meta_distillation': (
        Drawing(
            'trajectories',
            'Distances to the base teacher per operator, with the proven rates. The geometric and '
            'the power operator break the bound on KL(S ‖ T), proven for the linear one only.',
            trajectories,
        ),
        Drawing(
            'collapse',
            'Sampling noise collapses an unanchored recursion onto one outcome; an anchor holds it '
            'at a stationary level. Systematic errors stay below ε/λ, or grow like tε.',
            collapse,
        ),
    ),
    'paced': (
        Drawing(
            'misspecified_kernel',
            'Efficiency of misspecified weights against the Kantorovich bound, and of the default '
            'kernel when the true exponents are others (noise constant in p).',
            misspecified_kernel,
        ),
    ),
    'adpo': (
        Drawing(
            'trust_region',
            'The anchored trust region: how far the optimum moves from the anchor with τ, and the '
            'loss around the optimum with its quadratic form.',
            trust_region,
        ),
    ),
}


def write(papers: list[str], directory: Path) -> dict[str, list[tuple[str, str]]]:
    """Draws the papers' figures into `directory`; returns paper -> [(file name, caption)]."""
    written: dict[str, list[tuple[str, str]]] = {}
    with matplotlib.rc_context(STYLE):
        for paper in papers:
            for drawing in DRAWINGS.get(paper, ()):
                name = f'{drawing.name}.png'
                drawing.draw().savefig(directory / name)
                written.setdefault(paper, []).append((name, drawing.caption))
    return written
