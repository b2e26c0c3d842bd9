"""Flatness of a loss in its parameters and smoothness of a network in its inputs: what makes the
training trajectory of an expert easy to follow.

Sources: Foret et al. 2020, arXiv 2010.01412 (SAM); Kwon et al. 2021, arXiv 2102.11600 (adaptive);
Zhuang et al. 2022, arXiv 2203.08065 (GSAM); as used for experts by Du et al. 2022, arXiv
2211.11004; Shen et al. 2023, arXiv 2310.10541 (gradient penalty, perturbed kernels).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kd.losses import numerics

PyTree = Any


def sam_perturbation(params: PyTree, grads: PyTree, rho: float, *, adaptive: bool) -> PyTree:
    """The step of length rho towards higher loss, over all leaves as one vector.

        e = rho g / ||g||                                   plain: ||e|| = rho
        e = rho theta^2 g / || |theta| g ||                  adaptive, elementwise; a parameter at 0
                                                            stays where it is

    Args:
      params, grads: pytrees of one structure.
      rho: radius, 0 or more.
      adaptive: see above.

    Returns:
      A pytree like `params`; zero where the gradient is zero everywhere.

    Source: arXiv 2010.01412; adaptive form arXiv 2102.11600.
    """
    if adaptive:
        direction = jax.tree.map(lambda p, g: p * p * g, params, grads)
        length = _norm(jax.tree.map(lambda p, g: p * g, params, grads))
    else:
        direction, length = grads, _norm(grads)
    return jax.tree.map(lambda d: (rho / (length + 1e-12) * d).astype(d.dtype), direction)


def gsam_gradient(
    loss: Callable[[PyTree], jax.Array],
    params: PyTree,
    *,
    rho: float,
    alpha: float = 0.0,
    adaptive: bool = False,
) -> tuple[jax.Array, PyTree]:
    """Gradient of surrogate-gap guided sharpness-aware minimisation.

        g_0 = grad loss(theta),  g_1 = grad loss(theta + e),  e = sam_perturbation(theta, g_0)
        v = g_0 - (g_0 . g_1) g_1 / ||g_1||^2          the part of g_0 orthogonal to g_1
        returned: g_1 - alpha v

    alpha = 0 is sharpness-aware minimisation; with rho = 0 too, the plain gradient bit for bit.

    Args:
      loss: scalar function of the parameters on one batch; both gradients are of this batch.
      params: pytree.
      rho: radius of the perturbation. An adaptive radius is about ten times as large for the same
        effect, since it is measured relative to the parameters.
      alpha: weight of the surrogate gap.
      adaptive: perturb parameters in proportion to their squares.

    Returns:
      loss(theta), before the perturbation, and the gradient.

    Source: arXiv 2203.08065, algorithm 1, as released for experts with arXiv 2211.11004.
    """
    value, plain = jax.value_and_grad(loss)(params)
    ascent = sam_perturbation(params, plain, rho, adaptive=adaptive)
    sharp = jax.grad(loss)(jax.tree.map(jnp.add, params, ascent))
    squared = numerics.tree_dot(sharp, sharp)
    share = jnp.where(
        squared > 0, numerics.tree_dot(plain, sharp) / jnp.where(squared > 0, squared, 1.0), 0.0
    )

    def combine(g, h):
        orthogonal = g - share.astype(g.dtype) * h
        return h - alpha * orthogonal

    return value, jax.tree.map(combine, plain, sharp)


def largest_curvature(
    loss: Callable[[PyTree], jax.Array], params: PyTree, key: jax.Array, *, iterations: int = 30
) -> jax.Array:
    """Eigenvalue of largest magnitude of the loss's Hessian, by power iteration.

    Args:
      loss: scalar function of the parameters.
      params: pytree at which the Hessian is taken.
      key: of the first direction.
      iterations: Hessian-vector products.

    Returns:
      Scalar, the Rayleigh quotient at the last direction, signed.
    """
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    start = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]

    def product(direction):
        return jax.jvp(jax.grad(loss), (params,), (direction,))[1]

    def normalised(tree):
        length = _norm(tree)
        return jax.tree.map(lambda x: (x / jnp.maximum(length, 1e-30)).astype(x.dtype), tree)

    def body(direction, _):
        image = product(direction)
        return normalised(image), numerics.tree_dot(direction, image)

    first = normalised(jax.tree.unflatten(treedef, start))
    return jax.lax.scan(body, first, None, length=iterations)[1][-1]


def gradient_penalty(
    apply: Callable[[jax.Array], jax.Array], inputs: jax.Array, *, axis: int | tuple[int, ...] = -1
) -> jax.Array:
    """How far the input gradient of a network is from norm 1, place by place.

        ( || d/dx sum_k f_k(x) ||_2 - 1 )^2,   the norm over `axis`

    Args:
      apply: `apply(inputs) -> logits [B, K]`, the network with its parameters bound. An example's
        logits must depend on that example alone.
      inputs: float [B, H, W, C], not augmented.
      axis: axes of the norm; the channels by default, as published. All axes but the first give
        the penalty of WGAN-GP.

    Returns:
      `inputs` without `axis`, [B, H, W] by default, unreduced. Differentiable in the parameters, a
      second derivative of the network.

    Source: arXiv 2310.10541, gradient penalty.
    """
    gradient = jax.grad(lambda x: jnp.sum(apply(x)))(inputs)
    squared = jnp.sum(jnp.square(gradient), axis)
    # The root of 0 would have an infinite gradient.
    norm = jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1.0)), 0.0)
    return jnp.square(norm - 1.0)


def perturb_kernels(key: jax.Array, params: PyTree, alpha: float = 1.0) -> PyTree:
    """Perturbs every convolution kernel, relative to itself, in a random direction of norm alpha.

        W <- W + alpha W * d / ||d||_F,   d ~ N(0, 1) of the shape of W, elementwise product

    Args:
      key: typed random key.
      params: pytree; leaves of four axes are kernels, all others stay bit for bit.
      alpha: size of the perturbation.

    Source: arXiv 2310.10541, weight perturbation.
    """
    leaves, treedef = jax.tree.flatten(params)

    def perturbed(index, kernel):
        if kernel.ndim != 4:
            return kernel
        direction = jax.random.normal(jax.random.fold_in(key, index), kernel.shape, kernel.dtype)
        return kernel + alpha / jnp.linalg.norm(direction) * direction * kernel

    return jax.tree.unflatten(treedef, [perturbed(i, x) for i, x in enumerate(leaves)])


def _norm(tree: PyTree) -> jax.Array:
    return jnp.sqrt(numerics.tree_dot(tree, tree))
