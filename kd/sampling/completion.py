"""Generators that complete a partial point cloud: they begin at its points, not at nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kd.errors import UserError
from kd.sampling import diffusion, generator
from kd.sampling.denoiser import Condition
from kd.sampling.generator import Generator, Rollout
from kd.state import PyTree


class Completion(NamedTuple):
    """A generator whose first state is x_T = P + scale sigma_T z, P the points of `partial`.

    P is repeated as often as a whole cloud has points for one of it (LiDiff, arXiv:2403.13470).

    Attributes:
      generator: what is asked, and when; it is conditioned on `partial`.
      scale: of the noise.
    """

    generator: Generator
    scale: float = 1.0

    def begin(self, condition: Condition, z: jax.Array) -> jax.Array:
        """x_T [B, N, d] from noise z [B, N, d].

        Raises:
          UserError: clouds that are no multiple of the partial ones.
        """
        partial, first = condition['partial'], jnp.float32(self.generator.times[0])
        times, rest = divmod(z.shape[1], partial.shape[1])
        if rest:
            raise UserError(
                f'whole clouds have {z.shape[1]} points, partial ones {partial.shape[1]}: the '
                'first must be a multiple of the second.'
            )
        noise = self.scale * self.generator.denoiser.schedule.sigma(first)
        return jnp.repeat(partial, times, axis=1) + noise * z

    def sample(self, variables: PyTree, condition: Condition, key: jax.Array, shape) -> jax.Array:
        """Clouds [B, N, d], by all steps."""
        own, (noise_key, key) = self.generator, jax.random.split(key)
        x = self.begin(condition, jax.random.normal(noise_key, shape))
        denoise = own.denoiser.bind(variables, condition)
        return diffusion.sample(own.denoiser.schedule, denoise, x, own.times, key, step=own.step)

    def rollout(
        self,
        variables: PyTree,
        condition: Condition,
        key: jax.Array,
        shape,
        train: bool,
        frozen: Mapping[str, PyTree],
    ) -> Rollout:
        """As of `Generator`: a call with gradient at one of its times."""
        del frozen

        def begin(key: jax.Array) -> jax.Array:
            return self.begin(condition, jax.random.normal(key, shape))

        return generator.asked(self.generator, variables, condition, key, train, begin)
