"""Distillation of a language model token by token, from its hidden states.

The common form of word-level distillation (Hinton et al. 2015, arXiv:1503.02531; Kim and Rush 2016,
arXiv:1606.07947), with any divergence: forward and reverse KL, the generalised Jensen-Shannon of
GKD (arXiv:2306.13649), the skewed ones of DistiLLM (arXiv:2402.03898). On the text of the data, or
as in GKD on a mixture of that and what the student says itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np

from kd import callables
from kd.context import Context
from kd.errors import UserError
from kd.losses import aggregate, classification, outcomes
from kd.method import Method, Objective, minimize, with_collect
from kd.methods import start
from kd.methods.lm import answering, common
from kd.methods.teacher import is_cached
from kd.metrics import mean
from kd.ranges import Count, Fraction, Keywords, Positive, Size

_Rollout = Annotated[Mapping[str, Any], Keywords(answering.on_policy, ('context', 'share'))]


def distillation(
    context: Context,
    *,
    divergence: str = 'kd.losses.divergence.forward_kl',
    temperature: Positive = 1.0,
    soft_weight: Fraction = 1.0,
    mean_over: aggregate.Mode = 'token_mean',
    constant: Positive | None = None,
    on_policy: Fraction = 0.0,
    rollout: _Rollout | None = None,
    blocks: tuple[Size, ...] = (),
    chunk: Count = 256,
    micro_batches: Count = 1,
    **divergence_arguments,
) -> Method:
    """A divergence to the teacher and the cross-entropy with the text, averaged over tokens.

        loss = (1 - w) CE(y, q) + w D(q, p; T)      over the tokens of the batch that count

    Without a factor T^2, as papers on language models have it. With w = 0 no teacher is needed, and
    this is fine-tuning. A decoder's logits are formed `chunk` tokens at a time.

    With `rollout` the data are prompts, and the text of a step is what the present student answers
    with probability lambda, else the data's `response` (GKD, arXiv:2306.13649, algorithm 1; one
    draw for the whole batch). Nothing flows through the sampling.

    Args:
      context: the stage; needs a network, an optimiser, and a teacher or what one has said in the
        batch; labels, or packed text (see `kd.methods.lm.common`). Starts from `references.start`,
        if there is one.
      divergence: import path of `d(student_logits, teacher, *, temperature) -> [n]`: one of
        `kd.losses.divergence`, or a function of your own that treats positions independently.
      temperature: T.
      soft_weight: w.
      mean_over: the tokens of the batch, 'token_mean'; or another mode of `kd.losses.aggregate`.
        Its denominators are those of the whole batch, whatever the micro-batches.
      constant: of the mode of this name.
      on_policy: lambda.
      rollout: keywords of `kd.methods.lm.answering.on_policy`: `max_new`, `temperature`, ...; None
        for data that are text.
      blocks: of `references.start`, a deeper decoder, those that the student begins with, one for
        each of its own; () where it is as deep.
      chunk: tokens at a time where logits are not formed whole.
      micro_batches: parts over which gradients are accumulated.
      **divergence_arguments: further keywords of the divergence (`beta` of generalized_jsd, ...).

    Raises:
      UserError: a share of answers without `rollout`, or of text that a teacher has spoken of
        before; and what `answering.on_policy` raises.
    """
    network = context.network
    soft_loss = callables.resolve(divergence)
    callables.check_arguments(soft_loss, divergence_arguments, where=f'method ({divergence})')

    collect = _collect(context, mean_over, constant, on_policy, rollout)

    def of_token(logits, teacher, labels, weight=None):
        losses, aux = plain(logits, teacher, labels)
        if weight is not None:
            losses = jnp.where(weight > 0, weight * losses, 0.0)
        return losses, aux

    def plain(logits, teacher, labels):
        hard = classification.cross_entropy(logits, labels)
        if teacher is None:
            return hard, {'hard_loss': hard}
        soft = outcomes.per_position(
            soft_loss, logits, teacher, temperature=temperature, **divergence_arguments
        )
        losses = soft_weight * soft
        if soft_weight < 1:
            losses += (1.0 - soft_weight) * hard
        return losses, {'hard_loss': hard, 'soft_loss': soft}

    def loss(params, state, batch, key) -> Objective:
        teacher = common.teacher_signal(context, state, batch) if soft_weight else None
        weights = (batch[common.TOKEN_WEIGHT],) if common.TOKEN_WEIGHT in batch else ()
        found = common.token_losses(
            network, state.variables(params=params), batch, of_token,
            teacher=teacher, per_token=weights, key=key, chunk=chunk,
        )  # fmt: skip
        total = mean(found.sums) if weights else mean(found.losses, found.where)
        return Objective(total, found.metrics, found.mutables)

    transform = common.cut(blocks, context) if blocks else None
    init = start.from_reference(network.init, context, transform=transform)
    method = minimize(loss, context.tx, init, micro_batches=micro_batches)
    return with_collect(method, collect) if collect else method


def _collect(context, mean_over, constant, on_policy, rollout):
    """What a batch is enriched by: answers, and weights of tokens; None for nothing."""
    answer = None
    if 'max_new' not in (rollout or {}) and (on_policy or rollout is not None):
        raise UserError(
            f'{context.stage}.method.on_policy={on_policy} needs `rollout`, a block with max_new.'
        )
    if rollout is not None:
        if is_cached(context.spec):
            raise UserError(
                f'{context.stage}.method.rollout: the data bring what a teacher has said of their '
                'own text, and answers are other text; give the stage the teacher and data of '
                'prompts.'
            )
        answer = answering.on_policy(context, share=on_policy, **rollout)
    # Raises where they do not fit, before there is a batch.
    aggregate.weights(np.ones((1, 1), bool), mean_over, constant=constant)
    if answer is None and mean_over == 'token_mean':
        return None

    def collect(state, batch, key):
        batch = answer(state, batch, key) if answer else batch
        if mean_over == 'token_mean':
            return batch
        return common.aggregated(batch, mean_over, constant)

    return collect
