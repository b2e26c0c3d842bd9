"""TeacherSignal: what a teacher says about a position, whole or in part.

| form | holds | a divergence computed from it is |
|---|---|---|
| `Dense` | the logits of every outcome | exact |
| `HiddenHead` | the factors whose product is the logits | exact; see `sequence.fused_divergence` |
| `TopK` | k log-probabilities and the mass of the rest | a lower bound, exact for k >= V - 1* |
| `Sampled` | weighted draws of outcomes | unbiased |

(*) Unless its `rest` says otherwise.

Every form is a pytree with any number of leading batch axes `[...]`, so it passes through jit,
vmap, scan and a cache on disk. A plain array of logits counts as `Dense`. Divergences accept the
forms that define them and refuse the others with a TypeError.
"""

from __future__ import annotations

import dataclasses
import typing
from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import ArrayLike

from kd.losses import numerics

# How a divergence reads what `TopK` does not list.
Rest = Literal['tail', 'partial', 'renormalised']


@struct.dataclass
class Dense:
    """The teacher's logits of every outcome.

    Attributes:
      logits: [..., V], any float dtype; -inf marks an impossible outcome.
    """

    logits: jax.Array


@struct.dataclass
class HiddenHead:
    """The teacher's logits as `hidden @ head`, so that no one has to hold them whole.

    Attributes:
      hidden: [..., D] the last hidden state, float32 or bfloat16.
      head: [D, V] the output projection.
      tied: whether the head is an embedding [V, D], turned, which sweeps over slabs of tokens then
        do not copy.
    """

    hidden: jax.Array
    head: jax.Array
    tied: bool = struct.field(pytree_node=False, default=False)

    def logits(self) -> jax.Array:
        """[..., V], accumulated in float32 (float64 for float64 factors)."""
        dtype = numerics.accumulation_dtype(self.hidden, self.head)
        return jnp.matmul(self.hidden, self.head, preferred_element_type=dtype)


@struct.dataclass
class TopK:
    """k outcomes with their probabilities, and the mass of all the others in one bucket.

    By default a divergence computed from it compares k + 1 outcomes, the last being 'any other': by
    the data processing inequality it is at most the full divergence, and the student's mass outside
    the k outcomes stays controlled. `rest` names this and two other readings, with P and Q for the
    teacher's and the student's mass on the k outcomes S:

    | rest | compares | forward KL, gradient | |
    |---|---|---|---|
    | 'tail' | S and 'any other', k + 1 | q - p on S, q_v - (1 - P) q_v / (1 - Q) off it | a bound |
    | 'partial' | the k terms of the full sum | P q - p on S, P q_v off it | may be negative |
    | 'renormalised' | p / P and q / Q | Q^-1 q - P^-1 p on S, 0 off it | says nothing off S |

    A partial sum is never clamped: below 0 its gradient is what it is, and for P < 1 it drives the
    mass off S to 0. The renormalised form leaves the student's mass off S free, and with it its
    calibration. Neither is a bound of the full divergence. `renormalize()` is a fourth form, and no
    reading but another teacher: p / P against the student's whole q.

    Indices of one position are distinct. A slot with log-probability -inf is empty (its index is
    ignored).

    Attributes:
      log_probs: [..., k] in nats, at `temperature`; not renormalised: exp sums to 1 - tail.
      indices: [..., k] int, the outcomes.
      tail: [...] probability of all other outcomes together, in [0, 1].
      temperature: static; the temperature of the recorded probabilities. The tail cannot be
        re-tempered, so divergences refuse any other.
      rest: static; 'tail', 'partial' or 'renormalised'. `top.replace(rest='partial')` changes it.
    """

    log_probs: jax.Array
    indices: jax.Array
    tail: jax.Array
    temperature: float = struct.field(pytree_node=False, default=1.0)
    rest: Rest = struct.field(pytree_node=False, default='tail')

    def __post_init__(self) -> None:
        if self.rest not in typing.get_args(Rest):
            raise ValueError(f'rest must be one of {typing.get_args(Rest)}, got {self.rest!r}.')

    def renormalize(self) -> TopK:
        """The k probabilities rescaled to sum to 1, with an empty tail.

        forward_kl then is KL(p^ || q) with p^ = p / (1 - tail) on the k outcomes and the student's
        softmax over all V: its minimiser has no mass off the k outcomes, where that of `TopK`
        itself keeps the tail.
        """
        log_kept = jax.nn.logsumexp(self.log_probs, axis=-1, keepdims=True)
        return dataclasses.replace(
            self, log_probs=self.log_probs - log_kept, tail=jnp.zeros_like(self.tail)
        )


@struct.dataclass
class Sampled:
    """Draws of outcomes whose weighted sums are unbiased for the teacher's expectations.

    E[sum_s weights_s f(tokens_s)] = sum_v p_v f(v): for draws v_s ~ r, weights_s = p(v_s) / (S
    r(v_s)). A label known to be right is one draw of weight 1.

    Attributes:
      tokens: [..., S] int, the drawn outcomes; repeats allowed.
      weights: [..., S] float; 0 marks an empty slot.
      entropy: [...] the teacher's entropy in nats, or None for 0 (a label's). Without it forward_kl
        is the cross-entropy KL(p || q) + H(p): the same gradient, another value.
      temperature: static; the temperature at which the teacher was sampled.
    """

    tokens: jax.Array
    weights: jax.Array
    entropy: jax.Array | None = None
    temperature: float = struct.field(pytree_node=False, default=1.0)


TeacherSignal = Dense | HiddenHead | TopK | Sampled


def as_signal(teacher: TeacherSignal | ArrayLike) -> TeacherSignal:
    """`teacher` itself if it is a signal, or its array of logits as `Dense`."""
    if isinstance(teacher, TeacherSignal):
        return teacher
    return Dense(jnp.asarray(teacher))


def positions(teacher: TeacherSignal) -> tuple[int, ...]:
    """The shape [...] of the positions that a signal speaks of."""
    # The first array of every form has one more axis, of outcomes, features or draws.
    return jnp.shape(jax.tree.leaves(teacher)[0])[:-1]


def top_k(logits: ArrayLike, k: int, *, temperature: float = 1.0) -> TopK:
    """The k most probable outcomes of softmax(logits / temperature) and the mass of the rest.

    Args:
      logits: [..., V]; -inf marks an impossible outcome.
      k: at most V.
      temperature: positive Python number, kept with the signal.

    Returns:
      TopK with log_probs and indices [..., k] in falling order, tail [...]: summed over the other
      outcomes, not taken as a difference from 1, so that a small tail keeps its digits.

    Raises:
      ValueError: k is not in 1..V.
    """
    log_p = numerics.log_softmax(logits, temperature=temperature)
    return _listed(log_p, _indices_of_top(log_p, k), temperature)


def student_top_k(
    student_logits: ArrayLike,
    teacher: Dense | HiddenHead | ArrayLike,
    k: int,
    *,
    temperature: float = 1.0,
) -> TopK:
    """The teacher's probabilities of the k outcomes that the student holds most probable.

    The teacher's own, not renormalised, with the mass of all others as the tail: divergences from
    it weigh what the student would say. As in SDPO, where `top_k` of the teacher is SD-Zero's.

    Args:
      student_logits: [..., V]; decides on the outcomes alone, and gets no gradient here.
      teacher: of the same outcomes.
      k: at most V.
      temperature: positive Python number, kept with the signal.

    Returns:
      TopK with log_probs and indices [..., k], the student's favourite first; tail [...].

    Raises:
      ValueError: k is not in 1..V, other numbers of outcomes.
      TypeError: a teacher that does not tell all probabilities.
    """
    student_logits = jax.lax.stop_gradient(jnp.asarray(student_logits))
    log_p = numerics.log_softmax(all_logits('student_top_k', teacher), temperature=temperature)
    if log_p.shape[-1] != student_logits.shape[-1]:
        raise ValueError(
            'student_top_k needs a student and a teacher with the same outcomes, got shapes '
            f'{student_logits.shape} and {log_p.shape}; see signal.cut.'
        )
    return _listed(log_p, _indices_of_top(student_logits, k), temperature)


def cut(
    student_logits: ArrayLike, teacher: Dense | HiddenHead | ArrayLike
) -> tuple[jax.Array, Dense]:
    """Both without the outcomes that only one of them has: the first min(V_s, V_t) of each.

    For vocabularies that one tokenizer made and padding left unlike, 151,936 and 152,064 say. Cut
    before the softmax, so that no mass is on what is cut:

        forward_kl(*signal.cut(student_logits, teacher_logits))

    and in the sweep of `sequence.fused_divergence`, a slab at a time,

        def divergence(logits, teacher):
            return forward_kl(*signal.cut(logits, teacher))

    Args:
      student_logits: [..., V_s].
      teacher: logits [..., V_t], whole or as hidden states and head.

    Returns:
      (student logits, Dense), both [..., min(V_s, V_t)].

    Raises:
      TypeError: a signal recorded after its softmax; cut the logits that it is made from.
    """
    student_logits, logits = jnp.asarray(student_logits), all_logits('cut', teacher)
    size = min(student_logits.shape[-1], logits.shape[-1])
    return student_logits[..., :size], Dense(logits[..., :size])


def all_logits(name: str, teacher: TeacherSignal | ArrayLike) -> jax.Array:
    """[..., V] of a signal that tells them; a TypeError with `name` for another."""
    teacher = as_signal(teacher)
    if isinstance(teacher, HiddenHead):
        return teacher.logits()
    if not isinstance(teacher, Dense):
        raise TypeError(
            f'{name} is not defined by a teacher signal of the form {type(teacher).__name__}: it '
            'needs Dense or HiddenHead.'
        )
    return teacher.logits


def _indices_of_top(values: jax.Array, k: int) -> jax.Array:
    size = values.shape[-1]
    if not 1 <= k <= size:
        raise ValueError(f'top_k needs k between 1 and the number of outcomes {size}, got k={k}.')
    return jax.lax.top_k(values, k)[1]


def _listed(log_p: jax.Array, indices: jax.Array, temperature: float) -> TopK:
    tail = jnp.where(outcome_mask(indices, log_p.shape[-1]), 0.0, jnp.exp(log_p))
    log_probs = jnp.take_along_axis(log_p, indices, axis=-1)
    return TopK(log_probs, indices, jnp.sum(tail, axis=-1), temperature=float(temperature))


def sample(
    key: jax.Array,
    logits: ArrayLike,
    num_samples: int,
    *,
    temperature: float = 1.0,
    proposal_temperature: float | None = None,
) -> Sampled:
    """Importance-sampled teacher: draws from a tempered proposal with the weights that undo it.

    With p = softmax(logits / temperature) and the proposal r = softmax(logits /
    proposal_temperature), tokens_s ~ r independently and weights_s = p(tokens_s) / (S r(tokens_s)).
    A proposal flatter than the teacher sees its tail more often; the default r = p has weights 1 /
    S. Weights are not normalised by their sum: that would be biased.

    Args:
      key: a typed PRNG key.
      logits: [..., V]; -inf marks an impossible outcome.
      num_samples: S.
      temperature: positive Python number, kept with the signal.
      proposal_temperature: positive; None for `temperature`.

    Returns:
      Sampled with tokens and weights [..., S] and the teacher's exact entropy [...].

    Source: importance sampling of teacher logits, Anshumann et al. 2025, arXiv 2503.16870.
    """
    log_p = numerics.log_softmax(logits, temperature=temperature)
    log_r = log_p
    if proposal_temperature is not None:
        log_r = numerics.log_softmax(logits, temperature=proposal_temperature)
    shape = log_p.shape[:-1] + (num_samples,)
    tokens = jax.random.categorical(key, log_r[..., None, :], shape=shape)
    log_ratio = jnp.take_along_axis(log_p, tokens, -1) - jnp.take_along_axis(log_r, tokens, -1)
    entropy = -jnp.sum(numerics.relative_entropy_term(log_p, jnp.zeros_like(log_p)), axis=-1)
    weights = jnp.exp(log_ratio) / num_samples
    return Sampled(tokens, weights, entropy, temperature=float(temperature))


def outcome_mask(indices: jax.Array, size: int) -> jax.Array:
    """bool [..., size], True where `indices` [..., k] lists the outcome; others list none."""
    empty = jnp.zeros(indices.shape[:-1] + (size,), bool)
    indices = jnp.where(numerics.is_outcome(indices, size), indices, size)
    return jnp.put_along_axis(empty, indices, True, axis=-1, inplace=False, mode='drop')
