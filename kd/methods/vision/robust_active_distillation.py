"""Robust active distillation: whom to ask a teacher about that may be wrong (arXiv:2210.01213).

Rounds are stages: a student trained on what there is, a stage that asks the teacher about some more
examples, the next student, from scratch. `configs/vision/robust_active_distillation.py` makes them
in a loop.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from kd.context import Context
from kd.context import Writer as StageWriter
from kd.data import columns as data_columns
from kd.data import selection, sources
from kd.data.transforms import augment
from kd.errors import UserError
from kd.io import columns
from kd.io.progress import say
from kd.losses import classification, divergence
from kd.method import Method, Objective, minimize
from kd.methods import batches
from kd.methods import columns as column_writers
from kd.metrics import mean, scalar
from kd.ranges import Count, Fraction, SplitName
from kd.state import State

STUDENT, QUERIED, SAID = 'student', 'queried', 'answer'
Kind = Literal['rad', 'rad_soft', 'margin', 'entropy', 'confidence', 'random', 'k_center']


def acquired_kd(context: Context, *, augmentation: tuple = ()) -> Method:
    """A student of labelled examples, and of answers to those it has asked about.

        loss = mean_L CE(y, f) + mean_A KL(g || f)

    over the examples of a batch of either kind, in which `mask` is true where it has one; a kind
    that a batch lacks adds nothing. KL and cross-entropy with the teacher g have one gradient. No
    temperature.

    Args:
      context: the stage; a network, an optimiser, and data of `kd.data.columns.acquired`.
      augmentation: for `kd.data.transforms.augment.augment`; an answer holds for its example,
        however that is moved, as a label does.

    Raises:
      UserError: other data.

    Source: arXiv:2210.01213.
    """
    if QUERIED not in context.spec:
        raise UserError(
            f"{context.stage}: its data have no field '{QUERIED}'; name kd.data.columns.acquired "
            'as the source of the data.'
        )
    network = context.classifier

    def loss(params, state, batch, key) -> Objective:
        augment_key, dropout_key = jax.random.split(key)
        batch = augment.augment(augment_key, batch, augmentation, context.num_classes)
        variables = state.variables(params=params)
        output = network.apply(variables, *network.of(batch), train=True, key=dropout_key)
        queried, there = batch[QUERIED], batch.get('mask', True)
        hard = mean(classification.cross_entropy(output.logits, batch['label']), ~queried & there)
        soft = mean(divergence.forward_kl(output.logits, batch[SAID]), queried & there)
        total = sum(part.total / jnp.maximum(part.count, 1.0) for part in (hard, soft))
        metrics = {'labelled': hard, 'acquired': soft}
        return Objective(scalar(total), metrics, output.mutables)

    return minimize(loss, context.tx, network.init)


@columns.written(
    lambda source: {
        QUERIED: columns.TRUTH,
        SAID: jax.ShapeDtypeStruct((source.num_classes,), np.float32),
    }
)
def query(
    context: Context,
    *,
    count: Count,
    kind: Kind = 'rad',
    rho: Fraction = 0.6,
    before: str = '',
    split: SplitName = 'train',
    exact: bool = False,
    features: str = 'features',
) -> StageWriter:
    """Asks the teacher about `count` more examples, and keeps what it says.

    Columns: `queried`, of this stage and those before it, and `answer`, logits, 0 where nobody has
    asked. The teacher is run on the chosen examples alone, the student on the others that are left.

    Args:
      context: the stage, of one step; a teacher, and a reference `student`.
      count: examples.
      kind: one of `kd.data.selection.KINDS`, or 'k_center' for a cover of the student's features.
      rho: of the examples left, the share that the teacher is right about, at least.
      before: the stage that asked last; '' for the first.
      split: that is asked about.
      exact: draws with exact probabilities, see `kd.data.selection.draw`.
      features: of the student, for 'k_center'.

    Raises:
      UserError: no reference `student`; fewer examples left than are to be asked about.

    Source: arXiv:2210.01213.
    """
    if STUDENT not in context.references:
        raise UserError(
            f'{context.stage} asks what references.{STUDENT} is unsure of; name a stage.'
        )
    teacher = context.teacher
    column_writers.check_split(context, split)

    def write(state: State, step: int, directory: Path) -> None:
        del step
        source = context.recipe_source(split)
        spec = columns.spec_of(query, source)
        assert spec is not None
        if not column_writers.missing(context, directory, split, spec):
            return
        taken, logits = _before(context, before, source)
        if count > (~taken).sum():
            raise UserError(
                f'{context.stage}: count={count} is more than the {(~taken).sum()} examples that '
                'nobody has asked about.'
            )
        key = batches.key_of(context, split)
        chosen = _chosen(context, state, source, taken, key, count, kind, rho, exact, features)
        asked = data_columns.Rows(source, chosen, split)
        size = context.batch_size

        def says(variables, batch):
            return teacher.apply(variables, *teacher.of(batch)).logits

        ask = batches.asking(says, state.frozen['teacher'], asked, size, teacher.fields)
        answers = np.concatenate([ask(number) for number in range(-(-count // size))])[:count]
        taken[chosen], logits[chosen] = True, answers
        column_writers.write(context, directory, split, spec, {QUERIED: taken, SAID: logits})
        told = np.bincount(answers.argmax(1), minlength=logits.shape[1])
        say(
            context.stage,
            f'{count} examples by {kind}, {taken.sum()} of {len(source):,} in all; answers by '
            f'class: {" ".join(map(str, told))}',
        )

    return write


def _before(context: Context, stage: str, source: sources.Source) -> tuple[np.ndarray, np.ndarray]:
    """(which were asked about, what was said)."""
    if not stage:
        return np.zeros(len(source), bool), np.zeros((len(source), source.num_classes or 0), 'f4')
    found = data_columns.written(context.recipe, stage, lambda _: source, context.locate)
    assert found.stored is not None
    values = found.stored.all()
    return values[QUERIED].copy(), values[SAID].copy()


def _chosen(context, state, source, taken, key, count, kind, rho, exact, features) -> np.ndarray:
    """Indices [count] of examples that were not asked about."""
    student, size = context.references[STUDENT], context.batch_size
    names = (features,) if kind == 'k_center' else ()

    def unsure(variables, batch):
        output = student.apply(variables, *student.of(batch), capture=names)
        if names:
            return output.features[features].reshape(len(output.logits), -1)
        return jax.nn.softmax(output.logits)

    ask = batches.asking(unsure, state.frozen[STUDENT], source, size, student.fields)
    every = [ask(number) for number in range(-(-len(source) // size))]
    found = np.concatenate(every)[: len(source)]
    if names:
        return np.asarray(jax.jit(selection.k_center, static_argnums=2)(found, taken, count))
    choose = partial(selection.select, count=count, kind=kind, rho=rho, exact=exact)
    return np.asarray(jax.jit(choose)(key, found, where=~taken))
