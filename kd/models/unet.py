"""Magnitude-preserving UNet with two times: the EDM2 network as a flow map."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from kd.models.attention import attend
from kd.models.conditioning import TimeWeight, class_features, positional_embedding, velocity_inputs
from kd.models.magnitude_preserving import MPConv, MPDense, mp_concat, mp_silu, mp_sum, unit_norm
from kd.ranges import Count, Decay, Positive, Size

__all__ = ['UNet', 'resample']

# Balances and clipping of the EDM2 configuration G.
_RESIDUAL_BALANCE = 0.3
_ATTENTION_BALANCE = 0.3
_CLIP = 256.0


class Block(nn.Module):
    """Residual block with optional self-attention, [B, H, W, C] -> [B, H', W', features].

    Encoder blocks change the channels first and normalise each pixel; decoder blocks change them
    last. `resample` is 'keep', 'down' (2x2 mean) or 'up' (nearest).
    """

    features: int
    encoder: bool
    resample: str = 'keep'
    attention: bool = False
    channels_per_head: int = 64
    dropout: float = 0.0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, embedding: jax.Array, train: bool) -> jax.Array:
        x = resample(x, self.resample)
        widen = x.shape[-1] != self.features
        if self.encoder:
            if widen:
                x = MPConv(self.features, 1, self.dtype, name='skip')(x)
            x = unit_norm(x, -1)
        y = MPConv(self.features, 3, self.dtype, name='conv0')(mp_silu(x))
        gain = self.param('embedding_gain', nn.initializers.zeros, ())
        scale = MPDense(self.features, self.dtype, name='embedding')(embedding, gain) + 1.0
        y = mp_silu(y * scale[:, None, None])
        y = nn.Dropout(self.dropout)(y, deterministic=not train)
        y = MPConv(self.features, 3, self.dtype, name='conv1')(y)
        if not self.encoder and widen:
            x = MPConv(self.features, 1, self.dtype, name='skip')(x)
        x = mp_sum(x, y, _RESIDUAL_BALANCE)
        if self.attention:
            x = mp_sum(x, self._attend(x), _ATTENTION_BALANCE)
        return jnp.clip(x, -_CLIP, _CLIP)

    def _attend(self, x: jax.Array) -> jax.Array:
        batch, height, width, channels = x.shape
        heads = max(1, channels // self.channels_per_head)
        qkv = MPConv(3 * channels, 1, self.dtype, name='qkv')(x)
        qkv = unit_norm(qkv.reshape(batch, height * width, 3, heads, channels // heads), -1)
        y = attend(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
        return MPConv(channels, 1, self.dtype, name='projection')(y.reshape(x.shape))


class UNet(nn.Module):
    """v(s, t, x) for images; exactly zero at initialisation (zero output gain).

    Times enter as (s, t - s), each through a positional embedding and a linear layer, joined by a
    magnitude-preserving sum. Pass the parameters through
    `kd.models.magnitude_preserving.normalize_weights` after every optimiser step. Every layer has
    a forward-mode derivative. Dropout needs the 'dropout' key and acts only with train=True; keep
    it off in branches that are differentiated in time.

    Sources: Karras et al., arXiv 2312.02696 (network); Boffi et al., arXiv 2505.18825 (two times).

    Attributes:
      channels: width of the first level, before its multiplier.
      multipliers: width of each level in units of `channels`; each level halves the resolution.
      blocks: residual blocks of a level.
      attention: image sizes (heights) at which blocks attend; the bottleneck always does.
      dropout: rate inside the residual blocks.
      data_scale: standard deviation of the data; input is divided, output multiplied by it.
      num_classes: None for unconditional networks.
      time_weight: channels of the learned log-variance w(s, t) that is initialised beside the
        network (see `kd.models.conditioning.log_variance`); 0 for none.
      channels_per_head: of the attention.
      dtype: compute type; parameters are float32, the velocity has the type of x.
    """

    channels: Count = 128
    multipliers: tuple[Count, ...] = (2, 2, 2)
    blocks: Count = 4
    attention: tuple[Count, ...] = (16,)
    dropout: Decay = 0.0
    data_scale: Positive = 0.5
    num_classes: Count | None = None
    time_weight: Size = 0
    channels_per_head: Count = 64
    dtype: Dtype = jnp.float32

    def example_inputs(self, spec) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes of a batch of one, from those of one example by name."""
        return velocity_inputs(spec)

    @nn.compact
    def __call__(
        self,
        s: jax.Array,
        t: jax.Array,
        x: jax.Array,
        *,
        label: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Velocity [B, H, W, C] like x from times [B], images [B, H, W, C] and labels int [B]."""
        if self.time_weight and self.is_initializing():
            TimeWeight(self.time_weight, name='time_weight')(s, t)
        factor = 2 ** (len(self.multipliers) - 1)
        if x.shape[1] % factor or x.shape[2] % factor:
            raise ValueError(
                f'UNet with {len(self.multipliers)} levels needs image sides divisible by '
                f'{factor}, got {x.shape[1]}x{x.shape[2]}; use fewer multipliers or pad.'
            )
        embedding = self._embedding(s, t, label)
        hidden = (x / self.data_scale).astype(self.dtype)
        # A constant channel takes the place of biases.
        hidden = jnp.concatenate([hidden, jnp.ones_like(hidden[..., :1])], axis=-1)
        hidden, skips = self._encode(hidden, embedding, train)
        hidden = self._decode(hidden, skips, embedding, train)
        gain = self.param('out_gain', nn.initializers.zeros, ())
        out = MPConv(x.shape[-1], 3, self.dtype, name='out')(hidden, gain)
        return out.astype(x.dtype) * self.data_scale

    def _embedding(self, s: jax.Array, t: jax.Array, label: jax.Array | None) -> jax.Array:
        size = self.channels * max(self.multipliers)
        positions = self.channels * self.multipliers[0]
        start, jump = (
            MPDense(size, self.dtype, name=name)(positional_embedding(time, positions))
            for name, time in (('start', s), ('jump', t - s))
        )
        embedding = mp_sum(start, jump)
        classes = class_features(label, self.num_classes, s.shape[0], self.dtype)
        if classes is not None:
            embedding = mp_sum(embedding, MPDense(size, self.dtype, name='label')(classes))
        return mp_silu(embedding)

    def _block(self, features, encoder, name, x, embedding, train, *, resample='keep', attend=None):
        size = {'keep': x.shape[1], 'down': x.shape[1] // 2, 'up': x.shape[1] * 2}[resample]
        return Block(
            features=features,
            encoder=encoder,
            resample=resample,
            attention=size in self.attention if attend is None else attend,
            channels_per_head=self.channels_per_head,
            dropout=self.dropout,
            dtype=self.dtype,
            name=name,
        )(x, embedding, train)

    def _encode(self, x, embedding, train):
        skips = []
        for level, multiplier in enumerate(self.multipliers):
            if level == 0:
                x = MPConv(self.channels * multiplier, 3, self.dtype, name='in')(x)
            else:
                x = self._block(
                    x.shape[-1], True, f'down{level}', x, embedding, train,
                    resample='down', attend=False,
                )  # fmt: skip
            skips.append(x)
            for block in range(self.blocks):
                features, name = self.channels * multiplier, f'encoder{level}_{block}'
                x = self._block(features, True, name, x, embedding, train)
                skips.append(x)
        return x, skips

    def _decode(self, x, skips, embedding, train):
        for level, multiplier in reversed(list(enumerate(self.multipliers))):
            if level == len(self.multipliers) - 1:
                width = x.shape[-1]
                x = self._block(width, False, 'middle0', x, embedding, train, attend=True)
                x = self._block(width, False, 'middle1', x, embedding, train, attend=False)
            else:
                x = self._block(
                    x.shape[-1], False, f'up{level}', x, embedding, train,
                    resample='up', attend=False,
                )  # fmt: skip
            for block in range(self.blocks + 1):
                features, name = self.channels * multiplier, f'decoder{level}_{block}'
                x = mp_concat(x, skips.pop())
                x = self._block(features, False, name, x, embedding, train)
        return x


def resample(x: jax.Array, mode: str) -> jax.Array:
    """Images [B, H, W, C]: 'down' halves sides (2x2 mean), 'up' doubles them (nearest)."""
    if mode == 'down':
        batch, height, width, channels = x.shape
        return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean((2, 4))
    if mode == 'up':
        return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    return x
