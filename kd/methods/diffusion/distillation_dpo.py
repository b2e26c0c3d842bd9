"""Distillation-DPO: samples that a metric prefers pull a generator, others push it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from kd.context import Context
from kd.losses import point_clouds, score_distillation
from kd.losses.schedule import convert
from kd.method import Batch, Method, Objective, Player, alternate
from kd.methods.diffusion import common
from kd.methods.diffusion.critic import GENERATOR, TEACHER
from kd.methods.start import as_own
from kd.metrics import mean
from kd.ranges import Count, Finite, Fraction, NonNegative, Positive
from kd.references import START
from kd.sampling import denoiser as denoisers
from kd.sampling import times as times_lib
from kd.sampling.completion import Completion
from kd.sampling.generator import Rollout
from kd.state import PyTree, State

ASSISTANTS, WINNER, LOSER = 'assistants', 'winner', 'loser'
Form = Literal['preferred', 'repaired', 'released']


def distillation_dpo(
    context: Context,
    *,
    times: tuple[Positive, ...],
    optimizer: Mapping[str, Any],
    scale: Positive = 1.1,
    form: Form = 'preferred',
    gamma: Finite = 1.0,
    kappa: NonNegative = 1.0,
    updates: Count = 2,
    between: tuple[Fraction, Fraction] = (0.0, 1.0),
    step: Literal['restart', 'ddim', 'ancestral'] = 'ddim',
) -> Method:
    """Distillation-DPO for completion of clouds (2025, arXiv:2504.11447).

    Two samples of a scene, from noise z and `scale` z, are ranked by their Chamfer distance to the
    whole one. Two assistants learn the noise of winners and of losers; then the generator moves,
    on samples of its own, against

    | form | d of a winner | d of a loser |
    |---|---|---|
    | preferred | eps_T - (eps_w + eps_l) / 2 + gamma (eps_w - eps_l) | the same |
    | repaired | eps_T - eps_w | -kappa (eps_T - eps_l) |
    | released | times (x_t - x), which no parameter moves: its gradient is 0 | |

    with eps_T the teacher's, all at one time and one noise for both samples. The second is what the
    paper's code means to do: where the generator has reached the teacher it undoes the preference,
    and its part of losers has no bound. The first is ours: winners and losers are halves of one
    law, tilted by the metric, so that eps_l - eps_w points to what is preferred; without gamma it
    is score distillation.

    The paper's solver takes a step of a preserved variance from offsets, which multiplies errors of
    one step by 5.8; here x_t = x + sigma e is solved as it is.

    Args:
      context: the stage; network and teacher are denoisers of clouds that are conditioned on
        `partial`, and the batch has whole clouds as `input`. Set `result='generator'`.
      times: at which the generator is asked, decreasing.
      optimizer: of the assistants, as of a stage.
      scale: of the second noise, lambda.
      form, gamma, kappa: see above.
      updates: moves of the assistants for one of the generator.
      between: ranks of the schedule's times between which noise is drawn.
      step: of the generator.
    """
    network, shape = context.network, context.spec['input'].shape
    teacher, own = common.teacher(context), common.student(context, times, step)
    path = teacher.schedule
    law = times_lib.uniform(times_lib.even(path), *between)
    assistant = denoisers.of_network(context.teacher, context.trained_by.get('teacher'))

    def pair(state: State, batch: Batch, key: jax.Array, params: PyTree = None):
        """(winners, losers, whether the first won, condition)."""
        variables = state.variables(part=GENERATOR, params=params)
        condition = denoisers.conditions(network, batch)
        size = (len(batch['input']), *shape)
        # One key: one noise, at two scales.
        made: list[Rollout] = [
            Completion(own, factor).rollout(
                variables, condition, key, size, params is not None, state.frozen
            )
            for factor in (1.0, scale)
        ]
        first, second = made[0].x, made[1].x

        def cost(x: jax.Array) -> jax.Array:
            return point_clouds.chamfer(jax.lax.stop_gradient(x), batch['input'])

        ranked = point_clouds.rank_pair(first, second, (cost(first), cost(second)))
        return *ranked, condition

    def noised(key: jax.Array, x: jax.Array):
        time_key, noise_key = jax.random.split(key)
        t = law(time_key, jnp.zeros(len(x)))
        noise = jax.random.normal(noise_key, x.shape, x.dtype)
        return t, noise

    def assistants_loss(params, state, batch, key):
        keys = jax.random.split(key, 3)
        *both, _, condition = jax.lax.stop_gradient(pair(state, batch, keys[0]))
        losses, metrics = jnp.zeros(len(batch['input'])), {}
        for name, x, key in zip((WINNER, LOSER), both, keys[1:], strict=True):
            t, noise = noised(key, x)
            variables = {'params': params[name]}
            said = assistant.apply(variables, path.mix(x, noise, t), t, condition, train=True).x0
            value = score_distillation.denoising(said, x, path, t, 'eps')
            losses, metrics[name] = losses + value, mean(value)
        return Objective(mean(losses), metrics)

    def generator_loss(params, state, batch, key):
        keys = jax.random.split(key)
        winner, loser, won, condition = pair(state, batch, keys[0], params)
        t, noise = noised(keys[1], winner)

        def eps(which, variables, x):
            x_t = jax.lax.stop_gradient(path.mix(x, noise, t))
            said = which.apply(variables, x_t, t, condition).x0
            return jax.lax.stop_gradient(convert(path, said, x_t, t, 'x0', 'eps'))

        helpers = {name: {'params': state.params[ASSISTANTS][name]} for name in (WINNER, LOSER)}

        def direction(x, name):
            real = eps(teacher, state.frozen[TEACHER], x)
            if form != 'preferred':
                sign = 1.0 if name == WINNER else -kappa
                return sign * score_distillation.vsd(real, eps(assistant, helpers[name], x))
            of_winners, of_losers = (eps(assistant, helpers[who], x) for who in (WINNER, LOSER))
            return score_distillation.preferred(real, of_winners, of_losers, gamma)

        directions = direction(winner, WINNER), direction(loser, LOSER)
        losses = sum(
            _released(path, x, noise, t, d)
            if form == 'released'
            else score_distillation.surrogate(x, d)
            for x, d in zip((winner, loser), directions, strict=True)
        )
        size = {
            'direction': mean(jnp.abs(directions[0])),
            'first_wins': mean(won.astype(jnp.float32)),
        }
        return Objective(mean(losses), size)

    def init(key: jax.Array, frozen: Mapping[str, PyTree]) -> PyTree:
        where = f'{context.stage}.teacher'
        fresh = network.init(key)
        begun = as_own(fresh, frozen.get(START, frozen[TEACHER]), where)
        helper = as_own(context.teacher.init(key), frozen[TEACHER], where)['params']
        return {GENERATOR: begun, ASSISTANTS: {'params': {WINNER: helper, LOSER: helper}}}

    tx = context.optimizer(updates=updates, **optimizer)
    players = {
        ASSISTANTS: Player(assistants_loss, tx, repeats=updates, rows='same'),
        GENERATOR: Player(generator_loss, context.tx),
    }
    return alternate(players, init)


def _released(path, x, noise, t, d):
    """mean (x_t - x) d of each example: its value moves, and its gradient is 0."""
    apart = path.mix(x, noise, t) - x
    return jnp.mean(apart * d, axis=tuple(range(1, x.ndim)))
