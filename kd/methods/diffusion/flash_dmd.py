"""Flash-DMD: matching where there is much noise, a discriminator where there is little."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kd import config as config_lib
from kd.context import Context
from kd.errors import UserError
from kd.losses import adversarial, diffusion_preference, preference_family
from kd.losses.score_distillation import Weight
from kd.method import Method, Objective, Player
from kd.methods import start
from kd.methods.diffusion import common
from kd.methods.diffusion.distribution_matching import (
    GENERATOR,
    Direction,
    More,
    Term,
    distribution_matching,
)
from kd.metrics import mean
from kd.network import Network, from_linen
from kd.ranges import Count, Finite, Fraction, NonNegative, Positive, Size
from kd.sampling import denoiser as denoisers
from kd.sampling import diffusion
from kd.sampling import times as times_lib
from kd.sampling.generator import Generator, rollout

DISCRIMINATOR, REWARDED = 'discriminator', 'rewarded'
# `reward(z, t [B], condition, frozen) -> [B]` of states with the noise of a time.
Reward = Callable[..., jax.Array]


class Split(NamedTuple):
    """A generator of which every other row is asked at one of the first `high` times, others later.

    Rows 0, 2, ... are of matching, rows 1, 3, ... of the discriminator; all have run there without
    gradient, from noise of their own.
    """

    generator: Generator
    high: int

    @property
    def border(self) -> float:
        """Times above it are of matching."""
        times = self.generator.times
        return 0.5 * (times[self.high - 1] + times[self.high])

    def rollout(self, variables, condition, key, shape, train, frozen):
        """As of `Generator`."""
        del frozen
        keys, made = jax.random.split(key, 5), self.generator
        path, count = made.denoiser.schedule, len(made.times)
        early = jnp.arange(shape[0]) % 2 == 0
        first = jax.random.randint(keys[1], (shape[0],), 0, self.high)
        later = jax.random.randint(keys[4], (shape[0],), self.high, count)

        def call(x, t):
            said = made.denoiser.apply(variables, x, t, condition, train=train, key=keys[3])
            return said.x0

        return rollout(
            path,
            made.denoiser.bind(variables, condition),
            made.times,
            diffusion.noise(path, keys[0], shape, made.times[0]),
            keys[2],
            jnp.where(early, first, later),
            step=made.step,
            call=call,
        )


class Pixels(NamedTuple):
    """A discriminator of clean samples.

    Attributes:
      network: [B, ...] -> logits [B, n].
      tx: its optimiser.
      weight: of its loss in the generator's.
    """

    network: Network
    tx: optax.GradientTransformation
    weight: float


def flash_dmd(
    context: Context,
    *,
    times: tuple[Positive, ...],
    high: Size,
    optimizer: Mapping[str, Any],
    discriminator: Mapping[str, Any] | None = None,
    gan: NonNegative = 0.0,
    coupling: Fraction = 0.97,
    clock: Mapping[str, Any] | None = None,
    guidance: Finite = 1.0,
    updates: Count = 1,
    between: tuple[Fraction, Fraction] = (0.02, 0.98),
    weight: Weight = 'eps',
    reward: Mapping[str, Any] | None = None,
    reward_updates: Count = 5,
    candidates: Count = 4,
    beta: Positive = 1.0,
    unroll: bool = False,
) -> Method:
    """Flash-DMD (2025, arXiv:2511.20549).

    | rows | asked at | the generator follows |
    |---|---|---|
    | 0, 2, .. | one of the first `high` times | the direction of DMD |
    | 1, 3, .. | one of the others | softplus(-D(G)), D a discriminator of clean samples |

    Each part is a mean over its own rows. The fake denoiser moves towards the generator, by
    `coupling`, before its own moves; the discriminator is a network of its own. With all times high
    and coupling 1 it is DMD2 without a discriminator. With a `reward` it is stage 2: the same, and
    moves of the generator by preferences among its own next states beside it, see `rewarded`.

    Args:
      context, times, optimizer, clock, guidance, updates, between, weight, unroll: as of
        `kd.methods.diffusion.dmd.dmd`; `optimizer` is the discriminator's too.
      high: how many of the times are of matching: 3 of 4, as a review of the paper has it.
      discriminator: block of a network; the paper has frozen features of SAM and heads on them.
      gan: weight of the discriminator's loss in the generator's; ours.
      coupling: 1 for none; the paper does not say it, published couplings are .97 to .99.
      reward: block of a builder `f(context, ...) -> reward(z, t, condition, frozen) -> [B]`.
      reward_updates, candidates, beta: see `rewarded`.
    """
    if not 0 <= high <= len(times):
        raise UserError(f'{context.stage}.method.high={high}, and there are {len(times)} times.')
    if high < len(times) and discriminator is None:
        raise UserError(
            f'{context.stage}.method: the times after the first {high} need a discriminator.'
        )
    student, teacher = common.student(context, times), common.teacher(context)
    measure, pixels = common.clock(clock, teacher), None
    if discriminator is not None:
        module = config_lib.build(discriminator, where=f'{context.stage}.method.discriminator')
        x = context.spec['input']
        network = from_linen(module, jax.ShapeDtypeStruct((1, *x.shape), x.dtype))
        pixels = Pixels(network, context.optimizer(**optimizer), gan)
    critic = common.critic(
        context, optimizer, times_lib.uniform(measure), weight=weight, updates=updates,
        unroll=unroll, coupling=coupling,
    )  # fmt: skip
    matched = common.matching(times_lib.uniform(measure, *between), guidance)
    player = None
    if reward is not None:
        judge = config_lib.build(reward, context, where=f'{context.stage}.method.reward')
        player = rewarded(
            context, student, high, judge, context.tx_of(1 + reward_updates),
            repeats=reward_updates, candidates=candidates, beta=beta,
        )  # fmt: skip
    return flash(context, student, high, teacher, critic, matched, pixels, player)


def flash(
    context: Context,
    student: Generator,
    high: int,
    teacher: denoisers.Denoiser,
    critic,
    matched: Direction,
    pixels: Pixels | None,
    rewarded: Player | None = None,
) -> Method:
    """The method of `flash_dmd`, of its parts."""
    split = 0 < high < len(student.times)
    level = Split(student, high).border if split else (0.0 if high else float('inf'))
    players: dict[str, Player] = {}
    if pixels is not None:
        players[DISCRIMINATOR] = _discriminator(pixels, level)
    tx = context.tx
    if rewarded is not None:
        # One optimiser of the generator, whose moments both players share.
        players[REWARDED] = rewarded
        tx = rewarded.tx
    return distribution_matching(
        context,
        student=Split(student, high) if split else student,
        teacher=teacher,
        critic=critic,
        direction=above(matched, level),
        terms=[below(pixels, level)] if pixels is not None else [],
        more=More(players, lambda key: _begun(pixels, key), tx),
    )


def _begun(pixels: Pixels | None, key: jax.Array):
    return {} if pixels is None else {DISCRIMINATOR: pixels.network.init(key)}


def above(direction: Direction, level: float) -> Direction:
    """The direction for rows above a level, as a mean over these; 0 for the others."""

    def masked(views, key):
        g, metrics = direction(views, key)
        return g * _share(views.level > level).reshape((-1,) + (1,) * (g.ndim - 1)), metrics

    return masked


def below(pixels: Pixels, level: float) -> Term:
    """The generator's adversarial loss for rows below a level, as a mean over these."""

    def loss(views, batch, key):
        del batch, key
        logits = pixels.network.apply({'params': views.parts[DISCRIMINATOR]}, views.x).logits
        value = adversarial.generator_softplus(logits).reshape(len(logits), -1).mean(1)
        return value * _share(views.level <= level)

    return Term('adversarial', pixels.weight, loss)


def _share(rows: jax.Array) -> jax.Array:
    """1 / their share for the rows, 0 for others: a mean over the batch is one over the rows."""
    wanted = rows.astype(jnp.float32)
    return wanted / jnp.maximum(wanted.mean(), 1e-6)


def _discriminator(pixels: Pixels, level: float) -> Player:
    """It tells data from what the generator says below a level."""

    def loss(params, state, batch, key):
        del state, key
        made = batch[f'out/{GENERATOR}']
        real, fake = (
            pixels.network.apply({'params': params}, x).logits for x in (batch['input'], made['x'])
        )
        losses, late = adversarial.discriminator_softplus(real, fake), made['level'] <= level
        told = mean((real > fake).astype(jnp.float32), where=late)
        return Objective(mean(losses, where=late), {'told_apart': told})

    return Player(loss, pixels.tx)


def rewarded(
    context: Context,
    student: Generator,
    high: int,
    reward: Reward,
    tx: optax.GradientTransformation,
    *,
    repeats: int = 5,
    candidates: int = 4,
    beta: float = 1.0,
) -> Player:
    """Stage 2: the best and the worst of several next states, at the times with much noise.

        L = -log sigma(beta [log p / p_ref (z^w) - log p / p_ref (z^l)]),  z ~ p(. | z_t)

    Args:
      context: of the stage; `references.start` is p_ref.
      student: draws noise from one time to the next.
      high: steps from the first so many times are trained.
      reward: of the next states, with their noise; never differentiated.
      tx: of the generator, shared with matching.
      repeats: moves for one of matching; 5 in the paper.
      candidates: k; ours, as beta.
    """
    if start.START not in context.references:
        raise UserError(f'{context.stage}: rewards need references.{start.START}, where p begins.')
    network, shape = context.network, context.spec['input'].shape
    own, count = student.denoiser, min(high, len(student.times) - 1)
    path, grid = own.schedule, jnp.asarray(student.times, jnp.float32)
    assert student.step.kernel is not None
    kernel = student.step.kernel

    def loss(params, state, batch, key):
        keys = jax.random.split(key, 4)
        condition, rows = denoisers.conditions(network, batch), (len(batch['input']), *shape)
        variables = state.variables(part=GENERATOR, params=params)
        exit = jax.random.randint(keys[1], (), 0, count)
        z = diffusion.noise(path, keys[0], rows, student.times[0])
        denoise = own.bind(jax.lax.stop_gradient(variables), condition)
        state_at = rollout(path, denoise, student.times, z, keys[2], exit, step=student.step)
        x, t, to = state_at.input, state_at.time, jnp.broadcast_to(grid[exit + 1], rows[:1])
        center, std = kernel(path, own.apply(variables, x, t, condition).x0, x, t, to)
        anchor = own.apply(state.frozen[start.START], x, t, condition).x0
        theirs, _ = kernel(path, anchor, x, t, to)
        noise = jax.random.normal(keys[3], (candidates, *rows))
        drawn = jax.lax.stop_gradient(center + std * noise)
        scores = jax.vmap(lambda z: reward(z, to, condition, state.frozen))(drawn)
        pair = jnp.stack(best_worst(drawn, scores), axis=1)

        def log_p(mean):
            spread = jnp.broadcast_to(std, mean.shape)[:, None]
            return diffusion_preference.gaussian_logp(
                pair, mean[:, None], spread, axes=len(shape), reduce='sum'
            )

        losses = preference_family.dpo(log_p(center), log_p(theirs), beta)
        return Objective(mean(losses), {'reward': mean(scores)})

    return Player(loss, tx, of=GENERATOR, slot=GENERATOR, repeats=repeats, rows='same')


def best_worst(drawn: jax.Array, scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The candidates with the highest and the lowest score; of ties two that differ.

    Args:
      drawn: [k, B, ...].
      scores: [k, B].
    """
    order = jnp.argsort(scores, axis=0)
    rows = jnp.arange(scores.shape[1])
    return drawn[order[-1], rows], drawn[order[0], rows]
