"""Sampling from masked diffusion models, and decoding of several positions at once.

Everything here is one program of bounded length: nothing comes back to the host between calls of
the network. Networks give logits of the symbol at each position; `mask` is never said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from kd.losses import numerics, token
from kd.losses.masked_diffusion import Schedule
from kd.models.decoder import Decoder, head_of
from kd.network import Network


class Logits(Protocol):
    """What a network says, see `logits_function`."""

    def __call__(
        self, tokens: jax.Array, where: jax.Array | None = None, at: jax.Array | None = None
    ) -> jax.Array:
        """Logits [B, n, V]; -inf for what is never said."""


# (logits [B, n, V], open bool [B, n]) -> which of the open positions are committed, bool [B, n].
Rule = Callable[[jax.Array, jax.Array], jax.Array]


def mask_of(network: Network, mask: int | None = None) -> int:
    """The id of the mask: as given, or the first symbol of a network that is no outcome.

    Raises:
      ValueError: a network that has none, or one that sees only what came before.
    """
    module: Any = network.module
    if getattr(module, 'causal', False):
        raise ValueError(
            f'{type(module).__name__} sees only what came before; a masked diffusion model has '
            'causal=False.'
        )
    if mask is not None:
        return mask
    if not getattr(module, 'extra_symbols', 0):
        raise ValueError(
            f'{type(module).__name__} has no symbol for the mask; give it extra_symbols=1, or name '
            'an unused one of its vocabulary as `mask`.'
        )
    return module.num_classes


def logits_function(
    network: Network,
    variables: Mapping[str, Any],
    mask: int,
    *,
    shift: bool = False,
    forbidden: Sequence[int] = (),
    train: bool = False,
    key: jax.Array | None = None,
) -> Logits:
    """`logits(tokens int [B, L], where, at) -> [B, n, V]` of a network.

    Args:
      network: a `Decoder` or a `Transformer` that is not causal.
      variables: of the network.
      mask: id of the mask, which is never said.
      shift: whether the network gives logits of the symbol behind each position, as one that was
        causal before does.
      forbidden: further symbols that are never said.
      train, key: for dropout.

    The function's `where`, bool [B, L], are the positions that are no padding, None for all; `at`,
    int [B, n], those that logits are wanted of, None for all: a decoder's head is applied to them
    alone.
    """

    def logits(tokens, where=None, at=None):
        how: dict[str, Any] = dict(train=train, key=key)
        decoder = network.module if isinstance(network.module, Decoder) else None
        if decoder is not None:
            segments = None if where is None else where.astype(jnp.int32)
            inputs = (tokens, None, segments)
            found = network.apply(variables, *inputs, method='hidden', **how).logits
        else:
            padding = {} if where is None else {'padding': ~where}
            found = network.apply(variables, tokens, **padding, **how).logits
        if shift:
            found = jnp.concatenate([found[:, :1], found[:, :-1]], axis=1)
        if at is not None:
            found = jnp.take_along_axis(found, at[..., None], axis=1)
        if decoder is not None:
            head = head_of(decoder, variables)
            wide = numerics.accumulation_dtype(found, head)
            found = jnp.matmul(found, head, preferred_element_type=wide)
        never = [one for one in (mask, *forbidden) if one < found.shape[-1]]
        return found.at[..., jnp.asarray(never, jnp.int32)].set(-jnp.inf) if never else found

    return logits


# (variables, key, (B, L), steps) -> int [B, L].
Draw = Callable[[Mapping[str, Any], jax.Array, tuple[int, int], int], jax.Array]


def sampler(
    network: Network,
    mask: int | None,
    schedule: Schedule,
    *,
    path: bool = False,
) -> Draw:
    """Samples of a network, `draw(variables, key, shape, steps)`, jitted.

    Args:
      network: not causal.
      mask: see `mask_of`.
      schedule: see `ancestral`.
      path: along one path a sample, by `deterministic`.
    """
    own, sample = mask_of(network, mask), deterministic if path else ancestral

    def draw(variables, key, shape, steps):
        logits = logits_function(network, variables, own)
        return sample(logits, key, shape, steps, schedule=schedule, mask=own)

    return jax.jit(draw, static_argnums=(2, 3))


def ancestral(
    logits: Logits,
    key: jax.Array,
    shape: tuple[int, int],
    steps: int,
    *,
    schedule: Schedule,
    mask: int,
) -> jax.Array:
    """Symbols int [B, L] in `steps` calls of the network, by the chain run backwards.

    From alpha_t to alpha_s a hidden symbol is uncovered with probability (alpha_s - alpha_t) /
    (1 - alpha_t), and its value drawn from softmax(logits); the last step uncovers the rest.

    Args:
      logits: of the network.
      key: typed random key.
      shape: B, L.
      steps: N; times are equally spaced.
      schedule: see `kd.losses.masked_diffusion.schedule`.
      mask: id of the mask.

    Source: MDLM, arXiv 2406.07524.
    """

    def draws(step_key, said):
        coins, noise = jax.random.split(step_key)
        return jax.random.uniform(coins, shape), gumbel(noise, said.shape)

    return _uncovered(logits, draws, key, shape, steps, schedule, mask, chain=True)


def deterministic(
    logits: Logits,
    key: jax.Array,
    shape: tuple[int, int],
    steps: int,
    *,
    schedule: Schedule,
    mask: int,
) -> jax.Array:
    """`ancestral` along one path: a uniform u a symbol, and Gumbel noise, drawn once.

    A symbol is uncovered by the first step with u < alpha_s. The same key has the same path for
    every number of steps and every network.

    Source: arXiv 2602.00792 (deterministic sampler), as reconstructed here.
    """

    def draws(_, said):
        coins, noise = jax.random.split(key)
        return jax.random.uniform(coins, shape), gumbel(noise, said.shape)

    return _uncovered(logits, draws, key, shape, steps, schedule, mask, chain=False)


def _uncovered(logits, draws, key, shape, steps, schedule, mask, *, chain):
    times = jnp.linspace(1.0, 0.0, steps + 1)
    alphas = schedule.alpha(times)

    def step(z, n):
        said = logits(z)
        uniform, noise = draws(jax.random.fold_in(key, n), said)
        value = jnp.argmax(said + noise.astype(said.dtype), axis=-1).astype(z.dtype)
        before, after = alphas[n], alphas[n + 1]
        probability = (after - before) / (1 - before) if chain else after
        shown = (uniform < probability) | (n == steps - 1)
        return jnp.where((z == mask) & shown, value, z), None

    return lax.scan(step, jnp.full(shape, mask, jnp.int32), jnp.arange(steps))[0]


def gumbel(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Gumbel noise whose upper tail is as fine as float32: rare symbols are as rare as they should.

    From a single float32 uniform, whose steps near 1 are 2^-24, no value comes beyond 17, and a
    symbol of probability 1e-7 hardly ever (arXiv:2409.02908).
    """
    return jax.random.gumbel(key, shape, mode='high')


def one_by_one() -> Rule:
    """Commits the position whose best symbol is the most probable one."""
    return top(1)


def top(count: int) -> Rule:
    """Commits the `count` positions whose best symbols are the most probable ones."""

    def rule(logits, where):
        confidence = _confidence(logits)
        order = jnp.argsort(jnp.where(where, -confidence, jnp.inf), axis=-1)
        rank = jnp.argsort(order, axis=-1)
        return where & (rank < count)

    return rule


def confidence_above(threshold: float) -> Rule:
    """Commits positions whose best symbol has at least this probability, and the best position."""
    return lambda logits, where: _with_best(
        _confidence(logits), where, lambda confidence: confidence >= threshold
    )


def entropy_below(threshold: jax.Array | float) -> Rule:
    """Commits positions of at most this entropy, nats at temperature 1, and the least of all.

    A negative threshold commits one position a call, log V all of them.

    Source: dParallel, arXiv 2509.26488 (entropy-threshold decoding).
    """
    return lambda logits, where: _with_best(
        -token.entropy(logits), where, lambda negative: -negative <= threshold
    )


def _confidence(logits: jax.Array) -> jax.Array:
    """Probability of the most probable symbol, [B, n]."""
    return jnp.exp(numerics.log_softmax(logits).max(-1))


def _with_best(score, where, passes):
    """Positions that pass, and in any case the first one of the highest score."""
    best = jnp.argmax(jnp.where(where, score, -jnp.inf), axis=-1)
    # A row of -inf or NaN commits an open position too.
    best = jnp.where(jnp.take_along_axis(where, best[:, None], 1)[:, 0], best, where.argmax(-1))
    return where & (passes(score) | (jnp.arange(where.shape[1]) == best[:, None]))


def decode(
    logits: Logits,
    tokens: jax.Array,
    prompt_length: jax.Array,
    *,
    mask: int,
    block: int,
    rule: Rule,
    limit: int,
) -> tuple[jax.Array, jax.Array]:
    """Answers to prompts, block by block, several positions a call of the network.

    A row works on its first block that has a hidden position; a call commits those that the rule
    takes, at least one, with their most probable symbols. So a row takes at most `limit` calls, and
    a batch as many as the slowest of its rows: what is over is skipped. A row's tokens and calls
    are those that it would have alone.

    Args:
      logits: of the network.
      tokens: int [B, S], each row a prompt and, from `prompt_length` on, anything.
      prompt_length: int [B].
      mask: id of the mask.
      block: positions of a block.
      rule: what is committed.
      limit: positions of an answer; what lies behind it in a row is padding, which nobody sees.

    Returns:
      tokens int32 [B, S], 0 behind the answer, and the calls of each row, int32 [B].

    Raises:
      ValueError: no answer, no block, or answers that do not fit into a row.

    Source: dParallel, arXiv 2509.26488 (decoding).
    """
    length = tokens.shape[1]
    if limit < 1 or block < 1:
        raise ValueError(f'decode: limit={limit} and block={block} must be at least 1.')
    if limit >= length:
        raise ValueError(
            f'decode: an answer of {limit} tokens leaves no room for a prompt in {length}.'
        )
    first, at = prompt_length[:, None], jnp.arange(length)
    there, answer = at < first + limit, (at >= first) & (at < first + limit)
    z = jnp.where(answer, mask, jnp.where(there, tokens, 0)).astype(jnp.int32)

    def call(carry, _):
        z, calls = carry
        hidden = answer & (z == mask)
        going = hidden.any(-1)
        number = (hidden.argmax(-1)[:, None] - first) // block
        places = first + number * block + jnp.arange(block)
        inside = jnp.minimum(places, length - 1)
        where = jnp.take_along_axis(hidden, inside, axis=1) & (places < length) & going[:, None]
        said = logits(z, there, inside)
        commit = rule(said, where) & where
        value = jnp.argmax(said, axis=-1).astype(z.dtype)
        rows = jnp.arange(len(z))[:, None]
        # Positions that are not committed are written nowhere.
        z = z.at[rows, jnp.where(commit, inside, length)].set(value, mode='drop')
        return (z, calls + going), None

    def turn(carry, _):
        done = ~(answer & (carry[0] == mask)).any()
        return lax.cond(done, lambda c: (c, None), lambda c: call(c, None), carry)

    calls = jnp.zeros(len(z), jnp.int32)
    return lax.scan(turn, (z, calls), length=limit)[0]
