"""What an example does to the loss on a validation set: influence functions, and weights of them.

Source: Koh and Liang 2017, arXiv 1703.04730; the weights, arXiv 2501.02705. No per-example gradient
is formed: one linear system is solved, and one forward-mode product gives all examples of a chunk.

Callables take the parameters alone; restrict them to a part (the last layer) and everything here is
of that part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd.losses import numerics

PyTree = Any


def gauss_newton_product(
    logits: Callable[[PyTree], jax.Array],
    params: PyTree,
    v: PyTree,
    *,
    loss: Callable[[jax.Array], jax.Array] | None = None,
    weights: ArrayLike | None = None,
    damping: ArrayLike = 0.0,
) -> PyTree:
    """(G + damping I) v,   G = sum_i w_i J_i^T H_i J_i / n.

    J_i is the Jacobian of the logits of example i, H_i the Hessian of its loss with respect to
    them. G is that of the Hessian of the mean loss in which the logits count as linear: it is the
    Hessian of a linear softmax model, and positive semi-definite for any network whose loss is
    convex in the logits.

    Args:
      logits: `logits(params) -> [n, C]`.
      params: where.
      v: tree of the form of `params`.
      loss: `loss(logits [n, C]) -> [n]`, without parameters of its own; None for the cross-entropy,
        whose H = diag(p) - p p^T no label changes.
      weights: [n], w; None for 1.
      damping: a number from 0.

    Returns:
      A tree of the form of `params`.
    """
    z, forward = jax.linearize(logits, params)
    tangent, backward = forward(v), jax.linear_transpose(forward, params)
    if loss is None:
        p = jax.nn.softmax(z)
        curved = p * (tangent - jnp.sum(p * tangent, -1, keepdims=True))
    else:
        curved = jax.jvp(jax.grad(lambda z: jnp.sum(loss(z))), (z,), (tangent,))[1]
    if weights is not None:
        curved = jnp.asarray(weights)[:, None] * curved
    (product,) = backward(curved / len(z))
    return jax.tree.map(lambda g, x: g + damping * x, product, v)


def conjugate_gradient(
    product: Callable[[PyTree], PyTree], b: PyTree, *, iterations: int
) -> tuple[PyTree, jax.Array]:
    """(x, |b - A x| / |b|): the solution of A x = b after a fixed number of iterations.

    Of fixed length, as a loop that ends by itself is not one program under jit and vmap. Dot
    products are of the type of `b`, float32 at least. Where the residual has come down to rounding
    the rest of the iterations change nothing.

    Args:
      product: A x, A symmetric and positive definite.
      b: tree of arrays.
      iterations: how many.

    Returns:
      x, and the relative residual, computed anew from x: what is above 1e-2 is no solution.
    """
    b = jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), b)
    total = numerics.tree_dot(b, b)
    floor = jnp.square(jnp.finfo(total.dtype).eps) * total

    def body(carry, _):
        x, r, p, rr = carry
        along = product(p)
        curvature = numerics.tree_dot(p, along)
        goes_on = (rr > floor) & (curvature > 0)
        step = jnp.where(goes_on, rr / jnp.where(goes_on, curvature, 1.0), 0.0)
        x, r = _add(x, step, p), _add(r, -step, along)
        new = jnp.where(goes_on, numerics.tree_dot(r, r), rr)
        p = _add(r, jnp.where(goes_on, new / jnp.where(rr > 0, rr, 1.0), 1.0), p)
        return (x, r, p, new), None

    zero = jax.tree.map(jnp.zeros_like, b)
    (x, *_), _ = jax.lax.scan(body, (zero, b, b, total), None, length=iterations)
    left = _add(b, -1.0, product(x))
    return x, jnp.sqrt(numerics.tree_dot(left, left) / jnp.where(total > 0, total, 1.0))


def influence(losses: Callable[[PyTree], jax.Array], params: PyTree, solved: PyTree) -> jax.Array:
    """-<x, grad l_i>, [n], of all examples by one forward-mode product.

    Args:
      losses: `losses(params) -> [n]`.
      params: where.
      solved: x = (G + damping I)^{-1} grad Lv; any other direction gives alignment with it.
    """
    return -jax.jvp(losses, (params,), (solved,))[1]


def influence_on_validation(
    losses: Callable[[PyTree, PyTree], jax.Array],
    params: PyTree,
    pool: PyTree,
    validation_gradient: PyTree,
    product: Callable[[PyTree], PyTree],
    *,
    iterations: int,
) -> tuple[jax.Array, jax.Array]:
    """I_i = -grad Lv^T A^{-1} grad l_i: how much weight on example i raises the validation loss.

    With theta_w the minimum of (1/n) sum_i w_i l_i + a regulariser, and A the Hessian there,
    d Lv(theta_w) / d w_i = I_i / n. Helpful examples have I < 0, harmful ones I > 0.

    Args:
      losses: `losses(params, chunk) -> [m]`, of the examples of a chunk.
      params: near the minimum; where the gradient of the risk is large, I is no more than alignment
        of gradients.
      pool: tree of arrays [chunks, m, ...].
      validation_gradient: grad Lv, tree of the form of `params`.
      product: v -> A v, such as `gauss_newton_product`.
      iterations: of `conjugate_gradient`.

    Returns:
      (I [chunks * m], relative residual of the solution).

    Source: arXiv 1703.04730, section 2; arXiv 2501.02705.
    """
    solved, residual = conjugate_gradient(product, validation_gradient, iterations=iterations)
    found = jax.lax.map(lambda chunk: influence(lambda p: losses(p, chunk), params, solved), pool)
    return found.reshape(-1), residual


def influence_weights(
    influences: ArrayLike, *, kappa: float = 3.0, eps: float = 1e-12, where: ArrayLike | None = None
) -> jax.Array:
    """w_i = sigmoid(-kappa I_i / (std I + eps)), [n] in (0, 1), stop-gradiented.

    kappa = 0 weighs all alike, by 1/2; kappa to infinity keeps those with I < 0 alone. Losses that
    are all scaled by one number leave the weights as they are, where damping is scaled with them.

    Args:
      influences: [n].
      kappa: a number from 0; 3, and the deviation as its unit, are ours.
      eps: of the deviation, where all influences are equal.
      where: bool [n], what the deviation is taken over.

    Source: arXiv 2501.02705.
    """
    influences = jax.lax.stop_gradient(jnp.asarray(influences))
    return jax.nn.sigmoid(-kappa * influences / (jnp.std(influences, where=where) + eps))


def teacher_feedback(
    teacher_logits: ArrayLike,
    labels: ArrayLike,
    influences: ArrayLike,
    *,
    deviation: ArrayLike | None = None,
    eps: float = 1e-12,
) -> jax.Array:
    """s_i CE(y_i, teacher), s_i = -I_i / std I: a teacher is held to pseudo-labels that helped.

    And moved away from those that harmed its student. Labels and influences are stop-gradiented.

    Args:
      teacher_logits: [n, C].
      labels: int [n], what the student was taught.
      influences: [n], of these examples on the student's loss on labelled ones.
      deviation: std I, a number or [n], where these are a part of the examples; None for that of
        these, which of a part is another.
      eps: of the deviation.

    Returns:
      [n].

    Source: arXiv 2501.02705, semi-supervised; the form is ours, after Pham et al. 2020, arXiv
    2003.10580.
    """
    influences = jax.lax.stop_gradient(jnp.asarray(influences))
    log_p = jax.nn.log_softmax(jnp.asarray(teacher_logits))
    chosen = jax.lax.stop_gradient(jnp.asarray(labels))[:, None]
    if deviation is None:
        deviation = jnp.std(influences)
    scale = -influences / (jax.lax.stop_gradient(jnp.asarray(deviation)) + eps)
    return -scale * jnp.take_along_axis(log_p, chosen, axis=1)[:, 0]


def _add(a: PyTree, scale: Any, b: PyTree) -> PyTree:
    return jax.tree.map(lambda x, y: x + scale * y, a, b)
