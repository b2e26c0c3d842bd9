"""Answers that a decoder samples to the prompts of a batch, and the text that they make with them.

See `kd.methods.lm.common` for what a batch of text has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from kd.context import Context
from kd.errors import UserError
from kd.method import Batch
from kd.methods.lm import common
from kd.models.decoder import Decoder
from kd.network import Network
from kd.ranges import Count, Fraction, NonNegative, Positive, Size
from kd.sampling.autoregressive import Sampler, sampler
from kd.state import PyTree, State


def on_policy(
    context: Context,
    *,
    max_new: Count,
    temperature: NonNegative = 1.0,
    top_p: Positive = 1.0,
    top_k: Size = 0,
    stop: tuple[Size, ...] = (),
    forbidden: tuple[Size, ...] = (),
    share: Fraction = 1.0,
    other: Literal['data', 'teacher'] = 'data',
    block: Count = 16,
) -> Callable[[State, Batch, jax.Array], Batch]:
    """`collect` for `with_collect`: answers of the present student to the prompts of a batch.

    With probability `share`, drawn once for the whole batch, the student answers (GKD's lambda,
    arXiv:2306.13649); else the text is that of the data, or what the teacher says. Nothing flows
    through the sampling.

    Args:
      context: the stage; a decoder as its network, and data in the layout 'prompts'.
      max_new: R, tokens of the longest answer; those of the data are cut to it.
      temperature, top_p, top_k, forbidden, block: see `kd.sampling.autoregressive.sampler`.
      stop: tokens that end an answer; () for those of the data's tokenizer, if there is one.
      share: of batches that the student answers.
      other: whose answers the others have: 'data', its field `response`; or 'teacher'.

    Returns:
      `collect(state, batch, key)`: the batch with `answered` rows in the place of its prompts.

    Raises:
      UserError: a network that is no decoder, or data without what is needed.
    """
    student, spec = needed_decoder(context, context.network, 'network'), context.spec
    needed = ['prompt_mask', *(['response'] if share < 1 and other == 'data' else [])]
    if share < 1 and other == 'teacher':
        needed_decoder(context, context.teacher, 'teacher')
    if missing := [name for name in needed if name not in spec]:
        raise UserError(
            f"{context.stage}: answers are sampled to prompts, and the data has no '{missing[0]}'; "
            "a source of text has them with layout='prompts' (and response_length)."
        )

    def says(decoder: Decoder, variables: PyTree, batch: Batch, key: jax.Array):
        draw = drawing(
            decoder, lambda: context.source('train'), student.num_classes, max_new=max_new,
            temperature=temperature, top_p=top_p, top_k=top_k, stop=stop, forbidden=forbidden,
            block=block,
        )  # fmt: skip
        return draw(variables, batch['input'], batch['prompt_mask'], key)[:2]

    def of_student(state, batch, key):
        return says(student, context.rollout(state.variables()), batch, key)

    def of_other(state, batch, key):
        if other == 'teacher':
            decoder = needed_decoder(context, context.teacher, 'teacher')
            return says(decoder, context.rollout(state.frozen['teacher']), batch, key)
        room = max(max_new - batch['response'].shape[1], 0)
        tokens, mask = (
            jnp.pad(batch[name], ((0, 0), (0, room)))[:, :max_new]
            for name in ('response', 'response_mask')
        )
        return tokens.astype(jnp.int32), mask

    def collect(state: State, batch: Batch, key: jax.Array) -> Batch:
        coin, key = jax.random.split(key)
        if share in (0, 1):
            tokens, mask = (of_student if share else of_other)(state, batch, key)
        else:
            own = jax.random.bernoulli(coin, share)
            tokens, mask = jax.lax.cond(own, of_student, of_other, state, batch, key)
        return answered(batch, tokens, mask)

    return collect


def answered(batch: Batch, tokens: jax.Array, mask: jax.Array) -> Batch:
    """The batch with prompts and answers as text, which begins in the first slot of a row.

    Args:
      batch: `input` int [B, P] and `prompt_mask` bool [B, P], padded on the left; other fields
        stay, but for `response`.
      tokens, mask: int and bool [B, R], the answers, padded on the right.

    Returns:
      `input`, `positions`, `segments` int [B, P + R] and `response_mask` bool [B, P + R], as of
      `kd.text.packing.unpacked`: padding ends a row, so that a causal network needs no more.
    """
    read = jnp.asarray(batch['prompt_mask'], bool)
    rows, length = read.shape[0], read.shape[1] + tokens.shape[1]
    # What stands on the left goes behind the end.
    padding = read.shape[1] - read.sum(1)
    slots = (jnp.arange(length) + padding[:, None]) % length

    def moved(left, right):
        both = jnp.concatenate([left, right], axis=1)
        return jnp.take_along_axis(both, slots, axis=1)

    used = moved(read, mask)
    made = {
        'input': jnp.where(used, moved(batch['input'], tokens), 0),
        'positions': jnp.where(used, jnp.arange(length), 0),
        'segments': used.astype(jnp.int32),
        'response_mask': moved(jnp.zeros((rows, read.shape[1]), bool), mask),
    }
    kept = {name: x for name, x in batch.items() if name not in ('prompt_mask', 'response')}
    return {**kept, **made}


def as_text(batch: Batch) -> Batch:
    """A batch of prompts with a `response` as text; another as it is."""
    if 'prompt_mask' not in batch or 'response' not in batch:
        return batch
    return answered(batch, batch['response'], batch['response_mask'])


def drawing(
    decoder: Decoder,
    source: Callable[[], Any],
    outcomes: int,
    *,
    stop: Sequence[int] = (),
    forbidden: Sequence[int] = (),
    only: Sequence[int] = (),
    **how: Any,
) -> Sampler:
    """The sampler of a decoder for the prompts of a source.

    Args:
      decoder: who answers.
      source: brings that of the prompts; its tokenizer says what ends an answer if no `stop` does.
      outcomes: tokens that all who read the answers know; of a vocabulary that is padded further
        the rest is never said.
      stop, forbidden, only, **how: see `kd.sampling.autoregressive.sampler`.
    """
    if not stop and (taken := getattr(source(), 'tokenizer', None)):
        stop = [token for token in taken.stop if token < decoder.num_classes]
    never = forbidden if only else (*forbidden, *range(outcomes, decoder.num_classes))
    return sampler(decoder, stop=stop, forbidden=never, only=only, **how)


def needed_decoder(context: Context, network: Network, what: str) -> Decoder:
    """The module of a network; raises `UserError` unless answers can be sampled from it."""
    decoder = common.decoder_of(network)
    if decoder is not None and decoder.required_fields != ('input',):
        raise UserError(
            f'{context.stage}: answers are sampled from text, and the {what} takes the fields '
            f'{list(decoder.required_fields)}; take answers of the data.'
        )
    if decoder is None:
        raise UserError(
            f'{context.stage}: answers are sampled from a decoder such as '
            f'kd.models.decoder.Decoder, and the {what} is {type(network.module).__name__}.'
        )
    return decoder
