"""Confidence that says how often one is right: its error, and teachers recalibrated to it.

Of a teacher only the k most probable outcomes are known (`signal.TopK`), as log-probabilities of
the full softmax. FIRST recalibrates these before the student learns from them:

    c = calibration.fit_temperature(valid.log_probs, valid.indices, labels)
    teacher = calibration.recalibrated(teacher, temperature=c)
    loss = divergence.forward_kl(student_logits, teacher)  # gradient q - P, q over all outcomes

The temperature is fitted on validation data once, and then holds for what is recorded on the
training inputs, where the teacher is overconfident.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from kd.losses import numerics, signal

Recalibration = Literal['logits', 'probabilities', 'smoothing']
# What `fit_temperature` tries unless it is told.
GRIDS = {
    'logits': tuple(round(0.5 + 0.05 * i, 2) for i in range(71)),
    'probabilities': tuple(round(0.05 + 0.025 * i, 3) for i in range(79)),
}


class Bins(NamedTuple):
    """Sums over confidence bins, each float32 [bins]; they merge by adding."""

    examples: jax.Array
    confidence: jax.Array
    correct: jax.Array


def confidence_bins(
    logits: ArrayLike, labels: ArrayLike, bins: int = 15, where: ArrayLike | None = None
) -> Bins:
    """Sorts predictions into equal-width bins of their confidence max_k softmax(z)_k.

    Args:
      logits: [B, ..., V].
      labels: int [B, ...].
      bins: bin i holds confidences in (i / bins, (i + 1) / bins].
      where: bool [B, ...], of as many leading axes of the labels as it has.
    """
    p = jax.nn.softmax(jnp.asarray(logits, jnp.float32))
    return binned(p.max(-1), p.argmax(-1) == jnp.asarray(labels), bins, where)


def binned(
    confidence: ArrayLike, correct: ArrayLike, bins: int = 15, where: ArrayLike | None = None
) -> Bins:
    """`confidence_bins` of confidences [B, ...] in [0, 1] and whether each was right."""
    shape = jnp.shape(confidence)
    confidence = jnp.ravel(jnp.asarray(confidence, jnp.float32))
    index = jnp.clip(jnp.ceil(confidence * bins).astype(jnp.int32) - 1, 0, bins - 1)
    member = jax.nn.one_hot(index, bins, dtype=bool)
    if where is not None:
        mask = jnp.asarray(where)
        mask = mask.reshape(*mask.shape, *(1,) * (len(shape) - mask.ndim))
        member &= jnp.broadcast_to(mask, shape).reshape(-1, 1)

    def per_bin(values: jax.Array) -> jax.Array:
        # A matrix product would be rounded to bfloat16 or TF32 on accelerators.
        return jnp.where(member, values[:, None], 0.0).sum(0)

    right = jnp.ravel(correct).astype(jnp.float32)
    return Bins(per_bin(jnp.ones_like(confidence)), per_bin(confidence), per_bin(right))


def expected_calibration_error(bins: Bins) -> float:
    """ECE = sum_b n_b / N |accuracy_b - confidence_b| (Guo et al. 2017, arXiv:1706.04599)."""
    gap = np.abs(np.asarray(bins.correct, np.float64) - np.asarray(bins.confidence, np.float64))
    return float(gap.sum() / max(float(np.sum(bins.examples)), 1.0))


def recalibrate(
    log_probs: ArrayLike,
    kind: Recalibration = 'logits',
    *,
    temperature: ArrayLike = 1.0,
    smoothing: float = 0.1,
) -> jax.Array:
    """The teacher's k probabilities P made less (or more) sure, as log-probabilities.

    - 'logits': P_i^(1/c) / sum_j P_j^(1/c), the usual temperature c. c = 1 renormalises.
    - 'probabilities': exp(P_i / c) / sum_j exp(P_j / c), as FIRST's code has it: no two differ by
      more than a factor exp(1 / c), however sure the teacher is.
    - 'smoothing': the first gives min(delta, P_1), of which each other gets an equal part. The sum
      stays that of P.

    The first two sum to 1 and keep the order; as c goes to 0 all is on the first, as it goes to
    infinity each has 1 / k.

    Args:
      log_probs: [..., k] nats; -inf is an empty slot and stays one.
      kind: see above.
      temperature: c > 0, a number or [..., 1]; not for 'smoothing'.
      smoothing: delta in [0, 1], for 'smoothing' alone.

    Returns:
      [..., k] log-probabilities.

    Raises:
      ValueError: an unknown kind, a temperature or delta out of range.

    Source: FIRST, arXiv 2408.12168, trustworthy maximization.
    """
    log_probs = jnp.asarray(log_probs)
    log_probs = log_probs.astype(numerics.accumulation_dtype(log_probs))
    listed = log_probs > -jnp.inf
    if kind == 'logits':
        return numerics.log_softmax(log_probs, temperature=temperature)
    p = jnp.exp(log_probs)
    if kind == 'probabilities':
        return numerics.log_softmax(p, temperature=temperature, where=listed)
    if kind != 'smoothing':
        raise ValueError(f"kind must be 'logits', 'probabilities' or 'smoothing', got {kind!r}.")
    first = jnp.arange(p.shape[-1]) == jnp.argmax(p, axis=-1, keepdims=True)
    others = jnp.sum(listed & ~first, axis=-1, keepdims=True)
    given = jnp.minimum(numerics.number_in('smoothing', smoothing, 0, 1), p.max(-1, keepdims=True))
    given = jnp.where(others > 0, given, 0.0)
    p = jnp.where(first, p - given, p + given / jnp.maximum(others, 1))
    positive = listed & (p > 0)
    return jnp.where(positive, jnp.log(jnp.where(positive, p, 1.0)), -jnp.inf)


def recalibrated(
    teacher: signal.TopK,
    kind: Recalibration = 'logits',
    *,
    temperature: ArrayLike = 1.0,
    smoothing: float = 0.1,
) -> signal.TopK:
    """The teacher whose k probabilities are recalibrated and who says nothing of other outcomes.

    `forward_kl` from it is sum_j P_j (log P_j - log q_j) over the k outcomes, with the student's
    softmax q over all of them: its gradient is q - P (for P that sum to 1), which takes all mass
    off what is not listed. Arguments as of `recalibrate`.
    """
    log_probs = recalibrate(teacher.log_probs, kind, temperature=temperature, smoothing=smoothing)
    return dataclasses.replace(teacher, log_probs=log_probs, tail=jnp.zeros_like(teacher.tail))


def bins_by_temperature(
    log_probs: ArrayLike,
    indices: ArrayLike,
    labels: ArrayLike,
    kind: Literal['logits', 'probabilities'] = 'logits',
    *,
    grid: Sequence[float] | ArrayLike,
    bins: int = 10,
    where: ArrayLike | None = None,
) -> Bins:
    """Confidence bins of the recalibrated teacher at each of G temperatures, float32 [G, bins].

    Arguments as of `fit_temperature`. Bins of several batches add up.
    """
    listed = jnp.asarray(indices) == jnp.asarray(labels)[..., None]
    # Among the k, or -1, which is never the first.
    slots = jnp.where(listed.any(-1), listed.argmax(-1), -1)

    def of_temperature(temperature: jax.Array) -> Bins:
        made = recalibrate(log_probs, kind, temperature=temperature)
        return confidence_bins(made, slots, bins, where)

    return jax.lax.map(of_temperature, jnp.asarray(grid, jnp.float32))


_bins_by_temperature = jax.jit(bins_by_temperature, static_argnames=('kind', 'bins'))


def errors_by_temperature(every: Bins) -> list[float]:
    """The expected calibration error of each row of Bins [G, bins]."""
    return [expected_calibration_error(Bins(*row)) for row in zip(*every, strict=True)]


def fit_temperature(
    log_probs: ArrayLike,
    indices: ArrayLike,
    labels: ArrayLike,
    kind: Literal['logits', 'probabilities'] = 'logits',
    *,
    grid: Sequence[float] | None = None,
    bins: int = 10,
    where: ArrayLike | None = None,
) -> float:
    """The temperature at which `recalibrate` has the least expected calibration error, off a grid.

    On the host, once. The error is no smooth function of the temperature, so each of the grid is
    tried; the first of equals is taken.

    Args:
      log_probs, indices: [..., k] of the teacher on validation data.
      labels: int [...]. One that is not listed was not predicted: wrong.
      kind: as in `recalibrate`.
      grid: temperatures to try; unless given, `GRIDS[kind]`: .5 to 4 in steps of .05, and .05 to 2
        in steps of .025.
      bins: of `confidence_bins`.
      where: bool, the labels that count, such as the answers' tokens alone.

    Raises:
      ValueError: another kind, a grid that is empty or not positive, nothing that counts.
    """
    if kind not in GRIDS:
        raise ValueError(f"kind must be 'logits' or 'probabilities', got {kind!r}.")
    temperatures = tuple(GRIDS[kind] if grid is None else grid)
    if not temperatures:
        raise ValueError('grid is empty; give at least one temperature to try.')
    numerics.check_positive('grid', np.asarray(temperatures))

    every = jax.device_get(
        _bins_by_temperature(
            log_probs, indices, labels, kind, grid=np.asarray(temperatures), bins=bins, where=where
        )
    )
    if every.examples.sum() == 0:
        raise ValueError('no label counts; a temperature is fitted on at least one.')
    return float(temperatures[np.argmin(errors_by_temperature(every))])
