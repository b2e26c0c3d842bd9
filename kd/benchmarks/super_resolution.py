"""IMDN against torch, resampling against Pillow, and what recorded solutions of TAD-SR save.

    python -m kd.benchmarks.super_resolution
    KD_PEERS=peers/bin/python python -m kd.benchmarks.super_resolution

| measure | target |
|---|---|
| CPU seconds of IMDN x2 over torch's with the same weights, 64 and 128 pixels | at most 1.0 |
| the same, 256 pixels | at most .95 |
| temporary memory at 64 pixels | at most 12 MB |
| MATLAB's bicubic, 512 to 256 pixels, over Pillow's speed | at least a third |
| a step of TAD-SR (no discriminator) that solves its teacher over one that reads | at least 3 |

The peer is `kd.benchmarks.peers.imdn`, the released forward pass; weights are random and of one
file, both sides take turns on one core. Pillow shrinks by its own bicubic, whose numbers differ.

On a core that others used too, against torch 2.14, the ratios were .77 (.76-.79), .90 (.87-.90) and
.87 (.82-.88), outputs equal to 1e-6, memory 11.8 MB and the speed .92 of Pillow's. With recorded
solutions a step of perceptrons of 3 x 512 has a quarter of the operations, and was 3.23 (3.04-3.36)
times as fast in batches of 512; in batches of 128, where what is done to parameters alone weighs
more, 2.52 (2.39-2.70).
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from PIL import Image

from kd import files, process, resample
from kd.benchmarks import turns
from kd.benchmarks.peers import imdn as peer_lib
from kd.claims import seeds
from kd.io import torch_weights
from kd.losses.schedule import residual_shift
from kd.methods.sr.tad_sr import tad_sr
from kd.models.imdn import IMDN
from kd.models.shifted import Shifted, ShiftedMLP
from kd.network import from_linen

SIDES = {64: 1.0, 128: 1.0, 256: 0.95}
MEGABYTES, PILLOW, SAVED = 12.0, 1 / 3, 3.0
SCALE, BLOCKS = 2, 6
_HELD: dict[str, Any] = {}


def module() -> IMDN:
    """The network that is measured."""
    return IMDN(SCALE, blocks=BLOCKS)


def prepare(file: str) -> None:
    """Writes random weights under the names of the release, and takes them."""
    of = module()
    low = jnp.asarray(peer_lib.picture(64))
    variables = jax.jit(of.init)(jax.random.key(0), low)
    tensors = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(variables['params'])[0]:
        *modules, last = (key.key for key in path)
        name = of.released_name('.'.join([*modules, torch_weights.LEAVES[last]]))
        axes = (3, 2, 0, 1) if last == 'kernel' else (0,)
        tensors[name] = np.ascontiguousarray(np.transpose(leaf, axes))
    safetensors.numpy.save_file(tensors, file)
    _HELD.update(apply=jax.jit(of.apply), variables=variables)


def forward(side: int, calls: int) -> dict[str, Any]:
    """{'cpu_s'} of a picture, and a few of the pixels that it becomes."""
    x = jnp.asarray(peer_lib.picture(side))
    took, found = turns.cpu_seconds(
        lambda: jax.block_until_ready(_HELD['apply'](_HELD['variables'], x)), calls
    )
    return {
        'cpu_s': took,
        'pixels': np.asarray(found, float).reshape(-1)[:: 3 * side][:64].tolist(),
    }


FUNCTIONS = {'prepare': prepare, 'forward': forward}


def temporaries(side: int) -> float:
    """Megabytes beside arguments and result of a call."""
    of, low = module(), jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    variables = jax.eval_shape(of.init, jax.random.key(0), low)
    compiled: Any = jax.jit(of.apply).lower(variables, low).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 1e6


def resampling(rounds: int) -> dict[str, list[float]]:
    """CPU seconds of 512 to 256 pixels, ours and Pillow's."""
    picture = np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)
    image = Image.fromarray(picture)
    work: dict[str, Callable[[], Any]] = {
        'kd': lambda: resample.resize(picture, (256, 256), 'matlab'),
        'pillow': lambda: np.asarray(image.resize((256, 256), Image.Resampling.BICUBIC)),
    }
    askers = {name: partial(turns.cpu_seconds, of, 20) for name, of in work.items()}
    answers = turns.take_turns(askers, rounds)
    return {name: [took for took, _ in of[1:]] for name, of in answers.items()}


def solutions(rounds: int, width: int = 512, batch: int = 512) -> dict[str, list[float]]:
    """CPU seconds of a step of TAD-SR with recorded solutions and with those of its own."""
    path = residual_shift()
    shape = jax.ShapeDtypeStruct((8, 8, 1), jnp.float32)
    spec = dict.fromkeys(('input', 'low', 'noise', 'sample'), shape)
    of = Shifted(ShiftedMLP(width=width), path)
    network = from_linen(of, *of.example_inputs(spec))
    context = seeds.context(
        network=network, teacher=network, spec=spec, steps=1, optimizer=dict(name='adam', lr=1e-4)
    )
    method = tad_sr(context, adversarial=0)
    rng = np.random.default_rng(0)
    recorded = {
        name: jnp.asarray(rng.normal(size=(batch, *x.shape)), x.dtype) for name, x in spec.items()
    }
    teacher = jax.jit(network.init)(jax.random.key(0))
    state = jax.jit(method.init)(jax.random.key(1), {'teacher': teacher})
    step = jax.jit(method.step)
    alone = {name: x for name, x in recorded.items() if name != 'sample'}

    def timed(given: dict[str, jax.Array]) -> Callable[[], Any]:
        return partial(turns.cpu_seconds, lambda: jax.block_until_ready(step(state, given)), 5)

    askers = {'recorded': timed(recorded), 'solved': timed(alone)}
    answers = turns.take_turns(askers, rounds)
    return {name: [took for took, _ in of[1:]] for name, of in answers.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the numbers; exit status 1 if a target is missed."""
    parser = turns.parser('kd.benchmarks.super_resolution', __doc__)
    parser.add_argument('--sides', nargs='*', type=int, choices=SIDES, default=list(SIDES))
    parser.add_argument('--json', type=process.file_argument, help='also write the numbers there')
    options = parser.parse_args(argv)
    late: list[str] = []
    rows: dict[str, Any] = {'forward': against_torch(options, late)}
    megabytes = rows['temporaries'] = temporaries(64)
    print(f'temporary memory at 64 pixels: {megabytes:.1f} MB, target at most {MEGABYTES:g}')
    late += [f'temporaries: {megabytes:.1f} MB'] * (megabytes > MEGABYTES)
    for what, took, over, under, least in (
        ('speed of bicubic over Pillow', resampling(options.rounds), 'pillow', 'kd', PILLOW),
        ('a step that solves over one that reads', solutions(options.rounds), 'solved', 'recorded',
         SAVED),
    ):  # fmt: skip
        ratios = [a / b for a, b in zip(took[over], took[under], strict=True)]
        rows[what] = took | {'ratios': ratios}
        print(f'{what}: {turns.middle(ratios, 2)}, target at least {least:.2f}')
        late += [f'{what}: {statistics.median(ratios):.2f}'] * (statistics.median(ratios) < least)
    if options.json:
        files.write_json(options.json, rows)
    for line in late:
        print(f'missed: {line}')
    return int(bool(late))


def against_torch(options: Any, late: list[str]) -> dict[str, Any]:
    """Both sides by size of picture; adds to `late` what misses its target."""
    rows: dict[str, Any] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        turns.sides('kd.benchmarks.super_resolution', peer_lib.__name__, options) as (
            workers,
            peer,
        ),
    ):
        file = str(Path(folder) / 'weights.safetensors')
        workers['kd'].ask('prepare', file=file)
        if 'peer' in workers:
            workers['peer'].ask('prepare', file=file, scale=SCALE, blocks=BLOCKS)
        print(f'| pixels | kd, CPU ms | {peer} | ratio | target | outputs apart |')
        print('|---|---:|---:|---:|---:|---:|')
        for side in options.sides:
            calls = max(1, (128 // side) ** 2)
            askers = {
                k: partial(w.ask, 'forward', side=side, calls=calls) for k, w in workers.items()
            }
            answers = turns.take_turns(askers, options.rounds)
            took = {k: [each['cpu_s'] for each in of[1:]] for k, of in answers.items()}
            row = rows[str(side)] = {'seconds': took}
            cells = [turns.middle([1000 * x for x in took[k]]) for k in took]
            if 'peer' in took:
                row['ratios'] = [a / b for a, b in zip(took['kd'], took['peer'], strict=True)]
                pixels = [np.asarray(of[-1]['pixels']) for of in answers.values()]
                row['apart'] = float(np.abs(pixels[0] - pixels[1]).max())
                cells += [turns.middle(row['ratios'], 2), f'{SIDES[side]}', f'{row["apart"]:.1e}']
                if statistics.median(row['ratios']) > SIDES[side]:
                    late.append(f'{side} pixels: {statistics.median(row["ratios"]):.2f}')
            print(f'| {side} | {" | ".join(cells)} |', flush=True)
    return rows


if __name__ == '__main__':
    process.command(main)
