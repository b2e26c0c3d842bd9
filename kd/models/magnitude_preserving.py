"""Layers that keep the expected magnitude of activations, gradients and weights.

Karras et al., "Analyzing and improving the training dynamics of diffusion models", arXiv
2312.02696 (EDM2), appendix B. Every weight is used at unit norm for each output, so its length only
sets its effective learning rate; `normalize_weights`, applied to the parameters after each
optimiser step, keeps that length fixed. Learning rates of 1e-2 are usable only with it.
"""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

__all__ = ['MPConv', 'MPDense', 'mp_concat', 'mp_silu', 'mp_sum', 'normalize_weights', 'unit_norm']

_EPSILON = 1e-4
_WEIGHT = 'mp_weight'


def unit_norm(x: jax.Array, axis: int | tuple[int, ...]) -> jax.Array:
    """x / (1e-4 + rms(x)) over `axis`, in float32 inside, the type of x outside.

    The gradient is finite at x = 0.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    # The tiny constant keeps the derivative of the root finite at zero.
    rms = jnp.sqrt(jnp.mean(jnp.square(wide), axis=axis, keepdims=True) + 1e-20)
    return (wide / (_EPSILON + rms)).astype(x.dtype)


def mp_silu(x: jax.Array) -> jax.Array:
    """silu(x) / 0.596: unit variance for unit Gaussian input."""
    return nn.silu(x) / 0.596


def mp_sum(a: jax.Array, b: jax.Array, balance: float = 0.5) -> jax.Array:
    """((1 - balance) a + balance b) / sqrt((1 - balance)^2 + balance^2)."""
    scale = ((1 - balance) ** 2 + balance**2) ** 0.5
    return a * ((1 - balance) / scale) + b * (balance / scale)


def mp_concat(a: jax.Array, b: jax.Array, balance: float = 0.5) -> jax.Array:
    """Concatenation over the last axis in which each part contributes by `balance`."""
    size_a, size_b = a.shape[-1], b.shape[-1]
    scale = ((size_a + size_b) / ((1 - balance) ** 2 + balance**2)) ** 0.5
    return jnp.concatenate(
        [a * (scale * (1 - balance) / size_a**0.5), b * (scale * balance / size_b**0.5)], axis=-1
    )


class MPDense(nn.Module):
    """Linear layer without bias, each output's weights at unit norm. [..., in] -> [..., features].

    Attributes:
      features: outputs.
      dtype: compute type; the weight is stored and normalised in float32.
    """

    features: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, gain: jax.Array | float = 1.0) -> jax.Array:
        weight = _weight(self, (x.shape[-1], self.features), self.dtype)
        return _scaled(x.astype(self.dtype) @ weight, gain)


class MPConv(nn.Module):
    """Same-padded convolution without bias, each output's weights at unit norm, on [B, H, W, C].

    Attributes:
      features: output channels.
      size: kernel height and width.
      dtype: compute type; the weight is stored and normalised in float32.
    """

    features: int
    size: int = 3
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, gain: jax.Array | float = 1.0) -> jax.Array:
        weight = _weight(self, (self.size, self.size, x.shape[-1], self.features), self.dtype)
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            weight,
            window_strides=(1, 1),
            padding='SAME',
            dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        )
        return _scaled(y, gain)


def normalize_weights(params):
    """Forced weight normalisation: the projection to apply after every optimiser step.

    Every magnitude-preserving weight is rescaled to rms 1 for each output (its last axis); all
    other parameters are returned as they are. Idempotent up to the 1e-4 of `unit_norm`.
    Source: arXiv 2312.02696, algorithm 1.
    """

    def project(path, leaf):
        if getattr(path[-1], 'key', None) != _WEIGHT:
            return leaf
        return unit_norm(leaf, tuple(range(leaf.ndim - 1)))

    return jax.tree_util.tree_map_with_path(project, params)


def effective_weights(params, dtype: Dtype = jnp.float32):
    """Magnitude-preserving weights as the layers use them, for several calls with equal parameters.

    Given to `apply` as the collection 'effective', they are not computed again there:
    `{'params': params, 'effective': effective_weights(params, dtype)}`. The gradients of all calls
    are then summed before they go through the normalisation, and over devices reduced once.

    Args:
      params: of a network.
      dtype: compute type of its layers.
    """
    if _WEIGHT in params:
        return {_WEIGHT: _effective(params[_WEIGHT], dtype)}
    inner = {k: effective_weights(v, dtype) for k, v in params.items() if isinstance(v, Mapping)}
    return {name: tree for name, tree in inner.items() if tree}


def _effective(weight: jax.Array, dtype: Dtype) -> jax.Array:
    """unit_norm(weight) / sqrt(inputs): the weights of each output have length 1, up to 1e-4."""
    fan_in = weight.size // weight.shape[-1]
    return (unit_norm(weight, tuple(range(weight.ndim - 1))) / fan_in**0.5).astype(dtype)


def _weight(module: nn.Module, shape: tuple[int, ...], dtype: Dtype) -> jax.Array:
    """The weight of a layer at unit norm: from the collection 'effective' if there is one."""
    weight = module.param(_WEIGHT, nn.initializers.normal(1.0), shape)
    if module.has_variable('effective', _WEIGHT):
        return module.get_variable('effective', _WEIGHT)
    return _effective(weight, dtype)


def _scaled(y: jax.Array, gain: jax.Array | float) -> jax.Array:
    """A layer's output times its gain, if it has one: weights are the same in all calls."""
    return y if isinstance(gain, float) and gain == 1.0 else (y * gain).astype(y.dtype)
