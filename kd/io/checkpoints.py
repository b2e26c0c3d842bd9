"""Checkpoints of a stage, on Orbax.

    <stage>/checkpoints/<step>/variables   params, mutables, ema, by part: what later stages need
                              /training    key, step, optimiser state, the open metric window
                              /data        position of the data iterator
                              /checksums.json  of these files: what differs is damaged
    <stage>/merits.json                    what was measured at each, by which one of them is best
    <stage>/done.json                      the stage is finished, and which step is its result

Saving is asynchronous. Frozen trees (teachers) are never part of a checkpoint.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from kd import files
from kd import metrics as metrics_lib
from kd.errors import UserError, reason
from kd.io import checksums
from kd.parallel import distributed
from kd.state import State, path_name

log = logging.getLogger('kd')

# Orbax narrates every save at INFO and warns about things that are as we want them.
logging.getLogger('absl').setLevel(logging.ERROR)

_MERITS, _CHECKSUMS = 'merits.json', 'checksums.json'


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        # The loop alone asks JAX's preemption service, with a count of its own.
        return False


class _Best(checkpoint_managers.PreservationPolicy):
    """Keeps the checkpoint that `best_of` names."""

    def __init__(self, best_of: Callable[[Sequence[int]], int | None]) -> None:
        self._best_of = best_of

    def should_preserve(self, checkpoints, *, context):
        del context
        best = self._best_of([checkpoint.step for checkpoint in checkpoints])
        return [checkpoint.step == best for checkpoint in checkpoints]


class Checkpoints:
    """The checkpoints of one stage."""

    def __init__(self, directory: Path, *, keep: int = 2, best: str = '') -> None:
        """Opens or creates the directory.

        Args:
          directory: the stage's directory.
          keep: how many of the latest checkpoints to keep.
          best: metric whose best checkpoint is kept too, prefixed '-' if lower is better.
        """
        self.directory = directory
        self._best, self._lower = best.lstrip('-'), best.startswith('-')
        self._merits = _read_merits(directory)
        policies = [checkpoint_managers.LatestN(keep), _Best(self.best_of)]
        self._saving = 0
        self._manager = _Manager(
            directory / 'checkpoints',
            options=ocp.CheckpointManagerOptions(
                cleanup_tmp_directories=True,
                async_options=ocp.options.AsyncOptions(
                    post_finalization_callback=self._write_checksums
                ),
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            ),
        )

    def steps(self) -> list[int]:
        """Steps with a checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int:
        """The step that is best by the metric; the latest, with a warning, if none has a number."""
        steps = self.steps()
        if not steps:
            raise UserError(f'{self.directory} has no checkpoint.')
        best = self.best_of(steps)
        if best is None and self._best:
            log.warning(
                'No checkpoint in %s has a finite %s: the last one counts as the best.',
                self.directory, self._best,
            )  # fmt: skip
        return steps[-1] if best is None else best

    def best_of(self, steps: Sequence[int]) -> int | None:
        """The best of some steps by their metric, None if none has a finite one."""
        merits = [self._merits.get(step, {}).get(self._best) for step in steps]
        place = metrics_lib.best(merits, lower=self._lower)
        return None if place is None else steps[place]

    def rank(self, step: int, metrics: Mapping[str, float]) -> None:
        """Notes what was measured at a step; it may have been saved before."""
        kept = {step, *self.steps()}
        self._merits = {old: merit for old, merit in self._merits.items() if old in kept}
        self._merits[step] = dict(metrics)
        if distributed.is_first():
            files.write_json(self.directory / _MERITS, self._merits)

    def save(
        self, state: State, window: Any, data: Any, metrics: Mapping[str, float] | None = None
    ) -> None:
        """Starts saving; returns once the arrays are copied. `metrics` as of `rank`."""
        if metrics:
            self.rank(int(state.step), metrics)
        self.wait()
        self._saving = int(state.step)
        self._manager.save(
            self._saving,
            args=ocp.args.Composite(
                variables=ocp.args.StandardSave(variables(state)),
                training=ocp.args.StandardSave(_training(state, window)),
                data=ocp.args.JsonSave(data),
            ),
        )

    def restore_latest(self, state: State, window: Any) -> tuple[State, Any, Any] | None:
        """The newest checkpoint that is whole, as (state, window, data position).

        A checkpoint whose files are not what was written is moved to `broken_checkpoints`, and the
        one before it is tried. Whatever else goes wrong leaves it where it is.

        Args:
          state: abstract state with shardings; its `frozen` must be concrete and is kept.
          window: abstract metrics of the open window.

        Returns:
          None if there is no checkpoint at all.

        Raises:
          UserError: there are checkpoints but all are damaged, one cannot be read now, or its tree
            does not match.
        """
        tried = self.steps()
        for step in reversed(tried):
            if found := self._damage(step):
                distributed.from_first(partial(self._set_aside, step, found))
                self._manager.reload()
                continue
            self._check_tree(step, variables(state))
            restored = distributed.agree(partial(self._restore, step, state, window))
            training = restored['training']
            state = state.replace(
                **restored['variables'],
                **{name: training[name] for name in ('step', 'key', 'opt_state', 'extra')},
            )
            return state, training['window'], restored['data']
        if tried:
            raise UserError(
                f'All of the checkpoints {tried} in {self.directory} are damaged; they were moved '
                'to broken_checkpoints. Start again in another workdir, or run the command again '
                'to train this stage from its beginning.'
            )
        return None

    def _damage(self, step: int) -> str:
        """What is damaged in a checkpoint, as far as can be known; the same in all processes."""
        folder = self.directory / 'checkpoints' / str(step)
        part = (jax.process_index(), jax.process_count())

        def verify() -> str:
            file = folder / _CHECKSUMS
            if not file.exists():
                return ''
            try:
                expected = files.read_json(file, '')
            except UserError:
                return f'{_CHECKSUMS} is not what was written'
            try:
                return checksums.damage(folder, expected, part)
            except OSError as error:
                raise UserError(self._trouble(step, error)) from error

        return next(filter(None, distributed.gather(distributed.agree(verify))), '')

    def _trouble(self, step: int, error: Exception) -> str:
        folder = self.directory / 'checkpoints' / str(step)
        whole = (folder / _CHECKSUMS).exists()
        return (
            f'{self.directory}: checkpoint {step} cannot be read ({reason(error)}). '
            + ('It is not damaged' if whole else 'Whether it is damaged cannot be known')
            + ' and stays where it is: run the command again once this is put right, or delete '
            f'{folder} to go on from the checkpoint before it.'
        )

    def _write_checksums(self) -> None:
        """Puts the checksums of its files into a checkpoint that is about to be renamed whole."""
        if not distributed.is_first():
            return
        folder = self.directory / 'checkpoints'
        [*unnamed] = folder.glob(f'{self._saving}.*tmp*')
        place = unnamed[0] if unnamed else folder / str(self._saving)
        found = {
            f'{item}/{name}': value
            for item in ('variables', 'training', 'data')
            for name, value in checksums.of_files(place / item).items()
        }
        files.write_json(place / _CHECKSUMS, found)

    def _restore(self, step: int, state: State, window: Any) -> Any:
        try:
            return self._manager.restore(
                step,
                args=ocp.args.Composite(
                    variables=ocp.args.StandardRestore(variables(state)),
                    training=ocp.args.StandardRestore(_training(state, window)),
                    data=ocp.args.JsonRestore(),
                ),
            )
        except Exception as error:  # Orbax and TensorStore raise bare Exceptions.
            raise UserError(self._trouble(step, error)) from error

    def restore_variables(self, step: int, abstract: Mapping[str, Any], where: str) -> Any:
        """`{'params', 'mutables', 'ema'}` of one checkpoint, as far as `abstract` asks for it.

        Raises:
          UserError: the checkpoint's tree differs from `abstract`, or it cannot be read.
        """
        return restore_variables(self.directory, step, abstract, where)

    def _check_tree(self, step: int, abstract: Any) -> None:
        path = self.directory / 'checkpoints' / str(step) / 'variables'
        _check_tree(path, abstract, str(self.directory), whole=True)

    def _set_aside(self, step: int, found: str) -> None:
        target = self.directory / 'broken_checkpoints' / str(step)
        target.parent.mkdir(exist_ok=True)
        while target.exists():
            target = target.with_name(target.name + '_')
        (self.directory / 'checkpoints' / str(step)).rename(target)
        log.warning('Checkpoint %s is damaged (%s); moved to %s.', step, found, target)

    def wait(self) -> None:
        """Waits for the save in progress."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


def check_variables(directory: Path, step: int, abstract: Any, where: str) -> Path:
    """The path of a checkpoint's variables, which are there and of the tree `abstract`.

    Raises:
      UserError: they are not.
    """
    path = (directory / 'checkpoints' / str(step) / 'variables').absolute()
    if not path.is_dir():
        raise UserError(f'{where}: {directory} is marked as done but checkpoint {step} is missing.')
    _check_tree(path, abstract, where)
    return path


def restore_variables(directory: Path, step: int, abstract: Any, where: str) -> Any:
    """See `Checkpoints.restore_variables`."""
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
                f'{where}: {name} in {path} is not what the stage ended with: the checkpoint is '
                'damaged or another. Bring back a copy, or delete the folder of that stage and run '
                'its recipe again.'
            )


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


def _read_merits(directory: Path) -> dict[int, dict[str, float]]:
    file = directory / _MERITS
    if not file.exists():
        return {}
    advice = 'delete it, and the best checkpoint is chosen among those to come'
    try:
        return {int(step): dict(merit) for step, merit in files.read_json(file, advice).items()}
    except (TypeError, ValueError) as error:
        raise UserError(f'{file} is damaged: {error}; {advice}.') from error


def variables(state: State) -> dict[str, Any]:
    """What later stages need of a state."""
    return {'params': state.params, 'mutables': state.mutables, 'ema': state.ema}


def _training(state: State, window: Any) -> dict[str, Any]:
    names = ('step', 'key', 'opt_state', 'extra')
    return {'window': window, **{name: getattr(state, name) for name in names}}


def _check_tree(path: Path, abstract: Any, where: str, *, whole: bool = False) -> None:
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
