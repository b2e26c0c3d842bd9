"""A stage made ready to run: networks, teacher, method and evaluators from its config block."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kd import config as config_lib
from kd.context import Context, Evaluator, Probe, Writer
from kd.data import catalogue, pipeline, sources
from kd.errors import UserError, did_you_mean
from kd.io import checkpoints
from kd.method import Method, State, with_ema, with_nonfinite_guard
from kd.network import Network, from_linen
from kd.parallel import mesh as mesh_lib
from kd.parallel.sharding import tree_shardings
from kd.training import optimizer as optim


@dataclasses.dataclass
class Stage:
    """Everything the loop needs for one stage."""

    name: str
    config: config_lib.ConfigDict
    context: Context
    method: Method
    mesh: Mesh
    frozen: dict[str, Any]  # variables by name ('teacher', ...), abstract or not
    evaluators: dict[str, tuple[str, Evaluator | Probe]]
    writers: dict[str, tuple[int, Writer]]
    sharding: tuple
    seed: int

    def batches(self, split: str = 'train') -> grain.DatasetIterator:
        """This host's part of the training batches, endless and checkpointable."""
        return pipeline.train_iterator(
            self.context.source(split),
            self.config.batch_size,
            seed=self.seed,
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
        index = list(self.context.config.stages).index(self.name)
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


def prepare(
    config: config_lib.ConfigDict, name: str, mesh: Mesh, workdir: Path | None = None
) -> Stage:
    """Builds a stage.

    Args:
      config: the recipe.
      name: of the stage.
      mesh: where it runs.
      workdir: directory of the run, from which the teacher is restored; None leaves the teacher
        abstract, for checks and ahead-of-time compilation.
    """
    stage = config[name]
    recipe_data = config_lib.to_plain(config.data)
    data = config_lib.to_plain(stage.data)
    data = data if 'source' in data else recipe_data | data
    source = source_loader(data, config, workdir)
    train = source('train')
    mesh_lib.check_batch_size(stage.batch_size, mesh, where=f'{name}.batch_size')
    network = build_network(stage.network, train, where=f'{name}.network')
    trained = _trained_networks(config, name, workdir, mesh, train, network)
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
        optional_tx=optimizer(**config_lib.to_plain(stage.optimizer)) if stage.optimizer else None,
        optimizer=optimizer,
        spec=train.spec,
        num_classes=train.num_classes,
        steps=stage.steps,
        batch_size=stage.batch_size,
        source=source,
        splits=tuple(key for key in data if key not in ('name', 'source')),
        recipe_source=source_loader(recipe_data, config, workdir),
        locate=(lambda ref: locate(config, ref, workdir)) if workdir else None,
        references={label: net for label, net in networks.items() if label != 'teacher'},
        config=config,
    )
    method = config_lib.build(stage.method, context, where=f'{name}.method')
    if stage.ema:
        method = with_ema(method, config_lib.to_plain(stage.ema))
    frozen = {
        label: found.restore() if workdir else found.abstract for label, found in trained.items()
    }
    return Stage(
        name=name,
        config=stage,
        context=context,
        method=with_nonfinite_guard(method, config.on_nonfinite),
        mesh=mesh,
        frozen=frozen,
        evaluators=_evaluators(stage, context),
        writers=_writers(stage, context),
        sharding=config_lib.to_plain(config.sharding),
        seed=config.seed,
    )


def _trained_networks(config, name, workdir, mesh, train, network) -> dict[str, Trained]:
    """The stage's teacher, under 'teacher', and its references by their labels."""
    stage, trained = config[name], {}
    if stage.teacher:
        weights, where = stage.teacher_weights, f'{name}.teacher'
        trained['teacher'] = trained_network(
            config, stage.teacher, workdir, mesh, train, weights=weights, where=where
        )
        _check_classes(name, network, trained['teacher'].network)
    if 'teacher' in stage.references:
        raise UserError(f"{name}.references cannot name one 'teacher'; set {name}.teacher.")
    for label, reference in stage.references.items():
        trained[label] = trained_network(
            config, reference, workdir, mesh, train, where=f'{name}.references.{label}'
        )
    return trained


def _evaluators(stage: config_lib.ConfigDict, context: Context) -> dict[str, tuple[str, Any]]:
    """{label: (split, evaluator or probe)}."""
    made = {}
    for label, block in stage.evaluators.items():
        block = config_lib.to_plain(block)
        split = block.pop('split', 'validation')
        where = f'{context.stage}.evaluators.{label}'
        made[label] = (split, config_lib.build(block, context, where=where))
    return made


def _writers(stage: config_lib.ConfigDict, context: Context) -> dict[str, tuple[int, Any]]:
    """{label: (every so many steps, writer)}."""
    made = {}
    for label, block in stage.writers.items():
        block, where = config_lib.to_plain(block), f'{context.stage}.writers.{label}'
        every = block.pop('every', stage.steps)
        if every <= 0:
            raise UserError(f'{where}.every must be positive, got {every}.')
        made[label] = (every, config_lib.build(block, context, where=where))
    return made


def source_loader(
    data: dict[str, Any], config: config_lib.ConfigDict, workdir: Path | None
) -> Callable[[str], sources.Source]:
    """`load(split)` for the splits named in `data`, each opened once.

    Data is named by `name`, for `kd.data.catalogue.load`; or by `source`, a block of a function
    `f(split, config, workdir, **arguments) -> Source` that makes it, from the files of an earlier
    stage for example. `workdir` is None while a recipe is only checked: what counts then is the
    source's spec and length.
    """
    if 'name' not in data and 'source' not in data:
        raise UserError("config.data has no 'name' of a data set.")
    opened: dict[str, sources.Source] = {}

    def load(split: str) -> sources.Source:
        if split not in data:
            splits = [key for key in data if key not in ('name', 'source')]
            raise UserError(f"config.data has no split '{split}', only {splits}.")
        if split not in opened:
            if 'source' in data:
                block, where = data['source'], 'data.source'
                opened[split] = config_lib.build(block, data[split], config, workdir, where=where)
            else:
                folder = config.data_dir or None
                opened[split] = catalogue.load(data['name'], data[split], data_dir=folder)
        return opened[split]

    return load


def build_network(block: Any, source: sources.Source, *, where: str) -> Network | None:
    """A network for the inputs of a data source; `num_classes` is filled in from the data.

    A module that takes more than `input` says so by a method `example_inputs(spec)`, which returns
    the shapes of a batch of one.
    """
    block = config_lib.to_plain(block)
    if not block:
        return None
    factory = config_lib.resolve(block.get('name', ''))
    if 'num_classes' in inspect.signature(factory).parameters:
        block.setdefault('num_classes', source.num_classes)
    module = config_lib.build(block, where=where)
    if hasattr(module, 'example_inputs'):
        inputs = module.example_inputs(source.spec)
    else:
        spec = source.spec['input']
        inputs = (jax.ShapeDtypeStruct((1, *spec.shape), spec.dtype),)
    network = from_linen(module, *inputs)
    try:
        jax.eval_shape(network.init, jax.random.key(0))
    except (ValueError, TypeError) as error:
        raise UserError(f'{where}: {error}') from error
    return network


@dataclasses.dataclass(frozen=True)
class Trained:
    """The network that a stage trains or has trained.

    Attributes:
      network: the network.
      abstract: its variables, with shardings, nothing read.
      restore: reads the variables; raises `UserError` unless the stage is finished and its
        checkpoint fits.
    """

    network: Network
    abstract: Any
    restore: Callable[[], Any]


def trained_network(
    config: config_lib.ConfigDict,
    reference: str,
    workdir: Path | None,
    mesh: Mesh,
    source: sources.Source,
    *,
    weights: str = 'final',
    where: str,
) -> Trained:
    """Finds the network of a stage.

    Args:
      config: the recipe.
      reference: name of a stage of this recipe, or the directory of a stage of another run.
      workdir: of this run; None if nothing will be restored.
      mesh: where the variables go, by the recipe's `frozen_sharding`.
      source: data the network is applied to.
      weights: 'final', or the name of an average that the stage keeps.
      where: place in the config, for messages.
    """
    directory = locate(config, reference, workdir)
    if reference in config.stages:
        block = config_lib.to_plain(config[reference])
    else:
        block = _stored_stage(directory, where, config)
    network = build_network(block['network'], source, where=f'{where} ({reference})')
    if network is None:
        raise UserError(f"{where}: stage '{reference}' trains no network.")
    if weights != 'final' and weights not in block['ema']:
        raise UserError(
            f"{where}_weights is '{weights}'; stage '{reference}' has: {['final', *block['ema']]}."
        )
    abstract = jax.eval_shape(network.init, jax.random.key(0))
    shardings = tree_shardings(abstract, config_lib.to_plain(config.frozen_sharding), mesh)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
    )

    def restore() -> Any:
        done = checkpoints.read_done(directory)
        if done is None:
            raise UserError(f'{where}: {directory} is not a finished stage (it has no done.json).')
        mutables = dict(abstract)
        params = mutables.pop('params')
        wanted = {'params': params} if weights == 'final' else {'ema': {weights: params}}
        if mutables:
            wanted['mutables'] = mutables
        restored = checkpoints.restore_variables(directory, done['step'], wanted, where)
        params = restored['params'] if weights == 'final' else restored['ema'][weights]
        return {'params': params, **restored.get('mutables', {})}

    return Trained(network, abstract, restore)


def locate(config: config_lib.ConfigDict, reference: str, workdir: Path | None) -> Path:
    """Directory of a stage, by its name in this recipe or its path in another run."""
    return (workdir or Path()) / reference if reference in config.stages else Path(reference)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def _stored_stage(directory: Path, where: str, config: config_lib.ConfigDict) -> dict[str, Any]:
    file = directory.parent / 'config.json'
    if not file.exists():
        raise UserError(
            f"{where}='{directory}' is neither a stage of this recipe ({list(config.stages)}) nor "
            'the directory of a stage of another run (such as runs/teacher/teacher).'
            f'{did_you_mean(str(directory), config.stages)}'
        )
    stored = json.loads(file.read_text())
    if directory.name not in stored:
        raise UserError(f"{where}: the run in {directory.parent} has no stage '{directory.name}'.")
    return stored[directory.name]


def _check_classes(name: str, network: Network | None, teacher: Network) -> None:
    if network is None:
        return
    shapes = []
    for net in (network, teacher):
        variables = jax.eval_shape(net.init, jax.random.key(0))
        shapes.append(
            jax.eval_shape(
                lambda v, *x, net=net: net.apply(v, *x).logits, variables, *net.inputs
            ).shape
        )
    if shapes[0][-1] != shapes[1][-1]:
        raise UserError(
            f'{name}: the student has {shapes[0][-1]} classes and its teacher {shapes[1][-1]}; '
            f'change {name}.network.num_classes or {name}.teacher.'
        )
