"""Distillation by weights of influence, KD-AIF (2025, arXiv:2501.02705).

    config.weights = stage(
        teacher='teacher', references={'student': 'warm'}, steps=1, batch_size=200,
        method=dict(name='kd.methods.cache.nothing'),
        writers={'weights': dict(
            name='kd.methods.vision.adapted_weight.influence_weights', damping=0.1)})

The paper's formulas were not at hand in full: deviations as the unit of the weights and their
number kappa are ours. A teacher that learns from them: `kd.methods.vision.teacher_feedback`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kd import files
from kd.context import Context
from kd.context import Writer as StageWriter
from kd.data import pipeline, sources
from kd.data.columns import Rows
from kd.data.transforms import augment
from kd.errors import UserError
from kd.io import columns
from kd.io.progress import say
from kd.losses import classification, influence
from kd.method import Batch, Method, Objective, minimize
from kd.method.single import merged, trained
from kd.methods import batches, teacher
from kd.methods import columns as column_writers
from kd.metrics import Mean, mean
from kd.network import Network
from kd.parallel import distributed, layout
from kd.parallel import mesh as mesh_lib
from kd.ranges import Count, Fraction, NonNegative, Positive, Size, SplitName
from kd.state import PyTree, State

STUDENT = 'student'
COLUMNS = {'weight': columns.NUMBER, 'influence': columns.NUMBER}


def weighted_kd(
    context: Context,
    *,
    temperature: Positive = 4.0,
    soft_weight: Fraction = 0.9,
    weight: str = 'weight',
    augmentation: tuple = (),
    micro_batches: Count = 1,
) -> Method:
    """Distillation in which each example has a weight.

        R_w = sum_i w_i l_i / sum_i w_i,   l_i = (1 - a) CE(y_i, f) + a T^2 KL_T(g_i || f)

    Sums over the batch, whatever the micro-batches. Weights are data: nothing flows through them.

    Args:
      context: the stage; a network, an optimiser, and a teacher or what it has said.
      temperature: T.
      soft_weight: a; with 1 no label is read.
      weight: field of the batch, w [B]; '' for 1, plain distillation.
      augmentation: for `kd.data.transforms.augment.augment`.
      micro_batches: parts over which gradients are accumulated.

    Raises:
      UserError: data without that field.

    Source: arXiv:2501.02705.
    """
    check_field(context, weight)
    network = context.classifier

    def loss(params, state, batch, key) -> Objective:
        augment_key, dropout_key = jax.random.split(key)
        batch = augment.augment(augment_key, batch, augmentation, context.num_classes)
        variables = state.variables(params=params)
        output = network.apply(variables, *network.of(batch), train=True, key=dropout_key)
        said = teacher.teacher_logits(context, state, batch)
        losses = _distilled(output.logits, said, batch, temperature, soft_weight)
        w = batch[weight] if weight else jnp.ones_like(losses)
        weighted = Mean(jnp.sum(w * losses), jnp.sum(w))
        return Objective(weighted, {'unweighted': mean(losses), 'weight': mean(w)}, output.mutables)

    return minimize(loss, context.tx, network.init, micro_batches=micro_batches)


@columns.written(lambda source: COLUMNS)
def influence_weights(
    context: Context,
    *,
    split: SplitName = 'train',
    validation: SplitName = 'validation',
    kappa: NonNegative = 3.0,
    damping: Positive = 0.1,
    iterations: Count = 30,
    tolerance: Positive = 1e-2,
    temperature: Positive = 4.0,
    soft_weight: Fraction = 0.9,
    weight: str = '',
    only: str = '',
    curvature: Size = 0,
) -> StageWriter:
    """Writes the columns `influence` and `weight` of every example.

        I_i = -grad Lv^T (G + damping)^{-1} grad l_i,   w_i = sigmoid(-kappa I_i / std I)

    Lv is the mean cross-entropy of the stage's reference `student` on the validation split, which
    is held out and clean; l_i as of `weighted_kd`; G the Gauss-Newton matrix of R_w. Beside them
    `weights.json` has the mean weight of each class, and the examples that harm most.

    Args:
      context: the stage, of one step; a reference `student`, and a teacher or what it has said.
      split: whose examples are weighed.
      validation: what they are to help with; the recipe keeps examples of `split` out of it,
        which is not checked here.
      kappa: how much weights differ; 0 for not at all.
      damping: added to G. A large one makes I the alignment of gradients.
      iterations: of the conjugate gradient.
      tolerance: relative residual of the solution that is let pass.
      temperature, soft_weight, weight: as of the `weighted_kd` that trained the student; '' for
        weights of 1.
      only: regular expression of the parameters that count, such as '^head/'; '' for all.
      curvature: examples that G is taken over, evenly spread; 0 for all.

    Raises:
      UserError: no such reference or field; a residual above the tolerance.

    Source: arXiv:2501.02705.
    """
    if STUDENT not in context.references:
        raise UserError(f'{context.stage} weighs examples for references.{STUDENT}; name a stage.')
    column_writers.check_split(context, split)
    check_field(context, weight)
    pool = _Pool(context, context.references[STUDENT], temperature, soft_weight, weight, only)

    def write(state: State, step: int, directory: Path) -> None:
        del step
        if not column_writers.missing(context, directory, split, COLUMNS):
            return
        source, held = context.source(split), context.source(validation)
        frozen = state.frozen
        gradient = pool.validation_gradient(frozen, held)
        few = source
        if 0 < curvature < len(source):
            few = Rows(source, np.linspace(0, len(source) - 1, curvature).astype(int), split)
        product_of = jax.jit(
            lambda frozen, chunks, b: influence.conjugate_gradient(
                pool.product(frozen, chunks, damping), b, iterations=iterations
            )
        )
        with layout.inside(pool.mesh):
            solved, residual = product_of(frozen, pool.on_device(few), gradient)
        residual = float(residual)
        if not residual <= tolerance:
            raise UserError(
                f"{context.stage}: the influences' linear system is solved up to a relative "
                f'residual of {residual:.2g}, more than tolerance={tolerance:g}; give the writer '
                'more iterations or more damping.'
            )
        found = pool.influences(frozen, source, solved)
        w = np.asarray(influence.influence_weights(found, kappa=kappa))
        values = {'weight': w, 'influence': found}
        column_writers.write(context, directory, split, COLUMNS, values)
        told = _told(source, w, found, residual)
        distributed.from_first(lambda: files.write_json(directory / 'weights.json', told))
        say(
            context.stage,
            f'weights {w.min():.2f} to {w.max():.2f}, {np.mean(found < 0):.0%} of the examples '
            f'help; relative residual {residual:.1e}',
        )

    return write


class _Pool(NamedTuple):
    """Losses and curvature of a student; all functions of the stage's frozen networks."""

    context: Context
    network: Network
    temperature: float
    soft_weight: float
    weight: str
    only: str

    @property
    def mesh(self) -> Any:
        return self.context.mesh

    def moving(self, frozen: PyTree) -> PyTree:
        """The parameters that count."""
        return trained(frozen[STUDENT]['params'], self.only or None)

    def logits(self, frozen: PyTree, batch: Batch) -> Callable[[PyTree], jax.Array]:
        """Of the parameters that count."""
        variables = frozen[STUDENT]

        def logits(moving):
            params = merged(moving, variables['params'])
            inputs = self.network.of(batch)
            return self.network.apply({**variables, 'params': params}, *inputs).logits

        return logits

    def losses(self, frozen: PyTree, batch: Batch) -> Callable[[jax.Array], jax.Array]:
        """Of the logits."""
        state = State.create(jax.random.key(0), {'params': {}}, frozen=frozen)
        said = teacher.teacher_logits(self.context, state, batch)
        return lambda z: _distilled(z, said, batch, self.temperature, self.soft_weight)

    def product(self, frozen: PyTree, chunks: tuple[Batch, ...], damping: float) -> Callable:
        """v -> (G + damping) v, of all chunks."""
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *chunks)
        moving = self.moving(frozen)
        w = stacked['mask'].astype(jnp.float32)
        w = w * stacked[self.weight] if self.weight else w

        def product(v: PyTree) -> PyTree:
            def add(total, given):
                batch, w = given
                one = influence.gauss_newton_product(
                    self.logits(frozen, batch), moving, v,
                    loss=self.losses(frozen, batch), weights=w * len(w),
                )  # fmt: skip
                return jax.tree.map(jnp.add, total, one), None

            zero = jax.tree.map(jnp.zeros_like, v)
            total, _ = jax.lax.scan(add, zero, (stacked, w))
            return jax.tree.map(lambda g, x: g / w.sum() + damping * x, total, v)

        return product

    def on_device(self, source: sources.Source) -> tuple[Batch, ...]:
        """All batches of a split."""
        part, parts = mesh_lib.batch_part(self.mesh)
        size, sharding = self.context.batch_size, mesh_lib.batch_sharding(self.mesh)
        every = pipeline.eval_batches(source, size, host_index=part, host_count=parts)
        return tuple(mesh_lib.put_batch(dict(batch), sharding) for batch in every)

    def validation_gradient(self, frozen: PyTree, source: sources.Source) -> PyTree:
        """grad Lv, the mean over the split."""

        def summed(frozen, batch):
            logits = self.logits(frozen, batch)

            def total(moving):
                losses = classification.cross_entropy(logits(moving), batch['label'])
                return jnp.sum(jnp.where(batch['mask'], losses, 0.0))

            return jax.grad(total)(self.moving(frozen))

        size = self.context.batch_size
        ask = batches.asking(summed, frozen, source, size, (*source.spec, 'mask'))
        every = [ask(number) for number in range(-(-len(source) // size))]
        return jax.tree.map(lambda *x: sum(x) / len(source), *every)

    def influences(self, frozen: PyTree, source: sources.Source, solved: PyTree) -> np.ndarray:
        """I [N], a batch at a time."""

        def of_batch(frozen, batch, solved):
            logits, losses = self.logits(frozen, batch), self.losses(frozen, batch)
            return influence.influence(lambda p: losses(logits(p)), self.moving(frozen), solved)

        size = self.context.batch_size
        ask = batches.asking(of_batch, frozen, source, size)
        every = [ask(number, solved) for number in range(-(-len(source) // size))]
        return np.concatenate(every)[: len(source)]


def _distilled(logits, said, batch, temperature, soft_weight):
    """l_i [B]; without a label where none counts."""
    labels = batch['label'] if soft_weight < 1 else jnp.zeros(len(logits), jnp.int32)
    return classification.soft_and_hard(
        logits, said, labels, temperature=temperature, hard_weight=1.0 - soft_weight
    )


def check_field(context: Context, name: str) -> None:
    """Raises `UserError` for data without a field; '' is none."""
    if name and name not in context.spec:
        raise UserError(
            f"{context.stage}: its data have no field '{name}', only {sorted(context.spec)}; "
            '`kd.data.columns` joins the columns of an earlier stage.'
        )


def _told(source: sources.Source, w: np.ndarray, found: np.ndarray, residual: float) -> dict:
    """What a reader wants to know of weights: by class, and whom to look at."""
    by_class = {}
    if 'label' in source.spec and source.num_classes:
        parts = np.array_split(np.arange(len(source)), -(-len(source) // 1024))
        labels = np.concatenate([source.fetch(rows)['label'] for rows in parts])
        by_class = {int(c): float(w[labels == c].mean()) for c in np.unique(labels)}
    return {
        'residual': residual,
        'weight of a class': by_class,
        'most harmful first': np.argsort(-found, kind='stable')[:100].tolist(),
    }
