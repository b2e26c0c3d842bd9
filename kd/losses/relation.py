"""Losses on how outputs and features relate to each other, across outcomes, examples and channels.

What compares the examples of a batch is a statistic of the batch it is given: under pmap or
shard_map, of the device's share. Features may have any shape [B, ...], another on either side;
`where` bool [B] leaves examples out of all rows, and their own value is 0. Nothing is
stop-gradiented.
"""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd.losses import numerics
from kd.losses.feature import kept_examples, same_examples


def inter_class_correlation(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    where: ArrayLike | None = None,
    eps: float = 1e-8,
) -> jax.Array:
    """DIST, within an example: 1 - corr_v(q_bv, p_bv), Pearson over the outcomes.

    A student may match the teacher's probabilities up to a positive scale and a shift. T^2, with
    which the paper's code multiplies, is not applied. DIST+ adds such a term over the channels of
    features; in torchdistill 1.1.5 (`DISTPlusLoss`) it is the correlation itself that is added, 1
    where both sides agree and -1 where they are opposite, which rewards disagreement.

    Args:
      student_logits, teacher_logits: [B, V]; -inf marks an outcome impossible (probability 0).
      temperature: divides both logits.
      where: bool, broadcasts against the logits; outcomes outside it are in neither softmax, and
        neither in the correlation.
      eps: added to the product of the two standard deviations, as in the paper's code. Where one of
        them is 0 the correlation is 0.

    Returns:
      [B] in [0, 2], 0 for a row without outcomes. Nothing is stop-gradiented.

    Source: Huang et al. 2022 (DIST), arXiv 2205.10536, eqs. 8-9.
    """
    q, p, kept = _probabilities(student_logits, teacher_logits, temperature, where)
    return _correlation_distance(q, p, kept, axis=-1, eps=eps)


def intra_class_correlation(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    where: ArrayLike | None = None,
    eps: float = 1e-8,
) -> jax.Array:
    """DIST, within a class: 1 - corr_b(q_bv, p_bv), Pearson over the examples of the batch.

    A statistic of the batch it is given: under pmap or shard_map, of the device's share. Arguments
    as of `inter_class_correlation`; `where=mask[:, None]` leaves examples out.

    Returns:
      [V] in [0, 2], 0 for a class without examples. Nothing is stop-gradiented.

    Source: Huang et al. 2022 (DIST), arXiv 2205.10536, eq. 10.
    """
    q, p, kept = _probabilities(student_logits, teacher_logits, temperature, where)
    return _correlation_distance(q, p, kept, axis=0, eps=eps)


def batch_correlation(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """MLKD, across examples: sum_j ((q q^T)_bj - (p p^T)_bj)^2, q and p the probabilities [B, V].

    Its mean is the released 1/B ||M_s - M_t||_F^2. Arguments as of `inter_class_correlation`;
    `where=mask[:, None]` leaves examples out.

    Returns:
      [B].

    Source: Jin et al. 2023 (Multi-level Logit Distillation, CVPR), batch-level alignment.
    """
    q, p, _ = _probabilities(student_logits, teacher_logits, temperature, where)
    return jnp.sum((_inner(q) - _inner(p)) ** 2, axis=-1)


def class_correlation(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """MLKD, across classes: sum_w ((q^T q)_vw - (p^T p)_vw)^2, q and p the probabilities [B, V].

    A sum over the batch, not a mean, as released: it grows with the batch. Arguments as of
    `batch_correlation`; its mean is the released 1/V ||M_s - M_t||_F^2.

    Returns:
      [V].

    Source: Jin et al. 2023 (Multi-level Logit Distillation, CVPR), class-level alignment.
    """
    q, p, _ = _probabilities(student_logits, teacher_logits, temperature, where)
    return jnp.sum((_inner(q.T) - _inner(p.T)) ** 2, axis=-1)


def rkd_distance(
    student_features: ArrayLike, teacher_features: ArrayLike, *, where: ArrayLike | None = None
) -> jax.Array:
    """RKD-D: mean_j huber(d^s_bj / mu_s - d^t_bj / mu_t), d the distances between examples.

    mu is the mean of the distances that are not 0, huber(x) = x^2 / 2 up to 1 and |x| - 1/2 beyond.
    The mean counts j = b, as the released code does. Distances come from the Gram matrix of the
    centred features; those below its rounding error are 0, with gradient 0.

    Returns:
      [B].

    Source: Park et al. 2019 (RKD), arXiv 1904.05068.
    """
    student, teacher = same_examples('rkd_distance', student_features, teacher_features)
    kept = kept_examples(where, student.shape[0])
    pairs = kept[:, None] & kept

    def relative(features):
        distances = jnp.where(pairs, _distances(_flat(features, kept), kept)[1], 0.0)
        mean = jnp.sum(distances) / jnp.maximum(jnp.sum(distances > 0), 1)
        return distances / jnp.where(mean > 0, mean, 1.0)

    value = _huber(relative(student) - relative(teacher))
    return jnp.sum(value, axis=-1) / jnp.maximum(jnp.sum(kept), 1)


def rkd_angle(
    student_features: ArrayLike, teacher_features: ArrayLike, *, where: ArrayLike | None = None
) -> jax.Array:
    """RKD-A: mean_jk huber(cos^s_jbk - cos^t_jbk), the angles at b between examples j and k.

        cos_jbk = (G_jk - G_jb - G_bk + G_bb) / (d_bj d_bk)

    with G the Gram matrix, so that nothing is larger than the [B, B, B] angles themselves: the
    released code holds the [B, B, D] differences. 0 where two of the three coincide.

    Returns:
      [B].

    Source: Park et al. 2019 (RKD), arXiv 1904.05068.
    """
    student, teacher = same_examples('rkd_angle', student_features, teacher_features)
    kept = kept_examples(where, student.shape[0])

    def cosines(features):
        gram, distances = _distances(_flat(features, kept), kept)
        inverse = jnp.where(distances > 0, 1 / jnp.where(distances > 0, distances, 1.0), 0.0)
        own = jnp.diagonal(gram)[:, None, None]
        products = gram[None] - gram[:, :, None] - gram[:, None, :] + own
        return products * inverse[:, :, None] * inverse[:, None, :]

    kept_pairs = kept[:, None] & kept
    difference = jnp.where(kept_pairs, cosines(student) - cosines(teacher), 0.0)
    value = jnp.sum(_huber(difference), axis=(1, 2)) / jnp.maximum(jnp.sum(kept), 1) ** 2
    return jnp.where(kept, value, 0.0)


def probabilistic_transfer(
    student_features: ArrayLike,
    teacher_features: ArrayLike,
    *,
    eps: float = 1e-7,
    where: ArrayLike | None = None,
) -> jax.Array:
    """PKT: KL of the row b of p to that of q, sum_j p_bj log((p_bj + eps) / (q_bj + eps)).

    p_bj and q_bj are the shifted cosines (1 + cos(f_b, f_j)) / 2 of teacher and student, divided by
    their sum over j. The value of the released code, a mean over all pairs, is 1/B of the mean.

    Returns:
      [B] nats.

    Source: Passalis and Tefas 2018 (PKT), arXiv 1803.10837, with the cosine kernel.
    """
    student, teacher = same_examples('probabilistic_transfer', student_features, teacher_features)
    kept = kept_examples(where, student.shape[0])

    def affinities(features):
        kernel = jnp.maximum(_inner(numerics.unit(_flat(features, kept))) + 1, 0.0) / 2
        kernel = jnp.where(kept[:, None] & kept, kernel, 0.0)
        total = jnp.sum(kernel, axis=-1, keepdims=True)
        return kernel / jnp.where(total > 0, total, 1.0)

    q, p = affinities(student), affinities(teacher)
    return jnp.sum(p * (jnp.log(p + eps) - jnp.log(q + eps)), axis=-1)


def correlation_congruence(
    student_features: ArrayLike,
    teacher_features: ArrayLike,
    *,
    kernel: Literal['bilinear', 'gaussian'] = 'gaussian',
    gamma: float = 0.4,
    order: int = 2,
    where: ArrayLike | None = None,
) -> jax.Array:
    """CCKD: (1/B) sum_j (K^s_bj - K^t_bj)^2, K the kernel of features of unit length.

    Its mean is the paper's 1/B^2 ||K_s - K_t||_F^2. `bilinear` is K_ij = <f_i, f_j>; `gaussian` the
    expansion of exp(-gamma ||f_i - f_j||^2) up to `order`,

        K_ij = sum_{p <= order} e^(-2 gamma) (2 gamma)^p / p! <f_i, f_j>^p,

    which is that kernel for unit vectors only: therefore they are made so here.

    Returns:
      [B].

    Raises:
      ValueError: another kernel.

    Source: Peng et al. 2019 (CCKD), arXiv 1904.01802.
    """
    if kernel not in ('bilinear', 'gaussian'):
        raise ValueError(f"kernel must be 'bilinear' or 'gaussian', got {kernel!r}.")
    student, teacher = same_examples('correlation_congruence', student_features, teacher_features)
    kept = kept_examples(where, student.shape[0])

    def kernels(features):
        cosine = _inner(numerics.unit(_flat(features, kept)))
        if kernel == 'bilinear':
            return cosine
        terms = ((2 * gamma) ** p / math.factorial(p) * cosine**p for p in range(1, order + 1))
        return math.exp(-2 * gamma) * (1 + sum(terms))

    difference = jnp.where(kept[:, None] & kept, kernels(student) - kernels(teacher), 0.0)
    return jnp.sum(difference**2, axis=-1) / jnp.maximum(jnp.sum(kept), 1)


def channel_correlation(student_features: ArrayLike, teacher_features: ArrayLike) -> jax.Array:
    """ICKD: (1/C) ||G_s - G_t||_F^2 with G [C, C] the cosines between an example's channels.

    A channel is its vector over positions. The paper divides by C^2, its code by C. Positions may
    differ between the sides; it needs some: with a single one every cosine is a sign.

    Args:
      student_features, teacher_features: [B, ..., C].

    Returns:
      [B].

    Raises:
      ValueError: channels that differ.

    Source: Liu et al. 2021 (ICKD), arXiv 2202.03680.
    """
    student, teacher = same_examples('channel_correlation', student_features, teacher_features)
    if student.shape[-1] != teacher.shape[-1]:
        raise ValueError(
            'channel_correlation needs features [B, ..., C] of as many channels, got '
            f'{student.shape} and {teacher.shape}; give the student a projector.'
        )

    def correlations(features):
        channels = features.reshape(features.shape[0], -1, features.shape[-1])
        return _inner(numerics.unit(jnp.swapaxes(channels, 1, 2)))

    difference = correlations(student) - correlations(teacher)
    return jnp.sum(difference**2, axis=(1, 2)) / student.shape[-1]


def _flat(features, kept):
    return jnp.where(kept[:, None], features.reshape(features.shape[0], -1), 0.0)


def _inner(x):
    return jnp.matmul(x, jnp.swapaxes(x, -1, -2), precision='highest')


def _huber(x):
    size = jnp.abs(x)
    return jnp.where(size < 1, 0.5 * x * x, size - 0.5)


def _distances(x, kept):
    """(Gram matrix, distances), each [B, B], of the rows less the mean of those that are kept."""
    mean = jnp.sum(x, axis=0) / jnp.maximum(jnp.sum(kept), 1)
    gram = _inner(jnp.where(kept[:, None], x - mean, 0.0))
    squares = jnp.diagonal(gram)
    sums = squares[:, None] + squares
    square = sums - 2 * gram
    apart = square > 8 * jnp.finfo(x.dtype).eps * sums
    return gram, jnp.where(apart, jnp.sqrt(jnp.where(apart, square, 1.0)), 0.0)


def _probabilities(student_logits, teacher_logits, temperature, where):
    student_logits, teacher_logits = jnp.asarray(student_logits), jnp.asarray(teacher_logits)
    if student_logits.ndim != 2 or student_logits.shape != teacher_logits.shape:
        raise ValueError(
            'DIST needs student and teacher logits of one shape [B, V], got '
            f'{student_logits.shape} and {teacher_logits.shape}.'
        )
    q, p = (
        jnp.exp(numerics.log_softmax(logits, temperature=temperature, where=where))
        for logits in (student_logits, teacher_logits)
    )
    kept = jnp.ones(q.shape, bool) if where is None else jnp.broadcast_to(where, q.shape)
    return q, p, kept


def _correlation_distance(a, b, kept, *, axis, eps):
    count = jnp.sum(kept, axis=axis, keepdims=True)

    def centred(x):
        x = jnp.where(kept, x, 0.0)
        mean = jnp.sum(x, axis=axis, keepdims=True) / jnp.maximum(count, 1)
        return jnp.where(kept, x - mean, 0.0)

    a, b = centred(a), centred(b)
    norms = numerics.norm(a, axis=axis) * numerics.norm(b, axis=axis) + eps
    distance = 1 - jnp.sum(a * b, axis=axis) / jnp.where(norms > 0, norms, 1.0)
    return jnp.where(jnp.squeeze(count, axis) > 0, distance, 0.0)
