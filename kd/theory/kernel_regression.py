"""Self-distillation in kernel ridge regression, in closed form.

Step t fits f_t by ridge regression to alpha_t Y + (1 - alpha_t) f_{t-1}(X): alpha weighs the ground
truth. (Many distillation codes use alpha for the teacher.) With the Gram matrix
K = V diag(d) V^T and s = d / (d + lam) every step is diagonal in V:

    f_t(X) = V diag(B_t) V^T Y,    B_1 = s,    B_t = s (alpha_t + (1 - alpha_t) B_{t-1}),

so one eigendecomposition gives all steps, weights and regularisations. The objective is
a sum over examples, 1/2 ||f(X) - Y||^2 + lam/2 ||beta||^2: for a mean over n examples use lam n.

Numbers are float64 for float64 input, else float32; float32 is refused where the conditioning
forbids it. Checks of values run on concrete arrays and are skipped inside jit, grad and vmap.

Source: Borup and Andersen 2021, arXiv 2102.13088; the case alpha = 0: Mobahi et al. 2020,
arXiv 2002.05715.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from kd.losses import numerics
from kd.theory import checks

# Gram matrices and their spectra lose all meaning in the accelerators' default bfloat16 products.
_EXACT = lax.Precision.HIGHEST


class Smoother(NamedTuple):
    """The spectrum of a ridge smoother K (K + lam I)^-1 = V diag(s) V^T.

    Attributes:
      s: [n] in [0, 1), d / (d + lam).
      d: [n] eigenvalues of the Gram matrix, ascending, clipped at 0.
      V: [n, n] eigenvectors in columns.
    """

    s: jax.Array
    d: jax.Array
    V: jax.Array


def rbf_kernel(x: ArrayLike, y: ArrayLike, gamma: float) -> jax.Array:
    """exp(-gamma ||x_i - y_j||_2^2): [m, n] from x [m, p] and y [n, p]."""
    x, y = _points(x, y)
    # Centred first: the expansion of the square then cancels fewer digits.
    centre = jnp.mean(y, axis=0)
    x, y = x - centre, y - centre
    squares = jnp.sum(x**2, axis=1)[:, None] + jnp.sum(y**2, axis=1)
    distances = squares - 2 * jnp.matmul(x, y.T, precision=_EXACT)
    return jnp.exp(-gamma * jnp.maximum(distances, 0.0))


def laplace_kernel(x: ArrayLike, y: ArrayLike, gamma: float) -> jax.Array:
    """exp(-gamma ||x_i - y_j||_1): [m, n] from x [m, p] and y [n, p]."""
    x, y = _points(x, y)
    return jnp.exp(-gamma * jnp.sum(jnp.abs(x[:, None] - y[None]), axis=-1))


def polynomial_kernel(
    x: ArrayLike, y: ArrayLike, degree: int, gamma: float = 1.0, offset: float = 1.0
) -> jax.Array:
    """(gamma <x_i, y_j> + offset)^degree: [m, n] from x [m, p] and y [n, p]."""
    x, y = _points(x, y)
    return (gamma * jnp.matmul(x, y.T, precision=_EXACT) + offset) ** degree


def empirical_ntk(
    apply: Callable[[Any, jax.Array], jax.Array], params: Any, x: ArrayLike, y: ArrayLike
) -> jax.Array:
    """The neural tangent kernel of a network at its present parameters.

    K_ij = (1/c) sum_o <df_o(x_i)/dparams, df_o(y_j)/dparams>, the mean over the c outputs.

    Args:
      apply: `(params, inputs [m, ...]) -> [m, c]`; examples must not interact. For a linen module:
        `lambda params, x: module.apply({'params': params}, x)`.
      params: pytree of float arrays.
      x: [m, ...] inputs.
      y: [n, ...] inputs.

    Returns:
      [m, n]. Holds the Jacobians, (m + n) c times the size of the parameters.

    Source: Jacot et al. 2018, arXiv 1806.07572.
    """

    def jacobian(inputs):
        one = jax.jacrev(lambda params, example: apply(params, example[None])[0])
        return jax.vmap(one, (None, 0))(params, jnp.asarray(inputs))

    def contract(a, b):
        # [m, c, parameters] x [n, c, parameters] -> [m, n]
        a, b = a.reshape(*a.shape[:2], -1), b.reshape(*b.shape[:2], -1)
        return jnp.einsum('icp,jcp->ij', a, b, precision=_EXACT) / a.shape[1]

    terms = jax.tree.leaves(jax.tree.map(contract, jacobian(x), jacobian(y)))
    return jnp.sum(jnp.stack(terms), axis=0)


def ridge_smoother(gram: ArrayLike, lam: ArrayLike) -> Smoother:
    """The eigendecomposition behind every function of this module.

    Args:
      gram: [n, n] symmetric positive semi-definite K.
      lam: positive regularisation.

    Returns:
      Smoother(s [n], d [n], V [n, n]).

    Raises:
      ValueError: K is not square, not symmetric or not positive semi-definite; lam <= 0; or lam is
        within rounding of the largest eigenvalue (100 eps d_max), as happens in float32.
    """
    gram = jnp.asarray(gram)
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f'The Gram matrix must be square, [n, n]; got shape {gram.shape}.')
    checks.positive('lam', lam)
    rounding = float(jnp.finfo(gram.dtype).eps) if gram.dtype.kind in 'fV' else 0.0
    gram = gram.astype(numerics.accumulation_dtype(gram))
    if checks.concrete(gram):
        _check_symmetric(gram)
    d, V = jnp.linalg.eigh(gram)
    if checks.concrete(d, lam):
        _check_spectrum(d, float(np.asarray(lam)), rounding or float(jnp.finfo(d.dtype).eps))
    d = jnp.maximum(d, 0.0)
    return Smoother(shrinkage(d, lam), d, V)


def shrinkage(d: ArrayLike, lam: ArrayLike) -> jax.Array:
    """s = d / (d + lam), with broadcasting: one spectrum serves every regularisation."""
    checks.positive('lam', lam)
    return jnp.asarray(d) / (jnp.asarray(d) + lam)


def spectral_filter_step(filter: ArrayLike, s: ArrayLike, alpha: ArrayLike) -> jax.Array:
    """B_t = s (alpha + (1 - alpha) B_{t-1}).

    Args:
      filter: [n] B_{t-1}; ones before the first step, which is plain ridge whatever alpha.
      s: [n].
      alpha: weight of the ground truth; any real number (the optimal one may leave [0, 1]).

    Returns:
      [n] B_t.
    """
    return jnp.asarray(s) * (alpha + (1 - jnp.asarray(alpha)) * jnp.asarray(filter))


def spectral_filter_path(s: ArrayLike, alphas: ArrayLike) -> jax.Array:
    """B_1 ... B_T by recursion: [T, n] from s [n] and the weights [T - 1] of steps 2 ... T."""
    s = jnp.asarray(s)

    def step(filter, alpha):
        filter = spectral_filter_step(filter, s, alpha)
        return filter, filter

    _, rest = lax.scan(step, s, jnp.asarray(alphas, s.dtype))
    return jnp.concatenate([s[None], rest])


def spectral_filter_closed_form(s: ArrayLike, alphas: ArrayLike) -> jax.Array:
    """B_1 ... B_T without recursion.

    B_t = sum_{i=2..t} alpha_i prod_{j=i+1..t} (1 - alpha_j) s^{t-i+1}
          + prod_{j=2..t} (1 - alpha_j) s^t.

    Args:
      s: [n].
      alphas: [T - 1], the weights of steps 2 ... T; any real numbers.

    Returns:
      [T, n].

    Source: arXiv 2102.13088, the closed form for varying weights.
    """
    s = jnp.asarray(s)
    # A weight of 1 at step 1 turns the lone last product into the term i = 1 of the sum.
    alphas = jnp.concatenate([jnp.ones(1, s.dtype), jnp.asarray(alphas, s.dtype)])
    steps = jnp.arange(alphas.size)
    later = steps[None, :] > steps[:, None]
    # products[i, t] = prod_{j=i+1..t} (1 - alpha_j)
    products = jnp.cumprod(jnp.where(later, 1 - alphas[None, :], 1.0), axis=1)
    coefficients = jnp.where(
        later | jnp.eye(alphas.size, dtype=bool), alphas[:, None] * products, 0
    )
    powers = s[None, :] ** (steps[:, None] + 1)
    # Step t takes coefficient i with the power t - i + 1: row t reads the powers backwards.
    lags = steps[:, None] - steps[None, :]
    by_power = jnp.where(lags >= 0, coefficients.T[steps[:, None], lags], 0.0)
    return jnp.matmul(by_power, powers, precision=_EXACT)


def spectral_filter_constant(s: ArrayLike, alpha: ArrayLike, t: ArrayLike) -> jax.Array:
    """B_t for one constant weight.

    B_t = s / (1 - (1-alpha) s) [alpha + (1-alpha)(1-s) ((1-alpha) s)^{t-1}].

    Args:
      s: [n] in [0, 1).
      alpha: weight in [0, 1].
      t: step >= 1.

    Returns:
      [n].
    """
    checks.in_range('alpha', alpha, 0, 1)
    s, kept = jnp.asarray(s), 1 - jnp.asarray(alpha)
    return s / (1 - kept * s) * (alpha + kept * (1 - s) * (kept * s) ** (t - 1))


def spectral_filter_limit(d: ArrayLike, lam: ArrayLike, alpha: ArrayLike) -> jax.Array:
    """B_inf = alpha d / (alpha d + lam) = d / (d + lam / alpha): one ridge fit with lam / alpha.

    For alpha = 0 the limit is the zero function; for alpha = 1, plain ridge.

    Args:
      d: [n] eigenvalues.
      lam: positive.
      alpha: constant weight in [0, 1].

    Returns:
      [n].

    Raises:
      ValueError: lam <= 0 or alpha outside [0, 1].
    """
    checks.positive('lam', lam)
    checks.in_range('alpha', alpha, 0, 1, 'the limit is that of a constant convex weight')
    weighted = jnp.asarray(alpha) * jnp.asarray(d)
    return weighted / (weighted + lam)


def effective_regularisation(filter: ArrayLike, d: ArrayLike) -> jax.Array:
    """d (1 - B) / B: the lam with which plain ridge shrinks a direction as much as B does."""
    filter = jnp.asarray(filter)
    return jnp.asarray(d) * (1 - filter) / filter


def fitted_values(V: ArrayLike, filter: ArrayLike, targets: ArrayLike) -> jax.Array:
    """V diag(B) V^T Y: [n, c] from V [n, n], B [n] and Y [n, c]."""
    V = jnp.asarray(V)
    rotated = jnp.matmul(V.T, jnp.asarray(targets), precision=_EXACT)
    return jnp.matmul(V, jnp.asarray(filter)[:, None] * rotated, precision=_EXACT)


def predict(
    gram_x: ArrayLike, V: ArrayLike, d: ArrayLike, filter: ArrayLike, targets: ArrayLike
) -> jax.Array:
    """f_t(x) = k(x, X) V diag(B_t / d) V^T Y.

    Directions with d = 0 contribute nothing: there k(x, X) V is 0.

    Args:
      gram_x: [m, n] k(x, X).
      V: [n, n] eigenvectors.
      d: [n] eigenvalues.
      filter: [n] B_t.
      targets: [n, c] the ground truth Y, whatever the step.

    Returns:
      [m, c].
    """
    d = jnp.asarray(d)
    ratio = jnp.where(d > 0, jnp.asarray(filter) / jnp.where(d > 0, d, 1.0), 0.0)
    return jnp.matmul(jnp.asarray(gram_x), fitted_values(V, ratio, targets), precision=_EXACT)


def optimal_alpha(first_fit: ArrayLike, distilled_fit: ArrayLike, targets: ArrayLike) -> jax.Array:
    """The weight alpha that minimises ||targets - (alpha F1 + (1 - alpha) F0)||_F^2.

    alpha* = <Y - F0, F1 - F0> / ||F1 - F0||^2. In ridge regression the step's student is exactly
    that mixture, F1 being the first fit and F0 the student of the previous step alone (alpha = 0);
    for networks, F1 and F0 from two trainings make it an estimate. It may lie outside [0, 1].

    Args:
      first_fit: [m, c] F1 at validation inputs.
      distilled_fit: [m, c] F0 at the same inputs.
      targets: [m, c].

    Returns:
      A scalar; 1 where F1 = F0, when every weight is as good.

    Source: arXiv 2102.13088, the optimal weight; works for any mixture of two predictors.
    """
    first_fit, distilled_fit = jnp.asarray(first_fit), jnp.asarray(distilled_fit)
    direction = first_fit - distilled_fit
    square = jnp.sum(direction**2)
    along = jnp.sum((jnp.asarray(targets) - distilled_fit) * direction)
    return jnp.where(square > 0, along / jnp.where(square > 0, square, 1.0), 1.0)


def optimal_alpha_path(
    gram_val: ArrayLike,
    smoother: Smoother,
    targets: ArrayLike,
    val_targets: ArrayLike,
    num_steps: int,
    bounds: tuple[float, float] = (-np.inf, np.inf),
) -> tuple[jax.Array, jax.Array]:
    """Self-distillation in which every step takes its optimal weight on validation data.

    Args:
      gram_val: [m, n] k(validation inputs, X).
      smoother: of the training Gram matrix.
      targets: [n, c] training targets.
      val_targets: [m, c].
      num_steps: T >= 1.
      bounds: weights are clipped to these. Unclipped, the chain can oscillate with period 2 once
        a weight exceeds 1; `(0, 1)` prevents it.

    Returns:
      (alphas [T - 1], filters [T, n]).
    """
    s, d, V = smoother
    first_fit = predict(gram_val, V, d, s, targets)

    def step(filter, _):
        distilled = predict(gram_val, V, d, s * filter, targets)
        alpha = jnp.clip(optimal_alpha(first_fit, distilled, val_targets), *bounds)
        filter = spectral_filter_step(filter, s, alpha)
        return filter, (alpha, filter)

    _, (alphas, filters) = lax.scan(step, s, length=num_steps - 1)
    return alphas, jnp.concatenate([s[None], filters])


def mixed_targets(targets: ArrayLike, previous: ArrayLike, alpha: ArrayLike) -> jax.Array:
    """alpha targets + (1 - alpha) sg[previous]: the labels of the next step, [n, c]."""
    alpha, targets, previous = (jnp.asarray(x) for x in (alpha, targets, previous))
    return alpha * targets + (1 - alpha) * lax.stop_gradient(previous)


def self_distillation_loss(
    logits: ArrayLike, targets: ArrayLike, teacher_logits: ArrayLike, alpha: ArrayLike
) -> jax.Array:
    """alpha MSE(softmax z, y) + (1 - alpha) MSE(softmax z, sg[softmax z_T]), means over classes.

    Args:
      logits: [..., c] z.
      targets: [..., c] one-hot or soft labels y.
      teacher_logits: [..., c] z_T of the previous generation; stop-gradiented.
      alpha: weight of the labels.

    Returns:
      [...], not reduced.

    Source: the deep-network loss of the code to arXiv 2102.13088.
    """
    q = jnp.exp(numerics.log_softmax(logits))
    p = jnp.exp(numerics.log_softmax(lax.stop_gradient(jnp.asarray(teacher_logits))))
    to_labels = jnp.mean((q - jnp.asarray(targets)) ** 2, axis=-1)
    to_teacher = jnp.mean((q - p) ** 2, axis=-1)
    return to_teacher + jnp.asarray(alpha) * (to_labels - to_teacher)


def _points(x: ArrayLike, y: ArrayLike) -> tuple[jax.Array, jax.Array]:
    x, y = jnp.asarray(x), jnp.asarray(y)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f'A kernel needs points [m, p] and [n, p], got {x.shape} and {y.shape}.')
    dtype = numerics.accumulation_dtype(x, y)
    return x.astype(dtype), y.astype(dtype)


def _check_symmetric(gram: jax.Array):
    matrix = np.asarray(gram)
    scale = np.max(np.abs(matrix), initial=0.0)
    asymmetry = np.max(np.abs(matrix - matrix.T), initial=0.0)
    # Not <=: NaN must fail as well.
    if not asymmetry <= 1e3 * np.finfo(matrix.dtype).eps * scale:
        raise ValueError(
            f'The Gram matrix must be symmetric; the largest |K - K^T| is {asymmetry:.3g} '
            f'at a scale of {scale:.3g}.'
        )


def _check_spectrum(d: jax.Array, lam: float, eps: float):
    least, largest = float(d[0]), float(d[-1])
    if least < -max(100 * eps, 10 * eps * d.size) * max(largest, 0.0) or largest < 0:
        raise ValueError(
            f'The Gram matrix must be positive semi-definite; its least eigenvalue is {least:.3g}, '
            f'its largest {largest:.3g}.'
        )
    if lam < 100 * eps * largest:
        raise ValueError(
            f'lam={lam:.3g} is within rounding of the Gram matrix (largest eigenvalue '
            f'{largest:.3g}, relative precision {eps:.1g}): the small eigenvalues decide the fit '
            f'and are noise. Use lam >= {100 * eps * largest:.3g}, or float64 in a block '
            'with jax.enable_x64(True).'
        )
