"""A stage trained anew from other seeds, for means over seeds."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from kd.parallel import mesh as mesh_lib
from kd.state import State
from kd.training import step as step_lib
from kd.training.stage import Stage


def repeats(stage: Stage, seeds: Sequence[int]) -> Iterator[State]:
    """The state after the last step for each seed, one after another; nothing is written.

    A seed decides what `config.seed` does, initialisation, order of the data and all randomness of
    the method. Teacher and references are those of the stage, the same for all seeds. With the
    run's own seed, it is the state that the stage has ended with, bit for bit.

    Args:
      stage: made by `kd.training.stage.prepare` with the workdir of the run.
      seeds: from 0 on.
    """
    init, step = step_lib.make_init(stage), step_lib.make_train_step(stage)
    pace, sharding = mesh_lib.Pace(stage.mesh), stage.batch_sharding()
    window = step_lib.abstract_arguments(stage)[2]
    for seed in seeds:
        one = dataclasses.replace(stage, seed=seed)
        state, sums = init(one.key()), step_lib.zeros(window)
        for batch in itertools.islice(one.batches(), stage.config.steps):
            batch = mesh_lib.fed(batch, sharding)
            state, sums = step(state, stage.frozen, sums, batch)
            pace(sums)
        yield state
