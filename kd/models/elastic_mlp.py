"""A residual perceptron and its elastic form."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

from kd.models import layers
from kd.models.elastic import Elastic, Group, Live, live, spend, where_there
from kd.models.elastic_space import Architecture, Choice, Space, module_of
from kd.ranges import Count


class ResidualMLP(nn.Module):
    """h = ReLU(W x + b), then h + V ReLU(U h + c) + d for each block, and a linear head.

    Attributes:
      width: of h.
      inner: units of each block.
      num_classes: number of logits.

    Features: `stem`, `block0/up`, ..., and `features`, the head's input.
    """

    width: Count = 48
    inner: tuple[Count, ...] = (64, 64, 64)
    num_classes: Count = 10

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False, sizes: dict[str, Any] | None = None
    ) -> jax.Array:
        """Inputs [B, ...], flattened, to logits [B, num_classes]; `sizes` of live units."""
        del train  # The same in training and evaluation.
        width: Live = None if sizes is None else sizes['width']
        x = x.reshape(x.shape[0], -1)
        h = nn.relu(live(_dense(self.width, 'stem')(x), width))
        spend(self, 1, x.shape[-1], self.width, width)
        for i, units in enumerate(self.inner):
            h = _Block(self.width, units, name=f'block{i}')(
                h, width, None if sizes is None else sizes['inner'][i]
            )
        spend(self, self.num_classes, 1, self.width, width)
        return layers.classifier(h, self.num_classes)


class _Block(nn.Module):
    width: int
    units: int

    @nn.compact
    def __call__(self, h: jax.Array, width: Live, units: Live) -> jax.Array:
        y = nn.relu(live(_dense(self.units, 'up')(h), units))
        y = live(_dense(self.width, 'down')(y), where_there(units, width))
        spend(self, 2, self.units if units is None else units, self.width, width)
        return h + y


def _dense(width: int, name: str) -> nn.Dense:
    return nn.Dense(width, kernel_init=nn.initializers.he_normal(), name=name)


class ElasticMLP(Elastic):
    """`ResidualMLP`s of some widths, depths and inner widths; see `kd.models.elastic`.

    With the defaults 117 networks.

    Attributes:
      widths: choices of its width, `width`.
      depths: choices of the number of blocks, `depth`.
      expansions: choices of the units of each block, `expansion`.
      num_classes: number of logits.
    """

    widths: tuple[Count, ...] = (16, 32, 48)
    depths: tuple[Count, ...] = (1, 2, 3)
    expansions: tuple[Count, ...] = (8, 24, 64)
    num_classes: Count = 10

    @nn.nowrap
    def space(self) -> Space:
        blocks, depths = max(self.depths), sorted(set(self.depths))
        return Space(
            choices=(
                ('width', Choice.of(self.widths, 1)),
                ('depth', Choice.of(self.depths, 1)),
                ('expansion', Choice.of(self.expansions, blocks)),
            ),
            blocks=tuple(
                (0, next(i for i, depth in enumerate(depths) if depth > block))
                for block in range(blocks)
            ),
            of_block=('expansion',),
        )

    @nn.nowrap
    def sizes(self, arch: Architecture) -> dict[str, Any]:
        space, xp = self.space(), module_of(arch)
        options = {name: xp.asarray(choice.options) for name, choice in space.choices}
        return {
            'width': options['width'][arch['width'][0]],
            'inner': xp.where(space.there(arch), options['expansion'][arch['expansion']], 0),
        }

    @nn.nowrap
    def plain(self, arch: Architecture | None = None) -> ResidualMLP:
        sizes = self.sizes(self.space().largest() if arch is None else arch)
        inner = tuple(int(n) for n in sizes['inner'] if n)
        return ResidualMLP(int(sizes['width']), inner, self.num_classes)

    @nn.nowrap
    def groups(self) -> tuple[Group, ...]:
        return tuple(
            Group(
                block=i,
                outs=((f'block{i}/up/kernel', 1), (f'block{i}/up/bias', 0)),
                into=(f'block{i}/down/kernel', 0),
            )
            for i in range(max(self.depths))
        )
