"""SNOOPI's PG-SB: score distillation whose guidance is drawn, and the same for both teachers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from kd.context import Context
from kd.losses import score_distillation
from kd.losses.schedule import convert
from kd.losses.score_distillation import Weight
from kd.method import Method
from kd.methods.diffusion import common
from kd.methods.diffusion.distribution_matching import Direction, distribution_matching
from kd.metrics import mean
from kd.models.adapters import Adapter
from kd.ranges import Count, Decay, Finite, Fraction, Positive
from kd.sampling import times as times_lib
from kd.sampling.times import TimeLaw

Sides = Literal['both', 'real', 'fake']


def snoopi(
    context: Context,
    *,
    times: tuple[Positive, ...],
    optimizer: Mapping[str, Any],
    targets: str,
    rank: Count = 64,
    alpha: Positive = 128.0,
    guidance: tuple[Finite, Finite] = (0.5, 4.0),
    sides: Sides = 'both',
    dropout: Decay = 0.1,
    clock: Mapping[str, Any] | None = None,
    updates: Count = 1,
    between: tuple[Fraction, Fraction] = (0.02, 0.98),
    weight: Weight = 'alpha2',
    unroll: bool = False,
) -> Method:
    """Variational score distillation with drawn guidance (SNOOPI, arXiv:2412.02687).

        g = w(t) [eps_psi(x_t, t, c; k) - eps_pi(x_t, t, c; k)],  k ~ U(guidance), one an example,
        eps(c; k) = (1 - k) eps(none) + k eps(c)

    psi is the teacher and pi the teacher with low-rank adapters, which follows the generator. Where
    the two agree there is no direction at any k. As g is affine in k a drawn one has the mean of
    the fixed one in the middle; what it changes is the noise.

    Args:
      context, times, optimizer, clock, updates, between, weight, unroll: as of
        `kd.methods.diffusion.dmd.dmd`. The weight is SwiftBrush's, which the paper builds on.
      targets: regular expression of the kernels that have adapters, see `kd.models.adapters`.
      rank, alpha: of them.
      guidance: range of k; two equal numbers for a fixed one, which SwiftBrush has.
      sides: which denoisers are guided; the other one is told its condition (k = 1).
      dropout: share of pi's samples whose condition it is not told.
    """
    student, teacher = common.student(context, times), common.teacher(context)
    measure = common.clock(clock, teacher)
    critic = common.critic(
        context,
        optimizer,
        times_lib.uniform(measure),
        weight=weight,
        updates=updates,
        unroll=unroll,
        dropout=dropout,
        adapter=Adapter(rank, alpha, targets),
    )
    return distribution_matching(
        context,
        student=student,
        teacher=teacher,
        critic=critic,
        direction=drawn(times_lib.uniform(measure, *between), guidance, sides),
    )


def drawn(law: TimeLaw, guidance: tuple[float, float], sides: Sides = 'both') -> Direction:
    """The direction, see `snoopi`; w = sigma^2 / (alpha^2 + sigma^2), as SwiftBrush has it."""

    def direction(views, key):
        keys = jax.random.split(key)
        x_t, t = views.noised(keys[0], law)
        low, high = guidance
        k = jax.random.uniform(keys[1], t.shape, minval=low, maxval=high)
        path = views.schedule

        def said(name, pair):
            scale = k if sides in ('both', name) else jnp.ones_like(k)
            scale = scale.reshape(-1, *(1,) * (x_t.ndim - 1))
            told, untold = (convert(path, x, x_t, t, 'x0', 'eps') for x in pair)
            return untold + scale * (told - untold)

        real, fake = views.both(x_t, t), views.fake_both(x_t, t)
        noise = path.noise_to_signal(t) ** 2
        g = score_distillation.vsd(said('real', real), said('fake', fake), noise / (1 + noise))
        apart = (jnp.abs(one - other) for one, other in zip(fake, real, strict=True))
        return g, {name: mean(x) for name, x in zip(('gap', 'gap_null'), apart, strict=True)}

    return direction
