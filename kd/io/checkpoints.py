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

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from kd import files, process
from kd import metrics as metrics_lib
from kd.errors import UserError, reason
from kd.io import checksums, finished
from kd.io.finished import CHECKSUMS
from kd.parallel import distributed
from kd.state import State

log = logging.getLogger('kd')

# Orbax narrates every save at INFO and warns about things that are as we want them. Its errors come
# as exceptions too.
logging.getLogger('absl').setLevel(logging.CRITICAL)

_MERITS = 'merits.json'


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
        with self._writing():
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
            file = folder / CHECKSUMS
            if not file.exists():
                return ''
            try:
                expected = files.read_json(file, '')
            except UserError:
                return f'{CHECKSUMS} is not what was written'
            try:
                return checksums.damage(folder, expected, part)
            except OSError as error:
                raise UserError(self._trouble(step, error)) from error

        return next(filter(None, distributed.gather(distributed.agree(verify))), '')

    def _trouble(self, step: int, error: Exception) -> str:
        folder = self.directory / 'checkpoints' / str(step)
        whole = (folder / CHECKSUMS).exists()
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
        files.write_json(place / CHECKSUMS, found)

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

    def _check_tree(self, step: int, abstract: Any) -> None:
        path = self.directory / 'checkpoints' / str(step) / 'variables'
        finished.check_tree(path, abstract, str(self.directory), whole=True)

    def _set_aside(self, step: int, found: str) -> None:
        target = self.directory / 'broken_checkpoints' / str(step)
        target.parent.mkdir(exist_ok=True)
        while target.exists():
            target = target.with_name(target.name + '_')
        (self.directory / 'checkpoints' / str(step)).rename(target)
        log.warning('Checkpoint %s is damaged (%s); moved to %s.', step, found, target)

    def wait(self) -> None:
        """Waits for the save in progress."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        with self._writing():
            self._manager.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except jax.errors.JaxRuntimeError:
            raise  # Of a device, or of a process that is gone.
        except Exception as error:  # Orbax and TensorStore raise bare Exceptions.
            raise UserError(
                f'{self.directory}: checkpoint {self._saving} cannot be written '
                f'({process.cause(error)}). Those before it stand: put this right, and run the '
                'same command to go on from the last.'
            ) from error


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
