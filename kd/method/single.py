"""Minimising one loss, and the gradient that every step begins with."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from kd import metrics as metrics_lib
from kd.method.base import Batch, Change, Loss, Method, Objective
from kd.method.guard import stepwise
from kd.metrics import Metrics
from kd.state import PyTree, State


def minimize(
    loss: Loss,
    tx: optax.GradientTransformation,
    init: Callable[[jax.Array], PyTree],
    *,
    micro_batches: int = 1,
) -> Method:
    """Minimises `loss` with the optax transformation `tx`.

    Args:
      loss: see `kd.method`.
      tx: the optimiser.
      init: `init(key) -> {'params': ..., **mutables}`, the variables to start from.
      micro_batches: gradients are accumulated over this many equal parts of the batch before the
        one update. Sums and counts are accumulated apart, so the gradient is that of the whole
        batch also when masks leave the parts with different counts.
    """

    def init_state(key: jax.Array, frozen: Mapping[str, PyTree] | None = None) -> State:
        network_key, run_key = jax.random.split(key)
        mutables = dict(init(network_key))
        params = mutables.pop('params')
        return State.create(
            run_key, params, tx.init(params), mutables=mutables, frozen=dict(frozen or {})
        )

    def propose(state: State, batch: Batch) -> tuple[Change, Metrics]:
        key = state.step_key()
        grads, objective = gradient(loss, state.params, state, batch, key, micro_batches)

        def change(state: State) -> State:
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            return state.replace(
                params=optax.apply_updates(state.params, updates),
                opt_state=opt_state,
                mutables=objective.mutables or state.mutables,
            )

        return change, reported(objective, grads)

    return stepwise(init_state, propose)


def gradient(
    loss: Loss,
    params: PyTree,
    state: State,
    batch: Batch,
    key: jax.Array,
    micro_batches: int = 1,
) -> tuple[PyTree, Objective]:
    """Gradient of the mean loss over the batch, and what the loss returned, summed up."""

    def summed(params, mutables, batch, key):
        objective = loss(params, state.replace(mutables=mutables), batch, key)
        return objective.loss.total, objective

    differentiate = jax.grad(summed, has_aux=True)
    if micro_batches == 1:
        grads, objective = differentiate(params, state.mutables, batch, key)
    else:
        grads, objective = _accumulate(differentiate, params, state, batch, key, micro_batches)
    count = jnp.maximum(objective.loss.count, 1e-12)
    return jax.tree.map(lambda g: (g / count).astype(g.dtype), grads), objective


def _accumulate(differentiate, params, state, batch, key, micro_batches):
    parts = jax.tree.map(lambda x: _split(x, micro_batches), batch)

    def body(carry, part):
        grads, sums, mutables = carry
        index, examples = part
        part_key = jax.random.fold_in(key, index)
        new_grads, objective = differentiate(params, mutables, examples, part_key)
        new_sums = (objective.loss, objective.metrics)
        mutables = objective.mutables or mutables
        add = lambda a, b: jax.tree.map(jnp.add, a, b)  # noqa: E731
        return (add(grads, new_grads), add(sums, new_sums), mutables), None

    first = jax.tree.map(lambda x: x[0], parts)
    grads, objective = jax.eval_shape(differentiate, params, state.mutables, first, key)
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), (grads, (objective.loss, objective.metrics))
    )
    carry, _ = jax.lax.scan(body, (*zeros, state.mutables), (jnp.arange(micro_batches), parts))
    grads, (total, metrics), mutables = carry
    return grads, Objective(total, metrics, mutables)


def _split(x: jax.Array, parts: int) -> jax.Array:
    if x.shape[0] % parts:
        raise ValueError(
            f'A batch of {x.shape[0]} does not divide into {parts} micro-batches; '
            'change batch_size or micro_batches.'
        )
    # Strided, so that each part takes an equal share of every device's examples.
    return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)


def reported(objective: Objective, grads: PyTree) -> Metrics:
    """What every update logs."""
    norm = metrics_lib.scalar(optax.tree.norm(grads))
    return {'loss': objective.loss, 'grad_norm': norm, **objective.metrics}
