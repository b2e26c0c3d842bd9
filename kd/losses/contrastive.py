"""Losses that tell an example's own teacher features from those of other examples."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd.losses import numerics
from kd.losses.feature import kept_examples, same_examples


def info_nce(
    student_features: ArrayLike,
    teacher_features: ArrayLike,
    *,
    temperature: ArrayLike = 0.1,
    symmetric: bool = False,
    where: ArrayLike | None = None,
) -> jax.Array:
    """-log softmax_j(cos(s_b, t_j) / temperature) at j = b: the other examples are negatives.

    A statistic of the batch it is given: under pmap or shard_map, of the device's share. It needs
    no bank and no index; the more examples a batch has, the more it asks.

    Args:
      student_features, teacher_features: [B, ..., D] of one shape, taken as vectors.
      temperature: of the cosines.
      symmetric: the mean of this and of the teacher's choice among the students.
      where: bool [B]; examples outside it are nobody's negatives, and their own value is 0.

    Returns:
      [B] nats.

    Source: van den Oord et al. 2018, arXiv 1807.03748.
    """
    student, teacher = same_examples('info_nce', student_features, teacher_features)
    kept = kept_examples(where, student.shape[0])
    student, teacher = (
        numerics.unit(jnp.where(kept[:, None], x.reshape(x.shape[0], -1), 0.0))
        for x in (student, teacher)
    )
    cosine = jnp.matmul(student, teacher.T, precision='highest')

    def own(cosine):
        chosen = numerics.log_softmax(cosine, temperature=temperature, where=kept)
        return jnp.where(kept, -jnp.diagonal(jnp.where(kept[:, None] & kept, chosen, 0.0)), 0.0)

    return (own(cosine) + own(cosine.T)) / 2 if symmetric else own(cosine)


class Bank(NamedTuple):
    """CRD's memory of every example of the data, and the scale that it has begun with.

    Attributes:
      student, teacher: float32 [N, D], unit rows.
      scale: float32 [2], the normalisers of student and teacher as anchors; 0 until the first
        batch has set them.
    """

    student: jax.Array
    teacher: jax.Array
    scale: jax.Array


def start_bank(key: jax.Array, examples: int, size: int) -> Bank:
    """A bank of random unit rows, with no scale yet.

    Rows of 0, as a bank is often begun, would make all negatives alike in the first epoch.
    """
    rows = numerics.unit(jax.random.normal(key, (2, examples, size)))
    return Bank(rows[0], rows[1], jnp.zeros(2))


def crd(
    bank: Bank,
    student: ArrayLike,
    teacher: ArrayLike,
    index: ArrayLike,
    negatives: ArrayLike,
    *,
    temperature: float = 0.07,
    eps: float = 1e-7,
) -> tuple[jax.Array, jax.Array]:
    """CRD: noise contrastive estimation with K negatives of the bank, both sides once the anchor.

        h(u) = exp(<anchor, u> / temperature) / Z,
        -log h(u+) / (h(u+) + K/N + eps) - sum_k log (K/N) / (h(u_k) + K/N + eps)

    of student anchors against the teacher's bank plus teacher anchors against the student's. The
    positive is the bank's row of the example itself, from the last epoch, as released: the gradient
    reaches the anchor alone. Z is N times the mean of the exponentials in the first batch and then
    held: it is the returned scale, to be kept by `update_bank`.

    Args:
      bank: rows of N examples.
      student, teacher: [B, D], unit rows (as of `kd.models.projectors.Embed`).
      index: int [B], the examples' rows in the bank.
      negatives: int [B, K], rows of other examples.
      temperature: of the inner products.
      eps: of the released code.

    Returns:
      ([B] nats, the scale [2]).

    Source: Tian et al. 2020 (CRD), arXiv 1910.10699.
    """
    student, teacher = same_examples('crd', student, teacher)
    examples, count = bank.student.shape[0], jnp.shape(negatives)[1]
    rows = jnp.concatenate([jnp.asarray(index)[:, None], jnp.asarray(negatives)], axis=1)
    noise = count / examples

    def of_anchor(anchor, memory, scale):
        others = memory[rows].astype(anchor.dtype)
        scores = jnp.einsum('bd,bkd->bk', anchor, others, precision='highest') / temperature
        likelihood = jnp.exp(scores)
        begun = jax.lax.stop_gradient(jnp.mean(likelihood)) * examples
        scale = jnp.where(scale > 0, scale, begun)
        h = likelihood / scale
        positive = jnp.log(h[:, 0]) - jnp.log(h[:, 0] + noise + eps)
        negative = jnp.log(noise) - jnp.log(h[:, 1:] + noise + eps)
        return -positive - jnp.sum(negative, axis=1), scale

    of_student, first = of_anchor(student, bank.teacher, bank.scale[0])
    of_teacher, second = of_anchor(teacher, bank.student, bank.scale[1])
    return of_student + of_teacher, jnp.stack([first, second])


def update_bank(
    bank: Bank,
    student: ArrayLike,
    teacher: ArrayLike,
    index: ArrayLike,
    scale: jax.Array,
    *,
    momentum: float = 0.5,
) -> Bank:
    """The bank after a batch: its rows momentum old + (1 - momentum) new, scaled to unit length.

    No gradient passes. An index that occurs twice in a batch keeps one of its two new rows.

    Args:
      bank: as it was.
      student, teacher: [B, D], unit rows.
      index: int [B].
      scale: as `crd` has returned it.
      momentum: of the old row.
    """

    def moved(memory, rows):
        rows = jax.lax.stop_gradient(jnp.asarray(rows)).astype(memory.dtype)
        return memory.at[index].set(numerics.unit(momentum * memory[index] + (1 - momentum) * rows))

    scale = jax.lax.stop_gradient(scale).astype(bank.scale.dtype)
    return Bank(moved(bank.student, student), moved(bank.teacher, teacher), scale)


def draw_negatives(
    key: jax.Array, labels: ArrayLike, all_labels: jax.Array, count: int
) -> jax.Array:
    """Rows int [B, count] of examples of other classes, drawn with replacement.

    Args:
      key: of the draw.
      labels: int [B], of the examples.
      all_labels: int [N], of the whole data by row; -1 for a row that no example has.
      count: K.

    Exact for any sizes of classes: each example draws among the N - n_y others by its rank in the
    order of classes. An example whose data are all of its class draws from all.
    """
    order = jnp.argsort(all_labels)
    ordered = all_labels[order]
    labels = jnp.asarray(labels)
    valid_from = jnp.searchsorted(ordered, 0)  # rows of -1 come first
    low = jnp.searchsorted(ordered, labels, side='left')
    high = jnp.searchsorted(ordered, labels, side='right')
    total = all_labels.shape[0] - valid_from
    others = total - (high - low)
    some = others > 0
    size = jnp.where(some, others, total)[:, None]
    rank = jax.random.randint(key, (labels.shape[0], count), 0, size) + valid_from
    skip = (rank >= low[:, None]) & some[:, None]
    return order[jnp.where(skip, rank + (high - low)[:, None], rank)]
