"""Self-distillation with ground truth in every generation (Borup, Andersen 2021, arXiv:2102.13088).

Generations are stages. The first is trained on the labels. Generation t has the one before it as
its `teacher` and mixes its outputs with the labels. The best weight of the labels is known from two
trainings, without a grid: `alpha='auto'` takes it from the stages in `references`, the first
generation and a student of the teacher alone (alpha = 0).
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from kd.context import Context
from kd.data import pipeline
from kd.data.transforms import augment
from kd.errors import UserError
from kd.losses import numerics
from kd.method import Method, Objective, minimize
from kd.metrics import mean, scalar
from kd.ranges import Count, Finite, NonNegative
from kd.state import PyTree
from kd.theory import kernel_regression

# Keeps the gradient of a norm finite at biases that start at 0.
_EPSILON = 1e-12


def self_distillation(
    context: Context,
    *,
    alpha: Finite | Literal['auto'] = 'auto',
    bounds: tuple[Finite, Finite] = (0.0, 1.0),
    penalty: NonNegative = 1e-4,
    split: str = 'validation',
    augmentation: tuple = (),
    micro_batches: Count = 1,
) -> Method:
    """A generation of self-distillation by squares of probabilities.

        loss = alpha MSE(p, y) + (1 - alpha) MSE(p, sg[p_teacher]) + penalty sum_w ||w||_2

    with p = softmax(f(x)), y one-hot, MSE the mean over classes, and the norms of the parameter
    arrays w not squared, as in the official code. alpha weighs the ground truth. A stage without a
    teacher is the first generation and has alpha = 1.

    With `alpha='auto'`, on validation outputs F1 of `references.first` (the first generation) and
    F0 of `references.pure` (a student of this teacher alone),

        alpha = <Y - F0, F1 - F0> / ||F1 - F0||^2,

    computed once, when the state is made, and kept in `state.extra['alpha']`. It is exact for ridge
    regression and a heuristic for networks.

    Args:
      context: the stage; needs a network, an optimiser and integer labels.
      alpha: a number, or 'auto'.
      bounds: an automatic alpha is clipped to these. Beyond 1 the chain can oscillate.
      penalty: weight of the norms.
      split: where an automatic alpha is computed; held out from training.
      augmentation: for `kd.data.transforms.augment.augment`; not mixup.
      micro_batches: parts over which gradients are accumulated.
    """
    network, num_classes = context.classifier, context.num_classes
    if alpha == 'auto' and not {'first', 'pure'} <= set(context.references):
        raise UserError(
            f"alpha='auto' needs {context.stage}.references of 'first' (the first generation) and "
            f"'pure' (a student of the teacher with alpha=0); it has {sorted(context.references)}."
        )

    def loss(params, state, batch, key) -> Objective:
        augment_key, dropout_key = jax.random.split(key)
        batch = augment.augment(augment_key, batch, augmentation, num_classes)
        variables = state.variables(params=params)
        output = network.apply(variables, *network.of(batch), train=True, key=dropout_key)
        targets = numerics.one_hot(batch['label'], output.logits.shape[-1])
        if context.optional_teacher is None:
            weight, taught = jnp.float32(1.0), jnp.zeros_like(output.logits)
        else:
            weight = state.extra['alpha']
            taught = context.teacher.apply(
                state.frozen['teacher'], *context.teacher.of(batch)
            ).logits
        losses = kernel_regression.self_distillation_loss(output.logits, targets, taught, weight)
        correct = output.logits.argmax(-1) == batch['label']
        metrics = {'mse': mean(losses), 'accuracy': mean(correct), 'alpha': scalar(weight)}
        return Objective(mean(losses + penalty * sum_of_norms(params)), metrics, output.mutables)

    method = minimize(loss, context.tx, network.init, micro_batches=micro_batches)

    def init(key, frozen=None):
        state = method.init(key, frozen)
        if context.optional_teacher is None:
            return state
        if alpha == 'auto':
            weight = jnp.clip(estimate_alpha(context, frozen, split), *bounds)
        else:
            weight = jnp.float32(alpha)
        return state.replace(extra={**state.extra, 'alpha': weight})

    return Method(init, method.step)


def sum_of_norms(params: PyTree) -> jax.Array:
    """sum_w sqrt(||w||_2^2 + 1e-12) over the arrays of a tree, a float32 scalar."""
    squares = jax.tree.map(lambda w: jnp.sum(jnp.square(w.astype(jnp.float32))), params)
    norms = [jnp.sqrt(square + _EPSILON) for square in jax.tree.leaves(squares)]
    return jnp.sum(jnp.stack(norms))


def estimate_alpha(context: Context, frozen: PyTree, split: str) -> jax.Array:
    """`kernel_regression.optimal_alpha` of the references 'first' and 'pure' over a whole split.

    Args:
      context: has the two networks and the data.
      frozen: their variables by name.
      split: name of the split in the stage's data.

    Returns:
      A float32 scalar; 1 where both networks agree everywhere.
    """
    batches = pipeline.eval_batches(context.source(split), context.batch_size)
    fields = ('input', 'label', 'mask')
    shape = {
        name: jax.ShapeDtypeStruct((context.batch_size, *field.shape), field.dtype)
        for name, field in (*context.spec.items(), ('mask', jax.ShapeDtypeStruct((), bool)))
        if name in fields
    }

    def read(index):
        batch = batches[int(index)]
        return {name: batch[name] for name in fields}

    def probabilities(name, batch):
        network = context.references[name]
        logits = network.apply(frozen[name], *network.of(batch)).logits
        return jnp.exp(numerics.log_softmax(logits))

    def add(sums, index):
        # Read when the stage starts, not when a recipe is only checked; nor does the split have to
        # fit into the compiled program.
        batch = jax.pure_callback(read, shape, index)
        pure = probabilities('pure', batch)
        direction = probabilities('first', batch) - pure
        residual = numerics.one_hot(batch['label'], pure.shape[-1]) - pure
        direction = jnp.where(batch['mask'][:, None], direction, 0.0)
        along, square = sums
        return (along + jnp.sum(residual * direction), square + jnp.sum(direction**2)), None

    zero = jnp.zeros((), jnp.float32)
    (along, square), _ = jax.lax.scan(add, (zero, zero), jnp.arange(len(batches)))
    return jnp.where(square > 0, along / jnp.where(square > 0, square, 1.0), 1.0)
