r"""What `kd.losses.sequence.fused_divergence` saves and costs against whole logits.

    python -m kd.benchmarks.fused_divergence
    python -m kd.benchmarks.fused_divergence --divergence=generalized_jsd --chunk=128 \
        --json=out.json

Value and gradient (in the student's hidden states and head) of the mean divergence over tokens,
from `HiddenHead` factors of both models. The dense form multiplies them out and calls the same
divergence.

Memory is the temporary memory of XLA's compiled program, at a size at which nothing is executed.
Time is the median over rounds in which the forms take turns, at a size that runs on a laptop.

Two rows are of the fused form at its best and at its worst: with half of the tokens masked, as the
tokens of prompts are, which it leaves out of the work; and with a random weight per token outside
of it, known only when it runs, for which its gradient needs a second sweep.

| | target |
|---|---|
| temporary memory, fused over dense, masked too | at most 1/10 |
| time, fused over dense | at most 1.2 |
| time, half masked over fused | at most .65 |
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kd import files, process
from kd.losses import divergence as divergences
from kd.losses import sequence, signal

DENSE, FUSED = 'dense', 'fused'
MASKED, WEIGHTED = 'fused, half of the tokens masked', 'fused, weighted tokens'
# Of a ratio of two forms: at most.
TARGETS = {
    'memory': {(FUSED, DENSE): 1 / 10, (MASKED, DENSE): 1 / 10},
    'time': {(FUSED, DENSE): 1.2, (MASKED, FUSED): 0.65},
}
DIVERGENCES = (
    'forward_kl',
    'reverse_kl',
    'generalized_jsd',
    'skew_kl',
    'skew_reverse_kl',
    'total_variation',
)

Arrays = tuple[Any, ...]


def forms(name: str, chunk: int) -> dict[str, jax.stages.Wrapped]:
    """Jitted value and gradient of each form, of student factors, teacher factors and weights."""
    divergence = getattr(divergences, name)

    def dense(hidden, head, teacher, weights):
        return jnp.mean(divergence(signal.HiddenHead(hidden, head).logits(), teacher))

    def divergences_of(hidden, head, teacher, **options):
        return sequence.fused_divergence(
            hidden, head, teacher, divergence=divergence, chunk=chunk, **options
        )

    def fused(hidden, head, teacher, weights):
        return jnp.mean(divergences_of(hidden, head, teacher))

    def masked(hidden, head, teacher, weights):
        valid = jnp.arange(len(weights)) >= len(weights) // 2
        return jnp.mean(divergences_of(hidden, head, teacher, valid=valid))

    def weighted(hidden, head, teacher, weights):
        return jnp.mean(weights * divergences_of(hidden, head, teacher))

    losses = {DENSE: dense, FUSED: fused, MASKED: masked, WEIGHTED: weighted}
    return {form: jax.jit(jax.value_and_grad(loss, (0, 1))) for form, loss in losses.items()}


def arguments_of(tokens: int, vocabulary: int, width: int, dtype: str) -> Arrays:
    """Random student factors, teacher factors and token weights with logits of unit size."""
    keys = jax.random.split(jax.random.key(0), 5)

    def factors(hidden_key, head_key):
        hidden = jax.random.normal(hidden_key, (tokens, width), dtype)
        return hidden, jax.random.normal(head_key, (width, vocabulary), dtype) * width**-0.5

    student, teacher = factors(*keys[:2]), signal.HiddenHead(*factors(*keys[2:4]))
    return *student, teacher, jax.random.uniform(keys[4], (tokens,))


def measure_memory(name: str, chunk: int, *size: Any) -> dict[str, float]:
    """MiB of temporary memory of each form's compiled program; nothing is executed."""
    shapes = jax.eval_shape(lambda: arguments_of(*size))
    return {form: _temporary_mib(f.lower(*shapes)) for form, f in forms(name, chunk).items()}


def measure_time(name: str, chunk: int, rounds: int, *size: Any) -> dict[str, float]:
    """Median seconds of each form."""
    arrays = arguments_of(*size)
    candidates = forms(name, chunk)
    seconds: dict[str, list[float]] = {form: [] for form in candidates}
    for index in range(rounds + 1):
        for form, f in candidates.items():
            began = time.perf_counter()
            jax.block_until_ready(f(*arrays))
            if index:  # round 0 compiles
                seconds[form].append(time.perf_counter() - began)
    return {form: statistics.median(times) for form, times in seconds.items()}


def ratios(what: str, measured: dict[str, float]) -> dict[str, tuple[float, float]]:
    """The ratio and its target by name, for all targets of 'memory' or 'time'."""
    return {
        f'{form} over {other}': (measured[form] / measured[other], target)
        for (form, other), target in TARGETS[what].items()
    }


def table(what: str, title: str, unit: str, digits: int, measured: dict[str, float]) -> str:
    """One row per form, with its ratio to the dense one, and what has a target."""
    lines = [title, '', f'| form | {unit} | over dense |', '|---|---:|---:|']
    for form, value in measured.items():
        lines.append(f'| {form} | {value:.{digits}f} | {value / measured[DENSE]:.3f} |')
    for name, (ratio, target) in ratios(what, measured).items():
        lines.append(f'\n{name}: {ratio:.3f}, target at most {target:.3f}')
    return '\n'.join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints both tables; exit status 1 if a target is missed."""
    parser = argparse.ArgumentParser(prog='python -m kd.benchmarks.fused_divergence')
    parser.add_argument('--divergence', choices=DIVERGENCES, default='forward_kl')
    parser.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32')
    parser.add_argument('--chunk', type=int, default=256, help='tokens per slab of logits')
    parser.add_argument('--width', type=int, default=2048, help='of student and teacher')
    parser.add_argument('--tokens', type=int, default=8192, help='for the memory')
    parser.add_argument('--vocabulary', type=int, default=152064, help='for the memory')
    parser.add_argument('--time_tokens', type=int, default=1024)
    parser.add_argument('--time_vocabulary', type=int, default=16384)
    parser.add_argument('--rounds', type=int, default=5, help='timed runs of each form')
    parser.add_argument(
        '--json', type=process.file_argument, help='also write the numbers to this file'
    )
    options = parser.parse_args(argv)
    if options.rounds < 1:
        parser.error('--rounds must be at least 1')

    name, chunk = options.divergence, options.chunk
    size = (options.tokens, options.vocabulary, options.width, options.dtype)
    memory = measure_memory(name, chunk, *size)
    print(table('memory', _title('Temporary memory', name, size), 'MiB', 0, memory))
    size = (options.time_tokens, options.time_vocabulary, options.width, options.dtype)
    seconds = measure_time(name, chunk, options.rounds, *size)
    print('\n' + table('time', _title('Time', name, size), 'seconds', 3, seconds))

    found = {'memory': ratios('memory', memory), 'time': ratios('time', seconds)}
    if options.json:
        settings = vars(options) | {'json': str(options.json)}
        record = {
            'settings': settings,
            'device': jax.devices()[0].device_kind,
            'memory_mib': memory,
            'seconds': seconds,
            'ratios': {
                what: {name: ratio for name, (ratio, _) in of.items()} for what, of in found.items()
            },
        }
        files.write_json(options.json, record)
    return int(any(ratio > target for of in found.values() for ratio, target in of.values()))


def _temporary_mib(lowered: jax.stages.Lowered) -> float:
    analysis = lowered.compile().memory_analysis()
    if analysis is None:
        raise RuntimeError(f'the {jax.default_backend()} backend reports no memory; use another')
    return analysis.temp_size_in_bytes / 2**20


def _title(what: str, name: str, size: tuple[Any, ...]) -> str:
    tokens, vocabulary, width, dtype = size
    return f'{what}: {name}, {tokens} tokens x {vocabulary} vocabulary x width {width}, {dtype}'


if __name__ == '__main__':
    process.command(main)
