"""What each flow-map algorithm costs over plain flow matching.

    python -m kd.benchmarks.flow_map

One loss-and-gradient step of each algorithm, with the same network and batch and eta = 0.75 (three
quarters of the batch on the diagonal), over the same step of flow matching: XLA's count of
floating-point operations, median time, and temporary memory of the compiled program. Time is
measured with all algorithms taking turns, so a busy machine slows all of them; the time ratio is
the median over rounds of the ratio within the round. `traces` counts compilations over all steps.

| target (lsd) | |
|---|---|
| flops over flow matching | at most 2.6 |
| time ratio over flops ratio | at most 1.25 |
| temporary memory over flow matching | at most 2 |
| traces | 1 |
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from kd import process
from kd.benchmarks import turns
from kd.benchmarks.plain import flow_map as plain
from kd.errors import UserError
from kd.losses.flow_map import VelocityFunction, uncertainty_weight
from kd.losses.flow_map_algorithms import ALGORITHMS, flow_map_errors, get_algorithm
from kd.losses.interpolant import linear
from kd.models.conditioning import TimeWeight
from kd.models.dit import DiT
from kd.models.unet import UNet
from kd.models.velocity_mlp import VelocityMLP

BASELINE = 'flow_matching'
FLOPS, TIME_OVER_FLOPS, MEMORY = 2.6, 1.25, 2.0
# Of CPU time over that of the losses written plainly, at most.
PLAIN = {'mlp': 0.8, 'unet': 0.95}

# Network, shape of an example, batch size: large enough for arithmetic to dominate on two cores.
NETWORKS: dict[str, tuple[nn.Module, tuple[int, ...], int]] = {
    'mlp': (VelocityMLP(width=512, depth=5, data_scale=0.577), (2,), 2048),
    'unet': (UNet(channels=32, multipliers=(1, 2), blocks=1, attention=(4,)), (8, 8, 1), 64),
    'dit': (DiT(patch=2, width=128, depth=3, heads=4), (8, 8, 1), 64),
}


@dataclasses.dataclass
class Step:
    """A compiled loss-and-gradient step and what is known about it."""

    run: Callable[[int], jax.Array]
    flops: float
    memory: float
    traces: Callable[[], int]


def make_step(
    algorithm: str,
    network: nn.Module,
    shape: tuple[int, ...],
    batch: int,
    given: Callable[..., jax.Array] | None = None,
) -> Step:
    """The step of an algorithm, of flow matching, or of a given loss, on a fixed random batch."""
    keys = jax.random.split(jax.random.key(0), 5)
    x0, x1 = (jax.random.normal(key, (batch, *shape)) for key in keys[:2])
    times, weight = jnp.zeros(1), TimeWeight()
    params = {
        'network': network.init(keys[2], times, times, x0[:1]),
        'weight': weight.init(keys[3], times, times),
    }
    # A teacher is a constant of the program in no training loop: it is an argument here too.
    teacher = jax.tree.map(jnp.copy, params['network'])
    plain = algorithm == BASELINE
    name = 'lsd' if plain else algorithm
    needs_teacher = ALGORITHMS[name].needs_teacher
    chosen = get_algorithm(name, teacher=needs_teacher)
    count = 0

    def bind(variables) -> VelocityFunction:
        return lambda s, t, x: jnp.asarray(network.apply(variables, s, t, x))

    def loss(params, teacher, key, x0, x1):
        nonlocal count
        count += 1
        if given is not None:
            return given(params, key, x0, x1)
        error, s, t = flow_map_errors(
            key,
            bind(params['network']),
            x0,
            x1,
            interpolant=linear(),
            algorithm=chosen,
            diagonal=batch if plain else int(0.75 * batch),
            teacher=bind(teacher) if needs_teacher else None,
        )
        log_variance = jnp.asarray(weight.apply(params['weight'], s, t))
        return jnp.mean(uncertainty_weight(error, log_variance))

    step = jax.jit(jax.value_and_grad(loss))
    arguments = (params, teacher, keys[4], x0, x1)
    compiled = step.lower(*arguments).compile()
    costs, memory = compiled.cost_analysis(), compiled.memory_analysis()
    if costs is None or memory is None:
        raise RuntimeError('this backend reports neither flops nor memory of a program.')
    step_keys = jax.random.split(keys[4], 16)

    def run(index: int) -> jax.Array:
        return step(params, teacher, step_keys[index % 16], x0, x1)

    return Step(
        run,
        flops=costs['flops'],
        memory=float(memory.temp_size_in_bytes),
        traces=lambda: count,
    )


def measure(
    names: Sequence[str], network: nn.Module, shape: tuple[int, ...], batch: int, rounds: int
) -> dict[str, dict[str, float]]:
    """{algorithm: ratios over flow matching, milliseconds and traces}."""
    steps = {name: make_step(name, network, shape, batch) for name in (BASELINE, *names)}
    for step in steps.values():
        jax.block_until_ready(step.run(0))
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(rounds):
        for name, step in steps.items():
            began = time.perf_counter()
            jax.block_until_ready(step.run(index))
            seconds[name].append(time.perf_counter() - began)
    base = steps[BASELINE]
    return {
        name: {
            'flops': step.flops / base.flops,
            'time': statistics.median(
                own / plain for own, plain in zip(seconds[name], seconds[BASELINE], strict=True)
            ),
            'memory': step.memory / base.memory,
            'ms': 1000 * statistics.median(seconds[name]),
            'traces': step.traces(),
        }
        for name, step in steps.items()
    }


def against_plain(
    algorithm: str, network: nn.Module, shape: tuple[int, ...], batch: int, rounds: int
) -> list[float]:
    """CPU seconds of a step over those of the loss written plainly, in each round.

    Raises:
      UserError: the losses differ.
    """
    ours = make_step(algorithm, network, shape, batch)
    given = functools.partial(plain.loss, algorithm, network, TimeWeight(), int(0.75 * batch))
    peer = make_step(algorithm, network, shape, batch, given)
    values = [float(each.run(0)[0]) for each in (ours, peer)]
    if abs(values[0] - values[1]) > 1e-3 * abs(values[1]):
        raise UserError(f'{algorithm}: losses of {values[0]} and, written plainly, {values[1]}.')
    sides = {
        name: lambda each=each: jax.block_until_ready(each.run(0))
        for name, each in dict(kd=ours, plain=peer).items()
    }
    took = turns.seconds(sides, rounds)
    return turns.over(took['kd'], took['plain'])


def rows(options: argparse.Namespace) -> list[turns.Row]:
    """Its ratios to the losses written plainly: see `kd.benchmarks`."""
    peer, found = f'written plainly, jax {jax.__version__}', []
    for name, target in PLAIN.items():
        network, shape, batch = NETWORKS[name]
        for algorithm in plain.LOSSES:
            ratios = against_plain(algorithm, network, shape, batch, options.rounds)
            work = f'{algorithm}, {name}, batch {batch}: loss and gradient'
            found.append(turns.Row(work, peer, ratios, target))
    return found


def failures(row: dict[str, float]) -> list[str]:
    """Targets that the row of Lagrangian self-distillation misses."""
    checks = {
        f'flops {row["flops"]:.2f} > {FLOPS}': row['flops'] > FLOPS,
        f'time {row["time"]:.2f} > {TIME_OVER_FLOPS} x flops {row["flops"]:.2f}': (
            row['time'] > TIME_OVER_FLOPS * row['flops']
        ),
        f'memory {row["memory"]:.2f} > {MEMORY}': row['memory'] > MEMORY,
        f'{row["traces"]} traces': row['traces'] != 1,
    }
    return [text for text, missed in checks.items() if missed]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; exit status 1 if a target is missed."""
    parser = argparse.ArgumentParser(prog='python -m kd.benchmarks.flow_map')
    parser.add_argument('--network', choices=NETWORKS, default='mlp')
    parser.add_argument('--algorithms', nargs='+', choices=ALGORITHMS, default=list(ALGORITHMS))
    parser.add_argument('--batch', type=int, help='examples of a step')
    parser.add_argument('--rounds', type=int, default=30)
    arguments = parser.parse_args(argv)
    network, shape, batch = NETWORKS[arguments.network]
    rows = measure(arguments.algorithms, network, shape, arguments.batch or batch, arguments.rounds)
    print(f'{arguments.network}, batch {arguments.batch or batch}, {jax.devices()[0].device_kind}')
    print('| algorithm | flops | time | time / flops | temporary memory | ms | traces |')
    print('|---|---:|---:|---:|---:|---:|---:|')
    for name, row in rows.items():
        print(
            f'| {name} | {row["flops"]:.2f} | {row["time"]:.2f} '
            f'| {row["time"] / row["flops"]:.2f} | {row["memory"]:.2f} | {row["ms"]:.1f} '
            f'| {row["traces"]} |'
        )
    missed = failures(rows['lsd']) if 'lsd' in rows else []
    for text in missed:
        print(f'lsd misses its target: {text}')
    return int(bool(missed))


if __name__ == '__main__':
    process.command(main)
