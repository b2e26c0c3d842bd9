"""Recursive meta-distillation: distances to the base teacher, and collapse without it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from kd.theory import meta_distillation as md
from kd.theory.figures import COLOURS, Drawing, panels
from kd.theory.statements import meta_refits
from kd.theory.statements.recursive_meta_distillation import trajectory


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


DRAWINGS = (
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
)
