"""Masked diffusion of text: how symbols are hidden, and what networks that uncover them minimise.

Time t runs from 0, where everything is visible, to 1, where (almost) nothing is. A symbol is
visible with probability alpha(t), each for itself, and once hidden it stays so. `mask` is the
symbol in the place of a hidden one: an input without a meaning, never an outcome.

Logits are [..., K] of the symbol AT a position. Values are nats, float32 (float64 for float64
input), unreduced unless it says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jax.typing import ArrayLike

from kd.losses import classification, divergence, numerics, token

ScheduleName = Literal['log_linear', 'cosine']
# Of integrals over a standard normal variable, whose mass beyond is below 1e-32.
_GRID = np.linspace(-12.0, 12.0, 2401)


class Schedule(NamedTuple):
    """Probability `alpha(t)` that a symbol is visible, and `rate(t)` = -alpha' / (1 - alpha), at
    which a hidden one is uncovered on the way back."""

    alpha: Callable[[ArrayLike], jax.Array]
    rate: Callable[[ArrayLike], jax.Array]


def schedule(name: ScheduleName = 'log_linear', *, eps: float = 1e-3) -> Schedule:
    """alpha from 1 at t = 0 to eps at t = 1.

        log_linear   1 - (1 - eps) t                  rate 1 / t
        cosine       eps + (1 - eps) cos(pi t / 2)    rate (pi / 2) / tan(pi t / 4)

    Source: Sahoo et al. 2024 (MDLM), arXiv 2406.07524, and its released code.
    """
    if name == 'log_linear':
        return Schedule(
            lambda t: 1 - (1 - eps) * jnp.asarray(t),
            lambda t: 1 / jnp.asarray(t),
        )
    if name == 'cosine':
        return Schedule(
            lambda t: eps + (1 - eps) * jnp.cos(jnp.pi / 2 * jnp.asarray(t)),
            lambda t: jnp.pi / 2 / jnp.tan(jnp.pi / 4 * jnp.asarray(t)),
        )
    raise ValueError(f"schedule must be 'log_linear' or 'cosine', got {name!r}.")


def stratified(key: jax.Array, count: int, low: ArrayLike = 0.0) -> jax.Array:
    """Times float32 [count], one uniform in each of as many equal parts of [low, 1]."""
    uniform = (jnp.arange(count) + jax.random.uniform(key, (count,))) / count
    return jnp.asarray(low) + (1 - jnp.asarray(low)) * uniform


def corrupt(
    uniform: ArrayLike,
    tokens: ArrayLike,
    alpha: ArrayLike,
    mask: int,
    *,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Symbols with `mask` in the place of those that are hidden: visible where u < alpha.

    With the same u at two times the pair is that of one path: what is visible at the later time is
    visible at the earlier one, and the law of the pair is that of the chain which hides symbols
    one by one. It is the law of the Gaussian path of Latent Shadows too: u is F_Y(Y) of its margin
    Y (see `margin_cdf`), of which no array with an axis of K is needed.

    Args:
      uniform: u in [0, 1), [B, L], one a symbol.
      tokens: int [B, L].
      alpha: [B], or what broadcasts against [B, L].
      mask: id of the mask.
      where: bool [B, L], the symbols that may be hidden; None for all.

    Returns:
      int [B, L].

    Source: arXiv 2602.00792 (deterministic coupling), as reconstructed here.
    """
    alpha = jnp.asarray(alpha)
    alpha = alpha[:, None] if alpha.ndim == 1 else alpha
    hidden = jnp.asarray(uniform) >= alpha
    if where is not None:
        hidden = hidden & where
    return jnp.where(hidden, mask, tokens)


def carry_over(logits: ArrayLike, z: ArrayLike, mask: int) -> jax.Array:
    """Log-probabilities [..., K] of the symbols: certainty of what is visible, softmax elsewhere.

    An outcome `mask`, which networks with padded vocabularies have, is impossible.

    Args:
      logits: [..., K].
      z: int [...].
      mask: id of the mask, K or an outcome.

    Source: MDLM, arXiv 2406.07524 (carry-over unmasking, zero masking probabilities).
    """
    log_p = numerics.log_softmax(logits, where=outcomes(jnp.shape(logits)[-1], mask))
    known = jnp.arange(log_p.shape[-1]) == jnp.asarray(z)[..., None]
    return jnp.where(jnp.asarray(z)[..., None] == mask, log_p, jnp.where(known, 0.0, -jnp.inf))


def outcomes(size: int, mask: int) -> jax.Array:
    """bool [size], the outcomes of so many logits that are symbols."""
    return jnp.arange(size) != mask


def elbo_weights(masked: ArrayLike, rate: ArrayLike) -> jax.Array:
    """-alpha'(t) / (1 - alpha(t)) of hidden symbols, 0 of others, float32 [B, L].

    The sum over a sequence of weights times -log p(x_i | z_t) is an unbiased estimate, by t uniform
    in [0, 1], of a bound from above of -log p(x).

    Args:
      masked: bool [B, L].
      rate: [B], of the schedule at the time of each sequence.

    Source: MDLM, arXiv 2406.07524 (the continuous-time bound).
    """
    return jnp.where(masked, jnp.asarray(rate)[:, None], 0.0).astype(jnp.float32)


def consistency(
    logits: ArrayLike,
    teacher_logits: ArrayLike,
    labels: ArrayLike,
    shown: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """KL(q || p) [...] of positions that the student sees hidden, with what a teacher sees earlier.

        q = the true symbol where the teacher is shown it, softmax(z_teacher / temperature) else

    Finite everywhere. The reverse KL would be infinite wherever a symbol is shown to the teacher
    alone. No gradient to the teacher.

    Args:
      logits: of the student at time t, [..., K].
      teacher_logits: at the earlier time s, [..., K].
      labels: the true symbols, int [...].
      shown: bool [...], visible at s.
      temperature: tau of the teacher alone.
      where: bool, broadcasts against the logits: the outcomes that are symbols.

    Source: arXiv 2602.00792 (masked consistency distillation), as reconstructed here.
    """
    tempered = jax.lax.stop_gradient(jnp.asarray(teacher_logits) / temperature)
    soft = divergence.forward_kl(logits, tempered, where=where)
    return jnp.where(shown, classification.cross_entropy(logits, labels, where=where), soft)


def margin_cdf(r: ArrayLike, size: int) -> np.ndarray:
    """F_Y(r) = int phi(u) Phi(u + r)^(K - 1) du, float64 [...]: P(visible) at signal to noise r.

    Y = max_{j != k} e_j - e_k of standard normal e in R^K. A token k stays the largest coordinate
    of a one_hot(k) + s e while Y < r = a / s. F_Y(0) = 1 / K. On the host: towards r = 6 it differs
    from 1 by less than float32 can tell.

    Args:
      r: [...].
      size: K, at least 2.

    Source: arXiv 2602.00792 (projection of a Gaussian diffusion), as reconstructed here.
    """
    inner = (size - 1) * scipy.special.log_ndtr(_GRID + np.asarray(r, np.float64)[..., None])
    density = np.exp(inner - _GRID**2 / 2) / np.sqrt(2 * np.pi)
    # The trapezoid rule is exact to rounding for what falls off so fast at both ends.
    return density.sum(-1) * (_GRID[1] - _GRID[0])


def inverse_margin_cdf(alpha: ArrayLike, size: int) -> np.ndarray:
    """r with `margin_cdf(r, size)` = alpha, float64 [...], by bisection.

    Raises:
      ValueError: alpha outside [1 / K, 1): no signal to noise that is not negative gives less than
        1 / K, and none that is finite gives 1.
    """
    alpha = np.asarray(alpha, np.float64)
    if (alpha < 1 / size - 1e-12).any() or (alpha >= 1).any():
        raise ValueError(
            f'of {size} symbols a Gaussian path shows between 1 / {size} and 1, got alpha={alpha}.'
        )
    low, high = np.zeros_like(alpha), np.full_like(alpha, 20.0)
    for _ in range(60):
        middle = (low + high) / 2
        short = margin_cdf(middle, size) < alpha
        low, high = np.where(short, middle, low), np.where(short, high, middle)
    return (low + high) / 2


def block_mask(
    key: jax.Array,
    prompt_length: ArrayLike,
    length: int,
    *,
    block: int,
    ratio: float = 0.5,
    tail: bool = True,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Semi-autoregressive masking: the blocks before one are seen, those behind it are not.

    Of each row's response, tokens prompt_length .. length - 1, a block is drawn for itself. In it
    each token is hidden with probability (1 - 1e-3) ratio + 1e-3, or in the second copy of the
    batch where the first shows it.

    Args:
      key: typed random key.
      prompt_length: int [B]; where it is S or more nothing is hidden.
      length: S.
      block: tokens of a block.
      ratio: see above; 1 hides the whole block.
      tail: draws among N whole blocks and what is left behind them, as released: nothing is hidden
        in rows whose response has no such rest. False draws among blocks that have a token.

    Returns:
      bool [B, S] each: hidden in the block, hidden in the second copy's, and behind the block.

    Source: dParallel, arXiv 2509.26488, and its released code (whose loop gives all rows of a batch
    the place of the last one; it is run with one).
    """
    places, coins = jax.random.split(key)
    first = jnp.asarray(prompt_length)[:, None]
    response = length - first
    count = response // block + 1 if tail else -(-response // block)
    uniform = jax.random.uniform(places, first.shape)
    # A row without a response has no block, and its prompt is none.
    number = jnp.clip((uniform * count).astype(jnp.int32), 0, jnp.maximum(count - 1, 0))
    begin, at = first + number * block, jnp.arange(length)
    inside = (at >= begin) & (at < begin + block)
    hidden = jax.random.uniform(coins, inside.shape) < (1 - 1e-3) * ratio + 1e-3
    return inside & hidden, inside & ~hidden, at >= begin + block


def certainty(
    logits: ArrayLike, labels: ArrayLike, where: ArrayLike, *, temperature: float = 0.5
) -> jax.Array:
    """Mean entropy [B], in nats at `temperature`, of the positions where the network is right.

    Right: the most probable symbol is the label; nothing flows through that choice. Each example's
    own positions are averaged, so that it is the same in any micro-batches; 0 with zero gradient
    where there are none.

    Args:
      logits: [B, n, V].
      labels: int [B, n].
      where: bool [B, n], the positions that are hidden.
      temperature: T of the entropy; nothing else is divided by it.

    Source: dParallel, arXiv 2509.26488 (certainty-forcing loss).
    """
    right = jnp.argmax(jax.lax.stop_gradient(logits), axis=-1) == labels
    return _own_mean(token.entropy(logits, temperature=temperature), where & right)


def masked_ce(logits: ArrayLike, labels: ArrayLike, where: ArrayLike) -> jax.Array:
    """Mean cross-entropy [B] of the positions `where`; arguments as of `certainty`.

    Source: dParallel, arXiv 2509.26488 (consistency loss).
    """
    return _own_mean(classification.cross_entropy(logits, labels), where)


def _own_mean(values: jax.Array, where: ArrayLike) -> jax.Array:
    """Mean over the last axis of what is `where`; 0 of nothing."""
    count = jnp.sum(where, axis=-1)
    return jnp.sum(jnp.where(where, values, 0.0), axis=-1) / jnp.maximum(count, 1)
