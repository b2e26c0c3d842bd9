"""Projectors: what brings a student's features to a teacher's, trained beside the student.

They are a part of a state of their own, which is neither evaluated nor exported with the student.
Each takes features [B, ..., C] and `train`; `width`, where it is left out of a config's block, is
that of the teacher's features. `kd.methods.vision.feature_kd` resizes positions itself. `conv` is
of the 3x3 convolutions, as of `kd.models.convnet.ConvNet`: `matmul` for training in a loop on CPU.
"""

from __future__ import annotations

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from kd.losses import feature_maps, numerics
from kd.models import layers
from kd.ranges import Count, Fraction, Positive


class Linear(nn.Module):
    """A linear map of the channels: a 1x1 convolution of maps.

    Attributes:
      width: channels that leave.
      bias: whether there is one.
      initial: of the kernel, 'lecun' (normal) or 'xavier' (uniform).
    """

    width: Count
    bias: bool = True
    initial: Literal['lecun', 'xavier'] = 'lecun'

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        del train
        initial = {'lecun': nn.initializers.lecun_normal, 'xavier': nn.initializers.xavier_uniform}
        kernel = initial[self.initial]()
        return nn.Dense(self.width, use_bias=self.bias, kernel_init=kernel, name='linear')(x)


class ConvNorm(nn.Module):
    """A convolution of maps, a norm, and if wanted a ReLU.

    Attributes:
      width: channels that leave.
      size: of the kernel.
      norm: of `kd.models.layers.norm`.
      relu: whether to end in one: only where the teacher's features are after theirs.
      conv: see the module.
    """

    width: Count
    size: Count = 1
    norm: str = 'batch'
    relu: bool = False
    conv: str = 'direct'

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        x = _conv(self.width, self.size, self.conv, name='conv')(x)
        x = layers.norm(self.norm, train=train, dtype=jnp.float32, name='norm')(x)
        return nn.relu(x) if self.relu else x


class Pair(nn.Module):
    """KDSVD's and FSP's: a linear map of the channels of each of two layers, in one pair.

    Attributes:
      widths: channels that leave, of each; left out of a config's block, those of the teacher's.
    """

    widths: tuple[Count, Count]

    @nn.compact
    def __call__(
        self, first: jax.Array, second: jax.Array, *, train: bool = False
    ) -> tuple[tuple[jax.Array, jax.Array]]:
        del train
        return (
            (
                nn.Dense(self.widths[0], use_bias=False, name='first')(first),
                nn.Dense(self.widths[1], use_bias=False, name='second')(second),
            ),
        )


class Bottleneck(nn.Module):
    """SimKD's and FitNets-style regressor: 1x1, 3x3 and 1x1 convolutions, each with norm and ReLU.

    Attributes:
      width: channels that leave.
      factor: by which the two inner ones are narrower.
      norm: of `kd.models.layers.norm`.
      conv: see the module.

    Source: Chen et al. 2022 (SimKD), arXiv 2203.14001.
    """

    width: Count
    factor: Count = 2
    norm: str = 'batch'
    conv: str = 'direct'

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        inner = max(self.width // self.factor, 1)
        for i, (width, size) in enumerate(((inner, 1), (inner, 3), (self.width, 1))):
            x = _conv(width, size, self.conv, name=f'conv{i}')(x)
            x = layers.norm(self.norm, train=train, dtype=jnp.float32, name=f'norm{i}')(x)
            x = nn.relu(x)
        return x


class Embed(nn.Module):
    """A linear map of the whole feature, scaled to unit length: [B, ...] to [B, width].

    Attributes:
      width: of the embedding.
    """

    width: Count = 128

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        del train
        x = nn.Dense(self.width, name='linear')(x.reshape(x.shape[0], -1))
        length = numerics.norm(x, axis=-1, keepdims=True)
        return x / jnp.where(length > 0, length, 1.0)


class Gaussian(nn.Module):
    """VID's: three 1x1 convolutions to a mean, and a scale by channel that is trained with them.

    Returns the mean [B, ..., width] and the log scale [width] that `variational_information` takes.

    Attributes:
      width: channels that leave.
      variance: at the start, in all channels.
      eps: of that loss.

    Source: Ahn et al. 2019 (VID), arXiv 1904.05835.
    """

    width: Count
    variance: Positive = 5.0
    eps: Positive = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> tuple[jax.Array, jax.Array]:
        del train
        for i in range(2):
            x = nn.relu(nn.Dense(self.width, use_bias=False, name=f'linear{i}')(x))
        mean = nn.Dense(self.width, use_bias=False, name='linear2')(x)
        start = jnp.log(jnp.expm1(self.variance - self.eps))
        scale = self.param('log_scale', nn.initializers.constant(start), (self.width,))
        return mean, scale


class Masked(nn.Module):
    """MGD's: positions of the aligned features are hidden, two 3x3 convolutions generate them.

    Attributes:
      width: channels that leave.
      hidden: the share of positions set to 0 in training; drawn anew by the key of the step.
      conv: see the module.

    Source: Yang et al. 2022 (MGD), arXiv 2205.01529.
    """

    width: Count
    hidden: Fraction = 0.5
    conv: str = 'direct'

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        x = nn.Dense(self.width, name='align')(x)
        if train and self.hidden:
            shape = (*x.shape[:-1], 1)
            kept = jax.random.bernoulli(self.make_rng('dropout'), 1 - self.hidden, shape)
            x = jnp.where(kept, x, 0.0)
        form = layers.CONVS[self.conv]
        x = nn.Conv(self.width, (3, 3), conv_general_dilated=form, name='conv0')(x)
        return nn.Conv(self.width, (3, 3), conv_general_dilated=form, name='conv1')(nn.relu(x))


class Fusion(nn.Module):
    """ReviewKD's, of one level: the level's features fused with those of a deeper level.

    Both are brought to `middle` channels, the deeper to the positions of the level by repetition;
    two attention maps, a sigmoid of both, weigh their sum, and a 3x3 convolution and norm lead to
    the teacher's channels. In the paper a level is fused with what the deeper level's fusion was
    before that last convolution; here with the deeper features themselves.

    Attributes:
      width: channels that leave.
      middle: channels in which the levels are fused.
      norm: of `kd.models.layers.norm`.
      conv: see the module.

    Source: Chen et al. 2021 (ReviewKD), arXiv 2104.09044, attention based fusion.
    """

    width: Count
    middle: Count = 64
    norm: str = 'batch'
    conv: str = 'direct'

    @nn.compact
    def __call__(self, x: jax.Array, deeper: jax.Array, *, train: bool = False) -> jax.Array:
        def brought(x, size, width, name):
            x = _conv(width, size, self.conv, name=f'{name}_conv')(x)
            return layers.norm(self.norm, train=train, dtype=jnp.float32, name=f'{name}_norm')(x)

        x, y = brought(x, 1, self.middle, 'own'), brought(deeper, 1, self.middle, 'deeper')
        y = feature_maps.pooled(y, x.shape[1:-1])
        weights = nn.sigmoid(nn.Dense(2, name='attention')(jnp.concatenate([x, y], -1)))
        x = x * weights[..., :1] + y * weights[..., 1:]
        return brought(x, 3, self.width, 'out')


def _conv(width: int, size: int, form: str, *, name: str) -> nn.Module:
    """A convolution without bias; one of size 1 as a product of matrices, fast also in a loop."""
    if size == 1:
        return nn.Dense(width, use_bias=False, kernel_init=layers.he_init, name=name)
    return layers.conv(width, size, form=form, dtype=jnp.float32, name=name)
