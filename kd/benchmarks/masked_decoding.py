"""Masked decoding against a plain loop in torch, and what few-step methods hold and compute.

    KD_PEERS=peers/bin/python python -m kd.benchmarks.masked_decoding
    python -m kd.benchmarks.masked_decoding --peers= --rounds=3

| measure | target |
|---|---|
| tokens and calls of 32 prompts, and those of the loop in torch | equal |
| CPU seconds of a batch over those of as many forwards as its slowest row has calls | at most 1.1 |
| temporaries of certainty at 126,464 symbols, of a block of 32 in 384, over dense ones | 1/8 |
| operations of its head over dense ones | at most .1 |
| temporaries of coupled masks, [8, 1024] of 50,257 symbols; of Gaussians 1.6 GB | 1 MB |
| operations of a step of ArcFlow, TSCD and MDT-dist over the sum of its passes | at most 1.05 |

The peer is `kd.benchmarks.peers.masked`, which decodes a prompt at a time and asks its host after
each call; weights are random and of one file. Sizes are those of programs that are compiled, and
operations those of `kd.aot.hlo.flops`; of these nothing runs.

On a core that others used too, two rounds: tokens and calls equal to those of torch 2.14, whose
loop took 1.9 times as many CPU seconds; a call over a forward .99; .074 and .092; .066 MB; and 1.00
for all three steps.
"""

from __future__ import annotations

import functools
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from kd import files, process
from kd.aot import hlo
from kd.benchmarks import turns
from kd.benchmarks.peers import masked as peer_lib
from kd.claims import flow_world, seeds
from kd.losses import masked_diffusion as losses
from kd.methods.flow.arcflow import arcflow
from kd.methods.flow.hyper_sd import tscd
from kd.methods.flow.mdt_dist import mdt_dist
from kd.models.decoder import Decoder
from kd.models.transformer import Transformer
from kd.network import Network, from_linen
from kd.sampling import masked
from kd.state import path_name

VOCABULARY, PROMPT, ANSWER, BLOCK, PROMPTS, THRESHOLD = 48, 32, 32, 16, 32, 1.0
DEPTH, WIDTH, HEADS = 4, 128, 4
CALL, CERTAINTY, HEAD, MEGABYTES, STEP = 1.1, 1 / 8, 0.1, 1.0, 1.05
_HELD: dict[str, Any] = {}


def module() -> Transformer:
    """The network that decodes."""
    return Transformer(
        VOCABULARY, WIDTH, DEPTH, HEADS, max_length=PROMPT + ANSWER, causal=False, extra_symbols=1
    )


def prompts() -> np.ndarray:
    """int32 [prompts, PROMPT]."""
    return np.random.default_rng(0).integers(0, VOCABULARY, (PROMPTS, PROMPT)).astype(np.int32)


def prepare(file: str) -> None:
    """Writes random weights, of a head that is surer of some positions than of others."""
    network = from_linen(module(), jax.ShapeDtypeStruct((1, PROMPT + ANSWER), jnp.int32))
    params = network.init(jax.random.key(0))['params']
    params = jax.tree.map(lambda x: 3.0 * x, params)
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    safetensors.numpy.save_file({path_name(path): np.asarray(x) for path, x in leaves}, file)
    rule, mask = masked.entropy_below(THRESHOLD), VOCABULARY

    def decode(variables, tokens, first):
        logits = masked.logits_function(network, variables, mask)
        return masked.decode(logits, tokens, first, mask=mask, block=BLOCK, rule=rule, limit=ANSWER)

    def forward(variables, tokens):
        return network.apply(variables, tokens).logits

    _HELD.update(variables={'params': params}, decode=jax.jit(decode), forward=jax.jit(forward))


def decode(calls: int) -> dict[str, Any]:
    """{'cpu_s' of all prompts at once, 'forward_s' of one call, their 'tokens' and 'calls'}."""
    read = prompts()
    tokens = jnp.asarray(np.pad(read, ((0, 0), (0, ANSWER))))
    first = jnp.full(len(read), PROMPT)
    variables = _HELD['variables']
    took, (rows, number) = turns.cpu_seconds(
        lambda: jax.block_until_ready(_HELD['decode'](variables, tokens, first)), calls
    )
    once = functools.partial(_HELD['forward'], variables, rows)
    forward, _ = turns.cpu_seconds(lambda: jax.block_until_ready(once()), 8 * calls)
    return {
        'cpu_s': took,
        'forward_s': forward,
        'tokens': rows.tolist(),
        'calls': number.tolist(),
    }


FUNCTIONS = {'prepare': prepare, 'decode': decode}


def certainty(vocabulary: int = 126_464, length: int = 384, block: int = 32) -> dict[str, float]:
    """Temporaries and operations of the head of certainty forcing, block alone over all positions.

    Of the gradient of both terms as `certainty_forcing` asks for them, with a network of width 64
    below the head.
    """
    of = Decoder(vocabulary, width=64, depth=1, heads=2, mlp_hidden=64, tied=False, causal=False)
    network = from_linen(of, jax.ShapeDtypeStruct((1, length), jnp.int32))
    variables = jax.eval_shape(network.init, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    found: dict[str, list[float]] = {'temporaries': [], 'operations': []}
    for count in (block, length):

        def loss(variables, z, labels, count=count):
            at = None if count == length else jnp.arange(count)[None]
            logits = masked.logits_function(network, variables, vocabulary - 1)(z, None, at)
            where = jnp.ones(labels[:, :count].shape, bool)
            hard = losses.masked_ce(logits, labels[:, :count], where)
            sure = losses.certainty(logits, labels[:, :count], where, temperature=0.5)
            return (hard + 2.0 * sure).sum()

        compiled: Any = jax.jit(jax.grad(loss)).lower(variables, tokens, tokens).compile()
        # The gradient of the head is a result, and as large for both.
        found['temporaries'].append(compiled.memory_analysis().temp_size_in_bytes)
        found['operations'].append(hlo.flops(jax.grad(loss), variables, tokens, tokens))
    return {name: part / whole for name, (part, whole) in found.items()}


def coupled(vocabulary: int = 50_257, shape: tuple[int, int] = (8, 1024)) -> dict[str, float]:
    """Megabytes beside arguments and results: of masks of one uniform, and of Gaussians."""

    def by_uniform(key, tokens, early, late):
        uniform = jax.random.uniform(key, tokens.shape)
        return tuple(losses.corrupt(uniform, tokens, alpha, vocabulary) for alpha in (early, late))

    def by_gaussians(key, tokens, early, late):
        noise = jax.random.normal(key, (*tokens.shape, vocabulary))
        of_token = jax.nn.one_hot(tokens, vocabulary)
        return tuple(
            jnp.where(jnp.argmax(r[:, None, None] * of_token + noise, -1) == tokens, tokens,
                      vocabulary)
            for r in (early, late)
        )  # fmt: skip

    given = (
        jax.eval_shape(lambda: jax.random.key(0)),
        jax.ShapeDtypeStruct(shape, jnp.int32),
        *(jax.ShapeDtypeStruct(shape[:1], jnp.float32),) * 2,
    )
    found = {}
    for name, function in (('uniform', by_uniform), ('gaussians', by_gaussians)):
        compiled: Any = jax.jit(function).lower(*given).compile()
        found[name] = compiled.memory_analysis().temp_size_in_bytes / 1e6
    return found


def steps(width: int = 256, batch: int = 64) -> dict[str, dict[str, float]]:
    """Of a step of each flow method: operations over the sum of its passes, and traced calls."""
    world = flow_world.World(np.arange(1), width=width, depth=3)
    plain = teacher = world.network()
    cases: dict[str, tuple[Network, Any, dict[str, int]]] = {
        # Two segments: the student forward and back, and four calls of the teacher each.
        'ArcFlow': (world.network(8), arcflow, {'both': 2, 'teacher': 8}),
        'TSCD': (plain, tscd, {'both': 1, 'student': 1, 'teacher': 1}),
        # Both terms: the student forward and back, its derivatives in time, and the teacher.
        'MDT-dist': (plain, mdt_dist, {'both': 2, 'student': 3, 'teacher': 2}),
    }
    found = {}
    for name, (network, build, passes) in cases.items():
        traces = 0

        def counted(*arguments, of=network, **more):
            nonlocal traces
            traces += 1
            return of.apply(*arguments, **more)

        context = seeds.context(
            network=network._replace(apply=counted), teacher=teacher, spec=flow_world.SPEC,
            steps=1, optimizer=dict(name='adam', lr=1e-3),
        )  # fmt: skip
        method = build(context)
        frozen = {'teacher': jax.eval_shape(teacher.init, jax.random.key(0))}
        state = jax.eval_shape(method.init, jax.random.key(0), frozen)
        x = jax.ShapeDtypeStruct((batch, 2), jnp.float32)
        before = traces
        total = hlo.flops(method.step, state, {'input': x})
        needed = _passes(network, teacher, x)
        found[name] = {
            'operations': total / sum(count * needed[of] for of, count in passes.items()),
            'calls': traces - before,
        }
    return found


def _passes(network: Network, teacher: Network, x: jax.ShapeDtypeStruct) -> dict[str, int]:
    """Operations of a call of each network, and of one of the student forward and back."""
    t = jax.ShapeDtypeStruct(x.shape[:1], x.dtype)
    own, theirs = (jax.eval_shape(of.init, jax.random.key(0)) for of in (network, teacher))

    def said(variables, t, x, of=network):
        return of.apply(variables, t, t, x).logits

    def loss(variables, t, x):
        return jnp.square(said(variables, t, x)).sum()

    return {
        'student': hlo.flops(said, own, t, x),
        'teacher': hlo.flops(functools.partial(said, of=teacher), theirs, t, x),
        'both': hlo.flops(jax.grad(loss), own, t, x),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the numbers; exit status 1 if a target is missed."""
    parser = turns.parser('kd.benchmarks.masked_decoding', __doc__)
    parser.add_argument('--json', type=process.file_argument, help='also write the numbers there')
    options = parser.parse_args(argv)
    late: list[str] = []
    rows: dict[str, Any] = {'decoding': against_torch(options, late)}
    rows['certainty'] = certainty()
    rows['coupled'] = coupled()
    rows['steps'] = steps()
    shares = rows['certainty']
    for what, value, most in (
        ('temporaries of certainty, block over dense', shares['temporaries'], CERTAINTY),
        ('operations of certainty, block over dense', shares['operations'], HEAD),
        ('megabytes of coupled masks', rows['coupled']['uniform'], MEGABYTES),
        *(
            (f'operations of {name} over its passes', each['operations'], STEP)
            for name, each in rows['steps'].items()
        ),
    ):
        print(f'{what}: {value:.3f}, target at most {most:.3f}')
        late += [f'{what}: {value:.3f} > {most:.3f}'] * (value > most)
    print(f'megabytes of one-hot Gaussians: {rows["coupled"]["gaussians"]:,.0f}')
    if options.json:
        files.write_json(options.json, rows)
    for line in late:
        print(f'missed: {line}')
    return int(bool(late))


def against_torch(options: Any, late: list[str]) -> dict[str, Any]:
    """Both sides on the same prompts; adds to `late` what misses its target."""
    with (
        tempfile.TemporaryDirectory() as folder,
        turns.sides('kd.benchmarks.masked_decoding', peer_lib.__name__, options) as (
            workers,
            peer,
        ),
    ):
        file = str(Path(folder) / 'weights.safetensors')
        workers['kd'].ask('prepare', file=file)
        askers: dict[str, Callable[[], Any]] = {
            'kd': functools.partial(workers['kd'].ask, 'decode', calls=1)
        }
        if 'peer' in workers:
            workers['peer'].ask('prepare', file=file, depth=DEPTH, heads=HEADS)
            askers['peer'] = functools.partial(
                workers['peer'].ask, 'decode', prompts=prompts().tolist(), answer=ANSWER,
                block=BLOCK, threshold=THRESHOLD, mask=VOCABULARY, calls=1,
            )  # fmt: skip
        answers = turns.take_turns(askers, options.rounds)
    ours = answers['kd'][1:]
    most, total = max(ours[0]['calls']), sum(ours[0]['calls'])
    each = [one['cpu_s'] / (most * one['forward_s']) for one in ours]
    row: dict[str, Any] = {'calls': ours[0]['calls'], 'call_over_forward': each}
    print(f'{PROMPTS} prompts: at most {most} calls, {total} in all')
    print(f'a call over a forward: {turns.middle(each, 2)}, target at most {CALL:g}')
    late += [f'a call over a forward: {statistics.median(each):.2f}'] * (
        statistics.median(each) > CALL
    )
    if 'peer' in answers:
        theirs = answers['peer'][1:]
        same = all(ours[0][what] == theirs[0][what] for what in ('tokens', 'calls'))
        row['equal'], row['peer'] = same, peer
        row['peer_over_kd'] = [b['cpu_s'] / a['cpu_s'] for a, b in zip(ours, theirs, strict=True)]
        print(f'tokens and calls of {peer}: {"equal" if same else "others"}')
        print(f'its CPU seconds over ours: {turns.middle(row["peer_over_kd"], 2)}')
        late += [] if same else [f'tokens or calls are not those of {peer}']
    return row


if __name__ == '__main__':
    process.command(main)
