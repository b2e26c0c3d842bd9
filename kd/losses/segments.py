"""Which part of an expert's trajectory is matched, and how the student is led there: start epochs,
intermediate targets, order of the synthetic examples, and weights over the epochs.

Sources: Cazenavette et al. 2022, arXiv 2203.11932; Shen et al. 2023, arXiv 2310.10541.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


def start_epoch(
    key: jax.Array, *, epochs: int, max_start_epoch: int, expert_epochs: int
) -> jax.Array:
    """Draws the expert's epoch at which a segment starts, uniform on {0, .., max_start_epoch - 1}.

    Args:
      key: typed random key.
      epochs: length T of the expert's trajectory; it has T + 1 snapshots.
      max_start_epoch: exclusive bound.
      expert_epochs: length M of a segment.

    Returns:
      int32 scalar.

    Raises:
      ValueError: if M < 1, if max_start_epoch < 1, or if a segment could end beyond the trajectory.
    """
    check(epochs, max_start_epoch, expert_epochs)
    return jax.random.randint(key, (), 0, max_start_epoch)


def check(epochs: int, max_start_epoch: int, expert_epochs: int) -> None:
    """Raises ValueError where segments do not fit the trajectory; see `start_epoch`."""
    if expert_epochs < 1:
        raise ValueError(
            f'expert_epochs must be at least 1, got {expert_epochs}: a segment of no length has no '
            'end to match.'
        )
    if max_start_epoch < 1:
        raise ValueError(f'max_start_epoch is exclusive and at least 1, got {max_start_epoch}.')
    last = max_start_epoch - 1 + expert_epochs
    if last > epochs:
        raise ValueError(
            f'A segment may start at epoch {max_start_epoch - 1} and end at {last}, but the '
            f'experts trained for {epochs} epochs; lower max_start_epoch to '
            f'{max(epochs - expert_epochs + 1, 0)} or less, or train longer experts.'
        )


def target_steps(student_steps: int, expert_epochs: int) -> tuple[int, ...]:
    """Student steps at which the expert's intermediate epochs are matched: floor(N / M) j, j < M.

    Raises:
      ValueError: with fewer than one epoch, or with fewer steps than epochs.
    """
    if expert_epochs < 1:
        raise ValueError(f'expert_epochs must be at least 1, got {expert_epochs}.')
    if student_steps < expert_epochs > 1:
        raise ValueError(
            f'{student_steps} student steps cannot match {expert_epochs} expert epochs one by one; '
            'raise student_steps or lower expert_epochs.'
        )
    return tuple(student_steps // expert_epochs * j for j in range(1, expert_epochs))


def target_weights(kind: str, expert_epochs: int) -> tuple[float, ...]:
    """Weights of the M terms of `trajectory.segment_distances`, the last of which is always 1.

    Args:
      kind: 'end' matches the last epoch alone; 'all' weighs every epoch 1; 'rising' j / M.
      expert_epochs: M.

    Raises:
      ValueError: on another kind.
    """
    middle = {
        'end': [0.0] * (expert_epochs - 1),
        'all': [1.0] * (expert_epochs - 1),
        'rising': [j / expert_epochs for j in range(1, expert_epochs)],
    }
    if kind not in middle:
        raise ValueError(f"Intermediate matching is 'end', 'all' or 'rising', got {kind!r}.")
    return (*middle[kind], 1.0)


def inner_batches(
    key: jax.Array, size: int, batch_size: int, steps: int
) -> tuple[jax.Array, jax.Array]:
    """Order in which the inner loop goes through the synthetic set.

    A random permutation is cut into batches; when it is used up a new one follows. The last batch
    of a permutation may be short: places past its end repeat examples and are false in the mask.

    Args:
      key: typed random key.
      size: examples in the synthetic set.
      batch_size: at most `size` is used.
      steps: N.

    Returns:
      int32 [N, b] indices and bool [N, b], with b = min(batch_size, size).

    Raises:
      ValueError: if an argument is not positive (steps may be 0).
    """
    if size < 1 or batch_size < 1 or steps < 0:
        raise ValueError(
            f'Inner batches need a positive size and batch size, got {size}, {batch_size}, {steps} '
            '(size, batch size, steps).'
        )
    batch_size = min(batch_size, size)
    per_pass = math.ceil(size / batch_size)
    passes = max(math.ceil(steps / per_pass), 1)
    orders = jax.vmap(lambda k: jax.random.permutation(k, size))(jax.random.split(key, passes))
    padding = per_pass * batch_size - size
    orders = jnp.concatenate([orders, orders[:, :padding]], axis=1)
    real = jnp.broadcast_to(jnp.arange(per_pass * batch_size) < size, orders.shape)
    indices, mask = (x.reshape(-1, batch_size)[:steps] for x in (orders, real))
    return indices.astype(jnp.int32), mask


def balance_factor(start: jax.Array | int, max_start_epoch: int) -> jax.Array:
    """Weight of the inner loss for segments that start at epoch t, float32.

        log_5(t - h + 8) for t >= h,   1 / log_5(h - t + 8) for t < h

    with h = floor(max_start_epoch / 2).

    Late starts, where the expert's gradients are small, get more than 1, early ones less.

    Source: arXiv 2310.10541, balanced inner loss.
    """
    distance = jnp.asarray(start, jnp.float32) - max_start_epoch // 2
    logarithm = jnp.log(jnp.abs(distance) + 8.0) / math.log(5.0)
    return jnp.where(distance >= 0, logarithm, 1.0 / logarithm)


def loss_ramp(
    epoch: jax.Array | int, *, epochs: int = 10, first: float = 0.5, step: float = 0.05
) -> jax.Array:
    """Factor on an expert's cross-entropy: first + step * epoch in the first `epochs`, then 1.

    Slows the parameters of an expert with momentum down at the start of its trajectory.

    Source: arXiv 2310.10541, clipping loss (the factors 0.5, 0.55, .., 0.95).
    """
    epoch = jnp.asarray(epoch)
    return jnp.where(epoch < epochs, first + step * epoch.astype(jnp.float32), 1.0)
