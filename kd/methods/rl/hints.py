"""Prompts that nobody solves, opened by a hint (KEPO, arXiv:2602.00400).

Where all answers to a prompt are wrong, nothing is learnt from them. The policy then answers once
more, to the prompt with a hint of the teacher in it, and answers that are right take the places of
some wrong ones, behind the prompt as it was.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from kd.context import Context
from kd.errors import UserError
from kd.method import Batch
from kd.methods.rl import common, self_teacher
from kd.ranges import Count, Positive, Size
from kd.rewards.reward import Reward
from kd.sampling.environment import Draws
from kd.state import State

# Folded into the key of the answers.
_OF_HINTS = 1
# What of an answer is its own, and no field of its prompt.
_OWN = ('tokens', 'mask', 'truncated', 'rewards', 'unjudged', 'sampler_log_probs')


@dataclasses.dataclass(frozen=True)
class Hints:
    """How hints are made and used.

    Attributes:
      solutions: answers of the teacher to each prompt, the first right one of which is the hint;
        where there is none, there is no hint.
      temperature, top_p: of them.
      before, behind: what stands around a solution in a prompt: tokens, or text for the tokenizer
        of the data.
      after: tokens of a prompt that stay before the hint; None for all.
      injected: K, answers that take the places of others.
      tries: N; a try is K answers, and the first all of whose answers are right is taken.
      trigger: which prompts are opened once one of the batch is unsolved: the unsolved ones, or
        all of the 'batch', as in the released code.
      accept: what has to be right in a try: all answers to a prompt, or to all prompts of the
        'batch' that are opened, as in the released code.
    """

    solutions: Count = 8
    temperature: Positive = 0.9
    top_p: Positive = 0.95
    before: tuple[Size, ...] | str = ()
    behind: tuple[Size, ...] | str = ()
    after: Size | None = None
    injected: Count = 2
    tries: Count = 5
    trigger: Literal['prompt', 'batch'] = 'prompt'
    accept: Literal['prompt', 'batch'] = 'prompt'


def opened(
    context: Context, draw: Draws, reward: Reward, sampling: common.Sampling, hints: Hints
) -> common.Collect:
    """`collect` of `kd.methods.rl.common.answered`, with hints where they are needed.

    Beside its fields `injected` bool [B], the answers that took the places of others, and
    `unsolved` bool [B], those to prompts that no answer had solved before. An injected answer has
    the log-probabilities that the sampler drew it with, behind the hint.

    One compiled step: all tries are one rollout, and where every prompt is solved there is none.

    Args:
      context: the stage, with a teacher.
      draw: the sampler of the policy.
      reward: right answers have 1 or more, and wrong ones 0.
      sampling: of the answers.
      hints: see there.

    Raises:
      UserError: more answers to be injected than a prompt has; an environment, whose episodes have
        no hints.
    """
    if sampling.environment is not None:
        raise UserError(f'{context.stage}.method.hint is for answers, and not for episodes.')
    if hints.injected > sampling.group:
        raise UserError(
            f'{context.stage}.method.hint.injected={hints.injected} is more than the '
            f'{sampling.group} answers to a prompt (sampling.group).'
        )
    said = dataclasses.replace(sampling, temperature=hints.temperature, top_p=hints.top_p)
    draw_teacher = common.drawing(context, said, context.network, who=context.teacher)
    around = [_tokens(context, piece) for piece in (hints.before, hints.behind)]
    answer = common.answered(context, draw, reward, group=sampling.group)

    def collect(state: State, prompts: Batch, key: jax.Array) -> Batch:
        # The answers are those that there would be without hints.
        batch = answer(state, prompts, key)
        keys = jax.random.split(jax.random.fold_in(key, _OF_HINTS), 3)
        unsolved = ~(batch['rewards'] > 0).reshape(-1, sampling.group).any(1)
        wanted = unsolved if hints.trigger == 'prompt' else jnp.full_like(unsolved, unsolved.any())

        def without(batch: Batch) -> Batch:
            return {**batch, 'injected': jnp.zeros_like(batch['truncated'])}

        def with_hints(batch: Batch) -> Batch:
            theirs = common.tried(
                context, draw_teacher, reward, state.frozen['teacher'], prompts, hints.solutions,
                keys[0],
            )  # fmt: skip
            hinted, there = _hinted(prompts, theirs, hints, around)
            made = common.tried(
                context, draw, reward, state.variables(), hinted, hints.injected * hints.tries,
                keys[1],
            )  # fmt: skip
            return injected(batch, made, wanted, there, hints, keys[2])

        batch = jax.lax.cond(wanted.any(), with_hints, without, batch)
        return {**batch, 'unsolved': jnp.repeat(unsolved, sampling.group)}

    return collect


def _hinted(
    prompts: Batch, theirs: Batch, hints: Hints, around: list[tuple[int, ...]]
) -> tuple[Batch, jax.Array]:
    """The prompts with the teacher's first right solutions in them, and which of them have one."""
    count = len(prompts['input'])
    right = (theirs['rewards'] >= 1).reshape(count, hints.solutions)
    first = jnp.arange(count) * hints.solutions + right.argmax(1)
    solutions = {name: theirs[name][first] for name in ('tokens', 'mask', 'truncated')}
    before, behind = (self_teacher.tokens_of(piece, count) for piece in around)
    quoted = self_teacher.without_end(solutions)
    made = self_teacher.with_block(prompts, before, quoted, behind, after=hints.after)
    return made, right.any(1)


def injected(
    batch: Batch,
    made: Batch,
    wanted: jax.Array,
    there: jax.Array,
    hints: Hints,
    key: jax.Array,
) -> Batch:
    """Right answers of the first good try in places drawn at random, without one place twice.

    Args:
      batch: of answers, [Np G].
      made: of answers to the same prompts with hints, [Np N K].
      wanted: bool [Np], prompts to be opened.
      there: bool [Np], those that have a hint.
      hints: see `Hints`.
      key: of the places.

    Returns:
      The batch and `injected` bool [B]; prompts without a good try keep all of their answers.
    """
    count, each = len(wanted), hints.injected
    good = (made['rewards'] >= 1).reshape(count, hints.tries, each).all(2)
    if hints.accept == 'batch':
        good = jnp.broadcast_to((good | ~wanted[:, None]).all(0), good.shape)
    takes = wanted & there & good.any(1)
    chosen = (jnp.arange(count) * hints.tries + good.argmax(1))[:, None] * each + jnp.arange(each)
    group = len(batch['rewards']) // count
    places = jnp.argsort(jax.random.uniform(key, (count, group)), axis=1)[:, :each]
    at = (jnp.arange(count)[:, None], places)

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        grouped = jnp.asarray(old).reshape(count, group, *old.shape[1:])
        wide = takes.reshape(count, *[1] * (grouped.ndim - 1))
        return jnp.where(wide, grouped.at[at].set(new), grouped).reshape(jnp.shape(old))

    found = {name: put(batch[name], made[name][chosen]) for name in _OWN}
    return {**batch, **found, 'injected': put(jnp.zeros(count * group, bool), takes[:, None])}


def corrected(batch: Batch, log_probs: jax.Array) -> jax.Array:
    """w = sg[pi(y | x) / pi(y | x_h)] of injected answers, 1 of others: [B].

    Args:
      batch: of `opened`.
      log_probs: [B, R], of its answers behind the prompts as they were.
    """
    behind_hint = batch['sampler_log_probs'].sum(1)
    ratio = jnp.exp(jnp.clip(log_probs.sum(1) - behind_hint, -20.0, 20.0))
    return jax.lax.stop_gradient(jnp.where(batch['injected'], ratio, 1.0))


def _tokens(context: Context, piece: tuple[int, ...] | str) -> tuple[int, ...]:
    """A piece of a prompt as tokens; where only shapes count, of a text as many as its words."""
    if not isinstance(piece, str):
        return tuple(piece)
    taken: Any = getattr(context.source('train'), 'tokenizer', None)
    return tuple(taken.encode(piece, begin=False)) if taken else (0,) * len(piece.split())
