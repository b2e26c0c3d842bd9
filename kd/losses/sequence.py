"""Losses straight from hidden states and output heads, for large vocabularies.

The logits [tokens, vocabulary] are the largest array of a language model's step by far, and a loss
with its gradient needs several of that size. The functions here never form one: they take `chunk`
tokens at a time through the head, the loss and back.

    loss, aux = fused_token_loss(hidden, head, token_loss, teacher=..., per_token=..., valid=...)

is the general form. `fused_divergence` is it for a divergence from a teacher, `token_log_probs` for
the log-probabilities of given tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from kd.losses import divergence as divergences
from kd.losses import fused, numerics, outcomes, signal

Divergence = Callable[..., jax.Array]
# (logits [n, V], teacher, per_token) -> (loss [n], aux), see fused_token_loss.
TokenLoss = Callable[[jax.Array, Any, Any], tuple[jax.Array, Any]]


def fused_token_loss(
    hidden: jax.Array,
    head: jax.Array,
    token_loss: TokenLoss,
    *,
    teacher: signal.TeacherSignal | None = None,
    per_token: Any = (),
    valid: ArrayLike | None = None,
    chunk: int = 256,
    shards: int = 1,
    tied: bool = False,
) -> tuple[jax.Array, Any]:
    """token_loss(hidden @ head, teacher, per_token) without the logits [N, V].

    What exists at once is a slab [chunk, V] of each model's logits and, under differentiation, the
    head's own gradient [D, V]. The latter is the larger for chunk < D, so splitting the slabs over
    the vocabulary as well would save little, and cost a second pass for the normaliser.

    The gradient is formed in the forward sweep, while a slab's logits exist, for a loss that counts
    all tokens alike; the backward pass only scales it, and the whole costs the matrix products that
    the dense form costs. So let `token_loss` multiply by the weights of tokens (`per_token`, from
    `aggregate.weights`), and sum or average what comes out. Where the cotangents of tokens differ,
    as those of a loss of sequences do, the backward pass notices and runs a second sweep for the
    head's gradient: as exact, 1.7 times the work. A cotangent of `aux` (an entropy bonus added
    outside) costs a second sweep for both gradients, twice the work.

    Args:
      hidden: [N, D] last hidden states, float32 or bfloat16.
      head: [D, V] output projection.
      token_loss: (logits [n, V], teacher, per_token) -> (loss [n], aux), both of a slab of n
        tokens; it treats tokens independently. `aux` is a pytree of arrays [n, ...], possibly ():
        what else is wanted, such as an entropy. It may close over numbers and arrays, to which no
        gradient comes.
      teacher: a TeacherSignal with one leading axis [N], such as `HiddenHead(hidden [N, D'], head
        [D', V'])`; handed on in slabs.
      per_token: pytree of arrays [N, ...], handed on in slabs: labels, advantages, weights.
      valid: bool [N]. Tokens with False are 0 in the loss and in aux, whatever they hold, and cost
        nothing: those that count are packed first, and slabs without one are skipped.
      chunk: tokens per slab. Memory grows with it; below about 128 the matrix products starve.
      shards: into how many equal parts the axis of tokens lies over devices (the 'data' and 'fsdp'
        axes of the mesh); N must divide by it. Changes no number. Packing stays within the parts,
        and the head's gradient is summed over devices once, not for each slab. (Let the head lie
        whole along those axes, by `jax.lax.with_sharding_constraint` before the call: else it is
        gathered for each slab.)
      tied: whether the head is an embedding [V, D], turned (`embedding.T`). Changes no number, and
        saves a copy of it; the teacher's `HiddenHead` says so of its own.

    Returns:
      (loss [N], aux [N, ...]); float32 (float64 for float64 factors) where token_loss keeps the
      dtype of the logits it gets. Products accumulate in that dtype. Gradients with respect to
      `hidden` and `head` come in the dtype of each; for bfloat16 factors the logits' gradient is
      rounded to bfloat16 before its products, as in a bfloat16 layer. `teacher`, `per_token` and
      `valid` are stop-gradiented. Reverse mode only.

    Raises:
      ValueError: shapes that do not fit.
    """
    of_teacher: Any = teacher
    shared, theirs = None, fused.How(chunk, shards, False)
    if isinstance(teacher, signal.HiddenHead):
        theirs = theirs._replace(tied=teacher.tied)
        of_teacher, shared = teacher.hidden, theirs.turned(teacher.head)
    valid = None if valid is None else jnp.asarray(valid)
    _check(hidden, head, valid, chunk, shards)
    _check_leading(hidden.shape[0], of_teacher, f'the {type(teacher).__name__} signal')
    _check_leading(hidden.shape[0], per_token, 'per_token')

    def run(logits, per_token, shared):
        of_teacher, per_token = per_token
        if shared is not None:
            of_teacher = signal.HiddenHead(of_teacher, theirs.turned(shared), theirs.tied)
        return token_loss(logits, of_teacher, per_token)

    given = fused.Given((of_teacher, per_token), shared, valid)
    return fused.token_losses(run, theirs._replace(tied=tied), hidden, head, given)


def fused_divergence(
    student_hidden: jax.Array,
    student_head: jax.Array,
    teacher: divergences.Teacher,
    *,
    divergence: Divergence = divergences.forward_kl,
    where: ArrayLike | None = None,
    valid: ArrayLike | None = None,
    chunk: int = 256,
    shards: int = 1,
    tied: bool = False,
) -> jax.Array:
    """divergence(student_hidden @ student_head, teacher) without the logits [N, V].

    One call of `fused_token_loss`, which says what it costs and how gradients are formed.

    Args:
      student_hidden: [N, D] last hidden states, float32 or bfloat16.
      student_head: [D, V] output projection.
      teacher: a TeacherSignal with one leading axis [N], such as `HiddenHead(hidden [N, D'], head
        [D', V])`, or logits [N, V].
      divergence: any function `(logits [n, V], teacher, where=...) -> [n]` that treats positions
        independently: those of `kd.losses.divergence`, with options bound by `functools.partial`
        (`partial(generalized_jsd, beta=0.1)`), or your own. It defines which signals are accepted.
      where: bool, broadcasts against the logits [N, V]: `mask[:, None]` for tokens, [V] for the
        vocabulary. Passed on to `divergence`; None is not passed. Tokens that it takes out are
        computed all the same; those outside `valid` are not.
      valid, chunk, shards, tied: see `fused_token_loss`.

    Returns:
      [N] in float32 (float64 for float64 input). The teacher is stop-gradiented.

    Raises:
      ValueError: shapes that do not fit; a `where` over tokens without its second axis.
    """
    teacher = signal.as_signal(teacher)
    size = (student_hidden.shape[0], student_head.shape[-1])
    everywhere, per_token = _split_where(where, *size)

    def token_loss(logits, teacher, per_token):
        masks = [x for x in (everywhere, per_token) if x is not None]
        options = {'where': masks[0]} if masks else {}
        return outcomes.per_position(divergence, logits, teacher, **options), ()

    return fused_token_loss(
        student_hidden,
        student_head,
        token_loss,
        teacher=teacher,
        per_token=per_token,
        valid=valid,
        chunk=chunk,
        shards=shards,
        tied=tied,
    )[0]


def token_log_probs(
    hidden: jax.Array,
    head: jax.Array,
    tokens: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    where: ArrayLike | None = None,
    valid: ArrayLike | None = None,
    chunk: int = 256,
    shards: int = 1,
    tied: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """log q(tokens) and the entropy of q = softmax(hidden @ head / temperature), without logits.

    Both are differentiable; see `fused_token_loss` for what that costs. What a policy is compared
    with itself by (an importance ratio) needs one temperature and one `where` on both sides.

    Args:
      hidden: [N, D] last hidden states at the positions that predict `tokens`.
      head: [D, V] output projection.
      tokens: int [N].
      temperature: positive; a number or [N]. Without gradient.
      where: bool, broadcasts against the logits [N, V]: the tokens that q may have.
      valid, chunk, shards, tied: see `fused_token_loss`.

    Returns:
      (log_probs [N], entropy [N]) in nats. The first is -inf, with zero gradient, where a token is
      outside `where` or none of 0 .. V - 1 (take padding out by `valid`).

    Raises:
      ValueError: shapes that do not fit, or a concrete temperature that is not positive.
    """
    numerics.check_positive('temperature', temperature)
    tokens, temperature = jnp.asarray(tokens), lax.stop_gradient(jnp.asarray(temperature))
    everywhere, allowed = _split_where(where, hidden.shape[0], head.shape[-1])
    own = temperature if temperature.ndim else None

    def token_loss(logits, _, per_token):
        tokens, own, allowed = per_token
        return said_of(
            logits,
            tokens,
            temperature=temperature if own is None else own[:, None],
            where=everywhere if allowed is None else allowed,
        )

    return fused_token_loss(
        hidden,
        head,
        token_loss,
        per_token=(tokens, own, allowed),
        valid=valid,
        chunk=chunk,
        shards=shards,
        tied=tied,
    )


def said_of(
    logits: jax.Array,
    tokens: jax.Array,
    *,
    temperature: ArrayLike = 1.0,
    where: ArrayLike | None = None,
) -> tuple[jax.Array, jax.Array]:
    """log q(tokens) and the entropy of q = softmax(logits / temperature), where logits are at hand.

    For the `token_loss` of `fused_token_loss`.

    Args:
      logits: [n, V].
      tokens: int [n].
      temperature: broadcasts against the logits.
      where: bool, broadcasts against the logits: the tokens that q may have.

    Returns:
      (log_probs [n], entropy [n]) in nats; -inf for a token outside `where`.
    """
    log_q = numerics.log_softmax(logits, temperature=temperature, where=where)
    chosen = numerics.take_outcomes(log_q, tokens[:, None], missing=-jnp.inf)[:, 0]
    surprise = numerics.relative_entropy_term(log_q, jnp.zeros_like(log_q))
    return chosen, -jnp.sum(surprise, axis=-1)


def sequence_log_probs(log_probs: ArrayLike, where: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Sums of the log-probabilities of sequences, and how many tokens they have.

    What the losses of `preference_family` take. The sum of a sequence without a token is 0, with
    zero gradient.

    Args:
      log_probs: [..., R] of tokens, in nats.
      where: bool [..., R], the tokens that count.

    Returns:
      (sums [...], counts [...]), both float32 (float64 for float64 input).
    """
    log_probs = jnp.asarray(log_probs)
    log_probs = log_probs.astype(numerics.accumulation_dtype(log_probs))
    where = jnp.broadcast_to(jnp.asarray(where, bool), log_probs.shape)
    return (
        jnp.sum(jnp.where(where, log_probs, 0.0), axis=-1),
        jnp.sum(where, axis=-1, dtype=log_probs.dtype),
    )


def _split_where(where: ArrayLike | None, tokens: int, size: int) -> tuple[Any, Any]:
    """(what holds for all tokens [1, V], what each token has [N, 1 or V]); at most one of them."""
    if where is None:
        return None, None
    where = jnp.atleast_2d(jnp.asarray(where))
    if where.shape[0] not in (1, tokens) or where.shape[1:] not in ((1,), (size,)):
        raise ValueError(
            f'where must broadcast against the logits [{tokens}, {size}], got shape '
            f'{where.shape}; a mask over tokens is where=mask[:, None].'
        )
    return (None, where) if where.shape[0] == tokens else (where, None)


def _check(hidden, head, valid, chunk, shards):
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[0]:
        raise ValueError(
            'hidden states [N, D] and a head [D, V] are needed, got shapes '
            f'{hidden.shape} and {head.shape}; flatten leading axes first.'
        )
    tokens = hidden.shape[0]
    if chunk < 1 or tokens < 1:
        raise ValueError(f'tokens and chunk >= 1 are needed, got {tokens} and {chunk}.')
    if valid is not None and (valid.shape != (tokens,) or valid.dtype != bool):
        raise ValueError(f'valid must be bool [{tokens}], got {valid.dtype} {valid.shape}.')
    if shards < 1 or tokens % shards:
        raise ValueError(f'{tokens} tokens do not divide into shards={shards} equal parts.')


def _check_leading(tokens, tree, name):
    for leaf in jax.tree.leaves(tree):
        if jnp.shape(leaf)[:1] != (tokens,):
            raise ValueError(
                f'{name} needs the leading axis of the {tokens} tokens on each array, got shape '
                f'{jnp.shape(leaf)}.'
            )
