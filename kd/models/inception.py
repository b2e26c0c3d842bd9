"""Inception-v3, whose pooled features define the Frechet inception distance (FID)."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from kd.ranges import Count

# Side of the images that the published weights were trained on.
RESOLUTION = 299


class InceptionV3(nn.Module):
    """Features [B, 2048] of images [B, H, W, 1 or 3] in [-1, 1].

    Szegedy et al. (arXiv:1512.00567) in the variant of the weights of December 2015 that FID is
    defined with (Heusel et al., arXiv:1706.08500): averages leave out the padding, and the last
    block pools by maximum. Names of modules are those of the PyTorch port of these weights, see
    `kd.io.torch_weights`. Only for evaluation: statistics of normalisation are never updated.

    Attributes:
      resolution: images are resized to this side, bilinearly and without antialiasing, as the
        port does; None leaves them as they are (at least 75 pixels).
    """

    resolution: Count | None = RESOLUTION

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        del train
        if x.shape[-1] == 1:
            x = jnp.repeat(x, 3, axis=-1)
        if self.resolution is not None:
            shape = (x.shape[0], self.resolution, self.resolution, 3)
            x = jax.image.resize(x, shape, 'bilinear', antialias=False)
        x = Conv(32, (3, 3), 2, name='Conv2d_1a_3x3')(x)
        x = Conv(32, (3, 3), name='Conv2d_2a_3x3')(x)
        x = Conv(64, (3, 3), padding=1, name='Conv2d_2b_3x3')(x)
        x = nn.max_pool(x, (3, 3), (2, 2))
        x = Conv(80, (1, 1), name='Conv2d_3b_1x1')(x)
        x = Conv(192, (3, 3), name='Conv2d_4a_3x3')(x)
        x = nn.max_pool(x, (3, 3), (2, 2))
        for letter, pooled in zip('bcd', (32, 64, 64), strict=True):
            x = BlockA(pooled, name=f'Mixed_5{letter}')(x)
        x = BlockB(name='Mixed_6a')(x)
        for letter, width in zip('bcde', (128, 160, 160, 192), strict=True):
            x = BlockC(width, name=f'Mixed_6{letter}')(x)
        x = BlockD(name='Mixed_7a')(x)
        x = BlockE(average_pool, name='Mixed_7b')(x)
        x = BlockE(same_max_pool, name='Mixed_7c')(x)
        return x.mean((1, 2))


class Conv(nn.Module):
    """Convolution without bias, normalisation by fixed statistics, ReLU."""

    width: int
    kernel: tuple[int, int]
    stride: int = 1
    padding: int | Sequence[int] = 0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        strides = (self.stride, self.stride)
        x = nn.Conv(
            self.width, self.kernel, strides, padding=self.padding, use_bias=False, name='conv'
        )(x)
        return nn.relu(nn.BatchNorm(True, epsilon=1e-3, name='bn')(x))


class BlockA(nn.Module):
    """Branches of one, two (5x5) and three (3x3) convolutions, and an average."""

    pooled: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        one = Conv(64, (1, 1), name='branch1x1')(x)
        five = Conv(48, (1, 1), name='branch5x5_1')(x)
        five = Conv(64, (5, 5), padding=2, name='branch5x5_2')(five)
        three = Conv(64, (1, 1), name='branch3x3dbl_1')(x)
        three = Conv(96, (3, 3), padding=1, name='branch3x3dbl_2')(three)
        three = Conv(96, (3, 3), padding=1, name='branch3x3dbl_3')(three)
        pool = Conv(self.pooled, (1, 1), name='branch_pool')(average_pool(x))
        return jnp.concatenate([one, five, three, pool], -1)


class BlockB(nn.Module):
    """Halves the resolution, 288 to 768 channels."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        three = Conv(384, (3, 3), 2, name='branch3x3')(x)
        double = Conv(64, (1, 1), name='branch3x3dbl_1')(x)
        double = Conv(96, (3, 3), padding=1, name='branch3x3dbl_2')(double)
        double = Conv(96, (3, 3), 2, name='branch3x3dbl_3')(double)
        return jnp.concatenate([three, double, nn.max_pool(x, (3, 3), (2, 2))], -1)


class BlockC(nn.Module):
    """Convolutions of 7x7 as rows and columns, `width` channels between them."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def row(width, name):
            return Conv(width, (1, 7), padding=(0, 3), name=name)

        def column(width, name):
            return Conv(width, (7, 1), padding=(3, 0), name=name)

        one = Conv(192, (1, 1), name='branch1x1')(x)
        seven = Conv(self.width, (1, 1), name='branch7x7_1')(x)
        seven = row(self.width, 'branch7x7_2')(seven)
        seven = column(192, 'branch7x7_3')(seven)
        double = Conv(self.width, (1, 1), name='branch7x7dbl_1')(x)
        double = column(self.width, 'branch7x7dbl_2')(double)
        double = row(self.width, 'branch7x7dbl_3')(double)
        double = column(self.width, 'branch7x7dbl_4')(double)
        double = row(192, 'branch7x7dbl_5')(double)
        pool = Conv(192, (1, 1), name='branch_pool')(average_pool(x))
        return jnp.concatenate([one, seven, double, pool], -1)


class BlockD(nn.Module):
    """Halves the resolution, 768 to 1,280 channels."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        three = Conv(192, (1, 1), name='branch3x3_1')(x)
        three = Conv(320, (3, 3), 2, name='branch3x3_2')(three)
        seven = Conv(192, (1, 1), name='branch7x7x3_1')(x)
        seven = Conv(192, (1, 7), padding=(0, 3), name='branch7x7x3_2')(seven)
        seven = Conv(192, (7, 1), padding=(3, 0), name='branch7x7x3_3')(seven)
        seven = Conv(192, (3, 3), 2, name='branch7x7x3_4')(seven)
        return jnp.concatenate([three, seven, nn.max_pool(x, (3, 3), (2, 2))], -1)


class BlockE(nn.Module):
    """Branches that end in a row beside a column, to 2,048 channels."""

    pool: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def row(name):
            return Conv(384, (1, 3), padding=(0, 1), name=name)

        def column(name):
            return Conv(384, (3, 1), padding=(1, 0), name=name)

        one = Conv(320, (1, 1), name='branch1x1')(x)
        three = Conv(384, (1, 1), name='branch3x3_1')(x)
        double = Conv(448, (1, 1), name='branch3x3dbl_1')(x)
        double = Conv(384, (3, 3), padding=1, name='branch3x3dbl_2')(double)
        branches = [
            one,
            row('branch3x3_2a')(three),
            column('branch3x3_2b')(three),
            row('branch3x3dbl_3a')(double),
            column('branch3x3dbl_3b')(double),
            Conv(192, (1, 1), name='branch_pool')(self.pool(x)),
        ]
        return jnp.concatenate(branches, -1)


def average_pool(x: jax.Array) -> jax.Array:
    """Averages of 3x3 windows of x [B, H, W, C], stride 1, over the pixels inside the image."""
    return nn.avg_pool(x, (3, 3), padding='SAME', count_include_pad=False)


def same_max_pool(x: jax.Array) -> jax.Array:
    """Maxima of 3x3 windows of x [B, H, W, C], stride 1."""
    return nn.max_pool(x, (3, 3), padding='SAME')
