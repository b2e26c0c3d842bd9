"""Does a model know what has one answer, and does it keep a choice where there are several?"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd.context import Context, Evaluator
from kd.evaluators.classification import predictor
from kd.losses import numerics
from kd.losses.token import entropy
from kd.metrics import divide, mean
from kd.ranges import Count


def valid_mass(logits: ArrayLike, valid: ArrayLike) -> jax.Array:
    """sum_v q_v over the valid answers v; logits and bool [..., V] -> float32 [...]."""
    q = jnp.exp(numerics.log_softmax(logits))
    return jnp.where(valid, q, 0.0).sum(-1)


def expected_pass(logits: ArrayLike, valid: ArrayLike, tries: int) -> jax.Array:
    """mean over valid v of 1 - (1 - q_v)^k: pass@k where one valid answer, unknown, is rewarded.

    The exact chance that k answers drawn from q hit it, each valid answer being as likely to be the
    one; logits and bool [..., V] -> float32 [...]. A position without a valid answer has 0.
    """
    q = jnp.exp(numerics.log_softmax(logits))
    hit = -jnp.expm1(tries * jnp.log1p(-jnp.minimum(q, 1.0)))
    count = jnp.maximum(jnp.asarray(valid).sum(-1), 1)
    return jnp.where(valid, hit, 0.0).sum(-1) / count


def choice_metrics(
    logits: ArrayLike, valid: ArrayLike, *, tries: int = 16
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """{name: (value [...], where it counts bool [...])}.

    fact: mass on the valid answer, where there is one. Where there are several: entropy in nats,
    valid, the mass on all of them, and pass, `expected_pass` of so many tries.
    """
    count = jnp.asarray(valid).sum(-1)
    one, several = count == 1, count > 1
    mass = valid_mass(logits, valid)
    return {
        'fact': (mass, one),
        'entropy': (entropy(logits), several),
        'valid': (mass, several),
        'pass': (expected_pass(logits, valid, tries), several),
    }


def choices(context: Context, *, tries: Count = 16, weights: str = 'final') -> Evaluator:
    """`choice_metrics` over a split whose examples say which answers are `valid`, bool [V].

    Args:
      context: the stage; a network with logits [B, V].
      tries: k.
      weights: 'final' for the parameters, or the name of an average.
    """
    predict = predictor(context, weights)

    def update(state, batch):
        found = choice_metrics(predict(state, batch), batch['valid'], tries=tries)
        return {name: mean(value, where & batch['mask']) for name, (value, where) in found.items()}

    return Evaluator(update, divide)
