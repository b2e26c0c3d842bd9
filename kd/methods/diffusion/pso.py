"""Pairwise sample optimisation: few-step generators tuned by pairs of samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from kd import config as config_lib
from kd.context import Context
from kd.errors import UserError
from kd.losses import diffusion_preference, score_distillation
from kd.losses.score_distillation import Weight
from kd.method import Method, Objective, minimize, with_collect
from kd.methods import start
from kd.methods.diffusion import common
from kd.metrics import mean
from kd.ranges import Count, Decay, NonNegative, Positive
from kd.sampling import denoiser as denoisers
from kd.sampling import diffusion
from kd.sampling import times as times_lib
from kd.sampling.generator import Generator

Loss = Literal['pso', 'hinge', 'denoising']
# (samples [B, ...], condition, frozen variables by name) -> [B]
Reward = Callable[..., jax.Array]


def online_pso(
    context: Context,
    *,
    times: tuple[Positive, ...],
    reward: Mapping[str, Any],
    beta: Positive = 50.0,
    clip: Decay | None = 0.1,
    reduce: Literal['mean', 'sum'] = 'mean',
    step: Literal['restart', 'ancestral'] = 'restart',
    micro_batches: Count = 1,
) -> Method:
    """Two trajectories of each condition, one preferred, and the odds of their steps.

        L = mean over the steps i that draw noise of -log sigma(beta h (log rho_a - log rho_b)),
        rho = clip(p(x_{i+1} | x_i) / p_ref(x_{i+1} | x_i), 1 - eps, 1 + eps)

    The last step draws none and is not trained. The ratio is that to the frozen generator which
    the stage began as, not PPO's to the policy of the rollout.

    Args:
      context: the stage, which starts from `references.start`, a generator of few steps; that is
        also the reference.
      times: of the generator, decreasing.
      reward: block of a builder `f(context, ...) -> reward(x, condition, frozen) -> [B]`; it is
        asked about finished samples and is not differentiated.
      beta, clip, reduce: see `kd.losses.diffusion_preference`; beta is for `reduce='mean'`.
      step: of the generator; one that draws noise.
      micro_batches: parts over which gradients are accumulated.

    Source: Miao et al. 2024, arXiv:2410.03190.
    """
    judge = config_lib.build(reward, context, where=f'{context.stage}.method.reward')
    student = common.student(context, times, step)
    return online(context, student, judge, beta, clip, reduce, micro_batches)


def online(
    context: Context,
    student: Generator,
    reward: Reward,
    beta: float = 50.0,
    clip: float | None = 0.1,
    reduce: Literal['mean', 'sum'] = 'mean',
    micro_batches: int = 1,
) -> Method:
    """See `online_pso`."""
    network, shape = context.network, context.spec['input'].shape
    _check(context, student)

    def collect(state, batch, key):
        condition, rows = denoisers.conditions(network, batch), len(batch['input'])
        found = [
            trajectory(student, state.variables(), condition, k, (rows, *shape))
            for k in jax.random.split(key)
        ]
        scores = [reward(states[-1], condition, state.frozen) for states in found]
        # [B, 2, N, ...]: the states that steps lead from and to.
        states = jnp.stack([jnp.moveaxis(x[:-1], 0, 1) for x in found], axis=1)
        anchor = transitions(student, state.frozen[start.START], states, condition, reduce)
        sign = jnp.sign(scores[0] - scores[1])
        mean_reward = 0.5 * (scores[0] + scores[1])
        return {**batch, 'states': states, 'anchor': anchor, 'sign': sign, 'reward': mean_reward}

    def loss(params, state, batch, key):
        del key
        condition = denoisers.conditions(network, batch)
        variables = state.variables(params=params)
        log_p = transitions(student, variables, batch['states'], condition, reduce)
        ours, theirs = (jnp.moveaxis(x, 1, -1) for x in (log_p, batch['anchor']))
        sign = jnp.broadcast_to(batch['sign'][:, None], log_p[:, 0].shape)
        losses = diffusion_preference.clipped_pair(ours, theirs, sign, beta, clip)
        apart = jnp.abs(log_p - batch['anchor'])
        metrics = {'reward': mean(batch['reward']), 'log_ratio': mean(apart)}
        return Objective(mean(losses.mean(1)), metrics)

    made = minimize(
        loss, context.tx, start.from_reference(network.init, context), micro_batches=micro_batches
    )
    return with_collect(made, collect, 'online_pso')


def trajectory(student: Generator, variables, condition, key, shape) -> jax.Array:
    """States at all times and the sample, [N + 1, B, ...], constants."""
    noise_key, key = jax.random.split(key)
    path = student.denoiser.schedule
    z = diffusion.noise(path, noise_key, shape, student.times[0])
    denoise = student.denoiser.bind(variables, condition)
    return jax.lax.stop_gradient(
        diffusion.sample(path, denoise, z, student.times, key, step=student.step, trajectory=True)
    )


def transitions(student: Generator, variables, states, condition, reduce) -> jax.Array:
    """log p(x_{i+1} | x_i) of the steps that draw noise, [B, 2, N - 1], in one call.

    Args:
      student: with its times and its step.
      variables: of its network.
      states: [B, 2, N, ...].
      condition: [B, ...].
      reduce: see `kd.losses.diffusion_preference.gaussian_logp`.
    """
    lead, rest = states.shape[:3], states.shape[3:]
    steps = (*lead[:2], lead[2] - 1)
    grid = jnp.asarray(student.times, jnp.float32)

    def flat(x: jax.Array) -> jax.Array:
        return x.reshape(-1, *rest)

    def rows(x: jax.Array) -> jax.Array:
        wide = x.reshape(len(x), 1, 1, *x.shape[1:])
        return jnp.broadcast_to(wide, (*steps, *x.shape[1:])).reshape(-1, *x.shape[1:])

    x, after = flat(states[:, :, :-1]), flat(states[:, :, 1:])
    t, to = (jnp.broadcast_to(y, steps).reshape(-1) for y in (grid[:-1], grid[1:]))
    own = {name: rows(y) for name, y in condition.items()}
    said = student.denoiser.apply(variables, x, t, own).x0
    assert student.step.kernel is not None
    center, std = student.step.kernel(student.denoiser.schedule, said, x, t, to)
    found = diffusion_preference.gaussian_logp(
        after, center, jnp.broadcast_to(std, after.shape), axes=len(rest), reduce=reduce
    )
    return found.reshape(steps)


def offline_pso(
    context: Context,
    *,
    times: tuple[Positive, ...],
    loss: Loss = 'pso',
    beta: Positive = 5.0,
    kappa: NonNegative = 0.1,
    prior: NonNegative = 0.0,
    weight: Weight = 'eps',
    step: Literal['restart', 'ddim', 'ancestral'] = 'restart',
    micro_batches: Count = 1,
) -> Method:
    """Data over samples of the generator that the stage began as, at the generator's times alone.

        D = m(x^w) - kappa m(x^l),   m(x) = w(t) mean (G(x_t, t) - x)^2, one noise for both,
        L = -log sigma(beta (D_ref - D)),  or max(0, 1 + beta D),  and prior m(x^l)

    Args:
      context: the stage; the batch has the targets x^w. Starts from `references.start`, which also
        makes x^l, new ones for every batch, and is the reference.
      times, step, micro_batches: as of `online_pso`.
      loss: 'hinge' has no reference: for customisation, with a prior of .5. 'denoising' is m(x^w)
        alone, which blurs a generator of few steps: what PSO is compared with.
      beta, kappa: see `kd.losses.diffusion_preference.offline_pair`.
      prior: weight of the generator's error on its own former samples.
      weight: w, see `kd.losses.score_distillation.denoising`.

    Source: Miao et al. 2024, arXiv:2410.03190.
    """
    student = common.student(context, times, step)
    return offline(context, student, loss, beta, kappa, prior, weight, micro_batches)


def offline(
    context: Context,
    student: Generator,
    loss: Loss = 'pso',
    beta: float = 5.0,
    kappa: float = 0.1,
    prior: float = 0.0,
    weight: Weight = 'eps',
    micro_batches: int = 1,
) -> Method:
    """See `offline_pso`."""
    network, own = context.network, student.denoiser
    _check(context)
    law = times_lib.among(student.times)

    def errors(variables, batch, condition):
        """[B, 2] of target and reference."""
        said = [
            (own.apply(variables, x_t, batch['time'], condition).x0, x)
            for x_t, x in zip(batch['noised'], batch['pair'], strict=True)
        ]
        return jnp.stack(
            [
                score_distillation.denoising(mu, x, own.schedule, batch['time'], weight)
                for mu, x in said
            ],
            axis=-1,
        )

    def collect(state, batch, key):
        keys, data = jax.random.split(key, 3), batch['input']
        condition = denoisers.conditions(network, batch)
        made = student.sample(state.frozen[start.START], condition, keys[0], data.shape)
        t = law(keys[1], jnp.zeros(len(data)))
        noise = jax.random.normal(keys[2], data.shape, data.dtype)
        pair = (data, made)
        noised = tuple(own.schedule.mix(x, noise, t) for x in pair)
        batch = {**batch, 'pair': pair, 'noised': noised, 'time': t}
        return {**batch, 'anchor': errors(state.frozen[start.START], batch, condition)}

    def objective(params, state, batch, key):
        del key
        condition = denoisers.conditions(network, batch)
        found = errors(state.variables(params=params), batch, condition)
        if loss == 'pso':
            losses = diffusion_preference.offline_pair(found, batch['anchor'], beta, kappa)
        elif loss == 'hinge':
            losses = diffusion_preference.hinge_pair(found, beta, kappa)
        else:
            losses = found[:, 0]
        metrics = {'target': mean(found[:, 0]), 'reference': mean(found[:, 1])}
        return Objective(mean(losses + prior * found[:, 1]), metrics)

    made = minimize(
        objective, context.tx, start.from_reference(network.init, context),
        micro_batches=micro_batches,
    )  # fmt: skip
    return with_collect(made, collect, 'offline_pso')


def _check(context: Context, student: Generator | None = None) -> None:
    where = f'{context.stage}.method'
    if start.START not in context.references:
        raise UserError(
            f'{where}: the generator to be tuned is {context.stage}.references.{start.START}.'
        )
    if student is None:
        return
    if len(student.times) < 2 or student.step.kernel is None:
        raise UserError(
            f'{where}: online PSO learns from steps that draw noise, of which a generator of one '
            'time, or of the step ddim, has none.'
        )
