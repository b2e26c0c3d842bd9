"""Methods: one training step as a pair of pure functions, and the combinators that make them.

A method is `Method(init, step)`, the way an optax transformation is `(init, update)`:

    init(key, frozen) -> State              frozen: {'teacher': variables, ...}, possibly empty
    step(state, batch) -> (State, Metrics)  pure and jit-able; metrics are (sum, count) pairs

Most methods are `minimize(loss, tx, init)` for a loss of the form

    loss(params, state, batch, key) -> Objective(mean(per_example_values))

where `params` is differentiated, `state` gives everything else (`state.frozen['teacher']`,
`state.mutables`), `batch` is a dict of arrays and `key` is new at every step. The combinators
wrap a method into a richer one; none of them knows about devices, data or logging.
"""

from kd.method.base import Batch, Change, Loss, Method, Objective
from kd.method.guard import guarded, with_nonfinite_guard
from kd.method.players import Player, alternate
from kd.method.single import gradient, minimize
from kd.method.wrappers import with_collect, with_ema, with_projection

__all__ = [
    'Batch',
    'Change',
    'Loss',
    'Method',
    'Objective',
    'Player',
    'alternate',
    'gradient',
    'guarded',
    'minimize',
    'with_collect',
    'with_ema',
    'with_nonfinite_guard',
    'with_projection',
]
