"""Self-Distillation Zero: a model learns from its own revisions (2026, arXiv:2604.12002).

There is no teacher and no demonstration, only verdicts of 0 and 1. Phase 1, `srt`: the model
revises answers of its own, told whether they were right, and is fine-tuned on the revisions that
are (`kd.data.revisions`). Phase 2, `sd_zero`: it answers anew, and learns from a frozen copy of
itself that reads the same answer a second time, after the first and its verdict.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from kd.context import Context
from kd.errors import UserError
from kd.losses import aggregate, classification
from kd.method import Batch, Method, Objective, minimize, with_collect
from kd.methods import start
from kd.methods.lm import common as lm
from kd.methods.rl import common, scoring, self_teacher, watched
from kd.methods.rl.self_teacher import Comparison, Piece
from kd.metrics import Metrics, mean
from kd.ranges import Count, Keywords, NonNegative
from kd.text.packing import targets
from kd.text.revision import Around, Cues


def srt(
    context: Context,
    *,
    revision_weight: NonNegative = 1.0,
    generation_weight: NonNegative = 1.0,
    chunk: Count = 256,
    micro_batches: Count = 1,
) -> Method:
    """Self-revision training, phase 1: both losses of every record.

        loss = revision_weight E -log pi(y' | x, y, verdict) + generation_weight E -log pi(z | x)

    each a mean over its own tokens of the batch; z is all that stands behind x or y' alone, see
    `kd.data.revisions.records`, whose layout the batch has. The official code trains twice instead
    of on the sum: two stages with weights (0, 1) and (1, 0).

    Args:
      context: the stage; a network, an optimiser and records. Starts from `references.start`, if
        there is one.
      revision_weight, generation_weight: see above.
      chunk: tokens at a time where logits are not formed whole.
      micro_batches: parts over which gradients are accumulated.
    """
    network, of_both = context.network, (revision_weight, generation_weight)
    if len(context.spec[network.fields[0]].shape) != 2:
        raise UserError(
            f'{context.stage}: srt learns from records of revisions, each in two rows; see '
            'kd.data.revisions.records.'
        )

    def collect(state, batch, key):
        del state, key
        where = targets(batch)[1]
        weights = [w * aggregate.weights(where[:, i], 'token_mean') for i, w in enumerate(of_both)]
        return {**batch, lm.TOKEN_WEIGHT: jnp.stack(weights, axis=1)}

    def of_token(logits, teacher, labels, weight):
        del teacher
        losses = classification.cross_entropy(logits, labels)
        return weight * losses, losses

    def loss(params, state, batch, key) -> Objective:
        rows = lm.rows(network, batch)
        found = lm.token_losses(
            network, state.variables(params=params), rows, of_token,
            per_token=(rows[lm.TOKEN_WEIGHT],), key=key, chunk=chunk,
        )  # fmt: skip
        metrics = {
            name: mean(found.aux[i::2], found.where[i::2])
            for i, name in enumerate(('revision_loss', 'generation_loss'))
        }
        return Objective(mean(found.sums.reshape(-1, 2).sum(1)), metrics, found.mutables)

    init = start.from_reference(network.init, context)
    method = minimize(loss, context.tx, init, micro_batches=micro_batches)
    return with_collect(method, collect)


def sd_zero(
    context: Context,
    *,
    reward: Mapping[str, Any],
    sampling: Annotated[Mapping[str, Any], Keywords(common.Sampling)],
    cues: Annotated[Mapping[str, Any], Keywords(Cues)],
    comparison: Annotated[Mapping[str, Any], Keywords(Comparison)] | None = None,
    aggregation: aggregate.Mode = 'token_mean',
    located: str = '',
    chunk: Count = 256,
    micro_batches: Count = 1,
) -> Method:
    """On-policy self-distillation, phase 2, for y drawn from the policy and r its verdict.

        loss = sum_t D(pi(. | x, y_<t), pi_T(. | x, y, cue_r, y_<t))

    pi_T is the stage's teacher, a copy of the policy as it was at the start, which goes on to say y
    once more. No reward enters but by the cue: a batch of wrong answers teaches as well. Nothing
    flows through the sampling, nor to the teacher. An answer without a verdict has no weight.

    D is the reverse KL over all tokens, KL(pi, pi_T), as the paper writes it; the released code has
    (1 - w) KL(pi, pi_T) + w KL(pi_T, pi) between both laws on the teacher's 64 favourites, each
    made to sum to 1: comparison=dict(divergence='kd.losses.divergence.mixed_kl',
    arguments=dict(weight=.5), top_k=64, favourites='teacher', rest='renormalised').

    A teacher that is to follow the policy now and then is a later stage, whose teacher and start
    are this one.

    Args:
      context: the stage; a decoder, its teacher, data in the layout 'prompts', an optimiser. Starts
        from `references.start`, if there is one: the teacher.
      reward: block of the reward, see `kd.rewards`; right from .5 on.
      sampling: keywords of `kd.methods.rl.common.Sampling`; the paper has one answer to a prompt.
      cues: keywords of `kd.text.revision.Cues`, as those that the teacher has learned to revise by.
        Answers are quoted without the token that ends them (ours: the released code leaves it in).
      comparison: keywords of `kd.methods.rl.self_teacher.Comparison`.
      aggregation: see `kd.losses.aggregate.weights`.
      located: field of the data with right answers of the same form, int [B, n]: see
        `localisation`; '' for none.
      chunk: tokens at a time where logits are not formed whole.
      micro_batches: parts over which gradients are accumulated.
    """
    network, teacher, config = context.network, context.teacher, common.Sampling(**sampling)
    draw = common.drawing(context, config, teacher)
    answer = common.answered(context, draw, common.of_block(context, reward), group=config.group)
    compare = self_teacher.comparison(draw, Comparison(**(comparison or {})))
    again = read_again(context, cues)
    constant = float(draw.max_new) if aggregation == 'constant' else None
    if located and located not in context.spec:
        raise UserError(f"{context.stage}.method.located: the data have no '{located}'.")

    def collect(state, batch, key):
        batch = answer(state, batch, key)
        judged = batch['mask'] & ~batch['unjudged'][:, None]
        batch['weight'] = aggregate.weights(judged, aggregation, constant=constant)
        return batch

    def of_token(said, weight):
        distance = compare(said)
        return weight * distance, (distance, said.entropy)

    def loss(params, state, batch, key) -> Objective:
        found = scoring.answer_losses(
            network, state.variables(params=params), batch, draw, of_token,
            per_token={'weight': batch['weight']}, key=key, chunk=chunk,
            teacher=scoring.hidden(teacher, state.frozen['teacher'], again(batch)),
        )  # fmt: skip
        distance, entropy = found.aux
        metrics = watched.metrics(batch, entropy)
        metrics |= localisation(distance, batch, batch[located] if located else None)
        return Objective(mean(found.losses.sum(1)), metrics, found.mutables)

    init = start.from_reference(network.init, context)
    method = minimize(loss, context.tx, init, micro_batches=micro_batches)
    return with_collect(method, collect)


def read_again(context: Context, cues: Mapping[str, Any]) -> Callable[[Batch], Batch]:
    """`again(batch) -> batch`: answers after prompts that show them and tell their verdict."""
    said = Cues(**cues)
    texts = any(isinstance(words, str) for both in (said.right, said.wrong) for words in both)
    taken = getattr(context.source('train'), 'tokenizer', None) if texts else None
    around = said.around(taken)

    def again(batch: Batch) -> Batch:
        right = batch['rewards'] >= 0.5
        opening, closing = (_either(right, around, place) for place in (0, 1))
        pieces = opening, self_teacher.without_end(batch), closing
        return self_teacher.with_block(batch, *pieces, after=said.after)

    return again


def _either(right: jax.Array, around: tuple[Around, Around], place: int) -> Piece:
    """What stands on one side of wrong or of right answers, [B, n]."""
    both = [one[place] for one in around]
    width = max(map(len, both))
    tokens = np.stack([np.pad(one, (0, width - len(one))) for one in both])
    there = np.stack([np.arange(width) < len(one) for one in both])
    which = right.astype(jnp.int32)
    return jnp.asarray(tokens)[which], jnp.asarray(there)[which]


def localisation(distance: jax.Array, batch: Batch, answer: jax.Array | None = None) -> Metrics:
    """Where the teacher disagrees: means of the divergence over tokens, nats.

    | metric | over tokens of |
    |---|---|
    | `divergence`, `divergence_right`, `divergence_wrong` | answers; right ones; wrong ones |
    | `divergence_at_error` | wrong ones: the first that is not that of a right answer |
    | `divergence_elsewhere` | wrong ones: all but this |

    The paper's localisation is the ratio of the last two.

    Args:
      distance: [B, R].
      batch: `tokens`, `mask` [B, R] and `rewards` [B].
      answer: int [B, n], a right answer of the same form; None leaves the last two out.
    """
    where, right = jnp.asarray(batch['mask'], bool), (batch['rewards'] >= 0.5)[:, None]
    found = {
        'divergence': mean(distance, where),
        'divergence_right': mean(distance, where & right),
        'divergence_wrong': mean(distance, where & ~right),
    }
    if answer is not None:
        length = where.shape[1]
        # Beyond a right answer that is shorter every token is another.
        room = max(length - answer.shape[1], 0)
        wanted = jnp.pad(answer, ((0, 0), (0, room)), constant_values=-1)[:, :length]
        differs = where & (batch['tokens'] != wanted)
        first = differs & (jnp.cumsum(differs, axis=1) == 1) & ~right
        found['divergence_at_error'] = mean(distance, first)
        found['divergence_elsewhere'] = mean(distance, where & ~right & ~first)
    return jax.lax.stop_gradient(found)
