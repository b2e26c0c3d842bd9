"""RLAD: the teacher stands in the ratio of GRPO (2026, arXiv:2602.22495).

What is clipped is how far the policy has gone from a mixture of its old self and the teacher, so
that a teacher is imitated where rewards say something, and within the trust region: no term of its
own, and no weight to be found for one.
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
from kd.ranges import Count, Fraction, Keywords, NonNegative, Positive, Size

TEACHER = 'teacher'


def rlad(
    context: Context,
    *,
    reward: Mapping[str, Any],
    sampling: Annotated[Mapping[str, Any], Keywords(common.Sampling)],
    alpha: Fraction = 0.5,
    clamp: Positive = 1.0,
    clamp_gradient: Literal['literal', 'straight'] = 'literal',
    advantage: Advantage = 'grpo',
    ddof: Literal[0, 1] = 0,
    aggregation: Mode = 'sequence_mean',
    drop_dead: bool = False,
    updates: Count = 1,
    parts: Count = 1,
    old: Literal['recomputed', 'sampler'] = 'recomputed',
    low: Positive = 0.2,
    high: Positive = 0.28,
    cap: Positive | None = None,
    overlong: Size = 0,
    kl_weight: NonNegative = 0.0,
    kl: KL = 'k3',
    chunk: Count = 256,
    micro_batches: Count = 1,
) -> Method:
    """GRPO whose ratio is to a geometric mixture of the old policy and the teacher.

        loss = -min(r A, clip(r, 1 - low, 1 + high) A) + kl_weight k3(l - l_ref)
        log r = alpha (l - l_old) + (1 - alpha) clip(l - l_T, -clamp, clamp)

    by token, A of the answer. A > 0: a token that the teacher thinks likelier than the student has
    room to grow, l < alpha l_old + (1 - alpha) l_T + log(1 + high), and one that it does not is
    left alone. A < 0: the other way round. A = 0 (a group of equal rewards): nothing, whatever the
    teacher says. r is not 1 on fresh answers, and `clip_fraction` is large from the first step on.

    Args:
      context: the stage; as of `kd.methods.rl.grpo.grpo`, with a teacher.
      reward, sampling: as there.
      alpha: share of the old policy; 1 is GRPO.
      clamp, clamp_gradient: of the teacher's branch, see `kd.losses.policy.anchored_log_ratio`.
      advantage, ddof, aggregation, drop_dead, overlong, kl_weight, kl: see
        `kd.methods.rl.grpo.grpo`. The paper has a KL to a reference, and gives no weight.
      updates, parts, old, low, high, cap, chunk, micro_batches: see
        `kd.methods.rl.surrogate.Surrogate`.

    Source: RLAD, arXiv 2602.22495, equations 3-5.
    """
    config = common.Sampling(**sampling)
    how = Surrogate(updates, parts, old, low, high, None, cap, chunk, micro_batches)
    near = Pull(REFERENCE, kl_weight, kl)
    others = {TEACHER: context.teacher, **surrogate.networks(context, near)}
    draw = common.drawing(context, config, *others.values())
    roll = common.rollouts(
        context, draw, common.of_block(context, reward), group=config.group, advantage=advantage,
        ddof=ddof, aggregation=aggregation, drop_dead=drop_dead, overlong=overlong,
        recomputed=how.recomputed, chunk=chunk, parts=micro_batches,
    )  # fmt: skip

    def term(said, old, given):
        ratio = policy.anchored_log_ratio(
            said.log_p, old, given[surrogate.field_of(TEACHER)], alpha, clamp=clamp,
            clamp_gradient=clamp_gradient,
        )  # fmt: skip
        added, aux = surrogate.pulled(said, given, near, Pull(TEACHER, 0.0, 'k1'))
        return Term(ratio, added, aux=aux)

    return surrogate.method(
        context, draw, surrogate.scored(roll, others, draw, how), term, group=config.group,
        how=how, fields=[surrogate.field_of(name) for name in others],
    )  # fmt: skip
