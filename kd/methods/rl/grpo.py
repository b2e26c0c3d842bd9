"""GRPO: policy gradients relative to a group of answers (Shao et al. 2024, arXiv:2402.03300).

With a teacher it is KDRL (arXiv:2506.02208): the same, and a KL to the teacher on the student's own
answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import jax

from kd.context import Context
from kd.errors import UserError
from kd.losses import policy
from kd.losses.aggregate import Mode
from kd.losses.policy import KL, Advantage
from kd.method import Method, Objective, minimize, repeat, with_collect
from kd.methods import start
from kd.methods.rl import common
from kd.metrics import mean
from kd.ranges import Count, Keywords, NonNegative, Positive, Size

# Name of the reference, in a stage's `references`, that the policy is kept near.
REFERENCE = 'reference'


def grpo(
    context: Context,
    *,
    reward: Mapping[str, Any],
    sampling: Annotated[Mapping[str, Any], Keywords(common.Sampling)],
    advantage: Advantage = 'grpo',
    ddof: Literal[0, 1] = 0,
    aggregation: Mode = 'sequence_mean',
    updates: Count = 1,
    parts: Count = 1,
    old: Literal['recomputed', 'sampler'] = 'recomputed',
    low: Positive = 0.2,
    high: Positive = 0.2,
    dual: Positive | None = None,
    cap: Positive | None = None,
    overlong: Size = 0,
    kl_weight: NonNegative = 0.0,
    kl: KL = 'k3',
    teacher_weight: NonNegative = 0.0,
    teacher_kl: KL = 'k2',
    chunk: Count = 256,
    micro_batches: Count = 1,
) -> Method:
    """Answers of the student, G to each prompt, rewarded and compared within their group.

        loss = -min(rho A, clip(rho, 1 - low, 1 + high) A) + kl_weight k3(l - l_ref)
               + teacher_weight k2(l - l_T)

    by token, rho = pi / pi_old, A of the answer. Rollout, verdicts, advantages, scores of teacher
    and reference and all updates are one compiled step; `batch_size` counts prompts. Groups stay
    whole in `parts`, and what is divided by is of the whole batch.

    DAPO (arXiv:2503.14476) is high=0.28, aggregation='token_mean' and `overlong`; Dr. GRPO
    (2503.20783) advantage='dr_grpo' and aggregation='constant'; KDRL a teacher and teacher_weight.
    Groups of equal rewards have an advantage of 0, and get nothing but the KL terms.

    Args:
      context: the stage; a decoder, data in the layout 'prompts', an optimiser. Starts from
        `references.start`, if there is one.
      reward: block of the reward, see `kd.rewards`.
      sampling: keywords of `kd.methods.rl.common.Sampling`.
      advantage, ddof: see `kd.losses.policy.group_advantage`.
      aggregation: see `kd.losses.aggregate.weights`.
      updates, parts: see `kd.method.repeat`. With one update the old policy is the present one.
      old: with several updates, whether the old policy's log-probabilities are 'recomputed' by a
        forward pass or the 'sampler's own, which are the same up to rounding in one type.
      low, high, dual: of the clip, see `kd.losses.policy.clipped_surrogate`.
      cap: weighs tokens by pi_old / pi_sampler cut to this, where both differ in type; None for no
        weights.
      overlong: C of `kd.losses.policy.overlong_penalty`; 0 for none.
      kl_weight, kl: of `references.reference`, see `kd.losses.policy.kl_estimate`. 'k3' as in the
        paper, whose gradient is that of the forward KL.
      teacher_weight, teacher_kl: of the stage's teacher.
      chunk: tokens at a time where logits are not formed whole.
      micro_batches: parts over which gradients are accumulated, and scores computed.
    """
    network, config = context.network, common.Sampling(**sampling)
    asked = _asked(context, kl_weight, teacher_weight)
    networks = {name: context.teacher if name == 'teacher' else context.references[name]
                for name in asked}  # fmt: skip
    draw = common.drawing(context, config, *networks.values())
    recomputed = updates > 1 and old == 'recomputed'
    roll = common.rollouts(
        context, draw, common.of_block(context, reward), group=config.group, advantage=advantage,
        ddof=ddof, aggregation=aggregation, overlong=overlong, recomputed=recomputed, chunk=chunk,
        parts=micro_batches,
    )  # fmt: skip

    def collect(state, batch, key):
        batch = roll(state, batch, key)
        for name, other in networks.items():
            scores = common.score(
                other, state.frozen[name], batch, draw, chunk=chunk, parts=micro_batches
            )
            batch[f'{name}_log_probs'] = scores.log_probs
        return batch

    def of_token(said, advantage, weight, sampled, old=None, reference=None, teacher=None):
        before = jax.lax.stop_gradient(said.log_p) if old is None else old
        ratio = policy.log_ratio(said.log_p, before)
        losses = policy.clipped_surrogate(ratio, advantage, low=low, high=high, dual=dual)
        if cap is not None:
            losses *= policy.importance_cap(before, sampled, cap)
        aux = {'entropy': said.entropy, 'ratio': ratio, 'old': before}
        for name, weight_of, kind, log_p in (
            (REFERENCE, kl_weight, kl, reference),
            ('teacher', teacher_weight, teacher_kl, teacher),
        ):
            if log_p is not None:
                estimate = policy.kl_estimate(said.log_p, log_p, kind)
                losses += weight_of * estimate
                aux[f'kl_to_{name}'] = policy.kl_estimate(said.log_p, log_p, 'k1')
        return weight * losses, aux

    def loss(params, state, batch, key) -> Objective:
        given = {'advantage': batch['advantage'], 'weight': batch['weight']}
        given['sampled'] = batch['sampler_log_probs']
        if updates > 1:
            given['old'] = batch['old_log_probs' if recomputed else 'sampler_log_probs']
        given |= {name: batch[f'{name}_log_probs'] for name in networks}
        found = common.answer_losses(
            network, state.variables(params=params), batch, draw, of_token, per_token=given,
            key=key, chunk=chunk,
        )  # fmt: skip
        aux = dict(found.aux)
        metrics = common.metrics(
            batch, aux.pop('entropy'), aux.pop('ratio'), aux.pop('old'), low=low, high=high,
            cap=cap or 2.0,
        )  # fmt: skip
        metrics |= {name: mean(value, batch['mask']) for name, value in aux.items()}
        return Objective(mean(found.losses.sum(1)), metrics, found.mutables)

    init = start.from_reference(network.init, context)
    one = minimize(loss, context.tx_of(updates), init, micro_batches=micro_batches)
    return with_collect(repeat(one, updates, parts=parts, group=config.group), collect)


def _asked(context: Context, kl_weight: float, teacher_weight: float) -> list[str]:
    """The frozen networks that score answers.

    Raises:
      UserError: a weight without a network.
    """
    asked = []
    if kl_weight:
        if REFERENCE not in context.references:
            raise UserError(
                f"{context.stage}.method.kl_weight={kl_weight} needs a reference of '{REFERENCE}', "
                'the stage to stay near.'
            )
        asked.append(REFERENCE)
    if teacher_weight:
        if context.optional_teacher is None:
            raise UserError(
                f'{context.stage}.method.teacher_weight={teacher_weight} needs a teacher.'
            )
        asked.append('teacher')
    return asked
