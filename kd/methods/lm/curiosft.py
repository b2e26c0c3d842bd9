"""CurioSFT: fine-tuning that keeps a model's curiosity (2026, arXiv:2602.02244).

Fine-tuning before reinforcement learning collapses the entropy of tokens, and with it exploration;
a bonus for entropy flattens facts as well. Here the model is distilled towards its own law at a
higher temperature, which is much higher where several tokens will do and hardly where one is
right. The teacher is the model itself as it was up to a few steps ago.
"""

from __future__ import annotations

from typing import Literal

import jax

from kd.context import Context
from kd.errors import UserError
from kd.losses import classification, divergence, signal, token
from kd.method import Method, Objective, minimize, with_ema
from kd.methods import start
from kd.methods.lm import common
from kd.metrics import mean
from kd.ranges import Count, Fraction, NonNegative, Positive

# Name of the delayed copy in `state.ema`.
COPY = 'delayed'


def self_distillation(
    logits: jax.Array,
    copy_logits: jax.Array,
    labels: jax.Array,
    temperature: jax.Array,
    *,
    distance: Literal['k2', 'kl'] = 'k2',
) -> jax.Array:
    """The distance to the copy at a temperature of its own at every position.

        k2:  (l - r)^2 / 2,   l = log softmax(z)_y,  r = log softmax(z_copy / tau)_y
        kl:  KL(softmax(z_copy / tau) || softmax(z))

    k2 is of the demonstrated token y alone. With cross-entropy its gradient is (-1 + a (l - r)) of
    that of l: a token that the student knows better than the copy does at its temperature is learnt
    less, and one that it knows worse is learnt more.

    Args:
      logits: z, [..., V].
      copy_logits: z_copy, [..., V]; without gradient.
      labels: y, int [...].
      temperature: tau, [...]; without gradient.
      distance: see above; 'kl' is ours.

    Returns:
      [...] nats (squared for k2).
    """
    tempered = jax.lax.stop_gradient(copy_logits / temperature[..., None])
    if distance == 'kl':
        return divergence.forward_kl(logits, tempered)
    return token.k2(
        -classification.cross_entropy(logits, labels),
        -classification.cross_entropy(tempered, labels),
    )


def curiosft(
    context: Context,
    *,
    weight: NonNegative = 1.0,
    distance: Literal['k2', 'kl'] = 'k2',
    low: Positive = 1.1,
    high: Positive = 1.5,
    pivot: NonNegative = 1.2,
    slope: NonNegative = 2.0,
    amplitude: NonNegative = 0.5,
    certain: NonNegative = 0.03,
    top_k: Count = 512,
    mix: Fraction = 0.99,
    every: Count = 5,
    chunk: Count = 256,
    micro_batches: Count = 1,
) -> Method:
    """Fine-tuning on demonstrations, held near the model's own law at a higher temperature.

        loss = CE(y, q) + weight D      averaged over the tokens of the batch that count

    with D of `self_distillation` and tau of `kd.losses.token.entropy_guided_temperature`, both from
    the copy's logits. The copy, `state.ema['delayed']`, begins as the student and then, after every
    so many steps,

        copy <- (1 - mix) copy + mix student

    `mix` is the share of the student: as released the copy is the student of up to five steps ago,
    and no slow average, which would be another method. With mix = 1 and every = 1 it is the student
    of the same step. With weight = 0 this is fine-tuning.

    Args:
      context: the stage; needs a network and an optimiser; labels, or packed text (see
        `kd.methods.lm.common`). Starts from `references.start`, if there is one.
      weight: a, 1 as released.
      distance: see `self_distillation`.
      low, high, pivot, slope, amplitude, certain, top_k: of the temperature; low = high fixes it.
      mix, every: of the copy.
      chunk: tokens at a time where logits are not formed whole.
      micro_batches: parts over which gradients are accumulated.
    """
    if low > high:
        raise UserError(f'{context.stage}.method: low={low} is above high={high}.')
    network = context.network

    def of_token(logits, copy, labels):
        said = signal.all_logits('curiosft', copy)
        tau = token.entropy_guided_temperature(
            said, low=low, high=high, pivot=pivot, slope=slope, amplitude=amplitude,
            certain=certain, top_k=top_k,
        )  # fmt: skip
        hard = classification.cross_entropy(logits, labels)
        soft = self_distillation(logits, said, labels, tau, distance=distance)
        values = {'hard_loss': hard, 'self_distillation': soft, 'temperature': tau}
        values['entropy'] = token.entropy(logits)
        # A weight of 0 is exactly 0, also where a label is impossible.
        return hard + (weight * soft if weight else 0.0), values

    def loss(params, state, batch, key) -> Objective:
        # The copy has no batch statistics of its own, and drops nothing out.
        copy = common.said_by(network, state.variables(COPY), batch)
        found = common.token_losses(
            network, state.variables(params=params), batch, of_token,
            teacher=copy, key=key, chunk=chunk,
        )  # fmt: skip
        return Objective(mean(found.losses, found.where), found.metrics, found.mutables)

    init = start.from_reference(network.init, context)
    method = minimize(loss, context.tx, init, micro_batches=micro_batches)
    return with_ema(method, {COPY: {'decay': 1 - mix, 'every': every}})


def entropy_bonus(
    context: Context,
    *,
    weight: NonNegative = 0.05,
    chunk: Count = 256,
    micro_batches: Count = 1,
) -> Method:
    """Fine-tuning with a bonus for entropy, what CurioSFT is compared with.

        loss = CE(y, q) - weight H(q)      averaged over the tokens of the batch that count

    Args:
      context, chunk, micro_batches: as of `curiosft`.
      weight: of the entropy in nats.
    """
    network = context.network

    def of_token(logits, _, labels):
        hard, entropy = classification.cross_entropy(logits, labels), token.entropy(logits)
        return hard - weight * entropy, {'hard_loss': hard, 'entropy': entropy}

    def loss(params, state, batch, key) -> Objective:
        found = common.token_losses(
            network, state.variables(params=params), batch, of_token, key=key, chunk=chunk
        )
        return Objective(mean(found.losses, found.where), found.metrics, found.mutables)

    init = start.from_reference(network.init, context)
    return minimize(loss, context.tx, init, micro_batches=micro_batches)
