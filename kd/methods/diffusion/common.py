"""What the builders of this room make of their arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kd import config as config_lib
from kd.context import Context
from kd.data import sampled
from kd.errors import UserError
from kd.losses import score_distillation
from kd.methods.diffusion.critic import Critic, Discriminator
from kd.methods.diffusion.distribution_matching import Direction, Term
from kd.metrics import mean
from kd.models.discriminator import FeatureHead
from kd.network import feature_names
from kd.ranges import Count, NonNegative, Positive
from kd.sampling import denoiser as denoisers
from kd.sampling import generator
from kd.sampling import times as times_lib
from kd.sampling.denoiser import Denoiser
from kd.sampling.generator import Generator
from kd.sampling.times import Clock, TimeLaw


def teacher(context: Context) -> Denoiser:
    """The denoiser of the stage's teacher."""
    return denoisers.of_network(context.teacher, context.trained_by.get('teacher'))


def student(context: Context, times: tuple[Positive, ...], step: str = 'restart') -> Generator:
    """The stage's network as a generator, see `kd.sampling.generator.of_network`."""
    return generator.of_network(
        context.network, times, step, context.trained_by.get('teacher'),
        where=f'{context.stage}.method',
    )  # fmt: skip


def clock(block: Mapping[str, Any] | None, denoiser: Denoiser) -> Clock:
    """The clock of a block; None for the natural one of the denoiser's schedule."""
    if block is None:
        return times_lib.natural(denoiser.schedule)
    return config_lib.build(block, where='method.clock')


def critic(
    context: Context, optimizer: Mapping[str, Any], law: TimeLaw, *, updates: Count, **how: Any
) -> Critic:
    """A critic of the form of the stage's teacher.

    Args:
      context: the stage.
      optimizer: arguments of `Context.optimizer`.
      law: of the times of its noise.
      updates, **how: fields of `Critic`.
    """
    tx = context.optimizer(updates=updates, **optimizer)
    return Critic(context.teacher, teacher(context), tx, law, updates=updates, **how)


def discriminator(
    context: Context, feature: str, law: TimeLaw, weight: NonNegative, critic_weight: NonNegative
) -> Discriminator | None:
    """A head on a feature of the teacher's network; None for the weight 0.

    Raises:
      UserError: a feature that the network does not have.
    """
    if not weight:
        return None
    known = feature_names(context.teacher)
    if feature not in known:
        raise UserError(
            f"{context.stage}.method.feature='{feature}' is no feature of the network, whose are "
            f'{", ".join(known)}.'
        )
    return head(feature, law, weight, critic_weight)


def head(feature: str, law: TimeLaw, weight: float, critic_weight: float) -> Discriminator:
    """A `FeatureHead` on a feature of the critic's network."""
    return Discriminator(FeatureHead(), feature, weight, critic_weight, law)


def matching(law: TimeLaw, guidance: float) -> Direction:
    """The direction of DMD: the guided teacher and the fake denoiser of one noised sample."""

    def direction(views, key):
        x_t, t = views.noised(key, law)
        real, fake = views.real(x_t, t, guidance), views.fake(x_t, t)
        # How far apart fake and real are: 0 where critic and generator have arrived.
        lag = {'gap': mean(jnp.abs(jax.lax.stop_gradient(fake - real)))}
        return score_distillation.direction(views.x, real, fake), lag

    return direction


def regression(context: Context, times: tuple[float, ...], weight: float) -> Term:
    """mean (G(noise) - sample)^2 with the sample that the teacher has made of the noise: [B].

    Raises:
      UserError: data without pairs, or pairs whose noise is at another time than the generator's.

    Source: DMD, arXiv:2311.18828, section 3.3, with the squared error for its perceptual distance.
    """
    if sampled.NOISE not in context.spec:
        raise UserError(
            f'{context.stage}.method.regression wants pairs of a noise and a sample of the '
            "teacher; name a stage of these as the data's source (kd.data.sampled.pairs)."
        )
    for split in context.splits:
        grid = getattr(context.source(split), 'grid', None)
        if grid is not None and not np.isclose(grid[0], times[0]):
            raise UserError(
                f'{context.stage}.method.times begin at {times[0]:g}, and the noise of its pairs '
                f'is at {grid[0]:g}; take that, or make pairs of the other.'
            )

    def loss(views, batch, key):
        del key
        noise, made = (batch[name][: len(views.x)] for name in (sampled.NOISE, sampled.SAMPLE))
        said = views.generator(noise, jnp.full(len(noise), times[0]))
        return jnp.mean(jnp.square(said - made).reshape(len(made), -1), axis=1)

    return Term('regression', weight, loss)
