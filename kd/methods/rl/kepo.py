"""KEPO: a teacher's law where answers are right, and its hints where none is (arXiv:2602.00400).

Distillation on a policy's own answers teaches little where these went wrong early, and rewards
teach nothing where no answer is right. So a divergence to the teacher counts on rewarded answers
alone, and prompts that nobody solves are opened by hints (`kd.methods.rl.hints`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import jax.numpy as jnp
from jax.typing import ArrayLike

from kd.context import Context
from kd.losses import aggregate, policy
from kd.losses.aggregate import Mode
from kd.losses.policy import KL
from kd.method import Batch, Method
from kd.methods.rl import common, hints, scoring, self_teacher, surrogate
from kd.methods.rl.hints import Hints
from kd.methods.rl.self_teacher import Comparison
from kd.methods.rl.surrogate import REFERENCE, Pull, Surrogate, Term
from kd.metrics import Metrics, mean
from kd.ranges import Count, Finite, Fraction, Keywords, NonNegative
from kd.sampling.environment import Draws

TEACHER = 'teacher'
# The field of `gated`.
GATED = 'gated_weight'


def kepo(
    context: Context,
    *,
    reward: Mapping[str, Any],
    sampling: Annotated[Mapping[str, Any], Keywords(common.Sampling)],
    threshold: Finite | None = 1.0,
    teacher_weight: NonNegative = 1.0,
    beta: Fraction = 0.5,
    hint: Annotated[Mapping[str, Any] | None, Keywords(Hints)] = None,
    correction: bool = False,
    ddof: Literal[0, 1] = 1,
    epsilon: NonNegative = 1e-4,
    aggregation: Mode = 'sequence_mean',
    kl_weight: NonNegative = 0.0,
    kl: KL = 'k3',
    chunk: Count = 256,
    micro_batches: Count = 1,
) -> Method:
    """REINFORCE relative to a group, and a divergence to the teacher on rewarded answers.

        loss = mean_i mean_t -(exp(l - sg[l]) A_i - kl_weight k3(l - l_ref))
               + teacher_weight sum_it g_i D(pi, pi_T)_it / sum_it g_i,     g_i = [R_i >= threshold]

    over the tokens of answers, D the generalised Jensen-Shannon divergence over all tokens, and 0
    where no answer passes. One update on a batch, so that nothing is clipped. Both networks read
    the prompt as it is, also before answers that were given to a prompt with a hint: they count as
    the policy's own, as in the released code, unless `correction` weighs them by
    pi(y | x) / pi(y | x with the hint).

    The released code gates by the sum of two rewards, for the answer and for its form, and lets
    pass what has one of them; here a reward is that of the answer.

    Args:
      context: the stage; as of `kd.methods.rl.grpo.grpo`, with a teacher.
      reward, sampling: as there.
      threshold: of the gate; 0 lets all answers pass, None has no distillation.
      teacher_weight: of the divergence.
      beta: of `kd.losses.divergence.generalized_jsd`, .5 in the released code.
      hint: keywords of `kd.methods.rl.hints.Hints`; None for no hints.
      correction: see above.
      ddof, epsilon: of the standard deviation, see `kd.losses.policy.group_advantage`.
      aggregation: of the first part, see `kd.losses.aggregate.weights`.
      kl_weight, kl: of `references.reference`; 0 in the released code.
      chunk, micro_batches: see `kd.methods.rl.surrogate.Surrogate`.
    """
    config, how = common.Sampling(**sampling), Surrogate(chunk=chunk, micro_batches=micro_batches)
    near = Pull(REFERENCE, kl_weight, kl)
    others = surrogate.networks(context, near)
    draw = common.drawing(context, config, context.teacher, *others.values())
    judge = common.of_block(context, reward)
    if hint is None:
        answer = common.answered(context, draw, judge, group=config.group)
    else:
        answer = hints.opened(context, draw, judge, config, Hints(**hint))
    answer = surrogate.scored(answer, others, draw, how)

    def collect(state, batch, key):
        batch = common.valued(
            answer(state, batch, key), config.group, ddof=ddof, epsilon=epsilon,
            aggregation=aggregation,
        )  # fmt: skip
        if correction and hint is not None:
            own = scoring.score(
                context.network, state.variables(), batch, draw, chunk=chunk, parts=micro_batches
            )
            batch['weight'] *= hints.corrected(batch, own.log_probs)[:, None]
        return batch if threshold is None else gated(batch, threshold)

    weight = 0.0 if threshold is None else teacher_weight
    return learner(
        context, draw, collect, group=config.group, how=how, weight=weight, beta=beta,
        pulls=[near], fields=[surrogate.field_of(name) for name in others],
    )  # fmt: skip


def gated(batch: Batch, threshold: ArrayLike) -> Batch:
    """The batch with `gate` bool [B], rewards of at least the threshold, and the weights [B, R] of
    a mean over the tokens of these answers."""
    passes = batch['rewards'] >= threshold
    weights = aggregate.weights(batch['mask'] & passes[:, None], 'token_mean')
    return {**batch, 'gate': passes, GATED: weights}


def learner(
    context: Context,
    draw: Draws,
    collect: common.Collect,
    *,
    group: Count,
    how: Surrogate,
    weight: NonNegative,
    beta: Fraction,
    pulls: Sequence[Pull] = (),
    fields: Sequence[str] = (),
) -> Method:
    """The loss of `kepo` on batches that `collect` has gated, unless `weight` is 0."""
    compare = self_teacher.comparison(
        draw, Comparison('kd.losses.divergence.generalized_jsd', {'beta': beta})
    )

    def term(said, old, given):
        added, aux = surrogate.pulled(said, given, *pulls)
        apart = jnp.zeros_like(said.log_p)
        if weight:
            distance = compare(said)
            apart, aux = weight * given[GATED] * distance, {**aux, 'to_teacher': distance}
        return Term(policy.log_ratio(said.log_p, old), added, apart, aux)

    def teacher(state, batch):
        return scoring.hidden(context.teacher, state.frozen[TEACHER], batch)

    def further(batch: Batch) -> Metrics:
        known = ('gate', 'injected', 'unsolved')
        return {name: mean(batch[name]) for name in known if name in batch}

    return surrogate.method(
        context, draw, collect, term, group=group, how=how,
        fields=[*fields, *([GATED] if weight else [])],
        teacher=teacher if weight else None, further=further,
    )  # fmt: skip
