"""A stage made ready to run: networks, teacher, method and evaluators from its config block."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kd import config as config_lib
from kd.config import Recipe, StageConfig
from kd.context import Context, Evaluator, Probe, Writer
from kd.data import pipeline, sources
from kd.data.context import source_loader, splits
from kd.errors import UserError
from kd.method import Method, with_base, with_ema, with_nonfinite_guard, with_result
from kd.models.adapters import adapter_of
from kd.network import Network, output_shape
from kd.networks import Trained, build_network, trained_network
from kd.parallel import mesh as mesh_lib
from kd.parallel.sharding import rollout, rollout_rules, tree_shardings
from kd.ranges import Count, check_value
from kd.references import START, split_reference
from kd.state import State
from kd.text import tokenizer
from kd.training import optimizer as optim


@dataclasses.dataclass
class Stage:
    """Everything the loop needs for one stage."""

    name: str
    config: StageConfig
    context: Context
    method: Method
    mesh: Mesh
    frozen: dict[str, Any]  # variables by name ('teacher', ...), abstract or not
    evaluators: dict[str, tuple[str, Evaluator | Probe]]
    writers: dict[str, tuple[int, Writer]]
    sharding: tuple
    seed: int
    trained: dict[str, Trained]  # where the frozen variables come from

    def batches(self, split: str = 'train') -> grain.DatasetIterator:
        """This host's part of the training batches, endless and checkpointable."""
        return pipeline.train_iterator(
            self.context.source(split),
            self.config.batch_size,
            seed=self.seed,
            poisson=self.config.poisson,
            host_index=self.part[0],
            host_count=self.part[1],
        )

    def eval_batches(self, split: str) -> Iterable[dict[str, np.ndarray]]:
        """This host's part of one ordered pass over a split, the last batch padded."""
        return pipeline.eval_batches(
            self.context.source(split),
            self.config.batch_size,
            host_index=self.part[0],
            host_count=self.part[1],
        )

    @property
    def part(self) -> tuple[int, int]:
        """(index, count): this host's part of every batch."""
        return mesh_lib.batch_part(self.mesh)

    def key(self) -> jax.Array:
        """The stage's random key. Stages of one run share the order of the data, nothing else."""
        index = list(self.context.recipe.stages).index(self.name)
        return jax.random.fold_in(jax.random.key(self.seed), index)

    def abstract_state(self) -> State:
        """Shapes, dtypes and shardings of the state; nothing is computed."""
        abstract = jax.eval_shape(self.method.init, self.key(), self.frozen)
        shardings = tree_shardings(abstract.replace(frozen={}), self.sharding, self.mesh)
        # Frozen trees lie where they were restored to.
        shardings = shardings.replace(frozen=jax.tree.map(lambda x: x.sharding, self.frozen))
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
        )

    def batch_sharding(self) -> NamedSharding:
        return mesh_lib.batch_sharding(self.mesh)


def prepare(recipe: Recipe, name: str, mesh: Mesh, workdir: Path | None = None) -> Stage:
    """Builds a stage.

    Args:
      recipe: the recipe.
      name: of the stage.
      mesh: where it runs.
      workdir: directory of the run, from which the teacher is restored; None leaves the teacher
        abstract, for checks and ahead-of-time compilation.
    """
    stage = recipe.stages[name]
    data = config_lib.data_of(recipe.data, stage.data)
    source = source_loader(data, recipe, workdir)
    train = source('train')
    mesh_lib.check_batch_size(stage.batch_size, mesh, where=f'{name}.batch_size')
    locate = (lambda reference: recipe.locate(reference, workdir)) if workdir else None
    network = build_network(stage.network, train, where=f'{name}.network', locate=locate)
    trained = _trained_networks(recipe, name, workdir, mesh, train, network)
    for label, found in trained.items():
        if label != START and found.data:
            _check_data(found, data, train, where=_place(name, label))
    networks = {label: found.network for label, found in trained.items()}

    def optimizer(**arguments: Any) -> optax.GradientTransformation:
        try:
            return optim.optimizer(stage.steps, **arguments)
        except (TypeError, ValueError) as error:
            raise UserError(f'{name}.optimizer: {error}') from error

    context = Context(
        stage=name,
        optional_network=network,
        optional_teacher=networks.get('teacher'),
        optional_tx=optimizer(**stage.optimizer) if stage.optimizer else None,
        optimizer=optimizer,
        spec=train.spec,
        num_classes=train.num_classes,
        steps=stage.steps,
        batch_size=stage.batch_size,
        source=source,
        splits=splits(data),
        recipe_source=source_loader(recipe.data, recipe, workdir),
        locate=locate,
        references={label: net for label, net in networks.items() if label != 'teacher'},
        trained_by={label: found.method for label, found in trained.items()},
        config=stage,
        recipe=recipe,
        rollout=partial(
            rollout,
            rules=rollout_rules(recipe.sharding, recipe.rollout_sharding),
            mesh=mesh,
            dtype=recipe.rollout_dtype,
        ),
        mesh=mesh,
    )
    method = config_lib.build(stage.method, context, where=f'{name}.method')
    method = with_result(method, stage.result, where=f'{name}.result')
    if network and adapter_of(network.module):
        method = with_base(method, START, where=f'{name}.network')
    if stage.ema:
        method = with_ema(method, stage.ema)
    return Stage(
        name=name,
        config=stage,
        context=context,
        method=with_nonfinite_guard(method, recipe.on_nonfinite),
        mesh=mesh,
        frozen=_frozen(stage, trained, restored=workdir is not None),
        evaluators=_evaluators(stage, context),
        writers=_writers(stage, context),
        sharding=recipe.sharding,
        seed=recipe.seed,
        trained=trained,
    )


def _trained_networks(recipe, name, workdir, mesh, train, network) -> dict[str, Trained]:
    """The stage's teacher, under 'teacher', and its references by their labels."""
    stage, trained = recipe.stages[name], {}
    if stage.teacher:
        weights, where = stage.teacher_weights, _place(name, 'teacher')
        trained['teacher'] = trained_network(
            recipe, stage.teacher, workdir, mesh, train, weights=weights, where=where
        )
        _check_classes(name, network, trained['teacher'].network)
    if 'teacher' in stage.references:
        raise UserError(f"{name}.references cannot name one 'teacher'; set {name}.teacher.")
    for label, reference in stage.references.items():
        reference, weights = split_reference(reference)
        trained[label] = trained_network(
            recipe, reference, workdir, mesh, train, weights=weights, where=_place(name, label)
        )
    return trained


def _frozen(stage: StageConfig, trained: Mapping[str, Trained], *, restored: bool) -> dict:
    """Variables by label; a network of two labels, such as a teacher to start from, lies in memory
    once."""
    named = {label: split_reference(reference) for label, reference in stage.references.items()}
    named['teacher'] = stage.teacher, stage.teacher_weights
    once: dict[Any, Any] = {}
    for label, found in trained.items():
        if named[label] not in once:
            once[named[label]] = found.restore() if restored else found.abstract
    return {label: once[named[label]] for label in trained}


def _place(name: str, label: str) -> str:
    return f'{name}.teacher' if label == 'teacher' else f'{name}.references.{label}'


def _check_data(
    found: Trained, data: Mapping[str, Any], train: sources.Source, *, where: str
) -> None:
    """Refuses a network that was trained on other data, or saw its inputs in another way."""
    if all(found.data.get(key) == data.get(key) for key in ('name', 'source')):
        return
    try:
        its_own = source_loader(found.data, found.recipe, None)('train')
    except UserError as error:
        raise UserError(f'{where}: the data it was trained on cannot be opened: {error}') from error
    theirs, ours = ((one.domain, one.seen) for one in (its_own, train))
    if theirs != ours:
        raise UserError(
            f'{where} was trained on {" with ".join(filter(None, theirs))}, and the stage takes '
            f'{" with ".join(filter(None, ours))}; give both the same data.'
        )
    tokens, our_tokens = (getattr(one, 'tokenizer', None) for one in (its_own, train))
    if tokens and our_tokens:
        tokenizer.check_same(tokens, our_tokens, where=where)


def _evaluators(stage: StageConfig, context: Context) -> dict[str, tuple[str, Any]]:
    """{label: (split, evaluator or probe)}."""
    made = {}
    for label, block in stage.evaluators.items():
        block = dict(block)
        split = block.pop('split', 'validation')
        where = f'{context.stage}.evaluators.{label}'
        made[label] = (split, config_lib.build(block, context, where=where))
    return made


def _writers(stage: StageConfig, context: Context) -> dict[str, tuple[int, Any]]:
    """{label: (every so many steps, writer)}."""
    made = {}
    for label, block in stage.writers.items():
        block, where = dict(block), f'{context.stage}.writers.{label}'
        every = block.pop('every', stage.steps)
        check_value(Count, every, where=f'{where}.every')
        made[label] = (every, config_lib.build(block, context, where=where))
    return made


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def _check_classes(name: str, network: Network | None, teacher: Network) -> None:
    if network is None:
        return
    shapes = [output_shape(one) for one in (network, teacher)]
    ours, theirs = (shape[-1] for shape in shapes)
    # Vocabularies are padded to a convenient number; what both have is compared.
    sequences = all(len(shape) > 2 for shape in shapes)
    if ours != theirs and not sequences:
        raise UserError(
            f'{name}: the student has {ours} classes and its teacher {theirs}; '
            f'change {name}.network.num_classes or {name}.teacher.'
        )
