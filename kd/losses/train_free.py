"""How well an untrained student would learn from an untrained teacher, told by one batch.

Scores are at most 0, and higher is better. Both networks are at their random start and normalise by
the statistics of the batch; running averages that nothing has run through would say something else.

Source: DisWOT 2023, arXiv 2303.15678.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd.losses import numerics
from kd.losses.feature import similarity_preserving


def relation_score(student_features: ArrayLike, teacher_features: ArrayLike) -> jax.Array:
    """M_r = -||rn(F_t F_t^T) - rn(F_s F_s^T)||_F^2 / B^2, with rn the scaling of rows to length 1.

    Args:
      student_features, teacher_features: [B, ...] before the last pooling, of any other shapes.

    Returns:
      [], in [-4 / B, 0]; at least -2 / B for features that are not negative.

    Source: arXiv 2303.15678, as released.
    """
    return -jnp.mean(similarity_preserving(student_features, teacher_features))


def classifier_gradient(pooled: ArrayLike, logits: ArrayLike, labels: ArrayLike) -> jax.Array:
    """mean_b (softmax(z_b) - y_b) f_b^T: of the mean cross-entropy by the classifier's weights.

    Args:
      pooled: [B, D], what the classifier sees.
      logits: [B, C].
      labels: int [B].

    Returns:
      [C, D], the map of each class summed over space, in the sense of Grad-CAM.
    """
    pooled, logits = jnp.asarray(pooled), jnp.asarray(logits)
    pooled = pooled.astype(numerics.accumulation_dtype(pooled))
    apart = jnp.exp(numerics.log_softmax(logits)) - numerics.one_hot(labels, logits.shape[-1])
    return jnp.einsum('bc,bd->cd', apart, pooled, precision='highest') / len(pooled)


def semantic_score(student_gradient: ArrayLike, teacher_gradient: ArrayLike) -> jax.Array:
    """M_s = -(1 / C D) sum_c ||rn(t_c t_c^T) - rn(s_c s_c^T)||_F^2, without the products.

    Row d of rn(t t^T) is sign(t_d) t / ||t||, so that for entries that are not 0 this is
    -mean_{c, d} (2 - 2 sign(t_cd s_cd) cos(t_c, s_c)); a row of an entry 0 is 0.

    Args:
      student_gradient, teacher_gradient: [C, D] of one shape, see `classifier_gradient`.

    Returns:
      [], in [-4, 0]. The sign of a class in either side is no matter, nor is its length.

    Raises:
      ValueError: shapes that differ; `class_semantic_score` compares networks of other widths.

    Source: arXiv 2303.15678, as released.
    """
    student, teacher = jnp.asarray(student_gradient), jnp.asarray(teacher_gradient)
    if student.shape != teacher.shape or student.ndim != 2:
        raise ValueError(
            f'semantic_score needs gradients [C, D] of one shape, got {student.shape} and '
            f'{teacher.shape}; class_semantic_score compares networks of other widths.'
        )
    dtype = numerics.accumulation_dtype(student, teacher)
    student, teacher = student.astype(dtype), teacher.astype(dtype)
    cosine = jnp.sum(numerics.unit(student) * numerics.unit(teacher), axis=-1, keepdims=True)
    signs = jnp.sign(student), jnp.sign(teacher)
    squares = signs[0] ** 2 + signs[1] ** 2 - 2 * signs[0] * signs[1] * cosine
    return -jnp.mean(squares)


def class_semantic_score(student_gradient: ArrayLike, teacher_gradient: ArrayLike) -> jax.Array:
    """-||rn(t t^T) - rn(s s^T)||_F^2 / C: how classes resemble each other, for any widths.

    Ours, for students whose width is not the teacher's.

    Args:
      student_gradient, teacher_gradient: [C, D] and [C, D'].

    Returns:
      [].
    """
    return -jnp.sum(similarity_preserving(student_gradient, teacher_gradient))
