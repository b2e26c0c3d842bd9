"""Diffusion transformer with two times, as a flow map."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype

from kd.models.attention import attend
from kd.models.conditioning import TimeWeight, class_features, positional_embedding, velocity_inputs
from kd.models.stack import Layout, branches_there, check_names
from kd.ranges import Count, Decay, Positive, Size

__all__ = ['BRANCHES', 'Block', 'DiT', 'grid_embedding']

# What a block adds to its tokens, in this order; gates have an entry for each.
BRANCHES = ('attention', 'mlp')
LAYOUT = Layout(
    modules=dict(qkv='attention', q_norm='attention', k_norm='attention', projection='attention',
                 mlp0='mlp', mlp1='mlp'),
    modulations=dict(modulation=('attention',) * 3 + ('mlp',) * 3),
)  # fmt: skip
# Of a block whose MLP is a linear map.
LINEAR = Layout(
    {name: of for name, of in LAYOUT.modules.items() if of != 'mlp'} | dict(mlp_linear='mlp'),
    dict(modulation=('attention',) * 3),
)


def grid_embedding(height: int, width: int, size: int, span: float | None = None) -> jax.Array:
    """Fixed sine-cosine embedding of a grid of patches, [height * width, size] float32.

    The first half of the features encodes the column, the second the row, each by sines and then
    cosines: the order of the released weights of DiT (arXiv:2212.09748) and MAE (arXiv:2111.06377).
    Places are whole numbers, or with a span they lie evenly in [0, span).
    """
    if size % 4:
        raise ValueError(f'grid_embedding: size={size}, expected a multiple of 4.')
    frequency = 1e4 ** (-np.arange(size // 4) / (size // 4))

    def along(count: int) -> np.ndarray:
        angle = np.outer(np.arange(count) * (1 if span is None else span / count), frequency)
        return np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)

    # Tables of one axis each: what is compiled holds no table of all patches.
    shape = (height, width, size // 2)
    columns = jnp.broadcast_to(along(width), shape)
    rows = jnp.broadcast_to(along(height)[:, None], shape)
    return jnp.concatenate([columns, rows], axis=-1).reshape(height * width, size)


class Block(nn.Module):
    """Transformer block modulated by the condition, [B, N, D] -> [B, N, D]; starts as identity.

    Attributes:
      heads, mlp_ratio, dropout, qk_norm, fused, dtype: as in `DiT`.
      branches: those that there are, of `BRANCHES`.
      linear: where linear maps are, as of `DiT`: 'mlp', 'after'.
    """

    heads: int
    mlp_ratio: int
    dropout: float
    qk_norm: bool
    fused: bool
    dtype: Dtype
    branches: tuple[str, ...] = BRANCHES
    linear: tuple[str, ...] = ()

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        condition: jax.Array,
        train: bool = False,
        *,
        gates: jax.Array | None = None,
        edit: Callable[[jax.Array], jax.Array] | None = None,
    ) -> jax.Array:
        """Tokens from tokens and the condition [B, D].

        Args:
          x: tokens.
          condition: of each example.
          train: whether dropout acts.
          gates: [2], what the branches (see `BRANCHES`) are multiplied by; None for ones.
          edit: of the attention's maps, see `kd.models.attention.attend`.
        """
        told = [branch for branch in self.branches if branch not in self.linear]
        gated = dict(zip(BRANCHES, (1, 1) if gates is None else gates, strict=True))
        parts = self._modulation(condition, len(told), x.shape[-1])
        for branch in self.branches:
            if branch in self.linear:
                x = x + gated[branch] * self._linear(x, 'mlp_linear')
                continue
            shift, scale, gate = parts[3 * told.index(branch) :][:3]
            if gates is not None:
                gate = gated[branch].astype(gate.dtype) * gate
            hidden = _norm(x, self.dtype) * (1.0 + scale) + shift
            if branch == 'attention':
                x = x + gate * self._attend(hidden, edit)
            else:
                x = x + gate * self._mlp(hidden, train)
        return x + self._linear(x, 'after') if 'after' in self.linear else x

    def _modulation(self, condition: jax.Array, branches: int, size: int) -> list[jax.Array]:
        """Shift, scale and gate of each branch, [B, 1, D]."""
        if not branches:
            return []
        modulation = nn.Dense(
            3 * branches * size,
            dtype=self.dtype,
            kernel_init=nn.initializers.zeros,
            name='modulation',
        )(nn.silu(condition))[:, None]
        return jnp.split(modulation, 3 * branches, axis=-1)

    def _mlp(self, x: jax.Array, train: bool) -> jax.Array:
        size = x.shape[-1]
        hidden = nn.gelu(nn.Dense(self.mlp_ratio * size, dtype=self.dtype, name='mlp0')(x))
        hidden = nn.Dropout(self.dropout)(hidden, deterministic=not train)
        return nn.Dense(size, dtype=self.dtype, name='mlp1')(hidden)

    def _linear(self, x: jax.Array, name: str) -> jax.Array:
        zeros = nn.initializers.zeros
        return nn.Dense(x.shape[-1], dtype=self.dtype, kernel_init=zeros, name=name)(x)

    def _attend(self, x: jax.Array, edit: Callable[[jax.Array], jax.Array] | None) -> jax.Array:
        batch, length, size = x.shape
        qkv = nn.Dense(3 * size, dtype=self.dtype, name='qkv')(x)
        q, k, v = jnp.split(qkv.reshape(batch, length, 3 * self.heads, -1), 3, axis=2)
        if self.qk_norm:
            q = nn.RMSNorm(dtype=self.dtype, name='q_norm')(q)
            k = nn.RMSNorm(dtype=self.dtype, name='k_norm')(k)
        y = attend(q, k, v, fused=self.fused, edit=edit)
        return nn.Dense(size, dtype=self.dtype, name='projection')(y.reshape(x.shape))


class _Embed(nn.Module):
    """Tokens and condition of the times, images and labels; see `DiT`, whose scope it shares."""

    patch: int
    width: int
    data_scale: float
    num_classes: int | None
    time_weight: int
    dtype: Dtype

    @nn.compact
    def __call__(
        self, s: jax.Array, t: jax.Array, x: jax.Array, label: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        if self.time_weight and self.is_initializing():
            TimeWeight(self.time_weight, name='time_weight')(s, t)
        batch, height, width, channels = x.shape
        rows, columns = height // self.patch, width // self.patch
        tokens = (x / self.data_scale).astype(self.dtype)
        tokens = tokens.reshape(batch, rows, self.patch, columns, self.patch, channels)
        tokens = tokens.swapaxes(2, 3).reshape(batch, rows * columns, -1)
        tokens = nn.Dense(self.width, dtype=self.dtype, name='patches')(tokens)
        tokens = tokens + grid_embedding(rows, columns, self.width).astype(self.dtype)
        return tokens, self._condition(s, t, label)

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


class _Head(nn.Module):
    """Velocity like x of tokens and condition; see `DiT`, whose scope it shares."""

    patch: int
    data_scale: float
    dtype: Dtype

    @nn.compact
    def __call__(self, tokens: jax.Array, condition: jax.Array, x: jax.Array) -> jax.Array:
        batch, height, width, channels = x.shape
        modulation = nn.Dense(
            2 * tokens.shape[-1],
            dtype=self.dtype,
            kernel_init=nn.initializers.zeros,
            name='modulation',
        )(nn.silu(condition))[:, None]
        shift, scale = jnp.split(modulation, 2, axis=-1)
        out = nn.Dense(
            self.patch**2 * channels,
            dtype=self.dtype,
            kernel_init=nn.initializers.zeros,
            name='out',
        )(_norm(tokens, self.dtype) * (1.0 + scale) + shift)
        rows, columns = height // self.patch, width // self.patch
        out = out.reshape(batch, rows, columns, self.patch, self.patch, channels)
        return out.swapaxes(2, 3).reshape(x.shape).astype(x.dtype) * self.data_scale


class DiT(nn.Module):
    """v(s, t, x) for images; exactly zero at initialisation (zero last layer).

    Patches, fixed grid embedding, blocks modulated by the sum of the embeddings of s, t - s and
    the class (adaptive layer norm, zero-initialised gates). Every layer has a forward-mode
    derivative. Dropout needs the 'dropout' key and acts only with train=True.

    It is `head` after the blocks after `embed`, which are methods to `apply`:

        tokens, condition = network.apply(variables, s, t, x, method='embed')
        for layer in range(network.depth):
            tokens = network.apply(variables, layer, tokens, condition, method='block')
        velocity = network.apply(variables, tokens, condition, x, method='head')

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
      qk_norm: normalises queries and keys, which bounds the logits, hence the derivatives in time;
        the released networks do without.
      fused: attention by a fused kernel where there is one; it has no forward-mode derivative.
      dropped: what is not there, blocks and branches by name: 'block3', 'block5/mlp'. Names of the
        others stay. A block that is not there is the identity.
      linear: where linear maps l are, by name: 'block5/mlp', x + l(x) in place of the branch;
        'block5', x + l(x) after the block. They are zero at the start.
      dtype: compute type; parameters are float32, the velocity has the type of x.
    """

    patch: Count = 2
    width: Count = 384
    depth: Count = 12
    heads: Count = 6
    mlp_ratio: Count = 4
    dropout: Decay = 0.0
    data_scale: Positive = 0.5
    num_classes: Count | None = None
    time_weight: Size = 0
    qk_norm: bool = True
    fused: bool = False
    dropped: tuple[str, ...] = ()
    linear: tuple[str, ...] = ()
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        if self.width % self.heads:
            raise ValueError(f'DiT: width {self.width} is not divisible by {self.heads} heads.')
        self.embedding = _Embed(
            self.patch,
            self.width,
            self.data_scale,
            self.num_classes,
            self.time_weight,
            self.dtype,
        )
        self.last = _Head(self.patch, self.data_scale, self.dtype)
        # Their parameters are the network's own.
        nn.share_scope(self, self.embedding)
        nn.share_scope(self, self.last)
        there = branches_there(self.blocks, self.dropped)
        check_names(self.linear, dict.fromkeys(there, ('mlp',)))
        for name in there:
            setattr(self, name, self.block_of(name))

    @property
    def blocks(self) -> dict[str, tuple[str, ...]]:
        """{block: its branches} of the network of which nothing is dropped, in order."""
        return {f'block{layer}': BRANCHES for layer in range(self.depth)}

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """See `kd.models.stack`, as of all that follows."""
        return {name: (name,) for name in branches_there(self.blocks, self.dropped)}

    @property
    def maps(self) -> dict[str, int]:
        """Linear maps of a block."""
        return {'mlp_linear': 0, 'after': 0}

    def layout(self, name: str) -> Layout:
        """Whose parameters are."""
        return LINEAR if f'{name}/mlp' in self.linear else LAYOUT

    def block_of(self, name: str) -> Block:
        """One block, by itself."""
        linear = [of for of in self.linear if of.partition('/')[0] == name]
        return Block(
            self.heads, self.mlp_ratio, self.dropout, self.qk_norm, self.fused, self.dtype,
            branches_there(self.blocks, self.dropped)[name],
            tuple(of.partition('/')[2] or 'after' for of in linear), parent=None,
        )  # fmt: skip

    def call_block(self, apply, name, carry, context, *, gates, train):
        """Tokens after a block."""
        del name
        return apply(carry, context[0], train, gates=gates)

    def entered(self, name, carry):
        """What a block takes of what the one before says."""
        del name
        return carry

    def embedded(self, s, t, x, *, label=None):
        """(tokens, (condition, x))."""
        tokens, condition = self.embed(s, t, x, label=label)
        return tokens, (condition, x)

    def said(self, tokens, context):
        """The velocity."""
        return self.head(tokens, *context)

    def example_inputs(self, spec) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes of a batch of one, from those of one example by name."""
        return velocity_inputs(spec)

    def __call__(
        self,
        s: jax.Array,
        t: jax.Array,
        x: jax.Array,
        *,
        label: jax.Array | None = None,
        train: bool = False,
        gates: jax.Array | None = None,
    ) -> jax.Array:
        """Velocity [B, H, W, C] like x.

        Args:
          s, t: times [B].
          x: images [B, H, W, C].
          label: classes int [B]; None for the null class.
          train: whether dropout acts.
          gates: [depth, 2], what the branches (see `BRANCHES`) of each block are multiplied by;
            None for ones. A block with zeros is the identity.
        """
        tokens, condition = self.embed(s, t, x, label=label)
        for layer in range(self.depth):
            tokens = self.block(
                layer, tokens, condition, train=train, gates=None if gates is None else gates[layer]
            )
        return self.head(tokens, condition, x)

    def embed(
        self,
        s: jax.Array,
        t: jax.Array,
        x: jax.Array,
        *,
        label: jax.Array | None = None,
        train: bool = False,
    ) -> tuple[jax.Array, jax.Array]:
        """Tokens [B, N, width] and condition [B, width], the input of the first block."""
        del train
        if x.shape[1] % self.patch or x.shape[2] % self.patch:
            raise ValueError(
                f'DiT with patch {self.patch} got images of {x.shape[1]}x{x.shape[2]}; '
                'the sides must be divisible by the patch.'
            )
        return self.embedding(s, t, x, label)

    def block(
        self,
        layer: int,
        tokens: jax.Array,
        condition: jax.Array,
        *,
        train: bool = False,
        gates: jax.Array | None = None,
        edit: Callable[[jax.Array], jax.Array] | None = None,
    ) -> jax.Array:
        """Tokens after block `layer`, whose gates are [2]; see `Block`."""
        block = getattr(self, f'block{layer}', None)
        if block is None:
            return tokens
        return block(tokens, condition, train, gates=gates, edit=edit)

    def head(
        self, tokens: jax.Array, condition: jax.Array, x: jax.Array, *, train: bool = False
    ) -> jax.Array:
        """Velocity of the shape and type of x, of the last block's tokens."""
        del train
        return self.last(tokens, condition, x)


def _norm(x: jax.Array, dtype: Dtype) -> jax.Array:
    return nn.LayerNorm(epsilon=1e-6, use_bias=False, use_scale=False, dtype=dtype)(x)
