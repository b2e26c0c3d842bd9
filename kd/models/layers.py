"""What the vision networks share: convolutions, norms by name, initialisers, input checks."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

NORMS = ('instance', 'group', 'batch', 'none')
GROUPS = 8
# First layers for images of 224 pixels, and for those of 32 or 64.
STEMS = ('imagenet', 'cifar')
# He et al. (arXiv:1502.01852), in its backward form.
he_init = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')


def norm(kind: str, *, train: bool, dtype: Any, name: str) -> Callable[[jax.Array], jax.Array]:
    """A normalisation layer with an affine map per channel; epsilon 1e-5, statistics in float32.

    `instance`: each channel of each image; `group`: 8 groups of channels of each image; `batch`:
    each channel over the batch, with running averages (decay 0.9) in the collection 'batch_stats',
    updated where `train` and used where not; `none`: the identity.
    """
    check_choice('norm', kind, NORMS)
    if kind == 'none':
        return lambda x: x
    if kind == 'batch':
        return nn.BatchNorm(
            use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=dtype, name=name
        )
    if kind == 'group':
        return nn.GroupNorm(num_groups=GROUPS, epsilon=1e-5, dtype=dtype, name=name)
    return nn.InstanceNorm(epsilon=1e-5, dtype=dtype, name=name)


def conv(
    width: int,
    size: int,
    stride: int = 1,
    *,
    groups: int = 1,
    form: str = 'direct',
    dtype: Any,
    name: str,
) -> nn.Conv:
    """A convolution without bias, padded by size // 2 on every side, as in PyTorch.

    (With stride 2 on an even side, 'SAME' would pad only at the end.) As many groups as channels
    make it depthwise. `form` is one of `CONVS`.
    """
    return nn.Conv(
        width,
        (size, size),
        strides=(stride, stride),
        padding=size // 2,
        feature_group_count=groups,
        use_bias=False,
        dtype=dtype,
        conv_general_dilated=CONVS[form],
        kernel_init=he_init,
        name=name,
    )


def conv_norm(
    x: jax.Array,
    width: int,
    size: int,
    stride: int = 1,
    *,
    groups: int = 1,
    train: bool,
    dtype: Any,
    name: str,
) -> jax.Array:
    """`conv` as submodule `name`, then batch norm as `name`_norm; from a compact method."""
    x = conv(width, size, stride, groups=groups, dtype=dtype, name=name)(x)
    return norm('batch', train=train, dtype=dtype, name=f'{name}_norm')(x)


def standardised(
    images: jax.Array, mean: Sequence[float] = (0.5,), std: Sequence[float] = (0.5,)
) -> jax.Array:
    """Images [..., C] in [-1, 1] with the pixels that a released network was trained on.

        ((images + 1) / 2 - mean) / std

    Args:
      images: as above; untouched for means and deviations of 1/2, which is what they already have.
      mean, std: of pixels in [0, 1], a number for each channel or one for all.
    """
    if tuple(mean) == tuple(std) == (0.5,):
        return images
    return ((images + 1) / 2 - jnp.asarray(mean)) / jnp.asarray(std)


def max_pool(x: jax.Array) -> jax.Array:
    """3x3 maximum pooling of stride 2, padded by 1 on every side, as in PyTorch."""
    return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))


def divisible(width: float, by: int = 8) -> int:
    """The nearest multiple of `by`, at least `by` and at least 90 % of `width`.

    Source: Sandler et al. 2018, arXiv 1801.04381, as released: widths that suit the hardware.
    """
    rounded = max(by, int(width + by / 2) // by * by)
    return rounded + by if rounded < 0.9 * width else rounded


def matmul_conv(
    x: jax.Array,
    kernel: jax.Array,
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]] | str,
    *,
    lhs_dilation: Sequence[int] = (),
    rhs_dilation: Sequence[int] = (),
    feature_group_count: int = 1,
    **options: Any,
) -> jax.Array:
    """A convolution as one matrix product of shifted copies; pass as `conv_general_dilated`.

    On CPU, XLA runs the plain convolution tens of times slower inside `lax.scan` than outside; this
    form is as fast inside as outside. On GPU and TPU the plain convolution is the better one.

    Args:
      x: [B, *space, C].
      kernel: [*window, C, D].
      window_strides: one per axis of space.
      padding: 'SAME', 'VALID' or (before, after) per axis of space.
      lhs_dilation, rhs_dilation, feature_group_count: must be 1.
      **options: the rest of what `nn.Conv` passes (axes, precision), ignored.

    Returns:
      [B, *space / strides, D], equal to the plain convolution up to the order of summation.

    Raises:
      ValueError: dilation or groups.
    """
    if {*lhs_dilation, *rhs_dilation, feature_group_count} - {1}:
        raise ValueError('matmul_conv has neither dilation nor groups; use the plain convolution')
    window = kernel.shape[:-2]
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(x.shape[1:-1], window, window_strides, padding)
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    # One slice per position in the window: every stride-th pixel from there on.
    shifted = [
        x[(slice(None), *map(slice, shift, _ends(x.shape[1:-1], window, shift), window_strides))]
        for shift in np.ndindex(*window)
    ]
    return jnp.concatenate(shifted, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


def _ends(space: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> list[int]:
    """Where the slice that starts at `shift` ends: the window's last position, exclusive."""
    return [n - w + s + 1 for n, w, s in zip(space, window, shift, strict=True)]


def pixel_shuffle(x: jax.Array, scale: int) -> jax.Array:
    """[..., H, W, C s s] as [..., s H, s W, C], channels in PyTorch's order (C, s, s).

    out[b, s i + p, s j + q, c] = x[b, i, j, c s s + p s + q]
    """
    *lead, height, width, channels = x.shape
    x = x.reshape(*lead, height, width, channels // scale**2, scale, scale)
    x = jnp.moveaxis(x, (-2, -1), (-4, -2))  # [..., H, s, W, s, C]
    return x.reshape(*lead, height * scale, width * scale, -1)


def pixel_unshuffle(x: jax.Array, scale: int) -> jax.Array:
    """What `pixel_shuffle` undoes: [..., s H, s W, C] as [..., H, W, C s s]."""
    *lead, height, width, channels = x.shape
    x = x.reshape(*lead, height // scale, scale, width // scale, scale, channels)
    x = jnp.moveaxis(x, (-4, -2), (-2, -1))  # [..., H, W, C, s, s]
    return x.reshape(*lead, height // scale, width // scale, -1)


# None is `nn.Conv`'s own choice, `lax.conv_general_dilated`.
CONVS = {'direct': None, 'matmul': matmul_conv}


class Features(nn.Module):
    """The identity. It gives an activation a name that `capture_intermediates` can find."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x


# PyTorch's default for dense and convolution kernels: uniform on +-1/sqrt(fan_in).
torch_kernel_init = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')


def torch_bias_init(fan_in: int) -> nn.initializers.Initializer:
    """PyTorch's default for biases: uniform on +-1/sqrt(fan_in)."""
    bound = 1 / math.sqrt(fan_in)
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -bound, bound
    )


def classifier(x: jax.Array, num_classes: int) -> jax.Array:
    """Names `x` [B, D] 'features' and maps it to float32 logits [B, num_classes] by 'head'.

    Must be called from the compact method of a module, which gets both submodules.
    """
    x = Features(name='features')(x).astype(jnp.float32)
    return nn.Dense(
        num_classes,
        kernel_init=torch_kernel_init,
        bias_init=torch_bias_init(x.shape[-1]),
        name='head',
    )(x)


def pooled_classifier(x: jax.Array, num_classes: int) -> jax.Array:
    """Names maps [B, *positions, C] 'map', and is the `classifier` of their mean over positions."""
    x = Features(name='map')(x)
    return classifier(x.mean(axis=tuple(range(1, x.ndim - 1))), num_classes)


def check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f'{what}={value!r} must be one of {", ".join(map(repr, choices))}')


def check_rank(network: str, x: jax.Array, ranks: dict[int, str]) -> None:
    """Raises ValueError unless `x` has one of the ranks, given as {rank: shape in words}."""
    if x.ndim not in ranks:
        raise ValueError(f'{network} takes {" or ".join(ranks.values())}, got shape {x.shape}')
