"""GRPO: policy gradients relative to a group of answers (Shao et al. 2024, arXiv:2402.03300).

With a teacher it is KDRL (arXiv:2506.02208): the same, and a KL to the teacher on the student's own
answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from kd.context import Context
from kd.losses import policy
from kd.losses.aggregate import Mode
from kd.losses.policy import KL, Advantage
from kd.method import Method
from kd.methods.rl import common, surrogate
from kd.methods.rl.surrogate import REFERENCE, Pull, Surrogate, Term
from kd.ranges import Count, Keywords, NonNegative, Positive, Size


def grpo(
    context: Context,
    *,
    reward: Mapping[str, Any],
    sampling: Annotated[Mapping[str, Any], Keywords(common.Sampling)],
    advantage: Advantage = 'grpo',
    ddof: Literal[0, 1] = 0,
    aggregation: Mode = 'sequence_mean',
    drop_dead: bool = False,
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
      drop_dead: leave answers of groups with equal rewards out of what is averaged over: DAPO's
        dynamic sampling, without sampling others in their place.
      updates, parts, old, low, high, dual, cap, chunk, micro_batches: see
        `kd.methods.rl.surrogate.Surrogate`.
      overlong: C of `kd.losses.policy.overlong_penalty`; 0 for none.
      kl_weight, kl: of `references.reference`, see `kd.losses.policy.kl_estimate`. 'k3' as in the
        paper, whose gradient is that of the forward KL.
      teacher_weight, teacher_kl: of the stage's teacher.
    """
    config = common.Sampling(**sampling)
    how = Surrogate(updates, parts, old, low, high, dual, cap, chunk, micro_batches)
    pulls = Pull(REFERENCE, kl_weight, kl), Pull('teacher', teacher_weight, teacher_kl)
    others = surrogate.networks(context, *pulls)
    draw = common.drawing(context, config, *others.values())
    roll = common.rollouts(
        context, draw, common.of_block(context, reward), group=config.group, advantage=advantage,
        ddof=ddof, aggregation=aggregation, drop_dead=drop_dead, overlong=overlong,
        recomputed=how.recomputed, chunk=chunk, parts=micro_batches,
    )  # fmt: skip

    def term(said, old, given):
        added, aux = surrogate.pulled(said, given, *pulls)
        return Term(policy.log_ratio(said.log_p, old), added, aux=aux)

    return surrogate.method(
        context, draw, surrogate.scored(roll, others, draw, how), term, group=config.group,
        how=how, fields=[surrogate.field_of(name) for name in others],
    )  # fmt: skip
