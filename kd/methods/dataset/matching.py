"""The outer step of trajectory matching, with every variation that its methods need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kd.context import Context
from kd.data import synthetic
from kd.data.siamese import siamese
from kd.errors import UserError
from kd.losses import classification, segments, sharpness, trajectory
from kd.method import Method, Objective, minimize
from kd.methods.dataset import common
from kd.metrics import Mean, scalar

LABELS = ('hard', 'learned', 'expert')
GRADIENTS = ('exact', 'tesla')


def trajectory_matching(
    context: Context,
    *,
    images_per_class: int,
    student_steps: int,
    step_size: float,
    inner_batch: int = 0,
    log_step_size: bool = False,
    step_size_optimizer: Mapping[str, Any] | None = None,
    labels: str = 'hard',
    start: str = 'random',
    start_experts: str = '',
    augmentation: str = '',
    gradient: str = 'exact',
    momentum: float = 0.0,
    balance_epochs: int = 0,
    perturbation: float = 0.0,
    intermediate: str = 'end',
    unroll: int | bool = 1,
) -> Method:
    """Trains a synthetic set so that students on it go where experts on real data went.

        min over images, step size of  sum_j w_j || theta_{s_j} - theta*_{t+j} ||^2
                                                / || theta*_t - theta*_{t+j} ||^2

    averaged over the segments of the batch (one in the papers), with the student's steps from
    theta*_t as in `trajectory.unroll_student`. A segment whose distance or gradient is not finite
    is left out and counted in the metric `skipped`.

    Args:
      context: the stage, whose data are `kd.data.trajectories.segments`; its optimiser trains the
        images.
      images_per_class: of the synthetic set, ordered by class.
      student_steps: N.
      step_size: of the student, before it is trained.
      inner_batch: synthetic examples per student step; 0 for all.
      log_step_size: train the logarithm of the step size, which thus stays positive.
      step_size_optimizer: arguments of `kd.optim.optimizer`; None for the images' optimiser.
      labels: 'hard'; 'learned', trained with the images; or 'expert', the probabilities that the
        expert at the end of the segment gives, without gradient.
      start, start_experts: see `common.real_start`.
      augmentation: families of `kd.data.siamese.siamese`, joined by '_'; '' for none.
      gradient: 'exact', or 'tesla' without the Hessian of the inner loss.
      momentum: of the student.
      balance_epochs: the bound of start epochs for `segments.balance_factor`; 0 for no balance.
      perturbation: of the convolution kernels of the start, see `sharpness.perturb_kernels`.
      intermediate: weights of the segment's inner epochs, see `segments.target_weights`.
      unroll: of the inner loop; True where XLA for CPU is slow with convolutions in loops.

    Raises:
      UserError: options that do not go together, or classes smaller than `images_per_class`.
    """
    _check(labels, gradient, intermediate, context.batch_size)
    network = common.student(context)
    unravel = common.unraveller(network)
    images, hard = common.real_start(
        context, images_per_class, start, experts=start_experts, network=network
    )
    size = len(hard)
    classes = size // images_per_class
    names = tuple(augmentation.split('_')) if augmentation else ()

    def initial() -> dict[str, jax.Array]:
        return synthetic.parameters(
            images,
            hard,
            step_size=step_size,
            log=log_step_size,
            num_classes=classes if labels == 'learned' else None,
        )

    def init(key):
        del key
        label = jnp.asarray(hard)
        if labels == 'expert':
            label = jax.nn.one_hot(label, classes)
        return {'params': initial(), 'label': label}

    def student_loss(factor):
        def loss(params, given, step):
            images, label, where = given['images'], given['label'], None
            if 'rows' in step:
                images, label, where = images[step['rows']], label[step['rows']], step['mask']
            if names:
                images = siamese(step['key'], images, names, family=step['family'])
            logits = network.apply({'params': params}, images, train=True).logits
            losses = classification.cross_entropy(logits, label)
            return factor * jnp.mean(losses, where=where)

        return loss

    def distance(params, label, segment, key, family):
        """Distance of one segment, its gradient, and the labels it used."""
        keys = jax.random.split(key, 3)
        begin, ends = unravel(segment['start']), jax.vmap(unravel)(segment['targets'])
        if perturbation:
            begin = sharpness.perturb_kernels(keys[0], begin, perturbation)
        targets = [jax.tree.map(lambda x, j=j: x[j], ends) for j in range(len(segment['targets']))]
        if labels == 'expert':
            logits = network.apply({'params': targets[-1]}, params['images']).logits
            label = jax.lax.stop_gradient(jax.nn.softmax(logits))
        steps = _steps(keys[1:], size, inner_batch, student_steps, family if names else None)
        factor = (
            segments.balance_factor(segment['epoch'], balance_epochs) if balance_epochs else 1.0
        )
        inner = student_loss(factor)
        if gradient == 'tesla':
            value, grads = _tesla(inner, params, label, begin, targets[-1], steps, momentum, unroll)
            return value, grads, label
        weights = jnp.asarray(segments.target_weights(intermediate, len(targets)))
        every = intermediate != 'end'
        record = segments.target_steps(student_steps, len(targets)) if every else ()

        def matched(params):
            made = synthetic.decode(params, label)
            went = trajectory.unroll_student(
                inner,
                begin,
                {'images': made.input, 'label': made.label},
                made.step_size,
                steps,
                momentum=momentum,
                record=record,
                unroll=unroll,
            )
            if not every:
                return trajectory.param_distance(went.final, begin, targets[-1])
            ends = (*went.recorded, went.final)
            return weights @ trajectory.segment_distances(ends, begin, targets)

        return *jax.value_and_grad(matched)(params), label

    def loss(params, state, batch, key):
        count = batch['epoch'].shape[0]
        family_key, key = jax.random.split(key)
        family = jax.random.randint(family_key, (student_steps,), 0, max(len(names), 1))
        keys, label = jax.random.split(key, count), state.mutables['label']
        batch = {name: batch[name] for name in ('start', 'targets', 'epoch')}

        def one(segment, key):
            return distance(params, label, segment, key, family)

        if count == 1:  # Networks vmapped over their weights are slower, above all on CPU.
            alone = one(jax.tree.map(lambda x: x[0], batch), keys[0])
            values, grads, label = jax.tree.map(lambda x: x[None], alone)
        else:
            values, grads, label = jax.vmap(one)(batch, keys)
        checked = [jnp.isfinite(g).reshape(count, -1).all(1) for g in jax.tree.leaves(grads)]
        good = jnp.isfinite(values) & jnp.stack(checked).all(0)

        def summed(x):
            return jnp.where(good.reshape(-1, *[1] * (x.ndim - 1)), x, 0.0).sum(0)

        total = common.with_gradient(summed(values), params, jax.tree.map(summed, grads))
        metrics = {
            'skipped': Mean((~good).sum(dtype=jnp.float32), jnp.float32(count)),
            'step_size': scalar(synthetic.decode(params, label).step_size),
        }
        mutables = {'label': label[0]} if labels == 'expert' else {}
        return Objective(Mean(total, good.sum(dtype=jnp.float32)), metrics, mutables)

    abstract = jax.eval_shape(initial)
    return minimize(loss, common.optimiser(context, abstract, step_size_optimizer), init)


def _steps(keys, size, inner_batch, count, family):
    """What differs between the steps of the inner loop."""
    steps: dict[str, jax.Array] = {'number': jnp.arange(count)}
    if 0 < inner_batch < size:
        steps['rows'], steps['mask'] = segments.inner_batches(keys[0], size, inner_batch, count)
    if family is not None:
        steps |= {'key': jax.random.split(keys[1], count), 'family': family}
    return steps


def _tesla(inner, params, label, start, target, steps, momentum, unroll):
    """`trajectory.tesla_grads` carried over to the parameters of the set."""
    made, pull = jax.vjp(lambda p: synthetic.decode(p, label), params)
    given = {'images': made.input, 'label': made.label}
    trained = {name: x for name, x in given.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    fixed = {name: x for name, x in given.items() if name not in trained}
    value, (grads, rate) = trajectory.tesla_grads(
        lambda p, s, step: inner(p, {**s, **fixed}, step),
        trained,
        made.step_size,
        start,
        target,
        steps,
        momentum=momentum,
        unroll=unroll,
    )
    hard = jnp.zeros(made.label.shape, jax.dtypes.float0)
    labels = grads.get('label', hard)
    return value, pull(synthetic.SyntheticSet(grads['images'], labels, rate))[0]


def _check(labels: str, gradient: str, intermediate: str, batch_size: int) -> None:
    if labels not in LABELS:
        raise UserError(f'labels must be one of {", ".join(LABELS)}, got {labels!r}.')
    if gradient not in GRADIENTS:
        raise UserError(f'gradient must be one of {", ".join(GRADIENTS)}, got {gradient!r}.')
    if gradient == 'tesla' and intermediate != 'end':
        raise UserError("gradient='tesla' matches the end of a segment alone.")
    if labels == 'expert' and batch_size > 1:
        raise UserError("labels='expert' are those of one expert; set batch_size to 1.")
