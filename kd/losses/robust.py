"""Attacks within a distance, and the losses of training and distilling against them.

An attack changes an input x by at most epsilon to raise a loss; epsilon, steps and the range of
valid inputs are in the units of the input. Threat models are published for pixels in [0, 1]: the
8/255 of a paper is 2 * 8/255 for images in [-1, 1].

As elsewhere: student first, one value per example [B] in nats, unreduced, and nothing is
stop-gradiented that the docstring does not say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from kd.losses import classification, divergence, numerics

Norm = Literal['linf', 'l2']
Start = Literal['normal', 'uniform']


def pgd(
    key: jax.Array,
    loss: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    *,
    epsilon: ArrayLike,
    step: ArrayLike,
    steps: int,
    low: float = -1.0,
    high: float = 1.0,
    jitter: float = 0.001,
    start: Start = 'normal',
    norm: Norm = 'linf',
    unroll: bool = False,
) -> jax.Array:
    """Projected gradient ascent on `loss` around x; the result is stop-gradiented.

        x_0 = P(x + jitter n),   x_{k+1} = P(x_k + step d(grad loss(x_k)))

    P goes to the nearest point of the ball of radius epsilon around x, then clips to [low, high],
    which for 'linf' is the nearest point that is in both. d is the sign for 'linf', the gradient
    over its norm for 'l2'. Without jitter a loss that is least at x itself, such as the divergence
    of TRADES, has gradient 0 there, and the attack stays where it is. With steps=0 it is P of the
    jittered input.

    Args:
      key: of the start.
      loss: [B, ...] -> [B], which is to rise; an example must not depend on the others, so
        networks are in evaluation mode.
      x: [B, ...], valid inputs.
      epsilon, step: radius and length of a step, numbers or arrays that broadcast against x.
      steps: their number.
      low, high: range of valid inputs.
      jitter: deviation of the start; of 'uniform', its largest distance in a coordinate.
      start: Gaussian, or uniform in a cube.
      norm: of the ball and the step.
      unroll: steps as a loop of Python, which convolutions on CPU need: in a compiled loop their
        gradients are tens of times slower.

    Returns:
      [B, ...], of the type of x.

    Source: Madry et al. 2017, arXiv 1706.06083; the start of Zhang et al. 2019, arXiv 1901.08573.
    """
    x, radius = lax.stop_gradient(x), jnp.asarray(epsilon, x.dtype)
    draw = jax.random.normal if start == 'normal' else _uniform

    def projected(moved: jax.Array) -> jax.Array:
        change = moved - x
        if norm == 'linf':
            change = jnp.clip(change, -radius, radius)
        else:
            change = change * jnp.minimum(1.0, radius / jnp.maximum(_length(change), 1e-12))
        return jnp.clip(x + change, low, high)

    def body(_: int, moved: jax.Array) -> jax.Array:
        slope = jax.grad(lambda moved: jnp.sum(loss(moved)))(moved)
        along = jnp.sign(slope) if norm == 'linf' else slope / jnp.maximum(_length(slope), 1e-12)
        return projected(moved + step * along)

    moved = projected(x + jitter * draw(key, x.shape, x.dtype))
    if unroll:
        for i in range(steps):
            moved = body(i, moved)
    else:
        moved = lax.fori_loop(0, steps, body, moved)
    return lax.stop_gradient(moved)


def _uniform(key, shape, dtype):
    return jax.random.uniform(key, shape, dtype, -1.0, 1.0)


def _length(x):
    return numerics.norm(x, axis=tuple(range(1, x.ndim)), keepdims=True)


def margin(logits: ArrayLike, labels: ArrayLike) -> jax.Array:
    """The largest logit of another class over that of the label: [B, V], int [B] -> [B].

    Above 0 where the network is wrong. Its gradient does not fade where the network is sure, as
    that of the cross-entropy does.

    Source: Carlini and Wagner 2016, arXiv 1608.04644, without their confidence.
    """
    logits = jnp.asarray(logits)
    logits = logits.astype(numerics.accumulation_dtype(logits))
    own = jax.nn.one_hot(labels, logits.shape[-1], dtype=jnp.bool_)
    others = jnp.max(jnp.where(own, -jnp.inf, logits), -1)
    return others - jnp.sum(jnp.where(own, logits, 0.0), -1)


def trades(
    clean: ArrayLike, adversarial: ArrayLike, labels: ArrayLike, *, beta: float = 6.0
) -> jax.Array:
    """CE(y, p) + beta KL(p || p'): accuracy, and a law that an attack does not change.

    The gradient goes through both laws of the divergence, as released.

    Args:
      clean: logits [B, V] of x, whose law is p.
      adversarial: of the attack on KL(p || p') at x, whose law is p'.
      labels: int [B].
      beta: weight of robustness.

    Source: Zhang et al. 2019, arXiv 1901.08573.
    """
    return classification.cross_entropy(clean, labels) + beta * divergence.forward_kl(
        adversarial, clean
    )


def rslad(
    clean: ArrayLike,
    adversarial: ArrayLike,
    teacher: ArrayLike,
    *,
    clean_weight: float = 1 / 6,
    eps: float = 0.0,
) -> jax.Array:
    """(1 - w) KL(q || s') + w KL(q || s), with q what a robust teacher says of the clean input.

    No labels and no temperature.

    Args:
      clean: the student's logits [B, V] of x, whose law is s.
      adversarial: those of the attack on KL(q || .) at x, whose law is s'.
      teacher: logits of x.
      clean_weight: w.
      eps: log q is log(q + eps), as released with 1e-5: another value, by up to eps V, and the
        same gradient of the student.

    Released code takes means over classes too, 1 / V of this.

    Source: Zi et al. 2021, arXiv 2108.07969.
    """
    log_q = numerics.log_softmax(teacher)
    if eps:
        floored = jnp.sum(jnp.exp(log_q) * (jnp.log(jnp.exp(log_q) + eps) - log_q), -1)
    else:
        floored = jnp.zeros(log_q.shape[:-1], log_q.dtype)
    return (
        (1.0 - clean_weight) * divergence.forward_kl(adversarial, teacher)
        + clean_weight * divergence.forward_kl(clean, teacher)
        + floored
    )


def ard(
    clean: ArrayLike,
    adversarial: ArrayLike,
    teacher: ArrayLike,
    labels: ArrayLike,
    *,
    soft_weight: float = 1.0,
    temperature: float = 1.0,
) -> jax.Array:
    """(1 - a) CE(y, s) + a T^2 KL_T(q || s'), with q what the teacher says of the clean input.

    Args:
      clean: the student's logits [B, V] of x.
      adversarial: those of the attack on its cross-entropy at x.
      teacher: logits of x.
      labels: int [B].
      soft_weight: a.
      temperature: T.

    Source: Goldblum et al. 2019, arXiv 1905.09747.
    """
    soft = divergence.forward_kl(adversarial, teacher, temperature=temperature)
    hard = classification.cross_entropy(clean, labels)
    return (1.0 - soft_weight) * hard + soft_weight * temperature**2 * soft


def adaad(
    clean: ArrayLike,
    adversarial: ArrayLike,
    teacher_clean: ArrayLike,
    teacher_adversarial: ArrayLike,
    *,
    clean_weight: float = 0.0,
) -> jax.Array:
    """(1 - w) KL(q' || s') + w KL(q || s): the teacher is asked at the attacked input too.

    The attack is on KL(q' || s') itself, through student and teacher.

    Args:
      clean, adversarial: the student's logits [B, V] of x and of the attack.
      teacher_clean, teacher_adversarial: the teacher's.
      clean_weight: w.

    Source: Huang et al. 2023, Boosting Accuracy and Robustness of Student Models via Adaptive
    Adversarial Distillation (CVPR).
    """
    attacked = divergence.forward_kl(adversarial, teacher_adversarial)
    return (1.0 - clean_weight) * attacked + clean_weight * divergence.forward_kl(
        clean, teacher_clean
    )
