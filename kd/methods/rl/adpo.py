"""ADPO: anchored preference training on contexts with candidates (Wang 2025, arXiv:2510.18913)."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from kd.context import Context
from kd.errors import UserError
from kd.losses import numerics, preference
from kd.method import Method, Objective, minimize, with_collect
from kd.methods import start
from kd.metrics import mean
from kd.ranges import Count, Fraction, Positive

ANCHORS = ('uniform', 'fixed', 'self', 'ema', 'on_policy')
TARGETS = ('listwise', 'standardized', 'pairs', 'soft_pairs', 'pair', 'soft_pair')


def adpo(
    context: Context,
    *,
    anchor: str = 'self',
    target: str = 'listwise',
    tau: Positive = 0.8,
    reward_temperature: Positive = 0.5,
    decay: Fraction = 0.99,
    refresh_every: Count = 1,
    micro_batches: Count = 1,
) -> Method:
    """Fits the student's policy relative to an anchor to a target made of rewards.

        loss = -sum_i q_i log softmax((l - sg[l_ref]) / tau)_i,    q = softmax(R / beta_r)

    The network gives logits [B, P] over the candidates of a context (their log-probabilities, up to
    a constant per context, which the loss does not see); the batch brings `rewards` [B, P]. The
    optimum is pi_ref q^tau / Z. tau has two effects: gradients scale with 1 / tau, and the optimum
    moves away from the anchor as tau grows.

    The anchor lives in the state:
      'uniform': no anchor, cross-entropy with the target at temperature tau.
      'fixed': `references.anchor`, a fine-tuned model or a teacher.
      'self': the student as the stage starts.
      'ema': decay anchor + (1 - decay) student, after every step.
      'on_policy': the student as it was at the last step divisible by `refresh_every`; with 1 the
        anchor is the present student, and the first step's gradient is (1 / P - q) / tau.

    Targets:
      'listwise', 'standardized': q from the rewards, or from their z-scores within the context.
      'pairs', 'soft_pairs': the mean over all pairs of candidates of DPO with hard labels (the
        higher reward is preferred), or soft ones, at beta = 1 / tau.
      'pair', 'soft_pair': the same for one random pair per context and step.

    Args:
      context: the stage; needs a network with logits [B, P] and an optimiser. Starts from
        `references.start`, if there is one.
      anchor, target: see above.
      tau: anchoring temperature.
      reward_temperature: beta_r.
      decay: of the 'ema' anchor.
      refresh_every: steps between refreshes of the 'on_policy' anchor.
      micro_batches: parts over which gradients are accumulated; the candidates of a context stay
        together.
    """
    _check(context, anchor, target, refresh_every)
    network = context.network

    def collect(state, batch, key):
        if anchor == 'uniform':
            reference = jnp.zeros_like(batch['rewards'])
        elif anchor == 'fixed':
            source = context.references['anchor']
            reference = source.apply(state.frozen['anchor'], *source.of(batch)).logits
        else:
            variables = state.variables(params=state.extra['anchor'])
            reference = network.apply(variables, *network.of(batch)).logits
        first, second = _random_pair(key, *batch['rewards'].shape)
        return {**batch, 'anchor_logits': reference, 'first': first, 'second': second}

    def loss(params, state, batch, key) -> Objective:
        variables = state.variables(params=params)
        output = network.apply(variables, *network.of(batch), train=True, key=key)
        logits, rewards, reference = output.logits, batch['rewards'], batch['anchor_logits']
        if target in ('listwise', 'standardized'):
            kind: Literal['raw', 'standardized']
            kind = 'raw' if target == 'listwise' else 'standardized'
            q = preference.target_from_rewards(rewards, reward_temperature, kind)
            losses = preference.anchored_cross_entropy(logits, reference, q, tau)
        else:
            if target in ('pair', 'soft_pair'):
                chosen = (batch['first'][:, None], batch['second'][:, None])
            else:
                rows, columns = jnp.triu_indices(rewards.shape[-1], k=1)
                chosen = (rows[None], columns[None])
            temperature = reward_temperature if target.startswith('soft') else None
            losses = _pairwise(logits, reference, rewards, chosen, tau, temperature)
        log_p, log_ref = numerics.log_softmax(logits), numerics.log_softmax(reference)
        expected = jnp.sum(jnp.exp(log_p) * rewards, axis=-1)
        from_anchor = jnp.sum(jnp.exp(log_p) * (log_p - log_ref), axis=-1)
        metrics = {'expected_reward': mean(expected), 'kl_to_anchor': mean(from_anchor)}
        return Objective(mean(losses), metrics, output.mutables)

    init = start.from_reference(network.init, context)
    method = with_collect(minimize(loss, context.tx, init, micro_batches=micro_batches), collect)
    if anchor in ('uniform', 'fixed'):
        return method
    return _with_anchor(method, anchor, decay, refresh_every)


def _with_anchor(method: Method, mode, decay: float, refresh_every: int) -> Method:
    """Keeps the anchor's parameters in `state.extra['anchor']`."""

    def init(key, frozen=None):
        state = method.init(key, frozen)
        params = state.variables()['params']
        anchor = preference.anchor_init(mode, jax.tree.map(jnp.copy, params))
        return state.replace(extra={**state.extra, 'anchor': anchor})

    def step(state, batch):
        if mode == 'on_policy':
            # When candidates are sampled, before the step; inner steps leave the anchor alone.
            due = state.step % refresh_every == 0
            params = state.variables()['params']
            anchor = preference.anchor_update(state.extra['anchor'], params, mode)
            kept = jax.tree.map(lambda a, b: jnp.where(due, a, b), anchor, state.extra['anchor'])
            state = state.replace(extra={**state.extra, 'anchor': kept})
        state, metrics = method.step(state, batch)
        if mode == 'ema':
            params = state.variables()['params']
            anchor = preference.anchor_update(state.extra['anchor'], params, mode, decay)
            state = state.replace(extra={**state.extra, 'anchor': anchor})
        return state, metrics

    return Method(init, step)


def _pairwise(logits, reference, rewards, chosen, tau, temperature):
    """Mean DPO loss [B] over pairs (first, second), each int [B or 1, N]; labels by reward."""
    candidates = jnp.stack(
        [jnp.broadcast_to(c, (len(rewards), c.shape[-1])) for c in chosen], axis=-1
    )

    def pairs(x):
        return jnp.take_along_axis(x[:, None, :], candidates, axis=-1)

    of_pair = pairs(rewards)
    if temperature is None:
        ahead = jnp.argmax(of_pair, axis=-1)
        q = jax.nn.one_hot(ahead, 2, dtype=of_pair.dtype)
    else:
        q = preference.target_from_rewards(of_pair, temperature)
    losses = preference.anchored_cross_entropy(pairs(logits), pairs(reference), q, tau)
    return jnp.mean(losses, axis=-1)


def _random_pair(key, count: int, candidates: int):
    """Two distinct candidates per context, int32 [B] each."""
    first_key, shift_key = jax.random.split(key)
    first = jax.random.randint(first_key, (count,), 0, candidates)
    shift = jax.random.randint(shift_key, (count,), 1, candidates)
    return first, (first + shift) % candidates


def _check(context: Context, anchor: str, target: str, refresh_every: int) -> None:
    if anchor not in ANCHORS:
        raise UserError(f'anchor must be one of {ANCHORS}, got {anchor!r}.')
    if target not in TARGETS:
        raise UserError(f'target must be one of {TARGETS}, got {target!r}.')
    if refresh_every < 1:
        raise UserError(f'refresh_every must be at least 1 step, got {refresh_every}.')
    if anchor == 'fixed' and 'anchor' not in context.references:
        raise UserError(
            f"anchor='fixed' needs {context.stage}.references of 'anchor', the stage to stay near."
        )
