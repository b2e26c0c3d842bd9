"""DMD and DMD2: generators of few steps by matching of distributions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from kd.context import Context
from kd.losses.score_distillation import Weight
from kd.method import Method
from kd.methods.diffusion import common
from kd.methods.diffusion.distribution_matching import distribution_matching
from kd.ranges import Count, Finite, Fraction, NonNegative, Positive
from kd.sampling import times as times_lib


def dmd(
    context: Context,
    *,
    times: tuple[Positive, ...],
    optimizer: Mapping[str, Any],
    clock: Mapping[str, Any] | None = None,
    guidance: Finite = 1.0,
    updates: Count = 5,
    between: tuple[Fraction, Fraction] = (0.02, 0.98),
    critic_between: tuple[Fraction, Fraction] = (0.0, 1.0),
    weight: Weight = 'eps',
    sample: Literal['shared', 'fresh'] = 'shared',
    step: Literal['restart', 'ddim', 'ancestral'] = 'restart',
    gan: NonNegative = 0.0,
    gan_critic: NonNegative = 1e-2,
    feature: str = '',
    regression: NonNegative = 0.0,
    unroll: bool = False,
) -> Method:
    """DMD2 (Yin et al. 2024, arXiv:2405.14867), and with `regression` DMD (2311.18828).

        g = (mu_fake - mu_real) / mean |x - mu_real|,   x = G(x_s, s) of the generator's own x_s

    The critic learns from the generator's samples at all times; with `gan` a head on its features
    also tells these from examples of the data, and the generator fools it.

    Args:
      context: the stage. Its network and teacher are denoisers (`kd.models.denoiser`) or flows;
        set `result='generator'`.
      times: at which the generator is asked, decreasing: (80.0,) for one step of EDM.
      optimizer: of the critic, as of a stage.
      clock: block of `kd.sampling.times` in whose measure times of noise are drawn evenly; None for
        the times of the teacher's schedule.
      guidance: of the teacher, see `kd.sampling.denoiser.guided`.
      updates: moves of the critic for one of the generator.
      between, critic_between: ranks of the clock between which g and the critic draw their times.
      weight: of the critic's loss, see `kd.losses.score_distillation.denoising`.
      sample: what the critic's first move sees, see `kd.methods.diffusion.critic.Critic`;
        Self-Forcing (arXiv:2506.08009) has 'fresh' and `critic_between=(0.02, 0.98)`.
      step: of the generator.
      gan: weight of the adversarial loss of the generator; 0 for no discriminator.
      gan_critic: of the discriminator's loss in the critic's.
      feature: of the network, which the discriminator reads.
      regression: weight of the squared error between what the generator makes of a noise and what
        the teacher's sampler has made of it; the data are `kd.data.sampled.pairs`. The paper has
        .25, of a perceptual distance.
      unroll: the critic's moves are no loop, for convolutions on CPU.
    """
    student, teacher = common.student(context, times, step), common.teacher(context)
    measure = common.clock(clock, teacher)
    law = times_lib.uniform(measure, *critic_between)
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
            sample=sample,
            unroll=unroll,
        ),
        direction=common.matching(times_lib.uniform(measure, *between), guidance),
        terms=[common.regression(context, times, regression)] if regression else [],
        discriminator=common.discriminator(context, feature, law, gan, gan_critic),
    )
