"""Losses on hidden features, which any layer of a Flax network can supply.

    logits, state = student.apply(variables, x, capture_intermediates=True)
    features = feature.captured(state['intermediates'], 'stage_1/Conv_0')

Features are float arrays with the examples on the first axis; computed in float32 (float64 for
float64 input). Student first. Nothing is stop-gradiented. `where` is a bool mask of what counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd.losses import numerics


def captured(intermediates: Mapping[str, Any], path: str, *, call: int = 0) -> jax.Array:
    """The output of one layer out of what Flax's `capture_intermediates` returned.

    Args:
      intermediates: the 'intermediates' collection.
      path: module names joined by '/', such as 'Block_0/Conv_1'; '' for the whole network. A name
        given to `Module.sow` works as the last part.
      call: which call of a layer that is applied several times.

    Raises:
      ValueError: no such layer; the message lists those there are.
    """
    flat = {
        '/'.join(names).removesuffix('__call__').rstrip('/'): value
        for names, value in _flatten(intermediates)
    }
    if path not in flat:
        raise ValueError(f'no captured layer {path!r}; there are {sorted(flat)}')
    return flat[path][call]


def hint(
    student_features: ArrayLike, teacher_features: ArrayLike, *, where: ArrayLike | None = None
) -> jax.Array:
    """FitNets: (1/2) ||f_s - f_t||^2, summed over all axes but the first.

    The regressor that brings the student's features to the teacher's shape is a layer of the
    student.

    Args:
      student_features, teacher_features: [B, ...] of one shape.
      where: bool, broadcasts against the features.

    Returns:
      [B].

    Raises:
      ValueError: shapes that differ.

    Source: Romero et al. 2014 (FitNets), arXiv 1412.6550, eq. 3.
    """
    student, teacher = same_examples('hint', student_features, teacher_features)
    if student.shape != teacher.shape:
        raise ValueError(
            f'hint needs features of one shape, got {student.shape} and {teacher.shape}; '
            'give the student a regressor to the shape of the teacher.'
        )
    difference = student - teacher
    if where is not None:
        difference = jnp.where(where, difference, 0.0)
    return 0.5 * jnp.sum(difference**2, axis=tuple(range(1, difference.ndim)))


def attention_map(features: ArrayLike, *, power: float = 2.0) -> jax.Array:
    """Spatial attention sum_c |A_c|^power of features [B, ..., C], as a unit vector [B, positions].

    Zero features have a zero map. Source: Zagoruyko and Komodakis 2016, arXiv 1612.03928, eq. 1.
    """
    features = jnp.asarray(features)
    features = features.astype(numerics.accumulation_dtype(features))
    # A square needs neither the size nor its sign in the gradient.
    raised = features * features if power == 2 else jnp.abs(features) ** power
    energy = jnp.sum(raised, axis=-1).reshape(features.shape[0], -1)
    length = numerics.norm(energy, axis=-1, keepdims=True)
    return energy / jnp.where(length > 0, length, 1.0)


def attention_transfer(
    student_features: ArrayLike, teacher_features: ArrayLike, *, power: float = 2.0
) -> jax.Array:
    """||Q_s - Q_t||^2 with Q the unit attention maps: twice one minus their cosine.

    The paper's equation has the norm, its code the square, whose gradient exists where the maps
    agree; this is the square, summed over positions.

    Args:
      student_features, teacher_features: [B, ..., C]; equal but for the number of channels.
      power: of the activations, above 1.

    Returns:
      [B] in [0, 4].

    Raises:
      ValueError: positions that differ.

    Source: Zagoruyko and Komodakis 2016, arXiv 1612.03928, eq. 2.
    """
    student, teacher = same_examples('attention_transfer', student_features, teacher_features)
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            'attention_transfer needs features [B, ..., C] that differ in C alone, got '
            f'{student.shape} and {teacher.shape}; resize one of them.'
        )
    difference = attention_map(student, power=power) - attention_map(teacher, power=power)
    return jnp.sum(difference**2, axis=-1)


def similarity_preserving(
    student_features: ArrayLike, teacher_features: ArrayLike, *, where: ArrayLike | None = None
) -> jax.Array:
    """(1/B) ||g_s,b - g_t,b||^2 with g_b the b-th row of F F^T scaled to unit length.

    Its mean over the batch is the paper's (1/B^2) ||G_s - G_t||_F^2. A statistic of the batch it is
    given: under pmap or shard_map, of the device's share. torchdistill 1.1.5 (`SPKDLoss`) divides
    rows by the sum of their sizes, as the 1 in its `normalize(..., 1)` is the order of the norm.

    Args:
      student_features: [B, ...]; teacher_features: [B, ...], of any other shape.
      where: bool [B]; examples outside it count in no row, and their own value is 0.

    Returns:
      [B].

    Source: Tung and Mori 2019, arXiv 1907.09682, eqs. 1-4.
    """
    student, teacher = same_examples('similarity_preserving', student_features, teacher_features)
    kept = kept_examples(where, student.shape[0])

    def similarity(features):
        features = jnp.where(kept[:, None], features.reshape(features.shape[0], -1), 0.0)
        gram = jnp.matmul(features, features.T, precision='highest')
        length = numerics.norm(gram, axis=-1, keepdims=True)
        return gram / jnp.where(length > 0, length, 1.0)

    difference = similarity(student) - similarity(teacher)
    return jnp.sum(difference**2, axis=-1) / jnp.maximum(jnp.sum(kept), 1)


def linear_cka(
    student_features: ArrayLike, teacher_features: ArrayLike, *, where: ArrayLike | None = None
) -> jax.Array:
    """Linear CKA ||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F) with X, Y centred over the examples.

    A similarity in [0, 1]; 1 - linear_cka is the loss. It does not change with a rotation or a
    scale of either side. A statistic of the batch it is given: under pmap or shard_map, of the
    device's share.

    Args:
      student_features: [B, ...]; teacher_features: [B, ...], of any other shape.
      where: bool [B], the examples that count.

    Returns:
      [] scalar; 0 where either side is constant.

    Source: Kornblith et al. 2019, arXiv 1905.00414, eq. 3 and section 3.
    """
    student, teacher = same_examples('linear_cka', student_features, teacher_features)
    kept = kept_examples(where, student.shape[0])[:, None]

    def centred(features):
        features = jnp.where(kept, features.reshape(features.shape[0], -1), 0.0)
        mean = jnp.sum(features, axis=0) / jnp.maximum(jnp.sum(kept), 1)
        features = jnp.where(kept, features - mean, 0.0)
        length = numerics.norm(features, axis=(0, 1))
        return features / jnp.where(length > 0, length, 1.0)

    x, y = centred(student), centred(teacher)
    product = partial(jnp.matmul, precision='highest')
    if x.shape[0] > max(x.shape[1], y.shape[1]):
        gram_x, gram_y = product(x.T, x), product(y.T, y)
        shared = jnp.sum(product(y.T, x) ** 2)
    else:
        # ||Y^T X||_F^2 = <X X^T, Y Y^T>, and so for the other two: smaller for few examples.
        gram_x, gram_y = product(x, x.T), product(y, y.T)
        shared = jnp.sum(gram_x * gram_y)
    norms = numerics.norm(gram_x, axis=(0, 1)) * numerics.norm(gram_y, axis=(0, 1))
    return shared / jnp.where(norms > 0, norms, 1.0)


def _flatten(tree, names=()):
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, (*names, name))
        else:
            yield (*names, name), value


def same_examples(name: str, student: ArrayLike, teacher: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Both sides in float32 (float64 for float64 input).

    Raises:
      ValueError: shapes other than [B, ...] of one B; the message begins with `name`.
    """
    student, teacher = jnp.asarray(student), jnp.asarray(teacher)
    if student.ndim < 2 or teacher.ndim < 2 or student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f'{name} needs features [B, ...] of the same examples, got shapes {student.shape} and '
            f'{teacher.shape}.'
        )
    dtype = numerics.accumulation_dtype(student, teacher)
    return student.astype(dtype), teacher.astype(dtype)


def kept_examples(where: ArrayLike | None, size: int) -> jax.Array:
    """The mask bool [size] of the examples that count; all for None."""
    return jnp.ones(size, bool) if where is None else jnp.asarray(where, bool)
