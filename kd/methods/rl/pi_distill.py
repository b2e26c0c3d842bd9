"""Privileged information, distilled: one network that is told, and learns to do without.

Penaloza et al. 2026, arXiv:2602.04942. A teacher and a student are the same weights, asked with and
without what an expert says of the task (actions, no thoughts). `pi_distill` has the teacher act and
trains both, `opsd` the student, who is drawn to what the teacher says of its tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp

from kd.context import Context
from kd.errors import UserError
from kd.losses import policy
from kd.losses.aggregate import Mode
from kd.losses.policy import Advantage
from kd.method import Batch, Method
from kd.methods.rl import common, scoring, self_teacher, surrogate
from kd.methods.rl.self_teacher import Comparison
from kd.methods.rl.surrogate import Number, Surrogate, Term
from kd.ranges import Count, Keywords, Positive
from kd.state import State

# Fields of a batch with what the expert says, int [B, L], and of what there is of it, bool [B, L].
TOLD, THERE = 'told', 'told_mask'
# What `pi_distill` brings for its two terms.
_FIELDS = ('behaviour', 'other', 'teaches', 'beta')


def pi_distill(
    context: Context,
    *,
    reward: Mapping[str, Any],
    sampling: Annotated[Mapping[str, Any], Keywords(common.Sampling)],
    alpha: Number = 0.5,
    beta: Number = 0.25,
    penalty: Literal['loss', 'reward'] = 'loss',
    advantage: Advantage = 'grpo',
    ddof: Literal[0, 1] = 0,
    aggregation: Mode = 'sequence_mean',
    updates: Count = 1,
    parts: Count = 1,
    old: Literal['recomputed', 'sampler'] = 'sampler',
    low: Positive = 0.2,
    high: Positive = 0.2,
    chunk: Count = 256,
    micro_batches: Count = 1,
) -> Method:
    """Answers of the policy that is told; the policy learns from them told and untold.

        L = alpha L_T + (1 - alpha) L_S
        L_T = clipped(l_T - l_old, A) + beta k2(l_T - sg l_S)       grad of KL(pi_T, sg pi_S)
        L_S = clipped(l_S - l_old, A) - beta l_S                    grad of KL(sg pi_T, pi_S)

    by token, l_T with what the expert says in the prompt and l_S without, l_old of who has acted,
    the told policy: in both ratios. A is of the G answers to a prompt, the same for both. The
    policy that is evaluated is untold. alpha = 0 is not `opsd`, whose answers are the student's.

    Both are computed as one batch of 2 B rows; what is stop-gradiented is as it was before the
    step, which with one update is as it is.

    Args:
      context: the stage; as of `kd.methods.rl.grpo.grpo`, and fields `told` and `told_mask`.
      reward, sampling: as there.
      alpha: share of the teacher's term, in [0, 1].
      beta: of the divergence; the paper has 0, .1, .25 and .5.
      penalty: 'reward' takes beta times the mean of l_old - l_S over an answer off its reward, and
        has no divergence in the loss.
      advantage, ddof, aggregation: see `kd.methods.rl.grpo.grpo`.
      updates, parts, old, low, high, chunk, micro_batches: see
        `kd.methods.rl.surrogate.Surrogate`.

    Raises:
      UserError: data without what the expert says.

    Source: arXiv 2602.04942, equations 2-4. Clip, estimates and what means are over are ours: the
    authors' code has not been released.
    """
    config = common.Sampling(**sampling)
    how = Surrogate(updates, parts, old, low, high, None, None, chunk, micro_batches)
    draw = _drawing(context, config)
    answer = common.answered(context, draw, common.of_block(context, reward), group=config.group)

    def score(state: State, batch: Batch) -> jax.Array:
        said = scoring.score(
            context.network, state.variables(), batch, draw, chunk=chunk, parts=micro_batches
        )
        return said.log_probs

    def collect(state: State, batch: Batch, key: jax.Array) -> Batch:
        made = answer(state, told(batch), key)
        untold = {**made, **scoring.prompts_of(batch, len(made['tokens']))}
        of_teacher = made['sampler_log_probs'] if old == 'sampler' else score(state, made)
        of_student = score(state, untold)
        weight, rewards = surrogate.number(beta, state), made['rewards']
        if penalty == 'reward':
            counts = jnp.maximum(made['mask'].sum(1), 1)
            made['rewards'] -= weight * (of_teacher - of_student).sum(1) / counts
        made = common.valued(
            made, config.group, advantage=advantage, ddof=ddof, aggregation=aggregation,
            longest=draw.max_new,
        )  # fmt: skip
        made |= {'rewards': rewards, 'behaviour': of_teacher}
        made['beta'] = jnp.full(rewards.shape, weight if penalty == 'loss' else 0.0)
        share = surrogate.number(alpha, state)
        return both(made, untold, of_teacher, of_student, share)

    def term(said, old, given):
        del old
        apart = jnp.where(given['teaches'], said.log_p - given['other'], 0.0)
        near = jnp.where(
            given['teaches'], policy.kl_estimate(said.log_p, given['other'], 'k2'), -said.log_p
        )
        # Of what the teacher has said, as a metric: the mean over both halves is half of it.
        return Term(
            policy.log_ratio(said.log_p, given['behaviour']), given['beta'] * near,
            aux={'kl_to_untold': 2 * apart},
        )  # fmt: skip

    return surrogate.method(
        context, draw, collect, term, group=config.group, how=how, fields=_FIELDS
    )


def opsd(
    context: Context,
    *,
    reward: Mapping[str, Any],
    sampling: Annotated[Mapping[str, Any], Keywords(common.Sampling)],
    beta: Number = 0.25,
    estimate: Literal['k2', 'all'] = 'k2',
    advantage: Advantage = 'grpo',
    ddof: Literal[0, 1] = 0,
    aggregation: Mode = 'sequence_mean',
    updates: Count = 1,
    parts: Count = 1,
    old: Literal['recomputed', 'sampler'] = 'recomputed',
    low: Positive = 0.2,
    high: Positive = 0.2,
    chunk: Count = 256,
    micro_batches: Count = 1,
) -> Method:
    """On-policy self-distillation: GRPO, and a reverse KL to the policy that is told.

        L = clipped(l_S - l_old, A) + beta k2(l_S - sg l_T)

    Args:
      context, reward, sampling: as of `pi_distill`.
      beta: of the divergence.
      estimate: 'k2' from the tokens that were said, or 'all', KL(pi_S, pi_T) over all tokens.
      advantage, ddof, aggregation: see `kd.methods.rl.grpo.grpo`.
      updates, parts, old, low, high, chunk, micro_batches: see
        `kd.methods.rl.surrogate.Surrogate`.

    Raises:
      UserError: data without what the expert says.

    Source: arXiv 2602.04942, equation 5.
    """
    config = common.Sampling(**sampling)
    how = Surrogate(updates, parts, old, low, high, None, None, chunk, micro_batches)
    draw = _drawing(context, config)
    roll = common.rollouts(
        context, draw, common.of_block(context, reward), group=config.group, advantage=advantage,
        ddof=ddof, aggregation=aggregation, recomputed=how.recomputed, chunk=chunk,
        parts=micro_batches,
    )  # fmt: skip
    compare = self_teacher.comparison(draw, Comparison())

    def collect(state: State, batch: Batch, key: jax.Array) -> Batch:
        made = roll(state, batch, key)
        said = scoring.score(
            context.network, state.variables(), told(made), draw, chunk=chunk, parts=micro_batches
        )
        weight = surrogate.number(beta, state)
        return {**made, 'other': said.log_probs, 'beta': jnp.full(made['rewards'].shape, weight)}

    def teacher(state: State, batch: Batch):
        found = scoring.hidden(context.network, state.variables(), told(batch))
        return jax.lax.stop_gradient(found)

    def term(said, old, given):
        other = given['other']
        near = compare(said) if estimate == 'all' else policy.kl_estimate(said.log_p, other, 'k2')
        aux = {'kl_to_told': policy.kl_estimate(said.log_p, other, 'k1')}
        return Term(policy.log_ratio(said.log_p, old), given['beta'] * near, aux=aux)

    return surrogate.method(
        context, draw, collect, term, group=config.group, how=how, fields=('other', 'beta'),
        teacher=teacher if estimate == 'all' else None,
    )  # fmt: skip


def told(batch: Batch) -> Batch:
    """The batch with what the expert says behind its prompts."""
    return scoring.with_prompt(
        batch, (batch['input'], batch['prompt_mask']), (batch[TOLD], batch[THERE])
    )


def both(
    teacher: Batch,
    student: Batch,
    of_teacher: jax.Array,
    of_student: jax.Array,
    alpha: float | jax.Array,
) -> Batch:
    """Rows of the teacher and, below them, the same answers to the student's prompts: [2 B, ...].

    Args:
      teacher: a batch of answers with advantages and weights.
      student: whose `input` and `prompt_mask` are the student's; as wide or less.
      of_teacher, of_student: log-probabilities [B, R].
      alpha: share of the teacher's rows in the mean over all.

    Returns:
      `teaches` bool [2 B], and `other` [2 B, R], the log-probabilities of the other one.
    """
    room = teacher['input'].shape[1] - student['input'].shape[1]
    own = {name: jnp.pad(student[name], ((0, 0), (room, 0))) for name in ('input', 'prompt_mask')}
    made = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), teacher, {**teacher, **own})
    teaches = jnp.arange(2 * len(of_teacher)) < len(of_teacher)
    made['teaches'] = teaches
    made['other'] = jnp.concatenate([of_student, of_teacher])
    made['weight'] *= 2 * jnp.where(teaches, alpha, 1 - alpha)[:, None]
    return made


def _drawing(context: Context, sampling: common.Sampling):
    """The policy's sampler; raises `UserError` for data without what an expert says."""
    draw = common.drawing(context, sampling)
    missing = [name for name in (TOLD, THERE) if name not in context.spec]
    if missing:
        raise UserError(
            f"{context.stage}: what an expert says is the field '{missing[0]}', and the data have "
            f'only {", ".join(context.spec)}; kd.data.push.push brings it by told=.'
        )
    return draw
