"""The result of a finished stage: its marker `done.json`, and its variables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from kd import files
from kd.errors import UserError, reason
from kd.io import checksums
from kd.state import path_name

CHECKSUMS = 'checksums.json'
_AGAIN = 'bring back a copy, or delete the folder of that stage and run its recipe again'


def check_variables(directory: Path, step: int, abstract: Any, where: str) -> Path:
    """The path of a checkpoint's variables, which are there and of the tree `abstract`.

    Raises:
      UserError: they are not.
    """
    path = (directory / 'checkpoints' / str(step) / 'variables').absolute()
    if not path.is_dir():
        raise UserError(f'{where}: {directory} is marked as done but checkpoint {step} is missing.')
    _check_files(path, where)
    check_tree(path, abstract, where)
    return path


def restore_variables(directory: Path, step: int, abstract: Any, where: str) -> Any:
    """`{'params', 'mutables', 'ema'}` of a checkpoint, as far as `abstract` asks for it.

    Args:
      directory: of the stage.
      step: of the checkpoint.
      abstract: tree of shapes, dtypes and shardings.
      where: place in the config, for messages.

    Raises:
      UserError: the checkpoint's tree differs from `abstract`, it cannot be read, or it is not what
        the stage ended with.
    """
    path = check_variables(directory, step, abstract, where)
    # A report is made by one process: the others take no part in reading.
    readers = {d.process_index for x in jax.tree.leaves(abstract) for d in x.sharding.device_set}
    alone = ocp.options.MultiprocessingOptions(
        primary_host=min(readers), active_processes=readers, barrier_sync_key_prefix='report'
    )
    everyone = len(readers) == jax.process_count()
    options = ocp.options.MultiprocessingOptions() if everyone else alone
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=options)
    with ocp.Checkpointer(handler, multiprocessing_options=options) as checkpointer:
        try:
            restored = checkpointer.restore(
                path,
                args=ocp.args.PyTreeRestore(
                    item=abstract,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
                    partial_restore=True,
                ),
            )
        except Exception as error:  # Orbax and TensorStore raise bare Exceptions.
            raise UserError(
                f'{where}: checkpoint {path} cannot be read: {reason(error)}'
            ) from error

    done = read_done(directory)
    if done is not None and done['step'] == step:
        _check_weights(restored, done.get('weights', {}), where, path)
    return restored


def _check_weights(restored: Any, expected: Mapping[str, str], where: str, path: Path) -> None:
    """Holds what was read to the checksums with which the stage ended."""
    for name, found in checksums.of_tree(restored).items():
        wanted = expected.get(name, found)
        # Read as another type, the same numbers have other bits.
        if found != wanted and found.split()[0] == wanted.split()[0]:
            raise UserError(
                f'{where}: {name} in {path} is not what the stage ended with: {_AGAIN}.'
            )


def _check_files(path: Path, where: str) -> None:
    """Tells of files that are missing or cut short, which the readers do not say by their names."""
    file = path.parent / CHECKSUMS
    if not file.exists():
        return
    expected = files.read_json(file, 'delete it, and the files are read unchecked')
    ours = {name: told for name, told in expected.items() if name.startswith(f'{path.name}/')}
    if found := checksums.damage(path.parent, ours, contents=False):
        raise UserError(f'{where}: checkpoint {path.parent} is damaged: {found}; {_AGAIN}.')


def of_part(abstract: Mapping[str, Any], part: str, weights: str) -> dict[str, Any]:
    """The variables {'params': ..., **mutables} of a part, as they lie in a checkpoint."""
    mutables = dict(abstract)
    params = {part: mutables.pop('params')}
    wanted = {'params': params} if weights == 'final' else {'ema': {weights: params}}
    return {**wanted, 'mutables': {part: mutables}} if mutables else wanted


def restore_part(
    directory: Path, step: int, abstract: Mapping[str, Any], where: str, part: str, weights: str
) -> dict[str, Any]:
    """The variables {'params': ..., **mutables} of a part of one checkpoint.

    Args:
      directory: of the stage.
      step: of the checkpoint.
      abstract: the variables with their shardings.
      where: place in the config, for messages.
      part: which part of the state.
      weights: 'final', or the name of an average.

    Raises:
      UserError: the checkpoint's tree differs from `abstract`, or it cannot be read.
    """
    restored = restore_variables(directory, step, of_part(abstract, part, weights), where)
    params = restored['params'] if weights == 'final' else restored['ema'][weights]
    return {'params': params[part], **restored.get('mutables', {}).get(part, {})}


def mark_done(directory: Path, record: Mapping[str, Any]) -> None:
    """Writes the marker of a finished stage, atomically."""
    files.write_json(directory / 'done.json', record)


def unmark_done(directory: Path) -> None:
    """Makes a finished stage one that goes on from its last checkpoint."""
    (directory / 'done.json').unlink(missing_ok=True)


def read_done(directory: Path) -> dict[str, Any] | None:
    """The marker of a finished stage, or None.

    Raises:
      UserError: it is damaged.
    """
    marker = directory / 'done.json'
    if not marker.exists():
        return None
    advice = 'delete it, and run the recipe of that stage again: it goes on from its checkpoint'
    done = files.read_json(marker, advice)
    if not isinstance(done.get('step'), int) or not isinstance(done.get('metrics'), dict):
        raise UserError(f'{marker} is damaged: it lacks the step or the metrics; {advice}.')
    metrics = done['metrics'].items()
    return {**done, 'metrics': {n: math.nan if value is None else value for n, value in metrics}}


def check_tree(path: Path, abstract: Any, where: str, *, whole: bool = False) -> None:
    """Compares names and shapes with what is stored; names the first differences.

    Unless `whole`, only parts of the parameters that are asked for must be there as a whole.
    """
    try:
        metadata = ocp.PyTreeCheckpointHandler().metadata(ocp.path.step.epath.Path(path.absolute()))
        stored = _shapes(metadata.tree)
    except (OSError, ValueError, KeyError, AttributeError):
        return  # Unreadable: the restoration that follows says so.
    wanted = _shapes(abstract)
    differences = [
        f'{name}: {_shown(stored.get(name))} in the checkpoint, {_shown(shape)} in the config'
        for name, shape in wanted.items()
        if stored.get(name) != shape
    ]
    params = [name for name in (stored if whole else wanted) if name.startswith('params/')]
    parts = tuple({'/'.join(name.split('/')[:2]) + '/' for name in params})
    differences += [
        f'{name}: {stored[name]} in the checkpoint, nothing in the config'
        for name in sorted(set(stored) - set(wanted))
        if name.startswith(parts)
    ]
    if differences:
        shown = '; '.join(differences[:3])
        more = f' (and {len(differences) - 3} more)' if len(differences) > 3 else ''
        raise UserError(
            f'{where}: the checkpoint does not fit the configured network. {shown}{more}. '
            'Change the network in the config or name another checkpoint.'
        )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda x: hasattr(x, 'shape') and not isinstance(x, dict)
    )[0]
    return {path_name(path): tuple(leaf.shape) for path, leaf in leaves if hasattr(leaf, 'shape')}


def _shown(shape: tuple[int, ...] | None) -> str:
    return 'nothing' if shape is None else str(shape)
