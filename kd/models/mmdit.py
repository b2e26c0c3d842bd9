"""Diffusion transformers of text and image tokens together: SD 3 and 3.5, Flux, Qwen-Image.

Modules have the names of `SD3Transformer2DModel` and `FluxTransformer2DModel` of `diffusers`;
equal blocks in a row are one module with a leading axis. Parts are in `kd.models.mmdit_parts`.

Sources: Esser et al. 2024, arXiv:2403.03206; Flux as released; Qwen 2025, arXiv:2508.02324.
"""

from __future__ import annotations

import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype

from kd.models import latent_parts
from kd.models.latent_parts import given, image_inputs, preset_of, sides_of, stacked
from kd.models.mmdit_parts import BRANCHES, PATCH, Block, Embed, Head, SingleBlock
from kd.models.stack import Layout, branches_there
from kd.ranges import Count, Size

__all__ = ['PRESETS', 'SHARDING', 'MMDiT', 'preset']

SHARDING = latent_parts.SHARDING
BLOCKS, SINGLE = 'transformer_blocks', 'single_transformer_blocks'


class MMDiT(nn.Module):
    """F(t, x, ...) like x, for x [B, H, W, C]; defaults are those of Stable Diffusion 3 medium.

    Attributes:
      width, depth, heads: of the transformer; blocks with a text of their own.
      single: blocks after these, over text and tokens as one.
      dual: so many first blocks attend once more (SD 3.5 medium).
      norm: queries and keys are normalised by head.
      context: size of a token of the text.
      text_norm: tokens of the text are normalised first (Qwen-Image).
      masked: the text comes with a mask of its tokens.
      pooled: size of the text as one vector; 0 for none.
      guided: it is told the scale of its guidance (Flux dev).
      table: patches along a side of the table of places; 0 for rotations.
      grid: patches along a side of the images of the table's training.
      axes: features of a head that rotations turn by text, row and column.
      centred: rows and columns count from the middle, and texts from where these end.
      remat: blocks are computed again for the gradient.
      fused: attention by a fused kernel where there is one.
      dropped: what is not there, blocks and branches by name: 'transformer_blocks_3',
        'transformer_blocks_5/context_mlp'. Names of the others stay.
      linear: where linear maps l are, by name: 'transformer_blocks_5/mlp', x + l(x) in place of the
        branch; 'transformer_blocks_5', x + l(x) of tokens and text after the block.
      dtype: compute type; parameters are float32, the output has the type of x.
    """

    width: Count = 1_536
    depth: Count = 24
    heads: Count = 24
    single: Size = 0
    dual: Size = 0
    norm: bool = False
    context: Count = 4_096
    text_norm: bool = False
    masked: bool = False
    pooled: Size = 2_048
    guided: bool = False
    table: Size = 192
    grid: Count = 64
    axes: tuple[Count, ...] = (16, 56, 56)
    centred: bool = False
    remat: bool = False
    fused: bool = False
    dropped: tuple[str, ...] = ()
    linear: tuple[str, ...] = ()
    dtype: Dtype = jnp.float32

    @property
    def conditions(self) -> tuple[str, ...]:
        """Fields of a batch that the network is told."""
        masked, pooled = self.masked * ('mask',), bool(self.pooled) * ('pooled',)
        return ('text', *masked, *pooled, *(self.guided * ('guidance',)))

    def example_inputs(self, spec) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes of (t [1], x [1, ...])."""
        return image_inputs(spec)

    def setup(self) -> None:
        self.embedding = Embed(
            self.width, self.text_norm, self.table, self.grid, self.axes, self.centred, self.dtype
        )
        self.last = Head(self.width, self.table, self.dtype)
        nn.share_scope(self, self.embedding)
        nn.share_scope(self, self.last)
        for group, members in self.groups.items():
            setattr(self, group, self._group(group, members))

    def __call__(
        self,
        t: jax.Array,
        x: jax.Array,
        *,
        text: jax.Array | None = None,
        mask: jax.Array | None = None,
        pooled: jax.Array | None = None,
        guidance: jax.Array | None = None,
        train: bool = False,
        gates: jax.Array | None = None,
    ) -> jax.Array:
        """F [B, H, W, C].

        Args:
          t: what it is told of the noise, [B], 1000 times a time in [0, 1].
          x: noised latents.
          text: [B, M, context], as the text encoders say it.
          mask: bool [B, M], which of these tokens are seen; None for all.
          pooled: [B, pooled], the text as one vector.
          guidance: [B], the scale.
          train: nothing here depends on it.
          gates: [blocks, 3], what the branches of each block are multiplied by; None for ones.

        Raises:
          ValueError: an input that is missing, or of another size.
        """
        del train
        carry, context = self.embedded(t, x, text=text, mask=mask, pooled=pooled, guidance=guidance)
        return self.said(self.through(carry, context, gates), context)

    def through(self, carry: Any, context: Any, gates: jax.Array | None = None) -> Any:
        """What comes of all blocks."""
        names = list(self.blocks)
        for group, members in self.groups.items():
            block, alone = getattr(self, group), (group,) == members
            own = None if gates is None else gates[np.array([names.index(n) for n in members])]
            own = own[0] if alone and own is not None else own
            carry = self.call_block(
                lambda *inputs, gates, block=block: block(*inputs, gates), group, carry, context,
                gates=own, train=False,
            )  # fmt: skip
        return carry

    def _group(self, group: str, members: tuple[str, ...]) -> Any:
        kind, settings, own = self._kind(members[0])
        if (group,) == members:
            return (nn.remat(kind) if self.remat else kind)(*settings, **own)
        inputs = 2 if kind is SingleBlock else 3
        return stacked(
            kind, len(members), self.remat, inputs, gated=True, begins=self.is_initializing()
        )(*settings, **own)

    def _kind(self, name: str) -> tuple[type[nn.Module], tuple[Any, ...], dict[str, Any]]:
        """Class and settings of a block."""
        if name.startswith(SINGLE):
            return SingleBlock, (self.heads, self.fused, self.dtype), {}
        number = int(name.rpartition('_')[2])
        linear = [of for of in self.linear if of.partition('/')[0] == name]
        own = dict(
            dual=number < self.dual,
            last=self.table > 0 and number == self.depth - 1,
            branches=branches_there(self.blocks, self.dropped)[name],
            linear=tuple(of.partition('/')[2] or 'after' for of in linear),
        )
        return Block, (self.heads, self.norm, self.fused, self.dtype), own

    @property
    def blocks(self) -> dict[str, tuple[str, ...]]:
        """{block: its branches} of the network of which nothing is dropped, in order."""
        last = self.depth - 1 if self.table else self.depth
        double = {
            f'{BLOCKS}_{i}': BRANCHES if i < last else BRANCHES[:2] for i in range(self.depth)
        }
        return double | {f'{SINGLE}_{i}': ('block',) for i in range(self.single)}

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """See `kd.models.stack`, as of all that follows.

        Equal blocks in a row lie together, but the last of Stable Diffusion, and one after which
        blocks are dropped.
        """
        there, runs = list(branches_there(self.blocks, self.dropped)), list[list[str]]()
        names, kinds = list(self.blocks), {name: self._kind(name) for name in there}
        alone = {
            name
            for name, after in itertools.pairwise(names)
            if after not in there and after.rpartition('_')[0] == name.rpartition('_')[0]
        }
        for name in there:
            follows = bool(runs) and names.index(name) == names.index(runs[-1][-1]) + 1
            if follows and kinds[runs[-1][-1]] == kinds[name] and name not in alone:
                runs[-1].append(name)
            else:
                runs.append([name])
        made = {}
        for run in runs:
            kind, _, number = run[0].rpartition('_')
            last = kinds[run[0]][2].get('last', False)
            group = kind if number == '0' else f'{kind}_from_{number}'
            made[run[0] if last else group] = tuple(run)
        return made

    @property
    def maps(self) -> dict[str, int]:
        """Linear maps of a block."""
        return {'ff_linear': 0, 'ff_context_linear': 1, 'after': 0, 'after_context': 1}

    def layout(self, name: str) -> Layout:
        """Whose parameters are."""
        if name.startswith(SINGLE):
            return Layout(dict.fromkeys(('norm', 'attn', 'proj_mlp', 'proj_out'), 'block'), {})
        own = self._kind(name)[2]
        modules = dict(attn='attention', attn2='attention')
        norm: tuple[str, ...] = ('attention',) * 3
        norm_context: tuple[str, ...] = ('attention',) * (2 if own['last'] else 3)
        for branch, layer in (('mlp', 'ff'), ('context_mlp', 'ff_context')):
            linear = branch in own['linear']
            modules[f'{layer}_linear' if linear else layer] = branch
            if branch == 'mlp' and not linear:
                norm += ('mlp',) * 3
            elif not linear and not own['last']:
                norm_context += ('context_mlp',) * 3
        norm += ('attention',) * 3 * own['dual']
        return Layout(modules, dict(norm1=norm, norm1_context=norm_context))

    def block_of(self, name: str) -> Any:
        """One block, by itself."""
        kind, settings, own = self._kind(name)
        return kind(*settings, **own, parent=None)

    def call_block(self, apply, name, carry, context, *, gates, train):
        """(tokens, text), or in blocks over both as one, the text before the tokens."""
        del train
        condition, turned, seen = context[:3]
        if not name.startswith(SINGLE):
            return apply(carry, condition, turned, seen, gates=gates)[0]
        return apply(self.entered(name, carry), condition, turned, gates=gates)[0]

    def entered(self, name, carry):
        """What a block takes of what the one before says."""
        return _one(carry) if name.startswith(SINGLE) else carry

    def embedded(self, t, x, *, text=None, mask=None, pooled=None, guidance=None):
        """((tokens, text), what all blocks have)."""
        shapes: dict[str, tuple[int, ...]] = dict(text=(1, self.context))
        shapes |= dict(pooled=(self.pooled,)) if self.pooled else {}
        shapes |= dict(guidance=()) if self.guided else {}
        told = given(self, len(x), shapes, dict(text=text, pooled=pooled, guidance=guidance))
        sides_of(self, x, PATCH)
        carry, context = self.embedding(t, x, told['text'], mask, told['pooled'], told['guidance'])
        return carry, (*context, x)

    def said(self, carry, context):
        """F like x."""
        condition, *_, x = context
        return self.last(self.tokens(carry, x), condition, x)

    def tokens(self, carry: Any, x: jax.Array) -> jax.Array:
        """Those of x, without the text."""
        if not self.single:
            return carry[0]
        count = (x.shape[1] // PATCH[0]) * (x.shape[2] // PATCH[1])
        carry = _one(carry)
        return carry[:, carry.shape[1] - count :]


def _one(carry: Any) -> jax.Array:
    """Text and tokens as one."""
    return jnp.concatenate(carry[::-1], axis=1) if isinstance(carry, tuple) else carry


_FLUX = dict(
    width=3_072, depth=19, heads=24, single=38, norm=True, pooled=768, table=0
)  # fmt: skip
# By name, the arguments of `MMDiT`: billions of parameters 2.03, 2.24, 8.06, 11.89, 11.90, 20.43.
PRESETS: dict[str, dict[str, Any]] = {
    'sd3_medium': {},
    'sd35_medium': dict(dual=13, norm=True, table=384),
    'sd35_large': dict(width=2_432, depth=38, heads=38, norm=True),
    'flux_schnell': _FLUX,
    'flux_dev': dict(guided=True, **_FLUX),
    'qwen_image': dict(
        width=3_072,
        depth=60,
        heads=24,
        norm=True,
        context=3_584,
        text_norm=True,
        masked=True,
        pooled=0,
        table=0,
        centred=True,
    ),
}


def preset(of: str, **changes: Any) -> MMDiT:
    """The network that is known as `of`, with changes.

        network=dict(name='kd.models.mmdit.preset', of='sd3_medium', dtype='bfloat16')

    Args:
      of: one of `PRESETS`.
      **changes: attributes of `MMDiT`.

    Raises:
      ValueError: a name or an attribute that is not there.
    """
    return preset_of(MMDiT, PRESETS, of, changes)
