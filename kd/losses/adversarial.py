"""Losses of generators and discriminators, from logits: unreduced, natural logarithms.

A discriminator with several logits for an example gives [B, n]; losses have the shape of logits.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

__all__ = [
    'discriminator_hinge',
    'discriminator_softplus',
    'finite_difference',
    'generator_hinge',
    'generator_softplus',
    'r1',
    'relativistic',
]


def discriminator_softplus(real: jax.Array, fake: jax.Array) -> jax.Array:
    """softplus(-D(x)) + softplus(D(G(z))), 2 log 2 where D is 0.

    Args:
      real, fake: logits of as many real and generated examples.

    Source: Goodfellow et al. 2014, arXiv:1406.2661, as binary cross-entropies.
    """
    return jax.nn.softplus(-real) + jax.nn.softplus(fake)


def generator_softplus(fake: jax.Array) -> jax.Array:
    """softplus(-D(G(z))), the non-saturating loss of the generator; log 2 where D is 0."""
    return jax.nn.softplus(-fake)


def discriminator_hinge(real: jax.Array, fake: jax.Array) -> jax.Array:
    """relu(1 - D(x)) + relu(1 + D(G(z))), without gradient where both are right by 1.

    Args:
      real, fake: logits of as many real and generated examples.

    Source: Geometric GAN, arXiv:1705.02894.
    """
    return jax.nn.relu(1 - real) + jax.nn.relu(1 + fake)


def generator_hinge(fake: jax.Array) -> jax.Array:
    """-D(G(z)), what a generator has against `discriminator_hinge`."""
    return -fake


def relativistic(preferred: jax.Array, other: jax.Array) -> jax.Array:
    """softplus(D(other) - D(preferred)), for a discriminator with real examples preferred, and for
    a generator with its own.

    Source: Jolicoeur-Martineau 2018, arXiv:1807.00734; R3GAN, arXiv:2501.05441.
    """
    return jax.nn.softplus(other - preferred)


def r1(logits: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """|| grad_x sum D(x) ||^2 / 2 of each example, [B]: |w|^2 / 2 for D(x) = w x.

    Args:
      logits: [B, ...] -> [B] or [B, n], each example by itself.
      x: real examples.

    Source: Mescheder, Geiger and Nowozin 2018, arXiv:1801.04406, eq. 9.
    """
    gradient = jax.grad(lambda x: jnp.sum(logits(x)))(x)
    return 0.5 * jnp.sum(jnp.square(gradient), axis=tuple(range(1, x.ndim)))


def finite_difference(
    logits: Callable[[jax.Array], jax.Array], x: jax.Array, key: jax.Array, scale: float
) -> jax.Array:
    """(D(x) - D(x + scale noise))^2, of the shape of the logits: R1 without a second derivative.

    In expectation scale^2 || grad D ||^2 for a small scale.

    Source: APT, arXiv:2501.08316, eq. 5.
    """
    noise = jax.random.normal(key, x.shape, x.dtype)
    return jnp.square(logits(x) - logits(x + scale * noise))
