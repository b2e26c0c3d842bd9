"""A student of pseudo-labels whose influence tells their teacher which of them helped, KD-AIF.

    config.student = stage(
        teacher='teacher',
        method=dict(name='kd.methods.vision.teacher_feedback.teacher_feedback'))

Source: 2025, arXiv:2501.02705, semi-supervised; the teacher's update is ours.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kd.context import Context
from kd.data.transforms import augment
from kd.losses import classification, influence
from kd.method import Batch, Method, Objective, Player, alternate, with_collect
from kd.method.single import merged, trained
from kd.methods.vision.adapted_weight import check_field
from kd.metrics import Mean, mean
from kd.ranges import Count, NonNegative, Positive
from kd.state import NETWORK, PyTree, State

TEACHER, LABELLED = 'teacher', 'labelled_'


def teacher_feedback(
    context: Context,
    *,
    kappa: NonNegative = 3.0,
    damping: Positive = 0.1,
    iterations: Count = 10,
    feedback: NonNegative = 1.0,
    sampled: bool = False,
    only: str = '',
    teacher_optimizer: dict | None = None,
    augmentation: tuple = (),
    micro_batches: Count = 1,
) -> Method:
    """A student of pseudo-labels, and the teacher that gives them, in turn.

        student:  sum_i w_i CE(y_i, f(x_i)) / sum_i w_i
        teacher:  CE(labels, g(labelled)) + c mean_i s_i CE(y_i, g(x_i)),   s_i = -I_i / std I

    with y_i the teacher's class of the unlabelled x_i, I_i its influence on the student's loss on
    the labelled examples of the batch, which thus serve as validation, and w_i as of
    `influence_weights`. All of these are taken before either moves, and are constants.

    Args:
      context: the stage; data with the fields of a labelled example beside an unlabelled one, see
        `kd.data.columns.beside`. The teacher begins as the stage's `teacher`.
      kappa, damping: as of `influence_weights`.
      iterations: of the conjugate gradient in every step; its residual is logged.
      feedback: c; 0 for a teacher that learns from labels alone.
      sampled: y_i drawn from the teacher's probabilities instead of the most probable class.
      only: regular expression of the student's parameters that influences are taken over.
      teacher_optimizer: of the teacher; None for one like the stage's.
      augmentation: of the unlabelled inputs, that both see alike, and of the labelled ones that the
        teacher learns from; influences are on these as they are.
      micro_batches: of either player.

    Raises:
      UserError: data without labelled fields.

    Source: arXiv:2501.02705, semi-supervised; the form is ours.
    """
    check_field(context, f'{LABELLED}label')
    student, net = context.classifier, context.teacher

    def labelled(batch: Batch) -> Batch:
        return {
            name.removeprefix(LABELLED): x for name, x in batch.items() if name.startswith(LABELLED)
        }

    def collect(state: State, batch: Batch, key: jax.Array) -> Batch:
        augment_key, draw_key, labelled_key = jax.random.split(key, 3)
        given = labelled(batch)
        batch = augment.augment(augment_key, batch, augmentation, context.num_classes)
        said = net.apply(state.variables(part=TEACHER), *net.of(batch)).logits
        y = jax.random.categorical(draw_key, said) if sampled else said.argmax(-1)
        params = trained(state.params[NETWORK], only or None)

        def logits(moving, batch):
            whole = merged(moving, state.params[NETWORK])
            variables = state.variables(part=NETWORK, params=whole)
            return student.apply(variables, *student.of(batch)).logits

        def on_labelled(moving):
            return classification.cross_entropy(logits(moving, given), given['label']).mean()

        def product(v):
            return influence.gauss_newton_product(
                lambda p: logits(p, batch), params, v, damping=damping
            )

        solved, residual = influence.conjugate_gradient(
            product, jax.grad(on_labelled)(params), iterations=iterations
        )
        found = influence.influence(
            lambda p: classification.cross_entropy(logits(p, batch), y), params, solved
        )
        weights = influence.influence_weights(found, kappa=kappa)
        # Of the whole batch, whatever the micro-batches.
        each = {'residual': residual, 'deviation': jnp.std(found)}
        each = {name: jnp.broadcast_to(x, found.shape) for name, x in each.items()}
        # What the teacher learns from; the class is what a mixture of labels was.
        seen = augment.augment(labelled_key, given, augmentation, context.num_classes)
        seen = {f'{LABELLED}{name}': x for name, x in {**seen, 'class': given['label']}.items()}
        found_of = {'pseudo': y, 'influence': found, 'weight': weights, **each}
        return {**batch, **seen, **found_of}

    def taught(params, state, batch, key) -> Objective:
        variables = state.variables(part=NETWORK, params=params)
        output = student.apply(variables, *student.of(batch), train=True, key=key)
        losses, w = classification.cross_entropy(output.logits, batch['pseudo']), batch['weight']
        metrics = {'weight': mean(w), 'residual': mean(batch['residual'])}
        return Objective(Mean(jnp.sum(w * losses), jnp.sum(w)), metrics, output.mutables)

    def teaching(params, state, batch, key) -> Objective:
        given, (first, second) = labelled(batch), jax.random.split(key)
        variables = state.variables(part=TEACHER, params=params)
        output = net.apply(variables, *net.of(given), train=True, key=first)
        losses = classification.cross_entropy(output.logits, given['label'])
        metrics = {'accuracy': mean(output.logits.argmax(-1) == given['class'])}
        if feedback:
            said = net.apply(variables, *net.of(batch), train=True, key=second).logits
            back = influence.teacher_feedback(
                said, batch['pseudo'], batch['influence'], deviation=batch['deviation']
            )
            metrics['feedback'], losses = mean(back), losses + feedback * back
        return Objective(mean(losses), metrics, output.mutables)

    tx = context.optimizer(**teacher_optimizer) if teacher_optimizer else context.tx
    players = {
        NETWORK: Player(taught, context.tx, micro_batches=micro_batches),
        TEACHER: Player(teaching, tx, micro_batches=micro_batches),
    }

    def init(key: jax.Array, frozen: PyTree) -> PyTree:
        return {NETWORK: student.init(key), TEACHER: frozen[TEACHER]}

    return with_collect(alternate(players, init), collect)
