"""A step of distillation of a language model, against TRL's chunked divergence on the same weights.

    KD_SMOLLM2=FILE KD_PEERS=peers/bin/python python -m kd.benchmarks.distil_step

The teacher is SmolLM2-135M (`--weights`, a GGUF file), the student ten of its thirty blocks; two
rows of 256 tokens, of which the first half are a prompt. Forward passes of both, the generalised
Jensen-Shannon divergence (1/2) over the tokens that count, gradients, their clipping and AdamW, in
float32 on one core. Ours is the compiled step of a stage, as `kd.main` runs it. Both sides take
turns in processes of their own, a ratio is the median over rounds, and peaks are those of the
processes, from their start to their end.

TRL is measured twice: it gets the hidden states of the answers alone, as its trainer hands them
over where all prompts are of one length, or those of all tokens and a mask, as packed rows need
them; see `kd.benchmarks.peers.divergence`. Without a Python that has it, ours alone is measured;
without weights, a small model of random ones.

| | target |
|---|---|
| tokens per CPU second | at least 1.6 times TRL |
| peak memory | at most .9 times TRL |
| losses of the first step | equal to 1e-4 |

Measured on a core of an EPYC 9004 that others used too: 121 tokens per CPU second against 62, 1.91
times (1.83-2.01), and 2,949 MiB against 3,432, .86 times, with a mask. Of the answers alone, where
TRL does not project what is masked either: 121 against 94, 1.23 times (1.06-1.38), and 1.04 times
the memory, both of which miss. Of 4.1 s a step 1.2 are the sweep over the vocabulary, of which TRL
makes three; the rest, products of the blocks at 65 to 84 GFLOP a second (the core has some 83) and
AdamW, is the same work on both sides. Of our peak, 1.2 GiB are weights and moments, .8 temporaries,
and .45 what the compiler leaves behind.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kd import config as kd_config
from kd import files, process
from kd.benchmarks import turns, weights
from kd.benchmarks.peers import divergence
from kd.data import sources
from kd.io import pretrained
from kd.models.decoder import Decoder
from kd.parallel import mesh as mesh_lib
from kd.training import step as step_lib
from kd.training.stage import prepare as prepare_stage

SPEED, MEMORY, DEVIATION = 1.6, 0.9, 1e-4
LR = 1e-5
# What TRL is given, and whether that is all tokens.
FORMS = {'the answers alone': False, 'all tokens and a mask': True}
REASONS = {
    'the answers alone': (
        'what is masked is not projected by TRL either, so that the passes through the blocks and '
        'AdamW are what is left to compare; of our peak a part is what the compiler leaves behind.'
    ),
    'all tokens and a mask': '',
}
SMALL = Decoder(num_classes=512, width=64, depth=6, heads=4, kv_heads=2, max_length=512)


def given(context: Any, *, tokens: Sequence[Sequence[int]], prompt: int, vocabulary: int) -> Any:
    """A source of given rows of tokens, of which the first `prompt` do not count."""
    text = np.asarray(tokens, np.int32)
    counted = np.broadcast_to(np.arange(text.shape[1]) >= prompt, text.shape)

    def read(indices: np.ndarray) -> sources.Batch:
        return {'input': text[indices], 'response_mask': counted[indices], 'index': indices}

    spec = {
        'input': jax.ShapeDtypeStruct(text.shape[1:], np.int32),
        'response_mask': jax.ShapeDtypeStruct(text.shape[1:], np.bool_),
    }
    data = sources.DataSet('rows', {'train': len(text)}, lambda _: read, spec, vocabulary)
    return sources.Source(data, context.split)


def recipe(directory: str, blocks: list[int], tokens: Sequence[Sequence[int]], prompt: int) -> Any:
    """The stage `student`, of some of the teacher's blocks."""
    vocabulary = pretrained.describe(f'hf:{directory}').vocabulary
    config = kd_config.recipe(
        stages=('student',),
        data=dict(
            source=dict(
                name='kd.benchmarks.distil_step.given', tokens=tokens, prompt=prompt,
                vocabulary=vocabulary,
            ),
            train='train',
        ),
        pretrained=dict(teacher=dict(weights=f'hf:{directory}')),
    )  # fmt: skip
    config.student = kd_config.stage(
        network=dict(
            name='kd.io.pretrained.network', of=f'hf:{directory}', depth=len(blocks)
        ),
        teacher='teacher',
        references=dict(start='teacher'),
        method=dict(
            name='kd.methods.lm.distillation.distillation', blocks=blocks,
            divergence='kd.losses.divergence.generalized_jsd', beta=0.5, chunk=128,
        ),
        optimizer=dict(name='adamw', lr=LR, clip_norm=1.0),
        steps=10**6,
        batch_size=len(tokens),
    )  # fmt: skip
    return kd_config.parse(config)


_HELD: dict[str, Any] = {}


def prepare(directory: str, blocks: list[int], tokens: list[list[int]], prompt: int) -> None:
    """Makes the stage and its first state."""
    mesh = mesh_lib.make_mesh({'data': 1}, jax.devices()[:1])
    with tempfile.TemporaryDirectory() as folder:
        made = recipe(directory, blocks, tokens, prompt)
        stage = prepare_stage(made, 'student', mesh, Path(folder))
    _HELD.update(
        step=step_lib.make_train_step(stage),
        state=step_lib.initial_state(stage),
        frozen=stage.frozen,
        window=step_lib.abstract_arguments(stage)[2],
        batch=mesh_lib.put_batch(next(iter(stage.batches())), stage.batch_sharding()),
    )


def step() -> dict[str, float]:
    """{'cpu_s', 'loss'} of a step; the first one is compiled."""
    window = step_lib.zeros(_HELD['window'])

    def work() -> Any:
        state = _HELD.pop('state')
        return jax.block_until_ready(_HELD['step'](state, _HELD['frozen'], window, _HELD['batch']))

    took, (_HELD['state'], metrics) = turns.cpu_seconds(work)
    total, count = map(float, metrics['loss'])
    return {'cpu_s': took, 'loss': total / count}


FUNCTIONS = {'prepare': prepare, 'step': step, 'peak_mib': turns.peak_mib}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables; exit status 1 if a target is missed or the losses differ."""
    parser = turns.parser('kd.benchmarks.distil_step', __doc__)
    weights.add_argument(parser)
    parser.add_argument('--rows', type=int, default=2)
    parser.add_argument('--length', type=int, default=256, help='tokens of a row')
    parser.add_argument('--json', type=process.file_argument, help='also write the numbers there')
    options = parser.parse_args(argv)
    if min(options.rounds, options.rows) < 1 or options.length < 4:
        parser.error('--rounds and --rows must be at least 1, --length at least 4')
    if not options.weights:
        print(f'A small model of random weights: name SmolLM2 by --weights or {weights.VARIABLE}.')
    tokens = read(options.weights, options.rows, options.length)
    records, late = {}, False
    for title, whole in FORMS.items():
        records[title], short = compare(options, tokens, title, whole)
        late |= short
        if not records[title]['peer']:
            break
    if options.json:
        files.write_json(options.json, records)
    # What a small model costs is no measure.
    return int(bool(options.weights) and late)


def rows(options: argparse.Namespace) -> list[turns.Row]:
    """Its ratios, of SmolLM2 alone: see `kd.benchmarks`."""
    if not (options.peers and options.weights):
        return []
    found, length = [], 256
    options.rows, options.length = 2, length
    for title, whole in FORMS.items():
        of, _ = compare(options, read(options.weights, 2, length), title, whole)
        work, reason = f'2 x {length} tokens, 135M; TRL gets {title}', REASONS[title]
        peaks = of['peak_mib']['kd'] / of['peak_mib']['peer']
        found += [
            turns.Row(
                work, of['peer'], of['ratios'], SPEED, 'tokens per CPU second', least=True,
                reason=reason,
            ),
            turns.Row(work, of['peer'], [peaks], MEMORY, 'peak memory', reason=reason),
        ]  # fmt: skip
    return found


def read(file: str, count: int, length: int) -> list[list[int]]:
    """Rows of text for the model of a GGUF file, or of random tokens for the small one."""
    if file:
        return weights.text(file, count, length)
    rng = np.random.default_rng(0)
    return rng.integers(0, SMALL.num_classes, (count, length)).tolist()


def compare(
    options: Any, tokens: list[list[int]], title: str, whole: bool
) -> tuple[dict[str, Any], bool]:
    """Measures and prints one of `FORMS`; what was found, and whether a target is missed."""
    depth = 30 if options.weights else SMALL.depth
    with (
        tempfile.TemporaryDirectory() as folder,
        turns.sides('kd.benchmarks.distil_step', divergence.__name__, options) as (workers, peer),
    ):
        directory = weights.write(Path(folder) / 'teacher', options.weights or SMALL)
        given = dict(
            directory=directory, blocks=list(range(0, depth, 3)), tokens=tokens,
            prompt=options.length // 2,
        )  # fmt: skip
        more = {'kd': {}, 'peer': {'whole': whole, 'lr': LR}}
        for name, worker in workers.items():
            worker.ask('prepare', **given, **more[name])
        askers = {name: partial(worker.ask, 'step') for name, worker in workers.items()}
        answers = turns.take_turns(askers, options.rounds)
        peaks = {name: worker.ask('peak_mib') for name, worker in workers.items()}
    rates = turns.rates(answers, options.rows * options.length)
    work = f'{options.rows} x {options.length}, half masked, {depth} to {-(-depth // 3)} blocks'
    compared = turns.Comparison(work, rates['kd'], rates['peer'], SPEED)
    losses = {name: of[0]['loss'] for name, of in answers.items()}
    if peer:
        print(f'\n{peer} gets {title}.\n')
    print(turns.table([compared], peer))
    print(f'\nPeak memory, MiB: {_listed(peaks, 0)}; target at most {MEMORY} times {peer}.')
    print(f'Loss of the first step: {_listed(losses, 7)}.')
    record = dict(peer=peer, rates=rates, ratios=compared.ratios(), peak_mib=peaks, losses=losses)
    return record, missed(compared, peaks, losses)


def _listed(values: dict[str, float], digits: int) -> str:
    told = ', '.join(f'{name} {value:,.{digits}f}' for name, value in values.items())
    ratio = f' ({values["kd"] / values["peer"]:.3f} times)' if 'peer' in values else ''
    return told + ratio


def missed(compared: turns.Comparison, peaks: dict[str, float], losses: dict[str, float]) -> bool:
    """Whether there is a peer, and ours is too slow, too large or computes something else."""
    if 'peer' not in peaks:
        return False
    apart = abs(losses['kd'] - losses['peer'])
    return (
        compared.missed()
        or peaks['kd'] > MEMORY * peaks['peer']
        or apart > DEVIATION * losses['peer']
    )


if __name__ == '__main__':
    process.command(main)
