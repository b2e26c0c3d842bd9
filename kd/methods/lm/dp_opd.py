"""DP-OPD: on-policy distillation of a language model from private text (2026, arXiv:2604.04461).

A frozen teacher says of every token that the student puts after the beginning of a private record
what it would have put; only the student is trained, and its gradient is private. The teacher's
answers cost no privacy if it was not trained on these records. What may be released is the student:
not the rollouts, nor the beginnings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kd.context import Context
from kd.errors import UserError
from kd.losses import classification, divergence, signal
from kd.method import Batch, Loss, Method, Objective, with_collect
from kd.methods import start
from kd.methods.lm import answering, common
from kd.methods.privacy import privately
from kd.metrics import mean
from kd.ranges import Count, Decay, Fraction, Positive, Size
from kd.state import State


def dp_opd(
    context: Context,
    *,
    prompt: Count,
    clip_norm: Positive,
    epsilon: Positive = 2.0,
    delta: Decay = 0.0,
    beta: Fraction = 0.0,
    on_policy: Fraction = 1.0,
    temperature: Positive = 1.0,
    stop: tuple[Size, ...] = (),
    micro_batches: Count = 1,
) -> Method:
    """Distils on the student's own text, privately.

        l_n = (1 / |m|) sum_{i in m} D_beta(p(. | x_n[:k], y_<i), q(. | x_n[:k], y_<i))

    of record n, with D_beta as `kd.losses.divergence.generalized_jsd` (0 is the forward KL, 1 the
    reverse), y the student's continuation of the first k tokens or, in other batches, the record's
    own, m its tokens; then the private gradient of `kd.method.private`. No gradient goes through
    sampling or into the teacher. A record of fewer than k tokens says nothing.

    One coin a batch decides whose continuations it has (GKD's lambda); it does not depend on the
    records and costs nothing.

    Args:
      context: the stage; needs a decoder, an optimiser, a teacher that has not seen the records,
        `poisson`, and text with one record a row. Starts from `references.start`, if there is one.
      prompt: k, tokens of a record that the student goes on from.
      clip_norm: C. Gradients of distillation are smaller than those of cross-entropy: a C for the
        latter clips none of the former, and its noise drowns them.
      epsilon, delta: see `kd.methods.privacy.guarantee`.
      beta: of the divergence.
      on_policy: lambda, share of batches that the student continues; 0 is off-policy DP-KD.
      temperature: of the student's continuations.
      stop: tokens that end one; () for those of the data's tokenizer, if there is one.
      micro_batches: parts of the batch, whose gradients per record exist at once.
    """
    init = start.from_reference(context.network.init, context)
    method = privately(
        context, distillation(context, beta), init,
        epsilon=epsilon, delta=delta, clip_norm=clip_norm, micro_batches=micro_batches,
    )  # fmt: skip
    collect = continuations(context, prompt, on_policy, temperature=temperature, stop=stop)
    return with_collect(method, collect)


def dp_sgd(
    context: Context,
    *,
    clip_norm: Positive,
    epsilon: Positive = 2.0,
    delta: Decay = 0.0,
    micro_batches: Count = 1,
) -> Method:
    """Fine-tunes on the records themselves, privately: the same gradient of the cross-entropy.

    Arguments as of `dp_opd`; no teacher is needed.
    """
    init = start.from_reference(context.network.init, context)
    return privately(
        context, cross_entropy(context), init,
        epsilon=epsilon, delta=delta, clip_norm=clip_norm, micro_batches=micro_batches,
    )  # fmt: skip


def distillation(context: Context, beta: float = 0.0) -> Loss:
    """D_beta to the teacher, a mean over the tokens that count; of each record, when private."""

    def of_token(logits, teacher, labels):
        del labels
        said = signal.all_logits('dp_opd', teacher)
        return divergence.generalized_jsd(logits, said, beta=beta), {}

    return _mean_over_tokens(context, of_token, taught=True)


def cross_entropy(context: Context) -> Loss:
    """-log q(token), a mean over the tokens that count; of each record, when private."""

    def of_token(logits, teacher, labels):
        del teacher
        return classification.cross_entropy(logits, labels), {}

    return _mean_over_tokens(context, of_token, taught=False)


def _mean_over_tokens(context: Context, of_token: common.TokenLoss, *, taught: bool) -> Loss:
    network = context.network

    def loss(params, state, batch, key) -> Objective:
        teacher = common.teacher_signal(context, state, batch) if taught else None
        # Logits whole: beside the gradient of a record's head they are small, and the loss that
        # forms none would run its second sweep under vmap, which takes both ways of a condition.
        found = common.token_losses(
            network, state.variables(params=params), batch, of_token,
            teacher=teacher, key=key, chunk=0,
        )  # fmt: skip
        return Objective(mean(found.losses, found.where), {}, found.mutables)

    return loss


def continuations(
    context: Context,
    prompt: int,
    on_policy: float,
    *,
    temperature: Positive = 1.0,
    stop: tuple[Size, ...] = (),
) -> Callable[[State, Batch, jax.Array], Batch]:
    """`collect` for `with_collect`: records cut after `prompt` tokens, and gone on with.

    By the student in a share `on_policy` of the batches, by their own text in the others; as long
    as a row of the data. The tokens of the beginning do not count.

    Args:
      context: the stage, with text whose rows hold one record each.
      prompt, on_policy, temperature, stop: as of `dp_opd`.

    Raises:
      UserError: a beginning that leaves nothing of a row, or no such text.
    """
    spec = context.spec
    if 'response_mask' not in spec or 'prompt_mask' in spec:
        raise UserError(
            f'{context.stage}: records are continued from their beginnings, and the data has no '
            "rows of text; a source of text has them with layout='rows'."
        )
    length = spec['input'].shape[0]
    if prompt >= length:
        raise UserError(
            f'{context.stage}.method.prompt={prompt} leaves nothing of rows of {length} tokens.'
        )
    tokens, mask = spec['input'].dtype, spec['response_mask'].dtype
    sizes = {'input': prompt, 'prompt_mask': prompt}
    sizes |= {'response': length - prompt, 'response_mask': length - prompt}
    cut = {
        name: jax.ShapeDtypeStruct((size,), mask if name.endswith('mask') else tokens)
        for name, size in sizes.items()
    }
    collect = answering.on_policy(
        dataclasses.replace(context, spec=cut), max_new=length - prompt, share=on_policy,
        temperature=temperature, stop=stop,
    )  # fmt: skip

    def collected(state: State, batch: Batch, key: jax.Array) -> Batch:
        return collect(state, beginnings(batch, prompt), key)

    return collected


def beginnings(batch: Batch, prompt: int) -> Batch:
    """Rows of text as prompts and answers: `input`, `prompt_mask`, `response`, `response_mask`.

    Args:
      batch: `input` int [B, T] and `response_mask` bool [B, T], one record a row; `segments` int
        [B, T] is 0 on padding, if there is any.
      prompt: k. The last slot of a prompt is padding where a record has fewer tokens, so that
        nothing is sampled, and nothing counts.
    """
    tokens, learnt = batch['input'], batch['response_mask']
    used = batch['segments'] > 0 if 'segments' in batch else jnp.ones(tokens.shape, bool)
    kept = {name: batch[name] for name in batch if name not in ('positions', 'segments')}
    return {
        **kept,
        'input': tokens[:, :prompt],
        'prompt_mask': used[:, :prompt],
        'response': tokens[:, prompt:],
        'response_mask': (learnt & used)[:, prompt:],
    }
