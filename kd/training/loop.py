"""The one training loop.

`run` takes the stages of a recipe in order; a stage that is done is passed over, one that was cut
off goes on from its last checkpoint. A step runs under jit over the mesh with its state donated;
the host waits for the device only where something is logged, evaluated or saved.
"""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import jax

from kd import bases, process
from kd import config as config_lib
from kd import metrics as metrics_lib
from kd.config import Recipe
from kd.context import ReportContext
from kd.errors import Preempted
from kd.io import checkpoints, finished
from kd.io.progress import Progress, doing, say
from kd.io.workdir import MetricLog, Workdir, read_metrics, write_overview
from kd.parallel import distributed
from kd.parallel import mesh as mesh_lib
from kd.training import ending, nonfinite, reuse, watch
from kd.training.evaluation import Evaluation
from kd.training.stage import Stage, prepare
from kd.training.step import abstract_arguments, check, initial_state, make_train_step, zeros

# Batches that are on their way to the device while a step runs.
PREFETCH = 2


@watch.stoppable()
def run(
    config: config_lib.ConfigDict, workdir: str | Path, choice: reuse.Choice = reuse.EVERYTHING
) -> Path | None:
    """Runs a recipe in a work directory; returns the path of the report, if it has one.

    Args:
      config: as a config file gives it.
      workdir: a new directory, or one of an earlier run, whose stages are used as they are where
        they are still those of the config.
      choice: which stages to run, to begin anew, or to train longer.

    Raises:
      UserError: the config, the data or the work directory needs a correction.
      NonFiniteError: a loss became infinite or NaN.
      Preempted: a signal asked the run to stop; the same call goes on from there.

    In a run of several processes all call this; see `kd.parallel.distributed`. The report is made
    by the first alone, on its own devices, and the path is its.
    """
    recipe = config_lib.parse(config)
    chosen = choice.stages(recipe)
    mesh = mesh_lib.make_mesh(recipe.mesh)
    directory = distributed.agree(lambda: Workdir(workdir, recipe))
    try:
        distributed.agree(partial(reuse.check_workdir, directory, recipe, choice))
        for name in chosen:
            distributed.agree(partial(check, recipe, name, mesh))
        distributed.agree(partial(ending.check_report, recipe))
        for base in needed_bases(recipe, chosen):
            provide(recipe.bases[base], base)
        if distributed.is_first():
            reuse.settle(directory, choice)
            directory.record()
        stop = watch.asking()
        for name in chosen:
            watch.obey(stop)
            train_stage(recipe, name, directory, mesh, stop)
        watch.obey(stop)
        if not distributed.is_first() or not ending.reported(recipe, chosen, directory.path):
            return None
        if (there := ending.report_there(recipe, directory.path)) is not None:
            say('report', f'is there; delete {there} to have it made again')
            return there
        process.active().alone()
        with doing('report', 'evaluating and drawing'):
            context = ReportContext(recipe, directory.path, mesh_lib.local_mesh(mesh))
            report = config_lib.build(recipe.report, context, where='report')
        ending.note_report(recipe, directory.path, report)
        return report
    finally:
        directory.close()


def needed_bases(recipe: Recipe, stages: Iterable[str]) -> list[str]:
    """The work directories of `bases` that these stages name."""
    found = []
    for stage in (recipe.stages[name] for name in stages):
        references = (stage.teacher, *stage.references.values())
        places = {str(Path(reference).parent) for reference in references if reference}
        found += [base for base in recipe.bases if base in places and base not in found]
    return found


def provide(config: str, directory: str | Path = '') -> Path:
    """Trains a base, unless it is there: see `kd.bases`.

    Args:
      config: 'configs/x.py:argument'.
      directory: its work directory; by default that of its hash.

    Returns:
      The work directory, with a folder for each stage.
    """
    recipe = bases.recipe(config)
    place = Path(directory or bases.directory(config))

    def missing() -> list[str]:
        return [name for name in recipe.stages if finished.read_done(place / name) is None]

    if distributed.from_first(missing):
        say('base', f'{config} is trained once, in {place}')
        run(config_lib.load(config), place)
    return place


def train_stage(
    recipe: Recipe,
    name: str,
    workdir: Workdir,
    mesh: jax.sharding.Mesh,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Runs one stage to its end, from its last checkpoint if there is one."""
    directory = workdir.stage(name)
    done = distributed.from_first(lambda: finished.read_done(directory))
    if done is not None:
        lost = distributed.from_first(lambda: ending.lost(directory, done))
        if not lost:
            say(name, f'done at step {done["step"]}')
            return
        say(name, f'{lost[0]} is missing or cut short and is made again')
        distributed.from_first(lambda: ending.discard(directory, lost))
    stage = prepare(recipe, name, mesh, workdir.path)
    saved = checkpoints.Checkpoints(directory, keep=stage.config.keep, best=stage.config.best)
    try:
        loop = Loop(stage, saved, directory, stop)
        loop.run()
        ending.finish(stage, directory, saved, loop.state)
    finally:
        saved.close()


class Loop:
    """The loop of one stage; its attributes are what changes from step to step."""

    def __init__(
        self,
        stage: Stage,
        saved: checkpoints.Checkpoints,
        directory: Path,
        stop: Callable[[], bool],
    ) -> None:
        self.stage, self.saved, self.directory, self.stop = stage, saved, directory, stop
        self.name, self.signals = stage.name, process.active()
        self.evaluation = Evaluation(stage, stop)
        self.iterator, self.sharding = stage.batches(), stage.batch_sharding()
        abstract, _, window, _ = abstract_arguments(stage)
        self.frozen = stage.frozen
        restored = saved.restore_latest(abstract, window)
        if restored is None:
            if (directory / 'broken_checkpoints').exists() or read_metrics(directory):
                say(self.name, 'no checkpoint to go on from: training begins anew')
            with doing(self.name, 'initialising'):
                self.state, self.window = (
                    jax.block_until_ready(initial_state(stage)),
                    zeros(window),
                )
        else:
            self.state, self.window, position = restored
            self.iterator.set_state(position)
            say(self.name, f'resuming from step {int(self.state.step)}')
        self.start = self.logged = self.saved_at = int(self.state.step)
        self.train_step, self.pace = make_train_step(stage), mesh_lib.Pace(stage.mesh)
        # Batches on their way to the device, each with the iterator's position before it.
        self.queue: deque[tuple[Any, dict[str, Any]]] = deque()
        # Positions before the batches since `logged`: where to find a batch that went wrong.
        self.positions: list[Any] = []
        self.clock = watch.Clock()

    def _profile(self) -> watch.Profile:
        wanted = self.stage.context.recipe.profile
        # Not the first step of a run, which is mostly compilation.
        begin = max(wanted['start'], self.start + 1)
        end = min(begin + wanted['steps'], self.stage.config.steps)
        return watch.Profile(self.directory / 'profile', begin, end)

    def run(self) -> None:
        steps = self.stage.config.steps
        write_overview(self.directory, self.state.params)
        self.log = MetricLog(self.directory, resume_step=self.start)
        self.progress = Progress(self.name, start=self.start, total=steps)
        profile = self._profile()
        try:
            self._resume()
            with self.signals.deferred():
                for step in range(self.start, steps):
                    with profile(step, lambda: jax.block_until_ready(self.window)):
                        self._step(first=step == self.start)
                    self._after(step + 1)
        except process.Stopped as stop:
            at = f'step {self.saved_at}; a checkpoint is written' if self.saved_at else 'its start'
            raise Preempted(f'{self.name}: stopped at {at}.', stop.number) from stop
        except jax.errors.JaxRuntimeError as error:
            # Here, because closing the checkpoints would wait for the other processes.
            distributed.leave_if_lost(error)
            raise
        finally:
            self.progress.close()
            self.log.close()
            self.saved.wait()

    def _resume(self) -> None:
        """Does what was due at the step to start from and is not in the log."""
        logged = any(line['step'] == self.start for line in read_metrics(self.directory))
        if distributed.from_first(lambda: logged):
            if self._closes(self.start):
                self.window = jax.tree.map(lambda x: x * 0, self.window)
            self._write_files(self.start)
        else:
            self._look(self.start)

    def _after(self, now: int) -> None:
        """Saves, if it is time or the run is to stop, and then looks at the state.

        A checkpoint is written before the look, which may take long: whoever resumes from it looks
        again. So its window is open, with the metrics up to its step.
        """
        config, stopping = self.stage.config, self.stop()
        due = now % config.checkpoint_every == 0 or now == config.steps
        if due or stopping or self._ranks(now):
            self._save(now)
        if stopping:
            raise process.Stopped(self.signals.came or signal.SIGTERM)
        window = self.window

        def rescue() -> None:
            self.window = window
            self._save(now)
            self.saved.wait()

        try:
            with self.signals.at_once(rescue):
                self._look(now)
        except process.Stopped:
            rescue()
            raise

    def _look(self, now: int) -> None:
        """Closes the window, evaluates, writes files and logs, as far as it is due at a step."""
        scalars: dict[str, float] = {}
        if self._closes(now):
            scalars = self._close_window(now)
            self.progress.update(now, **_shown(scalars))
        if self._evaluates(now):
            with self.clock.paused():
                scalars |= self.evaluation(
                    self.state.replace(frozen=self.frozen), now, self.directory
                )
        self._write_files(now)
        if self._ranks(now):
            self.saved.rank(now, scalars)
        if scalars:
            self.log.write(now, scalars | {'time/steps_per_s': self.clock.speed()})
        if scalars.get('train/nonfinite') == 1:
            steps = self.stage.config.steps
            distributed.from_first(
                partial(nonfinite.check_updates, self.name, self.directory, steps)
            )

    def _closes(self, step: int) -> bool:
        """Whether the metrics of a window are written at a step."""
        config = self.stage.config
        return step > 0 and (step % config.log_every == 0 or step == config.steps)

    def _evaluates(self, step: int) -> bool:
        config = self.stage.config
        every = config.eval_every and step % config.eval_every == 0
        return step > 0 and (bool(every) or step == config.steps)

    def _ranks(self, step: int) -> bool:
        """Whether the metric by which a checkpoint is best is measured at a step."""
        best = self.stage.config.best.lstrip('-')
        of_training = best.startswith('train/')
        return bool(best) and (self._closes(step) if of_training else self._evaluates(step))

    def _step(self, *, first: bool) -> None:
        while len(self.queue) <= PREFETCH:
            position = self.iterator.get_state()
            batch = mesh_lib.fed(next(self.iterator), self.sharding)
            self.queue.append((position, batch))
        position, batch = self.queue.popleft()
        self.positions.append(position)
        arguments = (self.state, self.frozen, self.window, batch)
        if first:
            # Nothing is lost yet, and compiling may take minutes.
            with self.signals.at_once(), doing(self.name, 'compiling the training step'):
                self.state, self.window = jax.block_until_ready(self.train_step(*arguments))
            self.clock.start()
            self.progress.begin(self.start + 1)
        else:
            self.state, self.window = self.train_step(*arguments)
            self.pace(self.window)
            self.clock.steps += 1

    def _write_files(self, step: int) -> None:
        for every, write in self.stage.writers.values():
            if step % every == 0:
                with self.clock.paused():
                    self._check_finite(step)
                    write(self.state.replace(frozen=self.frozen), step, self.directory)

    def _close_window(self, step: int) -> dict[str, float]:
        self._check_finite(step)
        scalars = {f'train/{k}': v for k, v in metrics_lib.divide(self.window).items()}
        self.window = jax.tree.map(lambda x: x * 0, self.window)
        self.positions, self.logged = [], step
        return scalars

    def _save(self, step: int) -> None:
        if step == self.saved_at:
            return
        with self.clock.paused():
            self._check_finite(step)
            position = self.queue[0][0] if self.queue else self.iterator.get_state()
            self.saved.save(self.state, self.window, position)
        self.saved_at = step

    def _check_finite(self, step: int) -> None:
        """Ends the run if the guard halted it."""
        bad = int(self.state.step)
        if bad != step:
            position = self.positions[bad - (step - len(self.positions))]
            raise nonfinite.ended(
                self.stage, self.saved, self.directory, self.state, self.window, position
            )


def _shown(scalars: dict[str, float]) -> dict[str, float]:
    """The few numbers worth a place on the progress line."""
    names = ('loss', 'accuracy', 'nonfinite')
    return {
        name: scalars[f'train/{name}']
        for name in names
        if scalars.get(f'train/{name}') or (name == 'loss' and f'train/{name}' in scalars)
    }
