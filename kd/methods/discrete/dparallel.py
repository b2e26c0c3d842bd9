"""dParallel: certainty of many positions at once (Chen et al. 2025, arXiv:2509.26488).

A masked diffusion model becomes certain of its tokens one neighbour after another, and so they can
be committed no faster. It is distilled on answers of its own that are right: to say them from half
of a block, and to be certain where it says them rightly.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from kd.context import Context
from kd.errors import UserError
from kd.losses import masked_diffusion as losses
from kd.method import Method, Objective, minimize, with_collect
from kd.methods import start
from kd.methods.discrete import common
from kd.metrics import mean
from kd.ranges import Count, Fraction, NonNegative, Positive, Size
from kd.sampling.masked import logits_function


def prompt_length(batch: Mapping[str, jax.Array]) -> jax.Array:
    """int [B]: the field of this name, or of text the place of the first token of the answer.

    Of a row without an answer it is the whole row.
    """
    if 'prompt_length' in batch:
        return batch['prompt_length']
    answer = batch['response_mask']
    return jnp.where(answer.any(-1), jnp.argmax(answer, axis=-1), answer.shape[-1])


def certainty_forcing(
    context: Context,
    *,
    block: Count,
    ratio: Fraction = 0.5,
    certainty: NonNegative = 2.0,
    consistency: NonNegative = 1.0,
    temperature: Positive = 0.5,
    complement: bool = True,
    shift: bool = False,
    tail: bool = True,
    mask: Size | None = None,
    micro_batches: Count = 1,
) -> Method:
    """Certainty-forcing distillation on right answers of the network itself.

        loss = consistency CE + certainty H

    with `kd.losses.masked_diffusion.masked_ce` and `certainty` of the hidden positions of a block
    that is drawn for each row by `block_mask`: the blocks before it are seen, those behind it are
    hidden and count nothing. With the complement both are computed for a second copy too, in which
    the block's other positions are hidden, and added. The head is applied to the block alone. What
    follows an answer in a row (padding, as an end of text) is part of it.

    Args:
      context: the stage; needs a network that is not causal, an optimiser, and data with `input`
        int [B, S] and `prompt_length` int [B], or text in the layout 'rows'. Starts from
        `references.start`, the network whose answers these are.
      block: tokens of a block; as many as an answer has for plain random masking, as of Dream.
      ratio: q, of the block's positions that are hidden.
      certainty: beta; 2 as released for LLaDA, 1 for Dream.
      consistency: weight of the cross-entropy; 0 for certainty alone, as a control.
      temperature: T of the entropy.
      complement: see above.
      shift: whether the network gives logits of the token behind each position, as Dream does.
      tail: see `block_mask`.
      mask: id of the mask; None for the first of the network's `extra_symbols`.
      micro_batches: parts over which gradients are accumulated.

    Raises:
      UserError: data without prompts and answers, or a block that a row has no room for.
    """
    network, spec = context.network, context.spec
    own = common.mask_of(context, network, 'network', mask)
    if spec and not {'prompt_length', 'response_mask'} & set(spec):
        raise UserError(
            f"{context.stage}: the data has neither 'prompt_length' nor 'response_mask', which say "
            "where answers begin; a source of text has the latter with layout='rows'."
        )
    if spec and block >= spec['input'].shape[0]:
        raise UserError(
            f'{context.stage}.method.block={block}: rows have {spec["input"].shape[0]} tokens, and '
            'a block has to fit behind a prompt.'
        )

    def collect(state, batch, key):
        del state
        length = batch['input'].shape[1]
        drawn = losses.block_mask(
            key, prompt_length(batch), length, block=block, ratio=ratio, tail=tail
        )
        return {**batch, **dict(zip(('active', 'complement', 'after'), drawn, strict=True))}

    def loss(params, state, batch, key) -> Objective:
        rows = [batch['active'], batch['complement']][: 1 + complement]
        hidden, tokens = jnp.concatenate(rows), jnp.tile(batch['input'], (len(rows), 1))
        z = jnp.where(hidden | jnp.tile(batch['after'], (len(rows), 1)), own, tokens)
        # The block's places; past the end of a row, and in one without a block, nothing is hidden.
        begin = jnp.tile((batch['active'] | batch['complement']).argmax(-1), len(rows))
        places = begin[:, None] + jnp.arange(block)
        at = jnp.minimum(places, tokens.shape[1] - 1)
        where = jnp.take_along_axis(hidden, at, axis=1) & (places < tokens.shape[1])
        labels = jnp.take_along_axis(tokens, at, axis=1)
        logits = logits_function(
            network, state.variables(params=params), own, shift=shift, train=True, key=key
        )(z, None, at)
        hard = losses.masked_ce(logits, labels, where)
        sure = losses.certainty(logits, labels, where, temperature=temperature)
        of_row = (consistency * hard + certainty * sure).reshape(len(rows), -1).sum(0)
        right = logits.argmax(-1) == labels
        metrics = {
            'consistency': mean(hard, where.any(-1)),
            'certainty': mean(sure, (where & right).any(-1)),
            'right': mean(right, where),
        }
        return Objective(mean(of_row), metrics)

    init = start.from_reference(network.init, context)
    return with_collect(minimize(loss, context.tx, init, micro_batches=micro_batches), collect)
