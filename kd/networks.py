"""Networks built from their blocks, and trained ones: of other stages, and of other libraries."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from kd import bases, callables, files
from kd import config as config_lib
from kd.config import Block, Recipe
from kd.errors import UserError, did_you_mean, one_line
from kd.io import finished, found, pretrained
from kd.models import adapters, elastic
from kd.models.elastic_space import Architecture
from kd.network import Network, from_linen
from kd.parallel.sharding import tree_shardings
from kd.references import START, Pretrained, split_reference
from kd.state import NETWORK
from kd.text import tokenizer


class Described(Protocol):
    """What a network needs to know of data: a `kd.data.sources.Source`, for example."""

    @property
    def spec(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of each field of an example."""

    @property
    def num_classes(self) -> int | None:
        """None where there are no labels."""


def build_network(
    block: Block,
    source: Described,
    *,
    where: str,
    locate: Callable[[str], Path] | None = None,
) -> Network | None:
    """A network for the inputs of a data source, or None for {}.

    `num_classes` is filled in from the data where the module takes it and the block is silent.

    A module takes the field `input` of the data, or those that its attribute `fields` names; where
    that is None, its `required_fields` and those of its `optional_fields` that the data have. One
    that takes what no field gives, such as times, says so by a method `example_inputs(spec)`, which
    returns the shapes of a batch of one. Of data in pairs it sees one answer at a time.

    What earlier stages have found for it (`kd.io.found`) lies where `locate` says; without it the
    network is that of a recipe that is only traced.
    """
    if not block:
        return None
    block, spec = found.resolved(block, locate, where), _seen(source)
    factory = callables.resolve(block.get('name', ''))
    if 'num_classes' in inspect.signature(factory).parameters:
        given = block.setdefault('num_classes', source.num_classes)
        _check_classes(given, source.num_classes, spec, where)
    module = config_lib.build(block, where=where)
    if getattr(module, 'fields', ()) is None:
        known = [name for name in module.optional_fields if name in spec]
        module = module.clone(fields=(*module.required_fields, *known))
    if hasattr(module, 'example_inputs'):
        inputs = module.example_inputs(spec)
    else:
        inputs = tuple(
            jax.ShapeDtypeStruct((1, *field.shape), field.dtype)
            for field in _fields(module, spec, where)
        )
    network = from_linen(module, *inputs)
    with one_line(where):
        jax.eval_shape(network.init, jax.random.key(0))
    return network


def sliced(network: Network, arch: Architecture) -> Network:
    """The network of one architecture of an elastic one by itself; `arch` are numbers.

    `kd.models.elastic.slice_variables` has its variables.
    """
    module = elastic.elastic(network, 'the network').plain(arch)
    return from_linen(module, *network.inputs)


def _seen(source: Described) -> Mapping[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of each field of an example as networks see it."""
    if not getattr(source, 'pairs', False):
        return source.spec
    return {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in source.spec.items()}


def _fields(
    module: Any, spec: Mapping[str, jax.ShapeDtypeStruct], where: str
) -> list[jax.ShapeDtypeStruct]:
    names = getattr(module, 'fields', ('input',))
    if missing := [name for name in names if name not in spec]:
        raise UserError(
            f'{where}: {type(module).__name__} takes the fields {list(names)}, and the data has no '
            f'{missing}, only {list(spec)}.'
        )
    return [spec[name] for name in names]


def _check_classes(
    given: int | None,
    classes: int | None,
    spec: Mapping[str, jax.ShapeDtypeStruct],
    where: str,
) -> None:
    """Refuses a number of classes that is not the data's; a vocabulary may be padded."""
    if given is None or classes is None or given == classes:
        return
    label = spec.get('label')
    if label is None and np.issubdtype(spec['input'].dtype, np.integer):
        # Tokens are labels of each other.
        label = spec['input']
    if given < classes or label is None or not label.shape:
        raise UserError(
            f'{where}.num_classes is {given}, and the data has {classes} classes; leave it out, '
            'which is as many.'
        )


@dataclasses.dataclass(frozen=True)
class Trained:
    """The network that a stage trains or has trained, or that somebody else has.

    Attributes:
      network: the network.
      abstract: its variables, with shardings, nothing read.
      verify: raises `UserError` unless the stage is finished and its checkpoint fits, or the file
        is there and fits, or it is of a base that is still to be trained; reads no variables.
      restore: reads the variables; raises as `verify` does.
      method: block of the method that trains it, {} of somebody else's network.
      data: block of the data it is trained on, as of a recipe, {} of somebody else's network.
      recipe: the stage's, which may be that of another run.
    """

    network: Network
    abstract: Any
    verify: Callable[[], Any]
    restore: Callable[[], Any]
    method: Block
    data: Mapping[str, Any]
    recipe: Recipe


def trained_network(
    recipe: Recipe,
    reference: str,
    workdir: Path | None,
    mesh: Mesh,
    source: Described,
    *,
    weights: str = 'final',
    where: str,
) -> Trained:
    """Finds the network of a stage, or one that somebody else has trained.

    Of a stage that trains adapters it is the base with the adapters merged into it.

    Args:
      recipe: the recipe.
      reference: see `kd.references`.
      workdir: of this run; None if nothing will be restored.
      mesh: where the variables go, by the recipe's `frozen_sharding`.
      source: data the network is applied to.
      weights: 'final', or the name of an average that the stage keeps.
      where: place in the config, for messages.
    """
    foreign = recipe.foreign(reference)
    if foreign is not None:
        if weights != 'final':
            raise UserError(f"{where}: there is no '{weights}' of '{reference}', only 'final'.")
        return _pretrained(recipe, foreign, mesh, source, where)
    directory = recipe.locate(reference, workdir)
    stage, its_recipe = stage_of(recipe, reference, directory, where)
    part = stage.get('result', NETWORK)
    averages = [name for name, kept in stage['ema'].items() if _is_of(part, kept)]
    network = build_network(
        stage['network'],
        source,
        where=f'{where} ({reference})',
        locate=_beside(directory) if workdir or reference not in recipe.stages else None,
    )
    if network is None:
        raise UserError(f"{where}: stage '{reference}' trains no network.")
    if weights != 'final' and weights not in averages:
        raise UserError(
            f"{where}: there is no '{weights}'; stage '{reference}' has: {['final', *averages]}."
        )
    abstract = _abstract(network, recipe, mesh)
    adapted = adapters.adapter_of(network.module) is not None
    if adapted:
        abstract = {**abstract, 'params': adapters.own(abstract['params'])}

    def verify() -> int | None:
        if _is_missing_base(recipe, directory):
            return None
        done = finished.read_done(directory)
        if done is None:
            raise UserError(f'{where}: {directory} is not a finished stage (it has no done.json).')
        wanted = finished.of_part(abstract, part, weights)
        finished.check_variables(directory, done['step'], wanted, where)
        return done['step']

    def restore() -> Any:
        step = verify()
        if step is None:
            raise UserError(f'{where}: {directory.parent} is a base that has not been trained.')
        return finished.restore_part(directory, step, abstract, where, part, weights)

    data = config_lib.data_of(its_recipe.data, stage['data'])
    trained = Trained(network, abstract, verify, restore, stage['method'], data, its_recipe)
    if not adapted:
        return trained
    adapters.check_merges(network.module, where)
    home = workdir if reference in recipe.stages else directory.parent
    its_recipe = dataclasses.replace(its_recipe, frozen_sharding=recipe.frozen_sharding)
    below, weights = split_reference(stage['references'][START])
    return _merged(
        trained,
        trained_network(its_recipe, below, home, mesh, source, weights=weights, where=where),
    )


def _merged(of: Trained, base: Trained) -> Trained:
    """A network whose adapters are part of its kernels, which is one of the base's kind."""
    module: Any = of.network.module
    network = from_linen(adapters.plain(module), *of.network.inputs)
    scale, heads = module.adapter.scale, adapters.MOMENTUM
    own = of.abstract['params']
    params = {**base.abstract['params'], **({heads: own[heads]} if heads in own else {})}

    def verify() -> None:
        base.verify()
        of.verify()

    def restore() -> Any:
        places = jax.tree.map(lambda x: x.sharding, params)
        merge = jax.jit(lambda below, own: adapters.merged(below, own, scale), out_shardings=places)
        below, own = base.restore(), of.restore()
        return {**below, 'params': merge(below['params'], own['params'])}

    return dataclasses.replace(
        of,
        network=network,
        abstract={**base.abstract, 'params': params},
        verify=verify,
        restore=restore,
    )


def described_network(
    recipe: Recipe, reference: str, workdir: Path | None, source: Described, *, where: str
) -> Network:
    """The network behind a reference, without a look at its weights; see `trained_network`."""
    foreign = recipe.foreign(reference)
    if foreign is not None:
        with _told(where):
            network = build_network(foreign.block, source, where=where)
    else:
        directory = recipe.locate(reference, workdir)
        stage, _ = stage_of(recipe, reference, directory, where)
        network = build_network(
            stage['network'],
            source,
            where=f'{where} ({reference})',
            locate=_beside(directory) if workdir or reference not in recipe.stages else None,
        )
    if network is None:
        raise UserError(f"{where}: stage '{reference}' trains no network.")
    if adapters.adapter_of(network.module):
        adapters.check_merges(network.module, where)
        module: Any = network.module
        network = from_linen(adapters.plain(module), *network.inputs)
    return network


def _beside(directory: Path) -> Callable[[str], Path]:
    """Directories of the stages of the same run."""
    return lambda stage: directory.parent / stage


def stage_of(
    recipe: Recipe, reference: str, directory: Path, where: str
) -> tuple[dict[str, Any], Recipe]:
    """The config of a stage of this recipe, a base or another run, and its recipe."""
    if reference in recipe.stages:
        return dataclasses.asdict(recipe.stages[reference]), recipe
    if _is_missing_base(recipe, directory):
        base = bases.recipe(recipe.bases[str(directory.parent)])
        if directory.name not in base.stages:
            raise UserError(
                f"{where}: the base {directory.parent} has no stage '{directory.name}'."
                f'{did_you_mean(directory.name, base.stages)} Stages: {", ".join(base.stages)}.'
            )
        return dataclasses.asdict(base.stages[directory.name]), base
    return _stored_stage(directory, where, recipe)


def _is_missing_base(recipe: Recipe, directory: Path) -> bool:
    """Whether a stage is of one of the recipe's `bases` that is still to be trained."""
    return str(directory.parent) in recipe.bases and finished.read_done(directory) is None


def _abstract(network: Network, recipe: Recipe, mesh: Mesh) -> Any:
    """Variables of a frozen network, with shardings."""
    abstract = jax.eval_shape(network.init, jax.random.key(0))
    shardings = tree_shardings(abstract, recipe.frozen_sharding, mesh)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
    )


def _pretrained(
    recipe: Recipe, foreign: Pretrained, mesh: Mesh, source: Described, where: str
) -> Trained:
    """A network from the file of another library."""
    weights = foreign.weights
    with _told(where):
        network = build_network(foreign.block, source, where=where)
    assert network is not None
    abstract = _abstract(network, recipe, mesh)

    def verify() -> None:
        with _told(where):
            described = pretrained.describe(weights)
            pretrained.check_agreement(described, network.module, foreign.network)
            pretrained.check(weights, abstract)
            ours = getattr(source, 'tokenizer', None)
            if ours is not None and described.tokenizer:
                tokenizer.check_same(tokenizer.load(described.tokenizer), ours)

    def restore() -> Any:
        verify()
        with _told(where):
            return pretrained.load(weights, abstract)

    return Trained(network, abstract, verify, restore, {}, {}, Recipe(stages={}, data={}))


@contextlib.contextmanager
def _told(where: str) -> Iterator[None]:
    """Lets what is wrong with a file begin with the place in the config that names it."""
    try:
        yield
    except UserError as error:
        text = str(error)
        raise UserError(text if text.startswith(where) else f'{where}: {text}') from error


def _is_of(part: str, average: Any) -> bool:
    of = average.get('of', ()) if isinstance(average, Mapping) else ()
    return not of or part in ((of,) if isinstance(of, str) else of)


def _stored_stage(directory: Path, where: str, recipe: Recipe) -> tuple[dict[str, Any], Recipe]:
    """The config of a stage of another run, and the recipe of that."""
    file = directory.parent / 'config.json'
    if not file.exists():
        raise UserError(
            f"{where}='{directory}' is neither a stage of this recipe ({list(recipe.stages)}) nor "
            'the directory of a stage of another run (such as runs/teacher/teacher).'
            f'{did_you_mean(str(directory), [*recipe.stages, *recipe.pretrained])}'
        )
    stored = files.read_json(file, 'the lines of manifest.json beside it hold it too')
    if directory.name not in stored:
        raise UserError(f"{where}: the run in {directory.parent} has no stage '{directory.name}'.")
    plain = config_lib.to_plain(stored)
    block = plain[directory.name]
    if not isinstance(block, dict) or not {'network', 'ema'} <= set(block):
        raise UserError(f"{file} is damaged: '{directory.name}' is no stage in it.")
    try:
        its_recipe = config_lib.parse(plain)
    except UserError:
        # Of another version of kd, perhaps: its data are what counts.
        its_recipe = Recipe(stages={}, data=plain.get('data', {}))
    # Where data lie is a matter of this run.
    return block, dataclasses.replace(its_recipe, data_dir=recipe.data_dir)
