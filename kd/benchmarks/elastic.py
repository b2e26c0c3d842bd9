"""What one program for all architectures saves, and what a step of it costs.

    python -m kd.benchmarks.elastic

Robust distillation into parts of an elastic network (`kd.methods.vision.proard`): a step with each
of `--architectures` parts drawn at random, from no program at all. Masked, all are one program and
one call each; cut out, each is a network of its own, whose step is compiled. Both take the same
step, of the same losses and attack. Seconds are those of the process's CPU, compilation and calls
together. The cut-out networks do less work in a step, which is why these are compared too: a step
of the masked program over one of the largest network by itself, the median over rounds in turns.

| | target |
|---|---|
| a compilation per architecture over one for all | at least 5 for 24 |
| masked step over the largest plain network's | at most 1.6 |
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kd import files, process
from kd.benchmarks import turns
from kd.losses import divergence, robust
from kd.models import elastic
from kd.models.elastic_mlp import ElasticMLP
from kd.models.elastic_resnet import ElasticResNet
from kd.network import Network, from_linen
from kd.networks import sliced

SAVED, STEP = 5.0, 1.6
CLASSES, LR = 10, 0.05
ATTACK: dict[str, Any] = dict(epsilon=0.24, step=0.07, steps=5)
# (module, shape of an input, batch, whether attacks are unrolled: convolutions in loops are slow)
NETWORKS: dict[str, tuple[Any, tuple[int, ...], int, bool]] = {
    'mlp': (ElasticMLP(num_classes=CLASSES), (8, 8, 1), 64, False),
    'resnet': (
        ElasticResNet(stem=16, stages=(32, 64), blocks=(1, 1), depths=(0, 1), num_classes=CLASSES),
        (8, 8, 3), 32, True,
    ),
}  # fmt: skip


def problem(name: str) -> tuple[Network, Any, Any, bool]:
    """(network, its variables, a batch, unroll)."""
    module, shape, size, unroll = NETWORKS[name]
    network = from_linen(module, jax.ShapeDtypeStruct((1, *shape), jnp.float32))
    rng = np.random.default_rng(0)
    batch = {
        'input': rng.uniform(-1, 1, (size, *shape)).astype(np.float32),
        'teacher': rng.normal(size=(size, CLASSES)).astype(np.float32),
    }
    return network, jax.jit(network.init)(jax.random.key(0)), batch, unroll


def step_of(network: Network, unroll: bool) -> Callable[..., Any]:
    """`step(variables, batch, key, arch)`: gradient descent on RSLAD; `arch` {} of plain ones."""

    def step(variables: Any, batch: Any, key: jax.Array, arch: Any) -> Any:
        given, x, taught = {'arch': arch} if arch else {}, batch['input'], batch['teacher']
        far = robust.pgd(
            key,
            lambda x: divergence.forward_kl(network.apply(variables, x, **given).logits, taught),
            x, unroll=unroll, **ATTACK,
        )  # fmt: skip

        def loss(params):
            clean = network.apply({**variables, 'params': params}, x, train=True, **given)
            after = {**variables, **clean.mutables, 'params': params}
            attacked = network.apply(after, far, train=True, **given)
            values = robust.rslad(clean.logits, attacked.logits, taught)
            return values.mean(), attacked.mutables

        slope, mutables = jax.grad(loss, has_aux=True)(variables['params'])
        params = jax.tree.map(lambda p, g: p - LR * g, variables['params'], slope)
        return {**variables, **mutables, 'params': params}

    return step


def one_program(name: str, count: int) -> float:
    """CPU seconds of a step with each architecture, masked, with the one compilation."""
    network, variables, batch, unroll = problem(name)
    draw, archs = jax.jit(network.module.space().sample), []
    for i in range(count):
        archs.append(jax.device_get(draw(jax.random.key(i))))
    key = jax.random.key(0)

    def work():
        step = jax.jit(step_of(network, unroll))
        return jax.block_until_ready([step(variables, batch, key, arch) for arch in archs])

    return turns.cpu_seconds(work)[0]


def program_each(name: str, count: int) -> float:
    """CPU seconds of the same steps of networks by themselves, a compilation for each."""
    network, variables, batch, unroll = problem(name)
    draw, parts = jax.jit(network.module.space().sample), []
    for i in range(count):
        arch = jax.device_get(draw(jax.random.key(i)))
        own = elastic.slice_variables(network, variables, arch)
        parts.append((sliced(network, arch), own))
    key = jax.random.key(0)

    def work():
        return jax.block_until_ready([
            jax.jit(step_of(small, unroll))(own, batch, key, {}) for small, own in parts
        ])  # fmt: skip

    return turns.cpu_seconds(work)[0]


def steps(name: str, rounds: int, calls: int) -> dict[str, list[float]]:
    """CPU seconds of a step, masked and of the largest network by itself, round by round."""
    network, variables, batch, unroll = problem(name)
    largest = network.module.space().largest()
    plain = sliced(network, largest)
    own = elastic.slice_variables(network, variables, largest)
    key = jax.random.key(0)
    found: dict[str, list[float]] = {'masked': [], 'plain': []}
    kinds = {
        'masked': functools.partial(
            jax.jit(step_of(network, unroll)), variables, batch, key, largest
        ),
        'plain': functools.partial(jax.jit(step_of(plain, unroll)), own, batch, key, {}),
    }
    for round_ in range(rounds + 1):
        for kind, step in kinds.items():
            took, _ = turns.cpu_seconds(functools.partial(_done, step), calls)
            if round_:  # the first one compiles
                found[kind].append(took)
    return found


def _done(step: Callable[[], Any]) -> Any:
    return jax.block_until_ready(step())


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; exit status 1 if a target is missed."""
    parser = argparse.ArgumentParser(prog='python -m kd.benchmarks.elastic')
    parser.add_argument('--networks', nargs='+', default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument('--architectures', type=int, default=24)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--calls', type=int, default=20, help='steps in a round')
    parser.add_argument('--json', type=process.file_argument, help='also write the numbers there')
    options = parser.parse_args(argv)
    if min(options.architectures, options.rounds, options.calls) < 1:
        parser.error('--architectures, --rounds and --calls must be at least 1')
    # Programs that another run has left on disk are no measure of compilation.
    jax.config.update('jax_enable_compilation_cache', False)
    records, missed = {}, False
    count = options.architectures
    print(f'| network | one program, CPU s | {count} programs | times | masked step, ms | plain | '
          'times |\n|---|---:|---:|---:|---:|---:|---:|')  # fmt: skip
    for name in options.networks:
        took = steps(name, options.rounds, options.calls)
        ratio = statistics.median(a / b for a, b in zip(took['masked'], took['plain'], strict=True))
        one, each = one_program(name, count), program_each(name, count)
        records[name] = dict(one=one, each=each, saved=each / one, step=ratio, **took)
        masked, plain = (1e3 * statistics.median(took[kind]) for kind in ('masked', 'plain'))
        print(
            f'| {name} | {one:.1f} | {each:.1f} | {each / one:.1f} | {masked:.2f} | {plain:.2f} | '
            f'{ratio:.2f} |', flush=True,
        )  # fmt: skip
        missed |= each / one < SAVED or ratio > STEP
    print(f'\nTargets, times: at least {SAVED:g}, at most {STEP:g}: '
          f'{"missed" if missed else "met"}.')  # fmt: skip
    if options.json:
        files.write_json(options.json, records)
    return int(missed)


if __name__ == '__main__':
    process.command(main)
