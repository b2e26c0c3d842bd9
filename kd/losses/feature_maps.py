"""Losses on feature maps [B, ..., C]: positions in the middle, channels last.

Student first, one value per example, in float32 (float64 for float64 input). Nothing is
stop-gradiented. Where channels or positions of the sides differ, bring the student's to the
teacher's by a projector (`kd.models.projectors`) and `pooled`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd.losses import divergence, numerics
from kd.losses.feature import same_examples


def pooled(features: ArrayLike, size: Sequence[int]) -> jax.Array:
    """Means over an even grid of `size` windows: adaptive average pooling of [B, H, W, ..., C].

    Window i of n over L positions is floor(i L / n) up to ceil((i + 1) L / n), as in PyTorch; a
    larger `size` repeats positions.

    Args:
      features: [B, *positions, C].
      size: windows along each axis of positions.

    Returns:
      [B, *size, C].

    Raises:
      ValueError: as many sizes as there are axes of positions are needed.
    """
    x = jnp.asarray(features)
    x = x.astype(numerics.accumulation_dtype(x))
    if len(size) != x.ndim - 2:
        raise ValueError(f'{x.ndim - 2} sizes are needed for features {x.shape}, got {size}.')
    for axis, windows in enumerate(size, start=1):
        if windows == x.shape[axis]:
            continue
        if x.shape[axis] % windows == 0:  # No position is in two windows.
            x = x.reshape(*x.shape[:axis], windows, -1, *x.shape[axis + 1 :]).mean(axis + 1)
            continue
        length, starts = x.shape[axis], jnp.arange(windows) * x.shape[axis]
        first, last = starts // windows, -(-(starts + length) // windows)
        position = jnp.arange(length)
        inside = (position >= first[:, None]) & (position < last[:, None])
        weights = inside / (last - first)[:, None]
        moved = jnp.tensordot(weights.astype(x.dtype), x, (1, axis), precision='highest')
        x = jnp.moveaxis(moved, 0, axis)
    return x


def direction(
    student_features: ArrayLike, teacher_features: ArrayLike, *, order: float = 2
) -> jax.Array:
    """sum_d |N(s)_d - N(t)_d|^order over the last axis, with N the scaling to unit length.

    Args:
      student_features, teacher_features: [..., D] of one shape; a vector of 0 stays 0.
      order: 2 gives 2 - 2 cos.

    Returns:
      [...].
    """
    student, teacher = _alike('direction', student_features, teacher_features)
    return jnp.sum(jnp.abs(numerics.unit(student) - numerics.unit(teacher)) ** order, axis=-1)


def factor_transfer(
    student_factors: ArrayLike, teacher_factors: ArrayLike, *, order: float = 1
) -> jax.Array:
    """FT: sum |F_s / ||F_s||_2 - F_t / ||F_t||_2|^order over all of an example's factor.

    The teacher's factor is the code of a paraphraser, an autoencoder of its features trained
    before; the student's comes from a translator, a projector.

    Args:
      student_factors, teacher_factors: [B, ...] of one shape.
      order: 1 as in the paper's experiments, or 2.

    Returns:
      [B].

    Source: Kim et al. 2018 (Factor Transfer), arXiv 1802.04977.
    """
    student, teacher = _alike('factor_transfer', student_factors, teacher_factors)
    size = student.shape[0]
    return direction(student.reshape(size, -1), teacher.reshape(size, -1), order=order)


def flow_of_solution(first: ArrayLike, second: ArrayLike) -> jax.Array:
    """FSP's matrix G_cd = (1/P) sum_p first_pc second_pd of two layers of one network.

    Args:
      first, second: [B, ..., C] and [B, ..., D]; the one with more positions is `pooled`.

    Returns:
      [B, C, D].

    Source: Yim et al. 2017 (A Gift from Knowledge Distillation, CVPR).
    """
    a, b = same_examples('flow_of_solution', first, second)
    ours, theirs = a.shape[1:-1], b.shape[1:-1]
    if ours != theirs:
        if math.prod(ours) > math.prod(theirs):
            a = pooled(a, theirs)
        else:
            b = pooled(b, ours)
    a, b = _positions(a), _positions(b)
    return jnp.einsum('bpc,bpd->bcd', a, b, precision='highest') / a.shape[1]


def fsp(
    student_pair: tuple[ArrayLike, ArrayLike], teacher_pair: tuple[ArrayLike, ArrayLike]
) -> jax.Array:
    """FSP: ||G_s - G_t||_F^2 of the matrices of `flow_of_solution`, a sum over their entries.

    Channels of the two layers must be as many on both sides, positions may differ.

    Returns:
      [B].

    Source: Yim et al. 2017 (A Gift from Knowledge Distillation, CVPR).
    """
    student, teacher = _alike(
        'fsp', flow_of_solution(*student_pair), flow_of_solution(*teacher_pair)
    )
    return jnp.sum((student - teacher) ** 2, axis=(1, 2))


def neuron_selectivity(
    student_features: ArrayLike, teacher_features: ArrayLike, *, power: int = 2
) -> jax.Array:
    """NST: MMD^2 of the channels of both sides, each a unit vector over positions.

        mean_cc' <t_c, t_c'>^power + mean_cc' <s_c, s_c'>^power - 2 mean_cc' <s_c, t_c'>^power

    by Gram matrices [B, C, C']; the released code holds their terms, [B, C, C', positions].

    Args:
      student_features, teacher_features: [B, ..., C] and [B, ..., C'], of the same positions.
      power: of the polynomial kernel.

    Returns:
      [B], above 0 but for rounding where power is even.

    Raises:
      ValueError: positions that differ.

    Source: Huang and Wang 2017 (NST), arXiv 1707.01219.
    """
    student, teacher = same_examples('neuron_selectivity', student_features, teacher_features)
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            'neuron_selectivity needs features [B, ..., C] that differ in C alone, got '
            f'{student.shape} and {teacher.shape}; resize one of them.'
        )
    s, t = (numerics.unit(jnp.swapaxes(_positions(x), 1, 2)) for x in (student, teacher))

    def kernel(a, b):
        gram = jnp.einsum('bcp,bdp->bcd', a, b, precision='highest')
        return jnp.mean(gram**power, axis=(1, 2))

    return kernel(t, t) + kernel(s, s) - 2 * kernel(s, t)


def activation_boundary(
    student_features: ArrayLike, teacher_features: ArrayLike, *, margin: float = 1.0
) -> jax.Array:
    """AB: sum (s + margin)^2 where the teacher is off and s > -margin, (s - margin)^2 where it is
    on and s < margin.

    The hinge of being on the teacher's side of 0 by `margin`; off and on are t <= 0 and t > 0. All
    is 0, with gradient 0, once the student is.

    Args:
      student_features, teacher_features: [B, ...] of one shape, before the activation.

    Returns:
      [B].

    Source: Heo et al. 2018 (AB), arXiv 1811.03233.
    """
    student, teacher = _alike('activation_boundary', student_features, teacher_features)
    short = jnp.where(teacher > 0, margin - student, margin + student)
    return _total(jnp.maximum(short, 0.0) ** 2)


def negative_mean(mean: ArrayLike, std: ArrayLike) -> jax.Array:
    """OFD's margin: E[x | x < 0] of x ~ N(mean, std^2), by channel.

        mean - std phi(mean / std) / Phi(-mean / std)

    in logarithms, hence also where hardly anything is below 0: there the released code takes
    -3 std in its place. mean and std are the shift and the absolute scale of the batch norm that
    the features come from. Where std is 0: min(mean, 0).

    Args:
      mean, std: [C].

    Returns:
      [C], at most 0.

    Source: Heo et al. 2019 (OFD), arXiv 1904.01866, and its code.
    """
    mean, std = jnp.asarray(mean), jnp.asarray(std)
    dtype = numerics.accumulation_dtype(mean, std)
    mean, std = mean.astype(dtype), std.astype(dtype)
    ratio = mean / jnp.where(std > 0, std, 1.0)
    log_density = -(ratio**2) / 2 - math.log(2 * math.pi) / 2
    tail = jnp.exp(log_density - jax.scipy.special.log_ndtr(-ratio))
    return jnp.minimum(jnp.where(std > 0, mean - std * tail, mean), 0.0)


def overhaul(
    student_features: ArrayLike, teacher_features: ArrayLike, margin: ArrayLike
) -> jax.Array:
    """OFD: sum (s - t')^2 with t' = max(t, margin), but 0 where s <= t' <= 0.

    Where the teacher is off, a student that is further off is right. Both are before the ReLU. The
    released code divides by 1,000.

    Args:
      student_features, teacher_features: [B, ..., C] of one shape.
      margin: [C], of `negative_mean`.

    Returns:
      [B].

    Source: Heo et al. 2019 (OFD), arXiv 1904.01866.
    """
    student, teacher = _alike('overhaul', student_features, teacher_features)
    target = jnp.maximum(teacher, jnp.asarray(margin, teacher.dtype))
    counted = (student > target) | (target > 0)
    return _total(jnp.where(counted, student - target, 0.0) ** 2)


def hierarchical_context(
    student_features: ArrayLike,
    teacher_features: ArrayLike,
    *,
    levels: Sequence[int] = (4, 2, 1),
) -> jax.Array:
    """ReviewKD's HCL: squares of the differences at full size and `pooled` to l x l for each level.

        sum_i 2^-i mean (pool_i(s) - pool_i(t))^2 / sum_i 2^-i,   pool_0 the identity,

    over those levels that are smaller than the map.

    Args:
      student_features, teacher_features: [B, H, W, C] of one shape.

    Returns:
      [B].

    Source: Chen et al. 2021 (ReviewKD), arXiv 2104.09044, and its code.
    """
    student, teacher = _alike('hierarchical_context', student_features, teacher_features)
    difference = student - teacher  # Pooling is linear.
    sizes = [difference.shape[1:-1]]
    sizes += [(level,) * len(sizes[0]) for level in levels if level < sizes[0][0]]
    weights, values, before = [0.5**i for i in range(len(sizes))], [], difference
    for weight, size in zip(weights, sizes, strict=True):
        # A mean of means, where the windows before lie apart and are parts of these.
        sides = zip(difference.shape[1:-1], before.shape[1:-1], size, strict=True)
        parts = all(whole % half == half % to == 0 for whole, half, to in sides)
        before = pooled(before if parts else difference, size)
        values.append(weight * jnp.mean(before**2, axis=tuple(range(1, before.ndim))))
    return sum(values[1:], values[0]) / sum(weights)


def variational_information(
    mean: ArrayLike, log_scale: ArrayLike, teacher_features: ArrayLike, *, eps: float = 1e-5
) -> jax.Array:
    """VID: mean ((t - mean)^2 / var + log var) / 2 with var_c = log(1 + exp(log_scale_c)) + eps.

    The negative log likelihood of the teacher's features under a Gaussian whose mean comes from the
    student, less the constant log(2 pi) / 2. `log_scale` is trained: in mdistiller it is a tensor
    in a plain list, which no optimiser sees, so that VID there is a mean square of fixed weight.

    Args:
      mean, teacher_features: [B, ..., C] of one shape.
      log_scale: [C], by channel.
      eps: the least variance.

    Returns:
      [B], over positions and channels a mean.

    Source: Ahn et al. 2019 (VID), arXiv 1904.05835.
    """
    predicted, teacher = _alike('variational_information', mean, teacher_features)
    variance = jax.nn.softplus(jnp.asarray(log_scale, predicted.dtype)) + eps
    value = ((teacher - predicted) ** 2 / variance + jnp.log(variance)) / 2
    return jnp.mean(value, axis=tuple(range(1, value.ndim)))


def channel_distributions(
    student_features: ArrayLike, teacher_features: ArrayLike, *, temperature: ArrayLike = 1.0
) -> jax.Array:
    """CWD: (1/C) sum_c KL(p_c || q_c), each channel a softmax over positions at `temperature`.

    T^2, with which the paper multiplies, is not applied.

    Args:
      student_features, teacher_features: [B, ..., C] of one shape.

    Returns:
      [B] nats.

    Source: Shu et al. 2021 (CWD), arXiv 2011.13256.
    """
    student, teacher = _alike('channel_distributions', student_features, teacher_features)
    by_channel = (jnp.swapaxes(_positions(x), 1, 2) for x in (student, teacher))
    return jnp.mean(divergence.forward_kl(*by_channel, temperature=temperature), axis=-1)


def _alike(name, student, teacher):
    student, teacher = same_examples(name, student, teacher)
    if student.shape != teacher.shape:
        raise ValueError(
            f'{name} needs features of one shape, got {student.shape} and {teacher.shape}; give '
            'the student a projector, or resize it.'
        )
    return student, teacher


def _positions(x):
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _total(x):
    return jnp.sum(x, axis=tuple(range(1, x.ndim)))
