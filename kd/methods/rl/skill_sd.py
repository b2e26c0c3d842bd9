"""Skill-SD: a policy learns from itself as it is when it is told of earlier tries.

arXiv:2604.10674 (2026). What was tried at a task is summed up in a few tokens, a skill.
The policy acts without it, and the same weights, told of it, say of every action how likely it is:
beside the reward, the policy is drawn to that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp

from kd import config as config_lib
from kd.context import Context
from kd.errors import UserError
from kd.losses import aggregate, policy
from kd.losses.aggregate import Mode
from kd.losses.policy import Advantage
from kd.method import Batch, Method
from kd.methods.rl import bank as banks
from kd.methods.rl import common, scoring, surrogate
from kd.methods.rl.surrogate import Number, Surrogate, Term
from kd.ranges import Count, Keywords, NonNegative, Positive
from kd.rewards.reward import Summary
from kd.sampling.environment import Draws
from kd.state import PyTree, State

SKILLS, START = 'skills', 'start'
# Who acts, and with what in the prompt.
Acts = Literal['policy', 'told', 'teacher']


def skill_sd(
    context: Context,
    *,
    reward: Mapping[str, Any],
    sampling: Annotated[Mapping[str, Any], Keywords(common.Sampling)],
    summary: Mapping[str, Any],
    tasks: Count,
    slots: Count = 8,
    explore: NonNegative = 1.0,
    weight: Number = 0.001,
    reward_weight: Number = 1.0,
    teacher: str = 'live',
    acts: Acts = 'policy',
    field: str = 'level',
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
    """GRPO, and a reverse KL to the policy that has read a skill, on the tokens of the policy.

        L = reward_weight L_GRPO + weight / N sum_it rho (exp(-d) - 1 + d),    d = l - l_T

    rho = pi / pi_old is differentiated, which makes the gradient that of KL(pi, pi_T) whatever
    policy has sampled; without it k3 would have that of KL(pi_T, pi). N counts the tokens of the
    whole batch. A task without a skill has no second term, a group of equal rewards no first one.

    At every step: a skill of each task from the bank (`kd.methods.rl.bank`), G answers without it,
    scores of the same tokens by the teacher with it, updates; then the skill is credited with the
    mean reward, and the best answer of the group is summed up for later steps.

    Args:
      context: the stage; as of `kd.methods.rl.grpo.grpo`, and a field with the number of the task.
      reward, sampling: as there.
      summary: block of a `kd.rewards.reward.Summary`, such as `kd.rewards.push.summary`.
      tasks: N, of which `field` says which one a prompt is, 0 .. N - 1.
      slots: K, skills of a task that are kept.
      explore: see `kd.methods.rl.bank.select`.
      weight: lambda. Of `reward_weight=0` it is distillation from oneself alone.
      reward_weight: 1 in the paper.
      teacher: who is told: 'live', the policy as it is before the step; 'start', what it began
        with, `references.start`; or the name of an average, of the stage's `ema`.
      acts: 'policy' without the skill. As controls: 'told', the policy with the skill in its
        prompt, from which it learns by rewards alone (weight=0) and which it lacks when it is
        evaluated; 'teacher', whose answers with the skill are the policy's to learn from, the ratio
        being that of the policy without it to the teacher.
      field: name of the batch's field of tasks, int [B].
      advantage, ddof, aggregation: see `kd.methods.rl.grpo.grpo`.
      updates, parts, old, low, high, chunk, micro_batches: see
        `kd.methods.rl.surrogate.Surrogate`. With acts='teacher' the old policy is the sampler.

    Raises:
      UserError: data without tasks, or a teacher that is not there.

    Source: Skill-SD, arXiv 2604.10674, equations 10-14 and algorithm 1. Its clip and `explore` are
    not known: .2 and 1 are ours.
    """
    config = common.Sampling(**sampling)
    how = Surrogate(updates, parts, old, low, high, None, None, chunk, micro_batches)
    draw = common.drawing(context, config)
    told = config_lib.build(summary, context, where=f'{context.stage}.method.summary')
    _check(context, field, teacher)
    answer = common.answered(context, draw, common.of_block(context, reward), group=config.group)
    act, scores = _acting(answer, acts, teacher), _scores(context, draw, how, acts, teacher)

    def collect(state: State, batch: Batch, key: jax.Array) -> tuple[Batch, banks.Bank]:
        bank, task = state.extra[SKILLS], batch[field]
        slot, there = banks.select(bank, task, explore)
        batch = {**batch, 'skill': bank.tokens[task, slot], 'told': there}
        made = common.valued(
            act(state, batch, key), config.group, advantage=advantage, ddof=ddof,
            aggregation=aggregation, longest=draw.max_new,
        )  # fmt: skip
        made |= scores(state, made)
        made['drawn'] = surrogate.number(weight, state) * drawn_weights(made)
        made['weight'] *= surrogate.number(reward_weight, state)
        return made, renewed(bank, made, task, slot, there, told, config.group)

    def term(said, old, given):
        if acts == 'teacher':
            old = given['sampler_log_probs']
        ratio = policy.log_ratio(said.log_p, old)
        apart = given['teacher_log_probs']
        pull = policy.kl_estimate(said.log_p, apart, 'k3', old_log_p=old)
        aux = {'kl_to_teacher': policy.kl_estimate(said.log_p, apart, 'k1')}
        return Term(ratio, apart=given['drawn'] * pull, aux=aux)

    return surrogate.method(
        context, draw, collect, term, group=config.group, how=how,
        fields=('teacher_log_probs', 'drawn', 'sampler_log_probs'),
        memory=(SKILLS, banks.empty(tasks, slots, told.length)),
    )  # fmt: skip


def with_skill(batch: Batch) -> Batch:
    """The batch with the skills behind its prompts, where there are any."""
    skill = batch['skill']
    there = jnp.broadcast_to(batch['told'][:, None], skill.shape)
    return scoring.with_prompt(batch, (batch['input'], batch['prompt_mask']), (skill, there))


def drawn_weights(batch: Batch) -> jax.Array:
    """Of tokens, float32 [B, R]: the mean over rows of their sum is the mean over all tokens of the
    batch, those of tasks without a skill counting as 0."""
    return aggregate.weights(batch['mask'], 'token_mean') * batch['told'][:, None]


def renewed(
    bank: banks.Bank, batch: Batch, task: jax.Array, slot: jax.Array, there: jax.Array,
    summary: Summary, group: int,
) -> banks.Bank:  # fmt: skip
    """The bank after a batch of answers: what was used is credited, the best of each is kept.

    Args:
      bank: as it was when the answers were given.
      batch: of answers, the `group` ones of a task one after another.
      task, slot, there: [B / group], what was selected.
      summary: of answers.
      group: G.
    """
    rewards = batch['rewards'].reshape(-1, group).mean(1)
    tokens, score = summary.of(batch)
    best = score.reshape(-1, group).argmax(1) + group * jnp.arange(len(task))
    return banks.insert(banks.credit(bank, task, slot, there, rewards), task, tokens[best])


def _acting(answer: common.Collect, acts: Acts, teacher: str) -> common.Collect:
    """`answer`, with the skill in the prompt or not."""

    def collect(state: State, batch: Batch, key: jax.Array) -> Batch:
        if acts == 'policy':
            return answer(state, batch, key)
        if acts == 'told':
            return answer(state, with_skill(batch), key)
        variables = _teacher(state, teacher)
        made = answer(state.with_params(variables['params']), with_skill(batch), key)
        return {**made, **scoring.prompts_of(batch, len(made['tokens']))}

    return collect


def _scores(
    context: Context, draw: Draws, how: Surrogate, acts: Acts, teacher: str
) -> Callable[[State, Batch], Batch]:
    """Log-probabilities of answers: of the teacher, and of the old policy where it is asked."""

    def of(variables: PyTree, asked: Batch) -> jax.Array:
        return scoring.score(
            context.network, variables, asked, draw, chunk=how.chunk, parts=how.micro_batches
        ).log_probs

    def scores(state: State, batch: Batch) -> Batch:
        # Who has acted told has the skill in the prompt already.
        asked = batch if acts == 'told' else with_skill(batch)
        made = {'teacher_log_probs': of(_teacher(state, teacher), asked)}
        if how.recomputed:
            made['old_log_probs'] = of(state.variables(), batch)
        return made

    return scores


def _teacher(state: State, name: str) -> PyTree:
    """The variables of who is told."""
    if name == 'live':
        return state.variables()
    return state.frozen[name] if name == START else state.variables(name)


def _check(context: Context, field: str, teacher: str) -> None:
    """Raises `UserError` for data without tasks or a teacher that is not there."""
    if field not in context.spec:
        raise UserError(
            f"{context.stage}: a prompt's task is its field '{field}', and the data have only "
            f'{", ".join(context.spec)}.'
        )
    if teacher == START and START not in context.references:
        raise UserError(f"{context.stage}.method.teacher='start' needs a reference of that name.")
    if teacher not in ('live', START, *context.config.ema):
        raise UserError(
            f"{context.stage}.method.teacher is 'live', 'start' or an average of the stage's ema, "
            f"{sorted(context.config.ema)}; got '{teacher}'."
        )
