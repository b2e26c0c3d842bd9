"""Networks on records of categories: an autoencoder whose latent need not know a group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from kd.models import layers
from kd.ranges import Count

FROM, MODES = ('latent', 'latent_and_group'), ('noise', 'data')
# Bounds of the logarithm of a variance.
LOG_VARIANCE = (-12.0, 8.0)


class TabularVAE(nn.Module):
    """q(z | x, s), p(x | z, s) by column, and p(y | z): perceptrons of one hidden layer each.

        mean, variance = network.apply(v, x, s, method='encode').logits
        logits = network.apply(v, z, s, method='decode').logits          all columns side by side
        logits = network.apply(v, z, s, method='outcome').logits

    Called, it is the classifier of the latent's mean. The outcome sees no group: it would bring
    back the dependence that the latent is rid of.

    Attributes:
      columns: categories of each column of `input`.
      groups: values of `group`.
      width: of hidden layers.
      latent: dimension of z.
      outcome_from: 'latent', or 'latent_and_group' for a control that is not fair.
      num_classes: of the outcome.

    Source: arXiv 2408.10755, after FairDisCo.
    """

    columns: Sequence[Count] = (2,)
    groups: Count = 2
    width: Count = 64
    latent: Count = 8
    outcome_from: str = 'latent'
    num_classes: Count = 2
    fields = ('input', 'group')

    def __post_init__(self):
        layers.check_choice('outcome_from', self.outcome_from, FROM)
        super().__post_init__()

    def setup(self):
        self.encoder = nn.Dense(self.width)
        self.posterior = nn.Dense(2 * self.latent)
        self.decoder = nn.Dense(self.width)
        self.reconstruction = nn.Dense(sum(self.columns))
        self.head = nn.Dense(self.width)
        self.logits = nn.Dense(self.num_classes)

    def __call__(self, x: jax.Array, group: jax.Array, *, train: bool = False) -> jax.Array:
        """int [B, C] and int [B] to float32 logits [B, num_classes] of the outcome."""
        del train
        mean, _ = self.encode(x, group)
        if self.is_initializing():
            self.decode(mean, group)
        return self.outcome(mean, group)

    def encode(
        self, x: jax.Array, group: jax.Array, *, train: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """Mean and variance of z, [B, latent] each."""
        del train
        seen = jnp.concatenate([one_hot(x, self.columns), self._group(group)], -1)
        mean, log = jnp.split(self.posterior(nn.relu(self.encoder(seen))), 2, -1)
        return mean, jnp.exp(jnp.clip(log, *LOG_VARIANCE))

    def decode(self, z: jax.Array, group: jax.Array, *, train: bool = False) -> jax.Array:
        """Logits of all columns, [B, sum of columns]; `by_column` cuts them."""
        del train
        seen = jnp.concatenate([z, self._group(group)], -1)
        return self.reconstruction(nn.relu(self.decoder(seen)))

    def outcome(self, z: jax.Array, group: jax.Array, *, train: bool = False) -> jax.Array:
        """Logits of the outcome, [B, num_classes]."""
        del train
        blind = self.outcome_from == 'latent'
        seen = z if blind else jnp.concatenate([z, self._group(group)], -1)
        return self.logits(nn.relu(self.head(seen)))

    def _group(self, group: jax.Array) -> jax.Array:
        return jax.nn.one_hot(group, self.groups)


class LatentStudent(nn.Module):
    """A smaller encoder: latents from noise, or from the records.

    Attributes:
      mode: 'noise' for z(n), n of a unit Gaussian of `latent` dimensions; 'data' for z(x, s).
      columns, groups: of the records; read in the mode 'data' alone.
      width: of the hidden layer, a quarter of the teacher's or less.
      latent: dimension of z.
    """

    mode: str = 'noise'
    columns: Sequence[Count] = (2,)
    groups: Count = 2
    width: Count = 16
    latent: Count = 8

    def __post_init__(self):
        layers.check_choice('mode', self.mode, MODES)
        super().__post_init__()

    def example_inputs(
        self, spec: Mapping[str, jax.ShapeDtypeStruct]
    ) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Noise, or the fields of a record."""
        if self.mode == 'noise':
            return (jax.ShapeDtypeStruct((1, self.latent), jnp.float32),)
        return tuple(
            jax.ShapeDtypeStruct((1, *spec[name].shape), spec[name].dtype)
            for name in ('input', 'group')
        )

    @nn.compact
    def __call__(self, *inputs: jax.Array, train: bool = False) -> jax.Array:
        """float [B, latent]; or int [B, C] and int [B]; to z, [B, latent]."""
        del train
        (seen,) = inputs if self.mode == 'noise' else (None,)
        if seen is None:
            x, group = inputs
            seen = jnp.concatenate(
                [one_hot(x, self.columns), jax.nn.one_hot(group, self.groups)], -1
            )
        return nn.Dense(self.latent, name='out')(nn.relu(nn.Dense(self.width, name='hidden')(seen)))


def one_hot(x: jax.Array, columns: Sequence[int]) -> jax.Array:
    """int [..., C] as float32 [..., sum of columns]."""
    if x.shape[-1] != len(columns):
        raise ValueError(f'records have {x.shape[-1]} columns, and {len(columns)} are declared.')
    return jnp.concatenate([jax.nn.one_hot(x[..., i], n) for i, n in enumerate(columns)], -1)


def by_column(logits: jax.Array, columns: Sequence[int]) -> list[jax.Array]:
    """[..., sum of columns] cut into [..., categories] of each column."""
    ends = [sum(columns[: i + 1]) for i in range(len(columns) - 1)]
    return jnp.split(logits, ends, -1)
