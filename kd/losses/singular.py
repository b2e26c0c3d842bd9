"""KDSVD: losses on the singular vectors of feature maps."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd.losses import numerics
from kd.losses.feature import same_examples


def singular_vectors(
    student_pair: tuple[ArrayLike, ArrayLike],
    teacher_pair: tuple[ArrayLike, ArrayLike],
    *,
    k: int = 1,
    spare: int = 3,
) -> jax.Array:
    """KDSVD: how the main directions of two layers lie to each other, on both sides.

        sum_cdi (K^s_cdi - K^t_cdi)^2,    K_cdi = exp(-(v_ci - w_di)^2 / 8)

    with v and w [C, k] the first right singular vectors of the two layers' features
    [positions, C], each times the teacher's singular value as a share of the length of the k. A
    student's vector is that of its first k + `spare` which is most parallel to the teacher's, with
    its sign. RepDistiller has these axes; mdistiller takes [C H, W], whose right singular vectors
    are of columns of pixels. The sign of a singular vector is arbitrary and counts here, so ours:
    the teacher's largest entry is positive. Where singular values coincide, the gradient has no
    part that turns their vectors into each other.

    Args:
      student_pair, teacher_pair: two layers of each network, [B, ..., C] and [B, ..., D]; channels
        must be as many on both sides, positions may differ.
      k: vectors that are compared.
      spare: see above.

    Returns:
      [B].

    Raises:
      ValueError: channels that differ, or fewer than k positions or channels.

    Source: Lee, Kim and Song 2018 (KD-SVD), arXiv 1807.06819, and RepDistiller.
    """
    (v_s, v_t), (w_s, w_t) = (
        _main_directions(student, teacher, k, spare)
        for student, teacher in zip(student_pair, teacher_pair, strict=True)
    )

    def kernel(v, w):
        return jnp.exp(-((v[:, :, None] - w[:, None]) ** 2) / 8)

    return jnp.sum((kernel(v_s, w_s) - kernel(v_t, w_t)) ** 2, axis=(1, 2, 3))


def _main_directions(student, teacher, k, spare):
    """([B, C, k] of the student, [B, C, k] of the teacher), as `singular_vectors` has them."""
    student, teacher = same_examples('singular_vectors', student, teacher)
    student, teacher = _rows(student), _rows(teacher)
    fewest = min(*student.shape[1:], *teacher.shape[1:])
    if student.shape[-1] != teacher.shape[-1] or k > fewest:
        raise ValueError(
            f'singular_vectors needs features [B, positions, C] of as many channels and at least '
            f'k={k} of both, got {student.shape} and {teacher.shape}; give the student a projector.'
        )
    ours, _ = _right_singular(student, k + spare)
    theirs, values = _right_singular(teacher, k)
    peak = jnp.argmax(jnp.abs(theirs), axis=1, keepdims=True)
    theirs = theirs * jnp.sign(jnp.take_along_axis(theirs, peak, axis=1))
    cosine = jnp.einsum('bci,bcj->bij', ours, theirs, precision='highest')
    nearest = jnp.argmax(jnp.abs(cosine), axis=1, keepdims=True)
    sign = jnp.sign(jnp.take_along_axis(cosine, nearest, axis=1))
    ours = jnp.take_along_axis(ours, nearest, axis=2) * sign
    share = numerics.unit(values)[:, None]
    return ours * share, theirs * share


def _right_singular(x, count):
    """First right singular vectors [B, C, count] and values [B, count] of [B, P, C].

    The vectors are constants plus what a small change of x would change, to first order:
    dV = V (F o dA) + (1 - V V^T) dW / s^2 with A = (x V)^T x V, W = x^T x V and
    F_ij = 1 / (s_j^2 - s_i^2), 0 where they coincide, so that the gradient is finite everywhere.
    """
    highest = partial(jnp.einsum, precision='highest')
    _, s, vt = jnp.linalg.svd(jax.lax.stop_gradient(x), full_matrices=False)
    v, squares = jnp.swapaxes(vt, 1, 2), s**2
    y = highest('bpc,bci->bpi', x, v)
    a, w = highest('bpi,bpj->bij', y, y), highest('bpc,bpi->bci', x, y)
    a, w = (z - jax.lax.stop_gradient(z) for z in (a, w))
    least = 8 * jnp.finfo(x.dtype).eps * squares[:, :1]
    gap = squares[:, None] - squares[:, :, None]
    apart = jnp.abs(gap) > least[..., None]
    within = highest('bci,bij->bcj', v, jnp.where(apart, a / jnp.where(apart, gap, 1.0), 0.0))
    outside = w - highest('bci,bdi,bdj->bcj', v, v, w)
    some = squares > least
    outside = jnp.where(some, 1 / jnp.where(some, squares, 1.0), 0.0)[:, None] * outside
    values = numerics.norm(y, axis=1)
    return (v + within + outside)[..., :count], values[:, :count]


def _rows(x):
    return x.reshape(x.shape[0], -1, x.shape[-1])
