"""Which examples to ask a teacher about: gains, games against wrong answers, and draws.

Functions of arrays of one shape, whatever is left of a pool: `where` says which examples are, and
all others get nothing. Under jit and vmap.

The games are those of robust active distillation (arXiv 2210.01213). With gains sorted from above,
g_(1) >= g_(2) >= ..., n examples left and m right answers among them at least,

    H_k = sum_{i <= k} 1 / g_(i),   G_k = sum_{i <= k} g_(i)
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

# A gain of a student that is sure; its inverse is finite.
LEAST = 1e-9
KINDS = ('rad', 'rad_soft', 'margin', 'entropy', 'confidence', 'random')


class Game(NamedTuple):
    """The best strategy of one who asks.

    Attributes:
      q: [n], probabilities of asking.
      value: what an answer is worth at least, in units of the gain.
      support: int, how many examples have a probability.
    """

    q: jax.Array
    value: jax.Array
    support: jax.Array


def margin_gain(probs: ArrayLike) -> jax.Array:
    """1 - (largest - second largest probability), in [0, 1]; [..., C] -> [...]."""
    top = jax.lax.top_k(jnp.asarray(probs), 2)[0]
    return 1.0 - (top[..., 0] - top[..., 1])


def uncertainty(probs: ArrayLike, kind: str = 'margin') -> jax.Array:
    """How unsure a student is, [..., C] -> [...]: what is asked first where answers are right.

    Args:
      probs: of the student.
      kind: 'margin', see `margin_gain`; 'entropy', in nats; 'confidence', 1 - largest probability.

    Raises:
      ValueError: another kind.
    """
    probs = jnp.asarray(probs)
    if kind == 'margin':
        return margin_gain(probs)
    if kind == 'entropy':
        return -jnp.sum(jax.scipy.special.xlogy(probs, probs), -1)
    if kind == 'confidence':
        return 1.0 - probs.max(-1)
    raise ValueError(f"The uncertainty is 'margin', 'entropy' or 'confidence', got {kind!r}.")


def rad_hard(gain: ArrayLike, correct: ArrayLike, *, where: ArrayLike | None = None) -> Game:
    """max_q min_c sum_i q_i g_i c_i over c in {0, 1}^n of m ones at least.

        k* = argmax_k (k - (n - m)) / H_k,   q_(i) = 1 / (g_(i) H_k*) for i <= k*, 0 beyond

    All that may be asked are worth the same, q_i g_i; so a larger gain has a smaller probability.

    Args:
      gain: [n], g; taken as at least `LEAST`.
      correct: m, in (0, n], of the examples that are left.
      where: bool [n], which are; None for all.

    Source: arXiv 2210.01213.
    """
    gain, order, rank, left, count = _sorted(gain, where)
    k = jnp.arange(1, len(gain) + 1, dtype=gain.dtype)
    inverse = jnp.where(k <= count, 1.0 / gain[order], 0.0)
    worth = (k - (count - correct)) / jnp.cumsum(inverse)
    support, value = _best(worth, k <= count)
    inside = left & (rank < support)
    q = jnp.where(inside, 1.0 / gain, 0.0)
    return Game(q / q.sum(), value, support)


def rad_soft(gain: ArrayLike, rho: ArrayLike, *, where: ArrayLike | None = None) -> Game:
    """max_q min_g' sum_i q_i g'_i over 0 <= g' <= g of which sum g' >= rho sum g.

        k* = argmax_k (G_k - (1 - rho) G_n) / k,   q uniform over the k* largest gains

    Args:
      gain: [n], g.
      rho: in (0, 1], the share of the gain that right answers leave at least.
      where: bool [n], which examples are left; None for all.

    Source: arXiv 2210.01213.
    """
    gain, order, rank, left, count = _sorted(gain, where)
    k = jnp.arange(1, len(gain) + 1, dtype=gain.dtype)
    summed = jnp.cumsum(jnp.where(k <= count, gain[order], 0.0))
    worth = (summed - (1.0 - rho) * summed[-1]) / k
    support, value = _best(worth, k <= count)
    inside = left & (rank < support)
    return Game(inside / support.astype(gain.dtype), value, support)


def inclusion_probabilities(q: ArrayLike, count: ArrayLike) -> jax.Array:
    """min(1, c q_i) with the c for which they sum to `count`, or to the support if that is smaller.

    The chance of each example to be among `count` different ones: count * q_i where none of them is
    above 1.
    """
    q = jnp.asarray(q)
    few = jnp.sum(q > 0) <= count

    def halve(bounds, _):
        low, high = bounds
        middle = jnp.sqrt(low * high)
        enough = jnp.minimum(1.0, middle * q).sum() >= count
        return (jnp.where(enough, low, middle), jnp.where(enough, middle, high)), None

    smallest = jnp.min(jnp.where(q > 0, q, 1.0))
    bounds = (jnp.asarray(count, q.dtype), jnp.maximum(1.0 / smallest, count))
    (_, scale), _ = jax.lax.scan(halve, bounds, None, length=60)
    found = jnp.minimum(1.0, jnp.where(few, 1.0 / smallest, scale) * q)
    return jnp.where(few, (q > 0).astype(q.dtype), found)


def dependent_rounding(key: jax.Array, inclusion: ArrayLike) -> jax.Array:
    """A draw, bool [n], in which example i is with probability `inclusion[i]`, exactly.

    As many are drawn as the probabilities sum to, where that is whole. Examples meet in turn, and
    of two with a chance left one hands the other what it can, until one is in or out (the pivotal
    method of Deville and Tille 1998).
    """
    inclusion = jnp.asarray(inclusion)
    coins = jax.random.uniform(key, (len(inclusion) + 1,), inclusion.dtype)

    def meet(held, given):
        other, p, coin = given
        a, pa = held
        together = pa + p
        small = together < 1
        # Of two with less than 1 together one goes out, of two with more one comes in.
        first = jnp.where(
            small,
            coin * together < pa,
            coin * jnp.maximum(2.0 - together, 1e-30) < 1.0 - p,
        )
        settled = jnp.where(small == first, other, a)
        stays = jnp.where(small == first, a, other)
        left = jnp.where(small, together, together - 1.0)
        return (stays, left), (settled, ~small)

    numbers = jnp.arange(len(inclusion))
    (last, p), (settled, inside) = jax.lax.scan(
        meet, (numbers[0], inclusion[0]), (numbers[1:], inclusion[1:], coins[1:-1])
    )
    drawn = jnp.zeros(len(inclusion), bool).at[settled].set(inside)
    return drawn.at[last].set(coins[-1] < p)


def gumbel_top(key: jax.Array, log_q: ArrayLike, count: int) -> jax.Array:
    """`count` different indices, drawn one after the other by q among those that are left.

    Not with probability count * q_i, which `dependent_rounding` has. Those of log q = -inf come
    last, in their order.
    """
    log_q = jnp.asarray(log_q)
    noise = jax.random.gumbel(key, log_q.shape, log_q.dtype)
    return jax.lax.top_k(jnp.where(log_q > -jnp.inf, log_q + noise, -jnp.inf), count)[1]


def draw(
    key: jax.Array,
    q: ArrayLike,
    gain: ArrayLike,
    count: int,
    *,
    where: ArrayLike | None = None,
    exact: bool = False,
) -> jax.Array:
    """`count` different indices by q; all of a support that is smaller, and the largest gains next.

    Args:
      key: of the draw.
      q: [n], of a game.
      gain: [n].
      count: at most as many as are left.
      where: bool [n], which are; others are not drawn.
      exact: by `dependent_rounding` of `inclusion_probabilities`, in place of `gumbel_top`.
    """
    q, gain = jnp.asarray(q), jnp.asarray(gain)
    inside = q > 0 if where is None else (q > 0) & jnp.asarray(where)
    noise = jax.random.gumbel(key, q.shape, q.dtype)
    score = jnp.log(jnp.where(inside, q, 1.0)) + noise
    if exact:
        score = jnp.where(dependent_rounding(key, inclusion_probabilities(q, count)), 0.0, -1e6)
    # Gains, by their ranks, lie between what may be drawn and what is not there.
    beyond = jnp.argsort(jnp.argsort(gain)) - (len(gain) + 1e6)
    score = jnp.where(inside, score, beyond)
    if where is not None:
        score = jnp.where(jnp.asarray(where), score, -jnp.inf)
    return jax.lax.top_k(score, count)[1]


def select(
    key: jax.Array,
    probs: ArrayLike,
    count: int,
    *,
    kind: str = 'rad',
    rho: ArrayLike = 0.6,
    where: ArrayLike | None = None,
    exact: bool = False,
) -> jax.Array:
    """`count` different indices of examples to ask about.

    Args:
      key: of the draw.
      probs: of the student, [n, C].
      count: at most as many as are left.
      kind: one of `KINDS`: the games `rad_hard` and `rad_soft` of `margin_gain`, the largest
        `uncertainty`, or 'random'.
      rho: of the games, the share of the examples left whose answers are right, at least.
      where: bool [n], which are left; None for all.
      exact: as of `draw`.

    Raises:
      ValueError: another kind.
    """
    probs = jnp.asarray(probs)
    left = jnp.ones(len(probs), bool) if where is None else jnp.asarray(where)
    if kind in ('rad', 'rad_soft'):
        gain = margin_gain(probs)
        if kind == 'rad':
            game = rad_hard(gain, rho * left.sum(), where=left)
        else:
            game = rad_soft(gain, rho, where=left)
        return draw(key, game.q, gain, count, where=left, exact=exact)
    if kind == 'random':
        score = jax.random.uniform(key, (len(probs),))
    else:
        score = uncertainty(probs, kind)
    return jax.lax.top_k(jnp.where(left, score, -jnp.inf), count)[1]


def k_center(features: ArrayLike, taken: ArrayLike, count: int) -> jax.Array:
    """`count` indices, each that of the example farthest from all that are taken by then.

    Args:
      features: [n, D].
      taken: bool [n]; without any the first is the one farthest from the mean.
      count: how many more.

    Source: Sener and Savarese 2017, arXiv 1708.00489.
    """
    features, taken = jnp.asarray(features), jnp.asarray(taken)

    def to(point):
        return jnp.sum(jnp.square(features - point), -1)

    def nearest(distance, i):
        # Distances are computed to what is taken alone.
        def closer():
            return jnp.minimum(distance, to(features[i]))

        return jax.lax.cond(taken[i], closer, lambda: distance), None

    # Infinite where nothing is taken yet.
    begun = jnp.full(len(features), jnp.inf, features.dtype)
    distance, _ = jax.lax.scan(nearest, begun, jnp.arange(len(features)))
    from_mean = to(features.mean(0))

    def take(distance, _):
        i = jnp.argmax(jnp.where(distance == jnp.inf, from_mean, distance))
        return jnp.minimum(distance, to(features[i])).at[i].set(-1.0), i

    return jax.lax.scan(take, jnp.where(taken, -1.0, distance), None, length=count)[1]


def _sorted(
    gain: ArrayLike, where: ArrayLike | None
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """(gains, their order from above, the rank of each, which are left, how many)."""
    gain = jnp.maximum(jnp.asarray(gain), LEAST)
    left = jnp.ones(len(gain), bool) if where is None else jnp.asarray(where)
    order = jnp.argsort(jnp.where(left, -gain, jnp.inf))
    return gain, order, jnp.argsort(order), left, left.sum().astype(gain.dtype)


def _best(worth: jax.Array, possible: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(number, worth) of the best of k = 1, 2, ..."""
    worth = jnp.where(possible, worth, -jnp.inf)
    return jnp.argmax(worth) + 1, worth.max()
