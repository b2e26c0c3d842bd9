"""Embedding loss: score distillation beside a discrepancy in random features (2026, 2604.22379)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from kd import config as config_lib
from kd.context import Context
from kd.losses import mean_embedding
from kd.losses.score_distillation import Weight
from kd.method import Method
from kd.methods.diffusion import common
from kd.methods.diffusion.distribution_matching import Term, distribution_matching
from kd.network import Network, from_linen
from kd.ranges import Count, Finite, Fraction, NonNegative, Positive
from kd.sampling import times as times_lib


def embedding_loss(
    context: Context,
    *,
    times: tuple[Positive, ...],
    optimizer: Mapping[str, Any],
    embedding: Mapping[str, Any],
    embedding_weight: NonNegative = 0.3,
    networks: Count = 4,
    kernel: Literal['linear', 'gaussian'] = 'linear',
    unbiased: bool = False,
    samples: Count | None = None,
    clock: Mapping[str, Any] | None = None,
    guidance: Finite = 1.0,
    updates: Count = 5,
    between: tuple[Fraction, Fraction] = (0.02, 0.98),
    weight: Weight = 'eps',
    unroll: bool = False,
) -> Method:
    """DMD and a maximum mean discrepancy from data, in the features of untrained networks.

        loss = L_DM + embedding_weight mean_m mmd2(phi_m(G(z)), phi_m(x)) / d

    phi_m are drawn anew at every step: what one of them does not see, another does. No part of the
    discrepancy depends on a time or a noise, and generated examples see each other in it.

    Of the paper nothing but the abstract and summaries of others were at hand: the linear kernel,
    four networks, drawn at every step, and the weight are ours.

    Args:
      context, times, optimizer, clock, guidance, updates, between, weight, unroll: as of
        `kd.methods.diffusion.dmd.dmd`.
      embedding: block of a network [B, ...] -> [B, d], such as `kd.models.mlp.MLP`.
      embedding_weight: of the discrepancy.
      networks: M.
      kernel, unbiased: see `kd.losses.mean_embedding.mmd2`; unbiased for batches below 64.
      samples: of the generator in a step; the discrepancy compares them with the whole batch.
    """
    student, teacher = common.student(context, times), common.teacher(context)
    measure = common.clock(clock, teacher)
    module = config_lib.build(embedding, where=f'{context.stage}.method.embedding')
    x = context.spec['input']
    features = from_linen(module, jax.ShapeDtypeStruct((1, *x.shape), x.dtype))
    term = discrepancy(features, embedding_weight, networks, kernel=kernel, unbiased=unbiased)
    return distribution_matching(
        context,
        student=student,
        teacher=teacher,
        critic=common.critic(
            context,
            optimizer,
            times_lib.uniform(measure),
            weight=weight,
            updates=updates,
            unroll=unroll,
        ),
        direction=common.matching(times_lib.uniform(measure, *between), guidance),
        terms=[term] if embedding_weight else [],
        samples=samples,
    )


def discrepancy(
    features: Network,
    weight: float,
    networks: int,
    *,
    kernel: Literal['linear', 'gaussian'] = 'linear',
    unbiased: bool = False,
) -> Term:
    """The term: one number for the batch, as the loss of each example."""

    def loss(views, batch, key):
        real = jax.lax.stop_gradient(batch['input'])

        # Of one network after the other, and computed again in the backward pass.
        @jax.checkpoint
        def of_network(key):
            phi = features.init(key)
            ours, theirs = (features.apply(phi, x).logits for x in (views.x, real))
            found = mean_embedding.mmd2(ours, theirs, kernel=kernel, unbiased=unbiased)
            return found / ours.shape[-1]

        values = jax.lax.map(of_network, jax.random.split(key, networks))
        return jnp.broadcast_to(values.mean(), views.x.shape[:1])

    return Term('embedding', weight, loss)
