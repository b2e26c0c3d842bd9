"""SODA: a student learns a teacher's answers against its own first ones (2026, arXiv:2604.03873).

Of the teacher there is text alone. A student q_0 answers every prompt once, before any training; it
is fine-tuned on the teacher's text to q_w; then DPO prefers the teacher's answer to that of q_0,
with q_w as start and as reference. Taking the two for each other would be another method: answers
of q_w are those of iterated DPO.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kd.context import Context
from kd.errors import UserError
from kd.method import Batch, Method, with_collect
from kd.methods.lm.preference import preference
from kd.methods.lm.sequence_kd import answers
from kd.ranges import Count, Positive, Seed

# The reference whose answers are rejected, where the data are no pairs.
INITIAL = 'initial'


def soda(
    context: Context,
    *,
    beta: Positive = 0.1,
    seed: Seed = 0,
    chunk: Count = 256,
    micro_batches: Count = 1,
) -> Method:
    """DPO of the teacher's answer y+ against the initial student's y-.

        loss = -log sigma(beta [S(y+) - S_w(y+)] - beta [S(y-) - S_w(y-)])

    with S the sum of log-probabilities over an answer, its end included, under the student, and S_w
    under `references.reference`, the fine-tuned student that the stage starts from.

    Text comes in pairs (`kd.data.generated.pairs`). An answer of one token comes alone, `input`
    [B, n] and `label` int [B] of the teacher; y- is then drawn from `references.initial` by the
    example's `index`: the same at every pass, and in every run of one `seed`.

    Args:
      context: the stage; as of `kd.methods.lm.preference.preference`.
      beta: how closely the reference is held to; ours, as the paper's is not known.
      seed: of the draws of y-, apart from the run's.
      chunk, micro_batches: see `kd.methods.lm.preference.preference`.

    Source: SODA, arXiv 2604.03873, eqs. 3-5.
    """
    method = preference(
        context, loss='kd.losses.preference_family.dpo', beta=beta, chunk=chunk,
        micro_batches=micro_batches, distinct=True,
    )  # fmt: skip
    if INITIAL not in context.references:
        return method

    def collect(state, batch, key):
        del key  # Another one at every step.
        return with_own_answers(context, state, batch, jax.random.key(seed))

    return with_collect(method, collect, name='own answers')


def with_own_answers(context: Context, state, batch: Batch, key: jax.Array) -> Batch:
    """Pairs of the answers in a batch, first, and the initial student's, of one token each."""
    student = context.references[INITIAL]
    inputs = {name: batch[name] for name in student.fields}
    if batch['label'].ndim != 1:
        raise UserError(
            f'{context.stage}.references.{INITIAL} gives answers of one token, and the data have '
            f'labels of shape {list(batch["label"].shape)}; longer ones come in pairs, see '
            'kd.data.generated.pairs.'
        )
    logits = student.apply(state.frozen[INITIAL], *student.of(batch)).logits
    own = answers(key, batch['index'], logits)
    twice = {name: jnp.stack([x, x], axis=1) for name, x in inputs.items()}
    label = jnp.stack([batch['label'], own.astype(batch['label'].dtype)], axis=1)
    return {**batch, **twice, 'label': label}
