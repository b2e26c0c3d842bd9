"""Running a stage's evaluators over their splits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from matplotlib.figure import Figure

from kd import files
from kd.context import Evaluator, Probe
from kd.data import pipeline
from kd.errors import UserError
from kd.parallel import distributed, layout
from kd.parallel import mesh as mesh_lib
from kd.state import State
from kd.training import watch
from kd.training.stage import Stage, replicated


class Evaluation:
    """The evaluators of a stage, compiled once."""

    def __init__(self, stage: Stage, stop: Callable[[], bool] = lambda: False) -> None:
        """`stop` is asked between batches and probes in a run of several processes."""
        self.stage, self.pace = stage, mesh_lib.Pace(stage.mesh)
        # One process is interrupted wherever it is.
        self.stop = stop if jax.process_count() > 1 else lambda: False
        self.updates = {
            name: self._summed(evaluator)
            for name, (_, evaluator) in stage.evaluators.items()
            if isinstance(evaluator, Evaluator)
        }

    def __call__(self, state: State, step: int, directory: Path) -> dict[str, float]:
        """Runs all evaluators; returns {'evaluator/metric': value}.

        Figures are written to `directory/figures/EVALUATOR_NAME_STEP.png`, texts to
        `directory/texts/EVALUATOR_NAME_STEP.md`.
        """
        scalars = self._sums(state)
        probes = {
            label: (split, evaluator)
            for label, (split, evaluator) in self.stage.evaluators.items()
            if isinstance(evaluator, Probe)
        }
        probed = self._alone(state) if probes else state
        for label, (split, probe) in probes.items():
            watch.obey(self.stop)
            found: dict[str, float] = {}
            for name, value in probe.run(probed, self._whole(split)).items():
                file = f'{label}_{name}_{step}'
                if isinstance(value, Figure):
                    self._write(value, directory / 'figures' / f'{file}.png')
                elif isinstance(value, str):
                    self._write(value, directory / 'texts' / f'{file}.md')
                else:
                    found[f'{label}/{name}'] = float(value)
            scalars |= distributed.from_first(functools.partial(dict, found))
        best = self.stage.config.best.lstrip('-')
        if best and best not in scalars and not best.startswith('train/'):
            raise UserError(f"{self.stage.name}.best='{best}' is none of: {', '.join(scalars)}.")
        return scalars

    def _sums(self, state: State) -> dict[str, float]:
        sums: dict[str, Any] = {}
        summed = {
            name: (split, evaluator)
            for name, (split, evaluator) in self.stage.evaluators.items()
            if isinstance(evaluator, Evaluator)
        }
        for split in dict.fromkeys(split for split, _ in summed.values()):
            for batch in self._batches(split, mesh_lib.fed):
                for name, (of, evaluator) in summed.items():
                    if of != split:
                        continue
                    if name not in sums:
                        abstract = jax.eval_shape(evaluator.update, state, batch)
                        sums[name] = jax.tree.map(self._zero, abstract)
                    sums[name] = self.updates[name](state, batch, sums[name])
                    self.pace(sums[name])
        return {
            f'{name}/{metric}': float(value)
            for name, (_, evaluator) in summed.items()
            for metric, value in evaluator.finish(jax.device_get(sums[name])).items()
        }

    def _batches(
        self, split: str, put: Callable[..., dict[str, Any]] = mesh_lib.put_batch
    ) -> Iterator[dict[str, Any]]:
        for batch in self.stage.eval_batches(split):
            watch.obey(self.stop)
            yield put(batch, self.stage.batch_sharding())

    def _whole(self, split: str) -> Iterator[dict[str, jax.Array]]:
        """The batches of a split for a probe: of several processes each reads all of them."""
        if jax.process_count() == 1:
            yield from self._batches(split)
            return
        source, size = self.stage.context.source(split), self.stage.config.batch_size
        for batch in pipeline.eval_batches(source, size):
            yield jax.device_put({name: np.asarray(value) for name, value in batch.items()})

    def _alone(self, state: State) -> State:
        """The state for probes, which run programs of their own in every process for itself.

        In a run of several processes its arrays come to this one whole, but for the optimiser's.
        """
        if jax.process_count() == 1:
            return state

        def here(x: jax.Array) -> Any:
            if x.is_fully_replicated:
                return x.addressable_data(0)
            return multihost_utils.process_allgather(x, tiled=True)

        return jax.tree.map(here, state.replace(opt_state=()))

    def _zero(self, x: jax.ShapeDtypeStruct) -> jax.Array:
        # Where the sums will lie, or the update would be compiled once more for the second batch.
        return jax.device_put(np.zeros(x.shape, x.dtype), replicated(self.stage.mesh))

    def _summed(self, evaluator: Evaluator) -> Callable[..., Any]:
        def update(state, batch, sums):
            with layout.inside(self.stage.mesh):
                return jax.tree.map(jax.numpy.add, sums, evaluator.update(state, batch))

        return jax.jit(update, out_shardings=replicated(self.stage.mesh))

    def _write(self, found: Figure | str, file: Path) -> None:
        if jax.process_index() == 0:
            file.parent.mkdir(exist_ok=True)
            if isinstance(found, str):
                files.write_whole(file, found)
            else:
                found.savefig(file)
