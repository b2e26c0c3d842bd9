"""The UNet of ResShift, with windows of attention: a picture, or its latents, beside a low one.

Source: ResShift, arXiv:2307.12348; Swin, arXiv:2103.14030, whose windows are moved by half of
their side from one block to the next.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype

from kd.models.edm_parts import ADM, Block, conv, dense, norm
from kd.models.latent_parts import timestep_features
from kd.models.layers import Features
from kd.models.unet import resample
from kd.ranges import Count, Decay, Positive

__all__ = ['SwinUNet', 'relative_places', 'windows']


def windows(x: jax.Array, side: int) -> jax.Array:
    """Maps [B, H, W, D] as windows [B, H W / side^2, side^2, D], row by row."""
    batch, height, width, size = x.shape
    x = x.reshape(batch, height // side, side, width // side, side, size)
    return x.swapaxes(2, 3).reshape(batch, -1, side * side, size)


def _whole(x: jax.Array, shape: tuple[int, ...], side: int) -> jax.Array:
    """What `windows` undoes."""
    batch, height, width, size = shape
    x = x.reshape(batch, height // side, width // side, side, side, size)
    return x.swapaxes(2, 3).reshape(shape)


def relative_places(side: int) -> np.ndarray:
    """int [side^2, side^2], a number in 0 .. (2 side - 1)^2 - 1 for the offset of two pixels."""
    place = np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing='ij'), -1)
    place = place.reshape(-1, 2)
    down, right = np.moveaxis(place[:, None] - place[None] + side - 1, -1, 0)
    return down * (2 * side - 1) + right


def _regions(height: int, width: int, side: int, shift: int) -> np.ndarray:
    """Which pixels of a window [W, side^2, side^2] are neighbours in a map moved round its edge."""

    def parts(length: int) -> np.ndarray:
        place = np.arange(length)
        return (place >= length - side).astype(int) + (place >= length - shift)

    of = np.asarray(3 * parts(height)[:, None] + parts(width))
    grid = of.reshape(height // side, side, width // side, side)
    cut = grid.swapaxes(1, 2).reshape(-1, side * side)
    return cut[:, :, None] == cut[:, None]


class WindowBlock(nn.Module):
    """Attention within windows, moved by `shift`, and two layers; [B, H, W, D] to the same."""

    heads: int
    window: int
    shift: int
    ratio: float
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        height, width = x.shape[1:3]
        # A map that is one window has nothing beyond it.
        one = min(height, width) <= self.window
        side, shift = (min(height, width), 0) if one else (self.window, self.shift)
        y = norm(x, 1e-5, self.dtype, 'norm1')
        if shift:
            y = jnp.roll(y, (-shift, -shift), (1, 2))
        y = _whole(self._attend(windows(y, side), side, shift, height, width), x.shape, side)
        if shift:
            y = jnp.roll(y, (shift, shift), (1, 2))
        x = x + y
        y = norm(x, 1e-5, self.dtype, 'norm2')
        y = self._dense(int(x.shape[-1] * self.ratio), 'mlp_0')(y)
        return x + self._dense(x.shape[-1], 'mlp_2')(nn.gelu(y, approximate=False))

    def _attend(self, y, side, shift, height, width):
        *lead, count, size = y.shape
        qkv = self._dense(3 * size, 'qkv')(y)
        qkv = qkv.reshape(*lead, count, 3, self.heads, size // self.heads)
        q, k, v = (qkv[..., i, :, :] for i in range(3))
        table = self.param(
            'places', nn.initializers.truncated_normal(0.02), ((2 * side - 1) ** 2, self.heads)
        )
        wide = jnp.promote_types(y.dtype, jnp.float32)
        logits = jnp.einsum('bwnhd,bwmhd->bwhnm', q, k, preferred_element_type=wide)
        logits = logits * (size // self.heads) ** -0.5
        logits = logits + jnp.moveaxis(table[relative_places(side)], -1, 0)
        if shift:
            near = _regions(height, width, side, shift)[None, :, None]
            logits = jnp.where(near, logits, jnp.finfo(logits.dtype).min)
        maps = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
        found = jnp.einsum('bwhnm,bwmhd->bwnhd', maps, v).reshape(y.shape)
        return self._dense(size, 'proj')(found)

    def _dense(self, size: int, name: str) -> nn.Dense:
        return nn.Dense(size, dtype=self.dtype, name=name)


class Windows(nn.Module):
    """`depth` window blocks at a width of their own, between projections."""

    of: SwinUNet

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        of = self.of
        y = conv(ADM, of.width, 1, x, of.dtype, 'embed')
        block = nn.remat(WindowBlock) if of.remat else WindowBlock
        for i in range(of.depth):
            shift = of.window // 2 if i % 2 else 0
            y = block(
                of.width // of.head_size, of.window, shift, of.ratio, of.dtype, name=f'blocks_{i}'
            )(y)  # fmt: skip
        return conv(ADM, x.shape[-1], 1, y, of.dtype, 'unembed')


class SwinUNet(nn.Module):
    """F(t, x, low) like x [B, H, W, C]: what the picture is; defaults are those for real pictures.

    118,593,583 parameters for x and low of [64, 64, 3]. The first block of each level attends, on
    the way down, in the middle and on the way up. Features: `level0`, ..., at the end of each level
    on the way down, and `middle`.

    Attributes:
      channels: width, in units of which are the `multipliers` of the levels, each of half the side
        of the one before.
      blocks: residual blocks of a level; one more on the way up.
      width: of attention.
      head_size: width of a head.
      depth: window blocks where there is attention.
      window: side of a window, in pixels of its level.
      ratio: of hidden units to the width.
      extracted: channels of the first of the convolutions that halve a `low` larger than x.
      dropout: rate in residual blocks.
      remat: blocks are computed again for the gradient.
      dtype: compute type; parameters are float32, the output has the type of x.
    """

    channels: Count = 160
    multipliers: tuple[Count, ...] = (1, 2, 2, 4)
    blocks: Count = 2
    width: Count = 192
    head_size: Count = 32
    depth: Count = 2
    window: Count = 8
    ratio: Positive = 4.0
    extracted: Count = 16
    dropout: Decay = 0.0
    remat: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, t: jax.Array, x: jax.Array, low: jax.Array, *, train: bool = False
    ) -> jax.Array:
        """What the picture is.

        Args:
          t: [B], numbers of steps.
          x: noised pictures, or latents.
          low: [B, h, w, 3], of the side of x, or 2, 4, 8, ... times it.
          train: whether dropout acts.

        Raises:
          ValueError: sides that do not divide.
        """
        self._check(x, low)
        waves = timestep_features(t, self.channels).astype(self.dtype)
        embedding = nn.silu(dense(ADM, 4 * self.channels, waves, self.dtype, 'time_0'))
        # Blocks take it behind its activation.
        embedding = nn.silu(dense(ADM, 4 * self.channels, embedding, self.dtype, 'time_2'))
        y = jnp.concatenate([x.astype(self.dtype), self._extract(low, x.shape[1])], axis=-1)
        y = conv(ADM, self.channels * self.multipliers[0], 3, y, self.dtype, 'conv_in')
        y, skips = self._down(y, embedding, train)
        y = self._block('middle_0', y.shape[-1], y, embedding, train)
        y = self._windows('middle_windows', y)
        y = Features(name='middle')(self._block('middle_2', y.shape[-1], y, embedding, train))
        y = self._up(y, skips, embedding, train)
        y = nn.silu(norm(y, 1e-5, self.dtype, 'norm_out'))
        return conv(ADM, x.shape[-1], 3, y, self.dtype, 'conv_out').astype(x.dtype)

    def _down(self, y, embedding, train):
        skips = [y]
        for level, multiplier in enumerate(self.multipliers):
            for i in range(self.blocks):
                name = f'down{level}_{i}'
                y = self._block(name, self.channels * multiplier, y, embedding, train)
                if i == 0:
                    y = self._windows(f'{name}_windows', y)
                if i == self.blocks - 1:
                    y = Features(name=f'level{level}')(y)
                skips.append(y)
            if level < len(self.multipliers) - 1:
                y = self._halved(y, y.shape[-1], f'down{level}_half')
                skips.append(y)
        return y, skips

    def _up(self, y, skips, embedding, train):
        for level, multiplier in reversed(list(enumerate(self.multipliers))):
            for i in range(self.blocks + 1):
                name = f'up{level}_{i}'
                y = jnp.concatenate([y, skips.pop()], axis=-1)
                y = self._block(name, self.channels * multiplier, y, embedding, train)
                if i == 0:
                    y = self._windows(f'{name}_windows', y)
            if level:
                y = conv(
                    ADM, y.shape[-1], 3, resample(y, 'up'), self.dtype, f'up{level}_double'
                )  # fmt: skip
        return y

    def _block(self, name, width, y, embedding, train):
        block = nn.remat(Block, static_argnums=(3,)) if self.remat else Block
        return block(width, ADM, dropout=self.dropout, dtype=self.dtype, name=name)(
            y, embedding, train
        )

    def _windows(self, name, y):
        return Windows(self.clone(parent=None, name=None), name=name)(y)

    def _halved(self, y: jax.Array, width: int, name: str) -> jax.Array:
        begin: Any = ADM.kernel
        return nn.Conv(
            width, (3, 3), 2, padding=1, dtype=self.dtype, kernel_init=begin, name=name
        )(y)  # fmt: skip

    def _extract(self, low: jax.Array, side: int) -> jax.Array:
        y, width, number = low.astype(self.dtype), self.extracted, 0
        while y.shape[1] > side:
            y = nn.silu(conv(ADM, width, 3, y, self.dtype, f'extract{number}'))
            width *= 2
            y = self._halved(y, width, f'extract{number}_half')
            number += 1
        return y

    def _check(self, x: jax.Array, low: jax.Array) -> None:
        """Raises ValueError for sides that do not fit."""
        deepest = 2 ** (len(self.multipliers) - 1)
        for side, other in zip(x.shape[1:3], low.shape[1:3], strict=True):
            ratio = other // side
            if side % deepest or ratio * side != other or ratio & (ratio - 1):
                raise ValueError(
                    f'SwinUNet with {len(self.multipliers)} levels needs sides divisible by '
                    f'{deepest} and a low picture of 1, 2, 4, ... times these, got {x.shape[1:3]} '
                    f'and {low.shape[1:3]}.'
                )
        sides = [(x.shape[1] >> i, x.shape[2] >> i) for i in range(len(self.multipliers))]
        for height, width in sides:
            whole = min(height, width) <= self.window
            side = min(height, width) if whole else self.window
            if height % side or width % side:
                raise ValueError(
                    f'SwinUNet attends in windows of {side} pixels, which do not divide '
                    f'{height}x{width}; pad the picture.'
                )
