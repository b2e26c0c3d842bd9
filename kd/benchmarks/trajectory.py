"""What matching of training trajectories costs: memory and time of the unrolled inner loop, and of
the experts.

    python -m kd.benchmarks.trajectory

Memory is XLA's peak of temporaries for the loss and its gradient, as the unroll grows; nothing is
run for it. Growth is in parameter vectors per added step. The naive unroll keeps every activation.

Time is that of the loss and its gradient at a size where the naive unroll fits; all take turns, and
a ratio is the median over rounds. Convolutions are written as matrix products, since XLA for CPU
runs others many times slower inside a loop; the network is the same.

Experts: k of them at once, vmapped, against one after another, one call for every step as in
training. Only the perceptron has a target: convolutions vmapped over their weights are slow on CPU,
and a network that keeps the device busy by itself has nothing to gain from company.

| | target |
|---|---|
| growth of the exact gradient | at most one parameter vector per step |
| exact over naive, time | at most 1.4 |
| sequential over vmapped perceptrons, time | above 1 |
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kd import network, process
from kd.losses import trajectory
from kd.models import convnet, mlp

GROWTH_TARGET, TIME_TARGET, EXPERTS_TARGET = 1.0, 1.4, 1.0
KINDS = ('exact', 'TESLA', 'naive')
CLASSES = 10


class Problem(NamedTuple):
    """A network, an expert's segment and a synthetic set, one image per class after another."""

    net: network.Network
    start: Any
    target: Any
    images: jax.Array
    labels: jax.Array


def convnet_problem(width: int, depth: int, pixels: int, images_per_class: int) -> Problem:
    """A ConvNet on square RGB images."""
    module = convnet.ConvNet(depth=depth, width=width, num_classes=CLASSES, conv='matmul')
    shape = (pixels, pixels, 3)
    net = network.from_linen(module, jax.ShapeDtypeStruct((1, *shape), jnp.float32))
    start, target = (jax.jit(net.init)(jax.random.key(seed))['params'] for seed in (0, 1))
    count = CLASSES * images_per_class
    images = np.random.default_rng(0).normal(size=(count, *shape)).astype(np.float32)
    return Problem(net, start, target, jnp.asarray(images), jnp.arange(count) % CLASSES)


def cross_entropy(net: network.Network, params: Any, images: jax.Array, labels: jax.Array):
    """Mean cross-entropy of a batch."""
    logits = net.apply({'params': params}, images, train=True).logits
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def compiled(problem: Problem, kind: str, steps: int) -> jax.stages.Compiled:
    """Value and gradients with respect to images and step size, of `steps` full-batch steps."""
    rows = jnp.tile(jnp.arange(len(problem.labels)), (steps, 1))

    def inner(params, images, rows):
        return cross_entropy(problem.net, params, images[rows], problem.labels[rows])

    def tesla(images, step_size, start, target):
        return trajectory.tesla_grads(inner, images, step_size, start, target, rows)

    def loss(images, step_size, start, target):
        return trajectory.mtt_loss(
            inner, images, step_size, start, target, rows, checkpoint=kind == 'exact'
        )

    function = tesla if kind == 'TESLA' else jax.value_and_grad(loss, (0, 1))
    return jax.jit(function).lower(*_arguments(problem)).compile()


def memory(problem: Problem, kind: str, lengths: Sequence[int]) -> tuple[list[int], list[float]]:
    """Bytes of temporaries at each length, and growth in parameter vectors per added step."""
    sizes = []
    for steps in lengths:
        analysis = compiled(problem, kind, steps).memory_analysis()
        assert analysis is not None, 'this backend has no memory analysis'
        sizes.append(int(analysis.temp_size_in_bytes))
    vector = sum(x.nbytes for x in jax.tree.leaves(problem.start))
    points = pairwise(zip(lengths, sizes, strict=True))
    return sizes, [(b - a) / (m - n) / vector for (n, a), (m, b) in points]


def durations(problem: Problem, steps: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each kind, round by round."""
    arguments = _arguments(problem)
    calls: dict[str, Callable[[], Any]] = {
        kind: functools.partial(compiled(problem, kind, steps), *arguments) for kind in KINDS
    }
    return _take_turns(calls, rounds)


def experts(
    net: network.Network, count: int, steps: int, batch_size: int, rounds: int
) -> dict[str, list[float]]:
    """Seconds of `steps` steps of `count` experts, round by round, one call for every step."""

    def step(params, images, labels):
        grads = jax.grad(lambda p: cross_entropy(net, p, images, labels))(params)
        return jax.tree.map(lambda p, g: p - 0.05 * g, params, grads)

    rng = np.random.default_rng(0)
    shape = (count, batch_size, *net.inputs[0].shape[1:])
    images = rng.normal(size=shape).astype(np.float32)
    labels = rng.integers(0, CLASSES, shape[:2]).astype(np.int32)
    initialise = jax.jit(jax.vmap(lambda key: net.init(key)['params']))
    params = initialise(jax.random.split(jax.random.key(0), count))
    host = jax.device_get((params, images, labels))
    together = jax.device_put(host)
    apart = [jax.device_put(jax.tree.map(lambda x, i=i: x[i], host)) for i in range(count)]
    one, vmapped = jax.jit(step), jax.jit(jax.vmap(step))

    def train(update, params, images, labels):
        for _ in range(steps):
            params = update(params, images, labels)
        return params

    return _take_turns(
        {
            'sequential': lambda: [train(one, *arguments) for arguments in apart],
            'vmapped': lambda: train(vmapped, *together),
        },
        rounds,
    )


def _arguments(problem: Problem) -> tuple:
    return problem.images, jnp.float32(0.01), problem.start, problem.target


def _take_turns(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items():
            began = time.perf_counter()
            jax.block_until_ready(function())
            if number:  # the first round compiles
                seconds[name].append(time.perf_counter() - began)
    return seconds


def _ratio(above: list[float], below: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def report_memory(problem: Problem, lengths: Sequence[int]) -> float:
    """Prints the table; returns the largest growth of the exact gradient."""
    vector = sum(x.nbytes for x in jax.tree.leaves(problem.start))
    print(
        f'Temporary memory in MB, {len(problem.labels)} images, parameter vector '
        f'{vector / 1e6:.2f} MB; growth in vectors per step between the lengths'
    )
    print('| gradient | ' + ' | '.join(f'{n} steps' for n in lengths) + ' | growth |')
    print('|---|' + '---:|' * (len(lengths) + 1))
    growths = {}
    for kind in KINDS:
        sizes, growths[kind] = memory(problem, kind, lengths)
        cells = ' | '.join(f'{size / 1e6:.1f}' for size in sizes)
        print(f'| {kind} | {cells} | {", ".join(f"{g:.3f}" for g in growths[kind])} |', flush=True)
    return max(growths['exact'])


def report_experts(count: int, depth: int, rounds: int) -> float:
    """Prints the table; returns how much faster vmapped perceptrons are."""
    image = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
    nets = {
        'perceptron 64-64-64-10': mlp.MLP(widths=(64, 64), num_classes=CLASSES),
        f'ConvNet-{depth}, width 16': convnet.ConvNet(depth, 16, num_classes=CLASSES),
    }
    print(f'\n{count} experts on 8x8 images, batch 60, 20 steps')
    print('| network | one after another, s | vmapped, s | times as fast |\n|---|---:|---:|---:|')
    gains = []
    for name, module in nets.items():
        seconds = experts(network.from_linen(module, image), count, 20, 60, rounds)
        gains.append(_ratio(seconds['sequential'], seconds['vmapped']))
        cells = ' | '.join(f'{statistics.median(took):.3f}' for took in seconds.values())
        print(f'| {name} | {cells} | {gains[-1]:.2f} |', flush=True)
    return gains[0]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables; exit status 1 if a target is missed."""
    parser = argparse.ArgumentParser(prog='python -m kd.benchmarks.trajectory')
    parser.add_argument('--lengths', type=int, nargs='+', default=[10, 20, 40, 80])
    parser.add_argument('--width', type=int, default=128, help='channels, for memory')
    parser.add_argument('--depth', type=int, default=3, help='0 for a linear classifier')
    parser.add_argument('--pixels', type=int, default=32)
    parser.add_argument('--images-per-class', type=int, default=10, help='for memory')
    parser.add_argument('--timed-width', type=int, default=32, help='channels, for time')
    parser.add_argument('--timed-steps', type=int, default=20)
    parser.add_argument('--experts', type=int, default=10)
    parser.add_argument('--rounds', type=int, default=5)
    a = parser.parse_args(argv)

    problem = convnet_problem(a.width, a.depth, a.pixels, a.images_per_class)
    growth = report_memory(problem, a.lengths)
    seconds = durations(
        convnet_problem(a.timed_width, a.depth, a.pixels, 1), a.timed_steps, a.rounds
    )
    slowdown = _ratio(seconds['exact'], seconds['naive'])
    print(f'\nTime of {a.timed_steps} steps, width {a.timed_width}, one image per class')
    print('| gradient | seconds | over naive |\n|---|---:|---:|')
    for kind in KINDS:
        took = statistics.median(seconds[kind])
        print(f'| {kind} | {took:.3f} | {_ratio(seconds[kind], seconds["naive"]):.2f} |')

    gain = report_experts(a.experts, min(a.depth, 2), a.rounds)
    # A thousandth allows for loop counters and alignment.
    missed = growth > GROWTH_TARGET + 1e-3 or slowdown > TIME_TARGET or gain < EXPERTS_TARGET
    print(
        f'\nTargets: growth {growth:.3f} (at most {GROWTH_TARGET:g}), time {slowdown:.2f} '
        f'(at most {TIME_TARGET:g}), experts {gain:.2f} (above {EXPERTS_TARGET:g}): '
        f'{"missed" if missed else "met"}.'
    )
    return int(missed)


if __name__ == '__main__':
    process.command(main)
