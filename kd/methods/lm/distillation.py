"""Distillation of a language model token by token, from its hidden states.

The common form of word-level distillation (Hinton et al. 2015, arXiv:1503.02531; Kim and Rush 2016,
arXiv:1606.07947), with any divergence: forward and reverse KL, the generalised Jensen-Shannon of
GKD (arXiv:2306.13649), the skewed ones of DistiLLM (arXiv:2402.03898).
"""

from __future__ import annotations

from kd import config as config_lib
from kd.context import Context
from kd.losses import classification, outcomes
from kd.method import Method, Objective, minimize
from kd.methods import start
from kd.methods.lm import common
from kd.metrics import mean
from kd.ranges import Count, Fraction, Positive, Size


def distillation(
    context: Context,
    *,
    divergence: str = 'kd.losses.divergence.forward_kl',
    temperature: Positive = 1.0,
    soft_weight: Fraction = 1.0,
    blocks: tuple[Size, ...] = (),
    chunk: Count = 256,
    micro_batches: Count = 1,
    **divergence_arguments,
) -> Method:
    """A divergence to the teacher and the cross-entropy with the text, averaged over tokens.

        loss = (1 - w) CE(y, q) + w D(q, p; T)      over the tokens of the batch that count

    Without a factor T^2, as papers on language models have it. With w = 0 no teacher is needed, and
    this is fine-tuning. A decoder's logits are formed `chunk` tokens at a time.

    Args:
      context: the stage; needs a network, an optimiser, and a teacher or what one has said in the
        batch; labels, or packed text (see `kd.methods.lm.common`). Starts from `references.start`,
        if there is one.
      divergence: import path of `d(student_logits, teacher, *, temperature) -> [n]`: one of
        `kd.losses.divergence`, or a function of your own that treats positions independently.
      temperature: T.
      soft_weight: w.
      blocks: of `references.start`, a deeper decoder, those that the student begins with, one for
        each of its own; () where it is as deep.
      chunk: tokens at a time where logits are not formed whole.
      micro_batches: parts over which gradients are accumulated.
      **divergence_arguments: further keywords of the divergence (`beta` of generalized_jsd, ...).
    """
    network = context.network
    soft_loss = config_lib.resolve(divergence)
    config_lib.check_arguments(soft_loss, divergence_arguments, where=f'method ({divergence})')

    def of_token(logits, teacher, labels):
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
        found = common.token_losses(
            network, state.variables(params=params), batch, of_token,
            teacher=teacher, key=key, chunk=chunk,
        )  # fmt: skip
        metrics = {name: mean(value, found.where) for name, value in found.aux.items()}
        return Objective(mean(found.losses, found.where), metrics, found.mutables)

    transform = common.cut(blocks, context) if blocks else None
    init = start.from_reference(network.init, context, transform=transform)
    return minimize(loss, context.tx, init, micro_batches=micro_batches)
