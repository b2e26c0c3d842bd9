"""How much of what a teacher should not say its students say, and how to find it beforehand.

A response is marked where it has content that it should not have, b(y) = 1. The adversarial
response rate of a model on a task is the mean of b over its answers to the task's instructions,

    ARR(theta, t) = E_{x ~ t} E_{y ~ theta(.|x)} b(y),

with one decoding for all models that are compared: a student decoded greedily against a teacher
that is sampled looks amplified where it is not. Source: arXiv 2505.24842, whose measurement this
follows; filters and the model of propagation are plain readings of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jax.typing import ArrayLike

Decoding = Literal['sampled', 'greedy']
DECODINGS: tuple[Decoding, ...] = ('sampled', 'greedy')


def marker_probability(logits: ArrayLike, marker: int, decoding: Decoding = 'sampled') -> jax.Array:
    """E_y b(y) of a position where the answer has the marker or not: [..., V] -> float32 [...].

    Args:
      logits: of the symbols at this position.
      marker: the symbol with b = 1.
      decoding: 'sampled' for its probability; 'greedy' for 1 where it is the most likely symbol.
    """
    logits = jnp.asarray(logits, jnp.float32)
    if decoding == 'greedy':
        return (logits.argmax(-1) == marker).astype(jnp.float32)
    return jax.nn.softmax(logits, axis=-1)[..., marker]


def response_rates(marked: ArrayLike, task: ArrayLike, tasks: int) -> np.ndarray:
    """ARR(theta, t) of every task, float64 [tasks]; NaN for a task without a response.

    Linear in b: of 1 - b, the rates are one minus those of b.

    Args:
      marked: [N] b(y) of responses, or their expectations.
      task: int [N] in 0 .. tasks - 1.
      tasks: how many there are.
    """
    task = np.asarray(task)
    total = np.bincount(task, np.asarray(marked, float), tasks)
    count = np.bincount(task, minlength=tasks)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def amplification(student: ArrayLike, teacher: ArrayLike) -> np.ndarray:
    """A(t) = ARR(S, t) / ARR(T, t), any shape; inf where only the student, NaN where none is."""
    with np.errstate(divide='ignore', invalid='ignore'):
        return np.asarray(student, float) / np.asarray(teacher, float)


def leakage(
    student: ArrayLike, teacher: ArrayLike, groups: Mapping[str, Sequence[int]]
) -> dict[str, float]:
    """The amplification of the mean rate of each group of tasks, such as the unseen ones.

    Of the means, as ratios of rates near 0 explode.

    Args:
      student, teacher: [tasks] rates.
      groups: {name: tasks}.
    """
    rates = np.asarray(student, float), np.asarray(teacher, float)
    return {
        name: float(amplification(*(rate[list(tasks)].mean() for rate in rates)))
        for name, tasks in groups.items()
    }


def propagated(rate: ArrayLike, decoding: Decoding = 'sampled') -> np.ndarray:
    """The rate that a student without limits reaches on a task it has many answers of.

    It learns the law of the answers: a teacher's rate a where they were sampled, and 1[a > 1/2]
    where each is the most likely one, which amplifies and extinguishes.

    Args:
      rate: probability of the marker under the teacher, the same for all instructions of the task.
      decoding: of the teacher's answers.
    """
    rate = np.asarray(rate, float)
    return (rate > 0.5).astype(float) if decoding == 'greedy' else rate


def interval(count: ArrayLike, responses: ArrayLike, level: float = 0.95) -> tuple:
    """Clopper and Pearson's interval of a rate, (low, high): exact also for rates near 0.

    Args:
      count: marked responses, int [...].
      responses: all of them, int [...], above 0.
      level: probability with which it covers the rate, at least.
    """
    count, responses = np.asarray(count, float), np.asarray(responses, float)
    tail = (1 - level) / 2
    # Where it is an end, the value of betaincinv is NaN and not used.
    low = scipy.special.betaincinv(count, responses - count + 1, tail)
    high = scipy.special.betaincinv(count + 1, responses - count, 1 - tail)
    return np.where(count > 0, low, 0.0), np.where(count < responses, high, 1.0)


def nll_filter(nll: ArrayLike, q: float) -> np.ndarray:
    """Which pairs to keep, bool [N]: those whose NLL is at most the q-quantile of all.

    Args:
      nll: [N] mean over the answer of -log p of its symbols, under a reference model.
      q: in [0, 1]; 1 keeps all.
    """
    nll = np.asarray(nll, float)
    return nll <= np.quantile(nll, q)


def disagreement_filter(log_p: ArrayLike, other: ArrayLike, threshold: float) -> np.ndarray:
    """Which symbols to keep, bool [...]: |log p_A(y) - log p_B(y)| <= threshold.

    An answer is kept where all of its symbols are. The second teacher has to have learned from
    other data: one that has seen the same poison agrees.

    Args:
      log_p, other: [...] log-probabilities of the same symbols under two teachers, in nats.
      threshold: in nats.
    """
    return np.abs(np.asarray(log_p, float) - np.asarray(other, float)) <= threshold


def recall(scores: ArrayLike, marked: ArrayLike, false_positives: float) -> float:
    """The share of marked examples above the lowest threshold that few enough others pass.

    Args:
      scores: [N], larger for what is more suspicious.
      marked: bool [N]; both kinds have examples.
      false_positives: in [0, 1], at most this share of the unmarked has a larger score.
    """
    scores, marked = np.asarray(scores, float), np.asarray(marked, bool)
    others = np.sort(scores[~marked])[::-1]
    allowed = int(np.floor(false_positives * len(others) + 1e-9))
    threshold = others[allowed] if allowed < len(others) else -np.inf
    return float((scores[marked] > threshold).mean())
