"""Configs: what a recipe and a stage may say, and objects built from them by import path.

A config file returns `recipe(...)` with one `stage(...)` per name in `stages`: an
`ml_collections.ConfigDict` with every field of `Recipe` and `StageConfig`, which the command line
may change. `parse` turns it into these frozen values once, when a run begins, and says what is
wrong with it. A block with a `name`,

    {'name': 'kd.models.mlp.MLP', 'widths': (64, 64)}

names a callable by its import path and gives its keyword arguments; `build` calls it. Methods,
evaluators, writers, sources and reports are called as `name(context, **arguments)`, each with the
context of its kind. Your own code is named the same way: anything importable from where you start
the run will do.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from kd import callables, files, ranges
from kd.errors import UserError, did_you_mean, one_line
from kd.ranges import Count, Fraction, Seed, Size, Whole
from kd.references import (
    Pretrained,
    is_foreign,
    parse_pretrained,
    split_foreign,
    split_reference,
)

# A mapping with a `name` and arguments, or {} where there is none.
Block = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One method run on one data source until done.

    Attributes:
      method: block of the method's builder.
      steps: training steps.
      batch_size: global batch size, over all devices and hosts.
      poisson: the expected number of examples in a batch where each is taken by a coin of its own,
        as private training needs it; 0 where batches are cut from a shuffled order. `batch_size` is
        then the rows of a batch, and the field `mask` says which of them hold an example.
      network: block of the linen module that is trained.
      optimizer: arguments of `kd.training.optimizer.optimizer`.
      teacher: a trained network: an earlier stage, the directory of a finished one, an entry of the
        recipe's `pretrained`, 'hf:DIRECTORY' or 'gguf:FILE', see `kd.references`; '' for none.
      teacher_weights: 'final' or the name of an average kept by the teacher's stage.
      references: further frozen networks by name, each as `teacher` is one; with 'stage@average'
        the average of that name which the stage keeps. A stage starts from the one named `start`.
      writers: blocks by name of functions that write files from the state, each with its `every`.
      evaluators: blocks by name, each with its `split`.
      result: the part of what the method trains that is the stage's result: what is evaluated,
        averaged, exported, and found by later stages.
      ema: {name: decay} of averages of the result to keep, or {name: fields of
        `kd.method.averages.Average`}.
      data: keys of the recipe's `data` that this stage changes; with a `source`, all of its own.
      log_every, eval_every, checkpoint_every: in steps; eval_every 0 means at the end only.
      keep: how many of the latest checkpoints to keep.
      best: a metric 'evaluator/metric' whose best checkpoint is kept too, prefixed '-' if lower
        is better; '' for none.
      final: 'last' or 'best', the checkpoint that counts as the stage's result.
    """

    method: Block
    steps: Count
    batch_size: Count
    poisson: Size = 0
    network: Block = dataclasses.field(default_factory=dict)
    optimizer: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    teacher: str = ''
    teacher_weights: str = 'final'
    references: Mapping[str, str] = dataclasses.field(default_factory=dict)
    writers: Mapping[str, Block] = dataclasses.field(default_factory=dict)
    evaluators: Mapping[str, Block] = dataclasses.field(default_factory=dict)
    result: str = 'network'
    ema: Mapping[str, Fraction | Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    log_every: Count = 100
    eval_every: Size = 0
    checkpoint_every: Count = 1000
    keep: Count = 2
    best: str = ''
    final: str = 'last'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """An experiment: stages in order, on one data set.

    Attributes:
      stages: by name, in the order in which they run.
      data: `name` of the data set and its `train`, `validation` and `test` splits, or a `source`
        and its splits; a stage may bring its own.
      pretrained: networks that others have trained, by the names that stages give as `teacher` or
        among `references`; each has `weights`, 'hf:DIRECTORY' or 'gguf:FILE', and `network`, a
        block. Without one, the network is what the file describes, its parameters float32:

            teacher=dict(weights='gguf:SmolLM2-135M-Instruct.Q4_1.gguf')

        A block without a `name` changes that. One with a name is the network itself; the file may
        then be missing while a recipe is only compiled, and must agree with it where it is read:

            teacher=dict(
                weights='hf:/models/Qwen3-8B',
                network=dict(name='kd.models.decoders.preset', of='qwen3_8b',
                             dtype='bfloat16', param_dtype='bfloat16'))

      bases: {work directory: 'configs/x.py:argument'} of recipes whose stages this one names by
        their directories, and which are run first where they are not there; see `kd.bases`.
      report: block of the function that writes the report at the end; {} for no report.
      seed: seed of everything: initialisation, data order, augmentation, dropout.
      data_dir: tfds data directory; '' means TFDS_DATA_DIR or ~/tensorflow_datasets.
      on_nonfinite: 'stop' ends the run before a non-finite update; 'skip' leaves the update out
        and counts it.
      mesh: devices along the axes data, fsdp and tensor; -1 means all that are left.
      sharding: (regular expression, spec) pairs, the first that matches a leaf of the trained
        state decides; a spec is a tuple of mesh axes as in PartitionSpec, or 'fsdp' to shard the
        largest dimension that divides. Leaves without a match are replicated.
      frozen_sharding: the same for teachers and references.
      rollout_sharding: the same for weights that a method samples with inside its step, see
        `kd.context.Context.rollout`; () for `sharding` without the axes that share the batch, so
        that a loop over tokens gathers nothing.
      rollout_dtype: type of these weights, such as 'bfloat16'; '' keeps theirs.
      profile: `start` and `steps` of a window in which a profiler trace is written (steps 0: none).
    """

    stages: Mapping[str, StageConfig]
    data: Mapping[str, Any]
    pretrained: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    bases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    report: Block = dataclasses.field(default_factory=dict)
    seed: Seed = 0
    data_dir: str = ''
    on_nonfinite: str = 'stop'
    mesh: Mapping[str, Whole] = dataclasses.field(
        default_factory=lambda: {'data': -1, 'fsdp': 1, 'tensor': 1}
    )
    sharding: tuple[tuple, ...] = ()
    frozen_sharding: tuple[tuple, ...] = ()
    rollout_sharding: tuple[tuple, ...] = ()
    rollout_dtype: str = ''
    profile: Mapping[str, Size] = dataclasses.field(
        default_factory=lambda: {'start': 10, 'steps': 0}
    )

    def locate(self, reference: str, workdir: Path | None) -> Path:
        """Directory of a stage, by its name in this recipe or its path in another run.

        Of a network that others have trained its directory or file.
        """
        foreign = self.foreign(reference)
        if foreign is not None:
            return split_foreign(foreign.weights)[1]
        if reference in self.stages:
            return (workdir or Path()) / reference
        return files.local(reference, 'a stage of another run')

    def foreign(self, reference: str) -> Pretrained | None:
        """What a reference names that others have trained; None where it names a stage."""
        if is_foreign(reference):
            return Pretrained(reference)
        entry = self.pretrained.get(reference)
        return None if entry is None else Pretrained(**entry)

    def plain(self) -> dict[str, Any]:
        """The config that `parse` turns into this recipe, in plain dicts and tuples."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        blocks = {name: dataclasses.asdict(stage) for name, stage in self.stages.items()}
        return {**fields, 'stages': tuple(self.stages), **blocks}


def recipe(*, stages: Iterable[str], data: Mapping[str, Any], **fields: Any) -> ConfigDict:
    """The config of an experiment, to which a config file adds a `stage` of each name.

    Args:
      stages: names of the stages, run in this order; each is a block of the same name.
      data: see `Recipe`.
      **fields: the other fields of `Recipe`; of `mesh` and `profile` only what differs from the
        defaults. None leaves a field at its default.
    """
    default = Recipe(stages={}, data={})
    given = _given(fields)
    for name in ('mesh', 'profile'):
        given[name] = getattr(default, name) | dict(given.get(name, {}))
    made = Recipe(stages={}, data=to_plain(data), **given)
    return ConfigDict({**made.plain(), 'stages': tuple(stages)})


def stage(**fields: Any) -> ConfigDict:
    """The config of a stage: fields of `StageConfig`; None leaves one at its default."""
    return ConfigDict(dataclasses.asdict(StageConfig(**_given(fields))))


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    required = ('method', 'steps', 'batch_size')
    return to_plain({k: v for k, v in fields.items() if v is not None or k in required})


def load(path: str) -> ConfigDict:
    """Calls `get_config` of the file in `path`, 'configs/x.py' or 'configs/x.py:argument'."""
    file, _, argument = path.partition(':')
    if not Path(file).is_file():
        near = [str(p) for p in Path('configs').rglob('*.py')]
        raise UserError(f'There is no config file {file}.{did_you_mean(file, near)}')
    with one_line(path):
        module = load_module(Path(file))
        if not hasattr(module, 'get_config'):
            raise UserError(f'{file} has no function get_config.')
        config = module.get_config(argument) if argument else module.get_config()
        if not isinstance(config, ConfigDict):
            raise UserError(
                f'{path}: get_config returns {type(config).__name__} instead of a config, as '
                'kd.config.recipe makes it.'
            )
        return config


def load_module(file: Path) -> ModuleType:
    """Imports a config file by its path."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def variant(argument: str, known: Mapping[str, Any]) -> Any:
    """The value of `known[argument]`, for `get_config(argument)`; lists the variants otherwise."""
    if argument not in known:
        raise UserError(
            f"There is no variant '{argument}'.{did_you_mean(argument, known)} "
            f'Variants: {", ".join(known)}.'
        )
    return known[argument]


def parse(config: ConfigDict | Mapping[str, Any]) -> Recipe:
    """The recipe of a config, all of it checked that can be without building anything.

    Raises:
      UserError: missing, unknown or impossible keys.
    """
    plain = to_plain(config)
    known = _names(Recipe)
    if missing := known - set(plain):
        raise UserError(f'The config lacks {_list(missing)}; build it with kd.config.recipe.')
    names = plain.pop('stages')
    if not names:
        raise UserError('The config names no stages.')
    stages = {}
    for name in names:
        if name in known:
            raise UserError(f"A stage cannot be called '{name}', which is a field of the recipe.")
        if name not in plain:
            raise UserError(f"stages names '{name}' but the config has no block of that name.")
        stages[name] = _stage(name, plain.pop(name))
    for name in plain:
        if name not in known:
            raise UserError(
                f"The config has an unknown key '{name}'.{did_you_mean(name, known)} "
                f'A block for a stage must be named in stages={names}.'
            )
    ranges.check(Recipe, plain, where='')
    parse_pretrained(plain['pretrained'], stages)
    made = Recipe(stages=stages, **plain)
    if made.on_nonfinite not in ('stop', 'skip'):
        raise UserError(f"on_nonfinite must be 'stop' or 'skip', got '{made.on_nonfinite}'.")
    files.local(made.data_dir, 'data_dir')
    if set(made.profile) != {'start', 'steps'}:
        raise UserError(f"profile has the keys 'start' and 'steps', not {_list(made.profile)}.")
    for name in stages:
        _check_references(made, name)
    return made


def _stage(name: str, plain: Mapping[str, Any]) -> StageConfig:
    known = _names(StageConfig)
    for key in plain:
        if key not in known:
            raise UserError(f"Unknown key '{name}.{key}'.{did_you_mean(key, known)}")
    if known - set(plain):
        raise UserError(f'{name} lacks {_list(known - set(plain))}.')
    # An emptied block is none.
    labelled = {key: _named(plain[key]) for key in ('evaluators', 'writers')}
    ranges.check(StageConfig, plain, where=name)
    stage = StageConfig(**{**plain, **labelled})
    if stage.poisson > stage.batch_size:
        raise UserError(
            f'{name}.poisson={stage.poisson} examples are expected in a batch, which has '
            f'{name}.batch_size={stage.batch_size} rows; it needs a few more than are expected.'
        )
    if stage.final not in ('last', 'best'):
        raise UserError(f"{name}.final must be 'last' or 'best', got '{stage.final}'.")
    if stage.final == 'best' and not stage.best:
        raise UserError(f"{name}.final is 'best', so {name}.best must name a metric.")
    # A metric that never comes would be found missing only when the training is over.
    evaluator = stage.best.lstrip('-').partition('/')[0]
    if stage.best and evaluator not in (*stage.evaluators, 'train'):
        raise UserError(
            f"{name}.best='{stage.best}' names no evaluator of the stage."
            f'{did_you_mean(evaluator, stage.evaluators)} It has: {_list(stage.evaluators)}.'
        )
    return stage


def _named(blocks: Mapping[str, Block]) -> dict[str, Block]:
    return {label: block for label, block in blocks.items() if block}


def _check_references(recipe: Recipe, name: str) -> None:
    stage, names = recipe.stages[name], tuple(recipe.stages)
    for key in stage.data if 'source' not in stage.data else ():
        if key not in recipe.data:
            raise UserError(
                f"{name}.data changes '{key}', which config.data does not have."
                f'{did_you_mean(key, recipe.data)}'
            )
    earlier = names[: names.index(name)]
    named = {'teacher': stage.teacher}
    named |= {f'references.{label}': split_reference(r)[0] for label, r in stage.references.items()}
    for field, reference in named.items():
        if recipe.foreign(reference) is not None:
            continue
        if reference not in names:
            files.local(reference, f'{name}.{field}')
        elif reference not in earlier:
            raise UserError(
                f"{name}.{field}='{reference}' must come before '{name}' in stages={names}."
            )


def _names(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def data_of(recipe: Mapping[str, Any], stage: Mapping[str, Any]) -> Mapping[str, Any]:
    """The data of a stage, from the blocks `data` of its recipe and its own."""
    return stage if 'source' in stage else {**recipe, **stage}


def build(block: Mapping[str, Any], *args: Any, where: str, **extra: Any) -> Any:
    """Calls the callable that a block names with the block's other entries as keywords.

    Args:
      block: mapping with 'name' and keyword arguments, in plain values.
      *args: positional arguments that come before.
      where: place in the config, for messages.
      **extra: keyword arguments that the block must not set.
    """
    function, arguments = callables.named(block, where=where, reserved=extra)
    with one_line(where):
        return function(*args, **arguments, **extra)


def to_plain(value: Any) -> Any:
    """Nested ConfigDicts and lists as dicts and tuples."""
    if isinstance(value, ConfigDict):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(to_plain(item) for item in value)
    return value


def first_difference(old: Mapping, new: Mapping, prefix: str = '') -> str | None:
    """The first leaf in which two plain configs differ, in words."""
    for key in sorted(set(old) | set(new)):
        place = f'{prefix}{key}'
        if key not in old or key not in new:
            return f'{place} is only in the {"new" if key in new else "old"} config'
        if isinstance(old[key], Mapping) and isinstance(new[key], Mapping):
            found = first_difference(old[key], new[key], f'{place}.')
            if found:
                return found
        elif old[key] != new[key]:
            return f'{place} was {old[key]!r} and is {new[key]!r}'
    return None


def _list(names: Iterable[str]) -> str:
    return ', '.join(f"'{name}'" for name in sorted(names))
