"""The outer step of trajectory matching, with every variation that its methods need."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kd import ranges
from kd.context import Context
from kd.data.distilled import synthetic
from kd.data.transforms.siamese import siamese
from kd.errors import UserError
from kd.losses import classification, segments, sharpness, trajectory
from kd.method import Method, Objective, minimize
from kd.methods.dataset import common
from kd.metrics import Mean, scalar
from kd.ranges import Count, Decay, NonNegative, Positive, Size

LABELS = ('hard', 'learned', 'expert')
GRADIENTS = ('exact', 'tesla')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Matching:
    """What `trajectory_matching` does.

    Attributes:
      images_per_class: of the synthetic set, ordered by class.
      student_steps: N.
      step_size: of the student, before it is trained.
      inner_batch: synthetic examples per student step; 0 for all.
      log_step_size: train the logarithm of the step size, which thus stays positive.
      step_size_optimizer: arguments of `kd.training.optimizer.optimizer`; None for the images'
        optimiser.
      labels: 'hard'; 'learned', trained with the images; or 'expert', the probabilities that the
        expert at the end of the segment gives, without gradient.
      start, start_experts: see `common.real_start`.
      augmentation: families of `kd.data.transforms.siamese.siamese`, joined by '_'; '' for none.
      gradient: 'exact', or 'tesla' without the Hessian of the inner loss.
      momentum: of the student.
      balance_epochs: the bound of start epochs for `segments.balance_factor`; 0 for no balance.
      perturbation: of the convolution kernels of the start, see `sharpness.perturb_kernels`.
      intermediate: weights of the segment's inner epochs, see `segments.target_weights`.
      unroll: of the inner loop; True where XLA for CPU is slow with convolutions in loops.
    """

    images_per_class: Count
    student_steps: Count
    step_size: Positive
    inner_batch: Size = 0
    log_step_size: bool = False
    step_size_optimizer: Mapping[str, Any] | None = None
    labels: str = 'hard'
    start: str = 'random'
    start_experts: str = ''
    augmentation: str = ''
    gradient: str = 'exact'
    momentum: Decay = 0.0
    balance_epochs: Size = 0
    perturbation: NonNegative = 0.0
    intermediate: str = 'end'
    unroll: Count | bool = 1

    def __post_init__(self) -> None:
        ranges.check(Matching, vars(self), where='')
        if self.labels not in LABELS:
            raise UserError(f'labels must be one of {", ".join(LABELS)}, got {self.labels!r}.')
        if self.gradient not in GRADIENTS:
            known = ', '.join(GRADIENTS)
            raise UserError(f'gradient must be one of {known}, got {self.gradient!r}.')
        if self.gradient == 'tesla' and self.intermediate != 'end':
            raise UserError("gradient='tesla' matches the end of a segment alone.")
        segments.target_weights(self.intermediate, 1)

    @property
    def families(self) -> tuple[str, ...]:
        """Of augmentation."""
        return tuple(self.augmentation.split('_')) if self.augmentation else ()


def trajectory_matching(context: Context, options: Matching) -> Method:
    """Trains a synthetic set so that students on it go where experts on real data went.

        min over images, step size of  sum_j w_j || theta_{s_j} - theta*_{t+j} ||^2
                                                / || theta*_t - theta*_{t+j} ||^2

    averaged over the segments of the batch (one in the papers), with the student's steps from
    theta*_t as in `trajectory.unroll_student`. A segment whose distance or gradient is not finite
    is left out and counted in the metric `skipped`.

    Args:
      context: the stage, whose data are `kd.data.distilled.trajectories.segments`; its optimiser
        trains the images.
      options: see `Matching`.

    Raises:
      UserError: options that do not go together, or classes smaller than `images_per_class`.
    """
    if options.labels == 'expert' and context.batch_size > 1:
        raise UserError("labels='expert' are those of one expert; set batch_size to 1.")
    outer = _Outer(context, options)
    abstract = jax.eval_shape(outer.init, jax.random.key(0))['params']
    tx = common.optimiser(context, abstract, options.step_size_optimizer)
    return minimize(outer.loss, tx, outer.init)


class _Outer:
    """The outer loss and where it starts."""

    def __init__(self, context: Context, options: Matching) -> None:
        self.options = options
        self.network = common.in_loops(common.student(context), context)
        self.unravel = common.unraveller(self.network)
        self.images, self.hard = common.real_start(
            context,
            options.images_per_class,
            options.start,
            experts=options.start_experts,
            network=self.network,
        )
        assert context.num_classes is not None
        self.classes = context.num_classes

    def init(self, key: jax.Array) -> dict[str, Any]:
        del key  # The images are chosen on the host.
        options, label = self.options, jnp.asarray(self.hard)
        params = synthetic.parameters(
            self.images,
            self.hard,
            step_size=options.step_size,
            log=options.log_step_size,
            num_classes=self.classes if options.labels == 'learned' else None,
        )
        if options.labels == 'expert':
            label = jax.nn.one_hot(label, self.classes)
        return {'params': params, 'label': label}

    def loss(self, params, state, batch, key) -> Objective:
        """The sum of the segments' distances, whose gradient leaves out what is not finite."""
        options, count = self.options, batch['epoch'].shape[0]
        family_key, key = jax.random.split(key)
        # One family per step for all segments: drawn under vmap, all of them would be computed.
        kinds = max(len(options.families), 1)
        family = jax.random.randint(family_key, (options.student_steps,), 0, kinds)
        keys, label = jax.random.split(key, count), state.variables()['label']
        batch = {name: batch[name] for name in ('start', 'targets', 'epoch')}

        def one(segment, key):
            return self.distance(params, label, segment, key, family)

        if count == 1:  # Networks vmapped over their weights are slower, above all on CPU.
            alone = one(jax.tree.map(lambda x: x[0], batch), keys[0])
            values, grads, used = jax.tree.map(lambda x: x[None], alone)
        else:
            values, grads, used = jax.vmap(one)(batch, keys)
        checked = [jnp.isfinite(g).reshape(count, -1).all(1) for g in jax.tree.leaves(grads)]
        good = jnp.isfinite(values) & jnp.stack(checked).all(0)

        def summed(x):
            return jnp.where(good.reshape(-1, *[1] * (x.ndim - 1)), x, 0.0).sum(0)

        total = common.with_gradient(summed(values), params, jax.tree.map(summed, grads))
        metrics = {
            'skipped': Mean((~good).sum(dtype=jnp.float32), jnp.float32(count)),
            'step_size': scalar(synthetic.decode(params, label).step_size),
        }
        mutables = {}
        if options.labels == 'expert':
            mutables = {'label': jnp.where(good[0], used[0], label)}
        return Objective(Mean(total, good.sum(dtype=jnp.float32)), metrics, mutables)

    def distance(self, params, label, segment, key, family):
        """Distance of one segment, its gradient, and the labels it used."""
        options = self.options
        keys = jax.random.split(key, 3)
        begin, ends = self.unravel(segment['start']), jax.vmap(self.unravel)(segment['targets'])
        if options.perturbation:
            begin = sharpness.perturb_kernels(keys[0], begin, options.perturbation)
        targets = [jax.tree.map(lambda x, j=j: x[j], ends) for j in range(len(segment['targets']))]
        if options.labels == 'expert':
            logits = self.network.apply({'params': targets[-1]}, params['images']).logits
            label = jax.lax.stop_gradient(jax.nn.softmax(logits))
        steps = self.steps(keys[1:], family)
        factor = jnp.float32(1.0)
        if options.balance_epochs:
            factor = segments.balance_factor(segment['epoch'], options.balance_epochs)
        inner = self.student_loss(factor)
        if options.gradient == 'tesla':
            value, grads = self.tesla(inner, params, label, begin, targets[-1], steps)
        else:
            value, grads = jax.value_and_grad(self.matched)(
                params, label, inner, begin, targets, steps
            )
        return value, grads, label

    def steps(self, keys, family):
        """What differs between the steps of the inner loop."""
        options, count, size = self.options, self.options.student_steps, len(self.hard)
        steps: dict[str, jax.Array] = {'number': jnp.arange(count)}
        if 0 < options.inner_batch < size:
            steps['rows'], steps['mask'] = segments.inner_batches(
                keys[0], size, options.inner_batch, count
            )
        if options.families:
            steps |= {'key': jax.random.split(keys[1], count), 'family': family}
        return steps

    def student_loss(self, factor):
        """The inner loss, weighted by `factor`."""
        families = self.options.families

        def loss(params, given, step):
            images, label, where = given['images'], given['label'], None
            # The whole set is not gathered: it may be spread over devices.
            if 'rows' in step:
                images, label, where = images[step['rows']], label[step['rows']], step['mask']
            if families:
                images = siamese(step['key'], images, families, family=step['family'])
            logits = self.network.apply({'params': params}, images, train=True).logits
            losses = classification.cross_entropy(logits, label)
            return factor * jnp.mean(losses, where=where)

        return loss

    def matched(self, params, label, inner, begin, targets, steps):
        """The weighted distances of the student from the expert."""
        options, made = self.options, synthetic.decode(params, label)
        every = options.intermediate != 'end'
        went = trajectory.unroll_student(
            inner,
            begin,
            {'images': made.input, 'label': made.label},
            made.step_size,
            steps,
            momentum=options.momentum,
            record=segments.target_steps(options.student_steps, len(targets)) if every else (),
            unroll=options.unroll,
        )
        if not every:
            return trajectory.param_distance(went.final, begin, targets[-1])
        weights = jnp.asarray(segments.target_weights(options.intermediate, len(targets)))
        ends = (*went.recorded, went.final)
        return weights @ trajectory.segment_distances(ends, begin, targets)

    def tesla(self, inner, params, label, begin, target, steps):
        """`trajectory.tesla_grads` carried over to the parameters of the set."""
        made, pull = jax.vjp(lambda p: synthetic.decode(p, label), params)
        given = {'images': made.input, 'label': made.label}
        trained = {name: x for name, x in given.items() if jnp.issubdtype(x.dtype, jnp.floating)}
        fixed = {name: x for name, x in given.items() if name not in trained}
        value, (grads, rate) = trajectory.tesla_grads(
            lambda p, s, step: inner(p, {**s, **fixed}, step),
            trained,
            made.step_size,
            begin,
            target,
            steps,
            momentum=self.options.momentum,
            unroll=self.options.unroll,
        )
        # Integers have no tangents.
        hard = jnp.zeros(made.label.shape, jax.dtypes.float0)
        pulled = synthetic.SyntheticSet(grads['images'], grads.get('label', hard), rate)
        return value, pull(pulled)[0]
