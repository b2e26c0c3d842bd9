"""How a stage ends whose updates are not finite, see `kd.method.guard`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from kd import files
from kd.errors import NonFiniteError
from kd.io import checkpoints
from kd.io.workdir import read_metrics
from kd.state import State
from kd.training.stage import Stage

# Updates in a row that are left out before a stage is given up.
PATIENCE = 100


def ended(
    stage: Stage,
    saved: checkpoints.Checkpoints,
    directory: Path,
    state: State,
    window: Any,
    position: Any,
) -> NonFiniteError:
    """Saves what the guard has halted and the batch of that step; returns what to raise.

    A state from before the step becomes a checkpoint, from which the run can go on. One in the
    middle of a step, of whose updates some are made, is kept beside the batch for a look alone: the
    step would begin anew with it, and make them twice.

    Args:
      stage: the stage.
      saved: its checkpoints.
      directory: of the stage.
      state: the halted state.
      window: metrics of the open window.
      position: of the data iterator before the batch.
    """
    bad = int(state.step)
    dump = directory / f'nonfinite_{bad}'
    dump.mkdir(exist_ok=True)
    iterator = stage.batches()
    iterator.set_state(position)
    process = jax.process_index()
    np.savez(dump / (f'batch_{process}.npz' if process else 'batch.npz'), **next(iterator))
    files.write_json(dump / 'step.json', {'step': bad, 'stage': stage.name})
    empty = jax.tree.map(lambda x: x * 0, window)
    saved.wait()
    if state.extra['partial']:
        apart = checkpoints.Checkpoints(dump)
        _save(apart, state, empty, position)
        apart.close()
        steps = saved.steps()
        kept = (
            f'Some updates of that step had been made: the state after them is saved in {dump} '
            f'beside the batch, and the run goes on from '
            + (f'checkpoint {steps[-1]}.' if steps else 'its beginning.')
        )
    else:
        whole = {**state.extra, 'halted': state.extra['halted'] & False}
        _save(saved, state.replace(extra=whole), empty, position)
        kept = (
            f'The state before that step is saved as checkpoint {bad}, the batch in '
            f'{dump}/batch.npz.'
        )
    return NonFiniteError(
        f'{stage.name}: the loss or its gradient became non-finite at step {bad}. {kept} Run the '
        'same command with --config.on_nonfinite=skip to leave such updates out, or begin in '
        f'another workdir with a lower {stage.name}.optimizer.lr or a clip_norm.'
    )


def _save(place: checkpoints.Checkpoints, state: State, window: Any, position: Any) -> None:
    if int(state.step) not in place.steps():
        place.save(state, window, position)
        place.wait()


def check_updates(name: str, directory: Path, steps: int) -> None:
    """Ends a stage that skips what is not finite (`on_nonfinite`) and has nothing else to train on.

    Args:
      name: of the stage.
      directory: of the stage.
      steps: to the end of training; fewer than `PATIENCE` are judged by their all.

    Raises:
      NonFiniteError: the last `PATIENCE` updates, or all `steps`, were left out.
    """
    logged = [line for line in read_metrics(directory) if 'train/nonfinite' in line]
    made = [line['step'] for line in logged if line['train/nonfinite'] != 1]
    count = logged[-1]['step'] - (made[-1] if made else 0) if logged else 0
    if count >= min(steps, PATIENCE):
        raise NonFiniteError(
            f'{name}: the last {count} updates were not finite and were left out, one after '
            f'another: nothing is trained. Look at the data, lower {name}.optimizer.lr or set a '
            'clip_norm, in another workdir.'
        )
