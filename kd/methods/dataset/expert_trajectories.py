"""Training of experts whose parameters are kept after every epoch, k of them at once.

A stage trains `experts` networks in rounds of `together`, each for `epochs` epochs from its own
initialisation. The experts of a round see the same batches in the same order and differ in their
initialisation and augmentation. The writer `snapshots` puts their parameters on disk.

Sources: Cazenavette et al. 2022, arXiv 2203.11932 (plain descent); Du et al. 2022, arXiv 2211.11004
(flat experts); Shen et al. 2023, arXiv 2310.10541 (smooth experts).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.flatten_util import ravel_pytree

from kd.context import Context, Evaluator, Writer
from kd.data.distilled import trajectories as data_lib
from kd.data.transforms.siamese import siamese
from kd.errors import UserError
from kd.io import trajectories
from kd.losses import classification, segments, sharpness
from kd.method import Batch, Method
from kd.metrics import Metrics, mean
from kd.network import Network
from kd.ranges import Count, NonNegative, Size, Whole
from kd.state import PyTree, State


def expert_trajectories(
    context: Context,
    *,
    experts: Count = 100,
    together: Count = 10,
    epochs: Count = 50,
    augmentation: str = '',
    weight_decay: NonNegative = 0.0,
    rho: NonNegative = 0.0,
    alpha: NonNegative = 0.0,
    adaptive: bool = True,
    ramp_epochs: Size = 0,
    penalty: NonNegative = 0.0,
    penalty_axis: Whole | tuple[Whole, ...] = -1,
    drop_epoch: Size = 0,
    drop_factor: NonNegative = 1.0,
) -> Method:
    """Trains rounds of experts; each is the same whatever the others of its round are.

        loss(theta) = r_e CE(f(A(x); theta), y) + penalty mean(|| d/dx sum_k f_k(x) || - 1)^2

    with r_e = `segments.loss_ramp(e, epochs=ramp_epochs)`; its gradient is
    `sharpness.gsam_gradient(rho, alpha, adaptive)` where one of the two is not 0.

    Args:
      context: the stage; needs a network without running statistics, an optimiser of constant rate
        and labelled images. Its steps must be `experts / together * epochs * ceil(N / batch_size)`.
      experts: how many in all.
      together: k, how many at once; divides `experts`.
      epochs: T.
      augmentation: families of `kd.data.transforms.siamese.siamese`, joined by '_'; '' for none.
      weight_decay: added to the gradient, of every parameter.
      rho, alpha, adaptive: of sharpness-aware minimisation.
      ramp_epochs: over which the cross-entropy is faded in; 0 for none.
      penalty, penalty_axis: weight and norm of the penalty on input gradients.
      drop_epoch, drop_factor: from the start of this epoch on (0: never) updates are scaled by the
        factor; the optimiser starts afresh there.

    Raises:
      UserError: a number of steps or of experts that does not come out even, or a network that has
        running statistics.
    """
    per_epoch = epoch_steps(context)
    _check(context, experts, together, epochs, per_epoch)
    names = tuple(augmentation.split('_')) if augmentation else ()
    loss = _loss(context.network, names, ramp_epochs, penalty, penalty_axis)
    gradient = jax.grad(loss, has_aux=True)
    if rho or alpha:
        gradient = _flat_gradient(loss, rho, alpha, adaptive)
    update = _update(context.tx, gradient, weight_decay, drop_epoch, drop_factor)
    return _rounds(context, update, together, epochs, per_epoch, len(names), drop_epoch)


def _loss(network: Network, names, ramp_epochs, penalty, penalty_axis) -> Callable[..., Any]:
    """`loss(params, batch, key, family, epoch) -> (loss, (cross-entropy, accuracy))`."""

    def loss(params, batch, key, family, epoch):
        images = batch['input']
        augmented = siamese(key, images, names, family=family) if names else images
        logits = network.apply({'params': params}, augmented, train=True).logits
        cross_entropy = classification.cross_entropy(logits, batch['label']).mean()
        total = segments.loss_ramp(epoch, epochs=ramp_epochs) * cross_entropy
        if penalty:
            apply = lambda x: network.apply({'params': params}, x, train=True).logits  # noqa: E731
            total += penalty * sharpness.gradient_penalty(apply, images, axis=penalty_axis).mean()
        return total, (cross_entropy, (logits.argmax(-1) == batch['label']).mean())

    return loss


def _flat_gradient(loss: Callable[..., Any], rho, alpha, adaptive) -> Callable[..., Any]:
    """As `jax.grad(loss, has_aux=True)`, with the gradient of sharpness-aware minimisation."""

    def gradient(params, *rest):
        grads = sharpness.gsam_gradient(
            lambda p: loss(p, *rest)[0], params, rho=rho, alpha=alpha, adaptive=adaptive
        )[1]
        return grads, loss(params, *rest)[1]

    return gradient


def _update(
    tx: optax.GradientTransformation, gradient, weight_decay, drop_epoch, drop_factor
) -> Callable[..., Any]:
    """`update(params, opt_state, batch, key, family, epoch)`, a step of one expert."""

    def update(params, opt_state, batch, key, family, epoch):
        grads, aux = gradient(params, batch, key, family, epoch)
        grads = jax.tree.map(lambda g, p: g + weight_decay * p, grads, params)
        updates, opt_state = tx.update(grads, opt_state, params)
        if drop_epoch:
            factor = jnp.where(epoch >= drop_epoch, drop_factor, 1.0)
            updates = jax.tree.map(lambda u: (factor * u).astype(u.dtype), updates)
        return optax.apply_updates(params, updates), opt_state, aux

    return update


def _rounds(context: Context, update, together, epochs, per_epoch, families, drop_epoch) -> Method:
    """Round after round of `together` experts, each begun anew and trained for `epochs`."""

    def begin(key, number):
        params = initial_experts(context.network, key, number, together)
        return params, jax.vmap(context.tx.init)(params)

    def init(key, frozen=None):
        del frozen
        params, opt_state = begin(key, jnp.int32(0))
        start = jax.tree.map(jnp.copy, params)
        return State.create(key, {'params': params}, opt_state, extra={'start': start})

    def of_step(state: State, number, within):
        """Parameters, optimisers and starts before a step: new ones in the first of a round."""
        kept = state.variables()['params'], state.opt_state, state.extra['start']

        def restarted():
            params, opt_state = begin(state.key, number)
            return params, opt_state, params

        params, opt_state, start = jax.lax.cond(within == 0, restarted, lambda: kept)
        if drop_epoch:
            dropping = within == drop_epoch * per_epoch
            afresh = jax.vmap(context.tx.init)(params)
            opt_state = jax.tree.map(
                lambda new, old: jnp.where(dropping, new, old), afresh, opt_state
            )
        return params, opt_state, start

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        number, within = jnp.divmod(state.step, epochs * per_epoch)
        params, opt_state, start = of_step(state, number, within)
        key = state.step_key()
        keys = jax.vmap(lambda j: jax.random.fold_in(key, j))(jnp.arange(together))
        family = jax.random.randint(key, (), 0, families) if families else jnp.int32(0)
        params, opt_state, (losses, correct) = jax.vmap(
            update, in_axes=(0, 0, None, 0, None, None)
        )(params, opt_state, batch, keys, family, within // per_epoch)
        metrics = {'loss': mean(losses), 'accuracy': mean(correct)}
        extra = {**state.extra, 'start': start}
        state = state.with_params(params).replace(opt_state=opt_state, extra=extra)
        return state.replace(step=state.step + 1), metrics

    return Method(init, step)


def initial_experts(network: Network, key: jax.Array, number: jax.Array, together: int) -> PyTree:
    """Parameters of the experts of round `number` before training, stacked along a leading axis.

    Expert e is initialised from `fold_in(key, e)`, whatever the rounds.
    """
    indices = number * together + jnp.arange(together)
    keys = jax.vmap(lambda e: jax.random.fold_in(key, e))(indices)
    return jax.vmap(lambda k: network.init(k)['params'])(keys)


def epoch_steps(context: Context) -> int:
    """Steps in which every example is seen at least once: ceil(N / batch_size)."""
    return math.ceil(len(context.source('train')) / context.batch_size)


@jax.jit
def flatten(params: PyTree) -> jax.Array:
    """Stacked parameters as float32 [k, P], in the order of `jax.flatten_util.ravel_pytree`."""
    return jax.vmap(lambda p: ravel_pytree(p)[0].astype(jnp.float32))(params)


def snapshots(context: Context) -> Writer:
    """Writes the buffer of the stage's experts, to be called at the end of every epoch.

    In the stage: `writers={'snapshots': dict(name=..., every=steps_of_an_epoch)}`. After the last
    epoch of the last round the buffer is complete; `kd.data.distilled.trajectories.segments` reads
    it.
    """
    per_epoch = epoch_steps(context)
    stage = context.config
    block = dict(stage.method)
    del block['name']
    bound = inspect.signature(expert_trajectories).bind(context, **block)
    bound.apply_defaults()
    experts, together, epochs = (
        bound.arguments[name] for name in ('experts', 'together', 'epochs')
    )
    for label, writer in stage.writers.items():
        if writer['name'].endswith('.snapshots') and writer.get('every') != per_epoch:
            raise UserError(
                f'{context.stage}.writers.{label}.every is {writer.get("every")}, but an epoch of '
                f'{len(context.source("train"))} examples has {per_epoch} steps.'
            )

    def write(state: State, step: int, directory: Path) -> None:
        if step == 0:
            return
        number, epoch = divmod(step // per_epoch - 1, epochs)
        if epoch == 0:
            _save(directory, number, 0, state.extra['start'])
        params = state.variables()['params']
        _save(directory, number, epoch + 1, params)
        if step == context.steps and jax.process_index() == 0:
            size = sum(x.size for x in jax.tree.leaves(params)) // together
            made = trajectories.fingerprint(
                network=stage.network,
                data=data_lib.training_data(context.recipe),
                method=stage.method,
                optimizer=stage.optimizer,
                batch_size=stage.batch_size,
                seed=context.recipe.seed,
            )
            trajectories.write_manifest(
                directory, trajectories.Manifest(experts, together, epochs, size, made)
            )

    return write


def expert_accuracy(context: Context) -> Evaluator:
    """Mean accuracy over the experts of the running round, and that of the worst of them."""

    def update(state, batch):
        def correct(params):
            logits = context.network.apply({'params': params}, batch['input']).logits
            return jnp.where(batch['mask'], logits.argmax(-1) == batch['label'], False).sum()

        return jax.vmap(correct)(state.variables()['params']), batch['mask'].sum()

    def finish(sums):
        accuracies = np.asarray(sums[0]) / sums[1]
        return {'accuracy': accuracies.mean(), 'worst': accuracies.min()}

    return Evaluator(update, finish)


def _save(directory: Path, number: int, epoch: int, params: PyTree) -> None:
    values = flatten(params)
    if jax.process_count() > 1:
        values = multihost_utils.process_allgather(values, tiled=True)
    if jax.process_index() == 0:
        trajectories.write_snapshot(directory, number, epoch, np.asarray(values))


def _check(context: Context, experts: int, together: int, epochs: int, per_epoch: int) -> None:
    if experts < 1 or together < 1 or epochs < 1 or experts % together:
        raise UserError(
            f'{experts} experts of {epochs} epochs, {together} together: all must be positive and '
            'the experts a multiple of those together.'
        )
    steps = experts // together * epochs * per_epoch
    if context.steps != steps:
        raise UserError(
            f'{context.stage}.steps is {context.steps}; {experts} experts, {together} together, '
            f'of {epochs} epochs with {per_epoch} steps take {steps}.'
        )
    variables = jax.eval_shape(context.classifier.init, jax.random.key(0))
    if set(variables) != {'params'}:
        others = sorted(set(variables) - {'params'})
        raise UserError(
            f'The network keeps {others} beside its parameters, which trajectories do not hold; '
            "choose a norm without running statistics, such as norm='instance'."
        )
