"""ResNets of bottlenecks with a deep stem, and their elastic form (Once for All's ResNet-50)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import numpy as np

from kd.models import layers
from kd.models.elastic import ConvNorm, Elastic, Group, Live, spend, where_there
from kd.models.elastic_space import Architecture, Choice, Space, module_of
from kd.ranges import Count, Decay, Positive, Size

STEM, STAGES = 64, (256, 512, 1024, 2048)
BLOCKS = (2, 2, 4, 2)


class Bottleneck(nn.Module):
    """ReLU(shortcut(x) + norm(conv(a(norm(conv(a(norm(conv(x))))))))), convolutions of 1, 3, 1.

    The shortcut is x, or, in the first block of a stage, mean pooling by the stride, a 1x1
    convolution and a norm.
    """

    width: int
    inner: int
    stride: int
    project: bool
    dtype: Any

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool, read: Live = None, inner: Live = None, count: Live = None
    ) -> jax.Array:
        def conv(width, size, stride, name):
            return ConvNorm(width, size, stride, dtype=self.dtype, name=name)

        out = where_there(inner, count)
        y = nn.relu(conv(self.inner, 1, 1, 'conv1')(x, train, read, inner))
        y = nn.relu(conv(self.inner, 3, self.stride, 'conv2')(y, train, inner, inner))
        y = conv(self.width, 1, 1, 'conv3')(y, train, inner, out)
        if self.project:
            if self.stride > 1:
                window = (self.stride, self.stride)
                x = nn.avg_pool(x, window, window, 'SAME', count_include_pad=False)
            x = conv(self.width, 1, 1, 'shortcut')(x, train, read, count)
        return nn.relu(x + y)


class Stage(nn.Module):
    """Bottlenecks of one width; the first has the stride."""

    width: int
    inner: tuple[int, ...]
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x, train, read: Live, inner: Any, count: Live) -> jax.Array:
        for i, units in enumerate(self.inner):
            stride = self.stride if i == 0 else 1
            block = Bottleneck(self.width, units, stride, i == 0, self.dtype, name=f'block{i}')
            x = block(x, train, read if i == 0 else count, inner[i], count)
        return x


class BottleneckResNet(nn.Module):
    """Two or three 3x3 convolutions, stages of bottlenecks, average pooling, a linear head.

    Attributes:
      stem: channels of the first convolution, and of the last.
      residual_stem: whether x + ReLU(norm(conv(x))) stands between the two.
      widths: channels that leave each stage.
      inner: inner channels of the blocks of each stage.
      num_classes: number of logits.
      resolution: `imagenet`, a stem of stride 2 and a maximum pooling; or `cifar`, neither.
      dropout: of the pooled features.
      dtype: compute type, head excepted.

    Features: `stem`, `stage1`, `stage1/block0`, ..., and `features`, the pooled output.
    """

    stem: tuple[Count, Count] = (32, 64)
    residual_stem: bool = True
    widths: tuple[Count, ...] = STAGES
    inner: tuple[tuple[Count, ...], ...] = ((64,) * 3, (128,) * 4, (256,) * 6, (512,) * 3)
    num_classes: Count = 1000
    resolution: str = 'imagenet'
    dropout: Decay = 0.0
    dtype: Any = 'float32'

    def __post_init__(self):
        layers.check_choice('resolution', self.resolution, layers.STEMS)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False, sizes: dict[str, Any] | None = None
    ) -> jax.Array:
        """Images [B, H, W, C] to float32 logits; `sizes` of live channels, all without."""
        layers.check_rank('BottleneckResNet', x, {4: 'images [B, H, W, C]'})
        large = self.resolution == 'imagenet'
        first, residual, last = (None,) * 3 if sizes is None else sizes['stem']
        x = x.astype(self.dtype)
        options = dict(dtype=self.dtype)
        x = nn.relu(ConvNorm(self.stem[0], 3, 2 if large else 1, name='stem0', **options)(
            x, train, None, first
        ))  # fmt: skip
        if self.residual_stem:
            between = ConvNorm(self.stem[0], 3, name='stem1', **options)
            x = x + nn.relu(between(x, train, first, residual))
        x = nn.relu(ConvNorm(self.stem[1], 3, name='stem', **options)(x, train, first, last))
        x = layers.max_pool(x) if large else x
        read, begin = last, 0
        for i, (width, inner) in enumerate(zip(self.widths, self.inner, strict=True)):
            stage = Stage(width, inner, 1 if i == 0 else 2, self.dtype, name=f'stage{i + 1}')
            live = [None] * len(inner) if sizes is None else sizes['inner'][begin:]
            count = None if sizes is None else sizes['widths'][i]
            x, read, begin = stage(x, train, read, live, count), count, begin + len(inner)
        x = x.mean(axis=(1, 2))
        spend(self, self.num_classes, 1, x.shape[-1], read)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return layers.classifier(x, self.num_classes)


class ElasticResNet(Elastic):
    """`BottleneckResNet`s whose width, depth and inner width are chosen stage by stage.

    As in Once for All (Cai et al. 2019, arXiv:1908.09791) and ProARD: stages of 256, 512, 1024 and
    2048 channels times a factor, of 2, 2, 4 and 2 blocks and up to 2 more, each block with inner
    channels of a fraction of its width, rounded to multiples of 8. The stem has a factor of its own
    for the first convolutions and for the last; its residual one is there at the largest depth.

    Choices: `width` [2 + stages] (stem, its end, stages), `depth` [1 + stages] (stem, stages; of
    blocks added), `expansion` [blocks].

    Attributes:
      widths: factors of channels.
      depths: blocks that are added to `blocks`.
      expansions: inner channels as a fraction of the width.
      stem: channels that leave the stem, twice those within, at factor 1.
      stages: channels that leave each stage at factor 1.
      blocks: of each stage at least.
      num_classes, resolution, dropout, dtype: as of `BottleneckResNet`.
    """

    widths: tuple[Positive, ...] = (0.65, 0.8, 1.0)
    depths: tuple[Size, ...] = (0, 1, 2)
    expansions: tuple[Positive, ...] = (0.2, 0.25, 0.35)
    stem: Count = STEM
    stages: tuple[Count, ...] = STAGES
    blocks: tuple[Count, ...] = BLOCKS
    num_classes: Count = 10
    resolution: str = 'cifar'
    dropout: Decay = 0.0
    dtype: Any = 'float32'

    @nn.nowrap
    def space(self) -> Space:
        depths, stages = sorted(set(self.depths)), len(self.stages)
        blocks = [
            (stage + 1, next(i for i, depth in enumerate(depths) if base + depth > block))
            for stage, base in enumerate(self.blocks)
            for block in range(base + depths[-1])
        ]
        return Space(
            choices=(
                ('width', Choice.of(self.widths, 2 + stages)),
                ('depth', Choice.of(self.depths, 1 + stages)),
                ('expansion', Choice.of(self.expansions, len(blocks))),
            ),
            blocks=tuple(blocks),
            of_block=('expansion',),
            switches=((0, len(depths) - 1),),
        )

    @nn.nowrap
    def sizes(self, arch: Architecture) -> dict[str, Any]:
        xp, space = module_of(arch), self.space()
        options = {name: choice.options for name, choice in space.choices}
        channels = [layers.divisible(self.stem * w) for w in options['width']]
        within = [layers.divisible(n // 2) for n in channels]
        width, depth = arch['width'], arch['depth']
        first = xp.asarray(within)[width[0]]
        residual = xp.where(depth[0] == len(options['depth']) - 1, first, 0)
        outs = [[layers.divisible(n * w) for w in options['width']] for n in self.stages]
        inner = np.array([
            [[layers.divisible(round(n * e)) for e in options['expansion']] for n in of]
            for of in outs
        ])  # fmt: skip
        stage = np.array([coordinate - 1 for coordinate, _ in space.blocks])
        units = xp.asarray(inner)[stage, width[2:][stage], arch['expansion']]
        return {
            'stem': (first, residual, xp.asarray(channels)[width[1]]),
            'widths': xp.asarray(outs)[np.arange(len(outs)), width[2:]],
            'inner': xp.where(space.there(arch), units, 0),
        }

    @nn.nowrap
    def plain(self, arch: Architecture | None = None) -> BottleneckResNet:
        sizes = self.sizes(self.space().largest() if arch is None else arch)
        first, residual, last = map(int, sizes['stem'])
        stage = [coordinate - 1 for coordinate, _ in self.space().blocks]
        inner = tuple(
            tuple(int(n) for n, s in zip(sizes['inner'], stage, strict=True) if n and s == i)
            for i in range(len(self.stages))
        )
        return BottleneckResNet(
            stem=(first, last), residual_stem=bool(residual),
            widths=tuple(int(n) for n in sizes['widths']), inner=inner,
            num_classes=self.num_classes, resolution=self.resolution, dropout=self.dropout,
            dtype=self.dtype,
        )  # fmt: skip

    @nn.nowrap
    def groups(self) -> tuple[Group, ...]:
        made, numbers = [], dict[int, int]()
        for block, (coordinate, _) in enumerate(self.space().blocks):
            number = numbers.get(coordinate, 0)
            numbers[coordinate] = number + 1
            at = f'stage{coordinate}/block{number}'
            for before, after in (('conv2', 'conv3'), ('conv1', 'conv2')):
                norm = tuple((f'{at}/{before}/norm/{n}', 0) for n in NORM)
                outs = ((f'{at}/{before}/conv/kernel', 3), *norm)
                made.append(Group(block, outs, (f'{at}/{after}/conv/kernel', 2)))
        return tuple(made)


NORM = ('scale', 'bias', 'mean', 'var')
