"""A policy as its own teacher: the same answers, read after a prompt that says more.

    compare = comparison(draw, Comparison(top_k=100, favourites='student'))

    def of_token(said, weight):
        distance = compare(said)
        return weight * distance, {'distance': distance}

    asked = with_block(batch, tokens_of(23, rows), without_end(batch), tokens_of(5, rows), after=1)
    teacher = scoring.hidden(network, variables_of_the_teacher, asked)
    scoring.answer_losses(network, variables, batch, draw, of_token, per_token=..., teacher=teacher)

Logits of both exist a slab of tokens at a time, and nothing flows to the teacher. The R positions
that predict an answer are counted from the end of both texts, so that what either says of a token
stands side by side whatever is in the prompts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from kd import callables
from kd.losses import outcomes, sequence, signal
from kd.losses.signal import HiddenHead
from kd.method import Batch
from kd.method.single import joined, split
from kd.methods.rl import scoring
from kd.models.decoder import head_of
from kd.network import Network
from kd.ranges import Size
from kd.sampling.environment import Draws
from kd.state import PyTree

# Tokens int [B, n], and which of them there are, bool [B, n].
Piece = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How a policy is compared with a teacher at a token.

    Attributes:
      divergence: import path of `d(student_logits, teacher, *, temperature) -> [n]`, see
        `kd.losses.divergence`.
      arguments: further keywords of it, such as `beta` of `generalized_jsd`.
      top_k: compares the probabilities of so many tokens; 0 for all.
      favourites: whose most probable tokens these are: SDPO's and SRPO's are the student's,
        SD-Zero's the teacher's.
      rest: what becomes of the other tokens, see `kd.losses.signal.TopK`.
    """

    divergence: str = 'kd.losses.divergence.reverse_kl'
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    top_k: Size = 0
    favourites: Literal['student', 'teacher'] = 'student'
    rest: signal.Rest = 'tail'


def comparison(draw: Draws, how: Comparison) -> Callable[[scoring.Said], jax.Array]:
    """`compare(said) -> [n]` nats, for the loss of `kd.methods.rl.scoring.answer_losses`.

    Between the laws that answers are drawn from: of the sampler's temperature, over the tokens that
    it allows and that both networks have.

    Raises:
      UserError: an argument that the divergence does not have.
    """
    measure = callables.resolve(how.divergence)
    arguments = dict(how.arguments)
    callables.check_arguments(measure, arguments, where=f'method ({how.divergence})')

    def compare(said: scoring.Said) -> jax.Array:
        assert said.teacher is not None, 'a comparison needs a teacher'
        logits, teacher = signal.cut(said.logits, said.teacher)
        allowed, told = draw.allowed(logits.shape[-1]), teacher.logits
        if allowed is not None:
            logits, told = (jnp.where(allowed, x, -jnp.inf) for x in (logits, told))
        heard: Any = told
        if how.top_k:
            k = min(how.top_k, logits.shape[-1])
            if how.favourites == 'student':
                heard = signal.student_top_k(logits, told, k, temperature=draw.temperature)
            else:
                heard = signal.top_k(told, k, temperature=draw.temperature)
            heard = heard.replace(rest=how.rest)
        return outcomes.per_position(
            measure, logits, heard, temperature=draw.temperature, **arguments
        )

    return compare


def heard(
    network: Network,
    variables: PyTree,
    batch: Batch,
    draw: Draws,
    *,
    where: jax.Array | None = None,
    chunk: int = 256,
    parts: int = 1,
) -> tuple[jax.Array, scoring.Scores]:
    """Hidden states [B, R, D] of a teacher at the tokens of answers, and its scores of them.

    One forward pass, for a method whose loss compares with the teacher and whose `collect` needs
    the teacher's entropies: hand the hidden states on in the batch, and the head by `with_head`.

    Args:
      network, variables: of the teacher.
      batch: `input`, `prompt_mask`, `tokens`, `mask`, and `there` of an environment, with the
        prompts that the teacher reads.
      draw: the sampler of the answers.
      where: bool [B], the answers that are asked for; None for all. Scores of others are 0.
      chunk: tokens at a time through the head.
      parts: of the batch, one after another, to save memory. What is asked for comes first, and
        parts without any of it are left out: their hidden states are 0.
    """
    names = ('input', 'prompt_mask', 'tokens', 'mask', 'there')
    answered = {name: batch[name] for name in names if name in batch}
    answered['where'] = jnp.ones(len(batch['mask']), bool) if where is None else where

    def of_part(part: Batch) -> tuple[jax.Array, scoring.Scores]:
        said = scoring.hidden(network, variables, part)
        valid = part['mask'] & part['where'][:, None]
        scores = sequence.token_log_probs(
            said.hidden.reshape(valid.size, -1), said.head, part['tokens'].reshape(-1),
            temperature=draw.temperature, valid=valid.reshape(-1), chunk=chunk, tied=said.tied,
            where=draw.allowed(said.head.shape[-1]),
        )  # fmt: skip
        return said.hidden, scoring.Scores(*(x.reshape(valid.shape) for x in scores))

    if parts == 1:
        return of_part(answered)

    def if_any(part: Batch) -> tuple[jax.Array, scoring.Scores]:
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(of_part, part))
        return jax.lax.cond(part['where'].any(), of_part, lambda _: nothing, part)

    # `split` deals rows like cards: so part p has the p-th run of the sorted ones.
    order = jnp.argsort(~answered['where'], stable=True).reshape(parts, -1).T.reshape(-1)
    dealt = jax.tree.map(lambda x: jnp.asarray(x)[order], answered)
    found = joined(jax.lax.map(if_any, split(dealt, parts, 'parts; change micro_batches')))
    return jax.tree.map(lambda x: x[jnp.argsort(order)], found)


def with_head(network: Network, variables: PyTree, hidden: jax.Array) -> HiddenHead:
    """Hidden states of `heard` and the head that they are for."""
    decoder: Any = network.module
    return HiddenHead(hidden, head_of(decoder, variables), decoder.tied)


def with_block(batch: Batch, *pieces: Piece, after: int | None = None) -> Batch:
    """The batch with pieces inside its prompts, behind the first `after` tokens of each.

    A block before a problem leaves the problem as far from its answer as it was; one behind it is
    what the answerer has said or heard since.

    Args:
      batch: of answers.
      *pieces: one after another, padded anywhere.
      after: tokens of a prompt that stay before the block, such as 1 for BOS; -n for all but the
        last n, such as those that end a question and begin an answer; None for all.
    """
    tokens, mask = batch['input'], jnp.asarray(batch['prompt_mask'], bool)
    if after is None:
        return scoring.with_prompt(batch, (tokens, mask), *pieces)
    stay = after if after >= 0 else mask.sum(1, keepdims=True) + after
    first = mask & (jnp.cumsum(mask, axis=1) <= stay)
    made = scoring.with_prompt(batch, (tokens, first), *pieces, (tokens, mask & ~first))
    # Of the two copies of a prompt one is padding, now on the left.
    width = tokens.shape[1]
    return {**made, **{name: made[name][:, width:] for name in ('input', 'prompt_mask')}}


def without_end(batch: Batch) -> Piece:
    """The answers [B, R] without the token that ends them, to be quoted in a prompt.

    `truncated` bool [B] tells those that came to no end, which are quoted whole.
    """
    mask = jnp.asarray(batch['mask'], bool)
    length = mask.sum(1, keepdims=True) - jnp.where(batch['truncated'], 0, 1)[:, None]
    return batch['tokens'], mask & (jnp.arange(mask.shape[1]) < length)


def tokens_of(tokens: int | Sequence[int] | np.ndarray, rows: int) -> Piece:
    """The same tokens in each of so many rows."""
    one = jnp.atleast_1d(jnp.asarray(tokens, jnp.int32))
    made = jnp.broadcast_to(one, (rows, one.size))
    return made, jnp.ones(made.shape, bool)
