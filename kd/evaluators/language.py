"""How well does a language model predict a text, and how close is it to its teacher?"""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax.numpy as jnp

from kd.context import Context, Evaluator
from kd.evaluators.agreement import entropy, top_1_agreement
from kd.losses import classification, divergence, signal
from kd.losses.signal import Dense, HiddenHead, TeacherSignal
from kd.method import Batch
from kd.methods.lm import answering, common
from kd.metrics import Mean, divide, mean
from kd.network import Network
from kd.ranges import Count
from kd.state import PyTree


def language(context: Context, *, weights: str = 'final', chunk: Count = 256) -> Evaluator:
    """`token_metrics` of the stage's network, against its teacher if it has one.

    Prompts with a `response` are text of which the response counts.

    Args:
      context: the stage.
      weights: 'final' for the parameters, or the name of an average.
      chunk: tokens at a time where logits are not formed whole.
    """
    network, compare = context.network, context.optional_teacher is not None

    def update(state, batch) -> dict[str, Mean]:
        batch = answering.as_text(batch)
        variables = state.variables(None if weights == 'final' else weights)
        teacher = common.teacher_signal(context, state, batch) if compare else None
        return token_metrics(network, variables, batch, teacher=teacher, chunk=chunk)

    return Evaluator(update, finish)


def token_metrics(
    network: Network,
    variables: PyTree,
    batch: Batch,
    *,
    teacher: TeacherSignal | None = None,
    chunk: int = 256,
) -> dict[str, Mean]:
    """Sums over the tokens of a batch that count, see `kd.methods.lm.common`.

    nll, nats; accuracy, of the most probable token; probability, of the token, which is how often
    it would be drawn; entropy, nats; against a teacher top_1, how
    often both have the same most probable token, and kl, KL(teacher || student).

    Args:
      network, variables: of the student.
      batch: a bool [B] `mask` takes examples out.
      teacher: what it says of each position; one without whole logits is not compared.
      chunk: tokens at a time where logits are not formed whole.
    """
    compare = isinstance(teacher, Dense | HiddenHead)

    def of_token(logits, teacher, labels):
        values = {
            'nll': classification.cross_entropy(logits, labels),
            'accuracy': (logits.argmax(-1) == labels).astype(jnp.float32),
            'entropy': entropy(logits),
        }
        values['probability'] = jnp.exp(-values['nll'])
        if compare:
            said = signal.all_logits('language', teacher)
            values['top_1'] = top_1_agreement(logits, said)
            values['kl'] = divergence.forward_kl(logits, said)
        return values['nll'], values

    found = common.token_losses(
        network, variables, batch, of_token, teacher=teacher if compare else None, chunk=chunk,
        train=False,
    )  # fmt: skip
    where = common.examples_only(found.where, batch)
    return {name: mean(value, where) for name, value in found.aux.items()}


def finish(sums: Mapping[str, Mean]) -> dict[str, float]:
    """Means, and the perplexity exp(nll)."""
    means = divide(dict(sums))
    if 'nll' in means:
        means['perplexity'] = math.exp(min(means['nll'], 700.0))
    return means
