"""Flash-DMD: matching where there is much noise, a discriminator where there is little."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kd import config as config_lib
from kd.context import Context
from kd.errors import UserError
from kd.losses.score_distillation import Weight
from kd.method import Method, Player
from kd.methods.diffusion import common
from kd.methods.diffusion.critic import TEACHER, Critic
from kd.methods.diffusion.distribution_matching import (
    Direction,
    Further,
    distribution_matching,
)
from kd.methods.diffusion.judge import DISCRIMINATOR, Adversary, fooled, judged_by, telling
from kd.methods.diffusion.preferred_steps import preferring
from kd.ranges import Count, Finite, Fraction, NonNegative, Positive, Size
from kd.sampling import times as times_lib
from kd.sampling.denoiser import Denoiser
from kd.sampling.generator import Generator

REWARDED = 'rewarded'
# Rows of a batch that matching and the discriminator have where both have some.
EARLY, LATE, ALL = slice(0, None, 2), slice(1, None, 2), slice(None)


def flash_dmd(
    context: Context,
    *,
    times: tuple[Positive, ...],
    high: Size,
    optimizer: Mapping[str, Any],
    heads: Mapping[str, Mapping[str, Any]] | None = None,
    reads: Mapping[str, str] | None = None,
    gan: NonNegative = 1.0,
    coupling: Fraction = 0.97,
    clock: Mapping[str, Any] | None = None,
    guidance: Finite = 1.0,
    updates: Count = 1,
    between: tuple[Fraction, Fraction] = (0.02, 0.98),
    weight: Weight = 'eps',
    reward: Mapping[str, Any] | None = None,
    reward_times: Count = 1,
    reward_updates: Count = 5,
    candidates: Count = 4,
    beta: Positive = 0.1,
    unroll: bool = False,
) -> Method:
    """Flash-DMD (2025, arXiv:2511.20549).

    | rows | asked at one of | the generator follows |
    |---|---|---|
    | 0, 2, .. | the first `high` times | the direction of DMD |
    | 1, 3, .. | the others | softplus(-D(G)), D a discriminator of clean samples |

    All have run there without gradient, from noise of their own, and each part is a mean over its
    own rows. The fake denoiser goes towards the generator, by `coupling`, before its own moves.
    With all times high and coupling 1 it is DMD2 without a discriminator. With a `reward` it is
    stage 2: the same, and beside it moves of the generator by preferences among its next states.

    Args:
      context, times, optimizer, clock, guidance, updates, between, weight, unroll: as of
        `kd.methods.diffusion.dmd.dmd`; `optimizer` is the discriminator's too. Stage 2 starts from
        `references.start`, the generator of stage 1, and its critic as the teacher.
      high: how many of the times are of matching; 3 of 4 in a review of the paper.
      heads, reads: the discriminator, see `kd.methods.diffusion.judge.judged_by`; the paper has
        heads on frozen features of SAM.
      gan: weight of its loss in the generator's; ours.
      coupling: 1 for none; ours, the paper does not say it.
      reward, reward_times, reward_updates, candidates, beta: see
        `kd.methods.diffusion.preferred_steps`.
    """
    where = f'{context.stage}.method'
    if high > len(times) or (high < len(times)) != bool(heads):
        raise UserError(
            f'{where}: {high} of {len(times)} times are of matching, and the others, if there are '
            'any, of a discriminator, which has heads.'
        )
    student, teacher = common.student(context, times), common.teacher(context)
    measure, adversary, player = common.clock(clock, teacher), None, None
    if heads:
        judge = judged_by(context, heads, reads or {})
        adversary = Adversary(*judge, context.optimizer(**optimizer), gan)
    if reward is not None:
        asked = config_lib.build(reward, context, where=f'{where}.reward')
        player = preferring(
            context, student, asked, reward_times, reward_updates, candidates, beta, others=1
        )
    critic = common.critic(
        context, optimizer, times_lib.uniform(measure), weight=weight, updates=updates,
        unroll=unroll, coupling=coupling, start=TEACHER if reward else '',
    )  # fmt: skip
    direction = common.matching(times_lib.uniform(measure, *between), guidance)
    return flash(context, student, high, teacher, critic, direction, adversary, player)


def flash(
    context: Context,
    student: Generator,
    high: int,
    teacher: Denoiser,
    critic: Critic,
    direction: Direction,
    adversary: Adversary | None = None,
    rewarded: Player | None = None,
) -> Method:
    """The method of `flash_dmd`, of its parts; `adversary` where there are times for it."""
    players, terms = {}, []
    if adversary is not None:
        late = LATE if high else ALL
        student = student._replace(exits=alternately(high, len(student.times)))
        direction = of_rows(direction, EARLY) if high else nothing
        players[DISCRIMINATOR], terms = telling(adversary, late), [fooled(adversary, late)]
    if rewarded is not None:
        players[REWARDED] = rewarded

    def init(key, frozen):
        return {DISCRIMINATOR: {'params': adversary.init(key)}} if adversary else {}

    return distribution_matching(
        context, student=student, teacher=teacher, critic=critic, direction=direction, terms=terms,
        further=Further(players, init), tx=None if rewarded is None else rewarded.tx,
    )  # fmt: skip


def alternately(high: int, count: int) -> Callable[[jax.Array, int], jax.Array]:
    """Every other example ends at one of the first `high` of `count` times, the others later."""

    def exits(key: jax.Array, rows: int) -> jax.Array:
        early = (jnp.arange(rows) % 2 == 0) & (high > 0)
        return jax.random.randint(
            key, (rows,), jnp.where(early, 0, high), jnp.where(early, high, count)
        )

    return exits


def nothing(views, key) -> tuple[jax.Array, dict]:
    """No direction."""
    del key
    return jnp.zeros_like(views.x), {}


def of_rows(direction: Direction, rows: slice) -> Direction:
    """The direction of some examples, as a mean over these; 0 for the others."""

    def asked(views, key):
        g, metrics = direction(views.part(rows), key)
        whole = jnp.zeros(views.x.shape, g.dtype)
        return whole.at[rows].set(g * (len(whole) / len(g))), metrics

    return asked
