"""Pictures made bad as cameras, programs and the web do: degradations of second order.

    low = jax.jit(jax.vmap(second_order))(keys, pictures)      [B, H, W, 3] to [B, H / 4, W / 4, 3]

Once or twice: blurred, resized, made noisy, compressed as JPEG; at last made small, with a sinc
filter before or after the last compression. Everything is drawn for each picture by its own key,
and computed on the device: pictures of the sizes in between lie in the corner of a larger one.

Source: Real-ESRGAN, arXiv:2107.10833, and its release, which is what ResShift and TAD-SR have.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kd.ranges import Count, Fraction

__all__ = ['FIRST', 'SECOND', 'Order', 'jpeg', 'kernel', 'resized', 'second_order', 'sinc']

# Side of a kernel; smaller ones have zeros around.
SIDE = 21
# Of a kernel: Gaussian, generalised and plateau, each the same in all directions or not.
_KINDS = np.array([0.45, 0.25, 0.12, 0.03, 0.12, 0.03])
_SINC, _LAST_SINC, _GREY, _QUALITY = 0.1, 0.8, 0.4, (30.0, 95.0)
# How pictures are resized, evenly.
MODES = ('area', 'bilinear', 'bicubic')


class Order(NamedTuple):
    """How one of the two is drawn.

    Attributes:
      blur: probability.
      sigma: of the kernel, in pixels.
      resize: probabilities of larger, smaller and neither.
      ratio: least and greatest.
      noise: deviation, of 255.
      poisson: scale of noise of the kind of photons.
    """

    blur: float
    sigma: tuple[float, float]
    resize: tuple[float, float, float]
    ratio: tuple[float, float]
    noise: tuple[float, float]
    poisson: tuple[float, float]


FIRST = Order(1.0, (0.2, 3.0), (0.2, 0.7, 0.1), (0.15, 1.5), (1.0, 30.0), (0.05, 3.0))
SECOND = Order(0.8, (0.2, 1.5), (0.3, 0.4, 0.3), (0.3, 1.2), (1.0, 25.0), (0.05, 2.5))


def second_order(
    key: jax.Array,
    picture: jax.Array,
    scale: Count = 4,
    first: Order = FIRST,
    second: Order = SECOND,
    twice: Fraction = 0.5,
) -> jax.Array:
    """What is left of a picture.

    Args:
      key: of all draws.
      picture: [H, W, 3] in [-1, 1], sides multiples of `scale`.
      scale: by which it is made small.
      first, second: the two.
      twice: probability of the second; ResShift has a half, Real-ESRGAN 1.

    Returns:
      [H / scale, W / scale, 3] in [-1, 1], of 256 levels.
    """
    keys = jax.random.split(key, 6)
    sides = np.array(picture.shape[:2])
    whole = jnp.asarray(sides, jnp.int32)
    largest = tuple((int(side * first.ratio[1]) + 15) // 16 * 16 for side in sides)
    x = 0.5 * (picture + 1)
    x = _canvas(x, largest)
    x, size = _degraded(keys[0], x, whole, sides, first)
    x = jpeg(x, size, _uniform(keys[1], _QUALITY))
    again_key, order_key = jax.random.split(keys[2])
    again = jax.random.bernoulli(again_key, twice)
    both = _degraded(order_key, x, size, sides / scale, second)
    x, size = jnp.where(again, both[0], x), jnp.where(again, both[1], size)
    quality, mode = _uniform(keys[3], _QUALITY), jax.random.randint(keys[4], (), 0, len(MODES))
    end = whole // scale
    pick = jax.random.split(keys[5], 3)
    filtered = jax.random.bernoulli(pick[0], _LAST_SINC)
    last = jnp.where(filtered, sinc(pick[1], least=np.pi / 3), _pulse())

    def small(x: jax.Array, size: jax.Array) -> jax.Array:
        return blurred(resized(x, size, end, mode), end, last)

    x = jnp.where(
        jax.random.bernoulli(pick[2]),
        jpeg(small(x, size), end, quality),
        small(jpeg(x, size, quality), size),
    )
    x = x[: sides[0] // scale, : sides[1] // scale]
    return 2 * jnp.round(255 * jnp.clip(x, 0, 1)) / 255 - 1


def _degraded(key, x, size, sides, order):
    """Blurred, resized to a share of `sides` and made noisy: (canvas, size)."""
    blur_key, kernel_key, size_key, mode_key, noise_key = jax.random.split(key, 5)
    own = jnp.where(jax.random.bernoulli(blur_key, order.blur), kernel(kernel_key, order), _pulse())
    x = blurred(x, size, own)
    which, ratio = jax.random.split(size_key)
    kind = jax.random.choice(which, 3, p=jnp.array(order.resize))
    low, high = order.ratio
    bounds = jnp.array([[1.0, high], [low, 1.0], [1.0, 1.0]])[kind]
    share = jax.random.uniform(ratio, minval=bounds[0], maxval=bounds[1])
    new = jnp.maximum(jnp.floor(jnp.asarray(sides) * share).astype(jnp.int32), 1)
    mode = jax.random.randint(mode_key, (), 0, len(MODES))
    return noisy(noise_key, resized(x, size, new, mode), order), new


def _canvas(x, largest):
    return jnp.pad(x, [(0, largest[0] - x.shape[0]), (0, largest[1] - x.shape[1]), (0, 0)])


def _uniform(key, bounds):
    return jax.random.uniform(key, minval=bounds[0], maxval=bounds[1])


# Kernels, [SIDE, SIDE] of sum 1.


def kernel(key: jax.Array, order: Order) -> jax.Array:
    """One of all kinds: sinc with probability .1.

    With d = x^T C^-1 x, C of two deviations and an angle: exp(-d / 2), exp(-d^b / 2) or
    1 / (1 + d^b).
    """
    keys = jax.random.split(key, 9)
    kind = jax.random.choice(keys[0], 6, p=jnp.array(_KINDS / _KINDS.sum()))
    shape, even = kind // 2, kind % 2 == 0
    a, b = (_uniform(k, order.sigma) for k in keys[1:3])
    b, angle = jnp.where(even, a, b), jnp.where(even, 0.0, _uniform(keys[3], (-np.pi, np.pi)))
    below, above = jnp.array([[1.0, 1.0], [0.5, 4.0], [1.0, 2.0]])[shape]
    halves = _uniform(keys[4], (0.0, 1.0)), _uniform(keys[5], (0.0, 1.0))
    power = jnp.where(halves[0] < 0.5, below + halves[1] * (1 - below), 1 + halves[1] * (above - 1))
    down, right = _places()
    u = jnp.cos(angle) * right + jnp.sin(angle) * down
    v = -jnp.sin(angle) * right + jnp.cos(angle) * down
    # Where it is 0 a power has no slope, and is one of nothing.
    d = jnp.maximum((u / a) ** 2 + (v / b) ** 2, 1e-12) ** power
    found = jnp.where(shape == 2, 1 / (1 + d), jnp.exp(-0.5 * d))
    found = jnp.where(_inside(_side(keys[6])), found, 0.0)
    return jnp.where(jax.random.bernoulli(keys[7], _SINC), sinc(keys[8]), found / found.sum())


def sinc(key: jax.Array, least: float = np.pi / 5) -> jax.Array:
    """The circular low-pass filter w J1(w r) / (2 pi r) of a cut-off w, in radians a pixel.

    Args:
      key: of the side and of w, which is even up to pi: from pi / 3 for sides below 13.
      least: from where for the others; pi / 3 too for the filter of the last compression.
    """
    side_key, cut_key = jax.random.split(key)
    side = _side(side_key)
    low = jnp.where(side < 13, np.pi / 3, least)
    cut = low + _uniform(cut_key, (0.0, 1.0)) * (np.pi - low)
    found = jnp.where(_inside(side), low_pass(cut), 0.0)
    return found / found.sum()


def low_pass(cut: jax.Array) -> jax.Array:
    """w J1(w r) / (2 pi r), w^2 / (4 pi) at 0, [SIDE, SIDE]."""
    r = jnp.hypot(*_places())
    # J1(z) = mean of cos(s - z sin s) over half a turn, exact for as many nodes as z is large.
    nodes = (np.arange(128) + 0.5) * np.pi / 128
    bessel = jnp.cos(nodes - cut * r[..., None] * np.sin(nodes)).mean(-1)
    away = jnp.where(r > 0, r, 1.0)
    return jnp.where(r > 0, cut * bessel / (2 * np.pi * away), cut**2 / (4 * np.pi))


def _side(key: jax.Array) -> jax.Array:
    """7, 9, ..., 21."""
    return 7 + 2 * jax.random.randint(key, (), 0, 8)


def _places() -> tuple[np.ndarray, np.ndarray]:
    line = np.arange(SIDE) - SIDE // 2
    down, right = np.meshgrid(line, line, indexing='ij')
    return down.astype(np.float32), right.astype(np.float32)


def _inside(side: jax.Array) -> jax.Array:
    down, right = _places()
    return jnp.maximum(np.abs(down), np.abs(right)) <= side // 2


def _pulse() -> np.ndarray:
    down, right = _places()
    return ((down == 0) & (right == 0)).astype(np.float32)


# What is done to a picture of a size [2] in the corner of a canvas.


def blurred(x: jax.Array, size: jax.Array, kernel: jax.Array) -> jax.Array:
    """A convolution, the picture mirrored at its edges."""
    half, (height, width) = SIDE // 2, x.shape[:2]
    x = x[_mirrored(height, half, size[0])][:, _mirrored(width, half, size[1])]
    found = jax.lax.conv_general_dilated(
        jnp.moveaxis(x, -1, 0)[..., None], kernel[:, :, None, None], (1, 1), 'VALID',
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )  # fmt: skip
    return jnp.moveaxis(found[..., 0], 0, -1)


def _mirrored(length: int, half: int, size: jax.Array) -> jax.Array:
    """Places of -half .. length + half in a line of `size` whose ends are mirrors."""
    turn = jnp.maximum(2 * (size - 1), 1)
    place = (jnp.arange(-half, length + half) % turn + turn) % turn
    return jnp.minimum(jnp.minimum(place, turn - place), size - 1)


def resized(x: jax.Array, size: jax.Array, new: jax.Array, mode: jax.Array) -> jax.Array:
    """A picture of another size, by one of `MODES` as PyTorch has them; zeros outside.

    Args:
      x: canvas.
      size, new: int32 [2].
      mode: int32.
    """
    down, right = (
        _weights(length, size[axis], new[axis], mode) for axis, length in enumerate(x.shape[:2])
    )
    exact = jax.lax.Precision.HIGHEST
    return jnp.einsum('yh,hwc,xw->yxc', down, x, right, precision=exact)


def _weights(length: int, old: jax.Array, new: jax.Array, mode: jax.Array) -> jax.Array:
    """[length, length], rows of sum 1 up to `new`, zeros beyond."""
    row, column = jnp.arange(length)[:, None], jnp.arange(length)
    ratio = old / new
    centre = (row + 0.5) * ratio - 0.5
    # Cells of pixels that lie under the new one, whole ones as PyTorch counts them.
    first, last = row * old // new, -(-(row + 1) * old // new)
    area = ((column >= first) & (column < last)) / jnp.maximum(last - first, 1)
    base, found = jnp.floor(centre).astype(jnp.int32), []
    for kind in (_tent, _cubic):
        taps = [
            jnp.where(jnp.clip(base + i, 0, old - 1) == column, kind(base + i - centre), 0.0)
            for i in range(-1, 3)
        ]
        found.append(sum(taps))
    chosen = jnp.stack([area, *found])[mode]
    return jnp.where(row < new, chosen, 0.0)


def _tent(x: jax.Array) -> jax.Array:
    return jnp.maximum(1 - jnp.abs(x), 0.0)


def _cubic(x: jax.Array, a: float = -0.75) -> jax.Array:
    x = jnp.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    return jnp.where(x < 1, near, jnp.where(x < 2, (((x - 5) * x + 8) * x - 4) * a, 0.0))


def noisy(key: jax.Array, x: jax.Array, order: Order) -> jax.Array:
    """Gaussian noise, or that of photons, of each channel or of all alike; within [0, 1].

    Photons are counted in 256 levels, where the release counts the levels that a picture has.
    """
    keys = jax.random.split(key, 6)
    grey = jax.random.bernoulli(keys[0], _GREY)
    normal = jax.random.normal(keys[1], x.shape)
    gaussian = _uniform(keys[2], order.noise) / 255 * jnp.where(grey, normal[..., :1], normal)
    light = jnp.where(grey, (x @ jnp.array([0.299, 0.587, 0.114]))[..., None], x)
    light = jnp.clip(light, 0, 1)
    counted = jax.random.poisson(keys[3], 256 * light) / 256 - light
    counted = _uniform(keys[4], order.poisson) * jnp.where(grey, counted[..., :1], counted)
    return jnp.clip(x + jnp.where(jax.random.bernoulli(keys[5]), gaussian, counted), 0, 1)


_LUMA = np.array([
    [16, 11, 10, 16, 24, 40, 51, 61], [12, 12, 14, 19, 26, 58, 60, 55],
    [14, 13, 16, 24, 40, 57, 69, 56], [14, 17, 22, 29, 51, 87, 80, 62],
    [18, 22, 37, 56, 68, 109, 103, 77], [24, 35, 55, 64, 81, 104, 113, 92],
    [49, 64, 78, 87, 103, 121, 120, 101], [72, 92, 95, 98, 112, 100, 103, 99],
], np.float32)  # fmt: skip
_CHROMA = np.full((8, 8), 99, np.float32)
_CHROMA[:4, :4] = [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]
_YCBCR = np.array([
    [0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]
])  # fmt: skip
_DCT = np.cos((2 * np.arange(8) + 1) * np.arange(8)[:, None] * np.pi / 16) / 2
_DCT[0] *= 0.5**0.5


def jpeg(x: jax.Array, size: jax.Array, quality: jax.Array) -> jax.Array:
    """What JPEG makes of a picture in [0, 1], its colours at half of the resolution.

    Args:
      x: canvas, sides multiples of 16.
      size: int32 [2]; beyond it is the edge again.
      quality: 1 to 100, of the usual tables.
    """
    height, width = x.shape[:2]
    rows, columns = (
        jnp.minimum(jnp.arange(n), s - 1) for n, s in zip((height, width), size, strict=True)
    )
    x = jnp.clip(x[rows][:, columns], 0, 1)
    share = jnp.where(quality < 50, 50 / quality, 2 - quality / 50)
    luma, blue, red = jnp.moveaxis(255 * x @ _YCBCR.T, -1, 0)

    def halved(channel: jax.Array) -> jax.Array:
        return channel.reshape(height // 2, 2, width // 2, 2).mean((1, 3))

    def doubled(channel: jax.Array) -> jax.Array:
        return channel.repeat(2, 0).repeat(2, 1)

    luma = _quantised(luma - 128, share * jnp.asarray(_LUMA)) + 128
    tables = share * jnp.asarray(_CHROMA)
    colours = [doubled(_quantised(halved(c), tables)) for c in (blue, red)]
    found = jnp.stack([luma, *colours], -1) @ np.linalg.inv(_YCBCR).T
    return jnp.clip(found / 255, 0, 1)


def _quantised(channel: jax.Array, table: jax.Array) -> jax.Array:
    """Blocks of 8 x 8 by their cosines, each rounded to multiples of the table's."""
    height, width = channel.shape
    table = jnp.clip(jnp.floor(table + 0.5), 1, 255)
    blocks = channel.reshape(height // 8, 8, width // 8, 8)
    cosines = jnp.einsum('ui,yixj,vj->yxuv', _DCT, blocks, _DCT)
    cosines = jnp.round(cosines / table) * table
    return jnp.einsum('ui,yxuv,vj->yixj', _DCT, cosines, _DCT).reshape(height, width)
