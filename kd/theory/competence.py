"""Weighting problems by the student's competence: the Beta kernel of the pass rate.

A problem that the student always fails or always solves gives a gradient without signal, so its
distillation loss is weighted by w(p) = p^a (1 - p)^b of the pass rate p. With signals mu_i along
the common direction of descent, noise variances sigma_i^2 and SNR_i = mu_i^2 / sigma_i^2, the
weights mu_i / sigma_i^2 are the best and the kernel's loss under misspecification is bounded.

Numbers are float64 for float64 input, else float32. Checks of values run on concrete arrays and are
skipped inside jit, grad, vmap and scan.

Source: PACED 2026, arXiv 2603.11178. The proofs behind the bounds here (Cauchy-Schwarz and
Kantorovich's inequality) are checked numerically by `kd.theory.verify`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from kd.losses import numerics
from kd.theory import checks


def pass_rate(correct: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
    """The fraction of rollouts that pass: [B] from correct [B, K] in {0, 1} or bool.

    Args:
      correct: [B, K] verifier outcomes.
      where: bool [B, K], rollouts that count; a problem without any gets 0.
    """
    correct = jnp.asarray(correct)
    checks.in_range('correct', correct, 0, 1, 'it holds verifier outcomes')
    kept = (
        jnp.ones(correct.shape, bool) if where is None else jnp.broadcast_to(where, correct.shape)
    )
    # Booleans and integers take the default float: float64 where it is enabled.
    dtype = jnp.promote_types(jnp.result_type(correct, float), jnp.float32)
    count = jnp.sum(kept, axis=-1)
    passed = jnp.sum(jnp.where(kept, correct, 0).astype(dtype), axis=-1)
    return passed / jnp.maximum(count, 1)


def reward_variance(correct: ArrayLike) -> jax.Array:
    """K p(1 - p) / (K - 1) with the empirical p: the unbiased variance of a 0/1 reward, [B].

    Hence E[p_hat (1 - p_hat)] = (1 - 1/K) p (1 - p): at a = b = 1 the plug-in kernel is unbiased up
    to a constant for every K >= 2. (For a, b > 0 otherwise it is not.)
    """
    correct = jnp.asarray(correct)
    rollouts = correct.shape[-1]
    if rollouts < 2:
        raise ValueError('The variance of a reward needs at least two rollouts per problem.')
    p = pass_rate(correct)
    return rollouts / (rollouts - 1) * p * (1 - p)


def beta_kernel(p: ArrayLike, a: ArrayLike = 1.0, b: ArrayLike = 1.0) -> jax.Array:
    """w(p) = p^a (1 - p)^b with 0^0 = 1.

    Largest at a / (a + b), where it is a^a b^b / (a + b)^{a+b}; 0 at p = 0 (if a > 0) and at p = 1
    (if b > 0).

    Args:
      p: [B] pass rates in [0, 1].
      a, b: exponents >= 0; a = b = 0 is uniform.

    Returns:
      [B] in [0, 1].

    Raises:
      ValueError: p outside [0, 1] or a negative exponent.

    Source: arXiv 2603.11178.
    """
    p = jnp.asarray(p)
    p = p.astype(numerics.accumulation_dtype(p))
    checks.in_range('p', p, 0, 1, 'it is a pass rate')
    for name, exponent in (('a', a), ('b', b)):
        checks.in_range(name, exponent, 0, np.inf, 'the kernel would be infinite at an end')
    return p**a * (1 - p) ** b


def hard_filter(p: ArrayLike, low: float = 0.2, high: float = 0.8) -> jax.Array:
    """1 where low < p < high, else 0: the baseline that keeps problems of middling difficulty."""
    p = jnp.asarray(p)
    return ((p > low) & (p < high)).astype(numerics.accumulation_dtype(p))


def paced(
    divergence: Callable[..., jax.Array],
    a: float = 1.0,
    b: float = 1.0,
    *,
    normalise: bool = False,
    axis_name: str | None = None,
) -> Callable[..., jax.Array]:
    """Weights any per-problem divergence by the Beta kernel of the pass rate.

    The returned loss is `loss(pass_rates [B], *args, **kwargs) = sg[w(p)] * divergence(*args,
    **kwargs)`, [B], not reduced; its mean is the paper's objective. `divergence` must return one
    value per problem: average tokens within a problem first, or long answers dominate. Problems
    with w = 0 contribute exactly 0 to value and gradient. Forward KL on the teacher's responses
    followed by reverse KL on the student's own is the paper's two-stage schedule.

    Args:
      divergence: `(...) -> [B]`.
      a, b: exponents of the kernel; 0, 0 is uniform distillation.
      normalise: divide w by its mean over the batch, which keeps the scale of the uniform loss.
        (The paper multiplies by w only, at most 1/4 for a = b = 1.) All-zero weights stay zero.
      axis_name: mapped axis of pmap or shard_map over which that mean is taken as well.

    Returns:
      The weighted loss. It raises ValueError if `divergence` does not return [B].

    Source: arXiv 2603.11178.
    """

    def loss(pass_rates: ArrayLike, *args, **kwargs) -> jax.Array:
        weights = lax.stop_gradient(beta_kernel(pass_rates, a, b))
        if normalise:
            mean = jnp.mean(weights)
            mean = mean if axis_name is None else lax.pmean(mean, axis_name)
            weights = weights / jnp.where(mean > 0, mean, 1.0)
        values = divergence(*args, **kwargs)
        if values.shape != weights.shape:
            raise ValueError(
                f'The divergence must return one value per problem, shape {weights.shape}; got '
                f'{values.shape}. Reduce over tokens first.'
            )
        return jnp.where(weights > 0, weights * values, 0.0)

    return loss


def optimal_weights(means: ArrayLike, variances: ArrayLike) -> jax.Array:
    """w*_i = mu_i / sigma_i^2: maximises the signal-to-noise ratio of sum_i w_i g_i, [n].

    If the noise is constant in p, the kernel's exponents are half those of the SNR; if the signal
    is constant, they are the same. The maximum is sum_i SNR_i.
    """
    checks.positive('variances', variances)
    return jnp.asarray(means) / jnp.asarray(variances)


def aggregate_snr(weights: ArrayLike, means: ArrayLike, variances: ArrayLike) -> jax.Array:
    """(sum_i w_i mu_i)^2 / sum_i w_i^2 sigma_i^2, reduced over the last axis.

    Args:
      weights, means, variances: [..., n], broadcasting; signals aligned, noises independent.

    Raises:
      ValueError: a concrete variance is not positive.
    """
    checks.positive('variances', variances)
    weights, means, variances = (jnp.asarray(x) for x in (weights, means, variances))
    signal = jnp.sum(weights * means, axis=-1)
    noise = jnp.sum(weights**2 * variances, axis=-1)
    return signal**2 / jnp.where(noise > 0, noise, 1.0)


def kernel_efficiency(weights: ArrayLike, means: ArrayLike, variances: ArrayLike) -> jax.Array:
    """Signal-to-noise ratio under the weights relative to the best: [...] in [0, 1].

    (sum_i w_i mu_i)^2 / (sum_i w_i^2 sigma_i^2 sum_i mu_i^2 / sigma_i^2); invariant to the scale of
    the weights, 0 if all are 0.

    Args:
      weights, means, variances: [..., n], broadcasting.

    Raises:
      ValueError: a concrete variance is not positive.
    """
    ratio = jnp.sum(jnp.asarray(means) ** 2 / jnp.asarray(variances), axis=-1)
    return aggregate_snr(weights, means, variances) / ratio


def efficiency_bound(delta: ArrayLike) -> jax.Array:
    """1 / cosh(delta)^2: the least efficiency of weights within e^{+-delta} of the optimal ones.

    So the loss is at most tanh(delta)^2 = delta^2 + O(delta^4). Attained by two groups of problems
    at +delta and -delta, the first with the share 1 / (1 + e^{2 delta}) of the total SNR
    (Kantorovich's inequality).
    """
    return 1 / jnp.cosh(jnp.asarray(delta)) ** 2


def log_spread(weights: ArrayLike, best: ArrayLike) -> jax.Array:
    """Half the range of log(weights / best) over the last axis: the delta of `efficiency_bound`."""
    log_ratio = jnp.log(jnp.asarray(weights)) - jnp.log(jnp.asarray(best))
    return (jnp.max(log_ratio, axis=-1) - jnp.min(log_ratio, axis=-1)) / 2


def staleness(p: ArrayLike, a: ArrayLike = 1.0, b: ArrayLike = 1.0) -> jax.Array:
    """|d log w / dp| = |a / p - b / (1 - p)|, [B]: times a drift of p, the delta that it causes."""
    p = jnp.asarray(p)
    return jnp.abs(a / p - b / (1 - p))


def effective_count(weights: ArrayLike) -> jax.Array:
    """(sum w)^2 / sum w^2: the number of equally weighted problems worth as much, 0 for none."""
    weights = jnp.asarray(weights)
    squares = jnp.sum(weights**2, axis=-1)
    return jnp.sum(weights, axis=-1) ** 2 / jnp.where(squares > 0, squares, 1.0)


def cross_problem_snr(gradients: ArrayLike) -> jax.Array:
    """(||mean||^2 - tr / n) / tr, tr the unbiased trace of the covariance: a scalar.

    The squared norm of the sample mean exceeds that of the true mean by tr / n on average, hence
    the correction; the estimate can be negative. Identical gradients give inf.

    Args:
      gradients: [n, P], one gradient per problem, n >= 2.

    Raises:
      ValueError: fewer than two gradients.

    Source: arXiv 2603.11178.
    """
    gradients = jnp.asarray(gradients)
    if gradients.ndim != 2 or gradients.shape[0] < 2:
        raise ValueError(f'gradients must be [n, P] with n >= 2, got shape {gradients.shape}.')
    mean = jnp.mean(gradients, axis=0)
    trace = jnp.sum((gradients - mean) ** 2) / (gradients.shape[0] - 1)
    square = jnp.sum(mean**2) - trace / gradients.shape[0]
    return jnp.where(trace > 0, square / jnp.where(trace > 0, trace, 1.0), jnp.inf)
