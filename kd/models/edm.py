"""The networks of EDM: DDPM++ and NCSN++ (`SongUNet`) and ADM (`DhariwalUNet`).

Modules have the names of the released weights, with `enc_32x32_block0` for `enc.32x32_block0`: see
`kd.io.diffusion_names`. They are F of `kd.models.denoiser.denoiser` with `precondition='edm'`.

Sources: Karras et al. 2022, arXiv:2206.00364, appendix F.3 and the released code; Song et al. 2021,
arXiv:2011.13456; Dhariwal and Nichol 2021, arXiv:2105.05233.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from kd.models.edm_parts import ADM, Style, UNetBase, conv, dense, norm, place, resample, uniform
from kd.ranges import Count, Positive

__all__ = ['PRESETS', 'DhariwalUNet', 'SongUNet', 'preset']


class SongUNet(UNetBase):
    """F(c, x) for images: DDPM++ as it stands, NCSN++ with the second settings below.

    Attributes, beside those of `UNetBase`:
      noise: features of c: 'positional' | 'fourier', of random frequencies.
      noise_multiplier: their number in units of `channels`: 1 | 2.
      encoder: 'standard' | 'residual', where smaller copies of the images enter each level; or
        'skip', where these are images.
      decoder: 'standard', or 'skip', where each level has an image of its own.
      taps: of the filter of resampling: (1, 1) | (1, 3, 3, 1).
    """

    noise: Literal['positional', 'fourier'] = 'positional'
    noise_multiplier: Count = 1
    encoder: Literal['standard', 'skip', 'residual'] = 'standard'
    decoder: Literal['standard', 'skip'] = 'standard'
    taps: tuple[Positive, ...] = (1, 1)

    @nn.compact
    def __call__(
        self,
        t: jax.Array,
        x: jax.Array,
        *,
        label: jax.Array | None = None,
        augment: jax.Array | None = None,
        train: bool = False,
        **told: jax.Array,
    ) -> jax.Array:
        """F [B, H, W, C] of c [B], images, classes int [B], augmentations [B, augment], fields."""
        seen = self._seen(x, told)
        style = Style(
            uniform('fan_avg', 1.0), uniform('fan_avg', 1e-10), uniform('fan_avg', 0.2),
            biases=False, adaptive=False, project=True, total=0.5**0.5, epsilon=1e-6,
            taps=tuple(self.taps),
        )  # fmt: skip
        embedding = self._embedding(style, t, label, augment)
        y, skips = self._encode(style, seen, embedding, train)
        return self._decode(style, y, skips, embedding, train, x.shape[-1]).astype(x.dtype)

    def _embedding(self, style, t, label, augment):
        size, batch = self.channels * self.noise_multiplier, t.shape[0]
        if self.noise == 'fourier':
            angles = t[:, None] * 2 * jnp.pi * _Frequencies(size // 2, name='map_noise')()
        else:
            steps = jnp.arange(size // 2, dtype=t.dtype) / (size // 2 - 1)
            angles = t[:, None] * 1e4**-steps
        y = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1).astype(self.dtype)
        classes = self._classes(label, batch)
        if classes is not None:
            told = classes * classes.shape[-1] ** 0.5
            y = y + dense(style, size, told, self.dtype, 'map_label')
        y = y + self._augmented(augment, batch, size, style.kernel)
        for layer in range(2):
            width = self.channels * self.embedding_multiplier
            y = nn.silu(dense(style, width, y, self.dtype, f'map_layer{layer}'))
        return y

    def _encode(self, style, x, embedding, train):
        y, aside, skips = x, x, []
        for level, multiplier in enumerate(self.multipliers):
            if level == 0:
                y = conv(style, self.channels, 3, y, self.dtype, f'enc_{place(y)}_conv')
                skips.append(y)
            else:
                name = f'enc_{y.shape[1] // 2}x{y.shape[2] // 2}'
                y = self._block(style, f'{name}_down', y.shape[-1], y, embedding, train, how='down')
                if self.encoder == 'skip':
                    aside = resample(aside, 'down', style.taps)
                    y = y + conv(style, y.shape[-1], 1, aside, self.dtype, f'{name}_aux_skip')
                elif self.encoder == 'residual':
                    aside = self._smaller(style, aside, y.shape[-1], f'{name}_aux_residual')
                    y = aside = (y + aside) / 2**0.5
                skips.append(y)
            for block in range(self.blocks):
                name, heads = f'enc_{place(y)}_block{block}', int(y.shape[1] in self.attention)
                y = self._block(
                    style, name, self.channels * multiplier, y, embedding, train, heads=heads
                )
                skips.append(y)
        return y, skips

    def _smaller(self, style, x, features, name):
        """Convolution and resampling as one, which pads once, by as much as both need."""
        pad = (len(style.taps) - 1) // 2
        x = nn.Conv(
            features, (3, 3), padding=1 + pad, dtype=self.dtype, kernel_init=style.kernel,
            name=name,
        )(x)  # fmt: skip
        return resample(x, 'down', style.taps, pad=0)

    def _decode(self, style, y, skips, embedding, train, channels):
        aside = None
        for level, multiplier in reversed(list(enumerate(self.multipliers))):
            last = level == len(self.multipliers) - 1
            if last:
                for block in range(2):
                    name, width = f'dec_{place(y)}_in{block}', y.shape[-1]
                    y = self._block(style, name, width, y, embedding, train, heads=int(block == 0))
            else:
                name = f'dec_{y.shape[1] * 2}x{y.shape[2] * 2}_up'
                y = self._block(style, name, y.shape[-1], y, embedding, train, how='up')
            for block in range(self.blocks + 1):
                heads = int(block == self.blocks and y.shape[1] in self.attention)
                name, width = f'dec_{place(y)}_block{block}', self.channels * multiplier
                y = jnp.concatenate([y, skips.pop()], axis=-1)
                y = self._block(style, name, width, y, embedding, train, heads=heads)
            if self.decoder == 'skip' or level == 0:
                name = f'dec_{place(y)}_aux'
                out = nn.silu(norm(y, style.epsilon, self.dtype, f'{name}_norm'))
                out = conv(style, channels, 3, out, self.dtype, f'{name}_conv', style.last)
                aside = out if aside is None else out + resample(aside, 'up', style.taps)
        return aside


class DhariwalUNet(UNetBase):
    """F(c, x) for images: ADM; attributes are those of `UNetBase`."""

    channels: Count = 192
    multipliers: tuple[Count, ...] = (1, 2, 3, 4)
    blocks: Count = 3
    attention: tuple[Count, ...] = (32, 16, 8)

    @nn.compact
    def __call__(
        self,
        t: jax.Array,
        x: jax.Array,
        *,
        label: jax.Array | None = None,
        augment: jax.Array | None = None,
        train: bool = False,
        **told: jax.Array,
    ) -> jax.Array:
        """F [B, H, W, C] of c [B], images, classes int [B], augmentations [B, augment], fields."""
        y, skips = self._seen(x, told), []
        embedding = self._embedding(t, label, augment)
        for level, multiplier in enumerate(self.multipliers):
            width = self.channels * multiplier
            if level == 0:
                y = conv(ADM, width, 3, y, self.dtype, f'enc_{place(y)}_conv')
            else:
                name = f'enc_{y.shape[1] // 2}x{y.shape[2] // 2}_down'
                y = self._block(ADM, name, y.shape[-1], y, embedding, train, how='down')
            skips.append(y)
            for block in range(self.blocks):
                y = self._level(f'enc_{place(y)}_block{block}', width, y, embedding, train)
                skips.append(y)
        y = self._decode(y, skips, embedding, train)
        y = nn.silu(norm(y, ADM.epsilon, self.dtype, 'out_norm'))
        return conv(ADM, x.shape[-1], 3, y, self.dtype, 'out_conv', ADM.last).astype(x.dtype)

    def _level(self, name, width, y, embedding, train):
        heads = width // self.head_channels if y.shape[1] in self.attention else 0
        return self._block(ADM, name, width, y, embedding, train, heads=heads)

    def _decode(self, y, skips, embedding, train):
        for level, multiplier in reversed(list(enumerate(self.multipliers))):
            if level == len(self.multipliers) - 1:
                name, width = f'dec_{place(y)}_in', y.shape[-1]
                heads = width // self.head_channels
                y = self._block(ADM, f'{name}0', width, y, embedding, train, heads=heads)
                y = self._block(ADM, f'{name}1', width, y, embedding, train)
            else:
                name = f'dec_{y.shape[1] * 2}x{y.shape[2] * 2}_up'
                y = self._block(ADM, name, y.shape[-1], y, embedding, train, how='up')
            for block in range(self.blocks + 1):
                y = jnp.concatenate([y, skips.pop()], axis=-1)
                name, width = f'dec_{place(y)}_block{block}', self.channels * multiplier
                y = self._level(name, width, y, embedding, train)
        return y

    def _embedding(self, t, label, augment):
        steps = jnp.arange(self.channels // 2, dtype=t.dtype) / (self.channels // 2)
        angles = t[:, None] * 1e4**-steps
        y = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1).astype(self.dtype)
        y = y + self._augmented(augment, t.shape[0], self.channels, ADM.last)
        width = self.channels * self.embedding_multiplier
        y = nn.silu(dense(ADM, width, y, self.dtype, 'map_layer0'))
        y = dense(ADM, width, y, self.dtype, 'map_layer1')
        classes = self._classes(label, t.shape[0])
        if classes is not None:
            y = y + nn.Dense(
                width, use_bias=False, dtype=self.dtype, kernel_init=nn.initializers.normal(1.0),
                name='map_label',
            )(classes)  # fmt: skip
        return nn.silu(y)


class _Frequencies(nn.Module):
    """Random frequencies, [count], which are not trained."""

    count: int

    @nn.compact
    def __call__(self) -> jax.Array:
        def drawn() -> jax.Array:
            return 16 * jax.random.normal(self.make_rng('params'), (self.count,))

        return self.variable('constants', 'freqs', drawn).value


_CIFAR = dict(multipliers=(2, 2, 2), augment=9, dropout=0.13)
_VE = dict(noise='fourier', noise_multiplier=2, encoder='residual', taps=(1, 3, 3, 1))
_ADM_256 = (1, 1, 2, 2, 4, 4)
# By name: the network and its arguments. Parameters: 55.7 M, 61.8 M at 64 pixels, ADM 295.9 M.
PRESETS: dict[str, tuple[type[UNetBase], dict[str, Any]]] = {
    'cifar10': (SongUNet, _CIFAR),
    'cifar10_conditional': (SongUNet, dict(num_classes=10, **_CIFAR)),
    'cifar10_ve': (SongUNet, dict(**_CIFAR, **_VE)),
    'ffhq64': (SongUNet, dict(augment=9, dropout=0.05)),
    'afhq64': (SongUNet, dict(augment=9, dropout=0.25)),
    'imagenet64': (DhariwalUNet, dict(num_classes=1_000)),
    # ADM's own, without classes and of three outputs: 552.8 M with three channels beside, 93.6 M.
    'adm256': (DhariwalUNet, dict(channels=256, multipliers=_ADM_256, blocks=2)),
    'ffhq256': (
        DhariwalUNet,
        dict(
            channels=128,
            multipliers=_ADM_256,
            blocks=1,
            attention=(16,),
            head_channels=128,
        ),
    ),
}


def preset(of: str, **changes: Any) -> UNetBase:
    """The network that is known as `of`, with changes.

        network=dict(name='kd.models.edm.preset', of='imagenet64', dtype='bfloat16')

    Args:
      of: one of `PRESETS`.
      **changes: attributes of the network.

    Raises:
      ValueError: a name or an attribute that is not there.
    """
    if of not in PRESETS:
        raise ValueError(f"there is no network '{of}' of EDM; known are: {', '.join(PRESETS)}.")
    kind, arguments = PRESETS[of]
    names = [field.name for field in dataclasses.fields(kind) if field.init]
    if unknown := [name for name in changes if name not in names]:
        raise ValueError(f"{kind.__name__} has no '{unknown[0]}'; it has: {', '.join(names)}.")
    return kind(**{**arguments, **changes})
