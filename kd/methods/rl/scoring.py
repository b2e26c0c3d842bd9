"""What networks say of answers that are there: losses of their tokens, and scores.

See `kd.methods.rl.common` for what a batch of answers has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kd.losses import sequence
from kd.losses.signal import HiddenHead
from kd.method import Batch
from kd.method.single import joined, split
from kd.models.decoder import head_of
from kd.network import Network
from kd.parallel import layout
from kd.sampling.environment import Draws
from kd.state import PyTree


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
