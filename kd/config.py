"""Configs: what a recipe and a stage may say, and objects built from them by import path.

A config file returns `recipe(...)` with one `stage(...)` per name in `stages`. Both functions list
every key there is, with its default; a key they do not know is an error. A block with a `name`,

    {'name': 'kd.models.mlp.MLP', 'widths': (64, 64)}

names a callable by its import path and gives its keyword arguments; `build` calls it. Your own
code is named the same way: anything importable from where you start the run will do.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from kd.errors import UserError, did_you_mean

# Fields that may differ between a run and its resumption.
RUNTIME_FIELDS = (
    *('mesh', 'sharding', 'frozen_sharding', 'data_dir', 'on_nonfinite', 'profile'),
    'report',
)


def recipe(
    *,
    stages: Iterable[str],
    data: Mapping[str, Any],
    report: Mapping[str, Any] | None = None,
    seed: int = 0,
    data_dir: str = '',
    on_nonfinite: str = 'stop',
    mesh: Mapping[str, int] | None = None,
    sharding: Iterable[tuple] = (),
    frozen_sharding: Iterable[tuple] = (),
    profile: Mapping[str, Any] | None = None,
) -> ConfigDict:
    """An experiment: stages in order, on one data set.

    Args:
      stages: names of the stages, run in this order; each is a block of the same name.
      data: `name` of the data set and its `train`, `validation` and `test` splits; a stage may
        bring its own.
      report: block of the function that writes the report at the end; None for no report.
      seed: seed of everything: initialisation, data order, augmentation, dropout.
      data_dir: tfds data directory; '' means TFDS_DATA_DIR or ~/tensorflow_datasets.
      on_nonfinite: 'stop' ends the run before a non-finite update; 'skip' leaves the update out
        and counts it.
      mesh: devices along the axes data, fsdp and tensor; -1 means all that are left.
      sharding: (regular expression, spec) pairs, the first that matches a leaf of the trained
        state decides; a spec is a tuple of mesh axes as in PartitionSpec, or 'fsdp' to shard the
        largest dimension that divides. Leaves without a match are replicated.
      frozen_sharding: the same for teachers and references.
      profile: `start` and `steps` of a window in which a profiler trace is written (steps 0: none).
    """
    return ConfigDict(
        {
            'stages': tuple(stages),
            'data': dict(data),
            'report': dict(report or {}),
            'seed': seed,
            'data_dir': data_dir,
            'on_nonfinite': on_nonfinite,
            'mesh': {'data': -1, 'fsdp': 1, 'tensor': 1} | dict(mesh or {}),
            'sharding': tuple(sharding),
            'frozen_sharding': tuple(frozen_sharding),
            'profile': {'start': 10, 'steps': 0} | dict(profile or {}),
        }
    )


def stage(
    *,
    method: Mapping[str, Any],
    steps: int,
    batch_size: int,
    network: Mapping[str, Any] | None = None,
    optimizer: Mapping[str, Any] | None = None,
    teacher: str = '',
    teacher_weights: str = 'final',
    references: Mapping[str, str] | None = None,
    writers: Mapping[str, Mapping[str, Any]] | None = None,
    evaluators: Mapping[str, Mapping[str, Any]] | None = None,
    ema: Mapping[str, float] | None = None,
    data: Mapping[str, Any] | None = None,
    log_every: int = 100,
    eval_every: int = 0,
    checkpoint_every: int = 1000,
    keep: int = 2,
    best: str = '',
    final: str = 'last',
) -> ConfigDict:
    """One method run on one data source until done.

    Args:
      method: block of the method's builder, called as `name(context, **arguments)`.
      steps: training steps.
      batch_size: global batch size, over all devices and hosts.
      network: block of the linen module that is trained.
      optimizer: arguments of `kd.training.optimizer.optimizer`.
      teacher: name of an earlier stage, or the directory of a finished stage; '' for none.
      teacher_weights: 'final' or the name of an average kept by the teacher's stage.
      references: further frozen networks, {name: stage or directory}, as `teacher` is one.
      writers: blocks by name of functions that write files from the state, each with its `every`.
      evaluators: blocks by name, each with its `split`.
      ema: {name: decay} of averages of the parameters to keep.
      data: keys of the recipe's `data` that this stage changes; with a `source`, all of its own.
      log_every, eval_every, checkpoint_every: in steps; eval_every 0 means at the end only.
      keep: how many of the latest checkpoints to keep.
      best: a metric 'evaluator/metric' whose best checkpoint is kept too, prefixed '-' if lower
        is better; '' for none.
      final: 'last' or 'best', the checkpoint that counts as the stage's result.
    """
    return ConfigDict(
        {
            'method': dict(method),
            'network': dict(network or {}),
            'optimizer': dict(optimizer or {}),
            'teacher': teacher,
            'teacher_weights': teacher_weights,
            'references': dict(references or {}),
            'writers': {name: dict(block) for name, block in (writers or {}).items()},
            'evaluators': {name: dict(block) for name, block in (evaluators or {}).items()},
            'ema': dict(ema or {}),
            'data': dict(data or {}),
            'steps': steps,
            'batch_size': batch_size,
            'log_every': log_every,
            'eval_every': eval_every,
            'checkpoint_every': checkpoint_every,
            'keep': keep,
            'best': best,
            'final': final,
        }
    )


def load(path: str) -> ConfigDict:
    """Calls `get_config` of the file in `path`, 'configs/x.py' or 'configs/x.py:argument'."""
    file, _, argument = path.partition(':')
    if not Path(file).is_file():
        near = [str(p) for p in Path('configs').rglob('*.py')]
        raise UserError(f'There is no config file {file}.{did_you_mean(file, near)}')
    module = load_module(Path(file))
    if not hasattr(module, 'get_config'):
        raise UserError(f'{file} has no function get_config.')
    try:
        config = module.get_config(argument) if argument else module.get_config()
    except UserError:
        raise
    except (ValueError, KeyError) as error:
        raise UserError(f'{path}: {error}') from error
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


def validate(config: ConfigDict) -> None:
    """Raises `UserError` where a recipe or its stages have missing, unknown or impossible keys."""
    known = set(recipe(stages=(), data={}))
    missing = known - set(config)
    if missing:
        raise UserError(f'The config lacks {_list(missing)}; build it with kd.config.recipe.')
    if not config.stages:
        raise UserError('The config names no stages.')
    if config.on_nonfinite not in ('stop', 'skip'):
        raise UserError(f"on_nonfinite must be 'stop' or 'skip', got '{config.on_nonfinite}'.")
    if set(config.profile) != {'start', 'steps'}:
        raise UserError(f"profile has the keys 'start' and 'steps', not {_list(config.profile)}.")
    for name in config:
        if name not in known and name not in config.stages:
            raise UserError(
                f"The config has an unknown key '{name}'.{did_you_mean(name, known)} "
                f'A block for a stage must be named in stages={tuple(config.stages)}.'
            )
    stage_keys = set(stage(method={}, steps=0, batch_size=0))
    for name in config.stages:
        if name not in config:
            raise UserError(f"stages names '{name}' but the config has no block of that name.")
        for key in config[name]:
            if key not in stage_keys:
                raise UserError(f"Unknown key '{name}.{key}'.{did_you_mean(key, stage_keys)}")
        if stage_keys - set(config[name]):
            raise UserError(f'{name} lacks {_list(stage_keys - set(config[name]))}.')
        _validate_stage(config, name)


def _validate_stage(config: ConfigDict, name: str) -> None:
    stage = config[name]
    for key in ('steps', 'batch_size', 'log_every', 'checkpoint_every', 'keep'):
        if not isinstance(stage[key], int) or stage[key] <= 0:
            raise UserError(f'{name}.{key} must be a positive integer, got {stage[key]!r}.')
    if not isinstance(stage.eval_every, int) or stage.eval_every < 0:
        raise UserError(f'{name}.eval_every must be an integer from 0, got {stage.eval_every!r}.')
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
    for key in stage.data if 'source' not in stage.data else ():
        if key not in config.data:
            raise UserError(
                f"{name}.data changes '{key}', which config.data does not have."
                f'{did_you_mean(key, config.data)}'
            )
    earlier = config.stages[: config.stages.index(name)]
    named = {'teacher': stage.teacher}
    named |= {f'references.{label}': reference for label, reference in stage.references.items()}
    for field, reference in named.items():
        if reference in config.stages and reference not in earlier:
            raise UserError(
                f"{name}.{field}='{reference}' must come before '{name}' in "
                f'stages={tuple(config.stages)}.'
            )


def resolve(path: str) -> Any:
    """The object at a dotted import path, such as 'kd.losses.divergence.forward_kl'."""
    module_path, _, attribute = path.rpartition('.')
    if not module_path:
        raise UserError(f"'{path}' is not an import path such as 'kd.models.mlp.MLP'.")
    try:
        module = importlib.import_module(module_path)
    except ModuleNotFoundError as error:
        if error.name is None or not module_path.startswith(error.name):
            raise
        raise UserError(f"'{path}': there is no module {error.name}.") from error
    if not hasattr(module, attribute):
        raise UserError(
            f"'{path}': {module_path} has no '{attribute}'.{did_you_mean(attribute, dir(module))}"
        )
    return getattr(module, attribute)


def build(block: Mapping[str, Any], *args: Any, where: str, **extra: Any) -> Any:
    """Calls the callable that a block names with the block's other entries as keywords.

    Args:
      block: mapping with 'name' and keyword arguments.
      *args: positional arguments that come before.
      where: place in the config, for messages.
      **extra: keyword arguments that the block must not set.
    """
    arguments = to_plain(block)
    if 'name' not in arguments:
        raise UserError(f"{where} has no 'name'; it must be an import path.")
    function = resolve(arguments.pop('name'))
    check_arguments(function, arguments, where=where, reserved=(*extra,))
    try:
        return function(*args, **arguments, **extra)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f'{where}: {error}') from error


def check_arguments(
    function: Callable, arguments: Iterable[str], *, where: str, reserved: Iterable[str] = ()
) -> None:
    """Raises `UserError` for keywords that `function` does not take."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    hidden = {'self', 'parent', *reserved}
    known = [
        n for n, p in parameters.items() if p.kind is not p.POSITIONAL_ONLY and n not in hidden
    ]
    for argument in arguments:
        if argument not in known:
            raise UserError(
                f"{where} has an unknown key '{argument}'.{did_you_mean(argument, known)} "
                f'{getattr(function, "__name__", function)} takes: {", ".join(known)}.'
            )


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
