"""Decoupled DMD: guidance as the spear, matching as the shield."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from kd.context import Context
from kd.losses import score_distillation
from kd.losses.score_distillation import Weight
from kd.method import Method
from kd.methods.diffusion import common
from kd.methods.diffusion.distribution_matching import (
    Direction,
    Term,
    distribution_matching,
)
from kd.metrics import mean
from kd.ranges import Count, Finite, Fraction, NonNegative, Positive
from kd.sampling import times as times_lib
from kd.sampling.times import Clock

Levels = Literal['shared', 'independent', 'constrained', 'hybrid']


def decoupled_dmd(
    context: Context,
    *,
    times: tuple[Positive, ...],
    optimizer: Mapping[str, Any],
    guidance: Finite,
    clock: Mapping[str, Any] | None = None,
    levels: Levels = 'hybrid',
    matching: NonNegative = 1.0,
    augmentation: NonNegative = 1.0,
    moments: tuple[Finite, Positive] | None = None,
    moments_weight: NonNegative = 1.0,
    over_batch: bool = False,
    gan: NonNegative = 0.0,
    gan_critic: NonNegative = 1e-2,
    feature: str = '',
    updates: Count = 5,
    between: tuple[Fraction, Fraction] = (0.02, 0.98),
    weight: Weight = 'eps',
    step: Literal['restart', 'ddim', 'ancestral'] = 'restart',
    unroll: bool = False,
) -> Method:
    """DMD with a time for what guidance adds, and another for matching (2025, arXiv:2511.22677).

        g = matching (mu_fake - mu_c)(x_t) - augmentation (a - 1) (mu_c - mu_u)(x_s)

    each over mean |x - mu_c| at its own time. With one time for both it is DMD with guidance a.

    | levels | s of the augmentation | t of the matching |
    |---|---|---|
    | shared | any | the same, with the same noise |
    | independent | any | any |
    | constrained | cleaner than the generator's own | cleaner than the generator's own |
    | hybrid | cleaner than the generator's own | any |

    Args:
      context, times, optimizer, clock, updates, weight, step, unroll: as of
        `kd.methods.diffusion.dmd.dmd`.
      guidance: a, of the teacher.
      levels: see above.
      matching, augmentation: weights; 0 leaves a part out, which the paper's ablations do.
      moments: (mean, variance) of the data for `kd.losses.score_distillation.mean_variance_kl`, the
        other shield; None for none.
      moments_weight: of it.
      over_batch: moments are those of each dimension over the batch, for data of few dimensions,
        rather than of an example over its own.
      gan, gan_critic, feature: as of `kd.methods.diffusion.dmd.dmd`, which the paper has for SDXL.
      between: ranks of the clock between which times lie.
    """
    student, teacher = common.student(context, times, step), common.teacher(context)
    measure = common.clock(clock, teacher)
    law = times_lib.uniform(measure)
    return distribution_matching(
        context,
        student=student,
        teacher=teacher,
        critic=common.critic(
            context,
            optimizer,
            law,
            weight=weight,
            updates=updates,
            unroll=unroll,
        ),
        discriminator=common.discriminator(context, feature, law, gan, gan_critic),
        direction=decoupled(measure, levels, guidance, matching, augmentation, between),
        terms=[] if moments is None else [shield(moments, moments_weight, over_batch)],
    )


def decoupled(
    clock: Clock,
    levels: Levels,
    guidance: float,
    matching: float = 1.0,
    augmentation: float = 1.0,
    between: tuple[float, float] = (0.02, 0.98),
) -> Direction:
    """The direction, see `decoupled_dmd`."""
    anywhere = times_lib.uniform(clock, *between)
    cleaner = times_lib.cleaner(clock, between[0])
    augmented = cleaner if levels in ('constrained', 'hybrid') else anywhere
    matched = cleaner if levels == 'constrained' else anywhere

    def direction(views, key):
        keys = jax.random.split(key)
        g, metrics = jnp.zeros_like(views.x), {}
        if augmentation:
            told, untold = views.both(*views.noised(keys[0], augmented))
            added = score_distillation.augmentation(told, untold, guidance)
            # By a residual of its own, as the matching is.
            added /= score_distillation.residual(views.x, told)
            g, metrics = g + augmentation * added, {'augmentation': mean(jnp.abs(added))}
        if matching:
            noised = views.noised(keys[0] if levels == 'shared' else keys[1], matched)
            pulled = score_distillation.direction(views.x, views.real(*noised), views.fake(*noised))
            g, metrics = g + matching * pulled, metrics | {'matching': mean(jnp.abs(pulled))}
        if matching and augmentation:
            # How much the shield has to undo, over what the spear does: it grows where the critic
            # falls behind.
            ratio = jnp.mean(jnp.abs(pulled)) / jnp.maximum(jnp.mean(jnp.abs(added)), 1e-12)
            metrics |= {'lag': mean(ratio)}
        return g, metrics

    return direction


def shield(moments: tuple[float, float], weight: float, over_batch: bool = False) -> Term:
    """The divergence of the moments of samples from those of data."""

    def loss(views, batch, key):
        del batch, key
        if not over_batch:
            return score_distillation.mean_variance_kl(views.x, *moments)
        of_batch = score_distillation.mean_variance_kl(views.x, *moments, axes=(0,))
        return jnp.broadcast_to(of_batch.mean(), views.x.shape[:1])

    return Term('moments', weight, loss)
