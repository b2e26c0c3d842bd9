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
import numpy as np
from flax.typing import Dtype, Initializer

from kd.models.attention import attend
from kd.models.unet import resample as resample_boxes
from kd.ranges import Count, Decay, Positive, Size

__all__ = ['PRESETS', 'DhariwalUNet', 'SongUNet', 'preset']

Resample = Literal['keep', 'down', 'up']


@dataclasses.dataclass(frozen=True)
class _Style:
    """In what the blocks of the two networks differ.

    Attributes:
      kernel, last, attention: initialisers of most kernels, of those that end a branch, and of
        queries, keys and values.
      biases: whether biases begin as noise of the size of the kernel.
      adaptive: the embedding scales and shifts; else it is added.
      project: a branch that is resampled has a convolution even where channels agree.
      total: what the sum of two branches is multiplied by.
      epsilon: of the normalisation.
      taps: of the filter of resampling.
    """

    kernel: Initializer
    last: Initializer
    attention: Initializer
    biases: bool
    adaptive: bool
    project: bool
    total: float
    epsilon: float
    taps: tuple[float, ...] = (1, 1)


def _uniform(mode: Literal['fan_in', 'fan_avg'], variance: float) -> Initializer:
    return nn.initializers.variance_scaling(variance, mode, 'uniform')


_ADM = _Style(
    _uniform('fan_in', 1 / 3), nn.initializers.zeros, _uniform('fan_in', 1 / 3),
    biases=True, adaptive=True, project=False, total=1.0, epsilon=1e-5,
)  # fmt: skip


def _bias(style: _Style, inputs: int) -> Initializer:
    """Of a layer whose outputs are sums of so many inputs."""
    if not style.biases:
        return nn.initializers.zeros
    bound = inputs**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -bound, bound
    )


def _conv(style, features, size, x, dtype, name, kernel=None):
    kernel = kernel or style.kernel
    bias = nn.initializers.zeros if kernel is style.last else _bias(style, size**2 * x.shape[-1])
    return nn.Conv(
        features, (size, size), dtype=dtype, kernel_init=kernel, bias_init=bias, name=name
    )(x)


def _dense(style, features, x, dtype, name):
    return nn.Dense(
        features, dtype=dtype, kernel_init=style.kernel, bias_init=_bias(style, x.shape[-1]),
        name=name,
    )(x)  # fmt: skip


def _norm(x, epsilon, dtype, name):
    groups = min(32, x.shape[-1] // 4)
    return nn.GroupNorm(groups, epsilon=epsilon, dtype=dtype, name=name)(x)


def resample(
    x: jax.Array, how: Resample, taps: tuple[float, ...] = (1, 1), pad: int | None = None
) -> jax.Array:
    """Images [B, H, W, C] of half or twice the side.

    With two equal taps means of 2x2 and repetition; in general each channel is convolved with the
    outer product of the taps, normalised to sum 1 (to 4 for 'up'), at stride 2.

    Args:
      x: images.
      how: see above.
      taps: of the filter.
      pad: zeros at each side; None for as many as keep the ratio of the sides at 2.
    """
    if how == 'keep' or tuple(taps) == (1, 1):
        return resample_boxes(x, how)
    line, channels = np.asarray(taps, np.float32) / np.sum(taps), x.shape[-1]
    kernel = np.outer(line, line) * (4 if how == 'up' else 1)
    kernel = np.tile(kernel[:, :, None, None], (1, 1, 1, channels))
    pad = (len(taps) - 1) // 2 if pad is None else pad
    pad, dilation, stride = (len(taps) - 1 - pad, 2, 1) if how == 'up' else (pad, 1, 2)
    return jax.lax.conv_general_dilated(
        x, jnp.asarray(kernel, x.dtype), (stride, stride), [(pad, pad)] * 2, (dilation, dilation),
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'), feature_group_count=channels,
    )  # fmt: skip


class Block(nn.Module):
    """Residual block and attention, [B, H, W, C] -> [B, H', W', features]; 0 heads: none."""

    features: int
    style: _Style
    heads: int = 0
    how: Resample = 'keep'
    dropout: float = 0.0
    fused: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, embedding: jax.Array, train: bool) -> jax.Array:
        style, size = self.style, self.features
        y = nn.silu(_norm(x, style.epsilon, self.dtype, 'norm0'))
        y = _conv(style, size, 3, resample(y, self.how, style.taps), self.dtype, 'conv0')
        told = _dense(style, size * (1 + style.adaptive), embedding, self.dtype, 'affine')
        told = told[:, None, None]
        if style.adaptive:
            scale, shift = jnp.split(told, 2, axis=-1)
            y = _norm(y, style.epsilon, self.dtype, 'norm1') * (scale + 1) + shift
        else:
            y = _norm(y + told, style.epsilon, self.dtype, 'norm1')
        y = nn.Dropout(self.dropout)(nn.silu(y), deterministic=not train)
        y = _conv(style, size, 3, y, self.dtype, 'conv1', style.last)
        wanted = size != x.shape[-1] or (self.how != 'keep' and style.project)
        x = resample(x, self.how, style.taps)
        if wanted:
            x = _conv(style, size, 1, x, self.dtype, 'skip')
        x = (x + y) * style.total
        return (x + self._attend(x)) * style.total if self.heads else x

    def _attend(self, x: jax.Array) -> jax.Array:
        style, (batch, height, width, size) = self.style, x.shape
        qkv = _norm(x, style.epsilon, self.dtype, 'norm2')
        qkv = _conv(style, 3 * size, 1, qkv, self.dtype, 'qkv', style.attention)
        qkv = qkv.reshape(batch, height * width, self.heads, size // self.heads, 3)
        y = attend(qkv[..., 0], qkv[..., 1], qkv[..., 2], fused=self.fused)
        return _conv(style, size, 1, y.reshape(x.shape), self.dtype, 'proj', style.last)


class _UNet(nn.Module):
    """What both networks are; see `SongUNet` and `DhariwalUNet`.

    Attributes:
      channels: width, in units of which are the `multipliers` of the levels, each of half the
        side of the one before, and `embedding_multiplier`.
      blocks: of a level; one more on the way up.
      attention: sides of images at which blocks attend.
      dropout: rate in the blocks.
      num_classes: None for unconditional networks; the null class is this number.
      augment: length of the vector that tells how an image was augmented (arXiv:2206.06676); 0 for
        none. Where none is given it is zeros: an image as it is.
      remat: blocks are computed again for the gradient.
      fused: attention by a fused kernel where there is one.
      dtype: compute type; parameters are float32, the output has the type of x.
    """

    channels: Count = 128
    multipliers: tuple[Count, ...] = (1, 2, 2, 2)
    embedding_multiplier: Count = 4
    blocks: Count = 4
    attention: tuple[Count, ...] = (16,)
    dropout: Decay = 0.1
    num_classes: Count | None = None
    augment: Size = 0
    remat: bool = False
    fused: bool = False
    dtype: Dtype = jnp.float32

    def example_inputs(self, spec) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes of (t [1], x [1, ...])."""
        x = spec['input']
        time = jax.ShapeDtypeStruct((1,), x.dtype)
        return time, jax.ShapeDtypeStruct((1, *x.shape), x.dtype)

    def _classes(self, label: jax.Array | None, batch: int) -> jax.Array | None:
        """[B, num_classes], zeros for the null class; NaN for what is no class."""
        if self.num_classes is None:
            if label is not None:
                raise ValueError('a label was given to an unconditional network; set num_classes.')
            return None
        null = self.num_classes
        index = jnp.broadcast_to(jnp.asarray(null if label is None else label), (batch,))
        known = (index >= 0) & (index <= null)
        return jnp.where(known[:, None], jax.nn.one_hot(index, null, dtype=self.dtype), jnp.nan)

    def _augmented(self, augment: jax.Array | None, batch: int, size: int, kernel: Initializer):
        if not self.augment:
            if augment is not None:
                raise ValueError('an augmentation was told to a network without one; set augment.')
            return jnp.zeros((), self.dtype)
        if augment is None:
            augment = jnp.zeros((batch, self.augment), self.dtype)
        return nn.Dense(
            size, use_bias=False, dtype=self.dtype, kernel_init=kernel, name='map_augment'
        )(augment.astype(self.dtype))

    def _checked(self, x: jax.Array) -> None:
        factor = 2 ** (len(self.multipliers) - 1)
        if x.shape[1] % factor or x.shape[2] % factor:
            raise ValueError(
                f'{type(self).__name__} with {len(self.multipliers)} levels needs image sides '
                f'divisible by {factor}, got {x.shape[1]}x{x.shape[2]}.'
            )

    def _block(self, style, name, features, x, embedding, train, *, heads=0, how='keep'):
        kind = nn.remat(Block, static_argnums=(3,)) if self.remat else Block
        return kind(
            features, style, heads, how, self.dropout, self.fused, self.dtype, name=name
        )(x, embedding, train)  # fmt: skip


def _place(x: jax.Array) -> str:
    return f'{x.shape[1]}x{x.shape[2]}'


class SongUNet(_UNet):
    """F(c, x) for images: DDPM++ as it stands, NCSN++ with the second settings below.

    Attributes, beside those of `_UNet`:
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
    ) -> jax.Array:
        """F [B, H, W, C] of c [B], images, classes int [B] and augmentations [B, augment]."""
        self._checked(x)
        style = _Style(
            _uniform('fan_avg', 1.0), _uniform('fan_avg', 1e-10), _uniform('fan_avg', 0.2),
            biases=False, adaptive=False, project=True, total=0.5**0.5, epsilon=1e-6,
            taps=tuple(self.taps),
        )  # fmt: skip
        embedding = self._embedding(style, t, label, augment)
        y, skips = self._encode(style, x.astype(self.dtype), embedding, train)
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
            y = y + _dense(style, size, told, self.dtype, 'map_label')
        y = y + self._augmented(augment, batch, size, style.kernel)
        for layer in range(2):
            width = self.channels * self.embedding_multiplier
            y = nn.silu(_dense(style, width, y, self.dtype, f'map_layer{layer}'))
        return y

    def _encode(self, style, x, embedding, train):
        y, aside, skips = x, x, []
        for level, multiplier in enumerate(self.multipliers):
            if level == 0:
                y = _conv(style, self.channels, 3, y, self.dtype, f'enc_{_place(y)}_conv')
                skips.append(y)
            else:
                name = f'enc_{y.shape[1] // 2}x{y.shape[2] // 2}'
                y = self._block(style, f'{name}_down', y.shape[-1], y, embedding, train, how='down')
                if self.encoder == 'skip':
                    aside = resample(aside, 'down', style.taps)
                    y = y + _conv(style, y.shape[-1], 1, aside, self.dtype, f'{name}_aux_skip')
                elif self.encoder == 'residual':
                    aside = self._smaller(style, aside, y.shape[-1], f'{name}_aux_residual')
                    y = aside = (y + aside) / 2**0.5
                skips.append(y)
            for block in range(self.blocks):
                name, heads = f'enc_{_place(y)}_block{block}', int(y.shape[1] in self.attention)
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
                    name, width = f'dec_{_place(y)}_in{block}', y.shape[-1]
                    y = self._block(style, name, width, y, embedding, train, heads=int(block == 0))
            else:
                name = f'dec_{y.shape[1] * 2}x{y.shape[2] * 2}_up'
                y = self._block(style, name, y.shape[-1], y, embedding, train, how='up')
            for block in range(self.blocks + 1):
                heads = int(block == self.blocks and y.shape[1] in self.attention)
                name, width = f'dec_{_place(y)}_block{block}', self.channels * multiplier
                y = jnp.concatenate([y, skips.pop()], axis=-1)
                y = self._block(style, name, width, y, embedding, train, heads=heads)
            if self.decoder == 'skip' or level == 0:
                name = f'dec_{_place(y)}_aux'
                out = nn.silu(_norm(y, style.epsilon, self.dtype, f'{name}_norm'))
                out = _conv(style, channels, 3, out, self.dtype, f'{name}_conv', style.last)
                aside = out if aside is None else out + resample(aside, 'up', style.taps)
        return aside


class DhariwalUNet(_UNet):
    """F(c, x) for images: ADM; attributes are those of `_UNet`, a head has 64 channels."""

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
    ) -> jax.Array:
        """F [B, H, W, C] of c [B], images, classes int [B] and augmentations [B, augment]."""
        self._checked(x)
        embedding = self._embedding(t, label, augment)
        y, skips = x.astype(self.dtype), []
        for level, multiplier in enumerate(self.multipliers):
            width = self.channels * multiplier
            if level == 0:
                y = _conv(_ADM, width, 3, y, self.dtype, f'enc_{_place(y)}_conv')
            else:
                name = f'enc_{y.shape[1] // 2}x{y.shape[2] // 2}_down'
                y = self._block(_ADM, name, y.shape[-1], y, embedding, train, how='down')
            skips.append(y)
            for block in range(self.blocks):
                y = self._level(f'enc_{_place(y)}_block{block}', width, y, embedding, train)
                skips.append(y)
        y = self._decode(y, skips, embedding, train)
        y = nn.silu(_norm(y, _ADM.epsilon, self.dtype, 'out_norm'))
        return _conv(_ADM, x.shape[-1], 3, y, self.dtype, 'out_conv', _ADM.last).astype(x.dtype)

    def _level(self, name, width, y, embedding, train):
        heads = width // 64 if y.shape[1] in self.attention else 0
        return self._block(_ADM, name, width, y, embedding, train, heads=heads)

    def _decode(self, y, skips, embedding, train):
        for level, multiplier in reversed(list(enumerate(self.multipliers))):
            if level == len(self.multipliers) - 1:
                name, width = f'dec_{_place(y)}_in', y.shape[-1]
                y = self._block(_ADM, f'{name}0', width, y, embedding, train, heads=width // 64)
                y = self._block(_ADM, f'{name}1', width, y, embedding, train)
            else:
                name = f'dec_{y.shape[1] * 2}x{y.shape[2] * 2}_up'
                y = self._block(_ADM, name, y.shape[-1], y, embedding, train, how='up')
            for block in range(self.blocks + 1):
                y = jnp.concatenate([y, skips.pop()], axis=-1)
                name, width = f'dec_{_place(y)}_block{block}', self.channels * multiplier
                y = self._level(name, width, y, embedding, train)
        return y

    def _embedding(self, t, label, augment):
        steps = jnp.arange(self.channels // 2, dtype=t.dtype) / (self.channels // 2)
        angles = t[:, None] * 1e4**-steps
        y = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1).astype(self.dtype)
        y = y + self._augmented(augment, t.shape[0], self.channels, _ADM.last)
        width = self.channels * self.embedding_multiplier
        y = nn.silu(_dense(_ADM, width, y, self.dtype, 'map_layer0'))
        y = _dense(_ADM, width, y, self.dtype, 'map_layer1')
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
# By name: the network and its arguments. Parameters: 55.7 M, 61.8 M at 64 pixels, ADM 295.9 M.
PRESETS: dict[str, tuple[type[_UNet], dict[str, Any]]] = {
    'cifar10': (SongUNet, _CIFAR),
    'cifar10_conditional': (SongUNet, dict(num_classes=10, **_CIFAR)),
    'cifar10_ve': (SongUNet, dict(**_CIFAR, **_VE)),
    'ffhq64': (SongUNet, dict(augment=9, dropout=0.05)),
    'afhq64': (SongUNet, dict(augment=9, dropout=0.25)),
    'imagenet64': (DhariwalUNet, dict(num_classes=1_000)),
}


def preset(of: str, **changes: Any) -> _UNet:
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
