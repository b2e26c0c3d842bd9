"""Starting a stage from the weights of an earlier one."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kd.context import Context
from kd.method import Method

# Name of the reference, in a stage's `references`, whose weights a stage starts from.
START = 'start'


def from_reference(method: Method, context: Context) -> Method:
    """Starts from the variables of `references.start`, if the stage has one.

    The optimiser starts anew. Without such a reference the method is returned as it is.
    """
    if START not in context.references:
        return method

    def init(key, frozen=None):
        state = method.init(key, frozen)
        # Copies, so that no buffer is donated twice.
        mutables = jax.tree.map(jnp.copy, dict(frozen[START]))
        params = mutables.pop('params')
        return state.replace(params=params, opt_state=context.tx.init(params), mutables=mutables)

    return Method(init, method.step)
