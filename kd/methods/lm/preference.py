"""Training on pairs of answers, the preferred one first, by a loss of their log-probabilities.

What SODA (arXiv:2604.03873), REDI (arXiv:2505.24850), DPO (arXiv:2305.18290) and SimPO
(arXiv:2405.14734) share: a sum of log-probabilities and a count of tokens for each answer of a
pair, `kd.losses.preference_family`, and sometimes a reference that the sums are compared with.
"""

from __future__ import annotations

import inspect
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kd import callables
from kd.context import Context
from kd.data.transforms.anchored import ANCHOR
from kd.errors import UserError
from kd.losses import classification, preference_family, sequence
from kd.method import Batch, Method, Objective, minimize, with_collect
from kd.methods import start
from kd.methods.lm import common
from kd.metrics import Mean, mean
from kd.network import Network, output_shape
from kd.ranges import Count, NonNegative
from kd.state import PyTree

# The reference that log-probabilities are compared with.
REFERENCE = 'reference'
# What a loss may take of a pair; the rest are its options.
BASELINE = 'baseline'
_OF_PAIR = ('log_p', 'counts', ANCHOR, BASELINE)


class Scored(NamedTuple):
    """What a network says of pairs of answers.

    Attributes:
      log_p: float32 [B, 2], sums of log-probabilities over the tokens of an answer, nats.
      counts: float32 [B, 2], how many tokens these are.
      mutables: of the network.
      routers: of its experts, see `kd.methods.lm.common.TokenLosses`; of 2 B rows.
    """

    log_p: jax.Array
    counts: jax.Array
    mutables: PyTree
    routers: tuple[jax.Array, ...] = ()

    @property
    def means(self) -> jax.Array:
        """[B, 2] by token; 0 for an answer without any."""
        return self.log_p / jnp.maximum(self.counts, 1)


def score(
    network: Network,
    variables: PyTree,
    batch: Batch,
    *,
    key: jax.Array | None = None,
    chunk: int = 256,
    train: bool = False,
    outcomes: int | None = None,
) -> Scored:
    """Log-probabilities of both answers of every pair, in one pass and without whole logits.

    Args:
      network, variables: who is asked.
      batch: fields [B, 2, ...] as of `kd.data.text.preferences`, the preferred answer first; or
        `input` [B, 2, n] and `label` int [B, 2], answers of one token.
      key: for dropout.
      chunk: tokens at a time where logits are not formed whole.
      train: whether the network is in training mode.
      outcomes: tokens that there are, of a vocabulary that is padded further; None for all.

    Raises:
      UserError: a batch that is not in pairs.
    """
    pairs = batch[network.fields[0]].shape
    if len(pairs) != len(network.inputs[0].shape) + 1 or pairs[1] != 2:
        raise UserError(
            f'a preference is of pairs: {network.fields[0]} [B, 2, ...], the preferred answer '
            f'first, and not of shape {list(pairs)}; see kd.data.text.preferences.'
        )

    def surprise(logits, teacher, labels):
        del teacher
        return classification.cross_entropy(logits[..., :outcomes], labels), ()

    found = common.token_losses(
        network, variables, common.rows(network, batch), surprise, key=key, chunk=chunk, train=train
    )
    by_answer = (pairs[0], 2, -1)
    log_p, counts = sequence.sequence_log_probs(
        -found.losses.reshape(by_answer), found.where.reshape(by_answer)
    )
    return Scored(log_p, counts, found.mutables, found.routers)


def preference(
    context: Context,
    *,
    loss: str = 'kd.losses.preference_family.redi',
    chunk: Count = 256,
    micro_batches: Count = 1,
    distinct: bool = False,
    balance: NonNegative = 0.0,
    trainable: str = '',
    **loss_arguments,
) -> Method:
    """A loss of the log-probabilities of both answers, averaged over pairs.

    REDI is `redi` on pairs of a right and a wrong answer of the teacher, after fine-tuning on the
    right ones; its rate is about a fiftieth of fine-tuning's. For SODA see `kd.methods.lm.soda`.

    Args:
      context: the stage; needs a network, an optimiser and pairs (see `score`). Starts from
        `references.start`, if there is one. A loss that takes `anchor_log_p` needs
        `references.reference`, or data that bring what it has said
        (`kd.data.transforms.anchored`).
      loss: import path of `loss(log_p [B, 2], ...) -> [B]`: `redi`, `simpo` or `dpo` of
        `kd.losses.preference_family`, or your own; it gets what it names of `log_p`, `counts`,
        `anchor_log_p` and `baseline`, float32 [B, 2], of the whole batch (`kto_baseline`).
      chunk: tokens at a time where logits are not formed whole.
      micro_batches: parts over which gradients are accumulated; pairs stay together.
      distinct: leaves pairs of the same answer twice out of all means.
      balance: weight of the losses of balance of both answers, see `common.balanced`.
      trainable: regular expression to be found in the path of a leaf that is trained; '' for all.
      **loss_arguments: further keywords of the loss (`alpha` of redi, `beta` of dpo, ...).
    """
    network, of_pairs = context.network, callables.resolve(loss)
    takes = [name for name in _OF_PAIR if name in inspect.signature(of_pairs).parameters]
    callables.check_arguments(of_pairs, loss_arguments, where=f'method ({loss})', reserved=_OF_PAIR)
    anchored = ANCHOR in takes
    compared_with_batch = BASELINE in takes
    given = ANCHOR in context.spec
    if anchored and not given and REFERENCE not in context.references:
        raise UserError(
            f'{context.stage}: {loss} compares with a reference; name one, such as '
            f'{context.stage}.references.{REFERENCE}={context.config.references.get("start")!r}.'
        )

    def collect(state, batch, key):
        if not given:
            batch = {**batch, ANCHOR: anchor(context, state, batch, chunk)}
        if not compared_with_batch:
            return batch
        own = score(network, state.variables(), batch, key=key, chunk=chunk, train=True).log_p
        where = differ(batch) if distinct else None
        baseline = preference_family.kto_baseline(own, batch[ANCHOR], where=where)
        # A row for each pair, so that it is there for all micro-batches.
        return {**batch, BASELINE: jnp.broadcast_to(baseline, own.shape)}

    def objective(params, state, batch, key) -> Objective:
        found = score(
            network, state.variables(params=params), batch, key=key, chunk=chunk, train=True
        )
        known = {'log_p': found.log_p, 'counts': found.counts, **batch}
        losses = of_pairs(**{name: known[name] for name in takes}, **loss_arguments)
        where = differ(batch) if distinct else None
        metrics = compared(found, batch[ANCHOR] if anchored else None, where)
        if found.routers:
            answers = common.rows(network, batch)
            unequal, loads = common.balanced(network, answers, found.routers)
            losses += balance * unequal.reshape(-1, 2).sum(1)
            metrics |= loads
        return Objective(mean(losses, where), metrics, found.mutables)

    init = start.from_reference(network.init, context)
    method = minimize(
        objective, context.tx, init, micro_batches=micro_batches, trainable=trainable or None
    )
    needed = (anchored and not given) or compared_with_batch
    return with_collect(method, collect) if needed else method


def anchor(context: Context, state, batch: Batch, chunk: int = 256) -> jax.Array:
    """The sums [B, 2] of the stage's reference, which is not in training mode.

    Over the tokens that the stage's network has too, where a vocabulary is padded further.
    """
    reference = context.references[REFERENCE]
    outcomes = output_shape(context.network)[-1]
    found = score(reference, state.frozen[REFERENCE], batch, chunk=chunk, outcomes=outcomes)
    return found.log_p


def differ(batch: Batch) -> jax.Array:
    """Whether the two answers of a pair are not the same one, bool [B]."""
    answer = batch['label' if 'label' in batch else 'input']
    return (answer[:, 0] != answer[:, 1]).reshape(len(answer), -1).any(-1)


def compared(
    found: Scored, anchor_log_p: jax.Array | None = None, where: jax.Array | None = None
) -> dict[str, Mean]:
    """Means over pairs by name.

    chosen, rejected: log-probability of an answer by token, nats; where both fall together and fast
    a student is lost. chosen_tokens, rejected_tokens: lengths. preferred: how often the preferred
    answer is the more probable one by token. With a reference also margin, the log-ratio of the
    preferred answer over that of the other, and accuracy, how often it is positive.

    Args:
      found: of `score`.
      anchor_log_p: [B, 2], sums of the reference.
      where: bool [B], the pairs that count.
    """
    means, ahead = found.means, found.means[:, 0] > found.means[:, 1]
    values = {'preferred': ahead}
    for place, name in enumerate(('chosen', 'rejected')):
        values |= {name: means[:, place], f'{name}_tokens': found.counts[:, place]}
    if anchor_log_p is not None:
        gain = found.log_p - anchor_log_p
        values['margin'] = gain[:, 0] - gain[:, 1]
        values['accuracy'] = values['margin'] > 0
    return {name: mean(jax.lax.stop_gradient(value), where) for name, value in values.items()}
