"""Networks that are told the scale of their guidance, by adapters beside their layers (AGD).

    h' = h + f(h, omega, t, c)

for the output h of every layer that is a target: the attention's in a transformer. The network
itself stays as it is, and without a scale it is what it was. With one, a single call says what
classifier-free guidance says in two.

Source: AGD 2025, arXiv:2503.07274.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kd import config
from kd.models.adapters import GUIDANCE
from kd.models.attention import attend
from kd.models.conditioning import class_features, positional_embedding
from kd.ranges import Count, Positive

Kind = Literal['offset', 'attention', 'mixed']


@dataclasses.dataclass(frozen=True)
class GuidanceAdapter:
    """Which layers have adapters, and of which kind.

    | kind | f, with u = e(omega) + W_t t + W_c c |
    |---|---|
    | offset | W_o norm(relu(W u)), one for all tokens |
    | attention | W_o attention of W_q h over the three of u, as keys and values |
    | mixed | W_o relu(W_h h + W u), ours, for layers without tokens |

    W_o is zero at the start.

    Attributes:
      kind: see above.
      width: H, of u.
      targets: regular expression to be found in the path of a layer, 'block0/projection'.
      multiple: of omega before its encoding; 1000, as released, makes near scales unlike.
    """

    kind: Kind = 'offset'
    width: Count = 256
    targets: str = r'block\d+/projection$'
    multiple: Positive = 1.0


class Encoding(nn.Module):
    """A number as H features: random waves, which stay, and two layers; [B] -> [B, H]."""

    width: int

    @nn.compact
    def __call__(self, value: jax.Array) -> jax.Array:
        rng = np.random.default_rng(self.width)
        frequency, phase = rng.standard_normal(self.width), rng.random(self.width)
        angle = 2 * jnp.pi * (value[:, None] * frequency + phase).astype(jnp.float32)
        hidden = nn.relu(nn.Dense(4 * self.width, name='first')(jnp.cos(angle)))
        return nn.LayerNorm(name='norm')(nn.Dense(self.width, name='second')(hidden))


class Beside(nn.Module):
    """f(h, omega, t, c): [B, ..., d] like h, or with 1 for its tokens."""

    adapter: GuidanceAdapter
    num_classes: int | None

    @nn.compact
    def __call__(
        self, h: jax.Array, guidance: jax.Array, t: jax.Array, label: jax.Array | None
    ) -> jax.Array:
        kind, width = self.adapter.kind, self.adapter.width
        told = [
            Encoding(width, name='encoding')(self.adapter.multiple * guidance),
            nn.Dense(width, name='time')(positional_embedding(t, 32)),
        ]
        classes = class_features(label, self.num_classes, len(h), h.dtype)
        if classes is not None:
            told.append(nn.Dense(width, use_bias=False, name='label')(classes))
        out = nn.Dense(h.shape[-1], kernel_init=nn.initializers.zeros, name='out')
        if kind == 'attention':
            place = positional_embedding(jnp.arange(float(len(told))), width)
            tokens = jnp.stack(told, axis=1) + place
            query = nn.Dense(width, use_bias=False, name='query')(h)[:, :, None]
            key, value = (
                nn.Dense(width, use_bias=False, name=name)(tokens)[:, :, None]
                for name in ('key', 'value')
            )
            return out(attend(query, key, value)[:, :, 0])
        u = nn.Dense(width, name='mix')(sum(told))
        u = u.reshape(len(u), *(1,) * (h.ndim - 2), width)
        if kind == 'mixed':
            return out(nn.relu(nn.Dense(width, use_bias=False, name='hidden')(h) + u))
        return out(nn.LayerNorm(name='norm')(nn.relu(u)))


class Guided(nn.Module):
    """A network v(s, t, x) with adapters, in the parameters of `base` and beside them.

    Attributes:
      base: the network.
      adapter: see `GuidanceAdapter`.
    """

    base: nn.Module
    adapter: GuidanceAdapter

    @property
    def num_classes(self) -> int | None:
        """Of the base."""
        return getattr(self.base, 'num_classes', None)

    @property
    def conditions(self) -> tuple[str, ...]:
        """Fields of a batch that the network is conditioned on."""
        return (*(() if self.num_classes is None else ('label',)), 'guidance')

    def setup(self) -> None:
        nn.share_scope(self, self.base)

    @nn.compact
    def __call__(
        self,
        s: jax.Array,
        t: jax.Array,
        x: jax.Array,
        *,
        label: jax.Array | None = None,
        guidance: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Like the base; `guidance` float [B] is the scale, None leaves the adapters out."""
        if guidance is None:
            if not self.is_initializing():
                return self.base(s, t, x, label=label, train=train)
            guidance = jnp.ones(len(x))

        def beside(call, args, kwargs, context):
            out = call(*args, **kwargs)
            name = '/'.join(context.module.path)
            target = context.method_name == '__call__' and GUIDANCE not in name
            if not target or re.search(self.adapter.targets, name) is None:
                return out
            own = Beside(
                self.adapter,
                self.num_classes,
                parent=self,
                name=GUIDANCE + name.replace('/', '_'),
            )
            return out + own(out, guidance, t, label).astype(out.dtype)

        with nn.intercept_methods(beside):
            return self.base(s, t, x, label=label, train=train)


def guided(
    num_classes: int | None = None,
    *,
    base: Mapping[str, Any],
    kind: Kind = 'offset',
    width: Count = 256,
    targets: str = r'block\d+/projection$',
    multiple: Positive = 1.0,
) -> Guided:
    """The network of a block, told its guidance.

    Args:
      num_classes: of the base.
      base: block of a network v(s, t, x), as of `kd.models.dit.DiT`.
      kind, width, targets, multiple: see `GuidanceAdapter`.
    """
    given = {} if num_classes is None else {'num_classes': num_classes}
    inner = config.build({**base, **given}, where='network.base')
    return Guided(inner, GuidanceAdapter(kind, width, targets, multiple))
