"""ZCA whitening: decorrelates the pixels of a data set and keeps images looking like images."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Whitening(NamedTuple):
    """A fitted whitening; a pytree of arrays, so it travels through jit and checkpoints.

    Attributes:
      mean: float32 [d], d = H W C.
      matrix: float32 [d, d], U diag((s + eps)^-1/2) U^T, symmetric.
      inverse: float32 [d, d], U diag((s + eps)^1/2) U^T.
    """

    mean: jax.Array
    matrix: jax.Array
    inverse: jax.Array

    def apply(self, images: jax.Array) -> jax.Array:
        """(x - mean) matrix, for images [..., H, W, C] of any leading axes; float32."""
        flat = self._flat(images) - self.mean
        return jnp.matmul(flat, self.matrix, precision='highest').reshape(images.shape)

    def invert(self, images: jax.Array) -> jax.Array:
        """x inverse + mean: from whitened images [..., H, W, C] back to pixels; float32."""
        flat = jnp.matmul(self._flat(images), self.inverse, precision='highest') + self.mean
        return flat.reshape(images.shape)

    def _flat(self, images: jax.Array) -> jax.Array:
        shape = images.shape
        if int(np.prod(shape[-3:])) != self.mean.shape[0]:
            raise ValueError(
                f'This whitening was fitted to images of {self.mean.shape[0]} values, '
                f'got images of shape {list(shape[-3:])}.'
            )
        return jnp.asarray(images, jnp.float32).reshape(*shape[:-3], -1)


def fit(images: np.ndarray, eps: float = 0.4, *, chunk: int = 4096) -> Whitening:
    """Fits the whitening on the host, in float64.

        m = mean(x),   S = (x - m)^T (x - m) / (n - 1) = U diag(s) U^T
        W = U diag((s + eps)^-1/2) U^T

    Args:
      images: [n, H, W, C] of the training split, at least two.
      eps: added to the variances, in squared units of the pixels. 0.4 for images in [-1, 1] is the
        0.1 that the trajectory-matching papers use for images in [0, 1], and gives the same
        whitened values. At 0, directions without variance are projected away.
      chunk: images converted to float64 at a time.

    Raises:
      ValueError: with fewer than two images or a negative eps.

    Source: Krizhevsky 2009, appendix A; as used in Cazenavette et al. 2022, arXiv 2203.11932.
    """
    if images.ndim != 4 or images.shape[0] < 2:
        raise ValueError(f'Whitening is fitted to [n >= 2, H, W, C], got {list(images.shape)}.')
    if eps < 0:
        raise ValueError(f'eps is added to variances and cannot be negative, got {eps}.')
    count, size = images.shape[0], int(np.prod(images.shape[1:]))
    rows = np.asarray(images).reshape(count, size)
    parts = range(0, count, chunk)
    mean = sum(rows[i : i + chunk].sum(0, dtype=np.float64) for i in parts) / count
    covariance = np.zeros((size, size))
    for i in parts:
        centred = rows[i : i + chunk].astype(np.float64) - mean
        covariance += centred.T @ centred
    variances, axes = np.linalg.eigh(covariance / (count - 1))
    variances = np.maximum(variances, 0.0) + eps
    # Below rounding error relative to the largest there is no direction to speak of.
    real = variances > variances.max() * size * np.finfo(np.float64).eps
    scales = np.sqrt(np.where(real, variances, 1.0))
    matrix = (axes * np.where(real, 1 / scales, 0.0)) @ axes.T
    inverse = (axes * np.where(real, scales, 0.0)) @ axes.T
    return Whitening(*(jnp.asarray(x, jnp.float32) for x in (mean, matrix, inverse)))
