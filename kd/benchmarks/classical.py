"""Value and gradient of the classical losses, against mdistiller's and torchdistill's.

    KD_PEERS=peers/bin/python python -m kd.benchmarks.classical

| loss, batches of 64 | target: at most, of the peers' CPU time |
|---|---|
| KD of 100 and of 1,000 classes | .6 |
| DKD of 100 and of 1,000 classes | .5 |
| AT, maps of 8 x 8 x 64 | .25 |
| RKD, distances and angles of 64 features | .2 |
| NST, maps of 8 x 8 x 64 | .05 |
| PKT of 64 features | .3 |
| ReviewKD's loss of a level, maps of 8 x 8 x 64 | .1 |
| similarity preserving, maps of 8 x 8 x 64 | 1.1 |

| temporaries of value and gradient by XLA's analysis | target |
|---|---|
| RKD of 256 features, over the peers' differences [B, B, D] of both sides | 1, and no such array |
| NST, over the products [B, C, C, positions] that mdistiller holds | at most 1/8 |

Both sides are given one batch and take turns on one core, each in a process of its own: ours as a
compiled function of student and teacher, theirs as PyTorch runs it. They must agree in value and
gradient. torchdistill is the package, for the losses that it has; mdistiller is none, and
`kd.benchmarks.plain.classical` is written plainly after it.

On a core that others used too, medians of five rounds with torch 2.14.1, over mdistiller's and
torchdistill 1.1.5's: KD .52 and .52, of 1,000 classes .65 and .65, AT .28 and .30, RKD .13 and .13,
NST .014, PKT .22 and .20, ReviewKD .11 and .11, similarity preserving .77; temporaries .52 and
.095. KD of 1,000 classes, AT and ReviewKD miss.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kd import process
from kd.benchmarks import turns
from kd.benchmarks.peers import classical as peer_lib
from kd.losses import classification, divergence, feature, feature_maps, relation

BATCH, DEVIATION, WIDE = 64, 1e-4, 256
MAPS, ROWS = (8, 8, 64), (64,)
MEMORY = 1 / 8
_HELD: dict[str, Any] = {}


class Case(NamedTuple):
    """A loss to be measured.

    Attributes:
      name: as the peers' modules know it.
      loss: `loss(student, teacher, labels) -> [B]`, in units such that its mean is the peers'.
      shape: of an example.
      target: of the ratio of CPU times.
      calls: of either side in a round.
    """

    name: str
    loss: Callable[..., jax.Array]
    shape: tuple[int, ...]
    target: float
    calls: tuple[int, int] = (100, 100)


def _kd(s, t, labels):
    return 16 * divergence.forward_kl(s, t, temperature=4.0)


def _dkd(s, t, labels):
    return 16 * classification.decoupled_kd(s, t, labels, alpha=1.0, beta=8.0, temperature=4.0)


def _rkd(s, t, labels):
    return 25 * relation.rkd_distance(s, t) + 50 * relation.rkd_angle(s, t)


def _plain(loss: Callable[..., jax.Array], factor: float = 1.0) -> Callable[..., jax.Array]:
    return lambda s, t, labels: factor * loss(s, t)


CASES = {
    **{f'KD, {v}': Case('KD', _kd, (v,), 0.6) for v in (100, 1000)},
    **{f'DKD, {v}': Case('DKD', _dkd, (v,), 0.5) for v in (100, 1000)},
    'AT': Case('AT', _plain(feature.attention_transfer, 1 / 64), MAPS, 0.25),
    'RKD': Case('RKD', _rkd, ROWS, 0.2, (50, 10)),
    'NST': Case('NST', _plain(feature_maps.neuron_selectivity), MAPS, 0.05, (10, 1)),
    'PKT': Case('PKT', _plain(relation.probabilistic_transfer, 1 / BATCH), ROWS, 0.3),
    'ReviewKD': Case('ReviewKD', _plain(feature_maps.hierarchical_context), MAPS, 0.1, (50, 10)),
    'SP': Case('SP', _plain(feature.similarity_preserving), MAPS, 1.1, (50, 50)),
}


def arrays(shape: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Student, teacher and labels of a batch; of rows, features or logits."""
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, BATCH, *shape)).astype('f4')
    return student, teacher, rng.integers(0, shape[-1], BATCH)


def compiled(case: Case, shape: Sequence[int]) -> Any:
    """Value and gradient for the student of the mean."""

    def mean(student, teacher, labels):
        return jnp.mean(case.loss(student, teacher, labels))

    given = (jnp.asarray(x) for x in arrays(shape))
    return jax.jit(jax.value_and_grad(mean)).lower(*given).compile()


def prepare(case: str) -> None:
    """Compiles a case."""
    of = CASES[case]
    _HELD.update(run=compiled(of, of.shape), given=[jnp.asarray(x) for x in arrays(of.shape)])


def gradient(calls: int) -> dict[str, Any]:
    """{'cpu_s'} of value and gradient, and both."""
    took, (value, slope) = turns.cpu_seconds(
        lambda: jax.block_until_ready(_HELD['run'](*_HELD['given'])), calls
    )
    return {'cpu_s': took, 'value': float(value), 'gradient': slope.reshape(-1)[:64].tolist()}


FUNCTIONS = {'prepare': prepare, 'gradient': gradient}


def memory() -> list[turns.Row]:
    """Temporaries over the largest array of the peers, for which nothing is run."""
    rkd = compiled(CASES['RKD'], (WIDE,))
    differences, nst = 2 * BATCH * BATCH * WIDE * 4, compiled(CASES['NST'], MAPS)
    products = BATCH * MAPS[2] ** 2 * MAPS[0] * MAPS[1] * 4
    if re.search(rf'\[{BATCH},{BATCH},{WIDE}\]', rkd.as_text()):
        differences = 0  # An array that must not be there is a miss.
    return [
        turns.Row(
            f'RKD, {WIDE} features', 'both peers: the differences [B, B, D] of both sides',
            [_temporaries(rkd) / max(differences, 1)], 1.0, 'temporary memory',
        ),
        turns.Row(
            'NST, maps of 8 x 8 x 64', 'mdistiller: the products [B, C, C, positions]',
            [_temporaries(nst) / products], MEMORY, 'temporary memory',
        ),
    ]  # fmt: skip


def _temporaries(program: Any) -> int:
    return program.memory_analysis().temp_size_in_bytes


def measured(case: str, workers: dict[str, Any], peer: str, rounds: int) -> list[turns.Row]:
    """A row for each peer that has the loss; what differs is an error."""
    of, forms = CASES[case], ('torchdistill', 'mdistiller')
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder) / f'{i}.npy') for i in range(3)]
        for file, x in zip(files, arrays(of.shape), strict=True):
            np.save(file, x)
        workers['kd'].ask('prepare', case=case)
        workers['peer'].ask('prepare', loss=of.name, arrays=files)
    ours, theirs = of.calls
    askers = {'kd': partial(workers['kd'].ask, 'gradient', calls=ours)}
    for form in forms:
        asker = partial(workers['peer'].ask, 'gradient', form=form, calls=theirs)
        if asker():
            askers[form] = asker
    answers = turns.take_turns(askers, rounds)
    plain = f'mdistiller, written plainly, {peer.split(", ")[1]}'
    names = {'torchdistill': peer, 'mdistiller': plain}
    found = []
    for form in askers.keys() - {'kd'}:
        _check(case, form, answers['kd'][0], answers[form][0])
        seconds = ([each['cpu_s'] for each in answers[side][1:]] for side in ('kd', form))
        work = f'{case}, batches of {BATCH}'
        found.append(turns.Row(work, names[form], turns.over(*seconds), of.target))
    return sorted(found, key=lambda row: row.peer)


def _check(case: str, form: str, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Raises ValueError where the two sides computed different things."""
    value = abs(ours['value'] - theirs['value']) / abs(theirs['value'])
    a, b = np.array(ours['gradient']), np.array(theirs['gradient'])
    slope = np.linalg.norm(a - b) / np.linalg.norm(b)
    if max(value, slope) > DEVIATION:
        raise ValueError(f'{case}: kd and {form} differ by {value:.1e} and {slope:.1e} of a unit.')


def rows(options: argparse.Namespace) -> list[turns.Row]:
    """Its ratios; see `kd.benchmarks`."""
    if not options.peers:
        return []
    with turns.sides('kd.benchmarks.classical', peer_lib.__name__, options) as (workers, peer):
        found = [row for case in CASES for row in measured(case, workers, peer, options.rounds)]
    return [*found, *memory()]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; exit status 1 if a target is missed."""
    options = turns.parser('kd.benchmarks.classical', __doc__).parse_args(argv)
    if options.rounds < 1:
        raise SystemExit('--rounds must be at least 1')
    found = rows(options) or memory()
    print('| loss | peer | of | ratio | target |\n|---|---|---|---:|---:|')
    for row in found:
        cells = (row.work, row.peer, row.of, turns.middle(row.ratios, 3), f'{row.target:g}')
        print(f'| {" | ".join(cells)} |')
    return int(any(row.missed() for row in found))


if __name__ == '__main__':
    process.command(main)
