"""A small denoiser of frames in their order, which attends to the clean frames before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kd import config as config_lib
from kd.errors import UserError
from kd.losses.schedule import Schedule
from kd.models.conditioning import positional_embedding
from kd.ranges import Count


class CausalVideo(nn.Module):
    """E[x_f | noised x_f, clean x_1 .. x_(f-1)] of frames [d].

    One layer of attention from a noised frame to itself and to clean ones, which are frames without
    noise, and a perceptron. `__call__` says of all frames at once, by a mask, what `say` says of
    each with a cache.

    Attributes:
      schedule: of the noise.
      frames: of a video.
      width: of all layers.
      depth: of the perceptron.
      size: d.
    """

    schedule: Schedule
    frames: Count = 6
    width: Count = 64
    depth: Count = 2
    size: Count = 2

    def setup(self) -> None:
        place = nn.initializers.normal(1.0)
        self.place = self.param('place', place, (self.frames, self.width), jnp.float32)
        self.first, self.query = nn.Dense(self.width), nn.Dense(self.width)
        self.memory = nn.Dense(2 * self.width)
        self.hidden = [nn.Dense(self.width) for _ in range(self.depth)]
        self.out = nn.Dense(self.size)

    def example_inputs(self, spec) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes of (t [1, F], x [1, F, d], clean [1, F, d])."""
        x = spec['input']
        if x.shape != (self.frames, self.size):
            raise UserError(
                f'CausalVideo has frames={self.frames} of size={self.size}, and an example of the '
                f'data has the shape {x.shape}.'
            )
        video = jax.ShapeDtypeStruct((1, *x.shape), x.dtype)
        return jax.ShapeDtypeStruct((1, self.frames), x.dtype), video, video

    def __call__(
        self, t: jax.Array, x: jax.Array, clean: jax.Array, *, train: bool = False
    ) -> jax.Array:
        """Of all frames [B, F, d] noised at times [B, F], told of clean ones [B, F, d]."""
        del train
        numbers = jnp.arange(self.frames)
        before = jnp.tril(jnp.ones((self.frames, self.frames), bool), -1)
        return self._said(t, x, numbers, self._remembered(clean, numbers), before)

    @property
    def causal(self) -> int:
        """Frames of a block."""
        return 1

    def remember(self, x: jax.Array, memory: jax.Array, number: jax.Array) -> jax.Array:
        """Memory [B, F, 2 width] with that of the clean frame `number` [B, 1, d]."""
        said = self._remembered(x, number[None]).astype(memory.dtype)
        return jax.lax.dynamic_update_slice_in_dim(memory, said, number, axis=1)

    def empty(self, z: jax.Array) -> jax.Array:
        """Memory [B, F, 2 width] before the first frame of videos like z [B, F, d]."""
        return jnp.zeros((len(z), self.frames, 2 * self.width))

    def say(self, t: jax.Array, x: jax.Array, memory: jax.Array, number: jax.Array) -> jax.Array:
        """Of frame `number` [B, 1, d] noised at t [B], told of memory [B, F, 2 width] before it."""
        before = (jnp.arange(self.frames) < number)[None]
        return self._said(t[:, None], x, number[None], memory, before)

    def _remembered(self, x, number):
        """Keys and values [B, F', 2 width] of clean frames [B, F', d] of these numbers [F']."""
        still = jnp.full(x.shape[:-1], self.schedule.low, x.dtype)
        return self.memory(self._features(still, x, number))

    def _features(self, t, x, number):
        told = self.schedule.condition(t)
        told = positional_embedding(told.reshape(-1), 16).reshape(*told.shape, 16)
        seen = jnp.concatenate([self._scaled(t, x), told], -1)
        return nn.silu(self.first(seen) + self.place[number])

    def _scaled(self, t, x):
        return x / jnp.sqrt(1 + self.schedule.noise_to_signal(t) ** 2)[..., None]

    def _said(self, t, x, number, memory, before):
        own = self._features(t, x, number)
        query = self.query(own) / jnp.sqrt(self.width)
        (key, value), (own_key, own_value) = (
            jnp.split(said, 2, axis=-1) for said in (memory, self.memory(own))
        )
        logits = jnp.where(before, jnp.einsum('bfd,bgd->bfg', query, key), -jnp.inf)
        itself = jnp.sum(query * own_key, -1, keepdims=True)
        weights = nn.softmax(jnp.concatenate([logits, itself], -1))
        told = jnp.einsum('bfg,bgd->bfd', weights[..., :-1], value) + weights[..., -1:] * own_value
        hidden = jnp.concatenate([own, told, self._scaled(t, x)], -1)
        for layer in self.hidden:
            hidden = nn.silu(layer(hidden))
        return self.out(hidden)


def causal_video(
    *,
    schedule: Mapping[str, Any],
    frames: Count = 6,
    width: Count = 64,
    depth: Count = 2,
    size: Count = 2,
) -> CausalVideo:
    """A `CausalVideo` in a recipe.

    Args:
      schedule: block of one of `kd.losses.schedule`.
      frames, width, depth, size: see there.
    """
    path = config_lib.build(schedule, where='network.schedule')
    return CausalVideo(path, frames, width, depth, size)
