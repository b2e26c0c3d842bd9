"""Methods: one training step as a pair of pure functions, and the combinators that make them.

A method is `Method(init, step)`, the way an optax transformation is `(init, update)`:

    init(key, frozen) -> State              frozen: {'teacher': variables, ...}, possibly empty
    step(state, batch) -> (State, Metrics)  pure and jit-able; metrics are (sum, count) pairs

Most methods are `minimize(loss, tx, network.init)` for a loss of the form

    def loss(params, state, batch, key):
        output = network.apply(state.variables(params=params), batch['input'], train=True, key=key)
        return Objective(mean(per_example(output.logits)), {}, output.mutables)

where `params` is differentiated, `state` gives everything else (`state.frozen['teacher']`), `batch`
is a dict of arrays and `key` is new at every step.

A method that trains something beside the network gives each part a name:

    def init(key):
        return {'network': network.init(key), 'projector': projector.init(key)}

    def loss(params, state, batch, key):
        variables = state.variables(params=params['network'])
        output = network.apply(variables, batch['input'], train=True, key=key, capture=('hidden',))
        projected = projector.apply({'params': params['projector']}, output.features['hidden'])
        ...
        return Objective(mean(losses), {}, {'network': output.mutables})

The part `network` is the stage's result, unless the stage says otherwise (`result`).

The combinators wrap a method into a richer one; none of them knows about devices, data or logging.
"""

from kd.method.averages import with_ema
from kd.method.base import Batch, Change, Init, Loss, Method, Objective
from kd.method.guard import guarded, stepwise, with_nonfinite_guard
from kd.method.players import Player, alternate
from kd.method.private import Privacy, private
from kd.method.repeated import repeat
from kd.method.single import gradient, minimize
from kd.method.wrappers import (
    with_base,
    with_collect,
    with_extra,
    with_memory,
    with_projection,
    with_result,
)

__all__ = [
    'Batch',
    'Change',
    'Init',
    'Loss',
    'Method',
    'Objective',
    'Player',
    'Privacy',
    'alternate',
    'gradient',
    'guarded',
    'minimize',
    'private',
    'repeat',
    'stepwise',
    'with_base',
    'with_collect',
    'with_ema',
    'with_extra',
    'with_memory',
    'with_nonfinite_guard',
    'with_projection',
    'with_result',
]
