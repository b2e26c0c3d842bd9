"""How fast a decoder writes, against `generate` of transformers on the same weights.

    KD_SMOLLM2=FILE KD_PEERS=peers/bin/python python -m kd.benchmarks.decode
    python -m kd.benchmarks.decode --only=toy

Tokens per CPU second on one core in float32, prompts read included, both with a cache of keys and
values; compilation is not counted. Both sides take turns in processes of their own, and a ratio is
the median over rounds. The weights of SmolLM2-135M are those of `--weights`, a GGUF file, which
`kd.export` writes for both sides; without it, or `--peers` (see `kd.benchmarks.peers`), what can
be measured is. Greedy answers must agree, up to a rounding that turns a close choice.

| | target |
|---|---|
| SmolLM2-135M, greedy, 1 / 8 / 32 rows | at least 1.7 / 1.2 / 1.0 times transformers |
| toy of width 64, 128 rows x 8 tokens, sampled | at least 3 times transformers |

Measured on a core of an EPYC 9004 that others used too: 1.76 (1.68-1.83), 1.43 (1.41-1.48), 1.17
(1.16-1.20) and, for the toy, 2.70 (2.66-2.78), which misses: of its 9.5 ms, 5 read the prompts.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kd import files, process
from kd.benchmarks import turns
from kd.benchmarks import weights as weights_lib
from kd.benchmarks.peers import generate
from kd.errors import UserError
from kd.models.decoder import Decoder
from kd.sampling.autoregressive import sampler

AGREEMENT = 0.95
TOY = Decoder(
    num_classes=72, width=64, depth=2, heads=4, mlp_hidden=172, tied=False, rope_theta=1000.0
)


class Case(NamedTuple):
    """What is decoded: `new` tokens after each of `rows` prompts; target of the ratio, at least."""

    model: str
    rows: int
    prompt: int
    new: int
    temperature: float
    target: float
    calls: int = 1  # of one turn

    def name(self) -> str:
        how = 'sampled' if self.temperature else 'greedy'
        return f'{self.model}, {how}, {self.rows} x {self.new} tokens after {self.prompt}'


SMOLLM2 = 'SmolLM2-135M'
CASES = (
    Case(SMOLLM2, 1, 32, 64, 0.0, 1.7),
    Case(SMOLLM2, 8, 32, 64, 0.0, 1.2),
    Case(SMOLLM2, 32, 32, 64, 0.0, 1.0),
    Case('toy', 128, 14, 8, 1.0, 3.0, calls=20),
)


def prompts(case: Case, weights: str) -> list[list[int]]:
    """Rows of tokens: text for a real model, so that its choices are not close."""
    if case.model == 'toy':
        rng = np.random.default_rng(0)
        return rng.integers(0, TOY.num_classes, (case.rows, case.prompt)).tolist()
    return weights_lib.text(weights, case.rows, case.prompt)


@functools.cache
def _program(directory: str, rows: int, read: int, new: int, temperature: float) -> Callable:
    module, variables = weights_lib.read(directory)
    draw = jax.jit(sampler(module, max_new=new, temperature=temperature))
    mask, keys = jnp.ones((rows, read), bool), iter(range(10**9))

    def work(prompts: jax.Array) -> np.ndarray:
        said = draw(variables, prompts, mask, jax.random.key(next(keys)))
        return np.asarray(said.tokens)

    return work


def decode(
    directory: str, prompts: list[list[int]], new: int, temperature: float, calls: int
) -> Any:
    """{'cpu_s' of a call, 'tokens'} of the sampler."""
    program = _program(directory, len(prompts), len(prompts[0]), new, temperature)
    read = jnp.asarray(prompts)
    took, said = turns.cpu_seconds(lambda: program(read), calls)
    return {'cpu_s': took, 'tokens': said.tolist()}


FUNCTIONS = {'decode': decode}


def measure(
    case: Case, workers: dict[str, turns.Worker], directory: str, weights: str, rounds: int
) -> tuple[turns.Comparison, float | None]:
    """Rates of both sides, and the share of greedy tokens that agree up to each row's first that
    does not; None where there is nothing to agree on."""
    given = dict(
        directory=directory, prompts=prompts(case, weights), new=case.new,
        temperature=case.temperature, calls=case.calls,
    )  # fmt: skip
    askers = {name: functools.partial(w.ask, 'decode', **given) for name, w in workers.items()}
    answers = turns.take_turns(askers, rounds)
    rates = turns.rates(answers, case.rows * case.new)
    compared = turns.Comparison(case.name(), rates['kd'], rates['peer'], case.target)
    if case.temperature or 'peer' not in answers:
        return compared, None
    ours, theirs = (np.asarray(answers[name][-1]['tokens']) for name in ('kd', 'peer'))
    return compared, float(np.minimum.accumulate(ours == theirs, axis=1).mean())


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; exit status 1 if a target is missed or greedy answers differ."""
    parser = turns.parser('kd.benchmarks.decode', __doc__)
    weights_lib.add_argument(parser)
    parser.add_argument('--only', default='', help='cases whose name begins so')
    parser.add_argument('--new', type=int, default=0, help='tokens to write; 0 for those told')
    parser.add_argument('--json', type=process.file_argument, help='also write the numbers there')
    options = parser.parse_args(argv)
    if options.rounds < 1 or options.new < 0:
        parser.error('--rounds must be at least 1, and --new at least 0')
    cases = [case for case in CASES if case.name().startswith(options.only)]
    cases = [case for case in cases if options.weights or case.model == 'toy']
    if not options.weights:
        print(f'SmolLM2 is left out: name its file by --weights or {weights_lib.VARIABLE}.')
    if not cases:
        raise UserError(f"no case begins with '{options.only}'.")
    found, agreements, peer = compare(
        [case._replace(new=options.new or case.new) for case in cases], options
    )
    print(turns.table(found, peer))
    for each in agreements:
        print(f'Greedy answers agree in {100 * each:.1f} % of their tokens.')
    if options.json:
        record = [each._asdict() | {'ratios': each.ratios()} for each in found]
        files.write_json(options.json, {'peer': peer, 'cases': record, 'agreement': agreements})
    missed = any(each.missed() for each in found)
    return int(missed or any(each < AGREEMENT for each in agreements))


def rows(options: argparse.Namespace) -> list[turns.Row]:
    """Its ratios: see `kd.benchmarks`."""
    if not options.peers:
        return []
    found, agreements, peer = compare(
        [c for c in CASES if options.weights or c.model == 'toy'], options
    )
    if any(each < AGREEMENT for each in agreements):
        raise UserError(f'greedy answers differ: {agreements}')
    return [each.row(peer) for each in found]


def compare(
    cases: Sequence[Case], options: argparse.Namespace
) -> tuple[list[turns.Comparison], list[float], str]:
    """Rates of all cases, the shares of greedy tokens that agree, and the peer's name."""
    found, agreements = [], []
    models = {'toy': TOY} | ({SMOLLM2: options.weights} if options.weights else {})
    with (
        tempfile.TemporaryDirectory() as folder,
        turns.sides('kd.benchmarks.decode', generate.__name__, options) as (workers, peer),
    ):
        directories = {
            name: weights_lib.write(Path(folder) / name, model) for name, model in models.items()
        }
        for case in cases:
            compared, agreement = measure(
                case, workers, directories[case.model], options.weights, options.rounds
            )
            found.append(compared)
            agreements += [] if agreement is None else [agreement]
            print(turns.table([compared], peer).splitlines()[-1], file=sys.stderr, flush=True)
    return found, agreements, peer


if __name__ == '__main__':
    process.command(main)
