"""ADPO: the anchored trust region."""

from __future__ import annotations

import jax
import numpy as np
from matplotlib.figure import Figure

from kd.losses import preference
from kd.theory.figures import COLOURS, GREY, Drawing, panels
from kd.theory.statements.rows import run


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


DRAWINGS = (
    Drawing(
        'trust_region',
        'The anchored trust region: how far the optimum moves from the anchor with τ, and the '
        'loss around the optimum with its quadratic form.',
        trust_region,
    ),
)
