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
| `advantage` [B], `weight` [B, R] | of the whole batch: no loss computes what it divides by |
| `truncated`, `unjudged`, `dead` bool [B] | no end; no verdict; a group of equal rewards |
| `decoded` [B] | tokens that the loop went through |

A loss sees any part of it, and is the mean over rows of sum_t weight_t l_t.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from kd import config as config_lib
from kd.context import Context
from kd.errors import UserError
from kd.losses import aggregate, policy, sequence
from kd.losses.signal import HiddenHead
from kd.method import Batch
from kd.method.single import joined, split
from kd.methods.lm import common as lm
from kd.models.decoder import head_of
from kd.network import Network
from kd.parallel import layout
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


class Said(NamedTuple):
    """What a policy says of n answered tokens, one slab of them.

    Attributes:
      logits: [n, V].
      log_p: [n], of the answer's token.
      entropy: [n] nats.
      teacher: hidden states and head of a teacher, or None.
    """

    logits: jax.Array
    log_p: jax.Array
    entropy: jax.Array
    teacher: HiddenHead | None


class AnswerLosses(NamedTuple):
    """`losses` [B, R], 0 outside the mask; `aux` a tree of such; `mutables` of the network."""

    losses: jax.Array
    aux: Any
    mutables: PyTree


# (Said, **per_token [n]) -> (loss [n], aux)
AnswerLoss = Callable[..., tuple[jax.Array, Any]]


def drawing(
    context: Context, sampling: Sampling, *others: Network, who: Network | None = None
) -> Draws:
    """The sampler of the stage's network, or of another one, `who`; or its player where there is an
    environment.

    Of vocabularies padded to different sizes, tokens that one of `others` lacks are forbidden.

    Raises:
      UserError: a network that is no decoder, data without prompts, no token that ends an answer.
    """
    decoder = lm.needed_decoder(context, who or context.network, 'network')
    if 'prompt_mask' not in context.spec:
        raise UserError(
            f"{context.stage}: answers are sampled to prompts, and the data has no 'prompt_mask'; "
            "give data.source layout='prompts'."
        )
    sizes = [lm.needed_decoder(context, other, 'teacher').num_classes for other in others]
    how = dict(vars(sampling))
    del how['group']
    world = how.pop('environment')
    outcomes = min([decoder.num_classes, *sizes])
    draw = lm.drawing(decoder, lambda: context.source('train'), outcomes, **how)
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

    `longest` counts the tokens of the longest answer, 0 for all slots.
    """
    mask, values = batch['mask'], batch['rewards']
    longest = longest or mask.shape[1]
    if overlong:
        values += policy.overlong_penalty(mask.sum(1), longest, overlong)
    constant = float(longest) if aggregation == 'constant' else None
    dead = jnp.repeat(policy.dead_groups(values, group), group)
    counted = mask & ~dead[:, None] if drop_dead else mask
    made = {
        'advantage': policy.group_advantage(values, group, advantage, ddof=ddof, epsilon=epsilon),
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
      chunk, parts: of that pass, see `score`.
    """
    answer = answered(context, draw, reward, group=group)

    def collect(state: State, batch: Batch, key: jax.Array) -> Batch:
        batch = valued(
            answer(state, batch, key), group, advantage=advantage, ddof=ddof,
            aggregation=aggregation, drop_dead=drop_dead, overlong=overlong, longest=draw.max_new,
        )  # fmt: skip
        if recomputed:
            own = score(context.network, state.variables(), batch, draw, chunk=chunk, parts=parts)
            batch['old_log_probs'] = own.log_probs
        return batch

    return collect


class Scores(NamedTuple):
    """`log_probs` [B, R] of answers under a network and its `entropy` [B, R]; 0 after the end."""

    log_probs: jax.Array
    entropy: jax.Array


def score(
    network: Network,
    variables: PyTree,
    batch: Batch,
    draw: Draws,
    *,
    chunk: int = 256,
    parts: int = 1,
) -> Scores:
    """What a network says of answers that are there: a teacher, a reference, the old policy.

    Over the same tokens and at the same temperature as the policy. A self-teacher that sees more
    than the policy is scored on a batch with another prompt, see `with_prompt`.

    Args:
      network, variables: who is asked.
      batch: `input`, `prompt_mask`, `tokens`, `mask`, and `there` if it has it.
      draw: the sampler of the answers.
      chunk: tokens at a time through the head.
      parts: of the batch, one after another, to save memory.
    """
    names = {'input', 'prompt_mask', 'tokens', 'mask', 'there'} & set(batch)

    def of_part(part: Batch) -> Scores:
        found = answer_losses(
            network, variables, part, draw, lambda said: (said.log_p, said.entropy), chunk=chunk,
            train=False,
        )  # fmt: skip
        return Scores(found.losses, found.aux)

    answered = {name: batch[name] for name in names}
    if parts == 1:
        return of_part(answered)
    cut = split(answered, parts, 'parts; change batch_size or micro_batches')
    return joined(jax.lax.map(of_part, cut))


def answer_losses(
    network: Network,
    variables: PyTree,
    batch: Batch,
    draw: Draws,
    loss: AnswerLoss,
    *,
    per_token: Mapping[str, jax.Array] | None = None,
    teacher: HiddenHead | None = None,
    key: jax.Array | None = None,
    chunk: int = 256,
    train: bool = True,
) -> AnswerLosses:
    """A loss of every token of the answers; logits are formed `chunk` tokens at a time.

    The prompt and the answer are read at once, [B, P + R], and of what comes out the R positions
    that predict the answer are taken, counted from the end: whatever stands in the prompt. Of what
    is `there` all is read, and what the `mask` leaves out, words of an environment, has no loss.

    Args:
      network, variables: of the policy.
      batch: `input`, `prompt_mask`, `tokens`, `mask`, and `there` if it has it.
      draw: the sampler of the answers, whose temperature and tokens the policy has.
      loss: `loss(said, **per_token) -> (loss [n], aux)`. Let it multiply by the weights of tokens
        and add up what comes out: see `kd.losses.sequence.fused_token_loss` for why.
      per_token: arrays [B, R], or [B] of rows.
      teacher: hidden states [B, R, D'] and head, of `hidden`.
      key: for dropout.
      chunk: tokens at a time, of each device that shares the batch.
      train: whether the network is in training mode.
    """
    shape = batch['tokens'].shape
    hidden, head, mutables = _hidden(network, variables, batch, train=train, key=key)
    allowed = draw.allowed(head.shape[-1])

    def flat(x: jax.Array) -> jax.Array:
        x = jnp.broadcast_to(x[:, None], shape) if x.ndim == 1 else x
        return x.reshape(-1, *x.shape[2:])

    def token_loss(logits, teacher, per_token):
        tokens, given = per_token
        log_p, entropy = sequence.said_of(
            logits, tokens, temperature=draw.temperature, where=allowed
        )
        return loss(Said(logits, log_p, entropy, teacher), **given)

    given = {name: flat(x) for name, x in (per_token or {}).items()}
    if teacher is not None:
        teacher = HiddenHead(flat(teacher.hidden), teacher.head, teacher.tied)
    shards = layout.shards(batch['tokens'].size)
    losses, aux = sequence.fused_token_loss(
        flat(hidden),
        head,
        token_loss,
        teacher=teacher,
        per_token=(flat(batch['tokens']), given),
        valid=flat(batch['mask']),
        chunk=chunk * shards,
        shards=shards,
        tied=network.module.tied,
    )
    losses, aux = jax.tree.map(lambda x: x.reshape(shape), (losses, aux))
    return AnswerLosses(losses, aux, mutables)


def hidden(network: Network, variables: PyTree, batch: Batch) -> HiddenHead:
    """What a teacher says of every token of the answers: hidden states [B, R, D] and a head."""
    said, head, _ = _hidden(network, variables, batch, train=False, key=None)
    return HiddenHead(said, head, network.module.tied)


def with_prompt(batch: Batch, *pieces: tuple[jax.Array, jax.Array]) -> Batch:
    """The batch with another prompt: pieces one after another, padded on the left.

    For a self-teacher, who sees a solution, a hint or a skill that the policy does not:

        with_prompt(batch, (solution, solution_mask), (batch['input'], batch['prompt_mask']))

    The answers stay where they are, at the end, and so do their scores.

    Args:
      batch: of answers.
      *pieces: tokens int [B, n] and which of them there are, bool [B, n], padded anywhere.
    """
    tokens, mask = (jnp.concatenate(x, axis=1) for x in zip(*pieces, strict=True))
    # A stable sort: what there is keeps its order, behind the padding.
    order = jnp.argsort(mask, axis=1, stable=True)
    moved = {
        'input': jnp.take_along_axis(tokens, order, axis=1),
        'prompt_mask': jnp.take_along_axis(mask, order, axis=1),
    }
    return {**batch, **moved}


def prompts_of(batch: Batch, rows: int) -> Batch:
    """`input` and `prompt_mask` of a batch of prompts, each as often as it has answers among
    `rows`; for answers that were given to another prompt."""
    times = rows // len(batch['input'])
    return {name: jnp.repeat(batch[name], times, axis=0) for name in ('input', 'prompt_mask')}


def _hidden(network, variables, batch, *, train, key):
    """Hidden states [B, R, D] at the positions that predict the answers, head and mutables."""
    asked, length = batch['prompt_mask'], batch['tokens'].shape[1]
    tokens = jnp.concatenate([batch['input'], batch['tokens']], axis=1)
    there = jnp.concatenate([asked, batch.get('there', batch['mask'])], axis=1)
    positions = jnp.maximum(jnp.cumsum(there, axis=1) - 1, 0)
    output = network.apply(
        variables, tokens, positions, there.astype(jnp.int32), method='hidden', train=train, key=key
    )
    at = slice(asked.shape[1] - 1, asked.shape[1] - 1 + length)
    return output.logits[:, at], head_of(network.module, variables), output.mutables
