"""Preferences among the next states of a generator of few steps, for states with noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kd import config as config_lib
from kd.context import Context
from kd.errors import UserError
from kd.losses import diffusion_preference, preference_family
from kd.method import Method, Objective, Player, alternate
from kd.methods import start
from kd.methods.diffusion import common
from kd.methods.diffusion.critic import GENERATOR
from kd.metrics import mean
from kd.ranges import Count, Positive
from kd.sampling import denoiser as denoisers
from kd.sampling.generator import Generator

# (states [B, ...] of the times [B], condition, frozen variables by name) -> [B]
Reward = Callable[..., jax.Array]


def preferred_steps(
    context: Context,
    *,
    times: tuple[Positive, ...],
    reward: Mapping[str, Any],
    reward_times: Count = 1,
    reward_updates: Count = 5,
    candidates: Count = 4,
    beta: Positive = 0.1,
) -> Method:
    """The second stage of Flash-DMD (2025, arXiv:2511.20549) without its first one beside it.

    A reward alone, which takes a generator from the data; see `preferring`.

    Args:
      context: the stage, which starts from `references.start`, a generator of few steps.
      times: of the generator, decreasing.
      reward: block of a builder `f(context, ...) -> reward(z, t, condition, frozen) -> [B]` of
        states with the noise of their time; it is not differentiated.
      reward_times, reward_updates, candidates, beta: see `preferring`.
    """
    judge = config_lib.build(reward, context, where=f'{context.stage}.method.reward')
    player = preferring(
        context, common.student(context, times), judge, reward_times, reward_updates, candidates,
        beta,
    )  # fmt: skip
    network, whole = context.network, start.to_parts(**{GENERATOR: start.whole})
    begun = start.from_reference(
        lambda key: {GENERATOR: network.init(key)}, context, transform=whole
    )
    return alternate({GENERATOR: player}, begun)


def brightness(context: Context) -> Reward:
    """The mean of a state, which noise leaves as it is: a reward that asks for ever more of it."""
    del context
    return lambda z, t, condition, frozen: jnp.mean(z.reshape(len(z), -1), axis=1)


def preferring(
    context: Context,
    student: Generator,
    reward: Reward,
    first: int = 1,
    updates: int = 5,
    candidates: int = 4,
    beta: float = 0.1,
    others: int = 0,
) -> Player:
    """A player that moves the generator to the best of several next states, from the worst.

        L = -log sigma(beta [log p / p_ref (z^w) - log p / p_ref (z^l)]),  z ~ p(. | z_t)

    with the densities of whole states, not means over their dimensions. p_ref is `references.start`
    and the states z are constants. Where p is p_ref the loss is log 2 at any beta.

    Args:
      context: of the stage.
      student: draws noise from one time to the next.
      reward: see `preferred_steps`.
      first: steps from the first so many times are trained.
      updates: moves in a step; 5 in the paper.
      candidates: k; ours, as beta.
      beta: see above.
      others: moves of the generator in a step by others, which share its optimiser.

    Raises:
      UserError: no reference, or times from which there is no such step.

    Source: Flash-DMD, arXiv:2511.20549, stage 2.
    """
    where = f'{context.stage}.method'
    if start.START not in context.references:
        raise UserError(f'{where}: rewards are for {context.stage}.references.{start.START}.')
    if first >= len(student.times) or student.step.kernel is None or candidates < 2:
        raise UserError(
            f'{where}: steps from the first {first} of {len(student.times)} times must draw noise, '
            f'and {candidates} candidates be two or more.'
        )
    network, shape = context.network, context.spec['input'].shape
    own, kernel = student.denoiser, student.step.kernel
    path, grid = own.schedule, jnp.asarray(student.times, jnp.float32)

    def loss(params, state, batch, key):
        exit_key, key, noise_key = jax.random.split(key, 3)
        condition, rows = denoisers.conditions(network, batch), (len(batch['input']), *shape)
        exit = jax.random.randint(exit_key, (), 0, first)
        at = student._replace(exits=lambda key, rows: exit)
        variables = state.variables(part=GENERATOR, params=params)
        made = at.rollout(variables, condition, key, rows, True, state.frozen)
        z, t, to = made.input, made.time, jnp.broadcast_to(grid[exit + 1], rows[:1])
        anchor = own.apply(state.frozen[start.START], z, t, condition).x0
        (center, std), (before, _) = (kernel(path, mu, z, t, to) for mu in (made.x, anchor))
        std = jnp.broadcast_to(std, rows)
        noise = jax.random.normal(noise_key, (candidates, *rows))
        drawn = jax.lax.stop_gradient(center + std * noise)
        scores = jax.vmap(lambda z: reward(z, to, condition, state.frozen))(drawn)
        pair = diffusion_preference.best_worst(drawn, scores)

        def log_p(mean):
            return diffusion_preference.gaussian_logp(
                pair, mean[:, None], std[:, None], axes=len(shape), reduce='sum'
            )

        losses = preference_family.dpo(log_p(center), log_p(before), beta)
        moved = jnp.sqrt(jnp.mean(jnp.square((center - before) / std)))
        return Objective(mean(losses), {'reward': mean(scores), 'moved': mean(moved)})

    return Player(
        loss, context.tx_of(updates + others), of=GENERATOR, slot=GENERATOR, repeats=updates,
        rows='same',
    )  # fmt: skip
