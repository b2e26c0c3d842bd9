"""A cycle of DMD2 over the passes that it needs, and against one written plainly in torch.

    python -m kd.benchmarks.score_distillation
    KD_PEERS=peers/bin/python python -m kd.benchmarks.score_distillation

A cycle is one move of a generator of one step and some moves of its critic, compiled as one program
(`kd.methods.diffusion.dmd`). What it needs is

| pass | of what | how often |
|---|---|---|
| gradient, and through the critic's trunk where there is a discriminator | generator | once |
| forward, twice the rows with guidance | teacher | once |
| forward | critic | once |
| forward | generator, of the critic's fresh samples | once less than the critic moves |
| gradient, and of the trunk for real and generated examples | critic | at every move |

| measure | target |
|---|---|
| executed operations over those of the passes | at most 1.02 with one move, 1.05 with five |
| temporary memory over that of the dearest pass, its AdamW included | at most 1.05 |
| time over that of the passes, each a program of its own | at most 1.15, 1.25 for the UNet |
| programs | 1 |
| moments and gradient of adapters of SD 1.5 and SDXL over the whole network's | at most .02 |
| time against torch, same UNet of Stable Diffusion's form, one core | at most 1.2 |

Operations are counted on the program before it is compiled, see `kd.aot.hlo.flops`. There the
sample of each of the critic's moves counts, and the first is not drawn anew: it is taken off. The
peer is `kd.benchmarks.peers.dmd2`, the published loop over the UNet of diffusers; weights are
random, both sides start from one file, take turns, and are compared in CPU seconds.

Measured on two cores of an EPYC 9004 that others used too, medians of three rounds:

| cycle | operations | memory | time |
|---|---:|---:|---:|
| mlp, 1 and 5 critic moves | 1.000 | 6.54, 4.29 | 1.04, 1.03 |
| dit, 1 and 5 | 1.000 | 1.62, 1.13 | .99, .90 |
| unet, 1 | 1.000 | 2.83 | 1.04 |

One program each; adapters .0074 and .0181; 2.10 s of CPU against torch's 1.97, 1.06 (1.04-1.06).
The memory of XLA on CPUs misses its target everywhere, most where parameters outweigh activations.
A third of it is its scheduler, which runs what is independent side by side: the mlp's cycle holds
8.0 vectors of parameters, and 5.3 with --xla_cpu_enable_concurrency_optimized_scheduler=false in
XLA_FLAGS. Barriers between the players change nothing.
"""

from __future__ import annotations

import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kd import files, process
from kd.aot import hlo
from kd.benchmarks import turns
from kd.benchmarks.distillation_cycle import Case, cases, cycle, passes
from kd.benchmarks.peers import dmd2
from kd.io import pretrained
from kd.losses import schedule
from kd.models import adapters
from kd.models.denoiser import Denoised
from kd.models.unet_conditional import preset
from kd.network import from_linen

OPERATIONS = {1: 1.02, 5: 1.05}
MEMORY, TIME, UNET_TIME, ADAPTERS, PEER = 1.05, 1.15, 1.25, 0.02, 1.2
# Adapters of SD and SDXL: queries and values of all attentions.
TARGETS, RANK = r'(to_q|to_v)/kernel$', 64


def measured(case: Case, updates: int, rounds: int) -> dict[str, float]:
    """Ratios of a cycle over its passes; with `rounds` of 0 without their time."""
    made = cycle(case, updates)
    needed = passes(case, made, updates)
    operations = {name: hlo.flops(f, *arguments) for name, (_, f, arguments) in needed.items()}
    necessary = sum(needed[name][0] * count for name, count in operations.items())
    # Under `alternate` the first move of several has the sample of the generator.
    spared = operations['critic asked'] if updates > 1 else 0
    executed = hlo.flops(made.method.step, made.state, made.batch) - spared
    step = jax.jit(made.method.step, donate_argnums=0)
    lowered = step.lower(made.state, made.batch)
    compiled = lowered.compile()
    alone = {
        name: jax.jit(f).lower(*arguments).compile() for name, (_, f, arguments) in needed.items()
    }
    dearest = max(map(_temporaries, alone.values()))
    row = {
        'operations': executed / necessary,
        'memory': _temporaries(compiled) / dearest,
    }
    state, seconds = jax.tree.map(jnp.copy, made.state), []
    for _ in range(rounds and rounds + 1):
        took, (state, _) = _timed(partial(step, state, made.batch))
        each = sum(
            times * _timed(partial(alone[name], *needed[name][2]))[0]
            for name, (times, _, _) in needed.items()
        )
        seconds.append((took, each))
    if rounds:
        row['time'] = statistics.median(took / each for took, each in seconds[1:])
        row['ms'] = 1000 * statistics.median(took for took, _ in seconds[1:])
    # The count of operations and the program share one.
    row['traces'] = made.traces()
    return row


def _temporaries(compiled: Any) -> int:
    return compiled.memory_analysis().temp_size_in_bytes


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    found = jax.block_until_ready(work())
    return time.perf_counter() - began, found


def adapter_share(of: str) -> float:
    """Numbers that adapters of a UNet train over those of the UNet itself."""
    module = preset(of)
    spec = {'input': jax.ShapeDtypeStruct((64, 64, 4), jnp.float32)}
    inputs = Denoised(module, schedule.discrete(), 'eps').example_inputs(spec)
    params = jax.eval_shape(module.init, jax.random.key(0), *inputs)['params']
    drawn = functools.partial(adapters.drawn, adapter=adapters.Adapter(rank=RANK, targets=TARGETS))
    own = jax.eval_shape(drawn, jax.random.key(0), params)
    return _size(own) / _size(params)


def _size(tree: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))


_HELD: dict[str, Any] = {}


def prepare(directory: str, shape: list[int], batch: int, text: list[int], updates: int) -> None:
    """A cycle of the UNet in a directory, and its first state."""
    module = pretrained.network(f'hf:{directory}')
    case = Case(
        Denoised(module, schedule.discrete(), 'eps'), tuple(shape), batch, 999.0,
        {'text': tuple(text)}, unroll=True,
    )  # fmt: skip
    spec = {'input': jax.ShapeDtypeStruct(case.shape, jnp.float32)}
    network = from_linen(case.module, *case.module.example_inputs(spec))
    teacher = pretrained.load(
        f'hf:{directory}', jax.eval_shape(network.init, jax.random.key(0)), dtype=jnp.float32
    )
    made = cycle(case, updates, teacher)
    _HELD.update(made=made, step=jax.jit(made.method.step, donate_argnums=0), state=made.state)


def step() -> dict[str, float]:
    """{'cpu_s'} of a cycle; the first one is compiled."""
    made = _HELD['made']

    def work() -> Any:
        return jax.block_until_ready(_HELD['step'](_HELD.pop('state'), made.batch))

    took, (_HELD['state'], _) = turns.cpu_seconds(work)
    return {'cpu_s': took}


def asked(seed: int) -> list[float]:
    """What the network says of a noise, to see that both sides have the same one."""
    made = _HELD['made']
    x, t, text = (jnp.asarray(each) for each in dmd2.question(seed, made.batch))
    said = made.network.module.inner.apply(
        {'params': made.state.frozen['teacher']['params']}, t, x, text=text
    )
    return np.asarray(said, np.float64).reshape(-1)[:8].tolist()


FUNCTIONS = {'prepare': prepare, 'step': step, 'asked': asked, 'peak_mib': turns.peak_mib}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables; exit status 1 if a target is missed."""
    parser = turns.parser('kd.benchmarks.score_distillation', __doc__)
    parser.add_argument('--cases', nargs='*', choices=cases(), default=list(cases()))
    parser.add_argument('--json', type=process.file_argument, help='also write the numbers there')
    options = parser.parse_args(argv)
    rows, late = {}, []
    print('| cycle | operations | memory | time | ms | programs |')
    print('|---|---:|---:|---:|---:|---:|')
    for name in options.cases:
        for updates, target in OPERATIONS.items():
            row = measured(cases()[name], updates, options.rounds)
            rows[f'{name}, {updates}'] = row
            print(
                f'| {name}, {updates} critic moves | {row["operations"]:.3f} | '
                f'{row["memory"]:.2f} | {row.get("time", float("nan")):.2f} | '
                f'{row.get("ms", float("nan")):.0f} | {row["traces"]} |',
                flush=True,
            )
            limits = dict(
                operations=target, memory=MEMORY, time=UNET_TIME if name == 'unet' else TIME,
                traces=1,
            )  # fmt: skip
            late += [
                f'{name}, {updates} critic moves: {key} {row[key]:.3f} > {limit}'
                for key, limit in limits.items()
                if row.get(key, 0) > limit
            ]
    for of in ('sd15', 'sdxl'):
        rows[f'adapters, {of}'] = {'share': adapter_share(of)}
        share = rows[f'adapters, {of}']['share']
        print(f'adapters of rank {RANK} on queries and values, {of}: {share:.4f} of the network')
        late += [f'adapters of {of}: {share:.4f} > {ADAPTERS}'] * (share > ADAPTERS)
    rows['peer'] = against_torch(options, late)
    if options.json:
        files.write_json(options.json, rows)
    for line in late:
        print(f'missed: {line}')
    return int(bool(late))


def rows(options: Any) -> list[turns.Row]:
    """Its ratio to torch: see `kd.benchmarks`."""
    found = against_torch(options, [])
    if not found:
        return []
    work = 'cycle of five critic moves, UNet of 16 x 16 x 4, batch 8'
    return [turns.Row(work, f'DMD2 written plainly, {found["peer"]}', found['ratios'], PEER)]


def against_torch(options: Any, late: list[str]) -> dict[str, Any]:
    """The cycle of a UNet of diffusers beside torch's; adds to `late` what misses its target."""
    if not options.peers:
        print(f'No peer: name a Python with diffusers by --peers or {turns.VARIABLE}.')
        return {}
    with (
        tempfile.TemporaryDirectory() as folder,
        turns.sides('kd.benchmarks.score_distillation', dmd2.__name__, options) as (workers, peer),
    ):
        given = dict(
            directory=str(Path(folder) / 'unet'), shape=[16, 16, 4], batch=8, text=[8, 64],
            updates=5,
        )  # fmt: skip
        for name in ('peer', 'kd'):
            workers[name].ask('prepare', **given)
        said = {name: worker.ask('asked', seed=3) for name, worker in workers.items()}
        apart = float(np.max(np.abs(np.subtract(said['kd'], said['peer']))))
        askers = {name: partial(worker.ask, 'step') for name, worker in workers.items()}
        answers = turns.take_turns(askers, options.rounds)
    seconds = {name: [each['cpu_s'] for each in of[1:]] for name, of in answers.items()}
    ratios = turns.over(seconds['kd'], seconds['peer'])
    print(
        f'CPU seconds of a cycle of five critic moves, UNet of {given["shape"]}, batch 8: kd '
        f'{turns.middle(seconds["kd"], 2)}, {peer} {turns.middle(seconds["peer"], 2)}, ratio '
        f'{turns.middle(ratios, 2)}; target at most {PEER}. Outputs of the same weights differ by '
        f'{apart:.1e}.'
    )
    if statistics.median(ratios) > PEER:
        late.append(f'against torch: {statistics.median(ratios):.2f} > {PEER}')
    return dict(peer=peer, seconds=seconds, ratios=ratios, apart=apart)


if __name__ == '__main__':
    process.command(main)
