"""What claims of reinforcement learning on chains share (`kd.data.builders.chain`).

All runs of all arms begin with one base and are trained side by side; what differs between them is
their seed, and numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kd.claims import seeds
from kd.context import Context
from kd.data import chains
from kd.data.builders import arithmetic, chain, symbols
from kd.io import safetensors
from kd.models import decoders
from kd.network import Network, from_linen
from kd.sampling.autoregressive import Sampler, sampler
from kd.state import PyTree
from kd.training import loop

REWARD = {'name': 'kd.rewards.printed.printed'}
# Prompts and answers to each, of a step.
PROMPTS, GROUP = 16, 8
# PAD and BOS are never said.
DRAWS: dict[str, Any] = {
    'max_new': 6,
    'stop': (symbols.EOS,),
    'forbidden': (symbols.PAD, symbols.BOS),
}
SAMPLING = {'group': GROUP, **DRAWS}


class Size(NamedTuple):
    """Of a claim: what a step takes, problems of both splits, and the depth of its network."""

    prompts: int = PROMPTS
    group: int = GROUP
    train: int = 20_000
    test: int = 800
    depth: int = 2

    @property
    def sampling(self) -> dict[str, Any]:
        """Of a method."""
        return {**SAMPLING, 'group': self.group}


# What shows that a claim runs.
SMOKE = Size(prompts=2, group=2, train=20, test=40, depth=1)


@functools.cache
def network(width: int = 64, depth: int = 2) -> Network:
    """The network of the bases of `configs/rl/bases.py`, but for the width of one of them; a smoke
    takes less depth."""
    inputs = jax.ShapeDtypeStruct((1, 10), jnp.int32)
    return from_linen(decoders.preset('toy', width=width, depth=depth), inputs)


def base(variant: str, stage: str, smoke: bool = False, *, own: Network | None = None) -> PyTree:
    """Parameters of a base of `configs/rl/bases.py`, which is trained if nobody has; those of
    nobody where `smoke`."""
    if smoke:
        return (own or network()).init(jax.random.key(len(variant)))['params']
    place = loop.provide(f'configs/rl/bases.py:{variant}')
    return safetensors.stage_variables(place / stage)['params']


def problems(split: str, size: int = 0, **options: Any) -> dict[str, np.ndarray]:
    """Prompts, and what answers have to print; `options` as of `kd.data.chains.make`."""
    law = arithmetic.law('truth', third=options.get('third', 'affine'))
    made = chains.make(split, size, law=law, **options)
    names = ('input', 'prompt_mask', 'printed', 'cliff')
    return {name: made[name] for name in names if name in made}


def context(
    asked: Mapping[str, np.ndarray],
    steps: int,
    *,
    references: Sequence[str] = ('start',),
    own: Network | None = None,
) -> Context:
    """For a method's builder: Adam whose `learning_rate` is a hyperparameter of each run; a teacher
    and references are such networks too."""
    own = own or network()
    spec = {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in asked.items()}
    return seeds.context(
        network=own, teacher=own, references=dict.fromkeys(references, own), steps=steps,
        tx=optax.inject_hyperparams(optax.adam)(learning_rate=4e-4), batch_size=PROMPTS, spec=spec,
        num_classes=symbols.TOKENS,
    )  # fmt: skip


def measure(
    params: PyTree,
    asked: Mapping[str, np.ndarray],
    seed: int = 0,
    *,
    own: Network | None = None,
    max_new: int = 6,
    greedy: bool = True,
) -> dict[str, np.ndarray]:
    """What runs, parameters [R, ...], say to prompts [N, ...], one run after another.

    Args:
      params, asked: see above.
      seed: of the draws.
      own: their network; `network()` by default.
      max_new: tokens of the longest answer.
      greedy: whether the most probable answer is looked at too.

    Returns:
      right [R, N], whether the sampled answer is; greedy [R, N], the most probable one; entropy
      [R], -log p of a sampled token.
    """
    of_run, key = _measured(own or network(), max_new, greedy), jax.random.key(seed)
    asked, count = dict(asked), len(jax.tree.leaves(params)[0])
    found = [
        of_run(jax.tree.map(lambda x, run=run: x[run], params), asked, key) for run in range(count)
    ]
    return {name: np.stack([of_one[name] for of_one in found]) for name in found[0]}


@functools.cache
def _measured(own: Network, max_new: int, greedy: bool):
    how = {**DRAWS, 'max_new': max_new}
    decoder: Any = own.module
    draws: dict[str, Sampler] = {'right': sampler(decoder, **how)}
    if greedy:
        draws['greedy'] = sampler(decoder, temperature=0.0, **how)

    @jax.jit
    def of_run(params, asked, key):
        found, variables = {}, {'params': params}
        for name, draw in draws.items():
            said = draw(variables, asked['input'], asked['prompt_mask'], key)
            found[name] = chain.passes(said.tokens, said.mask, asked['printed'])
            if name == 'right':
                found['entropy'] = -said.log_probs.sum() / said.mask.sum()
        return found

    return of_run
