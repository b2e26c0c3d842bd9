"""Divergences straight from hidden states and output heads, for large vocabularies.

The logits [tokens, vocabulary] are the largest array of a language model's step by far, and a
divergence with its gradient needs several of that size. `fused_divergence` never forms one: it
takes `chunk` tokens at a time through both heads, the divergence and back.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from kd.losses import divergence as divergences
from kd.losses import numerics, signal

Divergence = Callable[..., jax.Array]


def fused_divergence(
    student_hidden: jax.Array,
    student_head: jax.Array,
    teacher: divergences.Teacher,
    *,
    divergence: Divergence = divergences.forward_kl,
    chunk: int = 256,
    where: ArrayLike | None = None,
) -> jax.Array:
    """divergence(student_hidden @ student_head, teacher) without the logits [N, V].

    What exists at once is a slab [chunk, V] of each model's logits and, under differentiation, the
    head's own gradient [D, V]. The latter is the larger for chunk < D, so splitting the slabs over
    the vocabulary as well would save little, and cost a second pass for the normaliser.

    The gradient is formed in the forward sweep, while a slab's logits exist, for a loss that weighs
    all tokens alike; the backward pass only scales it, and the whole costs the four matrix products
    that the dense form costs. That covers sums and means, also over the tokens that `where` keeps.
    Where the cotangents differ between tokens (a weight per token or sequence), the backward pass
    notices and runs a second sweep for the head's gradient: as exact, about 1.75 times the work.

    Args:
      student_hidden: [N, D] last hidden states, float32 or bfloat16.
      student_head: [D, V] output projection.
      teacher: a TeacherSignal with one leading axis [N], such as `HiddenHead(hidden [N, D'], head
        [D', V])`, or logits [N, V].
      divergence: any function `(logits [n, V], teacher, where=...) -> [n]` that treats positions
        independently: those of `kd.losses.divergence`, with options bound by `functools.partial`
        (`partial(generalized_jsd, beta=0.1)`), or your own. It defines which signals are accepted.
      chunk: tokens per slab. Memory grows with it; below about 128 the matrix products starve.
      where: bool, broadcasts against the logits [N, V]: `mask[:, None]` for tokens, [V] for the
        vocabulary. Passed on to `divergence`; None is not passed.

    Returns:
      [N] in float32 (float64 for float64 input); products accumulate in that dtype. Gradients with
      respect to `student_hidden` and `student_head` come in the dtype of each; for bfloat16 factors
      the logits' gradient is rounded to bfloat16 before its products, as in a bfloat16 layer. The
      teacher is stop-gradiented. Reverse mode only.

    Raises:
      ValueError: shapes that do not fit; a `where` over tokens without its second axis.
    """
    teacher = signal.as_signal(teacher)
    where = None if where is None else jnp.atleast_2d(where)
    _check(student_hidden, student_head, teacher, where, chunk)
    given = lax.stop_gradient((teacher, where))
    # Inside shard_map one operand may be replicated where another varies over the devices. Adding a
    # zero that varies like all of them makes JAX sum the gradient of a replicated head over the
    # devices; XLA drops the addition.
    zero = jnp.zeros_like(student_hidden, shape=())
    for operand in jax.tree.leaves((student_head, given)):
        zero += jnp.zeros_like(operand, zero.dtype, ())
    head = student_head + zero.astype(student_head.dtype)
    return _fused(divergence, chunk, student_hidden + zero, head, given)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fused(divergence, chunk, hidden, head, given):
    slabs = _Slabs(chunk, hidden, *given)

    def sweep(_, i):
        h, teacher, options = slabs[i]
        return None, divergences.per_position(divergence, _product(h, head), teacher, **options)

    return slabs.join(lax.scan(sweep, None, jnp.arange(slabs.count))[1])


def _fused_forward(divergence, chunk, hidden, head, given):
    ones = jnp.ones_like(hidden, numerics.accumulation_dtype(hidden, head), hidden.shape[:1])
    value, to_hidden, to_head = _value_and_gradients(divergence, chunk, hidden, head, given, ones)
    return value, (hidden, head, given, to_hidden, to_head)


def _fused_backward(divergence, chunk, residuals, cotangent):
    hidden, head, given, to_hidden, to_head = residuals
    where = given[1]
    kept = jnp.ones(cotangent.shape, bool)
    if where is not None:
        kept &= jnp.any(where, axis=1)
    common = cotangent[jnp.argmax(kept)]

    def scale():
        return common * to_head

    def sweep_again():
        return _value_and_gradients(divergence, chunk, hidden, head, given, cotangent)[2]

    to_head = lax.cond(jnp.all((cotangent == common) | ~kept), scale, sweep_again)
    to_hidden = cotangent[:, None] * to_hidden
    return to_hidden.astype(hidden.dtype), to_head.astype(head.dtype), None


_fused.defvjp(_fused_forward, _fused_backward)


def _value_and_gradients(divergence, chunk, hidden, head, given, weights):
    """d_n [N], w_n dd_n/dhidden_n [N, D] and d(sum_n w_n d_n)/dhead [D, V], for weights w [N]."""
    slabs = _Slabs(chunk, hidden, *given)
    weights = slabs.split(weights, constant_values=0)
    dtype = weights.dtype

    def sweep(to_head, i):
        h, teacher, options = slabs[i]
        value, pull = jax.vjp(
            lambda z: divergences.per_position(divergence, z, teacher, **options),
            _product(h, head),
        )
        (to_logits,) = pull(_Slabs.take(weights, i).astype(value.dtype))
        to_logits = to_logits.astype(head.dtype)
        to_head += jnp.matmul(h.T, to_logits, preferred_element_type=dtype)
        return to_head, (value, jnp.matmul(to_logits, head.T, preferred_element_type=dtype))

    start = jnp.zeros_like(head, dtype)
    to_head, (value, to_hidden) = lax.scan(sweep, start, jnp.arange(slabs.count))
    return slabs.join(value), slabs.join(to_hidden), to_head


def _product(hidden, head):
    return signal.HiddenHead(hidden, head).logits()


class _Slabs:
    """Tokens dealt out to slabs like cards: slab i has the tokens i, i + count, i + 2 count, ...

    Dealt, not cut: where the tokens are sharded over devices, each slab then has a share of every
    device's tokens and all work on it together.
    """

    def __init__(self, chunk, hidden, teacher, where):
        self.tokens = hidden.shape[0]
        self.count = -(-self.tokens // chunk)
        self.size = -(-self.tokens // self.count)
        self.hidden = self.split(hidden)
        self.teacher_head = None
        if isinstance(teacher, signal.HiddenHead):
            self.teacher_head = teacher.head
            teacher = teacher.hidden
        self.teacher = jax.tree.map(self.split, teacher)
        self.where = where
        self.where_is_split = where is not None and where.shape[0] == self.tokens
        if self.where_is_split:
            self.where = self.split(where)

    def __getitem__(self, i):
        """Student hidden [size, D], teacher signal and keyword arguments of slab i."""
        teacher = jax.tree.map(lambda x: self.take(x, i), self.teacher)
        if self.teacher_head is not None:
            teacher = signal.HiddenHead(teacher, self.teacher_head)
        where = self.take(self.where, i) if self.where_is_split else self.where
        return self.take(self.hidden, i), teacher, {} if where is None else {'where': where}

    def split(self, x, **padding):
        """[N, ...] -> [size, count, ...]; without `padding` the missing tokens repeat the last."""
        missing = self.size * self.count - self.tokens
        if missing:
            mode = 'constant' if padding else 'edge'
            x = jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1), mode, **padding)
        return x.reshape((self.size, self.count) + x.shape[1:])

    @staticmethod
    def take(x, i):
        return lax.dynamic_index_in_dim(x, i, axis=1, keepdims=False)

    def join(self, x):
        """[count, size, ...] -> [N, ...]"""
        x = jnp.swapaxes(x, 0, 1)
        return x.reshape((self.size * self.count,) + x.shape[2:])[: self.tokens]


def _check(hidden, head, teacher, where, chunk):
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[0]:
        raise ValueError(
            'fused_divergence needs student_hidden [N, D] and student_head [D, V], got shapes '
            f'{hidden.shape} and {head.shape}; flatten leading axes first.'
        )
    tokens, size = hidden.shape[0], head.shape[1]
    if chunk < 1 or tokens < 1:
        raise ValueError(f'fused_divergence needs tokens and chunk >= 1, got {tokens} and {chunk}.')
    rows = teacher.hidden if isinstance(teacher, signal.HiddenHead) else teacher
    for leaf in jax.tree.leaves(rows):
        if jnp.shape(leaf)[:1] != (tokens,):
            raise ValueError(
                f'fused_divergence: the {type(teacher).__name__} signal needs the leading axis of '
                f'the {tokens} tokens on each array, got shape {jnp.shape(leaf)}.'
            )
    if where is not None and any(
        n not in (1, full) for n, full in zip(where.shape, (tokens, size), strict=True)
    ):
        raise ValueError(
            f'fused_divergence: where must broadcast against the logits [{tokens}, {size}], got '
            f'shape {where.shape}; a mask over tokens is where=mask[:, None].'
        )
