"""Fair synthetic records: a latent without the group, and a smaller encoder of it.

    config.fair = stage(network=TabularVAE, method=fair_vae(beta=1e3), ...)
    config.student = stage(network=LatentStudent, references={'vae': 'fair'},
                           method=distil_latents(), ...)

Records are drawn from latents and a group that is drawn apart from them, see
`kd.evaluators.records`. The first stage is FairDisCo's (arXiv 2408.10755); the second is a
reconstruction, as the paper was not at hand in full.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from kd.context import Context
from kd.errors import UserError
from kd.losses import classification, independence, mean_embedding, numerics
from kd.losses.divergence import forward_kl
from kd.method import Batch, Method, Objective, minimize
from kd.metrics import mean
from kd.models.tabular import LatentStudent, TabularVAE, by_column
from kd.network import Network
from kd.ranges import Finite, NonNegative
from kd.state import PyTree, State

# Name of the reference to the autoencoder in a student's stage.
VAE = 'vae'


def fair_vae(
    context: Context,
    *,
    beta: NonNegative = 1e3,
    kl_weight: NonNegative = 1.0,
    outcome_weight: NonNegative = 1.0,
    diagonal: bool = True,
    log_scale: Finite = 0.0,
) -> Method:
    """An autoencoder of records whose latent is to be independent of the group.

        sum over columns CE(column) + CE(y from z) + KL(q(z|x,s) || N(0, I)) + beta V^2(z, s)

    V^2 is of the whole batch, see `kd.losses.independence.distance_covariance`. beta = 0 is a
    conditional autoencoder.

    Args:
      context: the stage; its network is a `TabularVAE`, its data have `label` and `group`.
      beta: grows with the dimension, as V^2 is a product of densities: 1e3 at 4, 1e7 at 8.
      kl_weight, outcome_weight: of the KL and of y.
      diagonal, log_scale: of V^2.

    Raises:
      UserError: another network, data without groups.
    """
    network = context.network
    module = _vae(context, network, 'network')

    def loss(params: PyTree, state: State, batch: Batch, key: jax.Array) -> Objective:
        variables, group = state.variables(params=params), batch['group']
        mu, variance = network.apply(variables, *network.of(batch), method='encode').logits
        z = mu + jnp.sqrt(variance) * jax.random.normal(key, mu.shape)
        logits = network.apply(variables, z, group, method='decode').logits
        rebuilt = reconstruction(logits, batch['input'], module.columns)
        outcome = network.apply(variables, z, group, method='outcome').logits
        told = classification.cross_entropy(outcome, batch['label'])
        kl = independence.gaussian_kl(mu, variance)
        dependence = independence.distance_covariance(
            mu, variance, group, module.groups, diagonal=diagonal, log_scale=log_scale
        )
        # Without a weight it is only looked at.
        fair = beta * dependence if beta else 0.0
        losses = rebuilt + outcome_weight * told + kl_weight * kl + fair
        return Objective(
            mean(losses),
            {
                'reconstruction': mean(rebuilt),
                'outcome': mean(told),
                'kl': mean(kl),
                'dependence': mean(jnp.broadcast_to(dependence, rebuilt.shape)),
            },
        )

    return minimize(loss, context.tx, network.init)


def distil_latents(
    context: Context,
    *,
    utility: NonNegative = 1.0,
    distance: Literal['energy', 'mmd'] = 'energy',
    beta: NonNegative = 0.0,
) -> Method:
    """A smaller encoder whose latents are those of a fair one, before its frozen decoder.

        data    mean |z - z'|^2 + utility sum over columns KL(P_T || P_S),      z = mean of q(z|x,s)
        noise   D(z, z') + utility sum over columns KL(mean P_T || mean P_S),   z ~ q(z|x,s)

    P is what the decoder and the outcome say of a latent and the record's group; in the mode
    'noise', where latents are not paired, it is their mean over the batch, and D the energy
    distance or the squared MMD. Of the batch as a whole.

    Args:
      context: the stage; its network is a `LatentStudent`, its `references.vae` a `TabularVAE`.
      utility: weight of the second term.
      distance: D.
      beta: of V^2 of the student's own latents, with unit variance; off by default.

    Raises:
      UserError: another network or reference, data without groups.
    """
    network, student = context.network, context.network.module
    if VAE not in context.references:
        raise UserError(f'{context.stage}.references.{VAE} names no stage of an autoencoder.')
    teacher = context.references[VAE]
    module = _vae(context, teacher, f'references.{VAE}')
    if not isinstance(student, LatentStudent) or student.latent != module.latent:
        raise UserError(
            f'{context.stage}.network must be a kd.models.tabular.LatentStudent with the '
            f"autoencoder's latent={module.latent}."
        )
    noisy = student.mode == 'noise'

    def says(state: State, z: jax.Array, group: jax.Array) -> list[jax.Array]:
        variables = state.frozen[VAE]
        logits = teacher.apply(variables, z, group, method='decode').logits
        outcome = teacher.apply(variables, z, group, method='outcome').logits
        return [*by_column(logits, module.columns), outcome]

    def loss(params: PyTree, state: State, batch: Batch, key: jax.Array) -> Objective:
        noise_key, sample_key = jax.random.split(key)
        group = batch['group']
        mu, variance = teacher.apply(state.frozen[VAE], *teacher.of(batch), method='encode').logits
        variables = state.variables(params=params)
        if noisy:
            noise = jax.random.normal(noise_key, mu.shape)
            z = mu + jnp.sqrt(variance) * jax.random.normal(sample_key, mu.shape)
            own = network.apply(variables, noise).logits
            far = _distance(distance, own, z)
        else:
            z, own = mu, network.apply(variables, batch['input'], group).logits
            far = jnp.sum((own - z) ** 2, -1)
        useful: jax.Array | float = 0.0
        for ours, theirs in zip(says(state, own, group), says(state, z, group), strict=True):
            if noisy:
                ours, theirs = log_mean(ours), log_mean(theirs)
            useful = useful + forward_kl(ours, theirs)
        total = far + utility * useful
        if beta:
            total = total + beta * independence.distance_covariance(
                own, jnp.ones_like(own), group, module.groups
            )
        each = jnp.broadcast_to(total, (len(group),))
        metrics = {
            name: mean(jnp.broadcast_to(x, each.shape))
            for name, x in (('quality', far), ('utility', jnp.asarray(useful)))
        }
        return Objective(mean(each), metrics)

    return minimize(loss, context.tx, network.init)


def reconstruction(logits: jax.Array, x: jax.Array, columns) -> jax.Array:
    """Cross-entropies of all columns added up, logits [B, sum of columns], int [B, C] to [B]."""
    parts = by_column(logits, columns)
    return sum(
        (classification.cross_entropy(part, x[:, i]) for i, part in enumerate(parts)),
        jnp.zeros(len(x)),
    )


def log_mean(logits: jax.Array) -> jax.Array:
    """log of the mean over the batch of softmax(logits), [B, V] to [V], up to a constant."""
    return numerics.log_sum_exp(numerics.log_softmax(logits), axis=0)


def _distance(name: str, own: jax.Array, z: jax.Array) -> jax.Array:
    if name == 'energy':
        return independence.energy_distance(own, z)
    return mean_embedding.mmd2(own, z, kernel='gaussian')


def _vae(context: Context, network: Network, what: str) -> TabularVAE:
    if not isinstance(network.module, TabularVAE):
        raise UserError(f'{context.stage}.{what} must be a kd.models.tabular.TabularVAE.')
    if missing := [name for name in ('label', 'group') if name not in context.spec]:
        raise UserError(f'{context.stage} wants records with {missing}; see kd.data.tabular.')
    return network.module
