"""How often is a network right when its inputs are attacked, and is the attack to be believed?"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kd.context import Context, Evaluator
from kd.evaluators.classification import negative_log_likelihood, predictor, top_k_correct
from kd.losses import robust
from kd.metrics import divide, mean
from kd.ranges import Count, Finite, NonNegative, Positive, Size

# A difference of accuracies that says something, and what an attack without bound may leave.
APART, LEFT = 0.02, 0.05
SEED = 0


def robustness(
    context: Context,
    *,
    epsilon: NonNegative,
    step: Positive,
    steps: Count = 20,
    restarts: Size = 5,
    low: Finite = -1.0,
    high: Finite = 1.0,
    jitter: NonNegative = 0.002,
    weights: str = 'final',
    unroll: bool = False,
) -> Evaluator:
    """Accuracies under attacks of rising strength, and signs that gradients are masked.

    `clean`; `one_step` of length epsilon; `pgd` with `steps`; `worst`, where an example counts that
    no attack has changed: those before, and from `restarts` uniform starts one on the cross-entropy
    and one on the margin. And attacks that must not do better than these: `noise` of +-epsilon,
    `transfer` of an attack on the stage's teacher, if it has one, and `unbounded`, which may go
    anywhere and must leave about nothing. `masking` counts the signs (Athalye et al. 2018,
    arXiv:1802.00420): one step, noise or transfer do more than `pgd` by .02 (`worst` is then no
    bound), or `unbounded` leaves more than .05.

    Args:
      context: the stage; a classifier of one field.
      epsilon, step, low, high, jitter, unroll: of attacks; see `kd.losses.robust.pgd`.
      steps: of an attack.
      restarts: see above.
      weights: 'final' or the name of an average.
    """
    predict, teacher = predictor(context, weights), context.optional_teacher
    (field,) = context.classifier.fields

    def update(state, batch):
        x, labels, mask = batch[field], batch['label'], batch['mask']

        def logits(x):
            return predict(state, {**batch, field: x})

        def nll(x):
            return negative_log_likelihood(logits(x), labels)

        def margin(x):
            return robust.margin(logits(x), labels)

        def attacked(loss, number=0, **options):
            key = jax.random.fold_in(jax.random.key(SEED), number)
            given = dict(epsilon=epsilon, step=step, steps=steps, jitter=jitter) | options
            return robust.pgd(key, loss, x, low=low, high=high, unroll=unroll, **given)

        def right(x):
            return top_k_correct(logits(x), labels)

        found = {
            'clean': right(x),
            'one_step': right(attacked(nll, step=epsilon, steps=1, jitter=0.0)),
            'pgd': right(attacked(nll)),
        }
        coins = jax.random.bernoulli(jax.random.key(SEED), 0.5, x.shape)
        found['noise'] = right(jnp.clip(x + jnp.where(coins, epsilon, -epsilon), low, high))
        span = high - low
        found['unbounded'] = right(attacked(nll, epsilon=span, step=4.0 * span / steps))
        if teacher is not None:
            of = state.frozen['teacher']
            found['transfer'] = right(
                attacked(lambda x: negative_log_likelihood(teacher.apply(of, x).logits, labels))
            )

        def restarted(number, kept):
            for i, loss in enumerate((nll, margin)):
                again = attacked(loss, 1 + 2 * number + i, jitter=epsilon, start='uniform')
                kept = jnp.minimum(kept, right(again))
            return kept

        worst = jnp.minimum(jnp.minimum(found['clean'], found['one_step']), found['pgd'])
        if unroll:
            for number in range(restarts):
                worst = restarted(number, worst)
        else:
            worst = jax.lax.fori_loop(0, restarts, restarted, worst)
        found['worst'] = worst
        return {name: mean(value, mask) for name, value in found.items()}

    def finish(sums) -> dict[str, float]:
        found = divide(sums)
        return {**found, 'masking': masking(found)}

    return Evaluator(update, finish)


def masking(found: dict[str, float]) -> float:
    """How many signs of masked gradients accuracies show, see `robustness`."""
    weak = [found[name] for name in ('one_step', 'noise', 'transfer') if name in found]
    signs = [value < found['pgd'] - APART for value in weak]
    return float(sum(signs) + (found['unbounded'] > LEFT))
