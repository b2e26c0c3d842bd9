"""TSD-KD: the student explains in its own words, and a teacher ranks, gates and sharpens them
(2026, arXiv:2603.13260).

On the student's own answers. Directly, a Jensen-Shannon divergence, weighted by how much less
certain the student is than the teacher. Indirectly, in the opener of an answer, the teacher ranks
the tokens that the student would go on with. And where the student is least certain, its entropy
is lowered.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp

from kd.context import Context
from kd.losses import aggregate, divergence, signal, token
from kd.method import Method, Objective, minimize, with_collect
from kd.methods import start
from kd.methods.lm import answering, common
from kd.metrics import mean
from kd.ranges import Count, Fraction, Keywords, NonNegative, Positive

# Weights of the tokens in the three terms, fields of a batch.
DIRECT, OPENER, UNCERTAIN = 'direct_weight', 'opener_weight', 'uncertain_weight'

_Rollout = Annotated[Mapping[str, Any] | None, Keywords(answering.on_policy, ('context',))]


def tsd_kd(
    context: Context,
    *,
    beta: Fraction = 0.9,
    gate: bool = True,
    gate_temperature: Positive = 1.0,
    ranking_weight: NonNegative = 0.1,
    ranking: Literal['teacher', 'reversed'] = 'teacher',
    candidates: Count = 10,
    opener: Fraction = 0.1,
    entropy_weight: NonNegative = 1.0,
    uncertain: Fraction = 0.1,
    rollout: _Rollout = None,
    chunk: Count = 256,
    micro_batches: Count = 1,
) -> Method:
    """Distils what the student says by the tokens that matter.

        loss = mean_t sg[sigma((H_q - H_p) / temperature)] GJSD_beta(p, q)
             + ranking_weight mean_{t in opener} ListMLE(z_q, order of z_p)
             + entropy_weight mean_{t in uncertain} H_q

    with q the student, p the teacher, and means over the tokens of the whole batch that count. The
    opener of an answer is its shortest start with the share `opener` of its entropy; uncertain are
    the tokens of the batch whose entropy is in its upper share `uncertain`. Both are of the student
    before the step, and constants. GJSD is beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p
    + (1 - beta) q: .9 is the weight of the teacher (`lam` .1 of DistiLLM, alpha .9 of SDPO).

    Without a gate and with both weights 0 this is GKD (arXiv:2306.13649).

    Args:
      context: the stage; needs a network, an optimiser and a teacher, or `teacher_logits` in the
        batch. Starts from `references.start`, if there is one.
      beta: see above.
      gate: False weighs all tokens alike, by 1.
      gate_temperature: of the gate, nats.
      ranking_weight, entropy_weight: see above. What is ranked are logits, which are free in scale:
        choose the weight so that both gradients are of one size at the start.
      ranking: 'reversed' ranks against the teacher, as the released code's sum over prefixes does.
      candidates: how many of the student's best tokens are ranked.
      opener, uncertain: shares. (The released code takes the most certain 10 % out, so .9.)
      rollout: keywords of `kd.methods.lm.answering.on_policy`, by which answers are sampled; None
        learns from the text in the batch.
      chunk: tokens at a time where logits are not formed whole.
      micro_batches: parts over which gradients are accumulated.
    """
    network = context.network
    sample = answering.on_policy(context, **rollout) if rollout is not None else None

    def collect(state, batch, key):
        if sample is not None:
            batch = sample(state, batch, key)
        entropies = common.token_losses(
            network, state.variables(), batch, _entropy, chunk=chunk, train=False
        )
        return {**batch, **token_weights(entropies.losses, entropies.where, opener, uncertain)}

    def of_token(logits, teacher, labels, direct, opened, unsure):
        del labels
        said = signal.all_logits('tsd_kd', teacher)
        own = token.entropy(logits)
        weight = jnp.ones_like(own)
        if gate:
            weight = token.confidence_gate(own, token.entropy(said), gate_temperature)
        soft = weight * divergence.generalized_jsd(logits, said, beta=beta)
        ranked = jnp.zeros_like(own)
        if ranking_weight:
            sign = 1 if ranking == 'teacher' else -1
            ranked = jax.lax.cond(
                (opened > 0).any(),
                lambda: token.list_mle(logits, sign * said, candidates),
                lambda: jnp.zeros_like(own),
            )
        loss = direct * soft + ranking_weight * opened * ranked + entropy_weight * unsure * own
        return loss, {'direct': soft, 'ranking': ranked, 'entropy': own, 'gate': weight}

    def loss(params, state, batch, key) -> Objective:
        weights = tuple(batch[name] for name in (DIRECT, OPENER, UNCERTAIN))
        found = common.token_losses(
            network, state.variables(params=params), batch, of_token,
            teacher=common.teacher_signal(context, state, batch), per_token=weights, key=key,
            chunk=chunk,
        )  # fmt: skip
        # The weights hold what is divided by.
        metrics = dict(found.metrics)
        metrics['ranking'] = mean(found.aux['ranking'], batch[OPENER] > 0)
        metrics['uncertain'] = mean(found.aux['entropy'], batch[UNCERTAIN] > 0)
        metrics['length'] = mean(found.where.reshape(len(found.where), -1).sum(-1))
        return Objective(mean(found.sums), metrics, found.mutables)

    init = start.from_reference(network.init, context)
    return with_collect(minimize(loss, context.tx, init, micro_batches=micro_batches), collect)


def token_weights(
    entropies: jax.Array, where: jax.Array, opener: float, uncertain: float
) -> dict[str, jax.Array]:
    """What each token weighs in the three terms: the mean over rows of sum_t w_t l_t is a term.

    Args:
      entropies: of the student, [B] or [B, T].
      where: bool of the same shape, the tokens that count.
      opener, uncertain: shares.

    Returns:
      Arrays of the same shape, of a whole batch: from a part of it they would be others.
    """
    rows = entropies.reshape(len(entropies), -1)
    counted = where.reshape(rows.shape)
    masks = {
        DIRECT: counted,
        OPENER: token.opener_mask(rows, counted, opener),
        UNCERTAIN: token.top_fraction_mask(rows, counted, uncertain),
    }
    return {
        name: aggregate.weights(mask, 'token_mean').reshape(where.shape)
        for name, mask in masks.items()
    }


def _entropy(logits, teacher, labels):
    del teacher, labels
    return token.entropy(logits), {}
