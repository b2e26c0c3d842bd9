"""Masked diffusion of text (Sahoo et al. 2024, arXiv:2406.07524): the teacher of this room."""

from __future__ import annotations

import jax

from kd.context import Context
from kd.losses import classification
from kd.losses import masked_diffusion as losses
from kd.losses.masked_diffusion import ScheduleName
from kd.method import Method, Objective, minimize, with_collect
from kd.methods import start
from kd.methods.discrete import common
from kd.methods.lm.common import TOKEN_WEIGHT, token_losses
from kd.metrics import mean
from kd.ranges import Count, Size


def masked_diffusion(
    context: Context,
    *,
    schedule: ScheduleName = 'log_linear',
    mask: Size | None = None,
    chunk: Count = 256,
    micro_batches: Count = 1,
) -> Method:
    """Uncovers hidden symbols: a bound from above of the negative log-likelihood.

        t ~ U[0, 1],  z_t hides each symbol with probability 1 - alpha(t)
        loss = -alpha'(t) / (1 - alpha(t)) sum_{i hidden} -log p(x_i | z_t) / L

    averaged over the rows of the batch, L the symbols of a row that may be hidden. Times are one in
    each of B equal parts of [0, 1]. The network does not see the time.

    Args:
      context: the stage; needs a network that is not causal, and an optimiser. Starts from
        `references.start`, if there is one.
      schedule: of alpha, see `kd.losses.masked_diffusion.schedule`.
      mask: id of the mask; None for the first of the network's `extra_symbols`.
      chunk: tokens at a time where logits are not formed whole.
      micro_batches: parts over which gradients are accumulated.
    """
    network, noise = context.network, common.noise(context, schedule, mask)

    def collect(state, batch, key):
        times, coins = jax.random.split(key)
        t = losses.stratified(times, len(batch['input']))
        noised = noise(batch, jax.random.uniform(coins, batch['input'].shape), t)
        weights = losses.elbo_weights(noised['response_mask'], noise.schedule.rate(t))
        return {**noised, TOKEN_WEIGHT: common.share(weights, common.counting(batch))}

    def of_token(logits, teacher, labels, weight):
        del teacher
        where = losses.outcomes(logits.shape[-1], noise.mask)
        nll = classification.cross_entropy(logits, labels, where=where)
        return weight * nll, {'hidden_nll': nll}

    def loss(params, state, batch, key) -> Objective:
        found = token_losses(
            network, state.variables(params=params), batch, of_token,
            per_token=(batch[TOKEN_WEIGHT],), key=key, chunk=chunk,
        )  # fmt: skip
        return Objective(mean(found.sums), found.metrics, found.mutables)

    init = start.from_reference(network.init, context)
    return with_collect(minimize(loss, context.tx, init, micro_batches=micro_batches), collect)
