"""Minimising one loss, and the gradient that every update begins with."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from kd import metrics as metrics_lib
from kd.errors import UserError
from kd.method.base import Batch, Change, Init, Loss, Method, Objective, initial
from kd.method.guard import stepwise
from kd.metrics import Mean, Metrics
from kd.state import NETWORK, PyTree, State, alone, path_name

# Which leaves are trained: a regular expression to be found in their paths, or a function of them;
# None for all.
Trainable = str | Callable[[str], bool] | None
# Of the form of `gradient`.
Gradient = Callable[..., tuple[PyTree, Objective]]


def minimize(
    loss: Loss,
    tx: optax.GradientTransformation,
    init: Init,
    *,
    micro_batches: int = 1,
    trainable: Trainable = None,
    along: Gradient | None = None,
) -> Method:
    """Minimises `loss` with the optax transformation `tx`.

    Args:
      loss: see `kd.method`. Its `params` are the network's, or {part: tree} of several parts.
      tx: the optimiser, of the same tree.
      init: `init(key)` or `init(key, frozen)`; returns the variables to start from,
        {'params': ..., **mutables}, or those of several parts, {'network': {'params': ...},
        'projector': {'params': ...}}.
      micro_batches: gradients are accumulated over this many equal parts of the batch before the
        one update. Sums and counts are accumulated apart, so the gradient is that of the whole
        batch also when masks leave the parts with different counts. Statistics over the batch
        would be those of its parts: compute them in `with_collect`.
      trainable: regular expression to be found in the path of a leaf ('Dense_0/kernel', or
        'projector/Dense_0/kernel' of several parts), or a function of the path. The other leaves
        stay as they are: they have neither gradient nor optimiser state nor weight decay.
      along: what gives the direction in place of `gradient`: `kd.method.private(...)`, say.
    """
    direction = along or gradient

    def init_state(key: jax.Array, frozen: Mapping[str, PyTree] | None = None) -> State:
        state = initial(init, key, frozen)
        return state.replace(opt_state=tx.init(trained(alone(state.params), trainable)))

    def propose(state: State, batch: Batch) -> tuple[Change, Metrics]:
        params, several = alone(state.params), len(state.params) > 1
        grads, objective = direction(
            *(loss, params, state, batch, state.step_key(), micro_batches),
            part='' if several else next(iter(state.params)),
            trainable=trainable,
        )

        def change(state: State) -> State:
            params, opt_state = updated(tx, grads, state.opt_state, alone(state.params), trainable)
            return state.replace(
                params=params if several else dict.fromkeys(state.params, params),
                opt_state=opt_state,
                mutables=objective.mutables,
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
    *,
    part: str = NETWORK,
    trainable: Trainable = None,
) -> tuple[PyTree, Objective]:
    """Gradient of the mean loss over the batch, and what the loss returned, summed up.

    Args:
      loss: of `params`.
      params: the tree of a part, or {part: tree}.
      state: all else.
      batch, key, micro_batches, trainable: see `minimize`.
      part: whose `params` these are; '' for several by name.

    Returns:
      The gradient, None at leaves that are not trained, and the objective, whose `mutables` are
      those of all parts.
    """

    def summed(moving, mutables, batch, key):
        whole = merged(moving, params)
        objective = loss(whole, state.replace(mutables=mutables), batch, key)
        check_objective(loss, objective)
        by_part = {part: objective.mutables} if part else objective.mutables
        # A part without collections has no entry.
        new = {name: collections for name, collections in by_part.items() if collections}
        objective = objective._replace(mutables={**mutables, **new})
        return objective.loss.total, objective

    differentiate = jax.grad(summed, has_aux=True)
    moving = trained(params, trainable)
    grads, objective = over_parts(differentiate, moving, state, batch, key, micro_batches)
    count = jnp.maximum(objective.loss.count, 1e-12)
    return jax.tree.map(lambda g: (g / count).astype(g.dtype), grads), objective


def updated(
    tx: optax.GradientTransformation,
    grads: PyTree,
    opt_state: PyTree,
    params: PyTree,
    trainable: Trainable = None,
) -> tuple[PyTree, PyTree]:
    """(parameters, optimiser state) after an update by the gradients of `gradient`."""
    moving = trained(params, trainable)
    updates, opt_state = tx.update(grads, opt_state, moving)
    return merged(optax.apply_updates(moving, updates), params), opt_state


def reported(objective: Objective, grads: PyTree) -> Metrics:
    """What every update logs."""
    norm = metrics_lib.scalar(optax.tree.norm(grads))
    return {'loss': objective.loss, 'grad_norm': norm, **objective.metrics}


def trained(params: PyTree, trainable: Trainable) -> PyTree:
    """The tree with None in place of the leaves that are not trained.

    Raises:
      UserError: a bad regular expression, or one that matches nothing.
    """
    if trainable is None:
        return params
    if isinstance(trainable, str):
        try:
            expression = re.compile(trainable)
        except re.error as error:
            raise UserError(
                f"trainable='{trainable}' is no regular expression: {error}."
            ) from error
        wanted: Callable[[str], Any] = expression.search
    else:
        wanted = trainable
    found = jax.tree_util.tree_map_with_path(
        lambda path, x: x if wanted(path_name(path)) else None, params
    )
    if not jax.tree.leaves(found):
        paths = [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
        raise UserError(f'trainable={trainable!r} matches no parameter; there are: {paths[:6]}.')
    return found


def merged(moving: PyTree, params: PyTree) -> PyTree:
    """`params` with the leaves of `moving`, where it has any."""
    return jax.tree.map(
        lambda new, old: old if new is None else new, moving, params, is_leaf=lambda x: x is None
    )


def check_objective(loss: Loss, objective: Any) -> None:
    """Raises a TypeError that names the loss, unless it has returned an `Objective` of pairs."""
    name = getattr(loss, '__qualname__', repr(loss))
    if not isinstance(objective, Objective) or not isinstance(objective.loss, Mean):
        found = type(objective.loss if isinstance(objective, Objective) else objective).__name__
        raise TypeError(
            f'the loss {name} must return kd.method.Objective(kd.metrics.mean(values)), with a '
            f'value per example; it returned {found}.'
        )
    for label, value in objective.metrics.items():
        if not isinstance(value, Mean):
            raise TypeError(
                f"the loss {name} gives the metric '{label}' as {type(value).__name__}; metrics "
                'are kd.metrics.mean(values) or kd.metrics.scalar(value).'
            )


def over_parts(
    differentiate: Callable[..., tuple[PyTree, Objective]],
    moving: PyTree,
    state: State,
    batch: Batch,
    key: jax.Array,
    micro_batches: int,
) -> tuple[PyTree, Objective]:
    """Sums of what `differentiate(moving, mutables, part, key)` returns of the parts of a batch."""
    if micro_batches == 1:
        return differentiate(moving, state.mutables, batch, key)
    parts = split(batch, micro_batches, 'micro-batches; change batch_size or micro_batches')
    # Traced once for the shapes of the sums and for the loop.
    differentiate = jax.jit(differentiate, inline=True)

    def body(carry, part):
        grads, sums, mutables = carry
        index, examples = part
        part_key = jax.random.fold_in(key, index)
        new_grads, objective = differentiate(moving, mutables, examples, part_key)
        new_sums = (objective.loss, objective.metrics)
        add = lambda a, b: jax.tree.map(jnp.add, a, b)  # noqa: E731
        carry = (add(grads, new_grads), add(sums, new_sums), objective.mutables)
        return carry, objective.outputs

    first = jax.tree.map(lambda x: x[0], parts)
    grads, objective = jax.eval_shape(differentiate, moving, state.mutables, first, key)
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), (grads, (objective.loss, objective.metrics))
    )
    carry, outputs = jax.lax.scan(
        body, (*zeros, state.mutables), (jnp.arange(micro_batches), parts)
    )
    grads, (total, metrics), mutables = carry
    return grads, Objective(total, metrics, mutables, joined(outputs))


def split(batch: PyTree, parts: int, what: str, group: int = 1) -> PyTree:
    """Cuts every array [B, ...] into [parts, B / parts, ...]; all parts get the scalars.

    Args:
      batch: arrays with the examples first.
      parts: how many.
      what: what the parts are and how to change their number, for the message.
      group: this many rows that follow one another stay together.
    """

    def cut(x: jax.Array) -> jax.Array:
        if jnp.ndim(x) == 0:
            return jnp.broadcast_to(x, (parts,))
        if x.shape[0] % (parts * group):
            groups = f'in groups of {group} ' if group > 1 else ''
            raise ValueError(
                f'A batch of {x.shape[0]} {groups}does not divide into {parts} {what}.'
            )
        # Strided, so that each part takes an equal share of every device's examples.
        apart = x.reshape(x.shape[0] // parts // group, parts, group, *x.shape[1:])
        return jnp.swapaxes(apart, 0, 1).reshape(parts, x.shape[0] // parts, *x.shape[1:])

    return jax.tree.map(cut, batch)


def joined(parts: PyTree) -> PyTree:
    """The inverse of `split`, of arrays [parts, B / parts, ...]."""
    return jax.tree.map(
        lambda x: jnp.swapaxes(x, 0, 1).reshape(x.shape[0] * x.shape[1], *x.shape[2:]), parts
    )
