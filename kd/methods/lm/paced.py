"""PACED: distillation at the frontier of the student's competence (2026, arXiv:2603.11178).

Problems that the student always fails or always solves give little signal; each problem's loss is
weighted by p^a (1 - p)^b of the student's pass rate p. The paper's best schedule is two stages:
forward KL, then, from its weights (`references.start`), reverse KL.

`paced` is for answers whose symbols are independent given the problem, `paced_text` for language
models. There the pass rates are those of sampled answers that a reward has judged: of a stage
before (`kd.methods.generate.responses`, read by `kd.data.generated`), or of every step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp

from kd import callables
from kd.context import Context
from kd.data.generated import PASS_RATE
from kd.errors import UserError
from kd.losses import check_micro_batches, outcomes
from kd.method import Method, Objective, minimize, with_collect
from kd.methods import start, teacher
from kd.methods.lm import answering, common
from kd.methods.rl import common as rl
from kd.metrics import mean, scalar
from kd.ranges import Count, Keywords, NonNegative
from kd.rewards.reward import judged
from kd.theory import competence

_Sampling = Annotated[Mapping[str, Any], Keywords(rl.Sampling)]
WEIGHTINGS = ('beta', 'hard', 'uniform')


def paced(
    context: Context,
    *,
    divergence: str = 'kd.losses.divergence.forward_kl',
    weighting: str = 'beta',
    a: NonNegative = 1.0,
    b: NonNegative = 1.0,
    rollouts: Count = 8,
    normalise: bool = True,
    micro_batches: Count = 1,
    **divergence_arguments,
) -> Method:
    """Distils every problem by a weight of the student's pass rate on it.

        loss_i = w(p_i) / mean_j w(p_j) * mean_l D(student_il, teacher_il)

    p_i is the fraction of `rollouts` answers drawn from the present student in which every symbol
    equals `label`; all symbols of an answer are drawn from one forward pass, which is exact for
    symbols that are independent given the problem. For other models, or pass rates that are
    refreshed rarely, a batch brings `pass_rate` [B], and none are drawn. A batch may bring
    `response_mask` bool [B, L], the positions that count, in the loss and in the answer. Weights
    are constants to the gradient, and problems of weight 0 contribute exactly 0.

    Args:
      context: the stage; needs a network with logits [B, L, V], labels int [B, L], and a teacher or
        `teacher_logits` in the batch. Starts from `references.start`, if there is one.
      divergence: import path of `d(student_logits, teacher_logits) -> [B, L]`.
      weighting: 'beta' for p^a (1 - p)^b; 'hard' for 1 where 0.2 < p < 0.8; 'uniform' for 1.
      a, b: exponents of 'beta'.
      rollouts: answers drawn per problem and step.
      normalise: divide the weights by their mean over the batch; False as in the paper.
      micro_batches: parts over which gradients are accumulated; weights are those of the batch.
      **divergence_arguments: further keywords of the divergence.
    """
    weigh = _weighing(weighting, a, b, normalise)
    if rollouts < 1:
        raise UserError(f'rollouts must be at least 1, got {rollouts}.')
    network = context.classifier
    of_position = callables.resolve(divergence)
    check_micro_batches(of_position, micro_batches)
    callables.check_arguments(of_position, divergence_arguments, where=f'method ({divergence})')

    def collect(state, batch, key):
        if PASS_RATE not in batch:
            logits = network.apply(state.variables(), *network.of(batch)).logits
            where = batch.get('response_mask')
            rate = sampled_pass_rate(key, logits, batch['label'], rollouts, where=where)
            batch = {**batch, PASS_RATE: rate}
        return {**batch, **weigh(batch[PASS_RATE])}

    def loss(params, state, batch, key) -> Objective:
        variables = state.variables(params=params)
        output = network.apply(variables, *network.of(batch), train=True, key=key)
        teacher_logits = teacher.teacher_logits(context, state, batch)
        positions = outcomes.per_position(
            of_position, output.logits, teacher_logits, **divergence_arguments
        )
        # Positions are averaged within a problem first, or long answers would dominate.
        kept = jnp.broadcast_to(batch.get('response_mask', True), positions.shape)
        lengths = jnp.maximum(kept.sum(-1), 1)
        problems = jnp.where(kept, positions, 0.0).sum(-1) / lengths
        counted = batch['weight'] > 0
        losses = batch['weight'] * jnp.where(counted, problems, 0.0)
        metrics = {
            'divergence': mean(problems),
            'pass_rate': mean(batch[PASS_RATE]),
            'effective_count': scalar(batch['effective_count'][0]),
        }
        return Objective(mean(losses), metrics, output.mutables)

    init = start.from_reference(network.init, context)
    method = minimize(loss, context.tx, init, micro_batches=micro_batches)
    return with_collect(method, collect)


def sampled_pass_rate(
    key: jax.Array,
    logits: jax.Array,
    labels: jax.Array,
    rollouts: int,
    *,
    where: jax.Array | None = None,
) -> jax.Array:
    """Fraction of sampled answers that are right in every position.

    Args:
      key: typed random key.
      logits: [B, L, V] of symbols that are independent given the problem.
      labels: int [B, L].
      rollouts: K.
      where: bool [B, L], positions that must be right; a problem without any always passes.

    Returns:
      float32 [B], a multiple of 1 / K.
    """
    answers = jax.random.categorical(key, logits, shape=(rollouts, *labels.shape))
    right = answers == labels
    if where is not None:
        right |= ~where
    return competence.pass_rate(right.all(-1).T)


def paced_text(
    context: Context,
    *,
    divergence: str = 'kd.losses.divergence.forward_kl',
    weighting: str = 'beta',
    a: NonNegative = 1.0,
    b: NonNegative = 1.0,
    answers: Literal['data', 'student'] = 'data',
    sampling: _Sampling | None = None,
    reward: Mapping[str, Any] | None = None,
    normalise: bool = True,
    chunk: Count = 256,
    micro_batches: Count = 1,
    **divergence_arguments,
) -> Method:
    """Distils every problem of a language model by a weight of the student's pass rate on it.

        loss = mean_i w(p_i) / mean_j w(p_j) * mean_t D(student, teacher | y_i,<t)

    over the tokens t of an answer y_i: for forward KL a reference in the data, for reverse KL what
    the present student answers. p_i is `pass_rate` of the batch (`kd.data.generated`), or the share
    of `sampling.group` answers of the present student that `reward` holds for right. Weights are
    constants to the gradient, and so is the sampling. Problems of weight 0 contribute exactly 0,
    and the head is not applied to their tokens.

    Args:
      context: the stage; needs a decoder, an optimiser, a teacher, and rows of one problem each, or
        prompts. Starts from `references.start`, if there is one.
      divergence: import path of one of `kd.losses.divergence`.
      weighting, a, b, normalise: as of `paced`.
      answers: 'data' for the rows, or the prompts' `response`; 'student' for what it answers to
        prompts, one answer each.
      sampling: of the student, see `kd.methods.rl.common.Sampling`; None if nothing is sampled.
      reward: block of what judges answers, see `kd.rewards`; None where the data have pass rates.
      chunk: tokens at a time where logits are not formed whole.
      micro_batches: parts over which gradients are accumulated; weights are those of the batch.
      **divergence_arguments: further keywords of the divergence.

    Raises:
      UserError: neither pass rates nor what they would be measured by.
    """
    weigh = _weighing(weighting, a, b, normalise)
    network, of_position = context.network, callables.resolve(divergence)
    callables.check_arguments(of_position, divergence_arguments, where=f'method ({divergence})')
    rated = PASS_RATE in context.spec
    draw, judge, count = None, None, 1
    if not rated and not reward:
        raise UserError(
            f"{context.stage}: the data bring no '{PASS_RATE}' (`kd.data.generated` does), and the "
            'method has no `reward` to measure it by.'
        )
    if not rated or answers == 'student':
        config = rl.Sampling(**(sampling or {}))
        draw, count = rl.drawing(context, config), 1 if rated else config.group
    if not rated:
        judge = rl.of_block(context, reward or {})

    def collect(state, batch, key):
        rate = batch.get(PASS_RATE)
        if draw is not None:
            asked = jax.tree.map(lambda x: jnp.repeat(x, count, axis=0), batch)
            variables = context.rollout(state.variables())
            said = draw.of(variables, asked, key)
            if judge is not None:
                rewards, lost = judged(judge(said.tokens, said.mask, asked))
                right, there = (x.reshape(-1, count) for x in (rewards >= 0.5, ~lost))
                rate = competence.pass_rate(right, where=there)
            if answers == 'student':
                batch = answering.answered(batch, said.tokens[::count], said.mask[::count])
        batch = common.aggregated(answering.as_text(batch), 'sequence_mean')
        weights = weigh(rate)
        counted = weights['weight'][:, None]
        batch[common.TOKEN_WEIGHT] *= counted
        batch['response_mask'] &= counted > 0
        return {**batch, **weights, PASS_RATE: rate}

    def of_token(logits, teacher, labels, weight):
        value = outcomes.per_position(of_position, logits, teacher, **divergence_arguments)
        return jnp.where(weight > 0, weight * value, 0.0), {'divergence': value}

    def loss(params, state, batch, key) -> Objective:
        found = common.token_losses(
            network, state.variables(params=params), batch, of_token,
            teacher=common.teacher_signal(context, state, batch),
            per_token=(batch[common.TOKEN_WEIGHT],), key=key, chunk=chunk,
        )  # fmt: skip
        metrics = {
            **found.metrics,
            'pass_rate': mean(batch[PASS_RATE]),
            'effective_count': scalar(batch['effective_count'][0]),
        }
        return Objective(mean(found.sums), metrics, found.mutables)

    init = start.from_reference(network.init, context)
    return with_collect(minimize(loss, context.tx, init, micro_batches=micro_batches), collect)


def _weighing(
    weighting: str, a: float, b: float, normalise: bool
) -> Callable[[jax.Array], dict[str, jax.Array]]:
    """Pass rates [B] -> the problems' `weight` and `effective_count`, each [B].

    The count is of the batch, and per problem so that it splits into micro-batches with the rest.
    """
    if weighting not in WEIGHTINGS:
        raise UserError(f'weighting must be one of {WEIGHTINGS}, got {weighting!r}.')

    def weigh(rate):
        if weighting == 'beta':
            weights = competence.beta_kernel(rate, a, b)
        else:
            weights = competence.hard_filter(rate) if weighting == 'hard' else jnp.ones_like(rate)
        if normalise:
            average = jnp.mean(weights)
            weights = weights / jnp.where(average > 0, average, 1.0)
        count = jnp.broadcast_to(competence.effective_count(weights), rate.shape)
        return {'weight': weights, 'effective_count': count}

    return weigh
