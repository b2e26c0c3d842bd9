"""Rotary position embedding, and how it reaches beyond the lengths of pre-training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ['SCALINGS', 'angles', 'frequencies', 'grid_angles', 'rotate']

# Kinds of `rope_scaling`, and what each needs beside `factor`.
SCALINGS: dict[str, tuple[str, ...]] = {
    'linear': (),
    'llama3': ('low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings'),
    'yarn': ('original_max_position_embeddings',),
}


def frequencies(
    size: int, theta: float, scaling: Mapping[str, Any] | None = None
) -> tuple[np.ndarray, float]:
    """Radians per position of each pair of features, and a factor on cosines and sines.

    Without scaling w_i = theta^(-2i / size), i < size / 2 (Su et al., arXiv:2104.09864), and 1.
    The kinds of scaling, by factor s:

    - 'linear': w_i / s (arXiv:2306.15595).
    - 'llama3': w_i / s where the wavelength is above n / low_freq_factor, w_i where it is below n /
      high_freq_factor, between them interpolated linearly in n / wavelength; n the length of
      pre-training (Llama 3.1).
    - 'yarn': w_i / s below `beta_slow` (1) turns in n, w_i above `beta_fast` (32), between them
      interpolated linearly in i; and the factor 0.1 ln s + 1 unless `attention_factor` is given
      (arXiv:2309.00071).

    Args:
      size: features of a head, even.
      theta: base of the wavelengths.
      scaling: `rope_type`, `factor` and what the kind needs, by the names of Hugging Face's
        config.json; None for none.

    Returns:
      float64 [size / 2], float.

    Raises:
      ValueError: a kind that is not there, or one that lacks what it needs.
    """
    plain = theta ** (-np.arange(0, size, 2) / size)
    if scaling is None:
        return plain, 1.0
    kind = check(scaling)
    factor = float(scaling['factor'])
    if kind == 'linear':
        return plain / factor, 1.0
    turns = scaling['original_max_position_embeddings'] * plain / (2 * math.pi)
    if kind == 'llama3':
        low, high = scaling['low_freq_factor'], scaling['high_freq_factor']
        kept = np.clip((turns - low) / (high - low), 0, 1)
        return plain * (kept + (1 - kept) / factor), 1.0
    slow, fast = scaling.get('beta_slow', 1.0), scaling.get('beta_fast', 32.0)

    def place(of_turns: float) -> float:
        """The (fractional) pair of features that turns so often in n positions."""
        n = scaling['original_max_position_embeddings']
        return size * math.log(n / (of_turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = max(math.floor(place(fast)), 0), min(math.ceil(place(slow)), size - 1)
    slowed = np.clip((np.arange(size // 2) - first) / max(last - first, 0.001), 0, 1)
    stretch = float(scaling.get('attention_factor') or 0.1 * math.log(factor) + 1)
    return plain * (1 - slowed) + plain / factor * slowed, stretch


def check(scaling: Mapping[str, Any]) -> str:
    """The kind of a scaling that has what it needs, else ValueError."""
    kind = str(scaling.get('rope_type', scaling.get('type', '')))
    if kind not in SCALINGS:
        raise ValueError(f"rope_scaling '{kind}' is none of {list(SCALINGS)}.")
    if missing := [name for name in ('factor', *SCALINGS[kind]) if name not in scaling]:
        raise ValueError(f"rope_scaling '{kind}' lacks {missing}.")
    return kind


def angles(
    positions: jax.Array,
    size: int,
    theta: float,
    scaling: Mapping[str, Any] | None = None,
    *,
    dtype: Any = jnp.float32,
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [B, T, 1, size / 2] of positions int [B, T]."""
    speed, stretch = frequencies(size, theta, scaling)
    angle = positions[..., None, None].astype(dtype) * jnp.asarray(speed, dtype)
    return jnp.cos(angle) * stretch, jnp.sin(angle) * stretch


def grid_angles(
    positions: Sequence[np.ndarray], sizes: Sequence[int], theta: float = 1e4
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [1, T, 1, sum of sizes / 2] of positions along several axes.

    Args:
      positions: [T] for each axis.
      sizes: features that turn by each, even.
      theta: base of the wavelengths.
    """
    each = zip(positions, sizes, strict=True)
    angle = np.concatenate([np.outer(x, frequencies(n, theta)[0]) for x, n in each], axis=-1)
    return (
        jnp.asarray(np.cos(angle), jnp.float32)[None, :, None],
        jnp.asarray(np.sin(angle), jnp.float32)[None, :, None],
    )


def rotate(x: jax.Array, turned: tuple[jax.Array, jax.Array], *, paired: bool = False) -> jax.Array:
    """Features [B, T, H, d] rotated by pairs (i, i + d / 2), as language models have them.

    With `paired` by pairs (2i, 2i + 1), as diffusion transformers have them.
    """
    cos, sin = turned
    if paired:
        first, second = x[..., ::2].astype(cos.dtype), x[..., 1::2].astype(cos.dtype)
        out = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
        return out.reshape(x.shape).astype(x.dtype)
    first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    out = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return out.astype(x.dtype)
