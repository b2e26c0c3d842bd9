"""Diffusion transformer with two times, as a flow map."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype

from kd.models.attention import attend
from kd.models.conditioning import TimeWeight, class_features, positional_embedding, velocity_inputs

__all__ = ['DiT', 'grid_embedding']


def grid_embedding(height: int, width: int, size: int) -> np.ndarray:
    """Fixed sine-cosine embedding of a grid of patches, [height * width, size] float32.

    Half of the features encode the row, half the column. Source: arXiv 2212.09748.
    """
    if size % 4:
        raise ValueError(f'grid_embedding: size={size}, expected a multiple of 4.')
    frequency = 1e4 ** (-np.arange(size // 4) / (size // 4))
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing='ij')
    angles = [axis.reshape(-1, 1) * frequency for axis in (rows, columns)]
    parts = [f(angle) for angle in angles for f in (np.sin, np.cos)]
    return np.concatenate(parts, axis=1).astype(np.float32)


class Block(nn.Module):
    """Transformer block modulated by the condition, [B, N, D] -> [B, N, D]; starts as identity."""

    heads: int
    mlp_ratio: int
    dropout: float
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array, train: bool) -> jax.Array:
        size = x.shape[-1]
        modulation = nn.Dense(
            6 * size,
            dtype=self.dtype,
            kernel_init=nn.initializers.zeros,
            name='modulation',
        )(nn.silu(condition))[:, None]
        shift0, scale0, gate0, shift1, scale1, gate1 = jnp.split(modulation, 6, axis=-1)
        x = x + gate0 * self._attend(_norm(x, self.dtype) * (1.0 + scale0) + shift0)
        hidden = _norm(x, self.dtype) * (1.0 + scale1) + shift1
        hidden = nn.gelu(nn.Dense(self.mlp_ratio * size, dtype=self.dtype, name='mlp0')(hidden))
        hidden = nn.Dropout(self.dropout)(hidden, deterministic=not train)
        return x + gate1 * nn.Dense(size, dtype=self.dtype, name='mlp1')(hidden)

    def _attend(self, x: jax.Array) -> jax.Array:
        batch, length, size = x.shape
        qkv = nn.Dense(3 * size, dtype=self.dtype, name='qkv')(x)
        q, k, v = jnp.split(qkv.reshape(batch, length, 3 * self.heads, -1), 3, axis=2)
        # Normalised queries and keys bound the logits, hence the derivatives in time.
        q, k = (
            nn.RMSNorm(dtype=self.dtype, name=name)(a) for name, a in (('q_norm', q), ('k_norm', k))
        )
        y = attend(q, k, v)
        return nn.Dense(size, dtype=self.dtype, name='projection')(y.reshape(x.shape))


class DiT(nn.Module):
    """v(s, t, x) for images; exactly zero at initialisation (zero last layer).

    Patches, fixed grid embedding, blocks modulated by the sum of the embeddings of s, t - s and
    the class (adaptive layer norm, zero-initialised gates). Every layer has a forward-mode
    derivative. Dropout needs the 'dropout' key and acts only with train=True.

    Source: Peebles & Xie, arXiv 2212.09748, with a second time and normalised queries and keys.

    Attributes:
      patch: side of a square patch.
      width: of a token, a multiple of 4 and of `heads`.
      depth: blocks.
      heads: of the attention.
      mlp_ratio: hidden units of a block's MLP in units of `width`.
      dropout: rate in the MLPs.
      data_scale: standard deviation of the data; input is divided, output multiplied by it.
      num_classes: None for unconditional networks.
      time_weight: channels of the learned log-variance w(s, t) that is initialised beside the
        network (see `kd.models.conditioning.log_variance`); 0 for none.
      dtype: compute type; parameters are float32, the velocity has the type of x.
    """

    patch: int = 2
    width: int = 384
    depth: int = 12
    heads: int = 6
    mlp_ratio: int = 4
    dropout: float = 0.0
    data_scale: float = 0.5
    num_classes: int | None = None
    time_weight: int = 0
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
        batch, height, width, channels = x.shape
        if height % self.patch or width % self.patch:
            raise ValueError(
                f'DiT with patch {self.patch} got images of {height}x{width}; '
                'the sides must be divisible by the patch.'
            )
        if self.width % self.heads:
            raise ValueError(f'DiT: width {self.width} is not divisible by {self.heads} heads.')
        rows, columns = height // self.patch, width // self.patch
        condition = self._condition(s, t, label)
        tokens = (x / self.data_scale).astype(self.dtype)
        tokens = tokens.reshape(batch, rows, self.patch, columns, self.patch, channels)
        tokens = tokens.swapaxes(2, 3).reshape(batch, rows * columns, -1)
        tokens = nn.Dense(self.width, dtype=self.dtype, name='patches')(tokens)
        tokens = tokens + grid_embedding(rows, columns, self.width).astype(self.dtype)
        for layer in range(self.depth):
            block = Block(
                self.heads, self.mlp_ratio, self.dropout, self.dtype, name=f'block{layer}'
            )
            tokens = block(tokens, condition, train)
        modulation = nn.Dense(
            2 * self.width, dtype=self.dtype, kernel_init=nn.initializers.zeros, name='modulation'
        )(nn.silu(condition))[:, None]
        shift, scale = jnp.split(modulation, 2, axis=-1)
        out = nn.Dense(
            self.patch**2 * channels,
            dtype=self.dtype,
            kernel_init=nn.initializers.zeros,
            name='out',
        )(_norm(tokens, self.dtype) * (1.0 + scale) + shift)
        out = out.reshape(batch, rows, columns, self.patch, self.patch, channels)
        return out.swapaxes(2, 3).reshape(x.shape).astype(x.dtype) * self.data_scale

    def _condition(self, s: jax.Array, t: jax.Array, label: jax.Array | None) -> jax.Array:
        total = jnp.zeros((s.shape[0], self.width), self.dtype)
        for name, time in (('start', s), ('jump', t - s)):
            hidden = positional_embedding(time, self.width).astype(self.dtype)
            hidden = nn.silu(nn.Dense(self.width, dtype=self.dtype, name=f'{name}0')(hidden))
            total = total + nn.Dense(self.width, dtype=self.dtype, name=f'{name}1')(hidden)
        classes = class_features(label, self.num_classes, s.shape[0], self.dtype)
        if classes is not None:
            embed = nn.Dense(self.width, use_bias=False, dtype=self.dtype, name='label')
            total = total + embed(classes)
        return total


def _norm(x: jax.Array, dtype: Dtype) -> jax.Array:
    return nn.LayerNorm(epsilon=1e-6, use_bias=False, use_scale=False, dtype=dtype)(x)
