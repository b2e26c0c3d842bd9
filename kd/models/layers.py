"""What the vision networks share: norms by name, PyTorch's initialisers, input checks."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

NORMS = ('instance', 'group', 'batch', 'none')
GROUPS = 8


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


def check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f'{what}={value!r} must be one of {", ".join(map(repr, choices))}')


def check_rank(network: str, x: jax.Array, ranks: dict[int, str]) -> None:
    """Raises ValueError unless `x` has one of the ranks, given as {rank: shape in words}."""
    if x.ndim not in ranks:
        raise ValueError(f'{network} takes {" or ".join(ranks.values())}, got shape {x.shape}')
