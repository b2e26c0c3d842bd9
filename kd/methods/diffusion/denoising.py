"""Diffusion models: denoisers trained on data, the teachers of all others here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kd import config as config_lib
from kd.context import Context
from kd.losses import score_distillation
from kd.losses.score_distillation import Weight
from kd.method import Method, Objective, minimize
from kd.methods import start
from kd.metrics import mean
from kd.ranges import Count, Fraction
from kd.sampling import denoiser as denoisers
from kd.sampling import times


def denoising(
    context: Context,
    *,
    law: Mapping[str, Any] | None = None,
    weight: Weight = 'eps',
    label_dropout: Fraction = 0.1,
    micro_batches: Count = 1,
) -> Method:
    """Regression of the clean example from the noised one.

        loss = E w(t) mean (mu(x_t, t) - x0)^2,   x_t = alpha(t) x0 + sigma(t) eps

    Args:
      context: the stage; a denoiser (`kd.models.denoiser`) and an optimiser. Starts from
        `references.start`, if there is one.
      law: block of `kd.sampling.times` of the times; None for all of the schedule evenly.
      weight: see `kd.losses.score_distillation.denoising`. DDPM has 'eps' and all times evenly, EDM
        'edm' and `lognormal`.
      label_dropout: share of examples whose condition is left out, which guidance needs.
      micro_batches: parts over which gradients are accumulated.
    """
    network = context.network
    own = denoisers.of_network(network)
    path = own.schedule
    draw = times.uniform(times.even(path))
    if law is not None:
        draw = config_lib.build(law, where=f'{context.stage}.method.law')
    sigma_data = getattr(network.module, 'sigma_data', 0.5)

    def loss(params, state, batch, key):
        time_key, noise_key, drop_key, dropout = jax.random.split(key, 4)
        data = batch['input']
        condition = denoisers.dropped(
            own, drop_key, denoisers.conditions(network, batch), label_dropout
        )
        t = jnp.clip(draw(time_key, jnp.zeros(len(data))), path.low, path.high)
        x_t = path.mix(data, jax.random.normal(noise_key, data.shape, data.dtype), t)
        variables = state.variables(params=params)
        said = own.apply(variables, x_t, t, condition, train=True, key=dropout).x0
        losses = score_distillation.denoising(said, data, path, t, weight, sigma_data)
        return Objective(mean(losses))

    init = start.from_reference(network.init, context)
    return minimize(loss, context.tx, init, micro_batches=micro_batches)
