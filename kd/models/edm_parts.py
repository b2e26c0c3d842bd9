"""What the two kinds of networks of EDM have in common; see `kd.models.edm`."""

from __future__ import annotations

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype, Initializer

from kd.models.attention import attend
from kd.models.conditioning import with_fields
from kd.models.unet import resample as resample_boxes
from kd.ranges import Count, Decay, Size

__all__ = [
    *('ADM', 'Block', 'Style', 'UNetBase', 'conv', 'dense', 'norm', 'place', 'resample', 'uniform'),
]

Resample = Literal['keep', 'down', 'up']


@dataclasses.dataclass(frozen=True)
class Style:
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


def uniform(mode: Literal['fan_in', 'fan_avg'], variance: float) -> Initializer:
    """Uniform numbers, see `jax.nn.initializers.variance_scaling`."""
    return nn.initializers.variance_scaling(variance, mode, 'uniform')


ADM = Style(
    uniform('fan_in', 1 / 3), nn.initializers.zeros, uniform('fan_in', 1 / 3),
    biases=True, adaptive=True, project=False, total=1.0, epsilon=1e-5,
)  # fmt: skip


def _bias(style: Style, inputs: int) -> Initializer:
    """Of a layer whose outputs are sums of so many inputs."""
    if not style.biases:
        return nn.initializers.zeros
    bound = inputs**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -bound, bound
    )


def conv(style, features, size, x, dtype, name, kernel=None):
    """A convolution of a style; inside a module."""
    kernel = kernel or style.kernel
    bias = nn.initializers.zeros if kernel is style.last else _bias(style, size**2 * x.shape[-1])
    return nn.Conv(
        features, (size, size), dtype=dtype, kernel_init=kernel, bias_init=bias, name=name
    )(x)


def dense(style, features, x, dtype, name):
    """A dense layer of a style; inside a module."""
    return nn.Dense(
        features, dtype=dtype, kernel_init=style.kernel, bias_init=_bias(style, x.shape[-1]),
        name=name,
    )(x)  # fmt: skip


def norm(x, epsilon, dtype, name):
    """Normalisation of groups of channels; inside a module."""
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
    style: Style
    heads: int = 0
    how: Resample = 'keep'
    dropout: float = 0.0
    fused: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, embedding: jax.Array, train: bool) -> jax.Array:
        style, size = self.style, self.features
        y = nn.silu(norm(x, style.epsilon, self.dtype, 'norm0'))
        y = conv(style, size, 3, resample(y, self.how, style.taps), self.dtype, 'conv0')
        told = dense(style, size * (1 + style.adaptive), embedding, self.dtype, 'affine')
        told = told[:, None, None]
        if style.adaptive:
            scale, shift = jnp.split(told, 2, axis=-1)
            y = norm(y, style.epsilon, self.dtype, 'norm1') * (scale + 1) + shift
        else:
            y = norm(y + told, style.epsilon, self.dtype, 'norm1')
        y = nn.Dropout(self.dropout)(nn.silu(y), deterministic=not train)
        y = conv(style, size, 3, y, self.dtype, 'conv1', style.last)
        wanted = size != x.shape[-1] or (self.how != 'keep' and style.project)
        x = resample(x, self.how, style.taps)
        if wanted:
            x = conv(style, size, 1, x, self.dtype, 'skip')
        x = (x + y) * style.total
        return (x + self._attend(x)) * style.total if self.heads else x

    def _attend(self, x: jax.Array) -> jax.Array:
        style, (batch, height, width, size) = self.style, x.shape
        qkv = norm(x, style.epsilon, self.dtype, 'norm2')
        qkv = conv(style, 3 * size, 1, qkv, self.dtype, 'qkv', style.attention)
        qkv = qkv.reshape(batch, height * width, self.heads, size // self.heads, 3)
        y = attend(qkv[..., 0], qkv[..., 1], qkv[..., 2], fused=self.fused)
        return conv(style, size, 1, y.reshape(x.shape), self.dtype, 'proj', style.last)


class UNetBase(nn.Module):
    """What both networks are; see `SongUNet` and `DhariwalUNet`.

    Attributes:
      channels: width, in units of which are the `multipliers` of the levels, each of half the
        side of the one before, and `embedding_multiplier`.
      blocks: of a level; one more on the way up.
      attention: sides of images at which blocks attend.
      dropout: rate in the blocks.
      num_classes: None for unconditional networks; the null class is this number.
      beside: fields of a batch, like the images, that are further channels of the input: a picture
        of low resolution, for networks of restoration.
      head_channels: of a head of attention, in ADM.
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
    beside: tuple[str, ...] = ()
    head_channels: Count = 64
    augment: Size = 0
    remat: bool = False
    fused: bool = False
    dtype: Dtype = jnp.float32

    @property
    def conditions(self) -> tuple[str, ...]:
        """Fields of a batch that the network is told."""
        return (*self.beside, *(('label',) if self.num_classes is not None else ()))

    def example_inputs(self, spec) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes of (t [1], x [1, ...])."""
        x = spec['input']
        time = jax.ShapeDtypeStruct((1,), x.dtype)
        return time, jax.ShapeDtypeStruct((1, *x.shape), x.dtype)

    def _seen(self, x: jax.Array, told: dict[str, jax.Array]) -> jax.Array:
        """The images and what is beside them, in the compute type."""
        self._checked(x)
        return with_fields(self, x, self.beside, told).astype(self.dtype)

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


def place(x: jax.Array) -> str:
    """The sides of x [B, H, W, C], as names of blocks have them."""
    return f'{x.shape[1]}x{x.shape[2]}'
