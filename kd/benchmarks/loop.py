"""What the training loop costs beside the compiled step.

    python -m kd.benchmarks.loop

Steps per second of a whole run (data pipeline, transfer, metrics, logging every 100 steps) over
those of the bare compiled step on batches that lie on the device already. Both take turns on the
same stage in the same process, so a busy machine slows both.

| step | target |
|---|---|
| 25 ms | at least 0.95 |
| 2 ms | at least 0.90 |
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from kd import config as kd_config
from kd import process
from kd.benchmarks import turns
from kd.io import checkpoints
from kd.parallel import mesh as mesh_lib
from kd.training import loop, watch
from kd.training import step as step_lib
from kd.training.stage import Stage, prepare

TARGETS = {'25 ms': (25.0, 0.95), '2 ms': (2.0, 0.9)}
BATCH = 64
# A step that costs next to nothing: its width, and what the loop may take for it.
SMALL, SMALL_MS = 16, 0.5


def recipe(width: int, steps: int) -> kd_config.Recipe:
    """Supervised training of a two-layer MLP of a width on the digits."""
    config = kd_config.recipe(
        stages=('student',), data=dict(name='digits', train='train', test='test')
    )
    config.student = kd_config.stage(
        method=dict(name='kd.methods.vision.supervised.supervised'),
        network=dict(name='kd.models.mlp.MLP', widths=(width, width)),
        optimizer=dict(name='sgd', lr=1e-3),
        steps=steps,
        batch_size=BATCH,
        log_every=100,
        checkpoint_every=10**9,
    )
    return kd_config.parse(config)


def bare(stage: Stage, steps: int, now: Callable[[], float] = time.perf_counter) -> float:
    """Seconds per step of the compiled step on batches that are on the device, by a clock."""
    step = step_lib.make_train_step(stage)
    state = step_lib.initial_state(stage)
    window = step_lib.zeros(step_lib.abstract_arguments(stage)[2])
    host = itertools.islice(stage.batches(), 8)
    batches = [mesh_lib.put_batch(batch, stage.batch_sharding()) for batch in host]
    for batch in batches[:3]:
        state, window = jax.block_until_ready(step(state, {}, window, batch))
    began = now()
    for index in range(steps):
        state, window = step(state, {}, window, batches[index % len(batches)])
    jax.block_until_ready(state)
    return (now() - began) / steps


def looped(stage: Stage, directory: Path, now: Callable[[], float] = time.monotonic) -> float:
    """Seconds per step of the loop itself, by a clock."""
    saved = checkpoints.Checkpoints(directory)
    running = loop.Loop(stage, saved, directory, lambda: False)
    running.clock = watch.Clock(now)
    running.run()
    saved.close()
    return 1.0 / running.clock.speed()


def calibrate(milliseconds: float, now: Callable[[], float] = time.perf_counter) -> int:
    """A width for which a step takes about that long here, by a clock."""
    width = 128
    while True:
        stage = prepare(recipe(width, 1), 'student', mesh_lib.make_mesh({'data': 1}))
        took = 1000 * bare(stage, 20, now)
        if took >= milliseconds or width > 8192:
            return width
        # Work grows with the square of the width.
        width = int(width * min(max((milliseconds / took) ** 0.5, 1.1), 2.0))


def measure(
    milliseconds: float, rounds: int, steps: int, now: Callable[[], float] = time.perf_counter
) -> dict[str, Any]:
    """Medians over rounds in which loop and bare step take turns, and the ratio of each round."""
    width = calibrate(milliseconds, now)
    stage = prepare(recipe(width, steps), 'student', mesh_lib.make_mesh({'data': 1}))
    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        for index in range(rounds):
            directory = Path(folder) / str(index)
            directory.mkdir()
            before, taken = bare(stage, steps, now), looped(stage, directory, now)
            pairs.append((before, taken, bare(stage, steps, now)))
    ratios = [(before + after) / 2 / loop for before, loop, after in pairs]
    return {
        'width': width,
        'bare_ms': 1000 * statistics.median(pair[0] for pair in pairs),
        'loop_ms': 1000 * statistics.median(pair[1] for pair in pairs),
        'ratio': statistics.median(ratios),
        'ratios': ratios,
    }


def rows(options: argparse.Namespace) -> list[turns.Row]:
    """Its ratios, in CPU seconds of all threads: see `kd.benchmarks`."""
    found = []
    for name, (milliseconds, target) in TARGETS.items():
        steps = max(int(1000 / milliseconds), 20)
        row = measure(milliseconds, options.rounds, steps, time.process_time)
        work = f'training of an MLP of width {row["width"]}, steps of {name}'
        found.append(turns.Row(work, 'the bare step', row['ratios'], target, 'speed', least=True))
    stage = prepare(recipe(SMALL, 1000), 'student', mesh_lib.make_mesh({'data': 1}))
    took = []
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            took.append(1000 * looped(stage, Path(folder), time.process_time))
    work = f'the loop of an MLP of width {SMALL}, its step included'
    return [*found, turns.Row(work, 'no peer', took, SMALL_MS, 'CPU milliseconds a step')]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; exit status 1 if a target is missed."""
    parser = argparse.ArgumentParser(prog='python -m kd.benchmarks.loop')
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--seconds', type=float, default=4.0, help='per measurement')
    arguments = parser.parse_args(argv)
    print('| step | width | bare, ms | loop, ms | loop speed over bare | target |')
    print('|---|---:|---:|---:|---:|---:|')
    missed = False
    for name, (milliseconds, target) in TARGETS.items():
        steps = max(int(1000 * arguments.seconds / milliseconds), 20)
        row = measure(milliseconds, arguments.rounds, steps)
        missed |= row['ratio'] < target
        print(
            f'| {name} | {row["width"]} | {row["bare_ms"]:.2f} | {row["loop_ms"]:.2f} '
            f'| {row["ratio"]:.3f} | {target} |'
        )
    return int(missed)


if __name__ == '__main__':
    process.command(main)
