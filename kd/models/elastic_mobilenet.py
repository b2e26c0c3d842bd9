"""MobileNetV3 (Howard et al. 2019, arXiv:1905.02244) and its elastic form (Once for All's)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kd.models import layers
from kd.models.elastic import ConvNorm, Elastic, Group, Live, Norm, live, spend, where_there
from kd.models.elastic_space import Architecture, Choice, Space, module_of
from kd.ranges import Count, Decay
from kd.state import PyTree

# Channels, stride, activation and squeeze-and-excitation of each stage.
STAGES = (
    (24, 2, 'relu', False),
    (40, 2, 'relu', True),
    (80, 2, 'hard_swish', False),
    (112, 1, 'hard_swish', True),
    (160, 2, 'hard_swish', True),
)
STEM, LAST = 16, (960, 1280)


class Depthwise(nn.Module):
    """A depthwise convolution and a norm.

    With `size`, one of the odd sizes from 3 to that of the kernel, it has the middle of the kernel
    instead, mixed by a matrix for each step down: a 5x5 kernel is M times the middle of the 7x7
    one, a 3x3 kernel M' times that of the 5x5 one, matrices that begin as identities and that all
    channels share. Around it are zeros, so that all sizes are one program.
    """

    channels: int
    kernel: int
    stride: int
    elastic: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, count: Live, size: Live) -> jax.Array:
        k, pad = self.kernel, self.kernel // 2
        kernel = self.param('kernel', layers.he_init, (k, k, 1, self.channels))
        small = smaller_kernels(kernel, self._matrices())
        if size is not None:
            for smaller in small:
                around = (k - len(smaller)) // 2
                padded = jnp.pad(smaller, ((around, around),) * 2 + ((0, 0), (0, 0)))
                kernel = jnp.where(size <= len(smaller), padded, kernel)
        y = lax.conv_general_dilated(
            x, kernel.astype(self.dtype), (self.stride,) * 2, ((pad, pad),) * 2,
            feature_group_count=self.channels, dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        )  # fmt: skip
        window = k if size is None else size
        spend(self, y.shape[1] * y.shape[2] * window**2, 1, self.channels, count)
        return Norm(self.dtype, name='norm')(y, train, count)

    def _matrices(self) -> list[jax.Array]:
        if not self.elastic:
            return []
        return [
            self.param(f'to{k}', lambda _, n: jnp.eye(n), k * k)
            for k in range(self.kernel - 2, 2, -2)
        ]


def smaller_kernels(kernel: jax.Array, matrices: list[jax.Array]) -> list[jax.Array]:
    """Kernels [k - 2, k - 2, 1, C], ... of a kernel [k, k, 1, C], see `Depthwise`."""
    made = []
    for matrix in matrices:
        middle = kernel[1:-1, 1:-1]
        flat = middle.reshape(-1, middle.shape[-1])
        kernel = (matrix @ flat).reshape(middle.shape)
        made.append(kernel)
    return made


class InvertedBottleneck(nn.Module):
    """1x1, depthwise and 1x1 convolutions with norms, an activation after the first two.

    Between the last two, where `excite`: x hard_sigmoid(V ReLU(U mean(x))), with a quarter of the
    channels within. The input is added where the shape is the same.
    """

    width: int
    inner: int
    stride: int
    kernel: int
    activation: str
    excite: bool
    elastic: bool
    dtype: Any

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool, inner: Live, squeezed: Live, size: Live
    ) -> jax.Array:
        act = getattr(nn, self.activation)
        expand = ConvNorm(self.inner, 1, dtype=self.dtype, name='expand')
        y = act(expand(x, train, None, inner))
        middle = Depthwise(
            self.inner, self.kernel, self.stride, self.elastic, self.dtype, name='depthwise'
        )
        y = act(middle(y, train, inner, size))
        if self.excite:
            within = layers.divisible(self.inner // 4)
            z = nn.relu(live(nn.Dense(within, name='squeeze')(y.mean((1, 2))), squeezed))
            z = nn.hard_sigmoid(nn.Dense(self.inner, name='excite')(z))
            y = y * z[:, None, None].astype(y.dtype)
            own = within if squeezed is None else squeezed
            spend(self, 2, own, self.inner, inner)
        count = where_there(inner, None if inner is None else self.width)
        y = ConvNorm(self.width, 1, dtype=self.dtype, name='project')(y, train, inner, count)
        return x + y if x.shape == y.shape else y


class MobileNetV3(nn.Module):
    """A 3x3 convolution, inverted bottlenecks in stages, 1x1 convolutions, pooling, a linear head.

    The large one as Once for All has it, with kernels and inner channels block by block.

    Attributes:
      kernels, inner: of each block of each stage.
      num_classes: number of logits.
      resolution: `imagenet` reduces the resolution 32 times; `cifar` leaves out the first two
        strides.
      elastic: whether depthwise kernels have matrices that make smaller ones.
      dropout: of the features.
      stages: channels, stride, activation and whether there is squeeze-and-excitation, of each.
      last: channels before and after the pooling.
      dtype: compute type, head excepted.

    Features: `stem`, `stage1_block0`, ..., `last`, and `features`, the head's input.
    """

    kernels: tuple[tuple[Count, ...], ...]
    inner: tuple[tuple[Count, ...], ...]
    num_classes: Count = 1000
    resolution: str = 'imagenet'
    elastic: bool = False
    dropout: Decay = 0.0
    stages: tuple[tuple[Count, Count, str, bool], ...] = STAGES
    last: tuple[Count, Count] = LAST
    dtype: Any = 'float32'

    def __post_init__(self):
        layers.check_choice('resolution', self.resolution, layers.STEMS)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False, sizes: dict[str, Any] | None = None
    ) -> jax.Array:
        """Images [B, H, W, C] to float32 logits; `sizes` of live channels and kernels."""
        layers.check_rank('MobileNetV3', x, {4: 'images [B, H, W, C]'})
        spared, options = 0 if self.resolution == 'imagenet' else 2, dict(dtype=self.dtype)
        x = x.astype(self.dtype)
        x = ConvNorm(STEM, 3, 1 if spared else 2, name='stem', **options)(x, train)
        x, number = nn.hard_swish(x), 0
        first = Depthwise(STEM, 3, 1, False, self.dtype, name='first')
        y = nn.relu(first(x, train, None, None))
        x = x + ConvNorm(STEM, 1, name='first_project', **options)(y, train)
        for i, (width, stride, activation, excite) in enumerate(self.stages):
            for j, (kernel, inner) in enumerate(zip(self.kernels[i], self.inner[i], strict=True)):
                block = InvertedBottleneck(
                    width, inner, stride if j == 0 and i + 1 >= spared else 1, kernel, activation,
                    excite, self.elastic, self.dtype, name=f'stage{i + 1}_block{j}',
                )  # fmt: skip
                of = (None,) * 3
                if sizes is not None:
                    of = tuple(sizes[name][number] for name in ('inner', 'squeezed', 'kernel'))
                x, number = block(x, train, *of), number + 1
        wide, mixed = self.last
        x = nn.hard_swish(ConvNorm(wide, 1, name='last', **options)(x, train)).mean((1, 2))
        spend(self, 1, wide, mixed, None)
        x = nn.hard_swish(nn.Dense(mixed, use_bias=False, dtype=self.dtype, name='mix')(x))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        spend(self, self.num_classes, 1, mixed, None)
        return layers.classifier(x, self.num_classes)


class ElasticMobileNetV3(Elastic):
    """`MobileNetV3`s of some depths, kernels and expansions, stage by stage and block by block.

    Cai et al. 2019 (Once for All, arXiv:1908.09791); widths are fixed. With the defaults 2.2e19
    networks.

    Attributes:
      depths: choices of the blocks of each stage, `depth` [5].
      kernels: choices of each block, `kernel` [blocks].
      expansions: inner channels over those that enter, `expansion` [blocks].
      num_classes, resolution, dropout, stages, last, dtype: as of `MobileNetV3`.
    """

    depths: tuple[Count, ...] = (2, 3, 4)
    kernels: tuple[Count, ...] = (3, 5, 7)
    expansions: tuple[Count, ...] = (3, 4, 6)
    num_classes: Count = 10
    resolution: str = 'cifar'
    dropout: Decay = 0.0
    stages: tuple[tuple[Count, Count, str, bool], ...] = STAGES
    last: tuple[Count, Count] = LAST
    dtype: Any = 'float32'

    @nn.nowrap
    def space(self) -> Space:
        depths = sorted(set(self.depths))
        blocks = tuple(
            (stage, next(i for i, depth in enumerate(depths) if depth > block))
            for stage in range(len(self.stages))
            for block in range(depths[-1])
        )
        return Space(
            choices=(
                ('depth', Choice.of(self.depths, len(self.stages))),
                ('kernel', Choice.of(self.kernels, len(blocks))),
                ('expansion', Choice.of(self.expansions, len(blocks))),
            ),
            blocks=blocks,
            of_block=('kernel', 'expansion'),
        )

    @nn.nowrap
    def sizes(self, arch: Architecture) -> dict[str, Any]:
        xp, space = module_of(arch), self.space()
        options = {name: choice.options for name, choice in space.choices}
        enters = [
            self.stages[stage][0] if block else (STEM if stage == 0 else self.stages[stage - 1][0])
            for stage in range(len(self.stages))
            for block in range(int(options['depth'][-1]))
        ]
        inner = [[layers.divisible(round(n * e)) for e in options['expansion']] for n in enters]
        squeezed = [[layers.divisible(n // 4) for n in row] for row in inner]
        rows, there = np.arange(len(enters)), space.there(arch)
        return {
            'inner': xp.where(there, xp.asarray(inner)[rows, arch['expansion']], 0),
            'squeezed': xp.asarray(squeezed)[rows, arch['expansion']],
            'kernel': xp.asarray(options['kernel'])[arch['kernel']],
        }

    @nn.nowrap
    def plain(self, arch: Architecture | None = None) -> MobileNetV3:
        sizes = self.sizes(self.space().largest() if arch is None else arch)
        stage = [coordinate for coordinate, _ in self.space().blocks]

        def of(name: str) -> tuple[tuple[int, ...], ...]:
            return tuple(
                tuple(
                    int(value)
                    for value, inner, s in zip(sizes[name], sizes['inner'], stage, strict=True)
                    if inner and s == i
                )
                for i in range(len(self.stages))
            )

        return MobileNetV3(
            kernels=of('kernel'), inner=of('inner'), num_classes=self.num_classes,
            resolution=self.resolution, elastic=arch is None, dropout=self.dropout,
            stages=self.stages, last=self.last, dtype=self.dtype,
        )  # fmt: skip

    @nn.nowrap
    def cut(self, variables: PyTree, arch: Architecture) -> PyTree:
        """Depthwise kernels of the sizes of an architecture."""
        largest = int(max(self.kernels))
        kernels = [int(k) for k in self.sizes(arch)['kernel']]
        params, each = dict(variables['params']), int(max(self.depths))
        for number, size in enumerate(kernels):
            name = f'stage{number // each + 1}_block{number % each}'
            block = dict(params[name])
            middle = dict(block['depthwise'])
            matrices = [middle.pop(f'to{k}') for k in range(largest - 2, 2, -2)]
            made = [middle['kernel'], *smaller_kernels(middle['kernel'], matrices)]
            middle['kernel'] = made[(largest - size) // 2]
            block['depthwise'] = middle
            params[name] = block
        return {**variables, 'params': params}

    @nn.nowrap
    def groups(self) -> tuple[Group, ...]:
        each, made = int(max(self.depths)), []
        for number in range(len(self.space().blocks)):
            at = f'stage{number // each + 1}_block{number % each}'
            outs = [(f'{at}/expand/conv/kernel', 3), (f'{at}/depthwise/kernel', 3)]
            for part in ('expand', 'depthwise'):
                outs += [(f'{at}/{part}/norm/{n}', 0) for n in ('scale', 'bias', 'mean', 'var')]
            outs += [(f'{at}/squeeze/kernel', 0), (f'{at}/excite/kernel', 1)]
            outs += [(f'{at}/excite/bias', 0)]
            made.append(Group(number, tuple(outs), (f'{at}/project/conv/kernel', 2)))
            if self.stages[number // each][3]:
                within = ((f'{at}/squeeze/kernel', 1), (f'{at}/squeeze/bias', 0))
                made.append(Group(number, within, (f'{at}/excite/kernel', 0), 'squeezed'))
        return tuple(made)
