"""What methods that sample answers and are told what these are worth share.

A batch of Np prompts, `input` int [Np, P] and `prompt_mask` bool [Np, P] padded on the left (the
layout 'prompts' of `kd.data.text`), becomes in `collect` a batch of B = Np G answers, those to a
prompt one after another, and of the fields of their prompts:

| field | |
|---|---|
| `tokens` int32, `mask` bool [B, R] | the answers, padded on the right; the end is one of them |
| `there` bool [B, R] | where an environment speaks between: what is read, its tokens and the mask |
| `sampler_log_probs` [B, R] | as the sampler drew them |
| `old_log_probs` [B, R] | as the network scores them before the first of several updates |
| `rewards` [B] | verdicts; 0 where there is none |
| `advantage` [B], `weight` [B, R] | of the whole batch: no loss computes what it divides by; 0 of
  an answer that nobody could judge |
| `truncated`, `unjudged`, `dead` bool [B] | no end; no verdict; a group of equal rewards |
| `decoded` [B] | tokens that the loop went through |

A loss sees any part of it, and is the mean over rows of sum_t weight_t l_t.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from kd import config as config_lib
from kd.context import Context
from kd.errors import UserError
from kd.losses import aggregate, policy
from kd.method import Batch
from kd.methods.lm import answering
from kd.methods.rl import scoring
from kd.network import Network
from kd.ranges import Count, Positive, Size
from kd.rewards.reward import KEYS, Reward, judged
from kd.sampling.autoregressive import Rollout
from kd.sampling.environment import Draws, Episodes, Player
from kd.state import PyTree, State

Collect = Callable[[State, Batch, jax.Array], Batch]
# Folded into the key of a step's answers for what their rewards draw.
_OF_REWARDS = 1_000_003


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How answers are sampled.

    Attributes:
      group: G, answers to each prompt.
      max_new: R, tokens of the longest answer.
      temperature: of the policy: log-probabilities are those of softmax(logits / temperature).
      top_p, top_k, block: see `kd.sampling.autoregressive.sampler`.
      stop: tokens that end an answer; () for those of the data's tokenizer.
      forbidden: tokens that have probability 0, such as padding.
      only: the tokens that may be said, such as actions; () for all that are not forbidden.
      environment: block of the world that answers, whose turns an answer is then made of, see
        `kd.sampling.environment`; `max_new` counts the tokens of a turn. None for none.
    """

    group: Count = 8
    max_new: Count = 256
    temperature: Positive = 1.0
    top_p: Positive = 1.0
    top_k: Size = 0
    stop: tuple[Size, ...] = ()
    forbidden: tuple[Size, ...] = ()
    only: tuple[Size, ...] = ()
    block: Count = 16
    environment: Mapping[str, Any] | None = None


def drawing(
    context: Context, sampling: Sampling, *others: Network, who: Network | None = None
) -> Draws:
    """The sampler of the stage's network, or of another one, `who`; or its player where there is an
    environment.

    Of vocabularies padded to different sizes, tokens that one of `others` lacks are forbidden.

    Raises:
      UserError: a network that is no decoder, data without prompts, no token that ends an answer.
    """
    decoder = answering.needed_decoder(context, who or context.network, 'network')
    if 'prompt_mask' not in context.spec:
        raise UserError(
            f"{context.stage}: answers are sampled to prompts, and the data has no 'prompt_mask'; "
            "give data.source layout='prompts'."
        )
    sizes = [answering.needed_decoder(context, other, 'teacher').num_classes for other in others]
    how = dict(vars(sampling))
    del how['group']
    world = how.pop('environment')
    outcomes = min([decoder.num_classes, *sizes])
    draw = answering.drawing(decoder, lambda: context.source('train'), outcomes, **how)
    if world is None:
        return draw
    where = f'{context.stage}.method.sampling.environment'
    return Player(draw, config_lib.build(world, context, where=where))


def of_block(context: Context, reward: Mapping[str, Any]) -> Reward:
    """The reward of a block."""
    return config_lib.build(reward, context, where=f'{context.stage}.method.reward')


def answered(context: Context, draw: Draws, reward: Reward, *, group: Count) -> Collect:
    """`collect`: answers of the present network and their rewards, all but what groups make of
    them (`valued`); arguments as of `rollouts`."""

    def collect(state: State, batch: Batch, key: jax.Array) -> Batch:
        return tried(context, draw, reward, state.variables(), batch, group, key)

    return collect


def tried(
    context: Context, draw: Draws, reward: Reward, variables: PyTree, batch: Batch, times: int,
    key: jax.Array,
) -> Batch:  # fmt: skip
    """So many answers to each prompt, one after another, and their rewards; `variables` are of the
    network that `draw` samples from."""
    batch = jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), batch)
    said = draw.of(context.rollout(variables), batch, key)
    decoded = jnp.full(len(said.tokens), draw.turns(said.mask), jnp.float32)
    return rewarded({**batch, 'decoded': decoded}, said, reward, key)


def rewarded(
    batch: Batch, said: Rollout | Episodes, reward: Reward, key: jax.Array | None = None
) -> Batch:
    """The batch with these answers, and what they are worth; the key, of the answers, is for
    rewards that draw, as `kd.rewards.noisy` does."""
    batch, keys = {**batch, 'truncated': said.truncated}, {}
    if key is not None:
        keys[KEYS] = jax.random.split(jax.random.fold_in(key, _OF_REWARDS), len(said.tokens))
    rewards, unjudged = judged(reward(said.tokens, said.mask, {**batch, **keys}))
    made = {
        'tokens': said.tokens,
        'mask': said.mask,
        'sampler_log_probs': said.log_probs,
        'rewards': rewards,
        'unjudged': unjudged,
    }
    if isinstance(said, Episodes):
        made['there'] = said.there
    return {**batch, **made}


def valued(
    batch: Batch,
    group: int,
    *,
    advantage: policy.Advantage = 'grpo',
    ddof: Literal[0, 1] = 0,
    epsilon: float = 1e-6,
    aggregation: aggregate.Mode = 'sequence_mean',
    drop_dead: bool = False,
    overlong: int = 0,
    longest: int = 0,
) -> Batch:
    """The batch with advantages, weights and dead groups; arguments as of `rollouts`.

    An answer without a verdict is no part of its group, nor of what is averaged over: that a
    verifier hangs says nothing of it.

    `longest` counts the tokens of the longest answer, 0 for all slots.
    """
    mask, values = batch['mask'], batch['rewards']
    longest = longest or mask.shape[1]
    if overlong:
        values += policy.overlong_penalty(mask.sum(1), longest, overlong)
    constant = float(longest) if aggregation == 'constant' else None
    there = ~batch['unjudged']
    dead = jnp.repeat(policy.dead_groups(values, group, where=there), group)
    counted = mask & (there & ~dead if drop_dead else there)[:, None]
    made = {
        'advantage': policy.group_advantage(
            values, group, advantage, ddof=ddof, epsilon=epsilon, where=there
        ),
        'dead': dead,
        'weight': aggregate.weights(counted, aggregation, constant=constant),
    }
    return {**batch, **made}


def rollouts(
    context: Context,
    draw: Draws,
    reward: Reward,
    *,
    group: Count,
    advantage: policy.Advantage = 'grpo',
    ddof: Literal[0, 1] = 0,
    aggregation: aggregate.Mode = 'sequence_mean',
    drop_dead: bool = False,
    overlong: Size = 0,
    recomputed: bool = False,
    chunk: Count = 256,
    parts: Count = 1,
) -> Collect:
    """`collect` for `with_collect`: answers of the present network, and what they are worth.

    Args:
      context: the stage.
      draw: of `drawing`.
      reward: of the answers.
      group: G.
      advantage, ddof: see `kd.losses.policy.group_advantage`.
      aggregation: see `kd.losses.aggregate.weights`; the constant of this mode is R.
      drop_dead: leave answers of groups with equal rewards out of what is averaged over.
      overlong: C of `kd.losses.policy.overlong_penalty`, which is a part of what advantages are
        made of; 0 for none. `rewards` are without it.
      recomputed: bring `old_log_probs`, by a forward pass of the network. Sampled ones are the same
        up to rounding, unless `rollout_dtype` is another type than the network's.
      chunk, parts: of that pass, see `kd.methods.rl.scoring.score`.
    """
    answer = answered(context, draw, reward, group=group)

    def collect(state: State, batch: Batch, key: jax.Array) -> Batch:
        batch = valued(
            answer(state, batch, key), group, advantage=advantage, ddof=ddof,
            aggregation=aggregation, drop_dead=drop_dead, overlong=overlong, longest=draw.max_new,
        )  # fmt: skip
        if recomputed:
            own = scoring.score(
                context.network, state.variables(), batch, draw, chunk=chunk, parts=parts
            )
            batch['old_log_probs'] = own.log_probs
        return batch

    return collect
