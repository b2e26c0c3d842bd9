"""What influence of n examples costs, against a gradient for each of them.

    python -m kd.benchmarks.influence

With a solved system x in hand, influence is -<x, grad l_i> for every example. Ours is one forward
product for a chunk of examples; the other way forms all n gradients (vmap of grad) and multiplies
each by x. Memory is XLA's peak of temporaries, for which nothing is run; time is that of both in
turns, a ratio the median over rounds.

| | target |
|---|---|
| memory over that of gradients | at most 2 / n |
| time over that of gradients | at most .5 |
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kd import process
from kd.losses import classification, influence
from kd.models.mlp import MLP
from kd.network import from_linen

TIME, VECTORS = 0.5, 2.0


def programs(count: int, chunk: int, width: int) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """({form: compiled}, their arguments) for `count` images of 28 x 28."""
    net = from_linen(
        MLP(widths=(width, width), num_classes=10),
        jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32),
    )
    params, solved = (net.init(jax.random.key(seed))['params'] for seed in (0, 1))
    rng = np.random.default_rng(0)
    images = rng.normal(size=(count // chunk, chunk, 28, 28, 1)).astype(np.float32)
    labels = rng.integers(0, 10, (count // chunk, chunk)).astype(np.int32)

    def losses(params, images, labels):
        logits = net.apply({'params': params}, images).logits
        return classification.cross_entropy(logits, labels)

    def product(params, solved, images, labels):
        def of_chunk(given):
            return influence.influence(lambda p: losses(p, *given), params, solved)

        return jax.lax.map(of_chunk, (images, labels)).reshape(-1)

    def gradients(params, solved, images, labels):
        one = jax.grad(lambda p, image, label: losses(p, image[None], label[None])[0])
        each = jax.vmap(one, (None, 0, 0))(
            params, images.reshape(-1, 28, 28, 1), labels.reshape(-1)
        )
        # Held as they are, as they would be to be used with a second direction.
        each = jax.lax.optimization_barrier(each)
        dots = jax.tree.map(lambda g, x: -jnp.tensordot(g, x, x.ndim), each, solved)
        return sum(jax.tree.leaves(dots))

    arguments = (params, solved, images, labels)
    forms: dict[str, Callable] = {'product': product, 'gradients': gradients}
    compiled = {name: jax.jit(f).lower(*arguments).compile() for name, f in forms.items()}
    return compiled, arguments


def temporaries(compiled: Any) -> int:
    """Bytes at the peak."""
    analysis = compiled.memory_analysis()
    assert analysis is not None, 'this backend has no memory analysis'
    return int(analysis.temp_size_in_bytes)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; exit status 1 if a target is missed."""
    parser = argparse.ArgumentParser(prog='python -m kd.benchmarks.influence')
    parser.add_argument('--count', type=int, default=256, help='examples, n')
    parser.add_argument('--chunk', type=int, default=32)
    parser.add_argument('--width', type=int, default=512)
    parser.add_argument('--rounds', type=int, default=5)
    a = parser.parse_args(argv)
    forms, arguments = programs(a.count, a.chunk, a.width)
    sizes = {name: temporaries(form) for name, form in forms.items()}
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    found = {}
    for number in range(a.rounds + 1):
        for name, form in forms.items():
            began = time.perf_counter()
            found[name] = jax.block_until_ready(form(*arguments))
            if number:  # The first warms up.
                seconds[name].append(time.perf_counter() - began)
    ratios = [x / y for x, y in zip(seconds['product'], seconds['gradients'], strict=True)]
    memory, took = sizes['product'] / sizes['gradients'], statistics.median(ratios)
    off = np.abs(np.asarray(found['product']) - np.asarray(found['gradients'])).max()
    print(f'{a.count} examples in chunks of {a.chunk}; the two differ by {off:.1e} at most')
    print('| form | temporaries, MB | seconds |\n|---|---:|---:|')
    for name, times in seconds.items():
        print(f'| {name} | {sizes[name] / 1e6:.1f} | {statistics.median(times):.4f} |')
    missed = memory > VECTORS / a.count or took > TIME
    print(
        f'\nMemory {memory * a.count:.2f} / n (at most {VECTORS:g} / n), time {took:.2f} '
        f'({min(ratios):.2f}-{max(ratios):.2f}, at most {TIME}): {"missed" if missed else "met"}.'
    )
    return int(missed)


if __name__ == '__main__':
    process.command(main)
